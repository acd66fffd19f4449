"""The parallel block of CoCa's decoder and of our ViT: attention and feed-forward read one input and are summed.

PaLM's form (arXiv 2204.02311, section 2), which the original CoCa code uses: one bias-free projection makes queries,
one key head, one value head (arXiv 1911.02150) and the feed-forward's two halves (SwiGLU, arXiv 2002.05202); one more
takes both outputs back. The original kept two output matrices; side by side in one matrix they give the same sum.

Legend: b batch, n sequence, h query heads, d head feature.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.nn.attention import attend
from lm_core.nn.feedforward import split_swiglu
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm
from lm_core.nn.rotary import apply_rotary


class ParallelBlock(nn.Module):
    """``x + attention(norm(x)) + feed_forward(norm(x))`` with one key/value head.

    Args:
        dim: features of the residual stream.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: feed-forward inner features over ``dim``.
        causal: whether a position sees only itself and earlier ones.
    """

    def __init__(self, *, dim: int, dim_head: int, heads: int, ff_mult: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.causal = causal
        self.attn_dim, self.ff_dim = heads * dim_head, dim * ff_mult
        self.in_dims = (self.attn_dim + dim_head, dim_head, 2 * self.ff_dim)
        self.norm = LayerNorm(dim)
        self.proj_in = nn.Linear(dim, sum(self.in_dims), bias=False)
        self.proj_out = joint_output(dim, self.attn_dim, self.ff_dim)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        rotation: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b n dim"]:
        """One residual step.

        Args:
            x: residual stream.
            rotation: cosine and signed sine of ``RotaryEmbedding``; None leaves queries and keys as they are.
            mask: True at keys that may be seen, as ``lm_core.nn.attention.attend`` takes it.
            cache: keys and values of earlier positions, to which those of ``x`` are added.
            layer: number of this layer in the cache.
        """
        b, n, _ = x.shape
        qk, v, inner = split_swiglu(self.proj_in(self.norm(x)), self.in_dims[:2])
        qk = qk.view(b, n, -1, self.dim_head).transpose(1, 2)
        v = v.view(b, n, 1, self.dim_head).transpose(1, 2)
        if rotation is not None:
            # Queries and keys are neighbours: one rotation serves both.
            qk = apply_rotary(qk, *rotation)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = attend(q, k, v, mask=mask, causal=self.causal)
        attended = attended.transpose(1, 2).reshape(b, n, self.attn_dim)
        # Added outside the product, so that under autocast the residual stream stays in float32.
        return x + self.proj_out(torch.cat((attended, inner), dim=-1))


def joint_output(dim: int, *fan_in: int) -> nn.Linear:
    """One matrix for several outputs that are summed, each part initialised as a layer of its own."""
    layer = nn.Linear(sum(fan_in), dim, bias=False)
    for part, size in zip(layer.weight.data.split(fan_in, dim=1), fan_in, strict=True):
        nn.init.uniform_(part, -(size**-0.5), size**-0.5)
    return layer
