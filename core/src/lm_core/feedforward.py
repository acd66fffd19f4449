"""Gated feed-forward activation (SwiGLU, arXiv 2002.05202)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def swiglu(x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
    """``silu(gate) * x`` with ``x, gate`` the two halves of the last dimension, in this order.

    Raises:
        ValueError: the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"SwiGLU needs an even last dimension, got shape {tuple(x.shape)}")
    x, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * x


class SwiGLU(nn.Module):
    """``swiglu`` as a module."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        """Halves the last dimension; see ``swiglu``."""
        return swiglu(x)
