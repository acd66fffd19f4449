"""Cross-entropy and log-probabilities of an output layer that never materialise its ``(b * n, v)`` logits.

- :func:`linear_cross_entropy` equals ``F.cross_entropy(hidden @ weight.T, labels)`` in value and gradients.
- :func:`hidden_log_probs` and :func:`hidden_log_probs_and_entropy` score tokens from hidden states,
  :func:`token_log_probs` from a model. Logits at position i score token i + 1, so n tokens have n - 1 scores.

All are computed in tiles of tokens by :mod:`lm_core.losses.output_layer`: extra memory is one tile of logits and the
gradients, for sequences of any length. Results are float32, or float64 for float64 input. Under autocast the
matrix products run in its dtype. Ignored tokens cost nothing on a CPU: they are dropped before the first product.

On CUDA, :func:`linear_cross_entropy` with "mean" or "sum" uses the fused Triton kernels of Liger-Kernel
(arXiv 2410.10989) where they are installed (the extra ``kernels``); such a loss takes one backward.
``F.linear_cross_entropy`` of torch 2.13 is another such loss: by default it holds the full logits, and its chunked form
has no divisor other than the number of labels; BENCHMARKS.md compares.

Legend: b batch, n sequence, d feature, v vocabulary.
"""

import functools
import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.checks import check_ids
from lm_core.losses.output_layer import summed_cross_entropy, token_scores
from lm_core.nn.norms import statistics_dtype

# With tiles half as large the products are a few per cent slower; tiles twice as large gain nothing.
CPU_TILE_BYTES = 64 * 2**20
ACCELERATOR_TILE_BYTES = 256 * 2**20
_ACCELERATOR_TOKENS = 256  # a GPU multiplies in blocks of at most as many rows, so tiles are multiples of it
_IGNORED = -100  # label that the fused kernels ignore


