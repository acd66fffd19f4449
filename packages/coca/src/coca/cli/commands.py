"""Commands for a trained model (``caption``, ``embed``, ``zero-shot``, ``retrieve``), and ``convert`` and ``export``.

Images are read and encoded a batch at a time, so memory does not grow with their number. Each command returns the exit
status: 0, or 1 if an image could not be read.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca.cli.train import preprocessing_of
from coca.data.digits import handwritten_digits
from coca.data.image_files import ImageFiles, load_images
from coca.evaluation.evaluation import decoded, evaluate, image_latents, text_latents
from coca.evaluation.retrieval import similarities
from coca.interop import from_open_clip, load_coca_pytorch, to_open_clip
from coca.interop.clip_tokenizer import clip_tokenizer
from coca.interop.open_clip import open_clip_folder
from coca.model.coca import CoCa
from coca.model.image_encoders import load_encoder
from coca.model.preprocessing import ImagePreprocessing
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.pretrained import TOKENIZER_FOLDER, check_vocabulary
from lm_core.checks import check_positive, typed
from lm_core.cli.main import report
from lm_core.cli.text_generation import SamplingFlags, read_prompt
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device

BATCH = 32  # images encoded at a time


@typed
@dataclass(frozen=True, kw_only=True)
class Captioning(SamplingFlags):
    """Caption generation: greedy, sampled, or by beam search.

    Args:
        beams: width of the beam search, which needs temperature 0; 1 for greedy decoding or sampling.
        length_penalty: exponent of the length that divides the log-probability of a beam; larger favours long captions.
        min_new_tokens: minimum number of generated tokens.
        num_samples: captions of an image, for a temperature above 0.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    temperature: float = 0.0
    beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.num_samples, "num_samples")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples above 1 needs a temperature above 0, got {self.num_samples} captions at 0")


