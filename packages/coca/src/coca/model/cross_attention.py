"""Cross-attention from text (or from learned queries) to image tokens: many query heads, one key/value head.

In the multimodal layers a SwiGLU feed-forward runs in parallel, as in the original code; its input projection is one
matrix with the queries' and its output projection one with the attention's. Keys and values depend on the image only,
so decoding computes them once for each caption and keeps them in the cache. Sequential layers have as many key/value
heads as query heads, biases, and their feed-forward after the attention.

Legend: b batch, i queries, n text tokens, m image tokens, d features.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coca.model.sequential_block import Activation, SequentialBlock, feed_forward
from lm_core.nn.attention import attend
from lm_core.nn.feedforward import split_swiglu
from lm_core.nn.kv_cache import KVCache, selected_rows
from lm_core.nn.norms import LayerNorm
from lm_core.nn.parallel_block import ParallelBlock, Positions, joint_output


class CoCaCache(KVCache):
    """Keys and values of the text (without CLS) in every layer, and of the image in the multimodal ones."""

    def __init__(self, *, layers: int, batch_size: int, max_length: int, static: bool = False) -> None:
        super().__init__(layers=layers, batch_size=batch_size, max_length=max_length, static=static)
        # Layer index to keys and values; empty before the first forward.
        self.image: dict[int, tuple[Tensor, Tensor]] = {}
        self._image_of_row = torch.arange(batch_size)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` with row ``index[r]``, its image included."""
        super().reorder(index)
        if index.device.type == "cpu":
            # If beams are reordered within their images only, the images' keys and values need not move.
            before, self._image_of_row = self._image_of_row, self._image_of_row[index]
            if torch.equal(before, self._image_of_row):
                return
        in_place = self.position is not None
        self.image = {
            layer: (selected_rows(keys, index, in_place=in_place), selected_rows(values, index, in_place=in_place))
            for layer, (keys, values) in self.image.items()
        }


class CrossAttention(nn.Module):
    """Attention of ``x`` to a context, without the residual.

    Args:
        dim: features of ``x``.
        context_dim: features of the context.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: inner features of a parallel feed-forward over ``dim``; 0 for none.
        norm_context: normalises the context (for an image encoder's output; pooled tokens are normalised already).
        kv_heads: key/value heads, 1 or ``heads``.
        bias: adds biases to projections and norms.
    """

    def __init__(
        self,
        *,
        dim: int,
        context_dim: int,
        dim_head: int,
        heads: int,
        ff_mult: int = 0,
        norm_context: bool = False,
        kv_heads: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.attn_dim = heads * dim_head
        self.ff_dim = ff_mult * dim
        norm = nn.LayerNorm if bias else LayerNorm
        self.norm = norm(dim)
        self.context_norm = norm(context_dim) if norm_context else nn.Identity()
        self.proj_in = nn.Linear(dim, self.attn_dim + 2 * self.ff_dim, bias=bias)
        self.to_kv = nn.Linear(context_dim, 2 * kv_heads * dim_head, bias=bias)
        if bias:
            self.proj_out = nn.Linear(self.attn_dim + self.ff_dim, dim)
        else:
            self.proj_out = joint_output(dim, *([self.attn_dim, self.ff_dim] if ff_mult else [self.attn_dim]))

    def forward(
        self,
        x: Float[Tensor, "b i d"],
        context: Float[Tensor, "b m c"] | None,
        *,
        cache: CoCaCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b i d"]:
        """Attention of ``x`` to the context, plus the feed-forward.

        Args:
            x: residual stream.
            context: image tokens; not read where the cache holds their keys and values.
            cache: holds the context's keys and values after the first call.
            layer: index of this layer in the cache.
        """
        b, i, _ = x.shape
        keys_values = None if cache is None else cache.image.get(layer)
        if keys_values is None:
            both = self.to_kv(self.context_norm(context)).unflatten(-1, (2, self.kv_heads, self.dim_head))
            k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
            keys_values = (k, v)
            if cache is not None:
                cache.image = {**cache.image, layer: keys_values}
        projected = self.proj_in(self.norm(x))
        q, inner = split_swiglu(projected, (self.attn_dim,)) if self.ff_dim else (projected, None)
        # Without a mask, heads that share a key are merely more queries: neither keys nor their gradients are repeated.
        q = q.reshape(b, -1, self.kv_heads, self.dim_head).transpose(1, 2)
        out = attend(q, *keys_values).transpose(1, 2).reshape(b, i, self.attn_dim)
        return self.proj_out(out if inner is None else torch.cat((out, inner), dim=-1))


class MultimodalLayer(nn.Module):
    """``x = block(x)``, then ``x + cross_attention(x, image) + feed_forward(x)``.

    Args:
        dim: features of the residual stream and of the pooled image tokens.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: feed-forward inner features over ``dim``.
        activation: None for parallel parts; that of sequential ones, whose feed-forward follows the cross-attention.
    """

    def __init__(
        self, *, dim: int, dim_head: int, heads: int, ff_mult: int, activation: Activation | None = None
    ) -> None:
        super().__init__()
        attention: dict[str, Any] = {"dim": dim, "dim_head": dim_head, "heads": heads}
        self.block: nn.Module
        self.feed_forward: nn.Module | None = None
        if activation is None:
            self.block = ParallelBlock(**attention, ff_mult=ff_mult)
            self.cross_attention = CrossAttention(**attention, context_dim=dim, ff_mult=ff_mult)
        else:
            self.block = SequentialBlock(**attention, ff_mult=ff_mult, activation=activation)
            self.cross_attention = CrossAttention(
                **attention, context_dim=dim, norm_context=True, kv_heads=heads, bias=True
            )
            self.feed_forward = feed_forward(dim, ff_mult, activation)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        positions: Positions,
        pooled: Float[Tensor, "b m d"] | None,
        *,
        cache: CoCaCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b n d"]:
        """Applies the layer; ``pooled`` image tokens are needed until the cache holds their keys and values."""
        x = self.block(x, positions, cache=cache, layer=layer)
        x = x + self.cross_attention(x, pooled, cache=cache, layer=layer)
        return x if self.feed_forward is None else x + self.feed_forward(x)
