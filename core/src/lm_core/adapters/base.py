"""Base of all adapters: argument checks, padding, and the bookkeeping of a cache.

A subclass only implements the call of its library, with rows whose padding is already in place.

Legend: b batch, n new tokens, m cached and new tokens, v vocabulary, d feature.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.adapters.padding import has_gap, moved_back, with_padding_first, with_padding_last
from lm_core.checks import check_ids, check_positive


class AdapterCache(ABC):
    """Keys and values of another library's model, with the padding its positions depend on.

    Args:
        batch_size: rows in the cache.
        capacity: positions of the static form, which ``begin_steps`` gives to the keys and values.
        why_not_static: reason why there is no static form; None if there is one.

    Attributes:
        batch_size: rows in the cache.
        mask: ``(b, length)`` True at real tokens, None while no row has padding.
        position: 0-d index of the next position to write; None before ``begin_steps``.
    """

    def __init__(
        self, batch_size: int, capacity: int = 0, why_not_static: str | None = "the cache was made without static=True"
    ) -> None:
        self._length = 0
        self.batch_size = batch_size
        self.mask: Tensor | None = None
        self.position: Tensor | None = None
        self._capacity = capacity
        self._why_not_static = why_not_static

    @property
    def length(self) -> int:
        """Positions in the cache; on an accelerator this waits for the device once steps have begun."""
        return self._length if self.position is None else int(self.position)

    @property
    def past(self) -> int:
        """Positions that attention reads before the new ones: the length, or in a static step all but one."""
        return self._length if self.position is None else self._capacity - 1

    def begin_steps(self) -> None:
        """Makes every later call a static step, of one real token a row; see ``lm_core.nn.kv_cache``.

        Raises:
            ValueError: the model has no static form.
        """
        if self._why_not_static is not None:
            raise ValueError(self._why_not_static)
        self.position = self._made_static(self._capacity)

    def advance(self, count: int) -> None:
        """Adds ``count`` positions to the length."""
        if self.position is None:
            self._length += count
        else:
            self.position.add_(count)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` by the former row ``index[r]``; the batch size may change."""
        self._select(index)
        if self.mask is not None and self.position is None:
            self.mask = self.mask.index_select(0, index)
        self.batch_size = index.shape[0]

    def clone(self) -> "AdapterCache":
        """An independent copy, which shares the tensors, since these are never written to."""
        return copy.copy(self)

    def extended_mask(self, new: Tensor | None, n: int) -> Tensor | None:
        """Mask of cached and ``n`` new positions, where ``new (b, n)`` is the mask of the new ones (None: all real)."""
        if self.mask is None and new is None:
            return None
        some = self.mask if new is None else new
        assert some is not None
        cached = some.new_ones(self.batch_size, self.length) if self.mask is None else self.mask
        return torch.cat((cached, some.new_ones(self.batch_size, n) if new is None else new), dim=1)

    @abstractmethod
    def _made_static(self, capacity: int) -> Tensor:
        """Gives keys and values a fixed shape; returns the length as a tensor on their device."""

    @abstractmethod
    def _select(self, index: Tensor) -> None:
        """Selects rows of the keys and values."""


