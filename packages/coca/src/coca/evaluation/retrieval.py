"""Recall at k between images and captions, in both directions; each may have several matches.

Legend: i images, t captions, l latent feature.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.nn.norms import statistics_dtype

_TILE = 2**22  # similarities computed at a time: some tens of megabytes


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
    matches: Int[Tensor, "pairs 2"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Recall at k, from text to image and from image to text.

    Text to image: one of the caption's images is among the first k; image to text: one of the image's captions is. Ties
    count against the match, so a model that gives everything the same score gets 0, not 1.

    Args:
        image_latents: L2-normalised latents of the images.
        text_latents: L2-normalised latents of the captions.
        image_of_text: index of the image that each caption belongs to; by default caption i belongs to image i.
        matches: all true pairs (caption, image) instead, where a caption belongs to several images.
        ks: values of k.
        chunk_size: captions compared at a time; None chooses by memory.

    Returns:
        ``image_to_text_r@1``, ..., ``text_to_image_r@1``, ..., in [0, 1]. Images without a caption are not counted.

    Raises:
        ValueError: shapes do not match, an index is out of range, a caption has no image, a k is below 1, or a latent
            is not finite; or both ``image_of_text`` and ``matches`` are given.
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
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    text_of_pair, image_of_pair = _matches(images, texts, image_of_text, matches, text_latents.device)

    dtype = statistics_dtype(torch.promote_types(image_latents.dtype, text_latents.dtype))
    best = torch.full((images,), -torch.inf, device=image_latents.device, dtype=dtype)
    text_ranks = []
    step = chunk_size or max(1, _TILE // images)

    def tiles() -> Iterator[tuple[Tensor, Tensor]]:
        """Similarities of some captions with all images, and where they match; equal bit for bit in every pass."""
        for start in range(0, texts, step):
            similarity = similarities(text_latents[start : start + step], image_latents)
            own = (text_of_pair >= start) & (text_of_pair < start + step)
            is_match = torch.zeros_like(similarity, dtype=torch.bool)
            is_match[text_of_pair[own] - start, image_of_pair[own]] = True
            yield similarity, is_match

    # An item's other matches are right too, so only what does not match can precede its best one.
    for similarity, is_match in tiles():
        matching = similarity.masked_fill(~is_match, -torch.inf)
        best = torch.maximum(best, matching.amax(dim=0))
        precedes = (similarity >= matching.amax(dim=1, keepdim=True)) & ~is_match
        text_ranks.append(precedes.sum(dim=1) + 1)
    mistakes = torch.zeros(images, dtype=torch.long, device=image_latents.device)
    for similarity, is_match in tiles():
        mistakes += ((similarity >= best) & ~is_match).sum(dim=0)
    ranks = {"image_to_text": mistakes[best > -torch.inf] + 1, "text_to_image": torch.cat(text_ranks)}
    return {f"{name}_r@{k}": float((rank <= k).float().mean()) for name, rank in ranks.items() for k in ks}


def _matches(
    images: int, texts: int, image_of_text: Tensor | None, matches: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Caption and image of every true pair."""
    if matches is not None:
        if image_of_text is not None:
            raise ValueError("pass image_of_text or matches, got both")
        if matches.ndim != 2 or matches.shape[1] != 2 or matches.is_floating_point() or matches.dtype == torch.bool:
            raise ValueError(f"matches must be integers (pairs, 2), got {matches.dtype} of {tuple(matches.shape)}")
        text, image = matches.to(device).long().unbind(dim=1)
        if bool(((text < 0) | (text >= texts)).any() | ((image < 0) | (image >= images)).any()):
            raise ValueError(f"matches must be pairs below ({texts}, {images}), got {matches.tolist()[:8]}")
        without = torch.ones(texts, dtype=torch.bool, device=device)
        without[text] = False
        if bool(without.any()):
            raise ValueError(
                f"matches must have an image for each caption, got none for {without.nonzero()[:8, 0].tolist()}"
            )
        return text, image
    if image_of_text is None:
        if images != texts:
            raise ValueError(f"image_of_text must be given unless counts are equal, got {images} and {texts}")
        image_of_text = torch.arange(texts)
    image_of_text = image_of_text.to(device)
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text must have shape {(texts,)}, got {tuple(image_of_text.shape)}")
    if bool(((image_of_text < 0) | (image_of_text >= images)).any()):
        raise ValueError(f"image_of_text must be in [0, {images}), got {image_of_text.tolist()[:8]}")
    return torch.arange(texts, device=device), image_of_text.long()
