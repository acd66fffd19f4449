"""Attention over ``scaled_dot_product_attention``, with the masks that are easy to get wrong.

Multi-query and grouped-query keys are never repeated in memory: one query folds its heads into the sequence (decoding),
otherwise the heads are broadcast by the backend (CUDA) or by a stride-0 view (CPU).
Causal attention with a cache is aligned to the last key. A row in which every key is masked gives zeros, not NaN.

Legend: b batch, h query heads, g key/value heads, i queries, j keys, d feature.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_core.checks import check_probability, typed
from lm_core.nn.rotary import XPosBlock


def attend(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b g j d"],
    v: Float[Tensor, "b g j e"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    every_query_sees_a_key: bool = False,
) -> Float[Tensor, "b h i e"]:
    """Scaled dot-product attention (arXiv 1706.03762, equation 1; shared key heads arXiv 1911.02150).

    Args:
        q: queries.
        k: keys; the number of query heads is a multiple of that of the key heads.
        v: values.
        mask: True where a query may attend. ``(b, j)`` masks keys, ``(b, i, j)`` pairs, ``(b, h or 1, i, j)`` all.
        causal: queries are the last ``i`` of the ``j`` positions and attend to no later key.
        dropout: probability with which an attention weight is dropped.
        scale: factor of the scores, ``d ** -0.5`` by default.
        every_query_sees_a_key: True asserts that the mask leaves each query a key, so that this is not checked.

    Raises:
        ValueError: head counts do not divide, there are more queries than keys under ``causal``, or the mask has
            another shape.
        TypeError: the mask is not boolean.
    """
    h, g, i, j = q.shape[1], k.shape[1], q.shape[-2], k.shape[-2]
    if h % g:
        raise ValueError(f"query heads must be a multiple of key heads, got {h} and {g}")
    if causal and i > j:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {j} and {i}")
    if mask is not None:
        mask = _four_dimensional(mask, q.shape[0], h, i, j)
    # The last position sees every key: one query needs no causal mask. (An `and` would be symbolic in a graph.)
    if i == 1:
        causal = False
    if causal and (mask is not None or i != j):
        triangle = torch.ones(i, j, dtype=torch.bool, device=q.device).tril(j - i)
        mask = triangle if mask is None else mask & triangle
        causal = False
    if mask is None or every_query_sees_a_key:
        return _sdpa(q, k, v, mask, causal, dropout, scale)
    # A row without any visible key attends to all of them, which avoids NaN, and is zeroed afterwards.
    visible = mask.any(dim=-1, keepdim=True)
    out = _sdpa(q, k, v, mask | ~visible, False, dropout, scale)
    return out.masked_fill(~visible, 0.0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None
) -> Tensor:
    h, g = q.shape[1], k.shape[1]
    if h == g:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
    if q.shape[-2] == 1 and (mask is None or mask.ndim < 4 or mask.shape[1] == 1):
        # Plain reshapes: this runs once a layer for every generated token. Some backends return a transposed layout.
        folded = q.view(q.shape[0], g, h // g, q.shape[-1])
        return F.scaled_dot_product_attention(folded, k, v, mask, dropout, scale=scale).reshape(q.shape[0], h, 1, -1)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=True)
    k, v = (_broadcast_heads(t, h // g) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)


def _broadcast_heads(t: Tensor, repeats: int) -> Tensor:
    b, g, j, d = t.shape
    if g == 1:
        return t.expand(b, repeats, j, d)
    return t.unsqueeze(2).expand(b, g, repeats, j, d).reshape(b, g * repeats, j, d)


def _four_dimensional(mask: Tensor, b: int, h: int, i: int, j: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True where a query attends), got {mask.dtype}")
    full = mask
    if mask.ndim == 2:
        full = rearrange(mask, "b j -> b 1 1 j")
    elif mask.ndim == 3:
        full = rearrange(mask, "b i j -> b 1 i j")
    allowed = ({1, b}, {1, h}, {1, i}, {j})
    if full.ndim != 4 or any(size not in sizes for size, sizes in zip(full.shape, allowed, strict=True)):
        raise ValueError(f"mask must broadcast to (b, h, i, j) = {(b, h, i, j)}, got shape {tuple(mask.shape)}")
    return full


class Attention(nn.Module):
    """``attend`` as a module that holds causality, dropout (in training mode only) and scale.

    Args:
        causal: True lets queries attend only to keys up to their own position.
        dropout: probability with which an attention weight is dropped in training mode.
        scale: factor of the scores, ``d ** -0.5`` by default.
    """

    @typed
    def __init__(self, *, causal: bool = False, dropout: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        check_probability(dropout, "dropout")
        self.causal = causal
        self.dropout = dropout
        self.scale = scale

    def forward(
        self,
        q: Float[Tensor, "b h i d"],
        k: Float[Tensor, "b g j d"],
        v: Float[Tensor, "b g j e"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        xpos: tuple[XPosBlock, ...] | None = None,
        every_query_sees_a_key: bool = False,
    ) -> Float[Tensor, "b h i e"]:
        """``attend``; with ``xpos`` (``RotaryEmbedding.xpos_blocks``) block by block, scaling queries and keys.

        ``xpos`` is for causal attention: a block does not attend to keys after it.
        """
        dropout = self.dropout if self.training else 0.0
        if xpos is None or len(xpos) == 1:
            if xpos is not None:
                q, k = _scaled(q, xpos[0].query_scale), _scaled(k, xpos[0].key_scale)
            return attend(
                q,
                k,
                v,
                mask=mask,
                causal=self.causal or xpos is not None,
                dropout=dropout,
                scale=self.scale,
                every_query_sees_a_key=every_query_sees_a_key,
            )
        if mask is not None:
            mask = _four_dimensional(mask, q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
        outputs = []
        for block in xpos:
            block_q = _scaled(q[..., block.start : block.stop, :], block.query_scale)
            block_k = _scaled(k[..., : block.key_stop, :], block.key_scale)
            block_mask = mask
            if mask is not None:
                block_mask = mask[..., : block.key_stop]
                if mask.shape[-2] > 1:
                    block_mask = block_mask[..., block.start : block.stop, :]
            block_v = v[..., : block.key_stop, :]
            outputs.append(
                attend(block_q, block_k, block_v, mask=block_mask, causal=True, dropout=dropout, scale=self.scale)
            )
        return torch.cat(outputs, dim=-2)


def _scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return t
    return t * (scale if scale.ndim == 2 else rearrange(scale, "b n d -> b 1 n d")).to(t.dtype)
