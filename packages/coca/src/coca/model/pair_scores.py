"""Losses over the scores of all image-text pairs, in tiles of rows, so that the whole matrix is never held.

A tile's scores are turned into their gradient in place and multiplied into the gradients of the latents before the next
tile is computed. The results are scalars, so the forward computes the gradients and the backward only scales them:

- ``summed_softmax``: both directions share one matrix. A column's softmax needs every row, so with several tiles the
  scores are computed twice: four matrix products, or three with a single tile (as many as the plain formula).
- ``summed_sigmoid``: three products.

With ``z = scale * image @ text`` (``+ bias``), ``y`` 1 on matches and 0 elsewhere:

    d softmax loss / d z = (softmax over the row + softmax over the column) / 2 - y    (1)
    d sigmoid loss / d z = sigmoid(z) - y                                              (2)

Both are custom operators, so that ``torch.compile`` does not unroll their loops, and have no second derivative.

Legend: b images of this process, s texts of all, t rows of a tile, d feature.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

# Scores of a tile (32 MiB of float32).
TILE_SCORES = 8 * 2**20


class _Gradients:
    """Gradients of latents, scale and bias, summed tile by tile."""

    def __init__(self, images: Tensor, texts: Tensor, scale: Tensor, needed: bool) -> None:
        self._inputs = images, texts, scale
        self.images = torch.empty_like(images) if needed else images.new_empty(0)
        self.texts = torch.zeros_like(texts) if needed else texts.new_empty(0)
        self.scale = torch.zeros_like(scale)
        self.bias = torch.zeros_like(scale)

    def add(self, gradient: Tensor, tile: slice) -> None:
        """Adds what a tile contributes, given the gradient ``(t, s)`` of its scores."""
        images, texts, scale = self._inputs
        unscaled = torch.mm(gradient, texts, out=self.images[tile])
        self.scale += (unscaled * images[tile]).sum()
        self.bias += gradient.sum()
        unscaled.mul_(scale)
        self.texts.addmm_(gradient.t(), images[tile] * scale)


def _tiles(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


@custom_op("coca::summed_softmax", mutates_args=())
def summed_softmax(
    images: Tensor, texts: Tensor, scale: Tensor, tile_size: int, need_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over the pairs of the mean of both cross-entropies, and its gradients in images, texts and scale.

    Image i matches text i; there are no other texts.
    """
    with torch.autocast(images.device.type, enabled=False):
        several = tile_size < images.shape[0]
        rows, matches = images.new_empty(images.shape[0]), images.new_empty(images.shape[0])
        columns = images.new_full((images.shape[0],), -torch.inf)
        scores = images.new_empty(0)
        # first pass: log-sum-exp of every row and column
        for tile in _tiles(images.shape[0], tile_size):
            scores = torch.mm(images[tile] * scale, texts.t())
            rows[tile] = scores.logsumexp(dim=1)
            columns = torch.logaddexp(columns, scores.logsumexp(dim=0))
            matches[tile] = scores.diagonal(tile.start)
        gradients = _Gradients(images, texts, scale, need_gradients)
        # second pass: gradients, from the scores again; a single tile still has them
        if need_gradients:
            for tile in _tiles(images.shape[0], tile_size):
                if several:
                    scores = torch.mm(images[tile] * scale, texts.t())
                gradient = (scores - rows[tile, None]).exp_().add_(scores.sub_(columns).exp_()).mul_(0.5)
                gradient.diagonal(tile.start).sub_(1)  # (1)
                gradients.add(gradient, tile)
        return ((rows + columns) / 2 - matches).sum(), gradients.images, gradients.texts, gradients.scale


@custom_op("coca::summed_sigmoid", mutates_args=())
def summed_sigmoid(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int, tile_size: int, need_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over all pairs of the binary cross-entropy, and its gradients in images, texts, scale and bias.

    Image i matches text ``first + i``.
    """
    with torch.autocast(images.device.type, enabled=False):
        loss = torch.zeros_like(scale)
        gradients = _Gradients(images, texts, scale, need_gradients)
        for tile in _tiles(images.shape[0], tile_size):
            scores = torch.mm(images[tile] * scale, texts.t()).add_(bias)
            matches = scores.diagonal(first + tile.start)[: tile.stop - tile.start]
            matches.neg_()  # each score is now that of the wrong label
            loss += F.softplus(scores, threshold=40).sum()  # exact in float64 too; three times as fast as logsigmoid
            if need_gradients:
                scores.sigmoid_()
                matches.neg_()  # (2): sigmoid(z) - 1 is -sigmoid(-z)
                gradients.add(scores, tile)
        return loss, gradients.images, gradients.texts, gradients.scale, gradients.bias


@summed_softmax.register_fake
@summed_sigmoid.register_fake
def _(images: Tensor, texts: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, ...]:
    need_gradients, scalars = others[-1], [scale, *(t for t in others if isinstance(t, Tensor))]
    latents = [torch.empty_like(t) if need_gradients else t.new_empty(0) for t in (images, texts)]
    return torch.empty_like(scale), *latents, *map(torch.empty_like, scalars)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.others = len(inputs) - len(output[1:])


def _scaled(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if upstream is None:
        return (None,) * (len(saved) + ctx.others)
    # not in place, since a retained graph may run this again
    gradients = (t * upstream if needed else None for t, needed in zip(saved, ctx.needs_input_grad, strict=False))
    return *gradients, *[None] * ctx.others


summed_softmax.register_autograd(_scaled, setup_context=_save)
summed_sigmoid.register_autograd(_scaled, setup_context=_save)
