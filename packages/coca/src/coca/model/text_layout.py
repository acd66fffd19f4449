"""Captions as token ids, their padding, and the position of CLS.

A caption is ``BOS text EOS``, without an id that the tokenizer lacks; a long one loses text, not EOS, so that the model
learns to stop. Training, embedding and zero-shot classification share this rule.

The learned CLS embedding follows the last real token of its row. Under a causal mask it then sees the row's real tokens
and nothing else, no real token sees it, and no key needs a mask, since padding follows everything that is used. (The
original put it after the padding, at a rotary position that depended on the longest row.)

Without a mask only trailing ``pad_id`` are padding. With a mask, padding anywhere is first moved to the right, and
results are returned at the original positions.

Legend: b batch, n sequence, d feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.checks import check_ids, check_mask
from lm_core.nn.masking import positions_from_mask, right_pad
from lm_core.tokenizers import as_tokenizer

IGNORED = -100


def caption_ids(caption: str, tokenizer: Any, max_length: int | None = None) -> list[int]:
    """Ids of one caption.

    Args:
        caption: text to encode.
        tokenizer: caption tokenizer; see ``lm_core.tokenizers``.
        max_length: maximum number of ids, BOS and EOS included; None for no limit.

    Raises:
        ValueError: ``max_length`` leaves no place for text.
    """
    bos, eos = getattr(tokenizer, "bos_id", None), tokenizer.eos_id
    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    ids = list(tokenizer.encode(caption))
    if max_length is not None:
        limit = max_length - len(before) - len(after)
        if limit < 1:
            raise ValueError(f"max_length must leave room for text next to BOS and EOS, got {max_length}")
        ids = _whole_characters(ids, limit, tokenizer)
    return [*before, *ids, *after]


def encode_captions(
    captions: Sequence[str], tokenizer: Any, pad_id: int, max_length: int | None = None
) -> Int[Tensor, "b n"]:
    """Captions as one right-padded tensor; ``tokenizer`` is anything ``lm_core.tokenizers.as_tokenizer`` takes.

    Raises:
        ValueError: there is no caption, one has no tokens, or ``max_length`` leaves no place for text.
    """
    encoder = as_tokenizer(tokenizer)
    rows = [caption_ids(caption, encoder, max_length) for caption in captions]
    _refuse_rows(torch.tensor([not row for row in rows]), "captions must have at least one token each, got none")
    return right_pad([torch.tensor(row) for row in rows], pad_id)[0]


def _whole_characters(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """The first ``limit`` ids, or up to three fewer: a byte or byte-level BPE token may end inside a character."""
    for length in range(limit, max(limit - 4, -1), -1):
        if length >= len(ids) or not tokenizer.decode(ids[:length]).endswith("\ufffd"):
            return ids[:length]
    return ids[:limit]


@dataclass(frozen=True)
class TextLayout:
    """Texts with all padding on the right.

    Attributes:
        ids: token ids ``(b, n)``.
        lengths: number of real tokens of each row, ``(b,)``.
        mask: True at the real tokens of the original text; None if that was right-padded.
    """

    ids: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"]
    mask: Bool[Tensor, "b n"] | None

    def with_cls(self, tokens: Float[Tensor, "b n d"], cls: Float[Tensor, " d"]) -> Float[Tensor, "b n_plus_1 d"]:
        """Token embeddings with ``cls`` at position ``length`` of each row."""
        is_cls = torch.arange(tokens.shape[1] + 1, device=tokens.device) == rearrange(self.lengths, "b -> b 1")
        return torch.where(rearrange(is_cls, "b n -> b n 1"), cls.to(tokens.dtype), F.pad(tokens, (0, 0, 0, 1)))

    def cls_of(self, states: Float[Tensor, "b n_plus_1 d"]) -> Float[Tensor, "b d"]:
        """The state at CLS."""
        index = repeat(self.lengths, "b -> b 1 d", d=states.shape[-1])
        return states.gather(1, index).squeeze(1)

    def restored(self, states: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """States at the positions of the original text; undefined at padding."""
        if self.mask is None:
            return states
        index = repeat(positions_from_mask(self.mask), "b n -> b n d", d=states.shape[-1])
        return states.gather(1, index)

    def targets(self, labels: Int[Tensor, "b n"] | None = None) -> Int[Tensor, "b n_minus_1"]:
        """Labels of positions 0 to n-2: the label of the next position, or -100.

        Args:
            labels: target ids aligned with the original text, -100 to ignore a token; None takes the text itself.

        Raises:
            TypeError: ``labels`` are not integers.
            ValueError: ``labels`` have another shape, or the text has one token.
        """
        aligned, shape = self.ids, tuple(self.ids.shape)
        if shape[1] < 2:
            raise ValueError(f"text must have at least two tokens a row for a loss, got shape {shape}")
        if labels is not None:
            _check_integers(labels, "labels")
            if labels.shape != shape:
                raise ValueError(f"labels must have text's shape {shape} (shifted inside), got {tuple(labels.shape)}")
            aligned = _moved_left(labels.long(), self.mask)
        real = torch.arange(1, shape[1], device=self.ids.device) < rearrange(self.lengths, "b -> b 1")
        return aligned[:, 1:].masked_fill(~real, IGNORED)


def layout_of(text: Tensor, mask: Tensor | None, *, pad_id: int, eos_id: int | None, num_tokens: int) -> TextLayout:
    """Checks texts and locates their real tokens.

    Args:
        text: token ids ``(b, n)``.
        mask: True at real tokens; None takes trailing ``pad_id`` as padding. Where ``eos_id`` is ``pad_id``, the first
            of the trailing ones is the row's end and real.
        pad_id, eos_id, num_tokens: special ids and vocabulary size of the model.

    Raises:
        TypeError: ``text`` does not hold integers, or ``mask`` is not boolean.
        ValueError: shapes do not fit, an id is out of range, a row begins with padding without a mask, or a row has no
            real token (values are checked on the CPU only).
    """
    _check_integers(text, "text")
    if text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"text must have shape (b, n) with at least one row and token, got {tuple(text.shape)}")
    text = text.long()
    if mask is None:
        trailing = (text == pad_id).flip(-1).long().cumprod(dim=-1).sum(dim=-1)
        lengths = text.shape[1] - trailing
        if eos_id == pad_id:
            lengths = (lengths + 1).clamp(max=text.shape[1])
    else:
        check_mask(mask, "mask", text.shape)
        lengths = mask.sum(dim=-1)
        # Values at padding are never used and need not be token ids.
        text = _moved_left(text.masked_fill(~mask, pad_id), mask)
    if text.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(text, num_tokens, "text")
        _refuse_rows(lengths == 0, "text must have a real token in every row, got only padding")
        if mask is None and eos_id != pad_id:
            rule = f"text must not begin with padding (pad_id {pad_id}) unless mask= marks the real tokens, got it"
            _refuse_rows(text[:, 0] == pad_id, rule)
    return TextLayout(text, lengths, mask)


def _refuse_rows(rows: Tensor, message: str) -> None:
    refused = rows.nonzero().flatten().tolist()
    if refused:
        raise ValueError(f"{message} in rows {refused[:8]}")


def _check_integers(ids: Tensor, name: str) -> None:
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer token ids, got dtype {ids.dtype}")


def _moved_left(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t.gather(1, (~mask).long().argsort(dim=-1, stable=True))
