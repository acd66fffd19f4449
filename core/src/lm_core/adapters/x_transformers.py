"""Adapter of an x-transformers ``TransformerWrapper`` around a ``Decoder``.

Not every option of that library works with its own cache: token shift, memory tokens, hybrid modules and others read
adjacent tokens that a cached call lacks, without an error. Many are the identity at initialisation, so that a trial of
a new model would not detect them. Hence a list of the modules known to treat each token by itself or by its distance to
others; a model with any other module is decoded without a cache.

Calls without a cache move padding after the real tokens. Cached calls move it in front and pass ``seq_start_pos``,
which masks keys and shifts the table of positions; all other position schemes of the list depend on distances only.

Legend: b batch, n new tokens, m cached and new tokens, v vocabulary, d feature.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.adapters.base import Adapter, AdapterCache
from lm_core.nn.kv_cache import selected_rows

_EXACT_WITH_CACHE = frozenset(
    {
        # x-transformers: structure, embeddings and positions
        *("TransformerWrapper", "Decoder", "Attention", "Attend", "FeedForward", "GLU", "ReluSquared", "SoLU"),
        *("TokenEmbedding", "AbsolutePositionalEmbedding", "RotaryEmbedding", "AlibiPositionalBias"),
        *("LearnedAlibiPositionalBias", "RelativePositionBias", "PolarEmbedding"),
        # x-transformers: norms and residuals
        *("LayerNorm", "RMSNorm", "SimpleRMSNorm", "ScaleNorm", "MultiheadRMSNorm", "DynamicTanh", "Derf"),
        *("Residual", "GRUGating", "LayerScale", "Scale", "ConcatCombine", "LoRALinear"),
        # torch and einops
        *("Linear", "Embedding", "GRUCell", "Dropout", "Identity", "Sequential", "ModuleList", "Rearrange"),
        *("GELU", "SiLU", "ReLU", "Sigmoid", "Tanh"),
    }
)


class XTransformersCache(AdapterCache):
    """Unrotated keys and values of every attention layer, ``(b, h, length, d)`` each."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        # The ids of the cache, for releases of the library that take the whole sequence next to its cache.
        self.ids: Tensor | None = None
        self.layers: list[tuple[Tensor | None, ...]] = []

    def _made_static(self, capacity: int) -> Tensor:
        # The library appends new keys, so positions are counted from the end: a step drops the first column.
        room = capacity - 1 - self.length
        self.layers = [
            tuple(None if tensor is None else F.pad(tensor, (0, 0, room, 0)) for tensor in layer)
            for layer in self.layers
        ]
        device = next(tensor.device for layer in self.layers for tensor in layer if tensor is not None)
        return torch.tensor(self.length, device=device)

    def shift(self, layers: Sequence[Sequence[Tensor | None]]) -> None:
        """Takes keys and values of one more position, ``(b, h, capacity, d)``, in the memory of the present ones."""
        for old, new in zip(self.layers, layers, strict=True):
            for kept, tensor in zip(old, new, strict=True):
                if kept is not None and tensor is not None:
                    kept.copy_(tensor[:, :, 1:])

    def _select(self, index: Tensor) -> None:
        if self.position is not None:
            self.layers = [
                tuple(None if tensor is None else selected_rows(tensor, index, in_place=True) for tensor in layer)
                for layer in self.layers
            ]
            return
        self.ids = None if self.ids is None else self.ids.index_select(0, index)
        self.layers = [
            tuple(None if tensor is None else tensor.index_select(0, index) for tensor in layer)
            for layer in self.layers
        ]


class XTransformersLM(Adapter):
    """An x-transformers decoder that returns logits only.

    Args:
        model: a ``TransformerWrapper``, or an ``AutoregressiveWrapper``, whose network is used.

    Raises:
        TypeError: the wrapper has no causal layers, or returns anything other than one vector of logits a token.
    """

    _cache_type = XTransformersCache

    def __init__(self, model: nn.Module) -> None:
        wrapped = any(cls.__name__ == "AutoregressiveWrapper" for cls in type(model).__mro__)
        net: Any = model.net if wrapped else model
        _check_causal_lm(net)
        table: Any = getattr(net, "pos_emb", None)
        limit = table.max_seq_len if type(table).__name__ == "AbsolutePositionalEmbedding" else None
        super().__init__(net, vocab_size=net.num_tokens, max_length=limit)
        self._why_not_cached = _reason_not_to_cache(net)
        self._hidden_is_exact = _hidden_gives_logits(net)
        self._takes_new_ids = hasattr(net, "input_not_include_cache")

    def _whole(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        states: Tensor = self.model(ids, return_embeddings=hidden, **kwargs)
        return states

    def _incremental(
        self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any], *, hidden: bool
    ) -> Tensor:
        from x_transformers.attend import Intermediates
        from x_transformers.x_transformers import LayerIntermediates

        settings: dict[str, Any] = {}
        if cache.past > 0:
            layers = [Intermediates(cached_kv=layer, layer_type="a") for layer in cache.layers]
            past = LayerIntermediates(attn_intermediates=layers)
            settings = {"cache": past, "cache_age": ids.shape[1]}
            if self._takes_new_ids:
                past.cache_length = cache.past
                settings["input_not_include_cache"] = True
            else:
                ids = torch.cat((cache.ids, ids), dim=1)
        if mask is not None:
            # The first real token of each row; a row without any starts at its end.
            settings["seq_start_pos"] = torch.where(mask.any(dim=1), mask.int().argmax(dim=1), mask.shape[1])
        new = None
        if cache.position is None:
            new = None if mask is None else mask[:, cache.length :]
        else:
            start = settings.get("seq_start_pos", torch.zeros_like(ids[:, 0]))
            settings["seq_start_pos"] = start + cache.past - cache.position
        states: Tensor
        with _without_padding(self.model, new):
            states, after = self.model(ids, return_embeddings=hidden, return_intermediates=True, **settings, **kwargs)
        if cache.position is not None:
            cache.shift([layer.cached_kv for layer in after.attn_intermediates])
            return states
        cache.ids = None if self._takes_new_ids else ids
        cache.layers = [tuple(layer.cached_kv) for layer in after.attn_intermediates]
        return states

    @property
    def _why_not_static(self) -> str | None:
        return None if self._takes_new_ids else "this release of x-transformers reads the whole sequence in each step"

    def _output_layer(self) -> nn.Module | None:
        return self.model.to_logits if isinstance(self.model.to_logits, nn.Module) else None

    def _weight(self) -> Tensor:
        return _output_weight(self.model)


