"""The commands for a trained model: captions, latents, classes, neighbours; and the conversion of old weights.

Each returns the exit status.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca.data.digits import handwritten_digits
from coca.data.image_files import SUFFIXES, load_images
from coca.evaluation.evaluation import decoded, evaluate
from coca.model.coca import CoCa
from coca.model.image_encoders import load_encoder
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import encode_captions
from lm_core.checkpoints.checkpoint import checkpoint_folder
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
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        images: files or folders of images.
        prefix: beginning of the captions.
        beams: above 1 searches with so many beams.
        temperature: 0 takes the most likely token each time.
        top_k: samples among the k most likely tokens.
        top_p: samples among the most likely tokens up to this probability together.
        max_new_tokens: at most.
        min_new_tokens: at least.
        seed: of the draws.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    loaded = _Loaded.from_checkpoint(checkpoint, device)
    model, tokenizer = loaded.model, loaded.tokenizer
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
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
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        output: the .npz to write.
        images: files or folders of images.
        texts: captions, instead of images.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    if bool(images) == bool(texts):
        raise ValueError("give images or texts, one of the two")
    loaded, failed = _Loaded.from_checkpoint(checkpoint, device), 0
    if texts:
        names, latents = texts, loaded.text_latents(texts)
    else:
        names, pixels, failed = _read_images(images or [], loaded.preprocessing)
        latents = loaded.image_latents(pixels)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        np.savez(stream, latents=latents.float().cpu().numpy(), names=np.array(names))
    print(f"wrote {len(names)} latents of {latents.shape[1]} features to {target}")
    return int(failed > 0)


def zero_shot(
    checkpoint: str,
    images: list[str],
    *,
    classes: list[str],
    templates: list[str] | None = None,
    top: int = 3,
    device: str = "auto",
) -> int:
    """Prints the most likely classes of each image, with their probabilities.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        images: files or folders of images.
        classes: names to choose among.
        templates: captions with one {} for a class name, as "a photo of a {}".
        top: classes to print.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    _check_top(top)
    loaded = _Loaded.from_checkpoint(checkpoint, device)
    classifier = loaded.model.zero_shot_classifier(classes, templates or ["{}"], tokenizer=loaded.tokenizer)
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
    similarity = loaded.image_latents(pixels) @ classifier.t()
    probabilities = (similarity * loaded.model.logit_scale.detach()).softmax(dim=-1)
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
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        images: files or folders of images; with captions, one source as for train (or digits).
        text: queries; the nearest images of each are printed.
        captions: measures losses, recall and classification on a source of images with captions instead.
        top: images to print for a query.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    if captions == bool(text):
        raise ValueError("give text, or captions to measure recall, one of the two")
    _check_top(top)
    if captions and len(images) != 1:
        raise ValueError(f"images must be one source with captions, got {len(images)}")
    loaded = _Loaded.from_checkpoint(checkpoint, device)
    if captions:
        data = handwritten_digits() if images == ["digits"] else load_images(images[0], loaded.preprocessing)
        for line in data.unreadable_report():
            report("unreadable", line)
        for name, value in evaluate(loaded.model, data, loaded.tokenizer, loaded.preprocessing).items():
            print(f"{name:22} {value:.3f}")
        return int(bool(data.unreadable))
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
    queries = text or []
    for query, similarity in zip(queries, loaded.text_latents(queries) @ loaded.image_latents(pixels).t(), strict=True):
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
    """Converts a weight file of CoCa-pytorch into a folder that ``CoCa.from_pretrained`` opens.

    Args:
        old: file with the state dict of a CoCa.
        directory: folder to write.
        encoder: folder of the Hugging Face vision model that the file has the weights of, if it has any.
        tokenizer: stored with the model: bytes, a folder, or organisation/name on the hub.
        pad_id: padding id that the model was trained with.
        bos_id: id that begins captions.
        eos_id: id that ends captions.
        overwrite: whether a folder with content may be written to.

    Returns:
        The exit status.
    """
    from coca.interop import load_coca_pytorch

    vision = None if encoder is None else load_encoder(encoder)
    model = load_coca_pytorch(old, img_encoder=vision, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    stored = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {model.save_pretrained(directory, overwrite=overwrite, tokenizer=stored)}")
    return 0


@dataclass(frozen=True)
class _Loaded:
    """A model with the tokenizer and the preprocessing of its checkpoint."""

    model: CoCa
    tokenizer: Any
    preprocessing: ImagePreprocessing

    @classmethod
    def from_checkpoint(cls, checkpoint: str, device: str) -> "_Loaded":
        folder, place = checkpoint_folder(checkpoint), pick_device(device)
        model = CoCa.from_pretrained(folder).to(place).eval()
        if model.preprocessing is None:
            raise ValueError(f"{folder} has no preprocess.json, so the preparation of images is not known")
        return cls(model, load_tokenizer(folder), model.preprocessing)

    @torch.no_grad()
    def image_latents(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.model.encode_image(part.to(self.model.device)) for part in pixels.split(64)])

    @torch.no_grad()
    def text_latents(self, texts: Sequence[str]) -> Tensor:
        ids = encode_captions(texts, self.tokenizer, self.model.pad_id)
        return torch.cat([self.model.encode_text(part.to(self.model.device)) for part in ids.split(256)])


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")


def _best(scores: Tensor, top: int) -> list[tuple[float, int]]:
    """The highest scores with their indices."""
    values, indices = scores.topk(min(top, len(scores)))
    return list(zip(values.tolist(), indices.tolist(), strict=True))


def _read_images(sources: Sequence[str], preprocessing: ImagePreprocessing) -> tuple[list[str], Tensor, int]:
    """Paths and tensors of the readable images; unreadable ones are named on standard error and counted."""
    from PIL import Image

    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"images must be files or folders of images, got the folder {source} without any")
            paths += inside
        elif source.is_file():
            paths.append(source)
        else:
            raise FileNotFoundError(f"images must be files or folders of images, there is no {source}")
    if not paths:
        raise ValueError("images must name at least one file, got none")
    good, tensors, failed = [], [], 0
    for path in paths:
        try:
            with Image.open(path) as picture:
                tensors.append(preprocessing(picture))
            good.append(str(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            failed += 1
            print(f"unreadable  {path}: {error}", file=sys.stderr)
    if not good:
        raise ValueError(f"none of {len(paths)} images could be read")
    if failed:
        print(f"unreadable  {failed} of {len(paths)} images", file=sys.stderr)
    return good, torch.stack(tensors), failed
