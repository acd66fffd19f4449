"""A multimodal layer: a parallel block over the text, then cross-attention to the pooled image tokens."""

from jaxtyping import Float
from torch import Tensor, nn

from coca.model.block import ParallelBlock
from coca.model.cross_attention import CrossAttention
from lm_core.nn.kv_cache import KVCache


class MultimodalLayer(nn.Module):
    """``x = block(x)``, then ``x + cross_attention(x, image) + feed_forward(x)``.

    Args:
        dim: features of the residual stream and of the pooled image tokens.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: feed-forward inner features over ``dim``.
    """

    def __init__(self, *, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.block = ParallelBlock(dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult, causal=True)
        self.cross_attention = CrossAttention(dim=dim, context_dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rotation: tuple[Tensor, Tensor],
        pooled: Float[Tensor, "b q d"] | None = None,
        mask: Tensor | None = None,
        *,
        keys_values: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b n d"]:
        """One layer; the image comes as pooled tokens, or as ``cross_attention.keys_values`` of them."""
        x = self.block(x, rotation, mask, cache=cache, layer=layer)
        if keys_values is None:
            assert pooled is not None
            keys_values = self.cross_attention.keys_values(pooled)
        return x + self.cross_attention(x, keys_values)
