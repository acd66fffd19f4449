"""What the model accepts: checks made before any work is done."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_core.checks import check_ids
from memorizing_transformer.memory.memory_list import KNNMemoryList


def whole_number(value: int | float, name: str) -> int:
    """``value`` as an integer of at least 0.

    Raises:
        ValueError: it is none.
    """
    if value != int(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value}")
    return int(value)


def layer_numbers(
    layers: int | Sequence[int] | None, depth: int, name: str, *, default: tuple[int, ...]
) -> tuple[int, ...]:
    """Layers counted from 1, in ascending order.

    Raises:
        ValueError: a layer does not exist, or comes twice.
    """
    if layers is None:
        return default
    chosen = (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in chosen if not 1 <= layer <= depth]
    if wrong:
        raise ValueError(f"{name} must be in 1 to {depth}, got {wrong}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} must be different from each other, got {list(chosen)}")
    return tuple(sorted(chosen))


def check_token(token: int | None, num_tokens: int, name: str) -> None:
    """Raises ``ValueError`` unless ``token`` is None or in the vocabulary."""
    if token is not None and not 0 <= token < num_tokens:
        raise ValueError(f"{name} must be a token in [0, {num_tokens}), got {token}")


def check_inputs(x: Tensor, *, mask: Tensor | None, past: int, num_tokens: int) -> None:
    """Checks ids and mask.

    Raises:
        TypeError: ``x`` holds no integers or ``mask`` is not boolean.
        ValueError: a shape does not fit, or (on the CPU) an id is out of range.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x must hold integer token ids, got dtype {x.dtype}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (b, n) with at least one row and token, got {tuple(x.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True at real tokens), got dtype {mask.dtype}")
        if mask.shape != (x.shape[0], past + x.shape[1]):
            expected = (x.shape[0], past + x.shape[1])
            raise ValueError(f"mask must have shape (b, cached + new) = {expected}, got {tuple(mask.shape)}")
    if not x.is_cuda:
        check_ids(x, num_tokens, "x")


def check_labels(labels: Tensor, x: Tensor, *, num_tokens: int, ignore_index: int) -> None:
    """Checks labels.

    Raises:
        TypeError: they are no integers.
        ValueError: they have another shape than ``x``, or (on the CPU) one is out of range.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
    if labels.shape != x.shape:
        raise ValueError(f"labels must have the shape of x {tuple(x.shape)}, got {tuple(labels.shape)}")
    if not labels.is_cuda:
        check_ids(labels[labels != ignore_index], num_tokens, "labels")


def check_memories(memories: KNNMemoryList | None, b: int, *, layers: int, dim_head: int, key_heads: int) -> None:
    """Checks memories against the model and a batch of ``b`` rows.

    Raises:
        ValueError: their number, rows in scope, features or key heads do not fit.
    """
    if memories is None:
        return
    if len(memories) != layers:
        raise ValueError(f"knn_memories must have {layers} memories, got {len(memories)}")
    for number, memory in enumerate(memories):
        if len(memory.scoped_indices) != b:
            raise ValueError(f"knn_memories have {len(memory.scoped_indices)} rows in scope, x has a batch of {b}")
        if (memory.dim, memory.heads) != (dim_head, key_heads):
            raise ValueError(
                f"knn_memories[{number}] must have dim {dim_head} and {key_heads} key heads, "
                f"got {memory.dim} and {memory.heads}"
            )
