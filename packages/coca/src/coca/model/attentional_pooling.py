"""Task-specific attentional pooling of image tokens (arXiv 2205.01917, section 3.2).

One layer of cross-attention with learned queries turns an encoder's tokens into ``queries`` tokens for captioning and
one embedding for the contrastive loss. The paper gives each task its own pooler; the contrastive one reads the
encoder's tokens (parallel) or the captioning pooler's output (cascade). The original code shares one attention between
all queries.

Legend: b batch, m image tokens, q captioning queries, d feature.
"""

from typing import Any, Literal

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from coca.model.cross_attention import CrossAttention
from lm_core.nn.norms import LayerNorm

Pooling = Literal["shared", "parallel", "cascade"]


class Pooler(nn.Module):
    """Learned queries that attend to tokens; the result is normalised.

    Args:
        queries: number of queries.
        dim: features of the result.
        bias: adds biases to projections and norms.
        **sizes: further sizes of ``CrossAttention``.
    """

    def __init__(self, *, queries: int, dim: int, bias: bool = False, **sizes: Any) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.attention = CrossAttention(dim=dim, norm_context=True, bias=bias, **sizes)
        self.norm = nn.LayerNorm(dim) if bias else LayerNorm(dim)

    def forward(self, tokens: Float[Tensor, "b m c"]) -> Float[Tensor, "b q d"]:
        """One vector for each query."""
        queries = repeat(self.queries, "q d -> b q d", b=tokens.shape[0])
        return self.norm(self.attention(queries, tokens))


class AttentionalPooling(nn.Module):
    """Image tokens to a contrastive embedding and captioning tokens.

    Args:
        dim: features of the embedding and of the captioning tokens.
        image_dim: features of the image tokens.
        queries: number of captioning tokens; the contrastive embedding has a further query.
        pooling: "shared", "parallel" or "cascade"; see the module docstring.
        **sizes: ``dim_head``, ``heads``, ``kv_heads`` and ``bias`` of ``CrossAttention``.
    """

    def __init__(self, *, dim: int, image_dim: int, queries: int, pooling: Pooling, **sizes: Any) -> None:
        super().__init__()
        self.pooling = pooling
        shared = pooling == "shared"
        self.caption = Pooler(dim=dim, context_dim=image_dim, queries=queries + shared, **sizes)
        self.contrastive: Pooler | None = None
        if not shared:
            self.contrastive = Pooler(
                dim=dim, context_dim=dim if pooling == "cascade" else image_dim, queries=1, **sizes
            )

    def forward(self, tokens: Float[Tensor, "b m c"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b q d"]]:
        """The contrastive embedding and the captioning tokens."""
        pooled = self.caption(tokens)
        if self.contrastive is None:
            # a single split, so that the backward concatenates its gradient once
            embedding, pooled = pooled.split_with_sizes((1, pooled.shape[1] - 1), dim=1)
            return embedding[:, 0], pooled
        embedding = self.contrastive(pooled if self.pooling == "cascade" else tokens)
        return embedding[:, 0], pooled
