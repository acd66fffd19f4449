"""Key/value cache of a decoder: allocated once, written in place, rows reordered for beams and finished prompts."""

import copy
from collections.abc import Iterable
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from lm_core.checks import check_positive, typed

C = TypeVar("C", bound="KVCache")


class KVCache:
    """Keys and values of every layer, ``(layers, b, h, capacity, d)`` each, or both in one tensor.

    Memory is allocated at the first write, when shapes, dtype and device are known, for ``max_length`` positions;
    beyond that it doubles. A forward writes each layer with ``update``, or ``append``, and calls ``advance`` once at
    its end, so a forward that fails half way leaves the cache unchanged.
    """

    @typed
    def __init__(self, *, layers: int, batch_size: int, max_length: int) -> None:
        check_positive(layers, "layers")
        check_positive(batch_size, "batch_size")
        check_positive(max_length, "max_length")
        self.layers = layers
        self.batch_size = batch_size
        self.length = 0
        # Set by a model that was called with a mask: later calls then need one too.
        self.masked = False
        self._capacity = max_length
        self._buffers: tuple[Tensor, ...] = ()
        self._layer_views: tuple[tuple[Tensor, ...], ...] = ()  # made once, not for every token

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values ``(b, h, n, d)`` after the current length.

        Returns:
            All keys and values of this layer, ``(b, h, length + n, d)``, as views of the cache.
        """
        all_keys, all_values = self._write(layer, (keys, values))
        return all_keys, all_values

    def append(self, layer: int, both: Tensor) -> Tensor:
        """``update`` for keys and values in one tensor, ``(b, h, n, d)`` in any order."""
        return self._write(layer, (both,))[0]

    def _write(self, layer: int, new: tuple[Tensor, ...]) -> list[Tensor]:
        b, _, n, _ = new[0].shape
        if b != self.batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, got a batch of {b}")
        stop = self.length + n
        if not self._buffers or stop > self._capacity:
            self._grow(stop, new)
        buffers = self._layer_views[layer]
        for buffer, written in zip(buffers, new, strict=True):
            buffer.narrow(2, self.length, n).copy_(written)
        return [buffer.narrow(2, 0, stop) for buffer in buffers]

    def advance(self, count: int) -> None:
        """Adds the ``count`` positions that every layer has just written to the length."""
        self.length += count

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` by the former row ``index[r]``; the batch size may change."""
        self._set_buffers(self._selected(buffer, index) for buffer in self._buffers)
        self.batch_size = index.shape[0]

    def truncate(self, length: int) -> None:
        """Drops all positions from ``length`` to the end.

        Raises:
            ValueError: ``length`` is negative or beyond the current length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        self.length = length
        self.masked = self.masked and length > 0

    def clone(self: C) -> C:
        """An independent copy; attributes of a subclass are copied shallowly."""
        twin = copy.copy(self)
        twin._set_buffers(buffer.clone() for buffer in self._buffers)
        return twin

    def _set_buffers(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = tuple(buffers)
        # not by `unbind`, whose parts must not be written to where gradients are taken
        layers = range(self.layers if self._buffers else 0)
        self._layer_views = tuple(tuple(buffer.select(0, layer) for buffer in self._buffers) for layer in layers)

    def _grow(self, stop: int, new: tuple[Tensor, ...]) -> None:
        if stop > self._capacity:
            self._capacity = max(stop, 2 * self._capacity)
        if self._buffers:
            self._set_buffers(self._copied(buffer) for buffer in self._buffers)
        else:
            shapes = ((self.layers, self.batch_size, like.shape[1], self._capacity, like.shape[-1]) for like in new)
            self._set_buffers(like.new_empty(shape) for like, shape in zip(new, shapes, strict=True))

    def _copied(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:3], self._capacity, old.shape[-1])
        new[..., : self.length, :] = old[..., : self.length, :]
        return new

    def _selected(self, old: Tensor, index: Tensor) -> Tensor:
        used = old[..., : self.length, :].index_select(1, index)
        new = old if index.shape[0] == old.shape[1] else old.new_empty(old.shape[0], index.shape[0], *old.shape[2:])
        new[..., : self.length, :] = used
        return new
