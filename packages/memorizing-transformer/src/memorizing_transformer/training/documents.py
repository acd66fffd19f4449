"""Document streams: each batch row reads one document after another, a segment at a time.

Row ``g`` of all rows (over all processes) has a queue of its own: in each epoch the documents are shuffled, and it
takes every R-th of them starting with number g, where R is the number of rows. A row's queue depends only on its number
and the seed, so two processes with half of the rows each read what one process with all rows reads. Every document is
followed by EOS, at which the model clears its memory. Labels are the next tokens; EOS has none.

Legend: b batch rows of this process, n tokens of a segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from lm_core.checks import check_positive, typed
from lm_core.data.documents import Documents
from lm_core.data.epochs import EpochOrder, check_same_order
from lm_core.data.packing import IGNORE_INDEX


@dataclass(frozen=True)
class Segment:
    """One segment of every batch row.

    Attributes:
        ids: input tokens.
        labels: the token after each; -100 at EOS and at padding.
        mask: False at padding (validation only); None where there is none.
        positions: number of tokens of its document before each input.
    """

    ids: Int[Tensor, "b n"]
    labels: Int[Tensor, "b n"]
    mask: Bool[Tensor, "b n"] | None
    positions: Int[Tensor, "b n"]

    @property
    def num_labels(self) -> int:
        """Number of labels that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


class DocumentStreams(Iterator[Segment]):
    """Endless iterator over training segments, resumable at any segment.

    Args:
        documents: token ids without separators.
        segment_length: tokens in a segment.
        batch_size: batch rows of this process.
        eos_id: token after every document.
        seed: seed of the order of the documents.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: a size below 1, or fewer documents than rows.
    """

    @typed
    def __init__(
        self,
        *,
        documents: Documents,
        segment_length: int,
        batch_size: int,
        eos_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_positive(segment_length, "segment_length")
        check_positive(batch_size, "batch_size")
        self.rows = batch_size * world_size
        if len(documents) < self.rows:
            raise ValueError(
                f"data must have a document for each of {self.rows} rows, got {len(documents)} documents; "
                f"batch_size (now {batch_size} on each of {world_size} processes) must be lower"
            )
        self.documents = documents
        self.segment_length = segment_length
        self.batch_size = batch_size
        self.eos_id = eos_id
        self._order = EpochOrder(len(documents), seed=seed, key=("documents",))
        self._numbers = range(rank * batch_size, (rank + 1) * batch_size)
        # per row: epoch, place in its queue, token in the document
        self._cursors = [[0, 0, 0] for _ in self._numbers]

    @property
    def epoch(self) -> float:
        """Approximate number of passes over the corpus so far."""
        queue = len(self.documents) / self.rows
        return float(np.mean([epoch + place / queue for epoch, place, _ in self._cursors]))

    def __next__(self) -> Segment:
        rows = np.stack([self._row(index) for index in range(self.batch_size)], axis=1)
        ids, labels, positions = torch.from_numpy(rows)
        return Segment(ids=ids, labels=labels, mask=None, positions=positions)

    def _row(self, index: int) -> NDArray[np.int64]:
        number, (epoch, place, token) = self._numbers[index], self._cursors[index]
        parts: list[NDArray[np.int64]] = []
        missing = self.segment_length
        while missing:
            queue = self._order.epoch(epoch)[number :: self.rows]
            parts.append(_read(self.documents, int(queue[place]), self.eos_id, token, missing))
            missing -= parts[-1].shape[1]
            token += parts[-1].shape[1]
            if token > self.documents.lengths[queue[place]]:
                place, token = place + 1, 0
                if place == len(queue):
                    epoch, place = epoch + 1, 0
        self._cursors[index] = [epoch, place, token]
        return np.concatenate(parts, axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Position of each row of this process, and what the order depends on."""
        return {
            "data": self.documents.fingerprint,
            "segment_length": self.segment_length,
            "rows": self.rows,
            "eos_id": self.eos_id,
            "seed": self._order.seed,
            "cursors": [list(cursor) for cursor in self._cursors],
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` unless ``state`` has the same documents, rows, segment length, EOS and seed."""
        check_same_order(state, self.state_dict(), cursor="cursors")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state``.

        Raises:
            ValueError: see ``check_state``.
        """
        self.check_state(state)
        self._cursors = [list(cursor) for cursor in state["cursors"]]


class DocumentSegments:
    """Segments of held-out documents, each document read once.

    Documents are assigned longest first, each to the row with the fewest tokens so far. Rows that end early are padded.

    Args:
        documents, segment_length, batch_size, eos_id: as for ``DocumentStreams``.
        max_documents: number of documents, evenly spaced in the corpus; None for all.
        rank: rank of this process, which takes every world_size-th document.
        world_size: number of processes.
    """

    def __init__(
        self,
        *,
        documents: Documents,
        segment_length: int,
        batch_size: int,
        eos_id: int,
        max_documents: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_positive(segment_length, "segment_length")
        check_positive(batch_size, "batch_size")
        self.documents = documents
        self.segment_length = segment_length
        self.eos_id = eos_id
        wanted = len(documents) if max_documents is None else min(max_documents, len(documents))
        chosen = (np.arange(wanted) * len(documents) // wanted)[rank::world_size]
        longest_first = sorted(chosen.tolist(), key=lambda number: -int(documents.lengths[number]))
        self.queues: list[list[int]] = [[] for _ in range(batch_size)]
        loads = [0] * batch_size
        for number in longest_first:
            row = loads.index(min(loads))
            self.queues[row].append(number)
            loads[row] += int(documents.lengths[number]) + 1
        self.segments = -(-max(loads) // segment_length)
        self.num_bytes = int(documents.byte_lengths[chosen].sum())
        self.num_tokens = int(documents.lengths[chosen].sum())

    def __len__(self) -> int:
        return self.segments

    def __iter__(self) -> Iterator[Segment]:
        if not self.segments:
            return  # more processes than documents; a split of no columns would yield one part
        size = self.segments * self.segment_length
        rows = np.zeros((3, len(self.queues), size), dtype=np.int64)
        mask = np.zeros((len(self.queues), size), dtype=bool)
        for row, queue in enumerate(self.queues):
            at = 0
            for number in queue:
                document = _read(self.documents, number, self.eos_id)
                rows[:, row, at : at + document.shape[1]] = document
                at += document.shape[1]
            mask[row, :at] = True
        rows[1][~mask] = IGNORE_INDEX
        columns = (*torch.from_numpy(rows), torch.from_numpy(mask))
        for ids, labels, positions, real in zip(*(part.split(self.segment_length, 1) for part in columns), strict=True):
            yield Segment(ids=ids, labels=labels, mask=real, positions=positions)


def _read(documents: Documents, number: int, eos_id: int, start: int = 0, most: int | None = None) -> NDArray[np.int64]:
    """Ids of a document and its EOS from ``start`` on, their labels, and the number of tokens before each."""
    text = documents[number]
    stop = len(text) + 1 if most is None else min(len(text) + 1, start + most)
    ids = np.append(text[start : stop + 1].astype(np.int64), (eos_id, IGNORE_INDEX))
    return np.stack((ids[: stop - start], ids[1 : stop - start + 1], np.arange(start, stop)))
