"""Pre-norm transformer blocks with biases, attention before the feed-forward (CLIP, arXiv 2103.00020, section 2.4).

open_clip's CoCa consists of them: full multi-head attention, LayerNorm with biases, a feed-forward with GELU. They take
the place of the parallel blocks with ``CoCa(block="sequential")``.

Legend: b batch, n sequence, h heads, d feature.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.nn.attention import Attention
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.parallel_block import Positions

Activation = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the approximation of GELU in OpenAI's CLIP (arXiv 1606.08415, section 2)."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activation of every element."""
        return x * torch.sigmoid(1.702 * x)


def feed_forward(dim: int, ff_mult: int, activation: Activation) -> nn.Sequential:
    """Norm, expansion by ``ff_mult``, activation and projection, without the residual."""
    inner = dim * ff_mult
    activated = QuickGELU() if activation == "quick_gelu" else nn.GELU()
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), activated, nn.Linear(inner, dim))


class SequentialBlock(nn.Module):
    """``x = x + attention(norm(x))``, then ``x + feed_forward(x)``.

    Args:
        dim: features of the residual stream.
        dim_head: features of a head.
        heads: heads of queries, keys and values.
        ff_mult: inner features of the feed-forward over ``dim``.
        causal: True lets a position attend only to itself and earlier ones.
        activation: "gelu" or "quick_gelu".
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int,
        heads: int,
        ff_mult: int = 4,
        causal: bool = True,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head)
        self.attention = Attention(causal=causal)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.feed_forward = feed_forward(dim, ff_mult, activation)

    def forward(
        self, x: Float[Tensor, "b n d"], positions: Positions, *, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b n d"]:
        """Both residual steps; arguments as ``lm_core.nn.parallel_block.ParallelBlock.forward``."""
        b, n, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).view(b, n, 3, self.heads, self.dim_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = self.attention(q, k, v, mask=positions.mask, every_query_sees_a_key=positions.every_query_sees_a_key)
        x = x + self.to_out(attended.transpose(1, 2).reshape(b, n, self.heads * self.dim_head))
        return x + self.feed_forward(x)
