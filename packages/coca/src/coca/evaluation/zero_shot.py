"""Zero-shot classification (arXiv 2103.00020, section 3.1): each class is the mean latent of its captions.

Legend: b images, l latent features.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from coca.evaluation.evaluation import image_latents
from coca.evaluation.retrieval import similarities
from coca.model.coca import CoCa


def zero_shot_classifier(
    model: CoCa,
    class_names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    tokenizer: Any,
    max_length: int | None = None,
) -> Float[Tensor, "classes l"]:
    """``CoCa.zero_shot_classifier`` as a function: one L2-normalised latent for each class."""
    return model.zero_shot_classifier(class_names, templates, tokenizer=tokenizer, max_length=max_length)


def classify(
    model: CoCa, classifier: Float[Tensor, "classes l"], images: Tensor, *, batch_size: int = 256
) -> Int[Tensor, " b"]:
    """The most similar class of each image.

    Args:
        model: model with an image encoder.
        classifier: class latents from ``zero_shot_classifier``.
        images: normalised images ``(b, c, height, width)``.
        batch_size: images encoded at a time.
    """
    return similarities(image_latents(model, images.split(batch_size)), classifier).argmax(dim=-1)
