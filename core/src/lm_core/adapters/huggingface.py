"""Adapter of Hugging Face causal language models, also those wrapped by peft.

transformers has hundreds of architectures, whose exact behaviour does not follow from their configuration. So each
model is tried on a few tokens when it is wrapped (``undisturbed``: no gradient, mode and random state unchanged):

- A model that is not causal is rejected.
- ``hidden`` exists if the output layer is a bias-free ``nn.Linear`` whose result is returned unchanged. Soft caps and
  scales change small logits by less than rounding, so the trial replaces that layer's result by large numbers.
- ``init_cache`` exists if the model returns a cache that only holds keys and values of each position, and a left-padded
  row decoded in steps equals the row alone. Recurrent and hybrid models are decoded without a cache.
- The cache has a static form if steps with transformers' static layers equal it too; this is tried when first needed.
  Layers with a sliding window get the whole capacity: the library's mask limits what they see, and its own static
  layers for windows count on the host, so that every step would be compiled again.

Legend: b batch, n new tokens, m cached and new tokens, v vocabulary, d feature.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.adapters.base import Adapter, AdapterCache
from lm_core.causal_lm import eval_mode
from lm_core.nn.kv_cache import selected_rows
from lm_core.nn.masking import positions_from_mask

# Layers with one key and one value for each position, without in-place writes: rows can be selected, and a shallow copy
# is independent.
_LAYERS_OF_KEYS_AND_VALUES = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"})
# Those that hold nothing else.
_LAYERS_WITH_A_STATIC_FORM = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})

# Error, relative to the spread of the logits, above which two ways to compute them count as different: well above
# rounding (TF32 matrix products included), well below what a wrong position or mask does to a trained model. In half
# precision single logits are off by too much to tell (SmolLM2-135M in bfloat16, calls of other lengths: 0.19), so the
# root mean square of a position's errors counts (there 0.07 at most, and 0.27 at least with another context).
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_TOLERANCE_HALF_PRECISION = 0.15

# Positions of the static cache of the trial, more than its tokens.
_TRIAL_CAPACITY = 8


class HuggingFaceCache(AdapterCache):
    """The cache of transformers (its cache object or, in older versions, nested tuples) and the mask of its padding."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        # Made by the model in the first call, because only the model knows which of its layers use sliding windows.
        self.transformers_cache: Any = None

    def _made_static(self, capacity: int) -> Tensor:
        from transformers.cache_utils import Cache

        kinds = {type(layer).__name__ for layer in getattr(self.transformers_cache, "layers", [])}
        if not kinds or not kinds <= _LAYERS_WITH_A_STATIC_FORM:
            kind = ", ".join(sorted(kinds)) or type(self.transformers_cache).__name__
            raise ValueError(f"the library's cache ({kind}) has no static form")
        layers = self.transformers_cache.layers
        position = torch.tensor(self.length, device=layers[0].keys.device)
        self.transformers_cache = Cache(layers=[_static_layer_type()(layer, position, capacity) for layer in layers])
        return position

    def _select(self, index: Tensor) -> None:
        if self.position is not None:
            for layer in self.transformers_cache.layers:
                layer.keys = selected_rows(layer.keys, index, in_place=True)
                layer.values = selected_rows(layer.values, index, in_place=True)
        elif isinstance(self.transformers_cache, (tuple, list)):
            self.transformers_cache = _rows_of_tuples(self.transformers_cache, index)
        elif self.transformers_cache is not None:
            self.transformers_cache.reorder_cache(index)

    def clone(self) -> AdapterCache:
        """An independent copy: calls make new, longer tensors, so only their containers are copied."""
        if self.position is not None:
            return copy.deepcopy(self)
        clone: Any = super().clone()
        clone.transformers_cache = copy.copy(self.transformers_cache)
        if self.transformers_cache is not None and not isinstance(self.transformers_cache, (tuple, list)):
            for name, value in vars(self.transformers_cache).items():
                if isinstance(value, list):
                    entries = [entry if isinstance(entry, Tensor) else copy.copy(entry) for entry in value]
                    setattr(clone.transformers_cache, name, entries)
        return clone


