"""Commands for a trained model (``caption``, ``embed``, ``zero-shot``, ``retrieve``), and ``convert`` for old weights.

Each returns the exit status: 0, or 1 if an image could not be read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca.data.digits import handwritten_digits
from coca.data.image_files import SUFFIXES, load_images, read_pixels
from coca.evaluation.evaluation import decoded, evaluate, image_latents, text_latents
from coca.interop import load_coca_pytorch
from coca.model.coca import CoCa
from coca.model.image_encoders import load_encoder
from coca.model.preprocessing import ImagePreprocessing
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import check_positive
from lm_core.cli.main import report
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device


def caption(
    checkpoint: str,
    images: list[str],
    *,
    prefix: str | None = None,
    beams: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints a caption for each image.

    Args:
        images: files or folders of images.
        prefix: text that every caption begins with.
        beams: width of the beam search; 1 for greedy decoding or sampling.
        temperature: sampling temperature; 0 takes the most likely token each time.
        top_k: samples among the k most likely tokens only.
        top_p: samples among the most likely tokens of this total probability only.
        max_new_tokens: maximum number of generated tokens.
        min_new_tokens: minimum number of generated tokens.
        seed: seed of the sampling.
    """
    model, tokenizer, preprocessing = _load(checkpoint, device)
    paths, pixels, failed = _read_images(images, preprocessing)
    # the prefix as in training: after BOS, without EOS
    ids = None
    if prefix is not None:
        bos = getattr(tokenizer, "bos_id", None)
        ids = torch.tensor([*([] if bos is None else [bos]), *tokenizer.encode(prefix)])
    generator = torch.Generator(model.device).manual_seed(seed)
    for start in range(0, len(paths), 32):
        tokens = model.generate(
            pixels[start : start + 32].to(model.device),
            prefix=ids,
            beams=beams,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            generator=generator,
        )
        for path, row in zip(paths[start : start + 32], tokens.tolist(), strict=True):
            print(f"{path}\t{prefix or ''}{decoded(row, tokenizer, model.eos_id)}")
    return int(failed > 0)


def embed(
    checkpoint: str,
    output: str,
    *,
    images: list[str] | None = None,
    texts: list[str] | None = None,
    device: str = "auto",
) -> int:
    """Writes L2-normalised latents of images or texts to a .npz: arrays "latents" and "names".

    Args:
        output: .npz file to write.
        images: files or folders of images.
        texts: captions to embed instead of images.
    """
    if bool(images) == bool(texts):
        raise ValueError("give images or texts, one of the two")
    model, tokenizer, preprocessing = _load(checkpoint, device)
    if texts:
        names, failed, latents = texts, 0, text_latents(model, texts, tokenizer)
    else:
        names, pixels, failed = _read_images(images or [], preprocessing)
        latents = image_latents(model, pixels.split(64))
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        np.savez(stream, latents=latents.cpu().numpy(), names=np.array(names))
    print(f"wrote {len(names)} latents of {latents.shape[1]} features to {target}")
    return int(failed > 0)


def zero_shot(
    checkpoint: str,
    images: list[str],
    *,
    classes: list[str],
    templates: Sequence[str] | None = None,
    top: int = 3,
    device: str = "auto",
) -> int:
    """Prints the most likely classes of each image, with their probabilities.

    Args:
        images: files or folders of images.
        classes: class names to choose among.
        templates: captions with one {} for a class name, as "a photo of a {}".
        top: number of classes to print for an image.
    """
    check_positive(top, "top")
    model, tokenizer, preprocessing = _load(checkpoint, device)
    classifier = model.zero_shot_classifier(classes, templates or ["{}"], tokenizer=tokenizer)
    paths, pixels, failed = _read_images(images, preprocessing)
    similarity = image_latents(model, pixels.split(64)) @ classifier.float().t()
    probabilities = (similarity * model.logit_scale.detach()).softmax(dim=-1)
    for path, row in zip(paths, probabilities, strict=True):
        print("\t".join([path, *(f"{classes[index]} {value:.3f}" for value, index in _best(row, top))]))
    return int(failed > 0)


