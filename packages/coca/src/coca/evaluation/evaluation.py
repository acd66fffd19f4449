"""How well a model sees and tells, on images it was not trained on.

Legend: i images, t captions, l latent feature.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coca.data.captioned_images import CaptionedImages
from coca.evaluation.retrieval import retrieval_metrics
from coca.evaluation.zero_shot import zero_shot_classifier
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import encode_captions, layout_of
from lm_core.generation.decoding import eval_mode


@dataclass(frozen=True)
class Latents:
    """Latents of a set of images and all their captions.

    Attributes:
        images: ``(i, l)``, L2-normalised.
        texts: ``(t, l)``, L2-normalised.
        captions: the ``t`` captions.
        image_of_text: number of the image of each caption.
    """

    images: Float[Tensor, "i l"]
    texts: Float[Tensor, "t l"]
    captions: tuple[str, ...]
    image_of_text: Int[Tensor, " t"]


def image_batches(
    data: CaptionedImages, preprocessing: ImagePreprocessing, batch_size: int
) -> Iterator[Float[Tensor, "b c height width"]]:
    """The images in order."""
    for start in range(0, len(data), batch_size):
        numbers = range(start, min(start + batch_size, len(data)))
        yield preprocessing.normalised(np.stack([data.read(number) for number in numbers]))


@torch.no_grad()
def embed(
    model: Any,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_length: int | None = None,
    batch_size: int = 256,
) -> Latents:
    """Latents of all images and of every distinct pair of image and caption."""
    pairs = [(caption, number) for number, captions in enumerate(data.captions) for caption in captions]
    with eval_mode(model):
        images = [model.encode_image(part.to(model.device)) for part in image_batches(data, preprocessing, batch_size)]
        texts = []
        for start in range(0, len(pairs), batch_size):
            captions = [caption for caption, _ in pairs[start : start + batch_size]]
            texts.append(
                model.encode_text(encode_captions(captions, tokenizer, model.pad_id, max_length).to(model.device))
            )
    return Latents(
        torch.cat(images).float(),
        torch.cat(texts).float(),
        tuple(caption for caption, _ in pairs),
        torch.tensor([number for _, number in pairs]),
    )


@torch.no_grad()
def caption_images(
    model: Any,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    **settings: Any,
) -> list[str]:
    """A generated caption for each image, in order; ``settings`` as ``coca.model.captioning.caption`` takes them."""
    captions = []
    for images in image_batches(data, preprocessing, batch_size):
        tokens = model.generate(images.to(model.device), max_new_tokens=max_new_tokens, **settings)
        captions += [decoded(row, tokenizer, model.eos_id) for row in tokens.tolist()]
    return captions


def decoded(ids: list[int], tokenizer: Any, eos_id: int | None) -> str:
    """The text before the first EOS."""
    return tokenizer.decode(ids[: ids.index(eos_id)] if eos_id in ids else ids)


def names_class(caption: str, label: int, class_names: tuple[str, ...]) -> bool:
    """Whether a caption has the name of this class, as a whole word, and of no other."""
    named = {
        number
        for number, name in enumerate(class_names)
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)
    }
    return named == {label}


@torch.no_grad()
def evaluate(
    model: Any,
    data: CaptionedImages,
    tokenizer: Any,
    preprocessing: ImagePreprocessing,
    *,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    captions: int | None = None,
) -> dict[str, float]:
    """Losses, retrieval both ways, and where classes are known zero-shot classification and captions that name them.

    Runs in this process alone.

    Args:
        model: a ``CoCa`` with an image encoder.
        data: held-out images.
        tokenizer: as in training.
        preprocessing: as in training.
        max_length: tokens at which captions are cut, as in training.
        max_new_tokens: of generated captions.
        batch_size: pairs at a time; the contrastive loss is of such batches.
        captions: images to caption; None for all, 0 for none.

    Returns:
        ``caption_loss`` (nats a token), ``contrastive_loss``, ``image_to_text_r@k`` and ``text_to_image_r@k`` where
        captions tell images apart, ``zero_shot_accuracy`` and ``caption_accuracy`` where classes are known.
    """
    caption_nats = contrastive = tokens = 0.0
    with eval_mode(model):
        for number, images in enumerate(image_batches(data, preprocessing, batch_size)):
            firsts = [own[0] for own in data.captions[number * batch_size : number * batch_size + len(images)]]
            text = encode_captions(firsts, tokenizer, model.pad_id, max_length).to(model.device)
            loss = model.loss(text, images.to(model.device), gather=False)
            layout = layout_of(text, None, pad_id=model.pad_id, eos_id=model.eos_id, num_tokens=model.num_tokens)
            # Each row predicts all its tokens but the first.
            count = int((layout.lengths - 1).sum())
            caption_nats += float(loss.caption) * count
            tokens += count
            contrastive += float(loss.contrastive) * len(images)
    latents = embed(model, data, tokenizer, preprocessing, max_length=max_length, batch_size=batch_size)
    metrics = {"caption_loss": caption_nats / max(tokens, 1), "contrastive_loss": contrastive / len(data)}
    # Where many images share a caption it cannot find one of them.
    if len(set(latents.captions)) > len(latents.captions) / 2:
        metrics |= retrieval_metrics(latents.images, latents.texts, latents.image_of_text)
    if data.labels is None:
        return metrics
    labels = torch.tensor(data.labels)
    classifier = zero_shot_classifier(
        model, data.class_names, data.templates or ("{}",), tokenizer=tokenizer, max_length=max_length
    )
    predicted = (latents.images @ classifier.float().t()).argmax(dim=-1).cpu()
    metrics["zero_shot_accuracy"] = float((predicted == labels).float().mean())
    chosen = data if captions is None else data.select(range(min(captions, len(data)))) if captions else None
    if chosen is not None and chosen.labels is not None:
        texts = caption_images(
            model, chosen, tokenizer, preprocessing, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        right = [names_class(text, label, data.class_names) for text, label in zip(texts, chosen.labels, strict=True)]
        metrics["caption_accuracy"] = sum(right) / len(right)
    return metrics
