"""Captions as token ids: the one rule that training, embedding and zero-shot classification share.

A caption is ``BOS text EOS`` with a tokenizer that has both, and without what it lacks; a long one loses text, not its
end, so that the model learns to stop.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.nn.masking import right_pad


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
            raise ValueError(f"max_length must leave room for text beside BOS and EOS, got {max_length}")
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
