"""Local causal attention over the segment and remembered keys: the layers that do not search a memory.

Keys and values are shared by all heads (arXiv 1911.02150) or each head has its own. Positions come in through an
additive bias, in which what a query may not see is -inf.

Legend: b batch, h heads, g key heads (1 or h), i queries, j keys, d feature of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.checks import check_positive, check_probability, typed

# Takes the new keys and values (b, g, i, d), returns those of everything that may be attended to (b, g, j, d).
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def keys_as_given(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Remembers nothing: the keys of the segment alone."""
    return keys, values


class Projections(nn.Module):
    """Queries, keys and values of a layer, and the way back.

    Args:
        dim: features of the residual stream.
        heads: query heads.
        dim_head: features of a head.
        multi_head_keys: keys and values of their own for each head.
        output_bias: whether the output projection has a bias.
    """

    @typed
    def __init__(self, *, dim: int, heads: int, dim_head: int, multi_head_keys: bool, output_bias: bool) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            check_positive(value, name)
        self.heads, self.dim_head = heads, dim_head
        self.key_heads = heads if multi_head_keys else 1
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.key_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=output_bias)

    def forward(self, x: Float[Tensor, "b i dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(b, h, i, d)``, keys and values ``(b, g, i, d)``."""
        q = rearrange(self.to_q(x), "b i (h d) -> b h i d", h=self.heads)
        k, v = rearrange(self.to_kv(x), "b i (two g d) -> two b g i d", two=2, g=self.key_heads)
        return q, k, v

    def back(self, out: Float[Tensor, "b h i d"]) -> Float[Tensor, "b i dim"]:
        """Merges the heads and projects."""
        return self.to_out(rearrange(out, "b h i d -> b i (h d)"))


class LocalAttention(nn.Module):
    """Causal attention with an additive bias.

    Args:
        dim, heads, dim_head, multi_head_keys: as for ``Projections``.
        dropout: on attention weights, in training mode.
    """

    @typed
    def __init__(
        self, *, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0, multi_head_keys: bool = False
    ) -> None:
        super().__init__()
        check_probability(dropout, "dropout")
        self.dropout = dropout
        self.projections = Projections(
            dim=dim, heads=heads, dim_head=dim_head, multi_head_keys=multi_head_keys, output_bias=True
        )

    def forward(
        self,
        x: Float[Tensor, "b i dim"],
        *,
        bias: Float[Tensor, "#b h i j"],
        remember: Remember = keys_as_given,
    ) -> Float[Tensor, "b i dim"]:
        """Attends to what ``remember`` returns for the new keys.

        Args:
            x: normalised features.
            bias: added to the scores; -inf where a query may not look.
            remember: see ``Remember``.
        """
        q, k, v = self.projections(x)
        k, v = (t.to(q.dtype).expand(-1, q.shape[1], -1, -1) for t in remember(k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).expand(q.shape[0], -1, -1, -1), dropout)
        return self.projections.back(out)


def causal_distances(i: int, j: int, device: torch.device) -> Tensor:
    """Distances ``(i, j)`` of the last ``i`` of ``j`` positions to all of them; negative ahead of the query."""
    return torch.arange(j - i, j, device=device).unsqueeze(1) - torch.arange(j, device=device)
