"""Attention with a memory of past tokens (Memorizing Transformers, arXiv 2203.08913, section 3).

Queries and keys are L2-normalised, with a learned temperature for each head (arXiv 2010.04245). Retrieved keys join the
local ones in one of two ways:

- ``gate="softmax"``: one softmax over retrieved and local scores together;
- ``gate="sigmoid"``: ``g * memory + (1 - g) * local`` with ``g = sigmoid(b_h)`` (section 3.2), one ``b`` per head.

A query without a memory attends only locally, with either gate. Retrieved keys carry no position. Keys are cached as
projected and normalised on use, so that a layer can also use the keys of another layer.

Legend: b batch, h heads, g key heads, i queries, m past keys, j local keys, k retrieved keys, d feature of a head.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from lm_core.checks import check_mask, check_positive, check_probability, typed
from lm_core.nn.norms import l2norm
from memorizing_transformer.memory.knn_memory import KNNMemory, Retrieved
from memorizing_transformer.model.attention import Projections, joined, stacked

Gate = Literal["softmax", "sigmoid"]

# Initial value of the sigmoid gate (not in the paper): the memory is an eighth of the output. Starting at a half, a
# model that cannot match contexts yet learned more slowly with a memory than without.
GATE_START = -2.0


def outside_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method at which compiled graphs break, as ``torch.compiler.disable`` does.

    That one imports the compiler at once, which takes longer than the rest of this package.
    """
    disabled = _disable_dynamo(method)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else method(*args, **kwargs)

    return run


