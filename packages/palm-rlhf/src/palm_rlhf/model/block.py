"""PaLM's parallel block: attention and feed-forward read one input and are summed (arXiv 2204.02311, section 2).

One bias-free projection makes queries, keys, values and the feed-forward's two halves; one more takes attention and
feed-forward outputs back. Both are single matrices, so that decoding reads each weight once in two large products.

Legend: b batch, n sequence, h query heads, g key/value heads, d head feature.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.nn.attention import Attention
from lm_core.nn.feedforward import project_split_swiglu, swiglu
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm, l2norm
from lm_core.nn.rotary import XPosBlock, apply_rotary
from palm_rlhf.model.lora import BlockLoRA


@dataclass(frozen=True)
class Positions:
    """What all blocks of one forward share: rotary angles, xPos scales and the attention mask."""

    cos: Tensor
    sin: Tensor
    xpos: tuple[XPosBlock, ...] | None
    mask: Tensor | None


class ParallelBlock(nn.Module):
    """``x + attention(norm(x)) + feed_forward(norm(x))``.

    Args:
        dim: features of the residual stream.
        dim_head: features of a head.
        heads: query heads.
        kv_heads: key/value heads; 1 is multi-query attention.
        ff_mult: feed-forward inner features over ``dim``.
        causal: whether a position sees only itself and earlier ones.
        attn_dropout: on attention weights.
        ff_dropout: on the feed-forward's inner features.
        qk_rmsnorm: L2-normalises queries and keys, with learned gains and a fixed scale.
        qk_scale: that scale.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int,
        ff_mult: int,
        causal: bool,
        attn_dropout: float,
        ff_dropout: float,
        qk_rmsnorm: bool,
        qk_scale: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.attn_dim, self.ff_dim = heads * dim_head, dim * ff_mult
        self.in_dims = ((heads + kv_heads) * dim_head, kv_heads * dim_head, 2 * self.ff_dim)
        self.norm = LayerNorm(dim)
        self.proj_in = stored_by_columns(nn.Linear(dim, sum(self.in_dims), bias=False))
        self.proj_out = nn.Linear(self.attn_dim + self.ff_dim, dim, bias=False)
        self.attention = Attention(causal=causal, dropout=attn_dropout, scale=float(qk_scale) if qk_rmsnorm else None)
        self.ff_dropout = ff_dropout
        self.q_scale = nn.Parameter(torch.ones(dim_head)) if qk_rmsnorm else None
        self.k_scale = nn.Parameter(torch.ones(dim_head)) if qk_rmsnorm else None

    def lora_dims(self) -> dict[str, tuple[int, int]]:
        """Input and output features of every LoRA target."""
        dim, (qk_dim, kv_dim, ff_in_dim) = self.norm.gamma.shape[0], self.in_dims
        return {
            "q": (dim, self.attn_dim),
            "k": (dim, qk_dim - self.attn_dim),
            "v": (dim, kv_dim),
            "o": (self.attn_dim, dim),
            "ff_in": (dim, ff_in_dim),
            "ff_out": (self.ff_dim, dim),
        }

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        positions: Positions,
        *,
        lora: BlockLoRA | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b n dim"]:
        """One residual step; with ``lora`` the block's own weights are constants that take no gradient."""
        # Plain views and no submodule calls: at one token a step, Python's time would show beside the weights'.
        b, n, _ = x.shape
        frozen = lora is not None
        normed = F.layer_norm(x, x.shape[-1:], _maybe_detached(self.norm.gamma, frozen), None, self.norm.eps)
        if lora is None:
            qk, v, inner = project_split_swiglu(normed, self.proj_in.weight, self.in_dims[:2])
        else:
            qk, v, ff = F.linear(normed, self.proj_in.weight.detach()).split_with_sizes(self.in_dims, -1)
            q, k = qk.split((self.attn_dim, qk.shape[-1] - self.attn_dim), dim=-1)
            qk = torch.cat((lora.maybe("q", normed, q), lora.maybe("k", normed, k)), dim=-1)
            v, inner = lora.maybe("v", normed, v), swiglu(lora.maybe("ff_in", normed, ff))

        qk = qk.view(b, n, -1, self.dim_head).transpose(1, 2)
        v = v.view(b, n, -1, self.dim_head).transpose(1, 2)
        if self.q_scale is not None and self.k_scale is not None:
            q, k = l2norm(qk).tensor_split((self.heads,), dim=1)
            gains = (_maybe_detached(self.q_scale, frozen), _maybe_detached(self.k_scale, frozen))
            qk = torch.cat((q * gains[0], k * gains[1]), dim=1)
        # Queries and keys are neighbours: one rotation serves both.
        qk = apply_rotary(qk, positions.cos, positions.sin)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = self.attention(q, k, v, mask=positions.mask, xpos=positions.xpos)

        attended = attended.transpose(1, 2).reshape(b, n, self.attn_dim)
        if self.training and self.ff_dropout > 0.0:
            inner = F.dropout(inner, self.ff_dropout)
        merged = torch.cat((attended, inner), dim=-1)
        # Added outside the product, so that under autocast the residual stream stays in float32.
        out = x + F.linear(merged, _maybe_detached(self.proj_out.weight, frozen))
        if lora is not None:
            out = lora.maybe("ff_out", inner, lora.maybe("o", attended, out))
        return out


def stored_by_columns(linear: nn.Linear) -> nn.Linear:
    """The same layer with its weight ``(out, in)`` laid out column by column.

    A product with one row, which is all that decoding does, reads a weight fastest along its longer side: for a layer
    with more outputs than inputs that is a column. Shapes, checkpoints and large products do not notice.
    """
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


def _maybe_detached(parameter: Tensor, frozen: bool) -> Tensor:
    return parameter.detach() if frozen else parameter
