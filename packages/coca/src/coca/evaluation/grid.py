"""Picture of results: each image with its true and generated caption and nearest texts, drawn with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coca.data.captioned_images import CaptionedImages
from coca.evaluation.evaluation import caption_images, embed
from coca.evaluation.fonts import fonts_for
from coca.evaluation.retrieval import similarities
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing

_CELL, _MARGIN, _LINE, _FONT = 132, 12, 17, 13
_WIDTH = 2 * _CELL + 150


def draw_grid(
    path: Path,
    model: CoCa,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_length: int,
    title: str = "",
    count: int = 12,
    texts: int = 4,
) -> Path:
    """Draws the first images of ``data``, each with a true and a generated caption and the nearest captions of all.

    The nearest captions are of different classes, or of different images where classes are unknown: the best wording of
    each, so that the second line is the runner-up.

    Args:
        path: ``.png`` file to write.
        model: model that captions the images.
        data: images with captions.
        tokenizer: caption tokenizer of the training.
        preprocessing: preprocessing of the training.
        max_length: maximum number of tokens of a caption.
        title: heading of the picture.
        count: number of images.
        texts: number of nearest texts for each image.
    """
    chosen = data.select(range(min(count, len(data))))
    captions = caption_images(model, chosen, tokenizer, preprocessing, max_new_tokens=max_length)
    latents = embed(model, data, tokenizer, preprocessing, max_length=max_length)
    # the class of each caption, or its first image
    groups: dict[int, int] = {}
    for text, image in latents.matches.tolist():
        groups.setdefault(text, image if data.labels is None else data.labels[image])
    nearest = []
    for similarity in similarities(latents.images[: len(chosen)], latents.texts):
        best: dict[int, tuple[str, float]] = {}
        for index in similarity.argsort(descending=True).tolist():
            best.setdefault(groups[index], (latents.captions[index], float(similarity[index])))
            if len(best) == texts:
                break
        nearest.append(list(best.values()))
    pictures = [chosen.read(index) for index in range(len(chosen))]
    truths = [texts_of[0] for texts_of in chosen.captions]
    return save_grid(path, pictures, captions, nearest, truths=truths, title=title)


def save_grid(
    path: str | Path,
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    nearest: Sequence[Sequence[tuple[str, float]]],
    *,
    truths: Sequence[str] | None = None,
    title: str = "",
    columns: int = 3,
) -> Path:
    """Draws images in columns, each with its caption above its nearest texts.

    A font with the scripts of all texts is taken from the system; characters that none has are warned of.

    Args:
        path: ``.png`` file to write.
        images: pixels ``(c, height, width)``.
        captions: the generated caption of each image.
        nearest: texts of each image with their similarities, the most similar first.
        truths: a true caption of each image.
        title: heading of the picture.
        columns: images in a row.

    Raises:
        ValueError: the lists are empty or have different lengths.
    """
    from PIL import Image, ImageDraw

    if not images or len({len(images), len(captions), len(nearest)}) != 1:
        raise ValueError(
            f"images, captions and nearest must have the same length of at least one, got {len(images)}, "
            f"{len(captions)} and {len(nearest)}"
        )
    if truths is not None and len(truths) != len(images):
        raise ValueError(f"truths must have one caption for each of {len(images)} images, got {len(truths)}")
    # layout of the page
    shown_texts = [*captions, *(truths or ()), title, *(text for texts in nearest for text, _ in texts)]
    font, bold = fonts_for("".join(shown_texts), (_FONT, _FONT + 1))
    columns = min(columns, len(images))
    lines = max(len(texts) for texts in nearest) + (truths is not None)
    height = max(_CELL, _LINE * (3 + lines) + 24) + _MARGIN
    top = 34 if title else _MARGIN
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (_WIDTH + _MARGIN) + _MARGIN, top + rows * height + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 9), title, fill="black", font=bold)
    for index, (pixels, caption, texts) in enumerate(zip(images, captions, nearest, strict=True)):
        row, column = divmod(index, columns)
        left, upper = _MARGIN + column * (_WIDTH + _MARGIN), top + row * height
        canvas.paste(_picture(pixels), (left, upper))
        # caption and texts to the right of the image
        text_left, text_width, y = left + _CELL + 10, _WIDTH - _CELL - 10, upper
        if truths is not None:
            true_line = _wrapped(draw, f"true: {truths[index]}", font, text_width, 1)[0]
            draw.text((text_left, y), true_line, fill=(0, 110, 60), font=font)
            y += _LINE + 2
        for line in _wrapped(draw, caption or "(empty caption)", bold, text_width, 2):
            draw.text((text_left, y), line, fill=(0, 70, 160), font=bold)
            y += _LINE + 2
        y += 6
        for text, similarity in texts:
            shown = _wrapped(draw, f"{similarity:.2f}  {text}", font, text_width, 1)[0]
            draw.text((text_left, y), shown, fill=(60, 60, 60), font=font)
            y += _LINE
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, format="PNG")
    return target


def _picture(pixels: NDArray[np.uint8]) -> Any:
    from PIL import Image

    array = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    # small images keep visible pixels
    method = Image.Resampling.NEAREST if max(array.shape[:2]) < _CELL else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB").resize((_CELL, _CELL), method)


def _wrapped(draw: Any, text: str, font: Any, width: int, lines: int) -> list[str]:
    """``text`` as at most ``lines`` lines of ``width`` pixels, the last one shortened if necessary."""
    result, current = [], ""
    # control characters, which an untrained model of bytes generates, cannot be laid out
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text.replace("\n", " "))
    for word in shown.split(" "):
        longer = f"{current} {word}".strip()
        if current and draw.textlength(longer, font=font) > width:
            result.append(current)
            current = word
        else:
            current = longer
    result.append(current)
    if len(result) > lines:
        result = [*result[: lines - 1], " ".join(result[lines - 1 :])]
    last = result[-1]
    while last and draw.textlength(last, font=font) > width:
        last = last[:-2] + "…" if last.endswith("…") else last[:-1] + "…"
    return [*result[:-1], last]
