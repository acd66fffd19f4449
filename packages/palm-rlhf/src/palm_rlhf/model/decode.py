"""One token through all blocks: the same formulas as ``ParallelBlock``, for the case that decides generation speed.

Reading the weights takes most of a decoding step on a CPU; what Python and small kernels add to it is the rest. Here
there are no submodule calls, no branches for training and no mask, which a step without padding does not need.

Legend: b batch, h query heads, g key/value heads, d head feature, j keys.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_core.nn.feedforward import swiglu
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import l2norm
from lm_core.nn.rotary import apply_rotary
from palm_rlhf.model.block import ParallelBlock, Positions


def has_hooks(blocks: Iterable[ParallelBlock]) -> bool:
    """Whether someone listens to a block's own call, which ``decode_token`` does not make (sharding works this way)."""
    return any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def decode_token(blocks: Iterable[ParallelBlock], x: Tensor, positions: Positions, cache: KVCache) -> Tensor:
    """Applies all blocks to the embedding of one new token a row, ``(b, 1, dim)`` to ``(b, 1, dim)``.

    ``positions`` has no mask, and no gradient is taken. The caller advances the cache.
    """
    b = x.shape[0]
    h = x.view(b, -1)
    key_scale = None if positions.xpos is None else positions.xpos[0].key_scale.to(x.dtype)
    cos, sin = positions.cos, positions.sin
    for layer, block in enumerate(blocks):
        normed = F.layer_norm(h, h.shape[-1:], block.norm.gamma, None, block.norm.eps)
        qk, v, ff = F.linear(normed, block.proj_in.weight).split_with_sizes(block.in_dims, -1)
        qk = qk.view(b, -1, block.dim_head)
        if block.q_scale is not None and block.k_scale is not None:
            q, k = l2norm(qk).tensor_split((block.heads,), dim=1)
            qk = torch.cat((q * block.q_scale, k * block.k_scale), dim=1)
        qk = apply_rotary(qk, cos, sin)
        k, v = cache.update(layer, qk[:, block.heads :].unsqueeze(2), v.view(b, -1, 1, block.dim_head))
        if key_scale is not None:
            k = k * key_scale
        q = qk[:, : block.heads].reshape(b, k.shape[1], -1, block.dim_head)
        attended = F.scaled_dot_product_attention(q, k, v, scale=block.attention.scale)
        # Some backends return a transposed layout, which a view would refuse.
        merged = torch.cat((attended.reshape(b, -1), swiglu(ff)), dim=-1)
        h = h + F.linear(merged, block.proj_out.weight)
    return h.view(b, 1, -1)
