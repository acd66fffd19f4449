"""Exact nearest neighbours by inner product, in chunks, without materialising the whole score matrix.

Selecting ``k`` of ``c`` scores costs more than the product that computes them. So the scores of a chunk are split into
groups and reduced to group maxima (one vectorised pass); single scores are compared only in groups whose maximum
exceeds a bound. In the first chunk the bound is just below the ``k``-th greatest of the maxima of some hundred wide
groups: at least ``k`` scores exceed it, and few more if they are random. After that it is the lowest of the best ``k``
so far, which few scores exceed. Groups are strided, so that the maximum runs over an outer dimension.

``screened_top_k`` computes the same through products in bfloat16, where the processor has them: it keeps more than
``k`` keys of each query by those scores, rescores them exactly, and proves by a bound on the rounding error that no
other key can be among the ``k`` best. Queries for which the proof fails are searched exactly.

Legend: q queries, c keys of a chunk, d feature, k neighbours, w keys kept of a query, m most new ones of a query.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

# A tile of scores fits into a CPU's cache; an accelerator is faster with few large products.
CPU_CHUNK, CPU_TILE = 4096, 256
SCREENED_CHUNK = 8192  # scores in bfloat16 are half as large
ACCELERATOR_TILE = 4096
ACCELERATOR_SCORES = 2**28  # scores of a chunk, for all rows and queries
ACCELERATOR_GROUP = 16
GROUP = 8  # scores in a group
WIDE_GROUPS = 4  # times k: groups of the first chunk whose maxima determine the bound
KEEP = 2  # times k: keys kept for a query by their scores in bfloat16
FEWEST_SCREENED = 128  # queries; with fewer, rounding the keys takes longer than it saves


def worth_screening(queries: Float[Tensor, "q d"], keys: int) -> bool:
    """True if ``screened_top_k`` is faster: many queries, and a CPU with bfloat16 products."""
    if queries.device.type != "cpu" or len(queries) < FEWEST_SCREENED or keys <= CPU_CHUNK:
        return False
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and bool(has_instructions())


def exact_top_k(
    queries: Float[Tensor, "q d"], chunks: Iterable[tuple[int, Tensor]], k: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The ``k`` keys with the greatest inner product with each query, greatest first.

    Args:
        queries: queries in the dtype of the computation, on a CPU float32 or float64.
        chunks: ``(index of the first key, keys (c, d))``, at least one; indices may have gaps between chunks.
        k: number of neighbours, at least 1.

    Returns:
        Scores and indices of the keys, padded with -inf and 0 where there are fewer than ``k`` keys.
    """
    kept = _running_top(queries, chunks, k)
    return _sorted_and_padded(kept.scores, kept.numbers, k)


def batched_top_k(
    queries: Float[Tensor, "r q d"], chunks: Iterable[tuple[int, Tensor, Tensor | None]], k: int
) -> tuple[Float[Tensor, "r q k"], Int[Tensor, "r q k"]]:
    """``exact_top_k`` for all rows in one product a chunk, without a number that the host waits for.

    The k best scores lie in the k groups of the greatest maxima, so only these are compared one by one.

    Args:
        queries: queries of each row, in the dtype of the computation.
        chunks: ``(index of the first key, keys (r, c, d), mask (r, c) of those that exist or None for all)``.
        k: number of neighbours, at least 1.

    Returns:
        Scores and indices of the keys, greatest first, with -inf where a row has fewer than ``k`` keys.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for first, keys, exists in chunks:
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if exists is not None:
            scores.masked_fill_(~exists.unsqueeze(1), -math.inf)
        c = scores.shape[-1]
        groups = c // ACCELERATOR_GROUP
        if groups <= k:
            best = scores.topk(min(k, c), dim=-1)
            parts.append((best.values, best.indices + first))
            continue
        # element g + j * groups belongs to group g
        whole = groups * ACCELERATOR_GROUP
        maxima = scores[..., :whole].unflatten(-1, (ACCELERATOR_GROUP, groups)).amax(dim=-2)
        chosen = maxima.topk(k, dim=-1, sorted=False).indices
        members = groups * torch.arange(ACCELERATOR_GROUP, device=scores.device)
        numbers = (chosen.unsqueeze(-1) + members).flatten(-2)
        if whole < c:
            tail = torch.arange(whole, c, device=scores.device).expand(*numbers.shape[:-1], -1)
            numbers = torch.cat((numbers, tail), dim=-1)
        best = scores.gather(-1, numbers).topk(k, dim=-1)
        parts.append((best.values, numbers.gather(-1, best.indices) + first))
    values, numbers = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    best = values.topk(min(k, values.shape[-1]), dim=-1)
    missing = k - best.values.shape[-1]
    return (
        torch.nn.functional.pad(best.values, (0, missing), value=-math.inf),
        torch.nn.functional.pad(numbers.gather(-1, best.indices), (0, missing)),
    )


def screened_top_k(
    queries: Float[Tensor, "q d"],
    chunks: Callable[[], Iterable[tuple[int, Tensor]]],
    k: int,
    products: Callable[[Float[Tensor, "q d"], Int[Tensor, "q w"]], Float[Tensor, "q w"]],
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Computes ``exact_top_k``, screened through products in bfloat16.

    Args:
        queries: as for ``exact_top_k``.
        chunks: returns the chunks, in the dtype of the queries.
        k: number of neighbours, at least 1.
        products: returns the products of each query with the keys at some indices, in the queries' dtype.
    """
    coarse = queries.bfloat16()
    # greatest norm of a key, and of its rounding error
    longest = farthest = queries.new_zeros(())

    def rounded() -> Iterator[tuple[int, Tensor]]:
        nonlocal longest, farthest
        for first, keys in chunks():
            short = keys.bfloat16()
            longest = torch.maximum(longest, _norms(keys).amax())
            farthest = torch.maximum(farthest, _norms(short.to(keys.dtype).sub_(keys)).amax())
            yield first, short

    kept = _running_top(coarse, rounded(), KEEP * k, as_codes=True)
    again = products(queries, kept.numbers)
    filler = kept.scores == _lowest(kept.scores)
    scores, numbers = _sorted_and_padded(again.masked_fill_(filler, -math.inf), kept.numbers, k)
    errors = _greatest_errors(queries, coarse, longest, farthest)
    # The rounded score of a key that was not kept is at most `least`, if that is not negative (negative codes are not
    # in order, but lower). So before rounding it was at most halfway to the next number.
    low, high = (code.view(torch.bfloat16).to(scores.dtype) for code in (kept.least, kept.least + 1))
    is_proven = (kept.least >= 0) & ((low + high) / 2 + errors < scores[:, k - 1])
    unproven = (~is_proven).nonzero().squeeze(1)
    if len(unproven):
        scores[unproven], numbers[unproven] = exact_top_k(queries[unproven], chunks(), k)
    return scores, numbers


