"""The output layer of a language model in tiles of a few hundred tokens.

One reused buffer holds a tile's logits, which are overwritten by their gradient and multiplied into the gradients of
the hidden states and of the weight before the next tile. Three operators are built on that, and
:mod:`lm_core.losses.losses` on them:

- ``summed_cross_entropy`` has a scalar result, so its gradients are computed in the forward and only scaled in the
  backward: three matrix products, as many as the plain loss takes.
- ``token_scores`` has a result for every token and needs the gradient of each, so its backward
  (``token_scores_backward``) recomputes the logits: four products; three if all fit one tile and are kept.

With ``z`` the logits over the temperature, ``p = softmax(z)``, ``H`` the entropy of p and ``y`` the label:

    d log p_y / d z_k = [k = y] - p_k         (1)
    d H / d z_k       = -p_k (log p_k + H)    (2)

Matrix products run in the caller's ``dtype``, softmax statistics and the weight's gradient in float32 (float64 for
float64). They are custom operators, not ``autograd.Function``, so that ``torch.compile`` keeps a call as one node
instead of unrolling its loop. There are no second derivatives.

Legend: m tokens, t tokens of a tile, d feature, v vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.torch_version import TorchVersion

from lm_core.nn.norms import statistics_dtype


def _new_logits(hidden: Tensor, tokens: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (tokens, vocabulary) in the fastest layout."""
    if hidden.device.type == "cpu":
        # column-major: rows of a vocabulary, 128 KB apart, would map to the same cache lines
        return hidden.new_empty((vocabulary, tokens), dtype=dtype).t()
    return hidden.new_empty((tokens, vocabulary), dtype=dtype)