def retrieve(
    checkpoint: str,
    images: list[str],
    *,
    text: list[str] | None = None,
    captions: bool = False,
    top: int = 5,
    device: str = "auto",
) -> int:
    """Finds images by text, or measures recall on images with captions.

    Args:
        images: files or folders of images; with --captions one source that coca train reads (or digits).
        text: queries for which the nearest images are printed.
        captions: measures losses, recall and classification on images with captions instead.
        top: number of images to print for a query.
    """
    if captions == bool(text):
        raise ValueError("give text, or captions to measure recall, one of the two")
    check_positive(top, "top")
    if captions and len(images) != 1:
        raise ValueError(f"images must be one source with captions, got {len(images)}")
    model, tokenizer, preprocessing = _load(checkpoint, device)
    if captions:
        data = handwritten_digits() if images == ["digits"] else load_images(images[0], preprocessing)
        for line in data.unreadable_report():
            report("unreadable", line)
        for name, value in evaluate(model, data, tokenizer, preprocessing).items():
            print(f"{name:22} {value:.3f}")
        return int(bool(data.unreadable))
    paths, pixels, failed = _read_images(images, preprocessing)
    queries = text or []
    similarities = text_latents(model, queries, tokenizer) @ image_latents(model, pixels.split(64)).t()
    for query, similarity in zip(queries, similarities, strict=True):
        print(query)
        for value, index in _best(similarity, top):
            print(f"  {value:.3f}\t{paths[index]}")
    return int(failed > 0)


def convert(
    old: str,
    directory: str,
    *,
    encoder: str | None = None,
    tokenizer: str | None = None,
    pad_id: int = 0,
    bos_id: int | None = None,
    eos_id: int | None = None,
    overwrite: bool = False,
) -> int:
    """Converts a weight file of CoCa-pytorch to a checkpoint folder.

    Args:
        old: file with the state dict of CoCa-pytorch's CoCa.
        directory: folder to write.
        encoder: folder of the Hugging Face vision model whose weights the file contains, if it contains any.
        tokenizer: tokenizer to store with the model: bytes, a folder, or organisation/name on the hub.
        pad_id: padding id that the model was trained with.
        bos_id: id of the token that begins captions.
        eos_id: id of the token that ends captions.
        overwrite: allows writing to a folder with content.
    """
    vision = None if encoder is None else load_encoder(encoder)
    model = load_coca_pytorch(old, img_encoder=vision, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    stored = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {model.save_pretrained(directory, overwrite=overwrite, tokenizer=stored)}")
    return 0


def _load(checkpoint: str, device: str) -> tuple[CoCa, Any, ImagePreprocessing]:
    """Model, tokenizer and preprocessing of a checkpoint."""
    folder = checkpoint_folder(checkpoint)
    model = CoCa.from_pretrained(folder).to(pick_device(device)).eval()
    if model.preprocessing is None:
        raise ValueError(f"{folder} has no preprocess.json, so the preparation of images is not known")
    return model, load_tokenizer(folder), model.preprocessing


def _best(scores: Tensor, top: int) -> list[tuple[float, int]]:
    """The highest scores with their indices."""
    values, indices = scores.topk(min(top, len(scores)))
    return list(zip(values.tolist(), indices.tolist(), strict=True))


def _read_images(sources: Sequence[str], preprocessing: ImagePreprocessing) -> tuple[list[str], Tensor, int]:
    """Paths and tensors of the readable images; unreadable ones are named on standard error and counted."""
    paths: list[Path] = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"images must be files or folders of images, there is no {source}")
        inside = source.rglob("*") if source.is_dir() else [source]
        chosen = sorted(path for path in inside if path == source or path.suffix.lower() in SUFFIXES)
        if not chosen:
            raise ValueError(f"images must be files or folders of images, got the folder {source} without any")
        paths += chosen
    if not paths:
        raise ValueError("images must name at least one file, got none")
    good, pixels = [], []
    for path in paths:
        try:
            pixels.append(read_pixels(path.read_bytes, preprocessing))
            good.append(str(path))
        except (OSError, ValueError) as error:
            print(f"unreadable  {path}: {error}", file=sys.stderr)
    if not good:
        raise ValueError(f"none of {len(paths)} images could be read")
    failed = len(paths) - len(good)
    if failed:
        print(f"unreadable  {failed} of {len(paths)} images", file=sys.stderr)
    return good, preprocessing.normalised(np.stack(pixels)), failed