@contextmanager
def _without_padding(net: nn.Module, new: Tensor | None) -> Iterator[None]:
    """Zero attention results at padding.

    A query at padding has no key to attend to; its result is NaN where the softmax has a smaller range than the mask's
    fill value (float64 with alibi), and NaN times a weight of zero would reach the real tokens of the next layer.
    """
    handles = []
    if new is not None:
        padding = ~new[:, None, :, None]

        def zero(module: nn.Module, arguments: Any, output: Any) -> Any:
            out, *rest = output
            return (out.masked_fill(padding[:, :, -out.shape[2] :], 0.0), *rest)

        attends = [module for module in net.modules() if type(module).__name__ == "Attend"]
        handles = [module.register_forward_hook(zero) for module in attends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_causal_lm(net: Any) -> None:
    name = type(net).__name__
    layers = getattr(net, "attn_layers", None)
    if layers is None or not hasattr(net, "to_logits") or not hasattr(net, "num_tokens"):
        raise TypeError(f"{name} of x-transformers is no language model: as_causal_lm takes a TransformerWrapper")
    if not layers.causal:
        raise TypeError(f"{type(layers).__name__} of x-transformers is not causal: as_causal_lm takes a Decoder")
    for module in net.modules():
        # These take a mean or a projection over the whole sequence, later tokens included.
        looks_ahead = type(module).__name__ in ("OrthogonalResidualUpdate", "MVSplitResidualUpdate")
        for option in ("orthog_projected_values", "orthog_projected_values_per_head"):
            looks_ahead = looks_ahead or getattr(module, option, False)
        if looks_ahead:
            raise TypeError(f"{name} is not causal: its {type(module).__name__} mixes in later tokens")
    if _has_memory_keys(net) and getattr(layers.rotary_pos_emb, "scale", None) is not None:
        # xPos scales queries by their distance to the middle of the sequence, and these keys not at all.
        raise TypeError(f"{name} is not causal: attn_num_mem_kv with rotary_xpos makes logits depend on the length")
    if net.to_logits is None:
        raise TypeError(f"{name} with return_only_embed=True has no logits")
    if getattr(net, "has_multiple_heads", False):
        raise TypeError(f"{name} with num_output_heads > 1 gives several logits a token")
    if getattr(net, "average_pool_embed", False) or getattr(net, "cls_token", None) is not None:
        raise TypeError(f"{name} with average_pool_embed or use_cls_token gives logits a sequence, not a token")


def _reason_not_to_cache(net: Any) -> str | None:
    unknown = sorted({type(module).__name__ for module in net.modules()} - _EXACT_WITH_CACHE)
    if unknown:
        return f"{', '.join(unknown)} may look at other tokens"
    present = ["looped"] if getattr(net, "looped", False) else []
    # These need an argument in every call, but cached decoding passes arguments with the prompt only.
    present += ["embed_num_tokens"] if getattr(net, "embeds", None) is not None else []
    present += ["cross_attend"] if net.attn_layers.cross_attend else []
    if present:
        return f"it has {', '.join(present)}"
    rotated = net.attn_layers.rotary_pos_emb is not None or getattr(net.attn_layers, "polar_pos_emb", None) is not None
    if rotated and _has_memory_keys(net):
        return "its rotated queries meet memory keys without a position"
    if not net.can_cache_kv:
        return "x-transformers cannot cache it"
    attends = (module for module in net.modules() if type(module).__name__ == "Attend")
    if not all(_is_softmax(attend.attn_fn) for attend in attends):
        return "its attention is no softmax"
    return None


def _has_memory_keys(net: Any) -> bool:
    return any(getattr(module, "num_mem_kv", 0) > 0 for module in net.modules())


def _is_softmax(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    return function in (F.softmax, torch.softmax)


def _hidden_gives_logits(net: Any) -> bool:
    if getattr(net, "to_mixture", None) is not None or getattr(net, "sigsoftmax_logits", False):
        return False
    if getattr(net, "squeeze_out_last_dim", False):
        return False
    if isinstance(net.to_logits, nn.Module):
        return type(net.to_logits) is nn.Linear and net.to_logits.bias is None
    if type(net.token_emb).__name__ != "TokenEmbedding":
        return False
    # A function: either the product with the embedding or the user's own.
    weight = _output_weight(net).detach()
    hidden = torch.arange(weight.shape[1], device=weight.device, dtype=weight.dtype).cos().view(1, 1, -1)
    with torch.no_grad():
        logits = net.to_logits(hidden)
    expected = hidden @ weight.t()
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3)


def _output_weight(net: Any) -> Tensor:
    head: Any = net.to_logits
    if isinstance(head, nn.Linear):
        return head.weight
    # Tied to the embedding, which newer versions scale.
    embedding: Tensor = net.token_emb.emb.weight
    return embedding * getattr(net, "tie_embedding_scale", 1.0)
