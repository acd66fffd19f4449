"""Adapter of Hugging Face causal language models, also those wrapped by peft.

transformers has hundreds of architectures, whose exact behaviour does not follow from their configuration. So each
model is tried on a few tokens when it is wrapped (``undisturbed``: no gradient, mode and random state unchanged):

- A model that is not causal is rejected.
- ``hidden`` exists if the output layer is a bias-free ``nn.Linear`` whose result is returned unchanged. Soft caps and
  scales change small logits by less than rounding, so the trial replaces that layer's result by large numbers.
- ``init_cache`` exists if the model returns a cache that only holds keys and values of each position, and a left-padded
  row decoded in steps equals the row alone. Recurrent and hybrid models are decoded without a cache.

Legend: b batch, n new tokens, m cached and new tokens, v vocabulary, d feature.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.adapters.base import Adapter, AdapterCache
from lm_core.causal_lm import eval_mode
from lm_core.nn.masking import positions_from_mask

# Layers with one key and one value for each position, without in-place writes: rows can be selected, and a shallow copy
# is independent.
_LAYERS_OF_KEYS_AND_VALUES = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"})

# Error, relative to the spread of the logits, above which two ways to compute them count as different: well above
# rounding (TF32 matrix products included), well below what a wrong position or mask does to a trained model. In half
# precision single logits are off by too much to tell (SmolLM2-135M in bfloat16, calls of other lengths: 0.19), so the
# root mean square of a position's errors counts (there 0.07 at most, and 0.27 at least with another context).
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_TOLERANCE_HALF_PRECISION = 0.15


class HuggingFaceCache(AdapterCache):
    """The cache of transformers (its cache object or, in older versions, nested tuples) and the mask of its padding."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        # Made by the model in the first call, because only the model knows which of its layers use sliding windows.
        self.past: Any = None

    def _select(self, index: Tensor) -> None:
        if isinstance(self.past, (tuple, list)):
            self.past = _rows_of_tuples(self.past, index)
        elif self.past is not None:
            self.past.reorder_cache(index)

    def clone(self) -> AdapterCache:
        """An independent copy: calls make new, longer tensors, so only their containers are copied."""
        clone: Any = super().clone()
        clone.past = copy.copy(self.past)
        if self.past is not None and not isinstance(self.past, (tuple, list)):
            for name, value in vars(self.past).items():
                if isinstance(value, list):
                    entries = [entry if isinstance(entry, Tensor) else copy.copy(entry) for entry in value]
                    setattr(clone.past, name, entries)
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
            return self._together(ids, mask, kwargs, hidden=hidden)
        # rows of both kinds of rotary frequencies, which the longest row of a call decides
        is_long = mask.sum(dim=1) > limit
        parts = []
        for chosen, length in ((is_long, ids.shape[1]), (~is_long, limit)):
            if bool(chosen.any()):
                own = {k: v[chosen] if _has_rows(v, len(ids)) else v for k, v in kwargs.items()}
                states = self._together(ids[chosen, :length], mask[chosen, :length], own, hidden=hidden)
                parts.append(F.pad(states, (0, 0, 0, ids.shape[1] - length)))
        order = torch.cat((is_long.nonzero(), (~is_long).nonzero())).flatten()
        return torch.cat(parts)[order.argsort()]

    def _together(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        """States of all rows in one call of the model."""
        settings: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if mask is not None:
            settings["attention_mask"] = mask.long()
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
        if self.max_cached_length is not None:
            self._check_cached_length(self.max_cached_length, ids.shape[1], mask, cache)
        settings: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if cache.past is not None:
            settings["past_key_values"] = cache.past
        if mask is not None:
            settings["attention_mask"] = mask.long()
            if self._takes_positions:
                settings["position_ids"] = positions_from_mask(mask)[:, -ids.shape[1] :].contiguous()
        module = inner.base_model if hidden else self.model
        output = module(input_ids=ids, **settings, **kwargs)
        cache.past = output.past_key_values
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
