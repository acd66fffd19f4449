"""Losses, retrieval, zero-shot classification and generated captions on held-out images.

Legend: i images, t captions, l latent feature.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coca.data.captioned_images import CaptionedImages
from coca.evaluation.retrieval import retrieval_metrics, similarities
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import caption_ids, encode_captions
from lm_core.causal_lm import eval_mode
from lm_core.tokenizers import as_tokenizer, continuation_text


@dataclass(frozen=True)
class Latents:
    """Latents of a set of images and their different captions.

    Attributes:
        images: ``(i, l)``, L2-normalised.
        texts: ``(t, l)``, L2-normalised.
        captions: the ``t`` captions, each once.
        matches: pairs of caption and image that belong together, ``(pairs, 2)``.
    """

    images: Float[Tensor, "i l"]
    texts: Float[Tensor, "t l"]
    captions: tuple[str, ...]
    matches: Int[Tensor, "pairs 2"]


def image_batches(
    data: CaptionedImages, preprocessing: ImagePreprocessing, batch_size: int
) -> Iterator[Float[Tensor, "b c height width"]]:
    """Normalised images in order, batch by batch."""
    for start in range(0, len(data), batch_size):
        indices = range(start, min(start + batch_size, len(data)))
        yield preprocessing.normalised(np.stack([data.read(index) for index in indices]))


@torch.no_grad()
def image_latents(model: CoCa, batches: Iterable[Float[Tensor, "b c height width"]]) -> Float[Tensor, "i l"]:
    """L2-normalised latents of images, in float32."""
    with eval_mode(model):
        return torch.cat([model.encode_image(images.to(model.device)) for images in batches]).float()


@torch.no_grad()
def text_latents(
    model: CoCa, captions: Sequence[str], tokenizer: Any, *, max_length: int | None = None, batch_size: int = 256
) -> Float[Tensor, "t l"]:
    """L2-normalised latents of captions, in float32."""
    latents, max_length = [], text_limit(model, max_length)
    with eval_mode(model):
        for start in range(0, len(captions), batch_size):
            ids = encode_captions(captions[start : start + batch_size], tokenizer, model.pad_id, max_length)
            latents.append(model.encode_text(ids.to(model.device)))
    return torch.cat(latents).float()


def text_limit(model: CoCa, max_length: int | None) -> int | None:
    """Tokens at which captions are cut: ``max_length``, or the model's limit if that is less."""
    limits = [limit for limit in (max_length, model.max_length) if limit is not None]
    return min(limits, default=None)


def embed(
    model: CoCa,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_length: int | None = None,
    batch_size: int = 256,
) -> Latents:
    """Latents of all images and of all their captions; a caption that several images share has one latent."""
    index_of: dict[str, int] = {}
    pairs = [
        (index_of.setdefault(caption, len(index_of)), index)
        for index, captions in enumerate(data.captions)
        for caption in captions
    ]
    captions = tuple(index_of)
    images = image_latents(model, image_batches(data, preprocessing, batch_size))
    texts = text_latents(model, captions, tokenizer, max_length=max_length, batch_size=batch_size)
    return Latents(images, texts, captions, torch.tensor(pairs))


def caption_images(
    model: CoCa,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    batch_size: int = 128,
    **settings: Any,
) -> list[str]:
    """A generated caption for each image, in order; ``settings`` as ``CoCa.generate`` takes them."""
    captions, tokenizer = [], as_tokenizer(tokenizer)
    if model.max_length is not None:  # BOS counts
        settings["max_new_tokens"] = min(settings.get("max_new_tokens", 64), model.max_length - 1)
    for images in image_batches(data, preprocessing, batch_size):
        tokens = model.generate(images.to(model.device), **settings)
        captions += [decoded(row, tokenizer, model.eos_id) for row in tokens.tolist()]
    return captions


def decoded(ids: list[int], tokenizer: Any, eos_id: int | None, prefix: Sequence[int] = ()) -> str:
    """The text before the first EOS; ``prefix`` are the ids that it continues, whose text is left out."""
    return continuation_text(tokenizer, prefix, ids[: ids.index(eos_id)] if eos_id in ids else ids)


def names_class(caption: str, label: int, class_names: tuple[str, ...]) -> bool:
    """True if a caption contains the name of this class, as a whole word, and of no other."""
    patterns = [rf"(?<!\w){re.escape(name)}(?!\w)" for name in class_names]
    named = {index for index, pattern in enumerate(patterns) if re.search(pattern, caption, re.IGNORECASE)}
    return named == {label}


@torch.no_grad()
def evaluate(
    model: CoCa,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    captions: int | None = None,
) -> dict[str, float]:
    """Losses and retrieval; where classes are known also zero-shot classification and captions that name the class.

    Runs in this process alone.

    Args:
        model: a ``CoCa`` with an image encoder.
        data: held-out images.
        tokenizer: caption tokenizer of the training.
        preprocessing: preprocessing of the training.
        max_length: tokens at which captions are cut, as in training.
        max_new_tokens: maximum length of generated captions.
        batch_size: pairs in a batch; the contrastive loss is a mean over such batches.
        captions: number of images to caption; None for all, 0 for none.

    Returns:
        ``caption_loss`` (nats per token), ``contrastive_loss``, ``image_to_text_r@k`` and ``text_to_image_r@k`` (a
        caption that several images share is right for each of them), ``zero_shot_accuracy`` and ``caption_accuracy``
        where classes are known.
    """
    tokenizer = as_tokenizer(tokenizer)
    max_length = text_limit(model, max_length)
    # Losses: the first caption of each image.
    caption_nats = contrastive = tokens = 0.0
    with eval_mode(model):
        for index, images in enumerate(image_batches(data, preprocessing, batch_size)):
            firsts = [texts[0] for texts in data.captions[index * batch_size :][: len(images)]]
            text = encode_captions(firsts, tokenizer, model.pad_id, max_length).to(model.device)
            loss = model.loss(text, images.to(model.device), gather=False)
            # Each row predicts all its tokens but the first.
            count = sum(len(caption_ids(caption, tokenizer, max_length)) - 1 for caption in firsts)
            caption_nats += float(loss.caption) * count
            tokens += count
            contrastive += float(loss.contrastive) * len(images)
    latents = embed(model, data, tokenizer, preprocessing, max_length=max_length, batch_size=batch_size)
    metrics = {"caption_loss": caption_nats / max(tokens, 1), "contrastive_loss": contrastive / len(data)}
    metrics |= retrieval_metrics(latents.images, latents.texts, matches=latents.matches)
    if data.labels is None:
        return metrics
    # Classification, and captions that name the class.
    templates = data.templates or ("{}",)
    classifier = model.zero_shot_classifier(data.class_names, templates, tokenizer=tokenizer, max_length=max_length)
    predicted = similarities(latents.images, classifier).argmax(dim=-1).cpu()
    metrics["zero_shot_accuracy"] = float((predicted == torch.tensor(data.labels)).float().mean())
    count = len(data) if captions is None else min(captions, len(data))
    if count:
        settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        texts = caption_images(model, data.select(range(count)), tokenizer, preprocessing, **settings)
        labelled = zip(texts, data.labels[:count], strict=True)
        metrics["caption_accuracy"] = sum(names_class(*row, data.class_names) for row in labelled) / count
    return metrics
