"""Values as histograms: HL-Gauss (arXiv 2403.03950, section 3.1), a classification loss for regression.

The range is divided into bins; a target becomes a normal distribution around it, integrated over each bin, and the
prediction is the expected bin centre. Targets outside the range are clamped to it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.checks import typed


class ValueBins(nn.Module):
    """Bins of equal width over ``[low, high]``.

    Args:
        low: lower end of the range.
        high: upper end of the range.
        bins: number of bins, at least 2.
        sigma: standard deviation of a target's distribution, in bin widths.

    Raises:
        ValueError: the range is empty, there are fewer than 2 bins, or ``sigma`` is not positive.
    """

    edges: Tensor

    @typed
    def __init__(self, *, low: float, high: float, bins: int = 51, sigma: float = 0.75) -> None:
        super().__init__()
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range must be two finite numbers, the lower first, got ({low}, {high})")
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a finite number above 0, got {sigma}")
        self.low = float(low)
        self.high = float(high)
        self.bins = bins
        self.sigma = float(sigma)
        self.register_buffer("edges", torch.linspace(low, high, bins + 1), persistent=False)

    def expected(self, logits: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape"]:
        """The mean of the predicted distribution."""
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        return (logits.softmax(dim=-1) * centres.to(logits.dtype)).sum(dim=-1)

    def targets(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape k"]:
        """Target distribution over bins of each value; sums to 1."""
        width = (self.high - self.low) / self.bins
        edges = self.edges.to(values.dtype)
        scaled = (edges - values.clamp(self.low, self.high)[..., None]) / (math.sqrt(2) * self.sigma * width)
        cumulative = torch.erf(scaled)
        mass = cumulative[..., 1:] - cumulative[..., :-1]
        return mass / (cumulative[..., -1:] - cumulative[..., :1])

    def loss(self, logits: Float[Tensor, "*shape k"], values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Cross-entropy of the prediction with the targets of ``values``, per entry."""
        return -(self.targets(values) * logits.log_softmax(dim=-1)).sum(dim=-1)
