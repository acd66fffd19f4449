"""Zero-shot classification (arXiv 2103.00020, section 3.1): each class is the mean latent of its captions.

Legend: b images, l latent feature.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coca.data.captions import encode_captions
from lm_core.generation.decoding import eval_mode
from lm_core.nn.norms import l2norm


@torch.no_grad()
def zero_shot_classifier(
    model: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    tokenizer: Any,
    max_length: int | None = None,
) -> Float[Tensor, "classes l"]:
    """One L2-normalised latent a class.

    Args:
        model: a ``CoCa``.
        class_names: put into the templates.
        templates: captions with one ``{}``; the latents of a class's captions are averaged.
        tokenizer: as in training; see ``lm_core.tokenizers``.
        max_length: tokens at which a caption is cut, as in training.

    Returns:
        ``(classes, l)``; ``model.encode_image(images) @ classifier.T`` is highest at the predicted class.

    Raises:
        ValueError: there is no class or template, a class comes twice, or a template has not exactly one ``{}``.
    """
    names, forms = list(class_names), list(templates)
    if not names or not forms:
        raise ValueError(f"class_names and templates must not be empty, got {len(names)} and {len(forms)}")
    if isinstance(class_names, str) or isinstance(templates, str):
        raise TypeError("class_names and templates must be lists of strings, got one string")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class_names must differ, got {twice[:8]} more than once")
    for form in forms:
        if form.count("{}") != 1:
            raise ValueError(f"each template must have exactly one {{}}, got {form!r}")
    latents = []
    with eval_mode(model):
        for name in names:
            texts = encode_captions([form.replace("{}", name) for form in forms], tokenizer, model.pad_id, max_length)
            latents.append(model.encode_text(texts.to(model.device)).mean(dim=0))
    return l2norm(torch.stack(latents))


@torch.no_grad()
def classify(
    model: Any, classifier: Float[Tensor, "classes l"], images: Tensor, *, batch_size: int = 256
) -> Int[Tensor, " b"]:
    """The most similar class of each image.

    Args:
        model: a ``CoCa`` with an image encoder.
        classifier: of ``zero_shot_classifier``.
        images: ``(b, c, height, width)``.
        batch_size: images encoded at a time.
    """
    with eval_mode(model):
        parts = [model.encode_image(part.to(model.device)) @ classifier.t() for part in images.split(batch_size)]
    return torch.cat(parts).argmax(dim=-1)
