"""Recall at k between images and captions, in both directions; an image may have several captions.

Legend: i images, t captions, l latent feature.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.nn.norms import statistics_dtype


def similarities(first: Float[Tensor, "i l"], second: Float[Tensor, "t l"]) -> Float[Tensor, "i t"]:
    """Inner products of all pairs of latents, in float32 at least: bfloat16, as under autocast, leaves many ties."""
    dtype = statistics_dtype(torch.promote_types(first.dtype, second.dtype))
    with torch.autocast(first.device.type, enabled=False):
        return first.to(dtype) @ second.to(dtype).t()


def retrieval_metrics(
    image_latents: Float[Tensor, "i l"],
    text_latents: Float[Tensor, "t l"],
    image_of_text: Int[Tensor, " t"] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Recall at k, from text to image and from image to text.

    Text to image: the caption's image is among the first k. Image to text: any of the image's captions is. Ties count
    against the match, so a model that gives everything the same score gets 0, not 1.

    Args:
        image_latents: L2-normalised latents of the images.
        text_latents: L2-normalised latents of the captions.
        image_of_text: index of the image that each caption belongs to; by default caption i belongs to image i.
        ks: values of k.
        chunk_size: captions compared at a time.

    Returns:
        ``image_to_text_r@1``, ..., ``text_to_image_r@1``, ..., in [0, 1]. Images without a caption are not counted.

    Raises:
        ValueError: shapes do not match, an image index is out of range, a k is below 1, or a latent is not finite.
    """
    if image_latents.ndim != 2 or text_latents.ndim != 2 or image_latents.shape[1] != text_latents.shape[1]:
        shapes = f"{tuple(image_latents.shape)} and {tuple(text_latents.shape)}"
        raise ValueError(f"latents must be (images, l) and (captions, l), got {shapes}")
    images, texts = image_latents.shape[0], text_latents.shape[0]
    if images == 0 or texts == 0:
        raise ValueError(f"there must be at least one image and one caption, got {images} and {texts}")
    if not bool(image_latents.isfinite().all() and text_latents.isfinite().all()):
        raise ValueError("latents must be finite, got inf or NaN")
    if any(k < 1 for k in ks) or not ks:
        raise ValueError(f"ks must be at least 1 each, got {tuple(ks)}")
    if image_of_text is None:
        if images != texts:
            raise ValueError(f"image_of_text must be given unless counts are equal, got {images} and {texts}")
        image_of_text = torch.arange(texts)
    image_of_text = image_of_text.to(text_latents.device)
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text must have shape {(texts,)}, got {tuple(image_of_text.shape)}")
    if bool(((image_of_text < 0) | (image_of_text >= images)).any()):
        raise ValueError(f"image_of_text must be in [0, {images}), got {image_of_text.tolist()[:8]}")

    # Text to image: rank of each caption's image, and the score of each image's best caption.
    text_ranks = []
    dtype = statistics_dtype(torch.promote_types(image_latents.dtype, text_latents.dtype))
    best = torch.full((images,), -torch.inf, device=image_latents.device, dtype=dtype)
    for texts_part, owner in zip(text_latents.split(chunk_size), image_of_text.split(chunk_size), strict=True):
        similarity = similarities(texts_part, image_latents)
        match = similarity.gather(1, owner.unsqueeze(-1))
        text_ranks.append((similarity >= match).sum(dim=-1))
        best.scatter_reduce_(0, owner, match.squeeze(-1), "amax")
    has_caption = best > -torch.inf
    # Image to text: an image's other captions are correct too, so only those of other images can precede its best.
    mistakes = torch.zeros(images, dtype=torch.long, device=image_latents.device)
    indices = torch.arange(images, device=image_latents.device)
    for texts_part, owner in zip(text_latents.split(chunk_size), image_of_text.split(chunk_size), strict=True):
        # The same product as above, so that equal similarities are equal bit by bit.
        similarity = similarities(texts_part, image_latents).t()
        mistakes += ((similarity >= best.unsqueeze(-1)) & (indices.unsqueeze(-1) != owner)).sum(dim=-1)
    image_ranks = mistakes[has_caption] + 1
    ranks = {"image_to_text": image_ranks, "text_to_image": torch.cat(text_ranks)}
    return {f"{name}_r@{k}": float((rank <= k).float().mean()) for name, rank in ranks.items() for k in ks}
