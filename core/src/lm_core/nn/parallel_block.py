"""The parallel block: attention and feed-forward read one input and are summed (PaLM, arXiv 2204.02311, section 2).

One bias-free projection makes queries, keys, values and the feed-forward's two halves (SwiGLU, arXiv 2002.05202);
another maps attention and feed-forward outputs back to the residual stream. Keys and values may have fewer heads than
queries (arXiv 1911.02150, 2305.13245). Every submodule is called, so hooks, wrappers and quantised replacements work.

Legend: b batch, n sequence, h query heads, g key/value heads, d head feature.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from lm_core.checks import typed
from lm_core.nn.attention import Attention
from lm_core.nn.feedforward import split_swiglu
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.masking import positions_from_mask
from lm_core.nn.norms import LayerNorm, l2norm
from lm_core.nn.rotary import RotaryEmbedding, XPosBlock, apply_rotary


@dataclass(frozen=True)
class Positions:
    """Rotary angles, xPos scales and attention mask, shared by all blocks of one forward.

    Attributes:
        rotation: cosine and signed sine from ``RotaryEmbedding``; None leaves queries and keys unrotated.
        xpos: scales from ``RotaryEmbedding.xpos_blocks``.
        mask: True at keys that may be attended to, in a form that ``lm_core.nn.attention.attend`` takes.
        every_query_sees_a_key: True if no row of ``mask`` is empty, which need not be checked then.
    """

    rotation: tuple[Tensor, Tensor] | None = None
    xpos: tuple[XPosBlock, ...] | None = None
    mask: Tensor | None = None
    every_query_sees_a_key: bool = False

    @classmethod
    def of(
        cls,
        rotary: RotaryEmbedding,
        x: Float[Tensor, "b n dim"],
        *,
        cache: KVCache | None = None,
        mask: Bool[Tensor, "b total"] | None = None,
    ) -> "Positions":
        """Positions of ``x``, which follow those of ``cache``.

        Args:
            rotary: source of the angles, and of the scales under xPos.
            x: residual stream, which sets length, device and dtype.
            cache: earlier positions; static or not.
            mask: True at real tokens of cached and new positions, ``total = cache.past + n``; padding does not count
                as a position.
        """
        past = 0 if cache is None else cache.past
        position = None if cache is None else cache.position
        total = past + x.shape[1]
        rotation: tuple[Tensor, Tensor] | None = None
        if mask is None and position is None:
            rotation = rotary.at_range(past, total, device=x.device, dtype=x.dtype)
            if not rotary.use_xpos:
                return cls(rotation)
        key_positions = torch.arange(total, device=x.device) if mask is None else positions_from_mask(mask)
        if position is None:
            query_positions, visible = key_positions[..., past:], mask
        else:
            # A static step reads the whole capacity, of which the positions up to this one count.
            written = torch.arange(total, device=x.device) <= position
            visible = written.expand(x.shape[0], -1) if mask is None else mask & written
            query_positions = key_positions.index_select(-1, position.view(1))
            # At most the query's position: the scales of unwritten keys could overflow.
            key_positions = torch.minimum(key_positions, query_positions)
        if rotation is None:
            cos, sin = rotary(query_positions, x.dtype)
            rotation = (rearrange(cos, "... n d -> ... 1 n d"), rearrange(sin, "... n d -> ... 1 n d"))
        xpos = None
        if rotary.use_xpos:
            # Under autocast queries and keys are narrower than the residual stream.
            narrow = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if narrow else x.dtype
            xpos = rotary.xpos_blocks(query_positions, key_positions, dtype=dtype)
        return cls(rotation, xpos, visible, every_query_sees_a_key=position is not None)


@runtime_checkable
class Adapters(Protocol):
    """Trainable branches next to the two projections of one block."""

    def after_projection(self, x: Tensor, projected: Tensor) -> Tensor:
        """``projected``, the output of ``proj_in`` for ``x``, plus the branches' contribution."""

    def after_output(self, attended: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        """``out``, the block's output, plus the branches' contribution."""


class ParallelBlock(nn.Module):
    """``x + attention(norm(x)) + feed_forward(norm(x))``.

    Args:
        dim: features of the residual stream.
        dim_head: features of a head.
        heads: query heads.
        kv_heads: key/value heads, a divisor of ``heads``; 1 is multi-query attention.
        ff_mult: ratio of the feed-forward's inner features to ``dim``.
        causal: True lets a position attend only to itself and earlier ones.
        attn_dropout: dropout probability of attention weights.
        ff_dropout: dropout probability of the feed-forward's inner features.
        out_dropout: dropout probability of the sum of both outputs, before the residual.
        qk_norm: L2-normalises queries and keys, with learned gains.
        qk_scale: fixed factor of the attention scores under ``qk_norm``.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int = 1,
        ff_mult: int = 4,
        causal: bool = True,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        out_dropout: float = 0.0,
        qk_norm: bool = False,
        qk_scale: float = 8.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.ff_dropout = ff_dropout
        self.out_dropout = out_dropout
        self.attn_dim = heads * dim_head
        self.ff_dim = dim * ff_mult
        # Queries and keys are adjacent, so that one rotation covers both.
        self.in_dims = ((heads + kv_heads) * dim_head, kv_heads * dim_head, 2 * self.ff_dim)
        self.norm = LayerNorm(dim)
        self.proj_in = nn.Linear(dim, sum(self.in_dims), bias=False)
        self.proj_out = joint_output(dim, self.attn_dim, self.ff_dim)
        self.attention = Attention(causal=causal, dropout=attn_dropout, scale=float(qk_scale) if qk_norm else None)
        self.q_scale = nn.Parameter(torch.ones(dim_head)) if qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(dim_head)) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        positions: Positions,
        *,
        cache: KVCache | None = None,
        layer: int = 0,
        adapters: Adapters | None = None,
    ) -> Float[Tensor, "b n dim"]:
        """One residual step.

        Args:
            x: residual stream.
            positions: positions of ``x``; ``Positions()`` for attention without positions.
            cache: keys and values of earlier positions, to which those of ``x`` are added.
            layer: index of this layer in the cache.
            adapters: trainable branches; the block's own weights then receive no gradient.
        """
        b, n, _ = x.shape
        call = called if adapters is None else called_as_constant
        normed = call(self.norm, x)
        projected = call(self.proj_in, normed)
        if adapters is not None:
            projected = adapters.after_projection(normed, projected)
        qk, v, inner = split_swiglu(projected, self.in_dims[:2])

        # attention, with queries and keys normalised and rotated in one tensor
        qk = qk.view(b, n, -1, self.dim_head).transpose(1, 2)
        v = v.view(b, n, -1, self.dim_head).transpose(1, 2)
        if self.q_scale is not None and self.k_scale is not None:
            gains = (self.q_scale, self.k_scale)
            q, k = l2norm(qk).split((self.heads, self.kv_heads), dim=1)
            q_gain, k_gain = gains if adapters is None else (gain.detach() for gain in gains)
            qk = torch.cat((q * q_gain, k * k_gain), dim=1)
        if positions.rotation is not None:
            qk = apply_rotary(qk, *positions.rotation)
        q, k = qk.split_with_sizes((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = self.attention(
            q,
            k,
            v,
            mask=positions.mask,
            xpos=positions.xpos,
            every_query_sees_a_key=positions.every_query_sees_a_key,
        )

        # both outputs in one product
        attended = attended.transpose(1, 2).reshape(b, n, self.attn_dim)
        if self.training and self.ff_dropout > 0.0:
            inner = F.dropout(inner, self.ff_dropout)
        out = call(self.proj_out, torch.cat((attended, inner), dim=-1))
        if self.training and self.out_dropout > 0.0:
            out = F.dropout(out, self.out_dropout)
        # Added outside the product, so that under autocast the residual stream stays in float32.
        out = x + out
        return out if adapters is None else adapters.after_output(attended, inner, out)


def joint_output(dim: int, *fan_in: int) -> nn.Linear:
    """One matrix for several outputs that are summed, each part initialised like a separate layer."""
    layer = nn.Linear(sum(fan_in), dim, bias=False)
    for part, size in zip(layer.weight.data.split(fan_in, dim=1), fan_in, strict=True):
        part.mul_((layer.in_features / size) ** 0.5)  # uniform in +-1/sqrt(size)
    return layer


def called(module: nn.Module, x: Tensor) -> Any:
    """``module(x)``."""
    return module(x)


def called_as_constant(module: nn.Module, x: Tensor) -> Any:
    """``module(x)`` with gradients for ``x`` but for no parameter of ``module``."""
    if not torch.is_grad_enabled():
        return module(x)
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))