class Adapter(nn.Module, ABC):
    """A causal language model around another library's model, which is not copied.

    ``init_cache``, ``hidden`` and ``output_weight`` exist only if they are exact: check with ``hasattr``.

    Attributes:
        model: the adapted model.
        vocab_size: upper bound of the ids; None if unknown.
        max_length: maximum number of positions; None without a table of positions, or if unknown.
    """

    _cache_type: type[AdapterCache]
    # Set by a subclass for its model: the reason it cannot use a cache (None: it can), and whether its logits equal
    # hidden states times a weight.
    _why_not_cached: str | None = "it has no cache"
    _hidden_is_exact = False

    def __init__(self, model: Any, *, vocab_size: int | None, max_length: int | None) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.max_length = max_length

    def extra_repr(self) -> str:
        """The settings shown by ``repr``."""
        decoding = "cached" if self._why_not_cached is None else f"uncached ({self._why_not_cached})"
        settings = f"vocab_size={self.vocab_size}, max_length={self.max_length}"
        return f"{settings}, hidden={self._offers_hidden}, decoding={decoding}"

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; the CPU for a model without either."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        cache: AdapterCache | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b n v"]:
        """Logits at every position of ``ids``; those at padding are meaningless.

        Args:
            ids: token ids; with a cache, the new ones. Ids at padding are never read.
            mask: True at real tokens of the cached and the new positions.
            cache: cache of ``init_cache``, which grows by the new positions.
            **kwargs: further arguments of the adapted model.

        Raises:
            TypeError: ids are not integers, mask is not boolean, or cache was not made by ``init_cache``.
            ValueError: shapes do not fit, an id is outside the vocabulary (checked on the CPU only), the sequence is
                longer than ``max_length``, or with a cache a row has padding between real tokens.
        """
        return self._states(ids, mask, cache, kwargs, hidden=False)

    @property
    def _offers_hidden(self) -> bool:
        """Checked in every call: an output layer that has been hooked, wrapped or replaced must be called."""
        layer = self._output_layer()
        untouched = layer is None or (
            type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
        )
        return self._hidden_is_exact and untouched

    @property
    def init_cache(self) -> Callable[..., AdapterCache]:
        """``init_cache(batch_size, max_length, *, static=False)``: an empty cache for ``forward`` and ``hidden``."""
        if self._why_not_cached is not None:
            raise AttributeError(self._why_not_cached)
        return self._init_cache

    @property
    def hidden(self) -> Callable[..., Tensor]:
        """``hidden(ids, *, mask=None, cache=None, **kwargs)``: states ``(b, n, d)``; arguments as for ``forward``."""
        if not self._offers_hidden:
            raise AttributeError("logits are not hidden @ output_weight.T")
        return self._hidden

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the output layer: ``logits == hidden @ output_weight.T``."""
        if not self._offers_hidden:
            raise AttributeError("logits are not hidden @ output_weight.T")
        return self._weight()

    def _incremental(
        self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any], *, hidden: bool
    ) -> Tensor:
        """Logits or hidden states of new tokens; ``mask (b, m)`` has its padding first. Grows keys and values."""
        raise AttributeError(self._why_not_cached)

    def _output_layer(self) -> nn.Module | None:
        """The module that maps hidden states to logits; None if a function does."""
        return None

    def _weight(self) -> Tensor:
        """The weight of the output layer."""
        layer: Any = self._output_layer()
        return layer.weight

    def _init_cache(self, batch_size: int, max_length: int, *, static: bool = False) -> AdapterCache:
        # The libraries' keys and values grow by concatenation, so nothing is allocated for max_length.
        check_positive(batch_size, "batch_size")
        check_positive(max_length, "max_length")
        return (
            self._cache_type(batch_size, max_length, self._why_not_static) if static else self._cache_type(batch_size)
        )

    @property
    def _why_not_static(self) -> str | None:
        """The reason why the model has no static steps; None if it has."""
        return f"the cache of {self._described()} has no static form"

    def _hidden(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        cache: AdapterCache | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b n d"]:
        return self._states(ids, mask, cache, kwargs, hidden=True)

    @abstractmethod
    def _whole(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        """Logits or hidden states of rows whose padding comes last."""

    def _described(self) -> str:
        return type(self.model).__name__

    def _states(self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        ids, new = self._checked(ids, mask, cache)
        if cache is None:
            if new is None:
                return self._whole(ids, None, kwargs, hidden=hidden)
            last = with_padding_last(ids, new)
            return moved_back(self._whole(last.ids, last.mask, kwargs, hidden=hidden), last)
        n = ids.shape[1]
        if cache.position is not None:
            states = self._incremental(ids, mask, cache, kwargs, hidden=hidden)
            cache.advance(1)
            return states
        # A prompt may have its padding anywhere; later tokens are appended.
        first = with_padding_first(ids, new) if cache.length == 0 and new is not None else None
        if first is not None:
            ids, new = first.ids, first.mask
        whole_mask = cache.extended_mask(new, n)
        if whole_mask is not None and whole_mask.device.type == "cpu" and has_gap(whole_mask):
            raise ValueError("mask must not have padding between the real tokens of a row when a cache is used")
        states = self._incremental(ids, whole_mask, cache, kwargs, hidden=hidden)
        cache.advance(n)
        cache.mask = whole_mask
        return states if first is None else moved_back(states, first)

    def _checked(self, ids: Tensor, mask: Tensor | None, cache: AdapterCache | None) -> tuple[Tensor, Tensor | None]:
        """Checks the arguments; returns int64 ids with 0 at padding, and the mask of the new positions."""
        if cache is not None and self._why_not_cached is not None:
            raise TypeError(f"cache must be None: an adapted {self._described()} has no init_cache")
        if cache is not None and not isinstance(cache, self._cache_type):
            raise TypeError(f"cache must come from this model's init_cache, got {type(cache).__name__}")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must hold integer token ids, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.ndim != 2:
            raise ValueError(f"ids must have shape (b, n), got {tuple(ids.shape)}")
        if cache is not None and cache.position is not None and ids.shape[1] != 1:
            raise ValueError(f"a static step has one token a row, got {ids.shape[1]}")
        if cache is not None and cache.batch_size != ids.shape[0]:
            raise ValueError(f"cache holds {cache.batch_size} rows, got ids of {ids.shape[0]}")
        length = 0 if cache is None else cache.past
        total = length + ids.shape[1]
        if self.max_length is not None and total > self.max_length:
            raise ValueError(f"ids must end within {self.max_length} positions, got {total}")
        # Some models call `view` on their ids.
        ids = ids.long().contiguous()
        new = None
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"mask must be boolean, got {getattr(mask, 'dtype', type(mask).__name__)}")
            if mask.shape != (ids.shape[0], total):
                raise ValueError(f"mask must have shape {(ids.shape[0], total)}, got {tuple(mask.shape)}")
            new = mask[:, length:]
            ids = ids.masked_fill(~new, 0)
        if self.vocab_size is not None and ids.device.type == "cpu":
            check_ids(ids, self.vocab_size, "ids")
        return ids, new
