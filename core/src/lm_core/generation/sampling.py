"""Next-token selection: filters over logits, the repetition penalty, and Gumbel-max sampling.

A filter takes logits ``(..., v)`` and returns new logits in which the removed entries are ``-inf``; it never writes to
its input and always keeps the most likely entry. Filters compose in any order; divide by the temperature BEFORE a
filter that looks at probabilities (top-p, min-p), since the temperature changes which tokens make up the nucleus.

- top-k: Fan et al. 2018, arXiv 1805.04833. Ties with the k-th entry are all kept.
- top-p (nucleus): Holtzman et al. 2020, arXiv 1904.09751. The smallest set of most likely tokens whose mass reaches p.
- min-p: Nguyen et al. 2024, arXiv 2407.01082. Tokens at least ``min_p`` times as likely as the most likely one.
- no repeated n-grams: Paulus et al. 2017, arXiv 1705.04304, section 2.5.
- repetition penalty: Keskar et al. 2019, arXiv 1909.05858, section 4.1, once per distinct token.
- Gumbel-max: ``argmax(logits + temperature * noise)`` is a draw from ``softmax(logits / temperature)``.

Probabilities and noise are computed in float32 (float64 for float64 logits): in bfloat16 a uniform draw has 8 bits, so
a token of probability 0.001 would be drawn far too rarely or far too often.

Numbers are annotated ``float | int``, so that the run-time checker of the tests accepts 0 and 1 too.

Legend: b batch, n sequence, v vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.checks import check_ids
from lm_core.nn.norms import statistics_dtype


def _check_number(
    value: float | int, name: str, *, low: int, high: float | int = math.inf, open_low: bool = False
) -> None:
    expected = f"a number in {'(' if open_low else '['}{low}, {high}{')' if high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    # the comparisons are written so that NaN fails them
    above = value > low if open_low else value >= low
    below = value < high if high == math.inf else value <= high
    if not (above and below):
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_count(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def _check_logits(logits: Tensor, dim: int = -1) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got dtype {logits.dtype}")
    if logits.ndim == 0 or logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one entry along dimension {dim}, got shape {tuple(logits.shape)}")
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or logits.numel() == 0:
        return
    greatest = logits.detach().amax(dim=dim)
    worst = float(greatest if greatest.numel() == 1 else greatest.min())  # NaN if any entry is
    if math.isnan(worst):
        raise ValueError("logits must not hold NaN")
    if worst == -math.inf:
        raise ValueError("logits must leave at least one entry above -inf in every row")


def top_k(logits: Float[Tensor, "*b v"], thres: float | int = 0.9, *, k: int | None = None) -> Float[Tensor, "*b v"]:
    """Keeps the ``k`` largest logits of each row, and all that tie with the smallest of them.

    Args:
        logits: shape (..., v).
        thres: fraction of the vocabulary to remove; ``ceil((1 - thres) * v)`` entries stay.
        k: number of entries to keep, in place of ``thres``; more than v keeps all.

    Raises:
        ValueError: ``thres`` outside [0, 1], ``k`` below 1, or NaN in the logits.
    """
    _check_logits(logits)
    vocabulary = logits.shape[-1]
    if k is None:
        _check_number(thres, "thres", low=0, high=1)
        k = max(math.ceil((1 - thres) * vocabulary), 1)
    else:
        _check_count(k, "k")
    if k >= vocabulary:
        return logits.clone()
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def top_p(
    logits: Float[Tensor, "*b v"], thres: float | int = 0.9, *, p: float | int | None = None
) -> Float[Tensor, "*b v"]:
    """Keeps the nucleus: the smallest set of most likely tokens whose probabilities sum to at least ``thres``.

    Args:
        logits: shape (..., v), already divided by the temperature.
        thres: mass to keep; 0 keeps the most likely token only, 1 keeps every token of nonzero probability.
        p: the same under its usual name; takes precedence over ``thres``.

    Raises:
        ValueError: the mass is outside [0, 1], or NaN in the logits.
    """
    _check_logits(logits)
    mass = thres if p is None else p
    _check_number(mass, "thres" if p is None else "p", low=0, high=1)
    # ascending, so that the many small probabilities are summed before the large ones swallow them
    ordered, order = logits.sort(dim=-1, descending=False)
    tail = ordered.softmax(dim=-1, dtype=statistics_dtype(logits.dtype)).cumsum(dim=-1)
    remove = tail <= 1 - mass
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -math.inf)


def min_p(logits: Float[Tensor, "*b v"], min_p: float | int = 0.1) -> Float[Tensor, "*b v"]:
    """Keeps tokens at least ``min_p`` times as likely as the most likely one.

    Args:
        logits: shape (..., v), already divided by the temperature.
        min_p: ratio in [0, 1]; 0 keeps all.

    Raises:
        ValueError: ``min_p`` outside [0, 1], or NaN in the logits.
    """
    _check_logits(logits)
    _check_number(min_p, "min_p", low=0, high=1)
    probabilities = logits.softmax(dim=-1, dtype=statistics_dtype(logits.dtype))
    floor = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, -math.inf)


# by the keyword argument of the value
_FILTERS: dict[str, Callable[..., Tensor]] = {"k": top_k, "p": top_p, "min_p": min_p}


def filters_of(
    *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> list[Callable[[Tensor], Tensor]]:
    """The filters with these arguments, in this order, without those that are None.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type.
    """
    if top_k is not None:
        _check_count(top_k, "top_k")
    for value, name in ((top_p, "top_p"), (min_p, "min_p")):
        if value is not None:
            _check_number(value, name, low=0, high=1)
    chosen = zip(_FILTERS.items(), (top_k, top_p, min_p), strict=True)
    return [partial(filter_, **{argument: value}) for (argument, filter_), value in chosen if value is not None]


def apply_repetition_penalty(
    logits: Float[Tensor, "b v"],
    ids: Int[Tensor, "b n"],
    penalty: float | int,
    mask: Tensor | None = None,
) -> Float[Tensor, "b v"]:
    """Makes tokens that already occurred less likely: positive logits are divided by ``penalty``, negative multiplied.

    Args:
        logits: shape (b, v).
        ids: tokens seen so far, shape (b, n); a token counts once however often it occurs.
        penalty: above 0; 1 changes nothing, below 1 encourages repetition.
        mask: boolean, shape (b, n), True at real tokens; the others are not read.

    Raises:
        ValueError: ``penalty`` not above 0, shapes that do not match, an id outside the vocabulary.
    """
    _check_logits(logits)
    _check_number(penalty, "penalty", low=0, open_low=True)
    if ids.ndim != 2 or logits.ndim != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be (b, n) for logits (b, v), got {tuple(ids.shape)} and {tuple(logits.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask must have the shape of ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    batch, vocabulary = logits.shape
    if ids.device.type == "cpu":
        check_ids(ids if mask is None else ids.masked_fill(~mask, 0), vocabulary, "ids")
    # masked ids go to an extra column past the vocabulary, which is then dropped
    columns = ids.long() if mask is None else ids.long().masked_fill(~mask, vocabulary)
    seen = logits.new_zeros((batch, vocabulary + 1), dtype=torch.bool).scatter_(1, columns, True)[:, :vocabulary]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_repeated_ngrams(
    logits: Float[Tensor, "b v"], ids: Int[Tensor, "b n"], size: int, mask: Tensor | None = None
) -> Float[Tensor, "b v"]:
    """Excludes the tokens that would complete an n-gram which a row already has (arXiv 1705.04304, section 2.5).

    Args:
        logits: shape (b, v).
        ids: tokens seen so far, the newest last, shape (b, n).
        size: tokens of an n-gram.
        mask: boolean, shape (b, n), True at real tokens; n-grams with another are not counted.

    Raises:
        ValueError: ``size`` below 1.
    """
    _check_count(size, "size")
    if ids.shape[1] < size:
        return logits
    grams = ids.unfold(1, size, 1)  # (b, n - size + 1, size)
    newest = ids[:, ids.shape[1] - size + 1 :].unsqueeze(1)
    repeated = (grams[..., :-1] == newest).all(dim=-1)
    if mask is not None:
        is_whole = mask.unfold(1, size, 1).all(dim=-1)
        repeated = repeated & is_whole & mask[:, ids.shape[1] - size + 1 :].all(dim=-1, keepdim=True)
    # other n-grams go to an extra column past the vocabulary, which is then dropped
    batch, vocabulary = logits.shape
    columns = grams[..., -1].masked_fill(~repeated, vocabulary)
    forbidden = logits.new_zeros((batch, vocabulary + 1), dtype=torch.bool).scatter_(1, columns, True)
    return logits.masked_fill(forbidden[:, :vocabulary], -math.inf)


def gumbel_noise(t: Float[Tensor, "*shape"], generator: torch.Generator | None = None) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise ``-log(-log(u))`` of the shape of ``t``, finite everywhere.

    Args:
        t: tensor whose shape and device the noise takes.
        generator: source of the draws, made on its device, so that a CPU seed gives the same noise everywhere.

    Returns:
        float32 noise, or float64 when ``t`` is float64.
    """
    dtype = statistics_dtype(t.dtype)
    device = t.device if generator is None else generator.device
    uniform = torch.rand(t.shape, dtype=dtype, device=device, generator=generator).to(t.device)
    # u = 0 would give -inf; 1 is never drawn, and the largest float32 below it gives noise of about 16.6
    uniform = uniform.clamp_(min=torch.finfo(dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def gumbel_sample(
    logits: Tensor,
    temperature: float | int = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws an index from ``softmax(logits / temperature)`` along ``dim``.

    Args:
        logits: floating point, any shape; -inf entries are never drawn.
        temperature: divisor of the logits; 0 takes the most likely entry (the first of equals) without a draw.
        dim: the vocabulary's dimension, absent from the result.
        generator: source of randomness; equal states give equal draws.

    Returns:
        int64 indices, the shape of ``logits`` without ``dim``.

    Raises:
        ValueError: negative, infinite or NaN temperature; a row with NaN, or with only -inf.
    """
    _check_number(temperature, "temperature", low=0)
    _check_logits(logits, dim)
    if temperature == 0:
        return logits.argmax(dim=dim)
    # scaling the noise up, not the logits down, cannot overflow at small temperatures
    noise = gumbel_noise(logits, generator).mul_(temperature)
    return noise.add_(logits.detach()).argmax(dim=dim)
