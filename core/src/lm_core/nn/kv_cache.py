"""Key/value cache of a decoder: allocated once, written in place, rows reordered for beams and finished prompts.

A static cache reads its prompt like any other. After ``begin_steps`` every forward has one token a row and the same
shapes: keys are written at ``position``, a tensor, and attention reads the whole capacity under the mask that
``lm_core.nn.parallel_block.Positions.of`` makes. Such a step can be compiled, or captured into a CUDA graph.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.checks import check_positive, typed

C = TypeVar("C", bound="KVCache")


def selected_rows(old: Tensor, index: Tensor, *, in_place: bool) -> Tensor:
    """Rows ``index`` of ``old``; in its memory (as CUDA graphs need) if ``in_place`` and there are as many rows."""
    rows = old.index_select(0, index)
    return old.copy_(rows) if in_place and rows.shape == old.shape else rows


class KVCache:
    """Keys and values of every layer, ``(layers, b, h, capacity, d)`` each, or both in one tensor.

    Memory is allocated at the first write, when shapes, dtype and device are known, for ``max_length`` positions;
    beyond that it doubles. A forward writes each layer with ``update``, or ``append``, and calls ``advance`` once at
    its end, so a forward that fails half way leaves the cache unchanged.

    Args:
        layers: layers with keys and values.
        batch_size: batch rows.
        max_length: positions to allocate memory for.
        static: True for a cache of fixed capacity ``max_length`` that ``begin_steps`` can make static; each layer then
            has tensors of its own, ``(b, h, capacity, d)``, filled with zeros.

    Attributes:
        position: 0-d int64 index of the next position to write; None before ``begin_steps``.
        masked: True once a model was called with a mask, which later calls then need too.
    """

    @typed
    def __init__(self, *, layers: int, batch_size: int, max_length: int, static: bool = False) -> None:
        check_positive(layers, "layers")
        check_positive(batch_size, "batch_size")
        check_positive(max_length, "max_length")
        self.layers = layers
        self.batch_size = batch_size
        self.static = static
        self.position: Tensor | None = None
        self.masked = False
        self._length = 0
        self._capacity = max_length
        self._buffers: tuple[Tensor, ...] = ()
        self._layer_views: tuple[tuple[Tensor, ...], ...] = ()  # made once, not for every token

    @property
    def length(self) -> int:
        """Positions in the cache; on an accelerator this waits for the device once steps have begun."""
        return self._length if self.position is None else int(self.position)

    @property
    def past(self) -> int:
        """Positions that attention reads before the new ones: the length, or in a static step all but one.

        A mask has ``past + n`` columns. In a static step those of unwritten positions are ignored.
        """
        return self._length if self.position is None else self._capacity - 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values ``(b, h, n, d)`` after the current length.

        Returns:
            All keys and values of this layer, ``(b, h, past + n, d)``, as views of the cache.

        Raises:
            ValueError: the batch size differs, a static cache is full, or a static step has more than one token.
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
        if self.position is not None:
            if n != 1:
                raise ValueError(f"a static step has one token a row, got {n}")
            for buffer, written in zip(self._layer_views[layer], new, strict=True):
                buffer.index_copy_(2, self.position.view(1), written.to(buffer.dtype))
            return list(self._layer_views[layer])
        stop = self._length + n
        if not self._buffers or stop > self._capacity:
            self._grow(stop, new)
        buffers = self._layer_views[layer]
        for buffer, written in zip(buffers, new, strict=True):
            buffer.narrow(2, self._length, n).copy_(written)
        return [buffer.narrow(2, 0, stop) for buffer in buffers]

    def advance(self, count: int) -> None:
        """Adds the ``count`` positions that every layer has just written to the length."""
        if self.position is None:
            self._length += count
        else:
            self.position.add_(count)

    def begin_steps(self) -> None:
        """Makes every later forward a static step, of one token a row.

        Raises:
            ValueError: the cache is not static, or no prompt has been read.
        """
        if not self.static:
            raise ValueError("the cache was made without static=True")
        if self._length == 0:
            raise ValueError("a static cache must read its prompt before steps begin")
        for buffer in self._buffers:
            # A forward that failed may have written past the length.
            buffer[..., self._length :, :] = 0.0
        self.position = torch.tensor(self._length, device=self._buffers[0].device)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Replaces row ``r`` by the former row ``index[r]``; the batch size may change.

        In a static step with as many rows as before, no tensor moves in memory.
        """
        self._set_buffers(self._selected(buffer, index) for buffer in self._buffers)
        self.batch_size = index.shape[0]

    def truncate(self, length: int) -> None:
        """Drops all positions from ``length`` to the end.

        Raises:
            ValueError: ``length`` is negative or beyond the current length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        self._length = length
        if self.position is not None:
            self.position.fill_(length)
        self.masked = self.masked and length > 0

    def clone(self: C) -> C:
        """An independent copy; attributes of a subclass are copied shallowly."""
        twin = copy.copy(self)
        twin._set_buffers(buffer.clone() for buffer in self._buffers)
        twin.position = None if self.position is None else self.position.clone()
        return twin

    def _set_buffers(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = tuple(buffers)
        if self.static:
            # One tensor of a layer after the other.
            parts = len(self._buffers) // self.layers
            self._layer_views = tuple(
                self._buffers[parts * layer : parts * (layer + 1)] for layer in range(self.layers if parts else 0)
            )
            return
        # not by `unbind`, whose parts must not be written to where gradients are taken
        layers = range(self.layers if self._buffers else 0)
        self._layer_views = tuple(tuple(buffer.select(0, layer) for buffer in self._buffers) for layer in layers)

    def _grow(self, stop: int, new: tuple[Tensor, ...]) -> None:
        if stop > self._capacity:
            if self.static:
                raise ValueError(f"a static cache of {self._capacity} positions is full, got {stop}")
            self._capacity = max(stop, 2 * self._capacity)
        if self._buffers:
            self._set_buffers(self._copied(buffer) for buffer in self._buffers)
            return
        shapes = [(self.batch_size, like.shape[1], self._capacity, like.shape[-1]) for like in new]
        if self.static:
            # Zeros: a masked value is multiplied by zero, and what memory happened to hold may be NaN. A compiled
            # graph that writes to views of one tensor would copy all of it.
            self._set_buffers(
                like.new_zeros(shape) for _ in range(self.layers) for like, shape in zip(new, shapes, strict=True)
            )
        else:
            self._set_buffers(like.new_empty(self.layers, *shape) for like, shape in zip(new, shapes, strict=True))

    def _copied(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:3], self._capacity, old.shape[-1])
        new[..., : self._length, :] = old[..., : self._length, :]
        return new

    def _selected(self, old: Tensor, index: Tensor) -> Tensor:
        if self.static:
            return selected_rows(old, index, in_place=True)
        used = old[..., : self._length, :].index_select(1, index)
        new = old if index.shape[0] == old.shape[1] else old.new_empty(old.shape[0], index.shape[0], *old.shape[2:])
        new[..., : self._length, :] = used
        return new