def own_products(
    queries: Float[Tensor, "q d"], keys: Float[Tensor, "c d"], numbers: Int[Tensor, "q w"]
) -> Float[Tensor, "q w"]:
    """Products of each query with the keys at its own indices, on a CPU, without copying the keys."""
    q, w = numbers.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        places = torch.sparse_csr_tensor(
            w * torch.arange(q + 1), numbers.flatten(), queries.new_zeros(q * w), (q, len(keys)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(places, queries, keys.t(), beta=0.0).values().view(q, w)


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1)


def _greatest_errors(
    queries: Float[Tensor, "q d"], coarse: Float[Tensor, "q d"], longest: Tensor, farthest: Tensor
) -> Float[Tensor, " q"]:
    """Bound on the difference between a query's scores and the products of ``coarse`` queries and keys, unrounded.

    It adds the rounding error of each factor times the norm of the other (Cauchy-Schwarz), the error of sums of ``d``
    numbers in float32, on both sides, and numbers that the processor flushes to 0. The factor 1.001 covers the
    rounding of the norms themselves.
    """
    d, single, norms = queries.shape[1], torch.finfo(torch.float32), _norms(queries)
    rounded_off = _norms(queries - coarse) * longest + _norms(coarse.to(queries.dtype)) * farthest
    sums = 2 * d * (single.eps * norms * longest + single.tiny * (1 + norms + longest))
    return 1.001 * (rounded_off + sums)


def _sorted_and_padded(scores: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = _greatest(scores, min(k, scores.shape[1]), in_order=True)
    return _widened(scores.gather(1, best), k, -math.inf), _widened(numbers.gather(1, best), k, 0)


def _greatest(scores: Real[Tensor, "q c"], k: int, *, in_order: bool = False) -> Int[Tensor, "q k"]:
    """Indices of the ``k`` greatest scores of each query, NaN first; on a CPU by numpy, in a third of the time."""
    if scores.device.type != "cpu":
        return scores.topk(k, dim=1, sorted=in_order).indices
    wide = scores.int() if scores.dtype == torch.int16 else scores  # numpy has no fast code for int16
    if in_order:
        return torch.from_numpy(np.argsort(wide.numpy(), axis=1)[:, wide.shape[1] - k :]).flip(1)
    at = wide.shape[1] - k
    return torch.from_numpy(np.argpartition(wide.numpy(), at, axis=1)[:, at:])


class _Kept(NamedTuple):
    """The keys of each query that may be among the k best so far.

    Attributes:
        scores: ``(q, w)``, padded with the lowest number of the dtype where a query has fewer keys.
        numbers: indices of the keys, ``(q, w)``.
        least: ``(q,)`` upper bound on the scores of all other keys; the lowest number where there are none.
    """

    scores: Tensor
    numbers: Tensor
    least: Tensor


def _running_top(queries: Tensor, chunks: Iterable[tuple[int, Tensor]], k: int, *, as_codes: bool = False) -> _Kept:
    """At least the ``k`` best products of queries and keys, or all if there are fewer, unsorted.

    With ``as_codes`` scores in bfloat16 are compared as integers: these have the order of the scores where they are
    not negative, and are negative elsewhere. A maximum of integers takes a quarter of the time of one of bfloat16.
    """
    tiles = queries.split(CPU_TILE if queries.device.type == "cpu" else ACCELERATOR_TILE)
    kept: list[_Kept | None] = [None] * len(tiles)
    for first, keys in chunks:
        for index, part in enumerate(tiles):
            scores = torch.mm(part, keys.t(), out=_scratch_buffer(len(part), len(keys), queries))
            kept[index] = _improved(kept[index], scores.view(torch.int16) if as_codes else scores, first, k)
    done = [tile for tile in kept if tile is not None]
    w = max(tile.numbers.shape[1] for tile in done)
    return _Kept(
        torch.cat([_widened(tile.scores, w, _lowest(tile.scores)) for tile in done]),
        torch.cat([_widened(tile.numbers, w, 0) for tile in done]),
        torch.cat([tile.least for tile in done]),
    )


_scratch = threading.local()


def _scratch_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised memory for a product; on a CPU, one buffer for each thread.

    Fresh memory is slow on a CPU: of 16 ms for 8,192 keys, mapping its pages took 2.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    size = rows * columns * like.itemsize
    buffer: Tensor | None = getattr(_scratch, "memory", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a buffer made in that mode could not be written to outside of it
            buffer = _scratch.memory = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(like.dtype).view(rows, columns)


def _improved(earlier: _Kept | None, scores: Real[Tensor, "q c"], first: int, k: int) -> _Kept:
    """``earlier`` updated with the scores of a further chunk, whose first key has the index ``first``."""
    q, c = scores.shape
    groups = c // GROUP
    so_far = None if earlier is None or earlier.scores.shape[1] < k else earlier
    if groups == 0 or (groups < k and so_far is None):
        return _best_of(earlier, scores, torch.arange(first, first + c, device=scores.device).expand(q, c), k)
    # a bound that at least k scores reach
    whole = groups * GROUP
    # element g + j * groups belongs to group g
    cube = scores[:, :whole].unflatten(1, (GROUP, groups))
    maxima = cube.amax(dim=1)
    if so_far is not None:
        bound = so_far.least.unsqueeze(1)
    else:
        joined = max(1, groups // (WIDE_GROUPS * k))
        wide = maxima[:, : groups - groups % joined].unflatten(1, (joined, -1)).amax(dim=1)
        # a score reaches the bound if it exceeds the next lower number
        bound = _next_lower(wide.gather(1, _greatest(wide, k)).amin(dim=1, keepdim=True))
    # candidates: scores above the bound. Written so that NaN passes: a broken model must not look like an empty memory
    row, group = (~(maxima <= bound)).nonzero(as_tuple=True)
    inside = cube[row, :, group]
    at, member = (~(inside <= bound[row])).nonzero(as_tuple=True)
    row, better, group = row[at], inside[at, member], group[at]
    counts = torch.bincount(row, minlength=q)
    m, rest = int(counts.max()), c - whole
    if so_far is not None and m == 0 and rest == 0:
        return so_far
    # rows have different numbers of candidates: they are packed to the left of m columns
    place = row * m + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    candidates = scores.new_full((q, m), _lowest(scores))
    numbers = torch.zeros(q, m, dtype=torch.long, device=row.device)
    candidates.view(-1)[place], numbers.view(-1)[place] = better, group + member * groups + first
    if rest:
        tail = torch.arange(first + whole, first + c, device=row.device).expand(q, rest)
        candidates, numbers = torch.cat((candidates, scores[:, whole:]), dim=1), torch.cat((numbers, tail), dim=1)
    if earlier is None and k <= candidates.shape[1] <= 2 * k:
        return _Kept(candidates, numbers, bound.squeeze(1))  # selecting among so few costs more than keeping them
    return _best_of(earlier, candidates, numbers, k)


def _best_of(earlier: _Kept | None, scores: Tensor, numbers: Tensor, k: int) -> _Kept:
    """The k best of ``earlier`` and further scores, or all if fewer; the result shares no memory with ``scores``."""
    if earlier is not None:
        scores, numbers = torch.cat((earlier.scores, scores), dim=1), torch.cat((earlier.numbers, numbers), dim=1)
    if scores.shape[1] <= k:
        return _Kept(scores.clone(), numbers, scores.new_full((len(scores),), _lowest(scores)))
    best = _greatest(scores, k)
    values = scores.gather(1, best)
    return _Kept(values, numbers.gather(1, best), values.amin(dim=1))


def _lowest(scores: Tensor) -> float | int:
    return -math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min


def _next_lower(scores: Tensor) -> Tensor:
    if scores.is_floating_point():
        return scores.nextafter(scores.new_full((), -math.inf))
    return scores.clamp(min=torch.iinfo(scores.dtype).min + 1) - 1


def _widened(rows: Tensor, w: int, filler: float | int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, w - rows.shape[1]), value=filler)
