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
# Rows at a time whose gradients on a CPU make one product: enough for its full speed, few enough to be reused memory.
_ROWS = 512


class _SplitSwiGLU(torch.autograd.Function):
    """Keeps only its input and writes every gradient into one tensor: less memory and fewer copies than autograd's."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected)
        ctx.sizes = _with_halves(projected.shape[-1], sizes)
        *parts, x, gate = projected.split_with_sizes(ctx.sizes, -1)
        return *parts, F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        rows = projected.view(-1, projected.shape[-1])
        *_, x, gate = rows.split_with_sizes(ctx.sizes, -1)
        _write_gradient(gradient.view_as(rows), ctx.sizes, x, gate, [value.flatten(0, -2) for value in upstream])
        return gradient, None


class _ProjectSplitSwiGLU(torch.autograd.Function):
    """The projection and what follows, a part of the weight at a time, with the gradient of a few rows at a time.

    Only for a CPU. There the whole projection and its gradient are blocks so large that the C library asks the system
    for them anew each time, and getting the pages costs as much as half of the product.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.sizes = _with_halves(weight.shape[0], sizes)
        *parts, x, gate = (F.linear(features, part) for part in weight.split_with_sizes(ctx.sizes))
        ctx.save_for_backward(features, weight, x, gate)
        return *parts, F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight, x, gate = ctx.saved_tensors
        shape = features.shape
        features, x, gate = features.flatten(0, -2), x.flatten(0, -2), gate.flatten(0, -2)
        upstream = tuple(value.flatten(0, -2) for value in upstream)
        needs_features, needs_weight, _ = ctx.needs_input_grad
        # in the layout of each: the weight's may be column by column
        features_gradient = torch.empty_like(features) if needs_features else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        projected = features.new_empty(min(_ROWS, features.shape[0]), weight.shape[0])
        for start in range(0, features.shape[0], _ROWS):
            here = slice(start, start + _ROWS)
            gradient = projected[: features[here].shape[0]]
            _write_gradient(gradient, ctx.sizes, x[here], gate[here], [value[here] for value in upstream])
            if features_gradient is not None:
                torch.mm(gradient, weight, out=features_gradient[here])
            if weight_gradient is not None:
                weight_gradient.addmm_(gradient.t(), features[here])
        return None if features_gradient is None else features_gradient.view(shape), weight_gradient, None


def _write_gradient(
    gradient: Tensor, sizes: Sequence[int], x: Tensor, gate: Tensor, upstream: Sequence[Tensor]
) -> None:
    """Fills ``gradient`` (rows, n), that of a projection of parts with ``sizes``, the last two ``x`` and ``gate``."""
    *parts, x_gradient, gate_gradient = gradient.split_with_sizes(list(sizes), -1)
    for part, value in zip(parts, upstream, strict=False):
        part.copy_(value)
    rows = gradient.shape[0]
    tile = max(1, _TILE // sizes[-1]) if gradient.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, tile):
        here = slice(start, start + tile)
        step = upstream[-1][here]
        torch.mul(F.silu(gate[here]), step, out=x_gradient[here])
        torch.ops.aten.silu_backward.grad_input(step * x[here], gate[here], grad_input=gate_gradient[here])


def _with_halves(features: int, sizes: Sequence[int]) -> tuple[int, ...]:
    half = (features - sum(sizes)) // 2
    return *sizes, half, half


def _check_even(features: int, sizes: Sequence[int], what: str) -> None:
    rest = features - sum(sizes)
    if rest % 2 or rest < 0:
        raise ValueError(f"SwiGLU needs an even last dimension, got {what} less {list(sizes)}")


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
    _check_even(projected.shape[-1], sizes, f"shape {tuple(projected.shape)}")
    if torch.compiler.is_compiling() or not projected.requires_grad:
        *parts, x, gate = projected.split_with_sizes(_with_halves(projected.shape[-1], sizes), -1)
        return *parts, F.silu(gate) * x
    split: tuple[Tensor, ...] = _SplitSwiGLU.apply(projected.contiguous(), sizes)  # type: ignore[no-untyped-call]
    return split


def project_split_swiglu(
    x: Float[Tensor, "... d"], weight: Float[Tensor, "n d"], sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """``split_swiglu(F.linear(x, weight), sizes)``, on a CPU faster and with less memory where gradients are taken.

    There are no second derivatives.

    Args:
        x: features.
        weight: of the fused projection.
        sizes: see ``split_swiglu``.

    Returns:
        See ``split_swiglu``.

    Raises:
        ValueError: see ``split_swiglu``.
    """
    _check_even(weight.shape[0], sizes, f"weight of shape {tuple(weight.shape)}")
    is_cpu = x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    takes_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if torch.compiler.is_compiling() or not (is_cpu and takes_gradient):
        return split_swiglu(F.linear(x, weight), sizes)
    made: tuple[Tensor, ...] = _ProjectSplitSwiGLU.apply(x, weight, sizes)  # type: ignore[no-untyped-call]
    return made


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
