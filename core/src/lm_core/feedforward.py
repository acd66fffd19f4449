"""Gated feed-forward activation (SwiGLU, arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input and writes both gradients into one tensor: less memory and fewer copies than autograd's."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        x, gate = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        x, gate = both.chunk(2, dim=-1)
        gradient = torch.empty_like(both)
        x_gradient, gate_gradient = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), upstream, out=x_gradient)
        torch.ops.aten.silu_backward.grad_input(upstream * x, gate, grad_input=gate_gradient)
        return gradient


def swiglu(x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
    """``silu(gate) * x`` with ``x, gate`` the two halves of the last dimension, in this order.

    There are no second derivatives.

    Raises:
        ValueError: the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"SwiGLU needs an even last dimension, got shape {tuple(x.shape)}")
    if torch.compiler.is_compiling() or not x.requires_grad:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    return _SwiGLU.apply(x)  # type: ignore[no-untyped-call]


class SwiGLU(nn.Module):
    """``swiglu`` as a module."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        """Halves the last dimension; see ``swiglu``."""
        return swiglu(x)
