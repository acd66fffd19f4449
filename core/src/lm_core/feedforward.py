"""Gated feed-forward activation (SwiGLU, arXiv 2002.05202), alone and at the end of a fused projection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Numbers a tile of the gradient on a CPU: what three operations in turn read and write then stays in its cache.
_TILE = 2**17


class _SplitSwiGLU(torch.autograd.Function):
    """Keeps only its input and writes every gradient into one tensor: less memory and fewer copies than autograd's."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected)
        ctx.sizes = sizes
        *parts, x, gate = projected.split_with_sizes(_with_halves(projected, sizes), -1)
        return *parts, F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        sizes = _with_halves(projected, ctx.sizes)
        gradient = torch.empty_like(projected)
        *parts, _, _ = gradient.split_with_sizes(sizes, -1)
        for part, value in zip(parts, upstream, strict=False):
            part.copy_(value)
        half = sizes[-1]
        flat, flat_gradient = projected.view(-1, projected.shape[-1]), gradient.view(-1, projected.shape[-1])
        flat_upstream = upstream[-1].reshape(-1, half)
        rows = flat.shape[0]
        tile = _TILE // half if projected.device.type == "cpu" else rows
        for start in range(0, rows, max(1, tile)):
            here = slice(start, start + tile)
            x, gate = flat[here, -2 * half : -half], flat[here, -half:]
            step = flat_upstream[here]
            torch.mul(F.silu(gate), step, out=flat_gradient[here, -2 * half : -half])
            torch.ops.aten.silu_backward.grad_input(step * x, gate, grad_input=flat_gradient[here, -half:])
        return gradient, None


def _with_halves(projected: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    half = (projected.shape[-1] - sum(sizes)) // 2
    return *sizes, half, half


def split_swiglu(projected: Float[Tensor, "... n"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Parts of a fused projection: the first as they are, and ``swiglu`` of all that is left.

    There are no second derivatives.

    Args:
        projected: features of the parts one after another.
        sizes: features of each of the first parts; an even number must be left.

    Returns:
        One tensor for each size, and the gated one.

    Raises:
        ValueError: what is left is odd, or nothing.
    """
    rest = projected.shape[-1] - sum(sizes)
    if rest % 2 or rest < 0:
        raise ValueError(f"SwiGLU needs an even last dimension, got shape {tuple(projected.shape)} less {list(sizes)}")
    if torch.compiler.is_compiling() or not projected.requires_grad:
        *parts, x, gate = projected.split_with_sizes(_with_halves(projected, sizes), -1)
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
