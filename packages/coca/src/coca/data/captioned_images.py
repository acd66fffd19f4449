"""Data sets of images with captions, for training and evaluation.

Images are decoded on access, from files, members of a tar, or memory. Those that cannot be decoded are found when the
set is opened, listed by name in ``unreadable``, and never silently dropped. ``coca.data.image_files`` reads folders,
tables and tars, ``coca.data.digits`` the built-in digits.

Legend: c channels.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with one or more captions.

    Attributes:
        names: image names, for errors and pictures.
        captions: captions of each image, at least one.
        read: ``read(i)`` returns the pixels of image i, ``(c, size, size)``. Worker processes that are not forked (on
            macOS and Windows) need one that pickles.
        labels: class index of each image, or None where classes are unknown.
        class_names: class name of each index.
        templates: captions with one ``{}`` for a class name, for zero-shot classification.
        unreadable: "name: reason" of each image that could not be decoded; none of them is in ``names``.
        checksums: checksum of each image's pixels, by which a resumed run recognises its data; empty if unknown.

    Raises:
        ValueError: there is no image, an image has no caption, or lengths or labels do not fit.
    """

    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    read: Callable[[int], Pixels]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = field(default=(), compare=False)
    checksums: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            failed = self.unreadable
            more = f"; {len(failed)} could not be read, the first: {failed[0]}" if failed else ""
            raise ValueError(f"there must be at least one image, got none{more}")
        for what, values in (("captions", self.captions), ("labels", self.labels)):
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"{what} must be given for each of {len(self.names)} images, got {len(values)}")
        for name, captions in zip(self.names, self.captions, strict=True):
            if not captions or not all(caption.strip() for caption in captions):
                raise ValueError(f"each image must have captions that are not empty, got {list(captions)} for {name}")
        wrong = sorted({label for label in self.labels or () if not 0 <= label < len(self.class_names)})
        if wrong:
            raise ValueError(f"labels must be in [0, {len(self.class_names)}), the class names, got {wrong[:8]}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> int:
        """Checksum of names, order and captions, and of the pixels where theirs are known."""
        parts = (self.names, self.captions, *([self.checksums] if self.checksums else []))
        return zlib.crc32(repr(parts).encode("utf-8", errors="surrogatepass"))

    def unreadable_report(self) -> list[str]:
        """Lines that name the first 20 unreadable images with their reasons and count all of them."""
        if not self.unreadable:
            return []
        count = len(self.unreadable)
        return [*self.unreadable[:20], f"{count} of {count + len(self)} images, all named in run.json"]

    def select(self, indices: Sequence[int]) -> "CaptionedImages":
        """The images with these indices, in this order."""
        kept = [int(index) for index in indices]
        return replace(
            self,
            names=tuple(self.names[index] for index in kept),
            captions=tuple(self.captions[index] for index in kept),
            read=_Selected(self.read, tuple(kept)),
            labels=None if self.labels is None else tuple(self.labels[index] for index in kept),
            checksums=tuple(self.checksums[index] for index in kept) if self.checksums else (),
        )

    def split(self, validation_fraction: float, seed: int = 0) -> "tuple[CaptionedImages, CaptionedImages]":
        """Images to train on and images held out, drawn by ``seed``.

        Args:
            validation_fraction: fraction of the images to hold out, at least one image.
            seed: seed of the draw.

        Raises:
            ValueError: ``validation_fraction`` is not in (0, 1), or there are fewer than two images.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
        if len(self) < 2:
            raise ValueError("a split needs at least two images, got one")
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        count = min(len(self) - 1, max(1, round(validation_fraction * len(self))))
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


@dataclass(frozen=True)
class _Selected:
    """``read`` of a selection; unlike a closure it can be sent to worker processes."""

    read: Callable[[int], Pixels]
    indices: tuple[int, ...]

    def __call__(self, position: int) -> Pixels:
        return self.read(self.indices[position])
