"""Built-in data set: scikit-learn's handwritten digits with captions, 1,797 real images of 8 x 8 pixels.

They come with the ``scikit-learn`` wheel, so nothing is downloaded.
"""

from functools import partial

import numpy as np

from coca.data.captioned_images import CaptionedImages, Pixels

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("the digit {}", "a handwritten {}", "a picture of the number {}", "someone wrote the number {}")
IMAGE_SIZE = 8
# Pixel statistics of the whole set, in the range [0, 1].
MEAN, STD = 0.305, 0.376


def handwritten_digits() -> CaptionedImages:
    """All digits, each with one caption for every template.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the handwritten digits need scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    # scikit-learn stores 0 to 16
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = tuple(int(label) for label in data.target)
    return CaptionedImages(
        names=tuple(f"digit {index:04d}" for index in range(len(labels))),
        captions=tuple(tuple(template.format(CLASS_NAMES[label]) for template in TEMPLATES) for label in labels),
        read=partial(_row, pixels),
        labels=labels,
        class_names=CLASS_NAMES,
        templates=TEMPLATES,
    )


def _row(pixels: Pixels, index: int) -> Pixels:
    return pixels[index]