class HuggingFaceLM(Adapter):
    """A transformers causal language model that returns logits only.

    Args:
        model: a ``PreTrainedModel`` with a language-modelling head, or a ``PeftModel`` around one.

    Attributes:
        max_cached_length: longest sequence that a cache may grow to, unless all rows are longer from the start; None
            for no limit. Rotary frequencies of the kind "longrope" change there for the whole sequence. Those of the
            kind "dynamic" change with every length past the original one, which is then ``max_length``.

    Raises:
        TypeError: the model is an encoder-decoder, is not causal, or has no language-modelling head.
        ValueError: the model's weights are on the meta device.
    """

    _cache_type = HuggingFaceCache

    def __init__(self, model: nn.Module) -> None:
        inner = _base_model(model)
        _check_causal_lm(inner)
        kind, original = rope_by_length(inner.config)
        limits = [_number_of_positions(model, inner), original if kind == "dynamic" else None]
        max_length = min((limit for limit in limits if limit is not None), default=None)
        super().__init__(model, vocab_size=_vocab_size(inner), max_length=max_length)
        self.max_cached_length = original if kind == "longrope" else None
        self._changes_input = _changes_input(model)
        self._takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
        self._hidden_is_exact = False
        self._why_not_cached: str | None = None
        self._static_trial: tuple[str | None] | None = None  # its reason, once it has been made
        with undisturbed(model):
            self._check_causal()
            self._hidden_is_exact = not self._changes_input and self._hidden_gives_logits()
            self._why_not_cached = self._reason_not_to_cache()

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def states(self) -> Callable[..., Tensor]:
        """``states(ids, *, mask=None, **kwargs)``: last states ``(b, n, d)``, which need not give logits by a product.

        Soft caps, scales and biases after the output layer are no obstacle, unlike for ``hidden``.
        """
        if self._changes_input:
            raise AttributeError("peft changes the input of the model")
        return self._hidden

    @property
    def _inner(self) -> Any:
        return _base_model(self.model)

    def _whole(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        limit = self.max_cached_length
        if limit is None or mask is None or ids.shape[1] <= limit:
            return self._together(ids, kwargs, hidden=hidden)
        # rows of both kinds of rotary frequencies, which the longest row of a call decides
        is_long = mask.sum(dim=1) > limit
        parts = []
        for chosen, length in ((is_long, ids.shape[1]), (~is_long, limit)):
            if bool(chosen.any()):
                own = {k: v[chosen] if _has_rows(v, len(ids)) else v for k, v in kwargs.items()}
                states = self._together(ids[chosen, :length], own, hidden=hidden)
                parts.append(F.pad(states, (0, 0, 0, ids.shape[1] - length)))
        order = torch.cat((is_long.nonzero(), (~is_long).nonzero())).flatten()
        return torch.cat(parts)[order.argsort()]

    def _together(self, ids: Tensor, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        """States of all rows in one call of the model.

        Padding that comes last needs no mask. With one, a sliding window that holds padding only would give NaN.
        """
        settings: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if hidden:
            states: Tensor = self._inner.base_model(input_ids=ids, **settings, **kwargs)[0]
            return states
        logits: Tensor = self.model(input_ids=ids, **settings, **kwargs).logits
        # A learned prompt has logits too, before those of the ids.
        return logits[:, -ids.shape[1] :]

    def _incremental(
        self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any], *, hidden: bool
    ) -> Tensor:
        inner = self._inner
        if inner.training and any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
            raise ValueError("cache must be None in training mode with gradient checkpointing, which disables caching")
        if self.max_cached_length is not None and cache.position is None:
            self._check_cached_length(self.max_cached_length, ids.shape[1], mask, cache)
        settings: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if cache.transformers_cache is not None:
            settings["past_key_values"] = cache.transformers_cache
        if mask is not None:
            settings["attention_mask"] = mask.long()
        if self._takes_positions and (mask is not None or cache.position is not None):
            settings["position_ids"] = _positions(ids, mask, cache.position)
        module = inner.base_model if hidden else self.model
        output = module(input_ids=ids, **settings, **kwargs)
        cache.transformers_cache = output.past_key_values
        states: Tensor = output[0] if hidden else output.logits
        return states

    def _check_cached_length(self, limit: int, n: int, mask: Tensor | None, cache: Any) -> None:
        after = torch.tensor([cache.length + n]) if mask is None else mask.sum(dim=1)
        before = torch.tensor([cache.length]) if mask is None else mask[:, : cache.length].sum(dim=1)
        if bool((after > limit).any()) and bool(((after if cache.length == 0 else before) <= limit).any()):
            raise ValueError(
                f"cache must end within {limit} positions of {self._described()}, whose rotary frequencies (longrope) "
                f"change there, got {int(after.max())}; call it without a cache"
            )

    def _output_layer(self) -> nn.Module | None:
        layer: nn.Module | None = self._inner.get_output_embeddings()
        return layer

    def _described(self) -> str:
        return type(self._inner).__name__

    def _trial_ids(self, length: int) -> Tensor:
        """``(1, length)`` ids from the middle of the vocabulary, away from special tokens."""
        v = self.vocab_size or length
        return (torch.arange(length, device=self.device) + v // 2).remainder(v).unsqueeze(0)

    def _check_causal(self) -> None:
        ids = self._trial_ids(4).repeat(2, 1)
        ids[1, -1] = ids[0, 0]
        output = self.model(input_ids=ids, use_cache=False, return_dict=True)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < ids.shape[1]:
            raise TypeError(f"{self._described()} has no language-modelling head: its output has no logits (b, n, v)")
        if not _equal(logits[0, :-1], logits[1, :-1]):
            raise TypeError(f"{self._described()} is not causal: its logits depend on later tokens")

    def _hidden_gives_logits(self) -> bool:
        inner = self._inner
        head = inner.get_output_embeddings()
        # Subclasses (quantised, offloaded, with a low-rank update) do not compute weight @ hidden.
        if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or head.bias is not None:
            return False
        if head.weight.device.type == "meta" or inner.base_model is inner:
            return False
        ids = self._trial_ids(3)
        large = torch.linspace(-96, 96, steps=head.out_features, device=head.weight.device).round()
        handle = head.register_forward_hook(lambda module, inputs, output: large.to(output.dtype).expand_as(output))
        try:
            unchanged = self._whole(ids, None, {}, hidden=False)
        finally:
            handle.remove()
        if unchanged.shape[-1] != large.shape[0] or not torch.equal(unchanged.float(), large.expand_as(unchanged)):
            return False
        logits = self._whole(ids, None, {}, hidden=False)
        hidden = self._whole(ids, None, {}, hidden=True)
        return hidden.shape[-1] == head.in_features and _equal(F.linear(hidden, head.weight.to(hidden.dtype)), logits)

    def _reason_not_to_cache(self) -> str | None:
        if self._changes_input:
            return "peft changes its input"
        if getattr(self._inner, "_is_stateful", False):
            return "it is recurrent"
        try:
            return self._try_to_cache()
        except Exception as error:
            # Some architectures cannot read a cache back, or not with these arguments, and raise errors of any type.
            return f"its cache fails with {type(error).__name__}: {error}"

    @property
    def _why_not_static(self) -> str | None:
        if self._static_trial is None:
            with undisturbed(self.model):
                self._static_trial = (self._reason_not_to_be_static(),)
        return self._static_trial[0]

    def _reason_not_to_be_static(self) -> str | None:
        try:
            return self._try_static_steps()
        except Exception as error:
            # As for the growing cache: an architecture may raise errors of any type.
            return f"the static cache of {self._described()} fails with {type(error).__name__}: {error}"

    def _try_static_steps(self) -> str | None:
        rows = self._trial_ids(5).repeat(2, 1)
        mask = torch.ones(2, _TRIAL_CAPACITY, dtype=torch.bool, device=rows.device)
        mask[1, :2] = False
        caches = HuggingFaceCache(2), HuggingFaceCache(2, _TRIAL_CAPACITY, None)
        growing, static = ([self._states(rows[:, :3], mask[:, :3], cache, {}, hidden=False)] for cache in caches)
        caches[1].begin_steps()
        swap = torch.tensor([1, 0], device=rows.device)
        for length in (4, 5):
            for cache in caches:
                cache.reorder(swap)
            mask = mask[swap]
            token = rows[:, length - 1 : length]
            growing.append(self._states(token, mask[:, :length], caches[0], {}, hidden=False))
            static.append(self._states(token, mask, caches[1], {}, hidden=False))
        if not _equal(torch.cat(static[1:], dim=1), torch.cat(growing[1:], dim=1)):
            return f"the static cache of {self._described()} gives other logits"
        return None

    def _try_to_cache(self) -> str | None:
        ids = self._trial_ids(5)
        output = self.model(input_ids=ids, use_cache=True, return_dict=True)
        reason = _reason_not_to_keep(getattr(output, "past_key_values", None), ids.shape[1])
        if reason is not None:
            return reason
        alone = self._whole(ids[:, 2:].contiguous(), None, {}, hidden=False)
        rows = torch.cat((ids, ids))
        mask = torch.ones_like(rows, dtype=torch.bool)
        mask[1, :2] = False
        cache = HuggingFaceCache(2)
        prompt = self._states(rows[:, :3], mask[:, :3], cache, {}, hidden=False)
        swap = torch.tensor([1, 0], device=ids.device)
        cache.reorder(swap)
        after = self._states(rows[:, 3:], mask[swap], cache, {}, hidden=False)
        stepped = torch.cat((prompt, after[swap]), dim=1)
        if not _equal(stepped[:1], output.logits) or not _equal(stepped[1:, 2:], alone):
            return "its cached logits differ from its uncached ones"
        return None


def _positions(ids: Tensor, mask: Tensor | None, position: Tensor | None) -> Tensor:
    """Positions of ``ids``: the last ones of ``mask``, or the one at ``position`` in a static step."""
    if position is None:
        assert mask is not None
        return positions_from_mask(mask)[:, -ids.shape[1] :].contiguous()
    if mask is None:
        return position.expand(ids.shape)
    return positions_from_mask(mask).index_select(1, position.view(1))


@functools.cache
def _static_layer_type() -> Any:
    """transformers' static layer with a position that all layers share; made when the library is imported."""
    from transformers.cache_utils import StaticLayer

    class PositionedLayer(StaticLayer):  # type: ignore[misc]
        """Keys and values ``(b, h, capacity, d)``, written at ``position``."""

        def __init__(self, growing: Any, position: Tensor, capacity: int) -> None:
            super().__init__(max_cache_len=capacity)
            self.position = position
            self.keys, self.values = (_widened(t, int(position), capacity) for t in (growing.keys, growing.values))
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self.position.view(1), key_states)
            self.values.index_copy_(2, self.position.view(1), value_states)
            return self.keys, self.values

        def get_seq_length(self, *args: Any) -> Any:
            return self.position

        def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
            return self.max_cache_len, 0

    return PositionedLayer


def _widened(t: Tensor, length: int, capacity: int) -> Tensor:
    """Keys or values of the last positions before ``length``, in zeros for all positions."""
    wide = t.new_zeros(*t.shape[:2], capacity, t.shape[-1])
    wide[:, :, length - t.shape[2] : length] = t
    return wide


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states are restored on exit."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), eval_mode(model):
        yield


def _equal(a: Tensor, b: Tensor) -> bool:
    tolerance, errors = _TOLERANCE.get(a.dtype), (a.double() - b.double()).abs()
    if tolerance is None:
        tolerance, errors = _TOLERANCE_HALF_PRECISION, errors.square().mean(dim=-1).sqrt()
    return bool(errors.max() <= tolerance * b.double().std())


def _base_model(model: Any) -> Any:
    """The transformers model itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _peft_configs(model: Any) -> list[Any]:
    return [] if _base_model(model) is model else list(model.peft_config.values())


def _changes_input(model: Any) -> bool:
    """True if peft prepends learned tokens to the input, or reads the whole input to decide what to adapt."""
    return any(
        config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None) for config in _peft_configs(model)
    )


def _check_causal_lm(inner: Any) -> None:
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder: as_causal_lm needs a causal language model without an encoder")
    # Weights that accelerate offloads are on the meta device too, but are loaded when their module is called.
    present = [module for module in inner.modules() if not hasattr(module, "_hf_hook")]
    if any(p.device.type == "meta" for module in present for p in module.parameters(recurse=False)):
        raise ValueError(f"{name} must have its weights loaded, some are on the meta device")


def _reason_not_to_keep(past: Any, length: int) -> str | None:
    if isinstance(past, (tuple, list)):
        return None
    kind = type(past).__name__
    known = kind == "DynamicCache"
    layers = getattr(past, "layers", None)
    # Before transformers 4.54 the cache had no layers, but lists of tensors.
    if known and layers is not None:
        names = {type(layer).__name__ for layer in layers}
        kind = f"{kind} of {', '.join(sorted(names))}"
        known = names <= _LAYERS_OF_KEYS_AND_VALUES
    if not known:
        return f"its cache ({kind}) is not of keys and values only"
    if past.get_seq_length() != length:
        return "its cache does not hold every position"
    return None


def _rows_of_tuples(nested: Any, index: Tensor) -> Any:
    if isinstance(nested, (tuple, list)):
        return type(nested)(_rows_of_tuples(entry, index) for entry in nested)
    return nested.index_select(0, index.to(nested.device))


def _vocab_size(inner: Any) -> int | None:
    size = getattr(inner.get_input_embeddings(), "num_embeddings", None)
    return size if size is not None else getattr(inner.config, "vocab_size", None)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (rows,)


def rope_by_length(config: Any) -> tuple[str | None, int | None]:
    """The kind of rotary scaling that depends on the length of the input, and the length from which it does."""
    config = getattr(config, "text_config", config)
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for entry in (settings, *settings.values()):  # one for each kind of layer in some models
        if not isinstance(entry, dict):
            continue
        kind = entry.get("rope_type", entry.get("type"))
        if kind in ("longrope", "dynamic"):
            original = entry.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            return kind, original or getattr(config, "max_position_embeddings", None)
    return None, None


def _number_of_positions(model: Any, inner: Any) -> int | None:
    """Rows of a learned table of positions; None for models that compute their positions."""
    limit = getattr(inner.config, "max_position_embeddings", None)
    words = inner.get_input_embeddings()
    for name, module in inner.named_modules():
        learned = isinstance(module, nn.Embedding) and module is not words and ("pos" in name or "wpe" in name)
        if limit is not None and learned and limit <= module.num_embeddings:
            # RoBERTa and related models count positions from after the padding id.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            virtual = max((getattr(config, "num_virtual_tokens", 0) for config in _peft_configs(model)), default=0)
            return min(limit, module.num_embeddings - skipped) - virtual
    return None
