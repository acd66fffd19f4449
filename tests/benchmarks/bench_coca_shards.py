"""100,000 generated images of 64 x 64 pixels in shards: batches a second with workers, and the memory of each command.

A training loader is timed alone, without a model, since a small model would hide it. Memory is the peak of the process
above that of the loaded model, and of its workers together, before and after the measured batches.
"""

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, in_own_process, report
from PIL import Image

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.cli import main as coca
from coca.data.image_files import load_images
from coca.data.pair_batches import PairBatches
from lm_core.tokenizers import ByteTokenizer

SIZE, SHARD, BATCH = 64, 10_000, 64
TOKENIZER = ByteTokenizer()
PREPROCESSING = ImagePreprocessing(image_size=SIZE)


def write_shards(folder: Path, count: int) -> None:
    """JPEGs of random colours and gradients, each with a caption that names its number."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 1, SIZE)[None, :, None]
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"shard-{first // SHARD:03}.tar", "w") as archive:
            for index in range(first, min(first + SHARD, count)):
                left, right = generator.integers(0, 256, (2, 1, 1, 3))
                pixels = np.broadcast_to(left + (right - left) * ramp, (SIZE, SIZE, 3)).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, format="JPEG")
                for suffix, content in ((".jpg", stream.getvalue()), (".txt", f"picture {index % 977}".encode())):
                    entry = tarfile.TarInfo(f"{index:07}{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def save_model(folder: Path) -> None:
    vit = VisionTransformer(image_size=SIZE, patch_size=16, dim=64, depth=1, dim_head=16, heads=4)
    sizes = {"dim": 64, "unimodal_depth": 1, "multimodal_depth": 1, "num_img_queries": 4, "dim_head": 16, "heads": 4}
    ids = {"pad_id": TOKENIZER.pad_id, "bos_id": TOKENIZER.bos_id, "eos_id": TOKENIZER.eos_id}
    model = CoCa(num_tokens=TOKENIZER.vocab_size, img_encoder=vit, **sizes, **ids)
    model.preprocessing = PREPROCESSING
    model.save_pretrained(folder, tokenizer=TOKENIZER)


def resident(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def with_workers() -> float:
    """Memory of this process and its children in MB; shared pages count for each."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("utf-8").split()
    return resident() + sum(resident(child) for child in children)


def load(source: str, workers: int, batches: int) -> dict[str, Any]:
    started = time.monotonic()
    data = load_images(source, PREPROCESSING)
    opened = time.monotonic() - started
    pairs = PairBatches(
        data=data, tokenizer=TOKENIZER, preprocessing=PREPROCESSING, batch_size=BATCH, pad_id=TOKENIZER.pad_id,
        workers=workers,
    )  # fmt: skip
    for _ in range(20):
        next(pairs)
    before, started = with_workers(), time.monotonic()
    for _ in range(batches):
        next(pairs)
    seconds = time.monotonic() - started
    after = with_workers()
    pairs.close()
    return {
        "what": f"training batches, {workers} workers",
        "images/s": round(batches * BATCH / seconds),
        "opening, s": round(opened, 1),
        "MB before": round(before),
        "MB after": round(after),
    }


def command(name: str, model: str, source: str) -> dict[str, Any]:
    arguments_of = {
        "caption": [model, source, "--max_new_tokens", "4"],
        "embed": [model, os.devnull if name != "embed" else str(Path(model) / "latents.npz"), "--images", source],
        "zero-shot": [model, source, "--classes", "red", "blue", "green"],
        "retrieve": [model, source, "--text", "a picture"],
        "retrieve --captions": [model, source, "--captions"],
    }
    CoCa.from_pretrained(model)
    before, started = resident(), time.monotonic()
    with Path(os.devnull).open("w", encoding="utf-8") as sink, redirect_stdout(sink):
        status = coca([name.split()[0], *arguments_of[name]])
    assert status == 0
    growth = resident(field="VmHWM") - before
    return {"what": f"coca {name}", "seconds": round(time.monotonic() - started), "MB above the model": round(growth)}


def main() -> None:
    options = arguments(
        __doc__ or "",
        images={"type": int, "default": 100_000, "help": "number of images"},
        batches={"type": int, "default": 300, "help": f"batches of {BATCH} to time"},
    )
    if options.measure:
        kind, *rest = options.measure
        print(json.dumps(load(rest[0], int(rest[1]), int(rest[2])) if kind == "load" else command(kind, *rest)))
        return
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, options.images)
        save_model(folder / "model")
        source = f"{folder}/shard-{{000..{(options.images - 1) // SHARD:03}}}.tar"
        loads = [in_own_process(__file__, "load", source, workers, options.batches) for workers in (0, 1, 2)]
        report(f"{options.images:,} images of {SIZE} x {SIZE} in shards of {SHARD:,}", loads, options.json)
        names = ("caption", "embed", "zero-shot", "retrieve", "retrieve --captions")
        rows = [in_own_process(__file__, kind, folder / "model", source) for kind in names]
        report("Commands over all images", rows, options.json)


if __name__ == "__main__":
    main()
