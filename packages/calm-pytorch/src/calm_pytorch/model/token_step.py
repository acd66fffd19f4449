"""One token through a plain x-transformers decoder: what decides the speed of generation.

Reading the weights is most of what a token must cost on a CPU; calls of modules, operations on three dimensions where
two do, and questions that have the same answer for every token come on top, layer by layer. Here they are left out.

Legend: b batch, h heads, g key/value heads, e features of a head, d feature.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_pytorch.model.hooks import Change, is_heard
from lm_core.generation.decoding import by_columns
from lm_core.nn.attention import attend
from lm_core.nn.kv_cache import KVCache

# Projections up to this size are copied into one for decoding; larger ones gain nothing by it.
JOINED_BYTES = 32 * 2**20


class LayerWeights(NamedTuple):
    """Of a layer, the weight of queries, keys and values in one, and the gains of its norms (None: call the norm).

    ``out`` is the attention's output weight, transposed. ``feedforward`` are functions to be applied in turn.
    """

    projections: Tensor
    out: Tensor
    attention_gain: Tensor | None
    feedforward_gain: Tensor | None
    feedforward: tuple[Callable[[Tensor], Tensor], ...]


def joined(attention: Any) -> Tensor:
    """Weights of queries, keys and values in one."""
    return torch.cat((attention.to_q.weight, attention.to_k.weight, attention.to_v.weight))


def joined_by_columns(attention: Any) -> Tensor:
    """``by_columns(joined(attention))`` in one copy."""
    return torch.cat([part.weight.t() for part in (attention.to_q, attention.to_k, attention.to_v)], dim=1).t()


def gain_of(norm: Any) -> Tensor | None:
    """The factor of an x-transformers LayerNorm; None for another norm."""
    if type(norm).__name__ != "LayerNorm":
        return None
    gain: Tensor = norm.gamma + 1.0 if norm.unit_offset else norm.gamma
    return gain


def layer_weights(layers: Sequence[Any]) -> list[LayerWeights] | None:
    """What many short calls need of each layer; None if it is too large to be copied."""
    first = layers[0]
    copied = [first.attention.to_q, first.attention.to_k, first.attention.to_v]
    copied += [part for part in first.feedforward_parts if type(part) is nn.Linear and _is_wide(part.weight)]
    if len(layers) * sum(part.weight.nbytes for part in copied) > JOINED_BYTES:
        return None
    with torch.no_grad():
        return [
            LayerWeights(
                joined_by_columns(layer.attention),
                layer.attention.to_out.weight.t(),
                gain_of(layer.attention_norm),
                gain_of(layer.feedforward_norm),
                _feedforward(layer.feedforward_parts),
            )
            for layer in layers
        ]


def _feedforward(parts: Sequence[Any]) -> tuple[Callable[[Tensor], Tensor], ...]:
    """What parts of a feedforward do where nobody listens to them."""
    # in evaluation mode a dropout does nothing
    parts = [part for part in parts if type(part) is not nn.Dropout or part.training]
    if [type(part) for part in parts] == [nn.Linear, nn.GELU, nn.Linear]:
        first, gelu, second = parts
        plain = gelu.approximate == "none" and first.bias is not None and second.bias is not None
        # in half precision it is the operator that computes in float32
        if plain and first.weight.device.type == "cpu" and first.weight.dtype in (torch.float32, torch.float64):
            weight = (by_columns(first.weight) if _is_wide(first.weight) else first.weight.clone()).mul_(0.5**0.5)
            return (partial(_with_gelu, first.bias * 0.5**0.5, weight.t(), second.bias, second.weight.t()),)
    return tuple(_linear(part) if type(part) is nn.Linear else part for part in parts)


def _linear(part: nn.Linear) -> Callable[[Tensor], Tensor]:
    return partial(F.linear, weight=by_columns(part.weight) if _is_wide(part.weight) else part.weight, bias=part.bias)


def _with_gelu(bias: Tensor, weight: Tensor, second_bias: Tensor, second_weight: Tensor, x: Tensor) -> Tensor:
    """A feedforward with a GELU, whose first half gives ``z = y / sqrt(2)``: ``gelu(y) sqrt(2) = z + z erf(z)``.

    For a thousand numbers the operator of GELU takes twice as long on a CPU.
    """
    z = torch.addmm(bias, x, weight)
    return torch.addmm(second_bias, torch.addcmul(z, z, torch.erf(z)), second_weight, alpha=0.5**0.5)


def _is_wide(weight: Tensor) -> bool:
    return weight.shape[0] > weight.shape[1]


def token_step(
    layers: Sequence[Any],
    weights: Sequence[LayerWeights],
    x: Tensor,
    cache: KVCache,
    angles: Tensor | None,
    changes: Mapping[int, Change],
) -> Tensor:
    """Applies all layers to one new token a row, ``(b, 1, d)`` to ``(b, 1, d)``, without padding or gradients.

    The sums at the ends of layers and the parts of feedforwards are called as modules where somebody listens there. The
    caller advances the cache. ``changes`` say of a layer, counted from 0, what becomes of its output.
    """
    if angles is not None:
        from x_transformers.x_transformers import apply_rotary_pos_emb
    b = x.shape[0]
    x = x.view(b, -1)
    for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        part = layer.attention
        h, g = part.heads, part.kv_heads
        normed_x = normed(layer.attention_norm, weight.attention_gain, x)
        heads = F.linear(normed_x, weight.projections).view(b, h + 2 * g, 1, -1)
        q, held = heads.narrow(1, 0, h), cache.append(number, heads.narrow(1, h, 2 * g))
        k, v = held.narrow(1, 0, g), held.narrow(1, g, g)
        if angles is not None:
            q, k = apply_rotary_pos_emb(q, angles), apply_rotary_pos_emb(k, angles)
        scale = part.attend.scale
        read = F.scaled_dot_product_attention(q, k, v, scale=scale) if g == h else attend(q, k, v, scale=scale)
        read = read.reshape(b, -1)
        if is_heard(layer.attention_sum) or read.dtype != x.dtype:  # autocast would round the sum
            x = _sum(layer.attention_sum, read @ weight.out, x)
        else:
            x = torch.addmm(x, read, weight.out)
        y = normed(layer.feedforward_norm, weight.feedforward_gain, x)
        heard = any(is_heard(part) for part in layer.feedforward_parts)
        for function in layer.feedforward_parts if heard else weight.feedforward:
            y = function(y)
        x = _sum(layer.feedforward_sum, y, x)
        if number in changes:
            x = changes[number](x.unsqueeze(1)).view(b, -1)
    return x.unsqueeze(1)


def _sum(module: Any, branch: Tensor, x: Tensor) -> Tensor:
    """What a plain residual sum of ``(b, d)`` makes of a branch."""
    if is_heard(module):
        heard: Tensor = module(branch.unsqueeze(1), x.unsqueeze(1))
        return heard.view(x.shape)
    return branch + x


def normed(norm: Any, gain: Tensor | None, x: Tensor) -> Tensor:
    """What a norm of that gain (None: call it) makes of ``x``."""
    if gain is None:
        out: Tensor = norm(x)
        return out
    return F.layer_norm(x, gain.shape, gain, None, norm.ln.eps)
