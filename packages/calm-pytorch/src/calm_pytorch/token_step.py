"""One token through a plain x-transformers decoder: what decides the speed of generation.

Reading the weights is most of what a token must cost on a CPU; calls of modules, operations on three dimensions where
two do, and questions that have the same answer for every token come on top, layer by layer. Here they are left out.

Legend: b batch, h heads, g key/value heads, e features of a head, d feature.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.attention import attend
from lm_core.cache import KVCache

# Projections up to this size are copied into one for decoding; larger ones gain nothing by it.
JOINED_BYTES = 32 * 2**20


class LayerWeights(NamedTuple):
    """Of a layer, the weight of queries, keys and values in one, and the gains of its norms (None: call the norm)."""

    projections: Tensor
    attention_gain: Tensor | None
    feedforward_gain: Tensor | None


def joined(attention: Any) -> Tensor:
    """Weights of queries, keys and values in one."""
    return torch.cat((attention.to_q.weight, attention.to_k.weight, attention.to_v.weight))


def gain_of(norm: Any) -> Tensor | None:
    """The factor of an x-transformers LayerNorm; None for another norm."""
    if type(norm).__name__ != "LayerNorm":
        return None
    gain: Tensor = norm.gamma + 1.0 if norm.unit_offset else norm.gamma
    return gain


def layer_weights(layers: Sequence[Any]) -> list[LayerWeights] | None:
    """What many short calls need of each layer; None if it is too large to be copied."""
    first = layers[0].attention
    if len(layers) * sum(part.weight.nbytes for part in (first.to_q, first.to_k, first.to_v)) > JOINED_BYTES:
        return None
    with torch.no_grad():
        # a product of one row with a wide weight reads it faster column by column
        return [
            LayerWeights(
                joined(layer.attention).t().contiguous().t(),
                gain_of(layer.attention_norm),
                gain_of(layer.feedforward_norm),
            )
            for layer in layers
        ]


def token_step(
    layers: Sequence[Any], weights: Sequence[LayerWeights], x: Tensor, cache: KVCache, angles: Tensor | None
) -> Tensor:
    """Applies all layers to one new token a row, ``(b, 1, d)`` to ``(b, 1, d)``, without padding or gradients.

    The sums at the ends of layers are called as modules, and so are the parts of feedforwards, for whoever listens
    there. The caller advances the cache.
    """
    if angles is not None:
        from x_transformers.x_transformers import apply_rotary_pos_emb
    b = x.shape[0]
    for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        part = layer.attention
        h, g = part.heads, part.kv_heads
        normed_x = normed(layer.attention_norm, weight.attention_gain, x.view(b, -1))
        heads = F.linear(normed_x, weight.projections).view(b, h + 2 * g, 1, -1)
        q, held = heads[:, :h], heads[:, h:]
        held, _ = cache.update(number, held, held[..., :0])
        k, v = held[:, :g], held[:, g:]
        if angles is not None:
            q, k = apply_rotary_pos_emb(q, angles), apply_rotary_pos_emb(k, angles)
        read = attend(q, k, v, scale=part.attend.scale)
        x = layer.attention_sum(F.linear(read.reshape(b, -1), part.to_out.weight).unsqueeze(1), x)
        y = normed(layer.feedforward_norm, weight.feedforward_gain, x.view(b, -1))
        for module in layer.feedforward_parts:
            # in evaluation mode a dropout does nothing
            if type(module) is not nn.Dropout or module.training or module._forward_hooks or module._forward_pre_hooks:
                y = module(y)
        x = layer.feedforward_sum(y.unsqueeze(1), x)
    return x


def normed(norm: Any, gain: Tensor | None, x: Tensor) -> Tensor:
    """What a norm of that gain (None: call it) makes of ``x``."""
    if gain is None:
        out: Tensor = norm(x)
        return out
    return F.layer_norm(x, gain.shape, gain, None, norm.ln.eps)
