"""Batches of image-text pairs: seeded order, resumable at any batch, the same for any number of processes.

Images come in one endless sequence, a new permutation each epoch. Update k takes the next ``batch_size`` of them and
each process its shard, so several processes together see what one would. No batch holds an image twice: the contrastive
loss would take the second for a mismatch. The caption chosen for an image with several, and its random shift, depend
only on seed, epoch and image. A batch is thus a function of its position, and worker processes that prepare batches
ahead change neither the order nor a resumed run.

Legend: b pairs of this process, n sequence, c channels.
"""

import itertools
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca.data.captioned_images import CaptionedImages
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import caption_ids
from lm_core.data.epochs import EpochOrder, check_same_order, permutation, shard
from lm_core.nn.masking import right_pad
from lm_core.tokenizers import as_tokenizer


@dataclass(frozen=True)
class PairBatch:
    """Matching texts and images.

    Attributes:
        text: ids ``(b, n)``, right-padded.
        images: ``(b, c, size, size)``.
    """

    text: Int[Tensor, "b n"]
    images: Float[Tensor, "b c height width"]

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch on another device."""
        return PairBatch(self.text.to(device), self.images.to(device))

    def split(self, count: int) -> "list[PairBatch]":
        """``count`` parts whose numbers of pairs differ by one at most."""
        rows = [shard(list(range(len(self.text))), index, count) for index in range(count)]
        return [PairBatch(self.text[part], self.images[part]) for part in rows]


@dataclass(eq=False, kw_only=True, repr=False)
class PairBatches(Iterator[PairBatch]):
    """Endless iterator over training batches.

    Args:
        data: images with captions.
        tokenizer: caption tokenizer; see ``lm_core.tokenizers``.
        preprocessing: normalisation of the pixels.
        batch_size: pairs of an update, over all processes together.
        pad_id: padding id of the texts.
        max_length: tokens at which captions are cut.
        shift: largest random shift of an image in pixels, in each direction; its border is repeated.
        seed: seed of order, captions and shifts.
        rank: rank of this process.
        world_size: number of processes.
        workers: processes that decode images and prepare batches ahead; 0 prepares each batch when it is asked for.

    Raises:
        ValueError: ``batch_size`` exceeds the number of images, or is less than the number of processes; ``workers`` is
            negative.
    """

    data: CaptionedImages
    tokenizer: Any
    preprocessing: ImagePreprocessing
    batch_size: int
    pad_id: int
    max_length: int | None = None
    shift: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    position: int = field(default=0, init=False)
    _prepared: Iterator[PairBatch] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        images, size = len(self.data), self.batch_size
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if size > images:
            raise ValueError(f"batch_size must be at most the number of images, {images}, got {size}")
        if size < self.world_size:
            raise ValueError(f"batch_size must be at least the number of processes, {self.world_size}, got {size}")
        self.tokenizer = as_tokenizer(self.tokenizer)
        self.order = DistinctBatches(images, batch_size=size, seed=self.seed)

    @property
    def epoch(self) -> float:
        """Passes over the whole set so far, with fractions."""
        return self.position / len(self.data)

    def __next__(self) -> PairBatch:
        if self.workers == 0:
            batch = self.at(self.position)
        else:
            if self._prepared is None:
                self._prepared = iter(self._loader())
            batch = next(self._prepared)
        self.position += self.batch_size
        return batch

    def at(self, first: int) -> PairBatch:
        """This process's share of the batch that begins at position ``first`` of the sequence."""
        rows, pixels = [], []
        positions = list(range(first, first + self.batch_size))
        for position in shard(positions, self.rank, self.world_size):
            epoch, index = self.order.at(position)
            draw = np.random.default_rng([self.seed, epoch, index])
            captions = self.data.captions[index]
            caption = captions[int(draw.integers(len(captions)))]
            rows.append(torch.tensor(caption_ids(caption, self.tokenizer, self.max_length)))
            pixels.append(shifted(self.data.read(index), draw, self.shift))
        return PairBatch(right_pad(rows, self.pad_id)[0], self.preprocessing.normalised(np.stack(pixels)))

    def close(self) -> None:
        """Ends the worker processes; the next batch starts new ones."""
        self._prepared = None

    def _loader(self) -> DataLoader[PairBatch]:
        return DataLoader(
            _BatchesAt(replace(self, workers=0)),
            batch_size=None,
            sampler=itertools.count(self.position, self.batch_size),
            num_workers=self.workers,
            prefetch_factor=2,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # the global one would be drawn from, and differ in a resumed run
        )

    def state_dict(self) -> dict[str, int]:
        """Position in the sequence, and what it depends on."""
        return {"position": self.position, "seed": self.seed, "image_fingerprint": self.data.fingerprint}

    def check_state(self, state: Mapping[str, int]) -> None:
        """Raises ``ValueError`` if ``state`` belongs to other images, captions or another seed."""
        check_same_order(state, self.state_dict(), cursor="position")

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where ``state`` was taken; see ``check_state``."""
        self.check_state(state)
        self.position = int(state["position"])
        self.close()


class _BatchesAt(Dataset[PairBatch]):
    """Batches by position."""

    def __init__(self, batches: PairBatches) -> None:
        self.batches = batches

    def __getitem__(self, position: int) -> PairBatch:
        return self.batches.at(position)


def _ignore_interrupts(_: int) -> None:
    """Leaves Ctrl-C, which reaches all processes of a terminal, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class DistinctBatches(EpochOrder):
    """Permutations whose consecutive batches never hold an example twice, not even where one epoch meets the next.

    The batch that holds the end of an epoch takes the beginning of the next from the examples it does not have yet; the
    rest of that epoch keeps its order.

    Args:
        count: number of examples, at least ``batch_size``.
        batch_size: examples of a batch.
        seed: seed of the permutations.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        super().__init__(count, seed=seed)
        self.batch_size = batch_size

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Indices in the order of one epoch."""
        # an epoch depends on the end of the one before, back to one at whose start a batch starts
        first = number
        while first not in self._epochs and self._shared(first):
            first -= 1
        for current in range(first, number + 1):
            if current not in self._epochs:
                before = self._epochs.get(current - 1)
                self._epochs = {} if before is None else {current - 1: before}
                self._epochs[current] = self._permutation(current, before)
        return self._epochs[number]

    def _shared(self, number: int) -> int:
        """Examples that the epoch adds to the batch which began in the epoch before."""
        return -number * self.count % self.batch_size

    def _permutation(self, number: int, before: NDArray[np.int64] | None) -> NDArray[np.int64]:
        order, shared = permutation(self.count, self.seed, number), self._shared(number)
        if before is None or not shared:
            return order
        begun = before[shared - self.batch_size :]
        is_first = ~np.isin(order, begun)
        is_first &= is_first.cumsum() <= shared
        return np.concatenate((order[is_first], order[~is_first]))


def shifted(pixels: NDArray[np.uint8], draw: np.random.Generator, shift: int) -> NDArray[np.uint8]:
    """An image moved by up to ``shift`` pixels each way, its border repeated."""
    if shift == 0:
        return pixels
    down, right = (int(value) for value in draw.integers(0, 2 * shift + 1, size=2))
    wide = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
    return wide[:, down : down + pixels.shape[1], right : right + pixels.shape[2]]
