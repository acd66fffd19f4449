"""Packing: documents cut into rows of one length, with document ids for a mask between them.

The documents of an epoch form one stream, each ended by EOS; row ``r`` takes the tokens ``[r n, r n + n]`` of it, the
first ``n`` as inputs and the last ``n`` as labels, so every token that follows another of its document is a label
exactly once. No document is truncated or left out: the last row of a stream is padded.

Training rows continue over epochs without a break. A step consumes ``batch_size * world_size`` rows; rank ``r`` takes
``batch_size`` of them starting at ``r * batch_size``: two ranks together read the rows of one process with twice the
batch.

Legend: b batch, n sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lm_core.checks import check_positive, typed
from lm_core.data.documents import Documents
from lm_core.data.epochs import EpochOrder, check_same_order

IGNORE_INDEX = -100
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed documents.

    Attributes:
        ids: input tokens.
        labels: the token after each input; -100 where that belongs to another document or is padding.
        document_ids: index within the row of each input's document, from 0; -1 at padding. A query may attend only to
            keys of its own document.
    """

    ids: Int[Tensor, "b n"]
    labels: Int[Tensor, "b n"]
    document_ids: Int[Tensor, "b n"]

    @property
    def num_labels(self) -> int:
        """Number of labels that count, for losses weighted by token."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: "torch.device | str") -> "PackedBatch":
        """The same rows on another device."""
        return PackedBatch(*(t.to(device, non_blocking=True) for t in (self.ids, self.labels, self.document_ids)))


@dataclass(kw_only=True, eq=False, repr=False)
class Packing:
    """Documents and row layout, common to training and validation batches.

    Args:
        documents: documents to read.
        sequence_length: inputs in a row.
        batch_size: rows in a batch of this rank.
        eos_id: token that ends each document; None for none.
        pad_id: token that fills unused positions.
        bos_id: token that begins each document; None for none.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: a size below 1, a rank outside the world, or documents without two tokens.
    """

    documents: Documents
    sequence_length: int
    batch_size: int
    eos_id: int | None
    pad_id: int = 0
    bos_id: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "world_size"):
            check_positive(getattr(self, name), name)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        if self.documents.num_tokens < 2:
            raise ValueError(f"documents must hold at least two tokens, got {self.documents.num_tokens}")


class _Stream:
    """One pass over the documents in the order ``order``, cut into rows."""

    def __init__(self, packing: Packing, order: NDArray[np.int64]) -> None:
        self.documents = packing.documents
        self.length = packing.sequence_length
        self.pad_id = packing.pad_id
        self.order = order
        self.before = [] if packing.bos_id is None else [packing.bos_id]
        self.after = [] if packing.eos_id is None else [packing.eos_id]
        self.ends = np.cumsum(self.documents.lengths[order] + len(self.before) + len(self.after))
        self.total = int(self.ends[-1])

    @property
    def num_rows(self) -> int:
        return max(1, math.ceil((self.total - 1) / self.length))  # the last token of the stream has no label

    def row(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``length + 1`` tokens and the document index of each; only padding past the last row."""
        tokens = np.full(self.length + 1, self.pad_id, dtype=np.int64)
        owners = np.full(self.length + 1, PADDING_DOCUMENT, dtype=np.int64)
        first = number * self.length
        last = min(first + self.length + 1, self.total)
        at = first
        index = int(np.searchsorted(self.ends, first, side="right"))
        for owner in range(self.length + 1):
            if at >= last:
                break
            stop = min(last, int(self.ends[index]))
            tokens[at - first : stop - first] = self._part(index, at, stop)
            owners[at - first : stop - first] = owner
            at, index = stop, index + 1
        return tokens, owners

    def _part(self, index: int, at: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``[at, stop)`` of the stream, all in the document at ``index`` of the order."""
        document = int(self.order[index])
        length = int(self.documents.lengths[document])
        begin = int(self.ends[index]) - length - len(self.before) - len(self.after)
        low, high = at - begin - len(self.before), stop - begin - len(self.before)
        start = int(self.documents.starts[document])
        body = self.documents.ids[start + max(low, 0) : start + min(high, length)]
        return np.concatenate((self.before if low < 0 else [], body, self.after if high > length else [])).astype(
            np.int64
        )


def _batch(rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> PackedBatch:
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows]))
    owners = torch.from_numpy(np.stack([owners for _, owners in rows]))
    same_document = (owners[:, 1:] == owners[:, :-1]) & (owners[:, 1:] != PADDING_DOCUMENT)
    return PackedBatch(
        ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].masked_fill(~same_document, IGNORE_INDEX),
        document_ids=owners[:, :-1].contiguous(),
    )


@typed
@dataclass(kw_only=True, eq=False, repr=False)
class PackedBatches(Packing, Iterator[PackedBatch]):
    """Endless training batches in a shuffled order that depends on the seed and the epoch alone.

    Every epoch shuffles the documents, cuts their stream into rows and shuffles the rows. Further arguments and errors
    are those of ``Packing``.

    Args:
        seed: random seed of the shuffling.
        shuffle: False keeps the documents and rows in order.
        fingerprint_data: False leaves the data's fingerprint, which takes a pass over the data, out of the cursor.
    """

    seed: int = 0
    shuffle: bool = True
    fingerprint_data: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows_seen = 0
        self._data = int(self.documents.fingerprint[:12], 16) if self.fingerprint_data else 0
        self._streams: dict[int, _Stream] = {}
        self._order = self._shuffled(len(self.documents), "documents")
        self.rows_per_epoch = self._stream(0).num_rows
        self._rows = self._shuffled(self.rows_per_epoch, "rows")

    @property
    def epoch(self) -> float:
        """Number of passes over the documents so far, by all ranks together."""
        return self.rows_seen / self.rows_per_epoch

    def _shuffled(self, count: int, unit: str) -> EpochOrder:
        return EpochOrder(count, seed=self.seed, key=(unit,), shuffle=self.shuffle)

    def _stream(self, epoch: int) -> _Stream:
        if epoch not in self._streams:
            # a batch reaches at most into the next epoch, so older streams are not needed any more
            self._streams = {key: stream for key, stream in self._streams.items() if key >= epoch - 1}
            self._streams[epoch] = _Stream(self, self._order.epoch(epoch))
        return self._streams[epoch]

    def __next__(self) -> PackedBatch:
        first = self.rows_seen + self.rank * self.batch_size
        positions = [self._rows.at(row) for row in range(first, first + self.batch_size)]
        self.rows_seen += self.batch_size * self.world_size
        return _batch([self._stream(epoch).row(row) for epoch, row in positions])

    def state_dict(self) -> dict[str, int]:
        """The cursor, with the values that must be equal for it to refer to the same rows."""
        return {
            "rows_seen": self.rows_seen,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "sequence_length": self.sequence_length,
            "rows_per_epoch": self.rows_per_epoch,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from the cursor in ``state``.

        Raises:
            ValueError: the state belongs to other data, another seed or another sequence length.
        """
        check_same_order(state, self.state_dict(), cursor="rows_seen")
        self.rows_seen = int(state["rows_seen"])


@typed
@dataclass(kw_only=True, eq=False, repr=False)
class ValidationBatches(Packing):
    """One pass over the documents in order, cut into rows; every iteration yields the same batches.

    All ranks get equally many batches of equal shape; the last ones are filled with rows of padding, whose labels are
    all -100. Further arguments and errors are those of ``Packing``.

    Args:
        max_tokens: approximate maximum of tokens, in rows evenly distributed over the documents; None for all.
    """

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None:
            check_positive(self.max_tokens, "max_tokens")
        self._stream = _Stream(self, np.arange(len(self.documents)))
        rows = self._stream.num_rows
        wanted = rows if self.max_tokens is None else min(rows, math.ceil(self.max_tokens / self.sequence_length))
        missing = -wanted % (self.batch_size * self.world_size)
        chosen = np.pad(np.arange(wanted) * rows // wanted, (0, missing), constant_values=rows + 1)
        self._rows = chosen.reshape(-1, self.world_size, self.batch_size)

    def __len__(self) -> int:
        """Number of batches of each rank."""
        return len(self._rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        for rows in self._rows[:, self.rank].tolist():
            yield _batch([self._stream.row(row) for row in rows])


def bits_per_byte(total_nats: float, num_labels: int, documents: Documents) -> float:
    """A summed cross-entropy as bits per byte of text.

    A label counts as many bytes as a token of ``documents`` has on average; EOS counts as a token.

    Args:
        total_nats: sum of the losses of all labels, in nats.
        num_labels: number of labels in the sum.
        documents: documents of the labels.

    Raises:
        ValueError: ``num_labels`` is below 1.
    """
    check_positive(num_labels, "num_labels")
    return total_nats / math.log(2) / (num_labels * documents.num_bytes / documents.num_tokens)