class _Tiles:
    """Logits of one tile of tokens at a time, and the gradients accumulated from those of the tiles."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        tile_size: int,
        dtype: torch.dtype,
        need_hidden: bool = False,
        need_weight: bool = False,
    ) -> None:
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.temperature = temperature
        self.statistics = statistics_dtype(dtype)
        # CUDA writes products of half precision in float32; elsewhere they are rounded and converted
        is_ampere = (
            hidden.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) >= (8,)
        )
        self.accumulates_wider = dtype != self.statistics and is_ampere and TorchVersion(torch.__version__) >= "2.8"
        tokens = hidden.shape[0]
        count = max(-(-tokens // tile_size), 1)
        # tiles of equal size on a CPU; a GPU runs fastest on those of round size
        self.tile_size = max(-(-tokens // count), 1) if hidden.device.type == "cpu" else tile_size
        self.buffer = _new_logits(hidden, min(self.tile_size, tokens), weight.shape[0], self.statistics)
        # gradients; one that is not needed stays empty
        self.need_hidden = need_hidden
        self.need_weight = need_weight
        self.hidden_gradient = self.hidden.new_empty(hidden.shape if need_hidden else (0,))
        self.weight_gradient = self.weight.new_zeros(weight.shape if need_weight else (0,), dtype=self.statistics)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], self.tile_size):
            yield slice(start, start + self.tile_size)

    def vector(self) -> Tensor:
        """Uninitialised vector with one entry a token, in the dtype of the statistics."""
        return self.hidden.new_empty(self.hidden.shape[0], dtype=self.statistics)

    def logits(self, tile: slice) -> Tensor:
        """Logits (t, v) over the temperature, in the buffer: the next call overwrites them."""
        hidden = self.hidden[tile]
        logits = self.buffer[: hidden.shape[0]]
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif self.accumulates_wider:
            torch.mm(hidden, self.weight.t(), out_dtype=logits.dtype, out=logits)
        else:
            logits.copy_(torch.mm(hidden, self.weight.t()))
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def backward(self, gradient: Tensor, tile: slice) -> None:
        """Propagates the gradient (t, v) of a tile's logits to hidden states and weight; may overwrite it."""
        if self.temperature != 1:
            gradient.div_(self.temperature)
        gradient = gradient.to(self.hidden.dtype)
        if self.need_hidden:
            torch.mm(gradient, self.weight, out=self.hidden_gradient[tile])
        if self.need_weight and gradient.dtype == self.statistics:
            self.weight_gradient.addmm_(gradient.t(), self.hidden[tile])
        elif self.need_weight and self.accumulates_wider:
            total, arguments = self.weight_gradient, (gradient.t(), self.hidden[tile])
            torch.addmm(total, *arguments, out_dtype=total.dtype, out=total)
        elif self.need_weight:
            self.weight_gradient.add_(torch.mm(gradient.t(), self.hidden[tile]))


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits (t, v) in place by exp(logits - best); returns best and the sum of each row, both (t, 1)."""
    best = logits.amax(dim=-1, keepdim=True)
    return best, logits.sub_(best).exp_().sum(dim=-1, keepdim=True)


@custom_op("lm_core::summed_cross_entropy", mutates_args=())
def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counted: Tensor,
    tile_size: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of counted tokens, and its gradients in ``hidden`` (m, d) and ``weight`` (v, d).

    The sum, not the mean: in float16 a gradient divided by the number of tokens would underflow before a loss scaler
    multiplies it.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = _Tiles(hidden, weight, 1.0, tile_size, dtype, need_hidden, need_weight)
        losses = tiles.vector()
        for tile in tiles:
            logits, label, kept = tiles.logits(tile), labels[tile, None], counted[tile, None]
            picked = logits.gather(1, label)
            best, total = _exponentials(logits)
            losses[tile] = torch.where(kept, best + total.log() - picked, 0)[:, 0]
            if need_hidden or need_weight:
                gradient = logits.mul_(kept / total).scatter_add_(1, label, -kept.to(logits.dtype))  # minus (1)
                tiles.backward(gradient, tile)
        return losses.sum(), tiles.hidden_gradient, tiles.weight_gradient


@summed_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, need_hidden, need_weight = rest[-3:]
    return (
        hidden.new_empty((), dtype=statistics_dtype(dtype)),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=statistics_dtype(dtype)),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight = inputs[:2]
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    # in float32, since a loss scale need not fit float16; not in place, since a retained graph may run this again
    hidden, weight = (
        (gradient * upstream).to(dtype) if needed and upstream is not None else None
        for needed, gradient, dtype in zip(ctx.needs_input_grad[:2], ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return hidden, weight, None, None, None, None, None, None


summed_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)


@custom_op("lm_core::token_scores", mutates_args=())
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tile_size: int,
    dtype: torch.dtype,
    with_entropy: bool,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each label, entropy (empty unless requested), log of the softmax's denominator: all (m,).

    ``keep_logits``, if one tile holds all tokens, also returns their logits (m, v) for the backward; otherwise empty.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = _Tiles(hidden, weight, temperature, tile_size, dtype)
        log_probs, denominators = tiles.vector(), tiles.vector()
        entropies = tiles.vector() if with_entropy else denominators.new_empty(0)
        kept = denominators.new_empty(0)
        for tile in tiles:
            logits = tiles.logits(tile)
            picked = logits.gather(1, labels[tile, None])
            if keep_logits:
                kept = logits.clone()
            original = logits.clone() if with_entropy else logits
            best, total = _exponentials(logits)
            if with_entropy:
                mean = logits.mul_(original.sub_(best)).sum(dim=-1, keepdim=True) / total
                entropies[tile] = (total.log() - mean)[:, 0]
            denominators[tile] = (best + total.log())[:, 0]
            log_probs[tile] = picked[:, 0] - denominators[tile]
        return log_probs, entropies, denominators, kept


@token_scores.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, dtype, with_entropy, keep_logits = settings
    scores = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(dtype))
    kept = _new_logits(hidden, hidden.shape[0], weight.shape[0], scores.dtype) if keep_logits else scores.new_empty(0)
    return scores, torch.empty_like(scores) if with_entropy else scores.new_empty(0), torch.empty_like(scores), kept


@custom_op("lm_core::token_scores_backward", mutates_args=())
def token_scores_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    entropies: Tensor,
    denominators: Tensor,
    kept: Tensor,
    log_prob_gradient: Tensor,
    entropy_gradient: Tensor,
    temperature: float,
    tile_size: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in ``hidden`` and ``weight`` from those in the scores; ``kept`` and entropy tensors may be empty."""
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = _Tiles(hidden, weight, temperature, tile_size, dtype, need_hidden, need_weight)
        for tile in tiles:
            upstream = log_prob_gradient[tile, None]
            logits = kept if kept.numel() else tiles.logits(tile)
            gradient = torch.sub(logits, denominators[tile, None], out=tiles.buffer[: len(logits)])  # log p
            if entropy_gradient.numel() > 0:
                p = gradient.exp()
                gradient.add_(entropies[tile, None]).mul_(entropy_gradient[tile, None]).add_(upstream).mul_(p).neg_()
            else:
                gradient.exp_().mul_(-upstream)
            gradient.scatter_add_(1, labels[tile, None], upstream)  # (1) times upstream, plus (2) times its own
            tiles.backward(gradient, tile)
        return tiles.hidden_gradient, tiles.weight_gradient.to(weight.dtype)


@token_scores_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype, need_hidden, need_weight = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.settings = inputs[3:6]  # temperature, tile size, dtype
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward_of_scores(
    ctx: Any, log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once, as gradient checkpointing requires
    hidden, _, _, _, denominators, _ = saved
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    hidden_gradient, weight_gradient = token_scores_backward(
        *saved,
        torch.zeros_like(denominators) if log_prob_gradient is None else log_prob_gradient,
        denominators.new_empty(0) if entropy_gradient is None else entropy_gradient,
        *ctx.settings,
        need_hidden,
        need_weight,
    )
    return (
        hidden_gradient.to(hidden.dtype) if need_hidden else None,
        weight_gradient if need_weight else None,
        *[None] * 6,
    )


token_scores.register_autograd(_backward_of_scores, setup_context=_save_scores)
