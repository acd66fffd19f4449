"""Texts: captions as token ids, where the real tokens are, and where CLS goes.

A caption is ``BOS text EOS`` with a tokenizer that has both, and without what it lacks; a long one loses text, not its
end, so that the model learns to stop. Training, embedding and zero-shot classification share this rule.

The learned CLS embedding follows the last real token of its row, wherever padding begins. Under a causal mask it
then sees the row's real tokens and nothing else, no token sees it, and no key needs a mask: padding comes after all
that is used. (The original put it after the padding, at a rotary position that depended on the longest row.)

Without a mask only trailing ``pad_id`` are padding. With a mask the rows are first moved together to the left, on
whichever side the padding is, and results are put back.

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

from lm_core.checks import check_ids
from lm_core.nn.masking import positions_from_mask, right_pad

IGNORED = -100


def caption_ids(caption: str, tokenizer: Any, max_length: int | None = None) -> list[int]:
    """Ids of one caption.

    Args:
        caption: the text.
        tokenizer: see ``lm_core.tokenizers``.
        max_length: tokens at most, BOS and EOS included; None for all.

    Raises:
        ValueError: ``max_length`` leaves no room for text.
    """
    bos, eos = getattr(tokenizer, "bos_id", None), tokenizer.eos_id
    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    ids = list(tokenizer.encode(caption))
    if max_length is not None:
        room = max_length - len(before) - len(after)
        if room < 1:
            raise ValueError(f"max_length must leave room for text next to BOS and EOS, got {max_length}")
        ids = ids[:room]
    return [*before, *ids, *after]


def encode_captions(
    captions: Sequence[str], tokenizer: Any, pad_id: int, max_length: int | None = None
) -> Int[Tensor, "b n"]:
    """Captions as one right-padded tensor.

    Raises:
        ValueError: there is no caption, one has no tokens, or ``max_length`` leaves no room for text.
    """
    rows = [caption_ids(caption, tokenizer, max_length) for caption in captions]
    empty = [number for number, row in enumerate(rows) if not row]
    if empty:
        raise ValueError(f"captions must have at least one token each, got none in rows {empty[:8]}")
    return right_pad([torch.tensor(row) for row in rows], pad_id)[0]


@dataclass(frozen=True)
class TextLayout:
    """A text whose padding is all on the right.

    Attributes:
        ids: tokens ``(b, n)``.
        lengths: real tokens of each row ``(b,)``.
        mask: True at the real tokens of the text as it was given; None where it was right-padded already.
    """

    ids: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"]
    mask: Bool[Tensor, "b n"] | None

    def with_cls(self, tokens: Float[Tensor, "b n d"], cls: Float[Tensor, " d"]) -> Float[Tensor, "b n_plus_1 d"]:
        """Token embeddings with ``cls`` at position ``length`` of each row."""
        places = torch.arange(tokens.shape[1] + 1, device=tokens.device) == rearrange(self.lengths, "b -> b 1")
        return torch.where(rearrange(places, "b n -> b n 1"), cls.to(tokens.dtype), F.pad(tokens, (0, 0, 0, 1)))

    def cls_of(self, states: Float[Tensor, "b n_plus_1 d"]) -> Float[Tensor, "b d"]:
        """The state at CLS."""
        index = repeat(self.lengths, "b -> b 1 d", d=states.shape[-1])
        return states.gather(1, index).squeeze(1)

    def restored(self, states: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """States at the places of the given text; what stands at padding has no meaning."""
        if self.mask is None:
            return states
        index = repeat(positions_from_mask(self.mask), "b n -> b n d", d=states.shape[-1])
        return states.gather(1, index)

    def targets(self, labels: Int[Tensor, "b n"] | None = None) -> Int[Tensor, "b n_minus_1"]:
        """Labels of positions 0 to n-2: the label of the next position, or -100.

        Args:
            labels: aligned with the given text, -100 where nothing is asked; None takes the text itself.
        """
        aligned = self.ids if labels is None else _moved_left(labels, self.mask)
        real = torch.arange(1, self.ids.shape[1], device=self.ids.device) < rearrange(self.lengths, "b -> b 1")
        return aligned[:, 1:].masked_fill(~real, IGNORED)


def layout_of(text: Tensor, mask: Tensor | None, *, pad_id: int, eos_id: int | None, num_tokens: int) -> TextLayout:
    """Checks a text and finds its real tokens.

    Args:
        text: token ids ``(b, n)``.
        mask: True at real tokens; None takes trailing ``pad_id`` as padding. Where ``eos_id`` is ``pad_id``, the first
            of the trailing ones is the row's end and real.
        pad_id: see above.
        eos_id: see above.
        num_tokens: ids are below it.

    Raises:
        TypeError: ``text`` holds no integers or ``mask`` is not boolean.
        ValueError: shapes do not fit, an id is out of range, a row begins with padding and no mask tells where it is
            real, or a row has no real token (values are read on a CPU only).
    """
    if text.dtype.is_floating_point or text.dtype == torch.bool:
        raise TypeError(f"text must hold integer token ids, got dtype {text.dtype}")
    if text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"text must have shape (b, n) with at least one row and token, got {tuple(text.shape)}")
    text = text.long()
    n = text.shape[1]
    if mask is None:
        trailing = (text == pad_id).flip(-1).long().cumprod(dim=-1).sum(dim=-1)
        lengths = n - trailing
        if eos_id == pad_id:
            lengths = (lengths + 1).clamp(max=n)
        _check_values(text, lengths, num_tokens, pad_id=None if eos_id == pad_id else pad_id)
        return TextLayout(text, lengths, None)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True at real tokens), got dtype {mask.dtype}")
    if mask.shape != text.shape:
        raise ValueError(f"mask must have the shape of text {tuple(text.shape)}, got {tuple(mask.shape)}")
    lengths = mask.sum(dim=-1)
    # What stands at padding is never used, and need not be a token.
    text = _moved_left(text.masked_fill(~mask, pad_id), mask)
    _check_values(text, lengths, num_tokens, pad_id=None)
    return TextLayout(text, lengths, mask)


def _moved_left(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t.gather(1, (~mask).long().argsort(dim=-1, stable=True))


def _check_values(text: Tensor, lengths: Tensor, num_tokens: int, *, pad_id: int | None) -> None:
    if text.device.type != "cpu" or torch.compiler.is_compiling():
        return
    check_ids(text, num_tokens, "text")
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"text must have a real token in every row, got only padding in rows {empty[:8]}")
    leading = [] if pad_id is None else (text[:, 0] == pad_id).nonzero().flatten().tolist()
    if leading:
        raise ValueError(
            f"text must not begin with padding (pad_id {pad_id}) unless a mask says which tokens are real, got it in "
            f"rows {leading[:8]}; pass mask="
        )
