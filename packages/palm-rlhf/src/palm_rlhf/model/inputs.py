"""Checks of the arguments of ``PaLM``, made before any computation."""

import torch
from torch import Tensor

from lm_core.nn.kv_cache import KVCache


def check_inputs(
    x: Tensor, *, mask: Tensor | None, cache: KVCache | None, document_ids: Tensor | None, causal: bool
) -> None:
    """Checks dtypes and shapes of a forward's arguments; reads no values.

    Raises:
        TypeError: ``x`` holds no integers or ``mask`` is not boolean.
        ValueError: shapes do not fit each other or the cache.
    """
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"x must hold integer token ids, got dtype {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (b, n) with at least one row and token, got {tuple(x.shape)}")
    if cache is not None and not causal:
        raise ValueError("a cache needs a causal model, got causal=False")
    if cache is not None and cache.batch_size != x.shape[0]:
        raise ValueError(f"cache holds {cache.batch_size} rows, got a batch of {x.shape[0]}")
    past = 0 if cache is None else cache.past
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True at real tokens), got dtype {mask.dtype}")
        if mask.shape != (x.shape[0], past + x.shape[1]):
            expected = (x.shape[0], past + x.shape[1])
            raise ValueError(f"mask must have shape (b, cached + new) = {expected}, got {tuple(mask.shape)}")
    elif cache is not None and cache.masked:
        raise ValueError("mask is None but the cache was filled under one: pass the mask of all positions")
    if document_ids is not None:
        if cache is not None:
            raise ValueError("document_ids are for whole sequences: cache must be None")
        if document_ids.shape != x.shape:
            raise ValueError(f"document_ids must have the shape of x {tuple(x.shape)}, got {tuple(document_ids.shape)}")
        if document_ids.dtype.is_floating_point:
            raise TypeError(f"document_ids must be integers, got dtype {document_ids.dtype}")


def check_extra_embed(extra_embed: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Raises unless ``extra_embed`` is floating point and broadcasts to ``shape``, which is ``(b, n, d)``."""
    if extra_embed is None:
        return
    if not extra_embed.is_floating_point():
        raise TypeError(f"extra_embed must be floating point, got dtype {extra_embed.dtype}")
    sizes = (1,) * (3 - extra_embed.ndim) + tuple(extra_embed.shape)
    if len(sizes) > 3 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(f"extra_embed must broadcast to (b, n, d) = {shape}, got shape {tuple(extra_embed.shape)}")


def is_same_everywhere(extra_embed: Tensor | None) -> bool:
    """True if an extra embedding is the same at every position, and so applies to later tokens too."""
    return extra_embed is not None and (extra_embed.ndim < 2 or extra_embed.shape[-2] == 1)


def for_all_positions(extra_embed: Tensor, b: int, dim: int) -> Tensor:
    """An extra embedding for generation, ``(b or 1, 1, d)``.

    Raises:
        ValueError: it differs between positions, or another size does not fit.
        TypeError: it is not floating point.
    """
    check_extra_embed(extra_embed, (b, 1, dim))
    return extra_embed.reshape((1,) * (3 - extra_embed.ndim) + tuple(extra_embed.shape))


def as_matrix(t: Tensor) -> Tensor:
    """``(..., n)`` with any leading dimensions as ``(b, n)``."""
    return t.unsqueeze(0) if t.ndim < 2 else t.flatten(0, -2)
