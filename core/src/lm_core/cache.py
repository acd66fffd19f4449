"""Key/value cache of a decoder: allocated once, written in place, rows reordered for beams and finished prompts."""

import copy
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from lm_core._checks import check_positive, typed

C = TypeVar("C", bound="KVCache")


class KVCache:
    """Keys and values of every layer, ``(layers, b, h, capacity, d)`` each.

    Memory is taken at the first write, when shapes, dtype and device are known, with room for ``max_length`` positions;
    beyond that it doubles. A forward writes each layer with ``update`` and calls ``advance`` once at its end, so a
    forward that fails half way leaves the cache as it was.

    Args:
        layers: number of layers.
        batch_size: rows.
        max_length: positions to make room for.
    """

    @typed
    def __init__(self, *, layers: int, batch_size: int, max_length: int) -> None:
        check_positive(layers, "layers")
        check_positive(batch_size, "batch_size")
        check_positive(max_length, "max_length")
        self.layers = layers
        self.batch_size = batch_size
        self.length = 0
        # Set by a model that was given a mask: later calls must then bring one too.
        self.masked = False
        self._capacity = max_length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values) if t is not None)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values ``(b, h, n, d)`` behind the current length.

        Returns:
            All keys and values of this layer, ``(b, h, length + n, d)``, as views of the cache.
        """
        stop = self.length + keys.shape[-2]
        if self._keys is None or self._values is None:
            if keys.shape[0] != self.batch_size:
                raise ValueError(f"cache was made for batch_size {self.batch_size}, got a batch of {keys.shape[0]}")
            self._keys, self._values = self._allocate(keys), self._allocate(values)
        elif keys.shape[0] != self.batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, got a batch of {keys.shape[0]}")
        if stop > self._keys.shape[-2]:
            self._capacity = max(stop, 2 * self._capacity)
            self._keys, self._values = self._grown(self._keys), self._grown(self._values)
        held_keys, held_values = self._keys.select(0, layer), self._values.select(0, layer)
        held_keys.narrow(2, self.length, keys.shape[2]).copy_(keys)
        if values.shape[-1] > 0:  # keys may hold both
            held_values.narrow(2, self.length, values.shape[2]).copy_(values)
        return held_keys.narrow(2, 0, stop), held_values.narrow(2, 0, stop)

    def advance(self, count: int) -> None:
        """Makes the ``count`` positions that every layer has just written part of the cache."""
        self.length += count

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._selected(self._keys, index), self._selected(self._values, index)
        self.batch_size = index.shape[0]

    def truncate(self, length: int) -> None:
        """Forgets all positions from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or beyond the current length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        self.length = length
        self.masked = self.masked and length > 0

    def clone(self: C) -> C:
        """An independent copy, with whatever a subclass has added."""
        twin = copy.copy(self)
        if self._keys is not None and self._values is not None:
            twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin

    def _allocate(self, like: Tensor) -> Tensor:
        _, heads, _, dim = like.shape
        return like.new_empty(self.layers, self.batch_size, heads, self._capacity, dim)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:3], self._capacity, old.shape[-1])
        new[..., : self.length, :] = old[..., : self.length, :]
        return new

    def _selected(self, old: Tensor, index: Tensor) -> Tensor:
        used = old[..., : self.length, :].index_select(1, index)
        new = old if index.shape[0] == old.shape[1] else old.new_empty(old.shape[0], index.shape[0], *old.shape[2:])
        new[..., : self.length, :] = used
        return new
