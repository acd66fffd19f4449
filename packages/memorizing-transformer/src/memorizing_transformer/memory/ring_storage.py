"""Keys and values of past tokens: one ring buffer per row, first in, first out, in one of three number formats.

A row keeps the last ``capacity`` of the ``written`` tokens since it was last cleared; token ``t`` (counted from 0) is
in slot ``t % capacity``. Buffers grow on demand, doubling up to the capacity.

| format | bytes per token (key and value) at d = 64 |
|---|---|
| float32 | 512 |
| bfloat16 | 256 |
| int8 | 132: one byte per number and a float16 scale for each key and each value |

Narrow formats are converted to wider ones chunk by chunk in a search: bfloat16 products are many times slower than
float32 ones on most CPUs.

Legend: r rows, n tokens, c capacity, d feature.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memorizing_transformer.memory.exact_search import CPU_CHUNK, own_products

StorageFormat = Literal["float32", "bfloat16", "int8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SMALLEST_GROWTH = 256  # slots


def quantise(kv: Float[Tensor, "*shape d"]) -> tuple[Tensor, Tensor]:
    """Int8 numbers and scales: round(x / scale) with scale = max |x| / 127 of each vector, rounded to float16."""
    # float16 would lose scales below 6e-8 and above 65504
    scales = (kv.abs().amax(dim=-1).float() / 127).clamp(6e-8, 65504.0).to(torch.float16)
    numbers = (kv.float() / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return numbers, scales


class RingStorage:
    """Ring buffers of ``rows`` rows of up to ``capacity`` tokens, in the memory of one device.

    A token has ``parts`` vectors: a key and a value, or a key only.
    """

    def __init__(
        self, *, rows: int, capacity: int, dim: int, storage: str, device: torch.device, parts: int = 2
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        self.dim = dim
        self.parts = parts
        self.storage = storage
        self.device = device
        # per row: number of tokens added since it was cleared, and the first of them that is still stored
        self.written = [0] * rows
        self.first = [0] * rows
        self.data, self.scales = self._allocate(0)

    def size(self, row: int) -> int:
        """Number of tokens in a row."""
        return self.written[row] - self.first[row]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, used or not."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """The slots in use, as ranges ``(start, stop)``."""
        size = self.size(row)
        if size in (0, self.capacity):
            return [(0, size)] if size else []
        start, stop = self.first[row] % self.capacity, self.written[row] % self.capacity or self.capacity
        return [(start, stop)] if start < stop else [(0, stop), (start, self.capacity)]

    def positions(self, row: int, slots: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Number of the token in each slot, counted from 0 since the row was cleared."""
        last = self.written[row] - 1
        return last - (last - slots) % self.capacity

    def append(self, rows: Sequence[int], kv: Sequence[Tensor]) -> None:
        """Appends tokens ``(n, 2, d)`` to each of ``rows``, with an n for each; when full, the oldest are evicted."""
        after: dict[int, tuple[int, int]] = {}
        for row, new in zip(rows, kv, strict=True):
            written = self.written[row] + new.shape[0]
            after[row] = (max(self.first[row], written - self.capacity), written)
        self._make_room({row: written for row, (_, written) in after.items()})
        self._before_writing(after)
        if self.device.type != "cpu" and len({len(new) for new in kv}) == 1 and len(kv[0]) <= self.capacity:
            self._write_rows(rows, torch.stack(list(kv)), [written for _, written in after.values()])
        else:
            for (row, (_, written)), new in zip(after.items(), kv, strict=True):
                self._write(row, new[-self.capacity :], stop=written)
        for row, (first, written) in after.items():
            self.first[row], self.written[row] = first, written
        self._commit()

    def clear(self, rows: Sequence[int]) -> None:
        """Empties rows; their buffers stay."""
        for row in rows:
            self.first[row] = self.written[row] = 0
        self._commit()

    def _write(self, row: int, new: Tensor, *, stop: int) -> None:
        """Writes the last tokens before position ``stop``, no more than there are slots."""
        scales: Tensor | None = None
        new = new.detach().to(self.device)
        if self.storage == "int8":
            new, scales = quantise(new)
        start, done = (stop - new.shape[0]) % self.capacity, 0
        while done < new.shape[0]:
            count = min(new.shape[0] - done, self.capacity - start)
            self.data[row, start : start + count] = new[done : done + count].to(self.data.dtype)
            if scales is not None and self.scales is not None:
                self.scales[row, start : start + count] = scales[done : done + count]
            self._after_writing(row, slice(start, start + count))
            start, done = 0, done + count

    def _write_rows(self, rows: Sequence[int], new: Float[Tensor, "r n _ d"], stops: Sequence[int]) -> None:
        """``_write`` of as many tokens to each row, together: a copy for each row would keep an accelerator waiting."""
        new = new.detach().to(self.device)
        index = self._on_device(rows).unsqueeze(1)
        before_stop = torch.arange(-new.shape[1], 0, device=self.device)
        slots = (self._on_device(stops).unsqueeze(1) + before_stop) % self.capacity
        if self.scales is not None:
            new, scales = quantise(new)
            self.scales[index, slots] = scales
        self.data[index, slots] = new.to(self.data.dtype)

    def _before_writing(self, after: dict[int, tuple[int, int]]) -> None:
        """Called before slots are overwritten; storage on disk first drops their tokens from its header."""

    def _after_writing(self, row: int, slots: slice | Tensor) -> None:
        """Called when slots have been written, before they are counted; storage on disk writes their checksums."""

    def _before_reading(self, row: int) -> None:
        """Called before tokens of a row are read; storage on disk compares them with their checksums once."""

    def _commit(self) -> None:
        """Called once the data match the counts; storage on disk writes them to its header."""

    def _allocate(self, capacity: int) -> tuple[Tensor, Tensor | None]:
        shape = (self.rows, capacity, self.parts, self.dim)
        data = torch.empty(shape, dtype=DTYPES[self.storage], device=self.device)
        scales = torch.empty(shape[:-1], dtype=torch.float16, device=self.device) if self.storage == "int8" else None
        return data, scales

    def _make_room(self, written: Mapping[int, int]) -> None:
        """Allocates slots for the tokens up to ``written`` of each row; raises before anything is changed."""
        have, longest = self.data.shape[1], max(written.values())
        if min(self.capacity, longest) <= have:
            return
        data, scales = self._allocate(min(self.capacity, max(longest, 2 * have, SMALLEST_GROWTH)))
        data[:, :have] = self.data
        if scales is not None and self.scales is not None:
            scales[:, :have] = self.scales
        self.data, self.scales = data, scales

    def key_chunks(self, row: int, size: int, dtype: torch.dtype) -> Iterator[tuple[int, Float[Tensor, "n d"]]]:
        """Keys of a row with the slot of the first, ``size`` slots at a time, widened to ``dtype``."""
        self._before_reading(row)
        for start, stop in self.ranges(row):
            for low in range(start, stop, size):
                yield low, self._keys(row, slice(low, min(low + size, stop)), dtype)

    def batched_key_chunks(
        self, rows: Sequence[int], size: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, Float[Tensor, "r c d"], Bool[Tensor, "r c"] | None]]:
        """``key_chunks`` of several rows together, and a mask of the slots in use (None: all are)."""
        used = max(min(self.written[row], self.capacity) for row in rows)
        is_full = all(self.size(row) == used for row in rows)
        index = self._on_device(rows)
        last, first = (counts.unsqueeze(1) for counts in self._counts(rows))
        for low in range(0, used, size):
            high = min(low + size, used)
            exists = None
            if not is_full:
                slots = torch.arange(low, high, device=self.device)
                exists = last - (last - slots) % self.capacity >= first
            # a view where all rows are searched, as in training
            chosen = [buffer[:, low:high, 0] for buffer in (self.data, self.scales) if buffer is not None]
            if list(rows) != list(range(self.rows)):
                chosen = [buffer.index_select(0, index) for buffer in chosen]
            keys = chosen[0].to(dtype)
            yield low, keys if self.scales is None else keys * chosen[1].to(dtype).unsqueeze(-1), exists

    def _counts(self, rows: Sequence[int]) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
        """Positions of the last and of the first token of each row, on the device."""
        last = self._on_device([self.written[row] - 1 for row in rows])
        return last, self._on_device([self.first[row] for row in rows])

    def _on_device(self, numbers: Sequence[int]) -> Int[Tensor, " r"]:
        """Numbers as a tensor on the device, from pinned memory: a copy from other memory waits for a GPU."""
        tensor = torch.tensor(numbers)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def batched_positions(self, rows: Sequence[int], slots: Int[Tensor, "r q k"]) -> Int[Tensor, "r q k"]:
        """``positions`` in several rows."""
        last = self._counts(rows)[0][:, None, None]
        return last - (last - slots) % self.capacity

    def batched_read(
        self, rows: Sequence[int], slots: Int[Tensor, "r q k"], dtype: torch.dtype
    ) -> Float[Tensor, "r q k 2 d"]:
        """Keys and values in slots of several rows."""
        index = self._on_device(rows)[:, None, None]
        kv = self.data[index, slots].to(dtype)
        return kv if self.scales is None else kv * self.scales[index, slots].to(dtype).unsqueeze(-1)

    def products(self, row: int, queries: Float[Tensor, "q d"], slots: Int[Tensor, "q w"]) -> Float[Tensor, "q w"]:
        """Products of each query with the keys in its own slots, on a CPU, in the queries' dtype."""
        if self.data.dtype == queries.dtype:
            return own_products(queries, self.data[row].view(-1, self.dim), self.parts * slots)
        few = max(1, CPU_CHUNK // slots.shape[1])  # queries at a time, so that few keys are widened
        parts = []
        for some, theirs in zip(queries.split(few), slots.split(few), strict=True):
            keys = self._keys(row, theirs.flatten(), queries.dtype)
            parts.append(own_products(some, keys, torch.arange(theirs.numel()).view(theirs.shape)))
        return torch.cat(parts)

    def _keys(self, row: int, slots: slice | Tensor, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """Keys of a row in some slots, widened to ``dtype``."""

        def chosen(buffer: Tensor) -> Tensor:
            part = buffer[row, :, 0]
            return part[slots] if isinstance(slots, slice) else part.index_select(0, slots)

        keys = chosen(self.data).to(dtype)
        if self.scales is not None:
            keys *= chosen(self.scales).to(dtype).unsqueeze(-1)
        return keys

    def read(self, row: int, slots: Int[Tensor, "*shape"], *, out: Float[Tensor, "*shape _ d"]) -> None:
        """Writes keys and values of slots to ``out``, contiguous and of any floating dtype."""
        self._before_reading(row)
        flat, target = slots.reshape(-1), out.view(-1, self.parts, self.dim)
        if self.data.dtype == out.dtype:
            torch.index_select(self.data[row], 0, flat, out=target)
            return
        target.copy_(self.data[row].index_select(0, flat))
        if self.scales is not None:
            target.mul_(self.scales[row].index_select(0, flat).unsqueeze(-1).to(out.dtype))

    def slots(self, row: int, first: int | None = None) -> Int[Tensor, " n"]:
        """Slots of a row's tokens from position ``first`` on (all by default), oldest first."""
        begin = self.first[row] if first is None else first
        return torch.arange(begin, self.written[row], device=self.device) % self.capacity

    def tokens(self, row: int, first: int | None = None) -> Float[Tensor, "n _ d"]:
        """Keys and values of a row's tokens from position ``first`` on (all by default), in order, in float32."""
        slots = self.slots(row, first)
        out = torch.empty(len(slots), self.parts, self.dim, device=self.device)
        self.read(row, slots, out=out)
        return out

    def selected(self, rows: Sequence[int]) -> "RingStorage":
        """A copy, in memory, whose row ``r`` is row ``rows[r]`` of this one."""
        for row in set(rows):
            self._before_reading(row)
        twin = RingStorage(
            rows=len(rows),
            capacity=self.capacity,
            dim=self.dim,
            storage=self.storage,
            device=self.device,
            parts=self.parts,
        )
        used = max((min(self.written[row], self.capacity) for row in rows), default=0)
        index = torch.tensor(rows, device=self.device)
        twin.data = self.data[:, :used].index_select(0, index)
        twin.scales = None if self.scales is None else self.scales[:, :used].index_select(0, index)
        twin.first, twin.written = [self.first[row] for row in rows], [self.written[row] for row in rows]
        return twin

    def state(self) -> dict[str, Any]:
        """The stored tokens, oldest first, as tensors (on the CPU) and numbers."""
        kv, scales = [], []
        for row in range(self.rows):
            self._before_reading(row)
            slots = self.slots(row)
            kv.append(self.data[row].index_select(0, slots).cpu())
            if self.scales is not None:
                scales.append(self.scales[row].index_select(0, slots).cpu())
        shape = {"storage": self.storage, "dim": self.dim, "capacity": self.capacity}
        return {**shape, "first": list(self.first), "kv": kv, "scales": scales}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` unless the tokens in ``state`` fit this storage and are finite numbers."""
        firsts, kv = state.get("first"), state.get("kv")
        if not isinstance(kv, list) or len(kv) != self.rows:
            raise ValueError(f"the memory was saved with {len(kv or ())} rows, not {self.rows}")
        if not isinstance(firsts, list) or len(firsts) != self.rows:
            raise ValueError(f"the saved memory is damaged: first must have {self.rows} entries, got {firsts!r}")
        for row, first in enumerate(firsts):
            if type(first) is not int or not 0 <= first < 2**62:
                raise ValueError(f"the saved memory is damaged: first[{row}] is {first!r}")
            self._check_saved(state, row, "kv", (self.parts, self.dim), DTYPES[self.storage])
            if self.storage == "int8":
                self._check_saved(state, row, "scales", (self.parts,), torch.float16)

    def _check_saved(
        self, state: dict[str, Any], row: int, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        saved = state.get(name)
        saved = saved[row] if isinstance(saved, list) and len(saved) == self.rows else None
        if not isinstance(saved, Tensor) or saved.dtype != dtype or saved.shape[1:] != shape:
            raise ValueError(f"the saved memory is damaged: {name}[{row}] must be {dtype} of shape (n, {shape})")
        if len(saved) != len(state["kv"][row]) or len(saved) > self.capacity:
            raise ValueError(f"the saved memory is damaged: {name}[{row}] has {len(saved)} of {self.capacity} tokens")
        if dtype.is_floating_point and not bool(torch.isfinite(saved).all()):
            raise ValueError(f"the saved memory is damaged: {name}[{row}] has inf or NaN")

    def load_state(self, state: dict[str, Any]) -> None:
        """Replaces the content by the ``state`` of a storage of the same shape and format."""
        kv, scales, firsts = state["kv"], state["scales"], state["first"]
        written = [first + tokens.shape[0] for first, tokens in zip(firsts, kv, strict=True)]
        self._make_room(dict(enumerate(written)))
        self.clear(range(self.rows))
        for row in range(self.rows):
            slots = torch.arange(firsts[row], written[row], device=self.device) % self.capacity
            self.data[row].index_copy_(0, slots, kv[row].to(self.device))
            if self.scales is not None:
                self.scales[row].index_copy_(0, slots, scales[row].to(self.device))
            self._after_writing(row, slots)
        self.first, self.written = list(firsts), written
        self._commit()
