"""A harder real set: glyphs of the DejaVu fonts and their Unicode names, each name unique.

Sans, Serif and Sans Mono draw the same characters, so a held-out PAIR is a glyph in a font in which the model has not
seen it (its name it has read beside another drawing), and a held-out NAME is a character it has never seen in any font.
Recall is among all held-out pairs; chance is 1 / their number.
"""

import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, report

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.data.captioned_images import CaptionedImages
from coca.evaluation.evaluation import caption_images, evaluate
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.tokenizers import ByteTokenizer

SIZE, FONTS = 24, ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")


def glyphs(first: int, last: int) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The (name, font) and the picture of every character between two code points that all fonts draw."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    paths = [Path(get_data_path()) / "fonts" / "ttf" / name for name in FONTS]
    drawn = set.intersection(*(set(FT2Font(str(path)).get_charmap()) for path in paths))
    fonts = [ImageFont.truetype(str(path), 17) for path in paths]
    keys, pictures = [], []
    for point in sorted(code for code in drawn if first <= code < last):
        name = unicodedata.name(chr(point), "")
        if not name or unicodedata.category(chr(point))[0] not in "LNSP":
            continue
        for number, font in enumerate(fonts):
            canvas = Image.new("L", (SIZE, SIZE), 0)
            ImageDraw.Draw(canvas).text((SIZE / 2, SIZE / 2), chr(point), fill=255, font=font, anchor="mm")
            keys.append((name.lower(), number))
            pictures.append(np.array(canvas)[None])
    return keys, np.stack(pictures)


def subset(keys: list[tuple[str, int]], pictures: np.ndarray, chosen: Any) -> CaptionedImages:
    numbers = [number for number, key in enumerate(keys) if chosen(key)]
    return CaptionedImages(
        names=tuple(f"{keys[number][0]}, {FONTS[keys[number][1]]}" for number in numbers),
        captions=tuple((keys[number][0],) for number in numbers),
        read=lambda place: pictures[numbers[place]],
    )


parsed = arguments(
    __doc__ or "",
    steps={"type": int, "default": 700, "help": "updates"},
    batch={"type": int, "default": 64, "help": "pairs an update"},
    last={"type": int, "default": 0x530, "help": "code point before which characters are taken"},
    seed={"type": int, "default": 0, "help": "of weights, order and split"},
)
torch.set_num_threads(parsed.threads[0])
keys, pictures = glyphs(0x21, parsed.last)
names = sorted({name for name, _ in keys})
draw = np.random.default_rng(parsed.seed)
new_names = set(draw.choice(names, len(names) // 10, replace=False).tolist())
others = [name for name in names if name not in new_names]
other_font = {name: int(draw.integers(3)) for name in draw.choice(others, len(others) // 4, replace=False).tolist()}
train = subset(keys, pictures, lambda key: key[0] not in new_names and other_font.get(key[0]) != key[1])
held_out = {
    "a known name in a new drawing": subset(keys, pictures, lambda key: other_font.get(key[0]) == key[1]),
    "a new character with its name": subset(keys, pictures, lambda key: key[0] in new_names and key[1] == 0),
}
tokenizer, preprocessing = ByteTokenizer(), ImagePreprocessing(image_size=SIZE, channels=1, mean=(0.1,), std=(0.3,))
torch.manual_seed(parsed.seed)
vit = VisionTransformer(image_size=SIZE, patch_size=4, channels=1, dim=96, depth=3, dim_head=24, heads=4)
model = CoCa(
    dim=96, num_tokens=259, unimodal_depth=2, multimodal_depth=1, num_img_queries=16, dim_head=24, heads=4,
    img_encoder=vit, pad_id=258, bos_id=256, eos_id=257,
)  # fmt: skip
settings = TrainingSettings(
    max_steps=parsed.steps, batch_size=parsed.batch, max_length=48, shift=2, learning_rate=2e-3, seed=parsed.seed,
    validate_every=parsed.steps, device="cpu",
)  # fmt: skip
rows = []
with tempfile.TemporaryDirectory() as folder:
    started = time.perf_counter()
    CoCaTrainer(
        model=model,
        data=train,
        validation_data=held_out["a known name in a new drawing"],
        preprocessing=preprocessing,
        checkpoint_dir=folder,
        settings=settings,
    ).train()
    seconds = time.perf_counter() - started
for what, data in held_out.items():
    found = evaluate(model, data, tokenizer, preprocessing, max_length=48)
    captions = caption_images(model, data, tokenizer, preprocessing)
    exact = sum(caption == own[0] for caption, own in zip(captions, data.captions, strict=True)) / len(data)
    rows.append(
        {
            "held out": what,
            "pairs": len(data),
            "image to text R@1": found["image_to_text_r@1"],
            "R@5": found["image_to_text_r@5"],
            "text to image R@1": found["text_to_image_r@1"],
            "R@5 ": found["text_to_image_r@5"],
            "caption is the name": exact,
            "updates": parsed.steps,
            "training, s": seconds,
        }
    )
report(f"CoCa on glyphs and their names, {len(train)} pairs to learn from", rows, parsed.json)