class MemorizingAttention(nn.Module):
    """Local causal attention and attention to retrieved memories.

    Args:
        dim: features of the residual stream.
        heads: query heads.
        dim_head: features of a head.
        dropout: dropout on attention weights, in training mode.
        num_retrieved_memories: memories retrieved for each query of each head.
        attn_scale_init: initial temperature.
        gate_output: whether the output is multiplied by tanh of a learned number that starts at 0, so that the layer
            can be added to a trained model without changing it at first.
        gate: combination of memory and local attention; "sigmoid" starts with an eighth for the memory.
        multi_head_keys: whether each head has its own keys and values.

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        num_retrieved_memories: int = 32,
        attn_scale_init: float = 20.0,
        gate_output: bool = False,
        gate: Gate = "softmax",
        multi_head_keys: bool = False,
    ) -> None:
        super().__init__()
        check_probability(dropout, "dropout")
        check_positive(num_retrieved_memories, "num_retrieved_memories")
        if not 0 < attn_scale_init < math.inf:
            raise ValueError(f"attn_scale_init must be positive, got {attn_scale_init}")
        self.num_retrieved_memories = num_retrieved_memories
        self.dropout = nn.Dropout(dropout)
        self.projections = Projections(
            dim=dim, heads=heads, dim_head=dim_head, multi_head_keys=multi_head_keys, output_bias=False
        )
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(attn_scale_init)))
        self.gate = nn.Parameter(torch.full((heads, 1, 1), GATE_START)) if gate == "sigmoid" else None
        self.output_gate = nn.Parameter(torch.zeros(1)) if gate_output else None
        self._records: list[Retrieved] | None = None

    @contextmanager
    def recorded(self) -> Iterator[list[Retrieved]]:
        """Records the result of every search in the block in the yielded list."""
        before, self._records = self._records, []
        try:
            yield self._records
        finally:
            self._records = before

    # the memory's sizes change with every segment, and each would be compiled again
    @outside_graphs
    def forward(
        self,
        x: Float[Tensor, "b i dim"],
        *,
        bias: Float[Tensor, "#b h i j"],
        past: Sequence[Tensor] = (),
        memory: KNNMemory | None = None,
        may_recall: Bool[Tensor, "b i"] | None = None,
    ) -> tuple[Float[Tensor, "b i dim"], Float[Tensor, "b g i 2 d"]]:
        """Attends to the past, the segment and ``memory``, which is not changed.

        Args:
            x: normalised features.
            bias: bias on local scores; -inf where a query may not look.
            past: keys and values ``(b, g, m, 2, d)`` before ``x``, oldest first.
            memory: memory to search; None for local attention only.
            may_recall: False at queries that may not use the memory; None where all may.

        Returns:
            The output, and the new keys and values.
        """
        if may_recall is not None:
            check_mask(may_recall, "may_recall", x.shape[:2])
        q, k, v = self.projections(x)
        keys, values = joined(past, k, v)
        q, keys = l2norm(q), l2norm(keys)
        keys, values = (t.to(q.dtype).expand(-1, q.shape[1], -1, -1) for t in (keys, values))
        scale = self.log_scale.exp()
        local = q @ keys.transpose(-1, -2) * scale + bias
        retrieved = None if memory is None else self._search(memory, q)
        if retrieved is None:
            out = self.dropout(local.softmax(dim=-1).to(q.dtype)) @ values
            if self.gate is not None:  # DDP expects a gradient for every parameter
                out = out + 0.0 * self.gate.to(q.dtype).sum()
        else:
            mask = retrieved.mask if may_recall is None else retrieved.mask & may_recall[:, None, :, None]
            memory_k, memory_v = retrieved.kv.unbind(dim=-2)
            distant = einsum_with_own(q, memory_k, "b h i d, b h i k d -> b h i k") * scale
            distant = distant.masked_fill(~mask, torch.finfo(distant.dtype).min)
            far, near = self.dropout(self._weights(distant, local, mask).to(values.dtype)).split(
                (distant.shape[-1], local.shape[-1]), dim=-1
            )
            out = near @ values + einsum_with_own(far, memory_v, "b h i k, b h i k d -> b h i d").to(values.dtype)
        out = self.projections.back(out)
        return out if self.output_gate is None else out * self.output_gate.tanh(), stacked(k, v)

    def _search(self, memory: KNNMemory, q: Tensor) -> Retrieved | None:
        """The memories nearest to each query; None if the memory is empty."""
        if len(memory) == 0:
            return None
        # on a CPU, half-precision products with a few keys per query cost more in copies than the dtype saves
        is_slow = q.device.type == "cpu" and q.dtype.itemsize < 4
        retrieved = memory.retrieve(q.float() if is_slow else q, self.num_retrieved_memories)
        if self._records is not None:
            self._records.append(retrieved)
        return retrieved

    def _weights(self, distant: Tensor, local: Tensor, mask: Tensor) -> Tensor:
        """Attention weights of retrieved and local keys, which together sum to 1."""
        if self.gate is None:
            return torch.cat((distant, local), dim=-1).softmax(dim=-1)
        part = torch.sigmoid(self.gate) * mask.any(dim=-1, keepdim=True)
        return torch.cat((part * distant.softmax(dim=-1), (1 - part) * local.softmax(dim=-1)), dim=-1)


class KNNAttention(MemorizingAttention):
    """``MemorizingAttention`` with the original's call form, for use outside of the model.

    Args:
        xl_max_memories: number of newest keys that a call returns instead of adding them to the memory.
        **settings: arguments of ``MemorizingAttention``.

    Raises:
        ValueError: ``xl_max_memories`` is not a whole number of at least 0, or as for ``MemorizingAttention``.
    """

    def __init__(self, *, xl_max_memories: int | float = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.xl_max_memories = whole_number(xl_max_memories, "xl_max_memories")

    def forward(
        self,
        x: Float[Tensor, "b i dim"],
        *,
        knn_memory: KNNMemory,
        xl_memory: Float[Tensor, "b ... m 2 d"] | None = None,
        add_knn_memory: bool = True,
        rel_pos_bias: Float[Tensor, "#b h i2 j2"] | None = None,
    ) -> tuple[Float[Tensor, "b i dim"], Float[Tensor, "b ... m2 2 d"] | None]:
        """Attends, then adds the keys that leave the XL window to ``knn_memory``.

        Args:
            x: normalised features.
            knn_memory: memory to search, and then to extend.
            xl_memory: keys and values before the segment.
            add_knn_memory: whether ``knn_memory`` is extended.
            rel_pos_bias: bias on local scores; its last columns and rows are used.

        Returns:
            The output, and the newest ``xl_max_memories`` keys and values (None if that is 0).
        """
        past = [] if xl_memory is None else [xl_memory if xl_memory.ndim == 5 else xl_memory.unsqueeze(1)]
        i, j = x.shape[1], x.shape[1] + sum(kv.shape[2] for kv in past)
        bias = torch.zeros(1, self.projections.heads, i, j, device=x.device, dtype=x.dtype)
        if rel_pos_bias is not None:
            bias = bias + rel_pos_bias[..., -i:, -j:]
        ahead = torch.ones(i, j, dtype=torch.bool, device=x.device).triu(j - i + 1)
        out, new = super().forward(x, bias=bias.masked_fill(ahead, -math.inf), past=past, memory=knn_memory)
        kv = torch.cat([*(t.to(new).detach() for t in past), new], dim=2)
        leaves = max(0, j - self.xl_max_memories)
        if add_knn_memory and leaves:
            knn_memory.add(as_memories(kv[:, :, :leaves]))
        return out, packed(kv[:, :, leaves:]) if self.xl_max_memories > 0 else None


def whole_number(value: int | float, name: str) -> int:
    """``value`` as an integer; raises ``ValueError`` naming the argument unless it is a whole number of at least 0."""
    if value != int(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value}")
    return int(value)


def einsum_with_own(x: Tensor, retrieved: Tensor, pattern: str) -> Tensor:
    """``einsum`` of queries or weights with the keys or values retrieved for each, on a CPU in the latter's dtype."""
    if x.device.type != "cpu":
        return einsum(x, retrieved, pattern)
    with torch.autocast("cpu", enabled=False):
        return einsum(x.to(retrieved.dtype), retrieved, pattern)


def as_memories(kv: Float[Tensor, "b g n 2 d"]) -> Float[Tensor, "b ... n 2 d"]:
    """Input of ``KNNMemory.add``: keys normalised, and no dimension for a single key head."""
    keys, values = kv.unbind(dim=-2)
    return packed(torch.stack((F.normalize(keys, dim=-1), values), dim=-2))


def packed(kv: Float[Tensor, "b g n 2 d"]) -> Float[Tensor, "b ... n 2 d"]:
    """``kv`` without the dimension of key heads if there is one head."""
    return kv.squeeze(1) if kv.shape[1] == 1 else kv
