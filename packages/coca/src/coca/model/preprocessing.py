"""Image preprocessing: resizing, cropping, channels and normalisation, stored with every checkpoint.

Legend: c channels.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lm_core.checkpoints.manifest import FORMAT_VERSION, check_format, read_json, write_json
from lm_core.checks import check_positive

PREPROCESS_FILE = "preprocess.json"
_LARGEST = 8192
# EXIF orientation to the name of the ``PIL.Image.Transpose`` that makes a picture upright; 1 is upright.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """Resizes the shorter side, crops the centre, and normalises.

    Args:
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: mean of each channel, subtracted from values in [0, 1].
        std: standard deviation of each channel, by which the difference is divided.

    Raises:
        ValueError: a size or standard deviation is not positive, or the number of channels does not fit.
        TypeError: a size or the number of channels is no integer.
    """

    image_size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name in ("image_size", "channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        check_positive(self.image_size, "image_size")
        if self.image_size > _LARGEST:  # a file from elsewhere may name any size
            raise ValueError(f"image_size must be at most {_LARGEST}, got {self.image_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must have 1 or {self.channels} finite values, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @classmethod
    def from_hugging_face(cls, source: str, *, image_size: int = 0, channels: int = 0) -> "ImagePreprocessing":
        """Preprocessing with mean, deviation and size of a vision model's ``preprocessor_config.json``.

        Args:
            source: folder or ``organisation/name``.
            image_size: height and width in pixels; 0 takes the model's own, or 224 where there is none.
            channels: number of channels; 0 takes 3.

        Raises:
            ImportError: transformers is not installed.
            ValueError: the file exists but cannot be read.
        """
        try:
            from transformers.utils import cached_file
        except ImportError as error:
            raise ImportError(f"the encoder {source} needs transformers: pip install transformers") from error
        try:
            path = cached_file(source, "preprocessor_config.json")
        except OSError:  # an encoder without it
            path = None
        try:
            content: dict[str, Any] = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
            size = content.get("crop_size") or content.get("size") or {}
            if not isinstance(size, int):
                size = int(size.get("height") or size.get("shortest_edge") or 224)
            mean, std = (tuple(map(float, content.get(f"image_{key}") or (0.5,))) for key in ("mean", "std"))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an image preprocessing file: {error}") from error
        return cls(image_size=image_size or size, channels=channels or 3, mean=mean, std=std)

    def pixels(self, picture: Any) -> NDArray[np.uint8]:
        """Pixels ``(c, size, size)`` of a ``PIL.Image``, upright, resized (bicubic, antialiased) and cropped.

        The orientation in a photo's metadata is applied. Transparent parts become white.

        Raises:
            ValueError: the values of a picture of more than eight bits have an unknown range.
        """
        from PIL import Image

        picture.load()  # some formats have their metadata after the pixels
        orientation = _orientation(picture)
        if picture.mode == "F" or picture.mode.startswith("I"):
            picture = Image.fromarray(_eight_bits(picture))
        if orientation in _UPRIGHT:
            picture = picture.transpose(Image.Transpose[_UPRIGHT[orientation]])
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(background, picture)
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        size, (width, height) = self.image_size, picture.size
        if (width, height) != (size, size):
            scale = size / min(width, height)
            wide, high = max(size, round(width * scale)), max(size, round(height * scale))
            left, top = (wide - size) // 2, (high - size) // 2
            # resizes only what the crop keeps: a picture of 1 x 4,000 pixels would grow to size x 4,000 * size
            across, down = width / wide, height / high
            box = (left * across, top * down, (left + size) * across, (top + size) * down)
            picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
        array = np.array(picture, dtype=np.uint8)  # a writable copy for torch
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def normalised(self, pixels: NDArray[np.uint8]) -> Float[Tensor, "*b c height width"]:
        """Pixels as normalised floats, an encoder's input."""
        values = torch.from_numpy(pixels).float() / 255
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return (values - mean) / std

    def __call__(self, picture: Any) -> Float[Tensor, "c height width"]:
        """A ``PIL.Image`` as an encoder's input."""
        return self.normalised(self.pixels(picture))

    def save(self, directory: str | Path) -> None:
        """Writes ``preprocess.json``."""
        write_json(Path(directory) / PREPROCESS_FILE, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load_if_present(cls, directory: str | Path) -> "ImagePreprocessing | None":
        """Reads ``preprocess.json``; None if there is no such file.

        Raises:
            ValueError: the file is damaged or of a later format.
        """
        path = Path(directory) / PREPROCESS_FILE
        if not path.is_file():
            return None
        try:
            content = read_json(path)
            check_format(content.pop("format_version"), path)
            mean, std = (tuple(float(value) for value in content.pop(name)) for name in ("mean", "std"))
            return cls(mean=mean, std=std, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an image preprocessing file: {error}") from error


def _orientation(picture: Any) -> Any:
    """The orientation in a picture's EXIF or XMP metadata; None without one that can be read."""
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # Pillow's parsers raise many kinds for damaged metadata; the pixels are whole
        return None


def _eight_bits(picture: Any) -> NDArray[np.uint8]:
    """Values of more than eight bits, scaled to 0 to 255; Pillow would clip them at 255.

    A picture of 16 bits has the range that its file declares (TIFF's MaxSampleValue or BitsPerSample), or that of its
    type. In one of 32 bits (integers or floats) the largest value decides: values up to 1 are scaled by 255, those up
    to 255 stay, and those up to 65,535 are taken as 16 bits.

    Raises:
        ValueError: the values do not show their range: up to 2 to 15, above 65,535, negative, or not finite.
    """
    values = np.asarray(picture).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16") or picture.format == "PNG":
        top = _declared_top(picture)
        if 0 < most < 4096 and top == 65535:
            warnings.warn(
                "16-bit pictures with values below 4,096 only are read as dark ones; scale data of 12 bits beforehand",
                stacklevel=2,
            )
    elif least >= -0.01 and most <= 1.01:  # with the errors of arithmetic
        top = 1
    elif least < 0 or not 16 <= most <= 65535:  # also for NaN
        raise ValueError(
            f"a picture of mode {picture.mode} must have values of a known range, got {least:g} to {most:g}"
        )
    else:
        top = 255 if most <= 255 else 65535
    return (values * (255 / top)).round().clip(0, 255).astype(np.uint8)


def _declared_top(picture: Any) -> int:
    """The largest value of a 16-bit picture according to its TIFF tags, or 65,535."""
    tags = getattr(picture, "tag_v2", {})
    (top,) = np.atleast_1d(tags.get(281, 0))[:1]  # MaxSampleValue
    (bits,) = np.atleast_1d(tags.get(258, 16))[:1]  # BitsPerSample
    if 255 < top <= 65535:
        return int(top)
    return int(2**bits - 1) if 8 < bits < 16 else 65535