def _tile_size(weight: Tensor, chunk_size: int | None) -> int:
    """Tokens in a tile: as many as fit the budget, or a quarter of the memory of the weight's gradient."""
    if chunk_size is None:
        vocabulary, features = weight.shape
        on_cpu = weight.device.type == "cpu"
        budget = CPU_TILE_BYTES if on_cpu else ACCELERATOR_TILE_BYTES
        size = max(budget // (4 * max(vocabulary, 1)), features // 4, 1)
        return size if on_cpu else -(-size // _ACCELERATOR_TOKENS) * _ACCELERATOR_TOKENS
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an integer of at least 1 or None, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1 or None, got {chunk_size}")
    return chunk_size


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    return hidden.dtype


def _check_layer(hidden: Tensor, weight: Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got dtype {tensor.dtype}")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be (v, d) with v at least 1, got shape {tuple(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must end in weight's {weight.shape[1]} features, got shape {tuple(hidden.shape)}")


def _check_temperature(temperature: float | int) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (float, int)):
        raise TypeError(f"temperature must be a number above 0, got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    return float(temperature)


def _check_mask(mask: Tensor | None, ids: Tensor) -> None:
    if ids.ndim != 2:
        raise ValueError(f"ids must be (b, n), got shape {tuple(ids.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask must have the shape of ids {tuple(ids.shape)}, got {tuple(mask.shape)}")


def _next_tokens(ids: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Targets of positions 0 to n - 2, and a mask of those where both position and target are real tokens."""
    labels = ids[:, 1:]
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, :-1] & mask[:, 1:]
    return _valid_labels(labels, counted, vocabulary, "ids"), counted


def _valid_labels(labels: Tensor, counted: Tensor, vocabulary: int, name: str) -> Tensor:
    """int64 labels with 0 at ignored positions; on a CPU the others are checked."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(labels[counted], vocabulary, name)
    return labels.long().masked_fill(~counted, 0)


def _drop_uncounted(hidden: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat hidden states, labels and mask of the tokens to score: on a CPU, only those that count."""
    hidden, labels, counted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), counted.reshape(-1)
    # elsewhere the data-dependent shape would make the host wait for the device
    if hidden.device.type != "cpu" or torch.compiler.is_compiling() or bool(counted.all()):
        return hidden, labels, counted
    return hidden[counted], labels[counted], counted[counted]


def _score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counted: Tensor,
    temperature: float,
    chunk_size: int | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in the shape of ``labels``, 0 at ignored positions."""
    dtype = _product_dtype(hidden, weight)
    rows, targets, kept = _drop_uncounted(hidden, labels, counted)
    tile_size = _tile_size(weight, chunk_size)
    differentiated = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    keep_logits = differentiated and rows.shape[0] <= tile_size
    log_probs, entropies, *_ = token_scores(
        rows, weight, targets, temperature, tile_size, dtype, with_entropy, keep_logits
    )

    def scattered(scores: Tensor) -> Tensor:
        if kept.shape[0] == counted.numel():
            return torch.where(counted, scores.reshape(counted.shape), 0)
        return scores.new_zeros(counted.shape).masked_scatter(counted, scores)

    return scattered(log_probs), scattered(entropies) if with_entropy else entropies


def linear_cross_entropy(
    hidden: Float[Tensor, "*shape d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "*shape"],
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_size: int | None = None,
    normalizer: float | int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the logits ``hidden @ weight.T``, which are never materialised.

    Positions are not shifted: ``labels[i]`` is the target of ``hidden[i]``. When no label counts the result is 0 with
    zero gradients.

    Args:
        hidden: final hidden states, shape (..., d).
        weight: the output layer's weight, shape (v, d); it may be the embedding's too.
        labels: targets in [0, v), or ``ignore_index`` where there is none, shape (...).
        ignore_index: label of positions that do not count.
        reduction: "mean" over the positions that count, "sum", or "none". The first two take three matrix products for
            forward and backward together, "none" takes four.
        chunk_size: tokens scored at a time by our own operators; None chooses by memory, and takes the fused kernels
            where there are any.
        normalizer: divisor of the sum under "mean", in place of the number of positions that count, for instance their
            number over all ranks and accumulation steps; no gradient flows into it. 0 only where no label counts.

    Returns:
        A scalar, or the shape of ``labels`` for "none" (0 where ignored); in nats.

    Raises:
        TypeError: ``hidden`` or ``weight`` not floating point, ``labels`` not integers; two dtypes outside autocast.
        ValueError: shapes that do not match, a label outside [0, v), an unknown reduction, a chunk size below 1, a
            normalizer that is negative or not finite.
    """
    _check_layer(hidden, weight)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have hidden's shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'normalizer goes with reduction "mean" only, got reduction {reduction!r}')
    dtype, tile_size = _product_dtype(hidden, weight), _tile_size(weight, chunk_size)
    counted = labels != ignore_index
    labels = _valid_labels(labels, counted, weight.shape[0], "labels")
    if reduction == "none":
        log_probs, _ = _score(hidden, weight, labels, counted, 1.0, chunk_size, with_entropy=False)
        return -log_probs
    # one operator computes the sum and, already in the forward, its gradients
    divisor = _divisor(counted, normalizer)
    if chunk_size is None and _has_fused_kernel(hidden, weight, dtype):
        total = _fused_cross_entropy(hidden, weight, labels, counted, dtype)
        return total / divisor.to(total) if reduction == "mean" else total
    rows, targets, kept = _drop_uncounted(hidden, labels, counted)
    need_hidden, need_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    total, _, _ = summed_cross_entropy(rows, weight, targets, kept, tile_size, dtype, need_hidden, need_weight)
    return total / divisor.to(total) if reduction == "mean" else total


@functools.cache
def _liger_loss() -> Any:
    """Liger-Kernel's summed loss of (weight, hidden, labels), or None where it is not installed."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(ignore_index=_IGNORED, reduction="sum", accum_dtype=torch.float32)


def _has_fused_kernel(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    if not hidden.is_cuda or hidden.numel() == 0 or dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    # the kernels compute no gradient of the weight unless they compute that of the hidden states
    return (hidden.requires_grad or not weight.requires_grad) and _liger_loss() is not None


def _fused_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the losses of counted tokens, by the fused kernels."""
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    targets = labels.masked_fill(~counted, _IGNORED).reshape(-1)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _liger_loss()(weight.to(dtype), rows, targets)
    return total.float()


def _divisor(counted: Tensor, normalizer: float | int | Tensor | None) -> Tensor:
    """Divisor of a mean, never 0."""
    divisor = counted.sum() if normalizer is None else torch.as_tensor(normalizer).detach()
    if divisor.ndim > 0:
        raise ValueError(f"normalizer must be one number, got shape {tuple(divisor.shape)}")
    if divisor.device.type == "cpu" and not torch.compiler.is_compiling():
        value = float(divisor)
        if not 0 <= value < math.inf or (value == 0 and bool(counted.any())):
            raise ValueError(f"normalizer must be a finite number above 0, got {value}")
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def hidden_log_probs(
    hidden: Float[Tensor, "b n d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    temperature: float | int = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "b n-1"]:
    """Log-probability of each token but the first, given the hidden state of the position before it.

    Forward and backward hold one tile of logits at a time; the backward recomputes them, unless one tile holds all.

    Args:
        hidden: final hidden states, shape (b, n, d); the last position is not used.
        weight: the output layer's weight, shape (v, d).
        ids: the tokens, shape (b, n).
        mask: True at real tokens, shape (b, n); a score whose position or target is padding is 0, without gradient.
        temperature: divisor of the logits, above 0.
        chunk_size: tokens scored at a time; None chooses by memory.

    Returns:
        ``log softmax(hidden[:, i] @ weight.T / temperature)[ids[:, i + 1]]``, shape (b, n - 1), in nats.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not match, an id outside [0, v), a temperature that is not above 0.
    """
    return _shifted_scores(hidden, weight, ids, mask, temperature, chunk_size, with_entropy=False)[0]


def hidden_log_probs_and_entropy(
    hidden: Float[Tensor, "b n d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    temperature: float | int = 1.0,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b n-1"], Float[Tensor, "b n-1"]]:
    """:func:`hidden_log_probs` and the entropy of each predicted distribution; both are differentiable.

    Arguments and errors are those of :func:`hidden_log_probs`. A second tile-sized buffer is used.

    Returns:
        Log-probabilities and entropies, both (b, n - 1), in nats, at ``temperature``.
    """
    return _shifted_scores(hidden, weight, ids, mask, temperature, chunk_size, with_entropy=True)


def _shifted_scores(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float | int,
    chunk_size: int | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    temperature = _check_temperature(temperature)
    _check_layer(hidden, weight)
    _check_mask(mask, ids)
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"hidden must be (b, n, d) for ids {tuple(ids.shape)}, got shape {tuple(hidden.shape)}")
    labels, counted = _next_tokens(ids, mask, weight.shape[0])
    return _score(hidden[:, :-1], weight, labels, counted, temperature, chunk_size, with_entropy=with_entropy)


def token_log_probs(
    model: Any,
    ids: Int[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    temperature: float | int = 1.0,
    **model_kwargs: Any,
) -> Float[Tensor, "b n-1"]:
    """Log-probability of each token but the first under a causal language model.

    A model with ``hidden`` and ``output_weight`` is scored through :func:`hidden_log_probs`, without full logits; any
    other is called as ``model(ids)``, which returns them.

    Args:
        model: model in its current mode (train or eval).
        ids: the tokens, shape (b, n).
        mask: True at real tokens, shape (b, n), also passed to the model; a score whose position or target is padding
            is 0, without gradient.
        temperature: divisor of the logits, above 0.
        **model_kwargs: further arguments of the model.

    Returns:
        Shape (b, n - 1), in nats; minus their sum is the summed cross-entropy of the shifted logits.

    Raises:
        TypeError: the model does not return a tensor; a wrong dtype.
        ValueError: shapes that do not match, an id outside the vocabulary, a temperature that is not above 0.
    """
    temperature = _check_temperature(temperature)
    _check_mask(mask, ids)
    if mask is not None:
        model_kwargs["mask"] = mask
    # from hidden states, if the model has them
    weight = getattr(model, "output_weight", None)
    if isinstance(weight, Tensor) and callable(getattr(model, "hidden", None)):
        _next_tokens(ids, mask, weight.shape[0])  # rejects wrong ids before the model's forward
        hidden = model.hidden(ids, **model_kwargs)
        return hidden_log_probs(hidden, weight, ids, mask=mask, temperature=temperature)
    # from full logits
    logits = model(ids, **model_kwargs)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits (b, n, v), got {type(logits).__name__}; see as_causal_lm")
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"model must return logits (b, n, v) for ids {tuple(ids.shape)}, got {tuple(logits.shape)}")
    labels, counted = _next_tokens(ids, mask, logits.shape[-1])
    scaled = logits[:, :-1].to(statistics_dtype(logits.dtype))
    if temperature != 1:
        scaled = scaled / temperature
    log_probs = scaled.gather(-1, labels[..., None])[..., 0] - scaled.logsumexp(dim=-1)
    return torch.where(counted, log_probs, 0)
