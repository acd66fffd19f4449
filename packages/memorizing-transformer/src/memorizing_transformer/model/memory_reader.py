"""Attention to retrieved memories, mixed into the output of a pretrained attention layer by a gate for each head.

``g * memory + (1 - g) * local`` (arXiv 2203.08913, section 3.2), where ``local`` is what the layer computes itself.
Queries and keys are L2-normalised, with a learned temperature for each head. The gate starts nearly closed
(``sigmoid``, as in the paper) or exactly closed (``tanh``: the model then computes what it computed before).

Legend: b batch, h query heads, g key heads, n queries, k neighbours, d feature of a head.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_core.nn.norms import l2norm
from memorizing_transformer.memory.knn_memory import KNNMemory, Retrieved
from memorizing_transformer.model.knn_attention import einsum_with_own

ReaderGate = Literal["sigmoid", "tanh"]
SIGMOID_START = -4.0  # 1.8 % of a head's output
SCALE_START = 20.0


class MemoryReader(nn.Module):
    """Gate, temperature and search of one attention layer; float32 whatever the model's dtype.

    Args:
        heads: query heads.
        num_retrieved: memories retrieved for each query of each head.
        gate: "sigmoid" or "tanh" of the learned number.
    """

    def __init__(self, *, heads: int, num_retrieved: int, gate: ReaderGate) -> None:
        super().__init__()
        self.num_retrieved = num_retrieved
        self.kind = gate
        self.gate = nn.Parameter(torch.full((heads, 1, 1), SIGMOID_START if gate == "sigmoid" else 0.0))
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(SCALE_START)))
        self._records: list[Retrieved] | None = None

    @property
    def openness(self) -> Float[Tensor, "h 1 1"]:
        """The weight of the memory in each head's output."""
        return self.gate.sigmoid() if self.kind == "sigmoid" else self.gate.tanh()

    @contextmanager
    def recorded(self) -> Iterator[list[Retrieved]]:
        """Records the result of every search in the block in the yielded list, by query head."""
        before, self._records = self._records, []
        try:
            yield self._records
        finally:
            self._records = before

    def forward(
        self,
        local: Float[Tensor, "b h n d"],
        q: Float[Tensor, "b h n d"],
        *,
        memory: KNNMemory | None,
        may_recall: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """``local`` mixed with the attention to ``memory``, unchanged where nothing was retrieved.

        Args:
            local: output of the heads.
            q: queries, before rotary embeddings.
            memory: memory to search, with the rows of the batch in scope; None for none.
            may_recall: False at queries that may not use the memory; None where all may.
        """
        if memory is None or len(memory) == 0:
            # DDP and autograd expect every parameter in every loss
            unused = 0.0 * (self.gate.sum() + self.log_scale.sum()) if torch.is_grad_enabled() else 0.0
            return local + unused if isinstance(unused, Tensor) else local
        h = q.shape[1]
        g = memory.heads
        q = l2norm(q.float() if q.dtype.itemsize < 4 else q)
        grouped = rearrange(q, "b (g r) n d -> b g (r n) d", g=g)
        found = memory.retrieve(grouped if g > 1 else grouped[:, 0], self.num_retrieved)
        shape = (q.shape[0], h, q.shape[2])
        found = replace(
            found,
            kv=found.kv.reshape(*shape, *found.kv.shape[-3:]),
            mask=found.mask.reshape(*shape, -1),
            scores=found.scores.reshape(*shape, -1),
            positions=found.positions.reshape(*shape, -1),
        )
        if self._records is not None:
            self._records.append(found)
        mask = found.mask if may_recall is None else found.mask & may_recall[:, None, :, None]
        keys, values = found.kv.unbind(dim=-2)
        # again, not found.scores: the temperature and the model need their gradients
        scores = einsum_with_own(q, keys, "b h n d, b h n k d -> b h n k") * self.log_scale.exp()
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        distant = einsum_with_own(weights, values, "b h n k, b h n k d -> b h n d")
        part = self.openness * mask.any(dim=-1, keepdim=True)
        return (local + part * (distant - local)).to(local.dtype)
