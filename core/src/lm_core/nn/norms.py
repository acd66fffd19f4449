"""Normalisation without biases.

``LayerNorm`` has a gain and no bias (PaLM, arXiv 2204.02311, section 2: "no biases" helped large models train).
``RMSNorm`` is arXiv 1910.07467. Statistics are always taken in at least float32 and the result has the input's dtype.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.checks import check_positive, typed


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, angles and probabilities: float64 for float64 and float32 for any other ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2norm(t: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Scales the last dimension to unit Euclidean length; a zero vector stays zero."""
    return F.normalize(t.to(statistics_dtype(t.dtype)), dim=-1).to(t.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with a gain and no bias; ``eps`` is added to the variance."""

    @typed
    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_positive(dim, "dim")
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Normalises ``x``; the kernel takes half-precision statistics in float32."""
        return torch.layer_norm(x, self.gamma.shape, self.gamma, None, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension with a gain; ``eps`` is added to the mean square."""

    @typed
    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive(dim, "dim")
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Divides ``x`` by its root mean square and applies the gain."""
        wide = x.to(statistics_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.gamma).to(x.dtype)
