"""Attention that also looks into a memory of past tokens (Memorizing Transformers, arXiv 2203.08913, section 3).

Queries and keys are L2-normalised, with a learned temperature for each head (arXiv 2010.04245). What the memory finds
joins the local keys in one of two ways:

- ``gate="softmax"``: one softmax over retrieved and local scores together;
- ``gate="sigmoid"``: ``g * memory + (1 - g) * local`` with ``g = sigmoid(b_h)`` (section 3.2), one ``b`` a head.

A query that has no memory attends locally alone, under either gate. Retrieved keys carry no position. Keys are kept as
projected, and normalised when they are used: so those that another layer remembered can be used as well.

Legend: b batch, h heads, i queries, j local keys, k retrieved keys, d feature of a head.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_core.checks import check_positive, check_probability, typed
from lm_core.nn.norms import l2norm
from memorizing_transformer.memory.knn_memory import KNNMemory, Retrieved
from memorizing_transformer.model.attention import Projections, Remember, causal_distances, keys_as_given

Gate = Literal["softmax", "sigmoid"]

# Of the sigmoid gate, which the paper does not give: what is retrieved is an eighth of the output at first. At a half,
# a model that cannot match contexts yet learned more slowly with a memory than without.
GATE_START = -2.0


class KNNAttention(nn.Module):
    """Local causal attention and attention to retrieved memories.

    Args:
        dim: features of the residual stream.
        heads: query heads.
        dim_head: features of a head.
        dropout: on attention weights, in training mode.
        num_retrieved_memories: how many memories each query of each head retrieves.
        xl_max_memories: how many of the newest keys the original call form hands back instead of storing them.
        attn_scale_init: temperature at the beginning.
        gate_output: multiplies the output by tanh of a learned number that begins at 0, so that the layer can be put
            into a trained model without changing it at first.
        gate: how memory and local attention are joined; "sigmoid" begins with an eighth for the memory.
        multi_head_keys: keys and values of their own for each head.

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
        xl_max_memories: int | float = 0,
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
        if xl_max_memories != int(xl_max_memories) or xl_max_memories < 0:
            raise ValueError(f"xl_max_memories must be a whole number of at least 0, got {xl_max_memories}")
        self.num_retrieved_memories, self.xl_max_memories = num_retrieved_memories, int(xl_max_memories)
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
        """Inside, every search's result is appended to the list."""
        before, self._records = self._records, []
        try:
            yield self._records
        finally:
            self._records = before

    def attend(
        self,
        x: Float[Tensor, "b i dim"],
        *,
        bias: Float[Tensor, "#b h i j"],
        memory: KNNMemory | None = None,
        reads_memory: Bool[Tensor, "b i"] | None = None,
        remember: Remember = keys_as_given,
    ) -> Float[Tensor, "b i dim"]:
        """Attends to what ``remember`` returns for the new keys, and to ``memory``, which is not changed.

        Args:
            x: normalised features.
            bias: added to local scores; -inf where a query may not look.
            memory: searched for every query; None for local attention alone.
            reads_memory: False at queries that may not use the memory.
            remember: see ``memorizing_transformer.model.attention.Remember``.
        """
        q, k, v = self.projections(x)
        q = l2norm(q)
        keys, values = remember(k, v)
        keys = l2norm(keys).to(q.dtype).expand(-1, q.shape[1], -1, -1)
        values = values.to(q.dtype).expand(-1, q.shape[1], -1, -1)
        scale = self.log_scale.exp()
        local = q @ keys.transpose(-1, -2) * scale + bias
        if memory is None or len(memory) == 0:
            out = self.dropout(local.softmax(dim=-1).to(q.dtype)) @ values
            if self.gate is not None:  # every parameter takes part, which processes that train together rely on
                out = out + 0.0 * self.gate.to(q.dtype).sum()
        else:
            found = memory.retrieve(q.float() if _is_slow_in(q.dtype, q.device) else q, self.num_retrieved_memories)
            if self._records is not None:
                self._records.append(found)
            mask = found.mask if reads_memory is None else found.mask & reads_memory[:, None, :, None]
            memory_k, memory_v = found.kv.unbind(dim=-2)
            distant = _of_its_own(q, memory_k, "b h i d, b h i k d -> b h i k") * scale
            distant = distant.masked_fill(~mask, torch.finfo(distant.dtype).min)
            out = self._joined(local, distant, mask, values, memory_v)
        out = self.projections.back(out)
        return out if self.output_gate is None else out * self.output_gate.tanh()

    def _joined(self, local: Tensor, distant: Tensor, mask: Tensor, values: Tensor, memory_v: Tensor) -> Tensor:
        if self.gate is None:
            weights = torch.cat((distant, local), dim=-1).softmax(dim=-1).to(values.dtype)
            far, near = self.dropout(weights).split((distant.shape[-1], local.shape[-1]), dim=-1)
            return near @ values + _of_its_own(far, memory_v, "b h i k, b h i k d -> b h i d").to(values.dtype)
        near = self.dropout(local.softmax(dim=-1).to(values.dtype)) @ values
        far_weights = self.dropout(distant.softmax(dim=-1).to(values.dtype))
        far_out = _of_its_own(far_weights, memory_v, "b h i k, b h i k d -> b h i d").to(values.dtype)
        part = torch.sigmoid(self.gate).to(values.dtype) * mask.any(dim=-1, keepdim=True)
        return part * far_out + (1 - part) * near

    def forward(
        self,
        x: Float[Tensor, "b i dim"],
        *,
        knn_memory: KNNMemory,
        xl_memory: Float[Tensor, "b ... m 2 d"] | None = None,
        add_knn_memory: bool = True,
        rel_pos_bias: Float[Tensor, "#b h i2 j2"] | None = None,
    ) -> tuple[Float[Tensor, "b i dim"], Float[Tensor, "b ... m2 2 d"] | None]:
        """The original's call form, for the layer alone.

        Args:
            x: normalised features.
            knn_memory: searched, and then given the keys that leave the XL window.
            xl_memory: keys and values before the segment.
            add_knn_memory: whether to add to ``knn_memory``.
            rel_pos_bias: added to local scores; its last columns and rows are used.

        Returns:
            The output, and the newest ``xl_max_memories`` keys and values (None if that is 0).
        """
        past = None if xl_memory is None else unpacked(xl_memory)
        i, j = x.shape[1], x.shape[1] + (0 if past is None else past[0].shape[-2])
        ahead = causal_distances(i, j, x.device) < 0
        bias = torch.zeros(1, self.log_scale.shape[0], i, j, device=x.device, dtype=x.dtype)
        if rel_pos_bias is not None:
            bias = bias + rel_pos_bias[..., -i:, -j:]
        kept: list[Tensor] = []

        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if past is not None:
                k, v = torch.cat((past[0].to(k), k), dim=-2), torch.cat((past[1].to(v), v), dim=-2)
            kept.append(torch.stack((k, v), dim=-2).detach())
            return k, v

        out = self.attend(x, bias=bias.masked_fill(ahead, -math.inf), memory=knn_memory, remember=remember)
        leaves = max(0, j - self.xl_max_memories)
        discarded, newest = kept[0].split((leaves, j - leaves), dim=2)
        if add_knn_memory and leaves:
            knn_memory.add(packed(as_memories(discarded)))
        return out, packed(newest) if self.xl_max_memories > 0 else None