def caption(
    model: str, images: list[str], *, settings: Captioning, prefix: str | None = None, device: str = "auto"
) -> int:
    """Prints a caption for each image.

    Args:
        model: CoCa to use: folder of a run (its newest checkpoint), of a checkpoint or of save_pretrained, or
            organisation/name on the hub.
        images: files, folders and tars of images, and patterns as a-{000..127}.tar.
        settings: settings of the generation.
        prefix: text that every caption begins with; "-" reads standard input, "@FILE" a file.
    """
    coca, tokenizer, preprocessing = _load(model, device)
    files = ImageFiles(images, preprocessing)
    # the prefix as in training: after BOS, without EOS
    text = "" if prefix is None else read_prompt(prefix)
    bos = getattr(tokenizer, "bos_id", None)
    before = [*([] if bos is None else [bos]), *tokenizer.encode(text)] if text else []
    arguments = {name: value for name, value in vars(settings).items() if name not in ("num_samples", "seed")}
    generator = torch.Generator(coca.device).manual_seed(settings.seed)
    for paths, batch in files.batches(BATCH):
        repeated = _image_tokens(coca, batch).repeat_interleave(settings.num_samples, dim=0)
        ids = torch.tensor(before) if before else None
        tokens = coca.generate(image_tokens=repeated, prefix=ids, generator=generator, **arguments)
        for index, row in enumerate(tokens.tolist()):
            path = paths[index // settings.num_samples]
            print(f"{path}\t{text}{decoded(row, tokenizer, coca.eos_id, before)}")
    return _report_unreadable(files)


def embed(
    model: str,
    output: str,
    *,
    images: list[str] | None = None,
    texts: list[str] | None = None,
    device: str = "auto",
) -> int:
    """Writes L2-normalised latents of images or texts to a .npz: arrays "latents" and "names".

    Args:
        model: CoCa to use: folder of a run (its newest checkpoint), of a checkpoint or of save_pretrained, or
            organisation/name on the hub.
        output: .npz file to write.
        images: files, folders and tars of images, and patterns as a-{000..127}.tar.
        texts: captions to embed instead of images.
    """
    if bool(images) == bool(texts):
        raise ValueError("pass either images or texts to embed")
    coca, tokenizer, preprocessing = _load(model, device)
    files = None
    if texts:
        names, latents = texts, text_latents(coca, texts, tokenizer)
    else:
        files = ImageFiles(images or [], preprocessing)
        names, latents = _encoded(coca, files)
    target = Path(output).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        np.savez(stream, latents=latents.cpu().numpy(), names=np.array(names))
    print(f"wrote {len(names)} latents of {latents.shape[1]} features to {target}")
    return 0 if files is None else _report_unreadable(files)


def zero_shot(
    model: str,
    images: list[str],
    *,
    classes: list[str],
    templates: Sequence[str] | None = None,
    top: int = 3,
    device: str = "auto",
) -> int:
    """Prints the most likely classes of each image, with their probabilities.

    Args:
        model: CoCa to use: folder of a run (its newest checkpoint), of a checkpoint or of save_pretrained, or
            organisation/name on the hub.
        images: files, folders and tars of images, and patterns as a-{000..127}.tar.
        classes: class names to choose among.
        templates: captions with one {} for a class name, as "a photo of a {}".
        top: number of classes to print for an image.
    """
    check_positive(top, "top")
    coca, tokenizer, preprocessing = _load(model, device)
    classifier = coca.zero_shot_classifier(classes, templates or ["{}"], tokenizer=tokenizer)
    files = ImageFiles(images, preprocessing)
    for paths, batch in files.batches(BATCH):
        scores = similarities(image_latents(coca, [batch]), classifier) * coca.logit_scale.detach()
        for path, row in zip(paths, scores.softmax(dim=-1), strict=True):
            print("\t".join([path, *(f"{classes[index]} {value:.3f}" for value, index in _best(row, top))]))
    return _report_unreadable(files)


def retrieve(
    model: str,
    images: list[str],
    *,
    reading: dict[str, Any],
    text: list[str] | None = None,
    captions: bool = False,
    top: int = 5,
    device: str = "auto",
) -> int:
    """Finds images by text, or measures recall on images with captions.

    Args:
        model: CoCa to use: folder of a run (its newest checkpoint), of a checkpoint or of save_pretrained, or
            organisation/name on the hub.
        images: files, folders and tars of images; with --captions, sources of images with captions as for coca train
            --data.
        reading: arguments of ``load_images``, for --captions.
        text: queries for which the nearest images are printed.
        captions: measures losses, recall and classification on images with captions instead.
        top: number of images to print for a query.
    """
    if captions == bool(text):
        raise ValueError("pass either text to search for, or captions to measure recall")
    check_positive(top, "top")
    coca, tokenizer, preprocessing = _load(model, device)
    if captions:
        source = images if len(images) > 1 else images[0]
        data = handwritten_digits() if source == "digits" else load_images(source, preprocessing, **reading)
        for line in data.unreadable_report():
            report("unreadable", line)
        for name, value in evaluate(coca, data, tokenizer, preprocessing).items():
            print(f"{name:22} {value:.3f}")
        return int(bool(data.unreadable))
    files = ImageFiles(images, preprocessing)
    paths, latents = _encoded(coca, files)
    queries = text or []
    for query, similarity in zip(queries, similarities(text_latents(coca, queries, tokenizer), latents), strict=True):
        print(query)
        for value, index in _best(similarity, top):
            print(f"  {value:.3f}\t{paths[index]}")
    return _report_unreadable(files)


def convert(
    old: str,
    directory: str,
    *,
    encoder: str | None = None,
    tokenizer: str | None = None,
    pad_id: int = 0,
    bos_id: int | None = None,
    eos_id: int | None = None,
    model_config: str | None = None,
    overwrite: bool = False,
) -> int:
    """Converts weights of open_clip's CoCa or of CoCa-pytorch to a checkpoint folder.

    Args:
        old: folder or organisation/name of open_clip's CoCa, or file with the state dict of CoCa-pytorch's.
        directory: folder to write.
        model_config: JSON file with open_clip's configuration, if it is not next to the weights.
        encoder: folder of the Hugging Face vision model whose weights the file contains, if it contains any.
        tokenizer: tokenizer to store with the model: bytes, a folder, or organisation/name on the hub.
        pad_id: padding id that the model was trained with.
        bos_id: id of the token that begins captions.
        eos_id: id of the token that ends captions.
    """
    path = Path(old).expanduser()
    if model_config is not None or not (path.is_file() or path.suffix in (".pt", ".pth")):
        folder = open_clip_folder(old)
        if (encoder, pad_id, bos_id, eos_id) != (None, 0, None, None):
            raise ValueError("encoder, pad_id, bos_id and eos_id are for CoCa-pytorch; open_clip's are in its folder")
        model = from_open_clip(folder, config=model_config)
        clip = clip_tokenizer(folder) if tokenizer is None else load_tokenizer(tokenizer)
        if clip is not None:
            check_vocabulary(clip, model.num_tokens)
        print(f"wrote {model.save_pretrained(directory, overwrite=overwrite, tokenizer=clip)}")
        if clip is None:
            print("no tokenizer was found; pass --tokenizer openai/clip-vit-base-patch32", file=sys.stderr)
        return 0
    vision = None if encoder is None else load_encoder(encoder)
    model = load_coca_pytorch(old, img_encoder=vision, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    stored = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {model.save_pretrained(directory, overwrite=overwrite, tokenizer=stored)}")
    return 0


def export(model: str, directory: str) -> int:
    """Writes a model as a folder that open_clip reads.

    Args:
        model: CoCa with open_clip's layers: folder of a run (its newest checkpoint), of a checkpoint or of
            save_pretrained, or organisation/name on the hub.
        directory: folder to write, new or empty.
    """
    folder = checkpoint_folder(model)
    print(f"wrote {to_open_clip(CoCa.from_pretrained(folder), directory, tokenizer=_stored_tokenizer(folder))}")
    return 0


def _stored_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint; None if it has none."""
    return load_tokenizer(folder) if (folder / TOKENIZER_FOLDER).is_dir() else None


def _load(model: str, device: str) -> tuple[CoCa, Any, ImagePreprocessing]:
    """Model, tokenizer and preprocessing of a folder."""
    folder = checkpoint_folder(model)
    coca = CoCa.from_pretrained(folder).to(pick_device(device)).eval()
    if coca.img_encoder is None:
        raise ValueError(f"model must have an image encoder, {folder} has none")
    return coca, load_tokenizer(folder), preprocessing_of(coca, folder)


@torch.no_grad()
def _image_tokens(model: CoCa, images: Tensor) -> Tensor:
    """The encoder's output, from which several captions of an image are generated."""
    assert model.img_encoder is not None
    return model.img_encoder(images.to(model.device))


def _encoded(model: CoCa, files: ImageFiles) -> tuple[list[str], Tensor]:
    """Paths and latents of the readable images."""
    names: list[str] = []
    latents = []
    for paths, batch in files.batches(BATCH):
        names += paths
        latents.append(image_latents(model, [batch]))
    return names, torch.cat(latents)


def _best(scores: Tensor, top: int) -> list[tuple[float, int]]:
    """The highest scores with their indices."""
    values, indices = scores.topk(min(top, len(scores)))
    return list(zip(values.tolist(), indices.tolist(), strict=True))


def _report_unreadable(files: ImageFiles) -> int:
    """Names unreadable images on standard error; returns the exit status."""
    for line in files.unreadable:
        print(f"unreadable  {line}", file=sys.stderr)
    if files.unreadable:
        print(f"unreadable  {len(files.unreadable)} of {len(files.paths)} images", file=sys.stderr)
    return int(bool(files.unreadable))
