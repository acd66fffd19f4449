"""One layer: attention, perhaps beside it a gated attention to the memory, and a feed-forward, each behind a norm.

Legend: b batch, i queries, j keys, h heads.
"""

from jaxtyping import Float
from torch import Tensor, nn

from memorizing_transformer.model.attention import LocalAttention
from memorizing_transformer.model.knn_attention import KNNAttention


class FeedForward(nn.Sequential):
    """Two linear maps with a GELU between them."""

    def __init__(self, *, dim: int, mult: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, dim * mult), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim * mult, dim))


class Attention(nn.Module):
    """A norm and an attention of either kind, with the places it has in the XL window and among the memories.

    Args:
        dim: features of the residual stream.
        inner: the attention.
        xl: number among the attentions that have an XL window, or None.
        memory: number among those that have a memory, or None.
    """

    def __init__(self, dim: int, inner: LocalAttention | KNNAttention, *, xl: int | None, memory: int | None) -> None:
        super().__init__()
        self.norm, self.inner, self.xl, self.memory = nn.LayerNorm(dim), inner, xl, memory

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.inner.projections.key_heads


class Block(nn.Module):
    """One layer of the model.

    Args:
        dim: features of the residual stream.
        attentions: one, or the layer's own and a gated one to the memory.
        feed_forward: what follows.
    """

    def __init__(self, *, dim: int, attentions: list[Attention], feed_forward: FeedForward) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff = feed_forward

    def feed(self, x: Float[Tensor, "b i dim"]) -> Float[Tensor, "b i dim"]:
        """The feed-forward with its residual."""
        return x + self.ff(self.ff_norm(x))
