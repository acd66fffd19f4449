"""Gated feed-forward activation (SwiGLU, arXiv 2002.05202), alone or as the last part of a fused projection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Elements in a tile of the gradient on a CPU: small enough that three successive operations stay in its cache.
_TILE = 2**17


class _SplitSwiGLU(torch.autograd.Function):
    """Saves only its input and writes every gradient into one tensor: less memory and fewer copies than autograd."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected)
        ctx.sizes = sizes
        *parts, x, gate = projected.split_with_sizes(sizes, -1)
        return *parts, F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        rows = projected.view(-1, projected.shape[-1])
        *_, x, gate = rows.split_with_sizes(ctx.sizes, -1)
        *parts, x_gradient, gate_gradient = gradient.view_as(rows).split_with_sizes(ctx.sizes, -1)
        *parts_upstream, gated = [value.flatten(0, -2) for value in upstream]
        for part, value in zip(parts, parts_upstream, strict=True):
            part.copy_(value)
        tile = max(1, _TILE // ctx.sizes[-1]) if gradient.device.type == "cpu" else max(1, rows.shape[0])
        for start in range(0, rows.shape[0], tile):
            here = slice(start, start + tile)
            step = gated[here]
            torch.mul(F.silu(gate[here]), step, out=x_gradient[here])
            torch.ops.aten.silu_backward.grad_input(step * x[here], gate[here], grad_input=gate_gradient[here])
        return gradient, None


def split_swiglu(projected: Float[Tensor, "... n"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Splits a fused projection: the first parts unchanged, then ``swiglu`` of the remaining features.

    There are no second derivatives.

    Args:
        projected: features of all parts, concatenated.
        sizes: features of each of the first parts; an even number must remain.

    Returns:
        One tensor for each size, then the gated features.

    Raises:
        ValueError: the number of remaining features is odd or negative.
    """
    half, odd = divmod(projected.shape[-1] - sum(sizes), 2)
    if odd or half < 0:
        raise ValueError(f"SwiGLU needs an even last dimension, got shape {tuple(projected.shape)} less {list(sizes)}")
    sizes = (*sizes, half, half)
    if torch.compiler.is_compiling() or not projected.requires_grad:
        *parts, x, gate = projected.split_with_sizes(sizes, -1)
        return *parts, F.silu(gate) * x
    split: tuple[Tensor, ...] = _SplitSwiGLU.apply(projected.contiguous(), sizes)  # type: ignore[no-untyped-call]
    return split


def swiglu(x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
    """``silu(gate) * x`` with ``x, gate`` the two halves of the last dimension, in this order.

    There are no second derivatives.

    Raises:
        ValueError: the last dimension is odd.
    """
    return split_swiglu(x, ())[0]


class SwiGLU(nn.Module):
    """``swiglu`` as a module."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        """Halves the last dimension; see ``swiglu``."""
        return swiglu(x)
