"""Cross-attention from text (or from learned queries) to image tokens: many query heads, one key/value head.

In the multimodal layers a SwiGLU feed-forward runs in parallel, as in the original code; its input projection is one
matrix with the queries' and its output projection one with the attention's. Keys and values depend on the image only,
so decoding computes them once.

Legend: b batch, i queries, m image tokens, d head feature.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coca.model.block import fused_parts, joint_output
from coca.model.packed_weights import Products
from lm_core.nn.attention import attend
from lm_core.nn.norms import LayerNorm


class CrossAttention(nn.Module):
    """Attention of ``x`` to a context, without the residual.

    Args:
        dim: features of ``x``.
        context_dim: features of the context.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: inner features of a parallel feed-forward over ``dim``; 0 for none.
        norm_context: whether the context is normalised (the output of an image encoder is; pooled tokens are already).
    """

    def __init__(
        self, *, dim: int, context_dim: int, dim_head: int, heads: int, ff_mult: int = 0, norm_context: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.attn_dim, self.ff_dim = heads * dim_head, ff_mult * dim
        self.norm = LayerNorm(dim)
        self.context_norm = LayerNorm(context_dim) if norm_context else nn.Identity()
        self.proj_in = nn.Linear(dim, self.attn_dim + 2 * self.ff_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False)
        self.proj_out = joint_output(dim, *([self.attn_dim, self.ff_dim] if ff_mult else [self.attn_dim]))

    def keys_values(self, context: Float[Tensor, "b m c"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, each ``(b, 1, m, d)``."""
        k, v = self.to_kv(self.context_norm(context)).chunk(2, dim=-1)
        return k.unsqueeze(1), v.unsqueeze(1)

    def forward(self, x: Float[Tensor, "b i dim"], keys_values: tuple[Tensor, Tensor]) -> Float[Tensor, "b i dim"]:
        """What ``x`` reads from a context, given as ``keys_values(context)``, plus the feed-forward."""
        b, i, _ = x.shape
        if self.ff_dim:
            q, inner = fused_parts(self.proj_in, self.norm(x), (self.attn_dim,))
        else:
            q, inner = self.proj_in(self.norm(x)), None
        # Without a mask the heads of one key are only more queries: no key and no gradient of it is repeated.
        q = q.reshape(b, 1, i * self.heads, self.dim_head)
        out = attend(q, *keys_values).reshape(b, i, self.attn_dim)
        return self.proj_out(out if inner is None else torch.cat((out, inner), dim=-1))

    def decode(self, x: Tensor, keys_values: tuple[Tensor, Tensor], products: Products) -> Tensor:
        """``x + forward(x)`` for one new token a row, ``(b, dim)`` to ``(b, dim)``, without gradient.

        ``products`` multiply with the weights of ``proj_in`` and ``proj_out``.
        """
        b = x.shape[0]
        normed = torch.layer_norm(x, self.norm.gamma.shape, self.norm.gamma, None, self.norm.eps)
        q, ff, gate = products.proj_in(normed).split_with_sizes((self.attn_dim, self.ff_dim, self.ff_dim), -1)
        attended = F.scaled_dot_product_attention(q.view(b, 1, self.heads, self.dim_head), *keys_values)
        merged = torch.cat((attended.reshape(b, self.attn_dim), F.silu(gate).mul_(ff)), dim=-1)
        return products.proj_out(merged, x)
