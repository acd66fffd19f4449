"""A small decoder for the quickstart, the examples and the tests: PaLM's blocks (arXiv 2204.02311, section 2).

Self-play works with any model that has the protocol of ``lm_core.causal_lm.CausalLM``; this one needs no other library.
The output layer is tied to the embedding.

Legend: b batch, n sequence, m cached and new positions, d features, v vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_positive, typed
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm
from lm_core.nn.parallel_block import ParallelBlock, Positions
from lm_core.nn.rotary import RotaryEmbedding


class SmallDecoder(PretrainedMixin):
    """A causal language model with a cache, hidden states and tied embeddings.

    Args:
        num_tokens: vocabulary size.
        dim: model dimension.
        depth: number of blocks.
        heads: number of query heads, which share one key/value head.
        dim_head: dimension of each head, even.
        dropout: dropout probability of each block's output.

    Raises:
        ValueError: a size is below 1.
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
        self.vocab_size = num_tokens
        self.depth = depth
        self.embedding = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.rotary = RotaryEmbedding(dim_head)
        self.blocks = nn.ModuleList(
            ParallelBlock(dim=dim, dim_head=dim_head, heads=heads, out_dropout=dropout) for _ in range(depth)
        )
        self.norm = LayerNorm(dim)

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the output layer, tied to the embedding."""
        return self.embedding.weight

    def init_cache(self, batch_size: int, max_length: int, *, static: bool = False) -> KVCache:
        """Creates an empty cache for ``forward`` and ``hidden``."""
        return KVCache(layers=self.depth, batch_size=batch_size, max_length=max_length, static=static)

    def hidden(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | None = None,
        **_: Any,
    ) -> Float[Tensor, "b n d"]:
        """Final hidden states of ``ids``."""
        past = 0 if cache is None else cache.past
        if mask is not None:
            ids = ids * mask[:, past:]
        if ids.device.type == "cpu":
            check_ids(ids, self.vocab_size, "ids")
        x = self.embedding(ids)
        positions = Positions.of(self.rotary, x, cache=cache, mask=mask)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, cache=cache, layer=layer)
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
        """Logits of ``ids``; see ``lm_core.causal_lm.CausalLM``."""
        return F.linear(self.hidden(ids, mask=mask, cache=cache), self.output_weight)

    def upgrade_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the weights of version 0.1.0 to their current names."""
        renamed = {".into.": ".proj_in.", ".out.": ".proj_out."}
        for old, new in renamed.items():
            state = {name.replace(old, new): value for name, value in state.items()}
        return state
