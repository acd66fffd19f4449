"""A small decoder for the quickstart, the examples and the tests: rotary multi-query attention beside SwiGLU.

It is the PaLM block (arXiv 2204.02311, section 2) made of ``lm_core``'s parts, without options: what self-play needs is
any model in the protocol of ``lm_core.causal_lm.CausalLM``, and this is one that runs everywhere.

Legend: b batch, n sequence, m cached and new, h heads, d features of a head, v vocabulary.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_positive, typed
from lm_core.nn.attention import attend
from lm_core.nn.feedforward import SwiGLU
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.masking import positions_from_mask
from lm_core.nn.norms import LayerNorm
from lm_core.nn.rotary import RotaryEmbedding, apply_rotary


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = (heads * dim_head, dim_head, dim_head, 8 * dim)
        self.norm = LayerNorm(dim)
        self.into = nn.Linear(dim, sum(self.sizes), bias=False)
        # laid out column by column: a product with a few rows, which is what decoding does, reads it faster
        self.into.weight = nn.Parameter(self.into.weight.detach().t().contiguous().t())
        self.activation = SwiGLU()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(heads * dim_head + 4 * dim, dim, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        # plain views: this runs once a layer for every generated token
        batch, n, _ = x.shape
        q, k, v, inner = self.into(self.norm(x)).split(self.sizes, dim=-1)
        q = apply_rotary(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), *rotation)
        k = apply_rotary(k.unsqueeze(1), *rotation)
        v = v.unsqueeze(1)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = attend(q, k, v, mask=mask, causal=True).transpose(1, 2).reshape(batch, n, -1)
        return x + self.dropout(self.out(torch.cat((attended, self.activation(inner)), dim=-1)))


class SmallDecoder(PretrainedMixin):
    """A causal language model with a cache, hidden states and tied embeddings.

    Args:
        num_tokens: size of the vocabulary.
        dim: features.
        depth: blocks.
        heads: attention heads, of one key and value head together.
        dim_head: features of a head, even.
        dropout: of each block's output.

    Raises:
        ValueError: a size below 1.
    """

    @typed
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        dim_head: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("num_tokens", num_tokens), ("dim", dim), ("depth", depth), ("heads", heads)):
            check_positive(value, name)
        self.vocab_size, self.depth = num_tokens, depth
        self.embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.rotary = RotaryEmbedding(dim_head)
        self.blocks = nn.ModuleList(_Block(dim, heads, dim_head, dropout) for _ in range(depth))
        self.norm = LayerNorm(dim)

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """The output layer, which is the embedding."""
        return self.embedding.weight

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for ``forward`` and ``hidden``."""
        return KVCache(layers=self.depth, batch_size=batch_size, max_length=max_length)

    def hidden(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | None = None,
        **_: Any,
    ) -> Float[Tensor, "b n d"]:
        """Final hidden states of the given positions."""
        if ids.device.type == "cpu":
            check_ids(ids if mask is None else ids * mask[:, -ids.shape[1] :], self.vocab_size, "ids")
        start = 0 if cache is None else cache.length
        stop = start + ids.shape[1]
        x = self.embedding(ids if mask is None else ids * mask[:, start:stop])
        if mask is None:
            rotation = self.rotary.at_range(start, stop, device=x.device, dtype=x.dtype)
        else:
            cos, sin = self.rotary(positions_from_mask(mask)[:, start:stop], dtype=x.dtype)
            rotation = (rearrange(cos, "b n d -> b 1 n d"), rearrange(sin, "b n d -> b 1 n d"))
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, mask, cache, layer)
        if cache is not None:
            cache.advance(ids.shape[1])
        states: Tensor = self.norm(x)
        return states

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | None = None,
        **_: Any,
    ) -> Float[Tensor, "b n v"]:
        """Logits of the given positions; see ``lm_core.causal_lm.CausalLM``."""
        return self.hidden(ids, mask=mask, cache=cache) @ self.output_weight.T