def _is_slow_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of queries with a few keys of their own cost more in copies than the dtype saves."""
    return device.type == "cpu" and dtype.itemsize < 4


def _of_its_own(x: Tensor, retrieved: Tensor, pattern: str) -> Tensor:
    """``einsum`` of queries, or weights, with what was retrieved for each, in the latter's dtype on a CPU."""
    if x.device.type != "cpu":
        return einsum(x, retrieved, pattern)
    with torch.autocast("cpu", enabled=False):
        return einsum(x.to(retrieved.dtype), retrieved, pattern)


def as_memories(kv: Float[Tensor, "b g n 2 d"]) -> Float[Tensor, "b g n 2 d"]:
    """Keys normalised, as the memory searches them."""
    keys, values = kv.unbind(dim=-2)
    return torch.stack((F.normalize(keys, dim=-1), values), dim=-2)


def packed(kv: Float[Tensor, "b g n 2 d"]) -> Float[Tensor, "b ... n 2 d"]:
    """Without the dimension of key heads where there is one."""
    return kv.squeeze(1) if kv.shape[1] == 1 else kv


def unpacked(kv: Float[Tensor, "b ... n 2 d"]) -> tuple[Tensor, Tensor]:
    """Keys and values ``(b, g, n, d)``."""
    keys, values = (kv if kv.ndim == 5 else kv.unsqueeze(1)).unbind(dim=-2)
    return keys, values
