"""Contrastive losses over the global batch: softmax (CLIP, arXiv 2103.00020) and sigmoid (SigLIP, 2303.15343).

Image i matches text i and no other. Several processes gather their latents, and each scores its own pairs against all:
its share of the global mean. ``global_mean`` turns the share into a loss whose value is the global one on every rank,
and whose gradient, after the mean that ``DistributedDataParallel`` takes over ranks, is that of one process with the
whole batch, for the towers and for scale and bias alike. The number of processes is read at each call.

Neither loss holds the similarity matrix (``coca.model.pair_scores``). On several processes the two directions of the
softmax have different matrices: each is then ``linear_cross_entropy`` with the other side's latents as classes. All
compute in float32 at least, outside autocast, since scores can be as large as the scale.

Legend: b pairs of this process, s pairs of all, d feature.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coca.model.pair_scores import TILE_SCORES, summed_sigmoid, summed_softmax
from lm_core.distributed import all_gather, all_reduce_sum, rank, world_size
from lm_core.losses.losses import linear_cross_entropy


def global_mean(share: Float[Tensor, ""], *, process_group: Any = None, gather: bool = True) -> Float[Tensor, ""]:
    """The global loss, from this process's share of it (the local sum over the GLOBAL count).

    The value is the sum of all shares; the gradient is the world size times that of the local share, so that the mean
    over ranks is the gradient of the global loss. (A mean of per-rank means has neither when counts differ.)
    """
    world = world_size(process_group) if gather else 1
    if world == 1:
        return share
    scaled = share * world
    return scaled + (all_reduce_sum(share, process_group) - scaled.detach())


def softmax_contrastive_loss(
    image_latents: Float[Tensor, "b d"],
    text_latents: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    *,
    process_group: Any = None,
    gather: bool = True,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Mean of the cross-entropies image to text and text to image over ``logit_scale * image @ text.T``.

    Args:
        image_latents: L2-normalised latents of the images.
        text_latents: L2-normalised latents of the texts; row i matches row i of the images.
        logit_scale: factor of the similarities, not its logarithm.
        process_group: group of the processes that share a batch; None for all.
        gather: False contrasts only this process's pairs.
        chunk_size: rows scored at a time; None chooses by memory.

    Raises:
        ValueError: shapes differ.
    """
    images, texts, scale = _checked(image_latents, text_latents, logit_scale)
    with torch.autocast(images.device.type, enabled=False):
        all_images, all_texts, first, total = _gathered(images, texts, process_group, gather)
        if not gather or world_size(process_group) == 1:
            needed = _need_gradients(images, texts, scale)
            return summed_softmax(images, texts, scale, _rows(total, chunk_size), needed)[0] / total
        labels = torch.arange(first, first + images.shape[0], device=images.device)
        to_text, to_image = (
            linear_cross_entropy(local * scale, classes, labels, normalizer=total, chunk_size=chunk_size)
            for local, classes in ((images, all_texts), (texts, all_images))
        )
        return global_mean((to_text + to_image) / 2, process_group=process_group, gather=gather)


def sigmoid_contrastive_loss(
    image_latents: Float[Tensor, "b d"],
    text_latents: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    process_group: Any = None,
    gather: bool = True,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every pair, match or not, summed over pairs and divided by the batch (SigLIP, section 3).

    Arguments and errors are those of ``softmax_contrastive_loss``; ``logit_bias`` is added to the scores.
    """
    images, texts, scale = _checked(image_latents, text_latents, logit_scale)
    bias = logit_bias.to(images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        _, all_texts, first, total = _gathered(images, texts, process_group, gather)
        needed = _need_gradients(images, texts, scale, bias)
        share = summed_sigmoid(images, all_texts, scale, bias, first, _rows(total, chunk_size), needed)[0]
        return global_mean(share / total, process_group=process_group, gather=gather)


def _rows(columns: int, chunk_size: int | None) -> int:
    """Rows of a tile of scores."""
    return chunk_size or max(TILE_SCORES // max(columns, 1), 1)


def _need_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _checked(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            f"image_latents and text_latents must both be (b, d), got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return images.to(dtype), texts.to(dtype), scale.to(dtype)


def _gathered(images: Tensor, texts: Tensor, process_group: Any, gather: bool) -> tuple[Tensor, Tensor, int, int]:
    """Latents of all processes, the row of this process's first pair, and the number of pairs."""
    if not gather or world_size(process_group) == 1:
        return images, texts, 0, images.shape[0]
    # One collective for both: half the latency.
    both, sizes = all_gather(torch.cat((images, texts), dim=-1), process_group)
    all_images, all_texts = both.chunk(2, dim=-1)
    first = int(sizes[: rank(process_group)].sum())
    return all_images.contiguous(), all_texts.contiguous(), first, both.shape[0]
