"""Key/value cache of a decoder: allocated once, written in place, rows reordered for beams and finished prompts."""

import copy
from collections.abc import Iterable
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from lm_core.checks import check_positive, typed

C = TypeVar("C", bound="KVCache")


class KVCache:
    """Keys and values of every layer, ``(layers, b, h, capacity, d)`` each, or of both side by side.

    Memory is taken at the first write, when shapes, dtype and device are known, with room for ``max_length`` positions;
    beyond that it doubles. A forward writes each layer with ``update``, or ``append``, and calls ``advance`` once at
    its end, so a forward that fails half way leaves the cache as it was.

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
        self._buffers: tuple[Tensor, ...] = ()
        self._of_layers: tuple[tuple[Tensor, ...], ...] = ()  # views, made once and not for every token

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values ``(b, h, n, d)`` after the current length.

        Returns:
            All keys and values of this layer, ``(b, h, length + n, d)``, as views of the cache.
        """
        held_keys, held_values = self._write(layer, (keys, values))
        return held_keys, held_values

    def append(self, layer: int, both: Tensor) -> Tensor:
        """``update`` for keys and values in one tensor, ``(b, h, n, d)`` in any order."""
        return self._write(layer, (both,))[0]

    def _write(self, layer: int, new: tuple[Tensor, ...]) -> list[Tensor]:
        b, _, n, _ = new[0].shape
        if b != self.batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, got a batch of {b}")
        stop = self.length + n
        if not self._buffers or stop > self._capacity:
            self._make_room(stop, new)
        held = self._of_layers[layer]
        for part, written in zip(held, new, strict=True):
            part.narrow(2, self.length, n).copy_(written)
        return [part.narrow(2, 0, stop) for part in held]

    def advance(self, count: int) -> None:
        """Makes the ``count`` positions that every layer has just written part of the cache."""
        self.length += count

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        self._hold(self._selected(buffer, index) for buffer in self._buffers)
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
        """An independent copy, with what a subclass has added."""
        twin = copy.copy(self)
        twin._hold(buffer.clone() for buffer in self._buffers)
        return twin

    def _hold(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = tuple(buffers)
        # not by `unbind`, whose parts must not be written to where gradients are taken
        layers = range(self.layers if self._buffers else 0)
        self._of_layers = tuple(tuple(buffer.select(0, layer) for buffer in self._buffers) for layer in layers)

    def _make_room(self, stop: int, new: tuple[Tensor, ...]) -> None:
        if stop > self._capacity:
            self._capacity = max(stop, 2 * self._capacity)
        if self._buffers:
            self._hold(self._grown(buffer) for buffer in self._buffers)
        else:
            shapes = ((self.layers, self.batch_size, like.shape[1], self._capacity, like.shape[-1]) for like in new)
            self._hold(like.new_empty(shape) for like, shape in zip(new, shapes, strict=True))

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:3], self._capacity, old.shape[-1])
        new[..., : self.length, :] = old[..., : self.length, :]
        return new

    def _selected(self, old: Tensor, index: Tensor) -> Tensor:
        used = old[..., : self.length, :].index_select(1, index)
        new = old if index.shape[0] == old.shape[1] else old.new_empty(old.shape[0], index.shape[0], *old.shape[2:])
        new[..., : self.length, :] = used
        return new
