"""What a trained model is asked on the command line: captions, latents, classes, neighbours; and old weights converted.

Each command is a typed function, from whose signature and docstring its flags and their help are made.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coca.cli.model_settings import load_encoder
from coca.data.captioned_images import CaptionedImages
from coca.data.digits import handwritten_digits
from coca.data.image_files import SUFFIXES, load_images
from coca.evaluation.evaluation import decoded, evaluate
from coca.evaluation.zero_shot import zero_shot_classifier
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import encode_captions
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.generation.decoding import eval_mode
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device


def caption(
    checkpoint: str,
    images: str | list[str],
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
        images: a file or a folder of images, or a list of them, as [a.png, b.png].
        prefix: how captions begin.
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
    loaded = _load(checkpoint, device)
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
    ids = None
    if prefix is not None:
        bos = getattr(loaded.tokenizer, "bos_id", None)
        ids = torch.tensor([*([] if bos is None else [bos]), *loaded.tokenizer.encode(prefix)])
    generator = torch.Generator(loaded.model.device).manual_seed(seed)
    for start in range(0, len(paths), 32):
        tokens = loaded.model.generate(
            pixels[start : start + 32].to(loaded.model.device),
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
            print(f"{path}\t{prefix or ''}{decoded(row, loaded.tokenizer, loaded.model.eos_id)}")
    return int(failed > 0)


def embed_command(
    checkpoint: str,
    output: str,
    *,
    images: str | list[str] | None = None,
    texts: list[str] | None = None,
    device: str = "auto",
) -> int:
    """Writes L2-normalised latents of images or texts to a .npz: arrays "latents" and "names".

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        output: the .npz to write.
        images: a file or a folder of images, or a list of them, as [a.png, b.png].
        texts: captions; one of the two is given.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    if bool(images) == bool(texts):
        raise ValueError("give images or texts, one of the two")
    loaded, failed = _load(checkpoint, device), 0
    model = loaded.model
    with torch.no_grad(), eval_mode(model):
        if texts:
            names: list[str] = texts
            ids = encode_captions(texts, loaded.tokenizer, model.pad_id)
            latents = [model.encode_text(part.to(model.device)) for part in ids.split(256)]
        else:
            names, pixels, failed = _read_images(images or [], loaded.preprocessing)
            latents = [model.encode_image(part.to(model.device)) for part in pixels.split(64)]
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        np.savez(stream, latents=torch.cat(latents).float().cpu().numpy(), names=np.array(names))
    print(f"wrote {len(names)} latents of {latents[0].shape[1]} features to {target}")
    return int(failed > 0)


def zero_shot(
    checkpoint: str,
    images: str | list[str],
    *,
    classes: list[str],
    templates: list[str] | None = None,
    top: int = 3,
    device: str = "auto",
) -> int:
    """Prints the most likely classes of each image, with their probabilities.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        images: a file or a folder of images, or a list of them, as [a.png, b.png].
        classes: names to choose among, as [cat, dog].
        templates: captions with one {} for a class name, as ["a photo of a {}"].
        top: classes to print.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    loaded = _load(checkpoint, device)
    model = loaded.model
    classifier = zero_shot_classifier(model, classes, templates or ["{}"], tokenizer=loaded.tokenizer)
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
    with torch.no_grad(), eval_mode(model):
        parts = [model.encode_image(part.to(model.device)) @ classifier.t() for part in pixels.split(64)]
        probabilities = (torch.cat(parts) * model.logit_scale).softmax(dim=-1)
    for path, row in zip(paths, probabilities, strict=True):
        best = row.topk(min(top, len(classes)))
        shown = (
            f"{classes[index]} {value:.3f}" for value, index in zip(best[0].tolist(), best[1].tolist(), strict=True)
        )
        print(f"{path}\t" + "\t".join(shown))
    return int(failed > 0)


def retrieve(
    checkpoint: str,
    images: str | list[str],
    *,
    text: list[str] | None = None,
    captions: bool = False,
    top: int = 5,
    device: str = "auto",
) -> int:
    """Finds images by text, or measures recall on images with captions.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        images: a file or a folder of images, or a list of them; with captions, one source as for train (or digits).
        text: queries; the nearest images of each are printed.
        captions: measures losses, recall and classification on a source of images with captions instead.
        top: images to print for a query.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status; 1 if an image could not be read.
    """
    if captions == bool(text):
        raise ValueError("give text, or captions to measure recall, one of the two")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    loaded = _load(checkpoint, device)
    model = loaded.model
    if captions:
        source = images if isinstance(images, str) else images[0] if len(images) == 1 else None
        if source is None:
            raise ValueError(f"images must be one source with captions, got {len(images)}")
        data = handwritten_digits() if source == "digits" else load_images(source, loaded.preprocessing)
        tell_unreadable(data, print)
        for name, value in evaluate(model, data, loaded.tokenizer, loaded.preprocessing).items():
            print(f"{name:22} {value:.3f}")
        return int(bool(data.unreadable))
    paths, pixels, failed = _read_images(images, loaded.preprocessing)
    with torch.no_grad(), eval_mode(model):
        found = torch.cat([model.encode_image(part.to(model.device)) for part in pixels.split(64)])
        queries = model.encode_text(encode_captions(text or [], loaded.tokenizer, model.pad_id).to(model.device))
    for query, similarity in zip(text or [], queries @ found.t(), strict=True):
        print(query)
        best = similarity.topk(min(top, len(paths)))
        for value, index in zip(best[0].tolist(), best[1].tolist(), strict=True):
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
    """Turns a weight file of CoCa-pytorch into a folder that ``CoCa.from_pretrained`` opens.

    Args:
        old: file with the state dict of a CoCa.
        directory: where to write.
        encoder: folder of the Hugging Face vision model that the file has the weights of, if it has any.
        tokenizer: to store with the model: bytes, a folder, or organisation/name on the hub.
        pad_id: that the model was trained with.
        bos_id: that captions begin with.
        eos_id: that captions end with.
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


COMMANDS: dict[str, Callable[..., int]] = {
    "caption": caption,
    "embed": embed_command,
    "zero-shot": zero_shot,
    "retrieve": retrieve,
    "convert": convert,
}


@dataclass(frozen=True)
class _Loaded:
    model: CoCa
    tokenizer: Any
    preprocessing: ImagePreprocessing


def _load(checkpoint: str, device: str) -> _Loaded:
    folder, place = checkpoint_folder(checkpoint), pick_device(device)
    model = CoCa.from_pretrained(folder).to(place).eval()
    if model.preprocessing is None:
        raise ValueError(f"{folder} does not say how images are prepared: it has no preprocess.json")
    return _Loaded(model, load_tokenizer(folder), model.preprocessing)


def _read_images(
    sources: str | Sequence[str], preprocessing: ImagePreprocessing
) -> tuple[list[str], torch.Tensor, int]:
    """Paths and tensors of the readable images; unreadable ones are named on standard error and counted."""
    from PIL import Image

    paths: list[Path] = []
    for source in map(Path, [sources] if isinstance(sources, str) else sources):
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


def tell_unreadable(data: CaptionedImages, say: Callable[..., None]) -> None:
    """Names the first images that could not be read, and counts them all."""
    for entry in data.unreadable[:20]:
        say(f"unreadable  {entry}")
    if data.unreadable:
        say(f"unreadable  {len(data.unreadable)} of {len(data.unreadable) + len(data)} images, all named in run.json")
