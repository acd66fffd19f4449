"""Exact nearest neighbours by inner product, in chunks, without ever holding the whole score matrix.

Selecting ``k`` of ``c`` scores costs more than the product that makes them. So the scores of a chunk are cut into
groups and the best of each group is taken (one vectorised pass). Of the first chunk, the ``k`` best groups are looked
into: the ``k`` best scores always lie in the ``k`` groups with the best maxima. Of later chunks only scores matter that
beat the worst of the ``k`` found so far, and they are looked for only in groups whose best does; they become few soon.
Groups are strided, so that the maximum runs over an outer dimension.

``screened_top_k`` finds the same through products in bfloat16, where a processor has them: it keeps more than ``k``
keys of each query by those scores, scores the kept ones again exactly, and proves by a bound on the rounding that no
other key can be among the ``k`` best. Queries for which the proof fails are searched exactly.

Legend: q queries, c keys of a chunk, d feature, k neighbours, w keys kept of a query, m groups that are looked into.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

# A tile of scores stays in a CPU's cache; an accelerator wants few large products.
CPU_CHUNK, CPU_TILE = 4096, 256
ACCELERATOR_CHUNK, ACCELERATOR_TILE = 65536, 4096
GROUP = 8  # scores of a group in later chunks
KEEP = 2  # times k: keys kept of a query by their scores in bfloat16
FEWEST_SCREENED = 128  # queries, below which rounding the keys takes longer than it saves
UNIT = torch.finfo(torch.bfloat16).eps / 2  # greatest relative error of rounding to bfloat16


def chunk_size_for(device: torch.device) -> int:
    """Keys that are scored at a time."""
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def worth_screening(queries: Float[Tensor, "q d"], keys: int) -> bool:
    """Whether ``screened_top_k`` is the faster one: many queries, and a CPU that multiplies in bfloat16."""
    if queries.device.type != "cpu" or len(queries) < FEWEST_SCREENED or keys <= CPU_CHUNK:
        return False
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and bool(has_instructions())


def exact_top_k(
    queries: Float[Tensor, "q d"], chunks: Iterable[tuple[int, Tensor]], k: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The ``k`` keys with the greatest inner product with each query, greatest first.

    Args:
        queries: floating point, in the dtype that is computed in.
        chunks: ``(number of the first key, keys (c, d))``; numbers need not be contiguous between chunks.
        k: at least 1.

    Returns:
        Scores and numbers of the keys; where there are fewer than ``k`` keys, scores of -inf and numbers of 0 follow.
    """
    scores, numbers = _running_top(queries, chunks, k, torch.matmul)
    return _sorted_and_padded(scores, numbers, k)


def screened_top_k(
    queries: Float[Tensor, "q d"],
    chunks: Callable[[], Iterable[tuple[int, Tensor]]],
    k: int,
    at: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d"]],
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """What ``exact_top_k`` finds, screened through products in bfloat16.

    Args:
        queries: as for ``exact_top_k``.
        chunks: makes the chunks, in the dtype of the queries.
        k: at least 1.
        at: the keys with given numbers.
    """
    longest = queries.new_zeros(())

    def rounded() -> Iterator[tuple[int, Tensor]]:
        nonlocal longest
        for first, keys in chunks():
            longest = torch.maximum(longest, torch.linalg.vector_norm(keys, dim=1).amax())
            yield first, keys.bfloat16()

    codes, numbers = _running_top(queries.bfloat16(), rounded(), KEEP * k, _codes)
    w = numbers.shape[1]
    if w == 0:
        return _sorted_and_padded(queries.new_zeros(numbers.shape), numbers, k)
    parts = zip(queries.split(-(-CPU_CHUNK // w)), numbers.split(-(-CPU_CHUNK // w)), strict=True)
    # products with one query each: multiplying and adding takes a quarter of the time of a matrix product
    again = torch.cat([(at(these.flatten()).unflatten(0, (-1, w)) * q.unsqueeze(1)).sum(-1) for q, these in parts])
    scores, numbers = _sorted_and_padded(again, numbers, k)
    if w == KEEP * k:  # otherwise every key was kept
        unproven = (~_separated(queries, longest, codes.amin(dim=1), scores[:, k - 1])).nonzero().squeeze(1)
        if len(unproven):
            scores[unproven], numbers[unproven] = exact_top_k(queries[unproven], chunks(), k)
    return scores, numbers


def _codes(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores in bfloat16, as integers: in the order of the scores where they are not negative, and negative elsewhere.

    The maximum of integers takes a quarter of the time of that of bfloat16.
    """
    return (queries @ keys).view(torch.int16)


def _separated(
    queries: Float[Tensor, "q d"], longest: Tensor, worst: Int[Tensor, " q"], kth: Float[Tensor, " q"]
) -> Bool[Tensor, " q"]:
    """Whether no key that was not kept can have a score as great as ``kth``, for each query.

    A key that was not kept has a rounded score of at most ``worst``, if that is not negative (negative ones are in no
    order, but below). Its score is greater than the rounded one by at most: what rounding the sum took, what rounding
    query and key took (Cauchy-Schwarz), and what sums of ``d`` numbers in float32 lose, here and in ``kth``.
    """
    product = torch.linalg.vector_norm(queries, dim=1) * longest
    single = torch.finfo(torch.float32)
    lost = (UNIT * (2 + UNIT) + 2 * queries.shape[1] * single.eps) * product + single.tiny * (2 + product)
    return (worst >= 0) & (worst.view(torch.bfloat16).to(kth.dtype) / (1 - UNIT) + lost < kth)


def _sorted_and_padded(scores: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, order = scores.sort(dim=1, descending=True)
    missing = max(0, k - scores.shape[1])
    numbers = numbers.gather(1, order[:, :k])
    return (
        torch.nn.functional.pad(scores[:, :k], (0, missing), value=-math.inf),
        torch.nn.functional.pad(numbers, (0, missing)),
    )


def _running_top(
    queries: Tensor, chunks: Iterable[tuple[int, Tensor]], k: int, score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of ``score(queries, keys transposed)``, or all if they are fewer, in no order."""
    tile = CPU_TILE if queries.device.type == "cpu" else ACCELERATOR_TILE
    tiles = queries.split(tile)
    best: list[tuple[Tensor, Tensor] | None] = [None] * len(tiles)
    for first, keys in chunks:
        for number, part in enumerate(tiles):
            scores, earlier = score(part, keys.t()), best[number]
            if earlier is not None and earlier[0].shape[1] == k and scores.shape[1] >= GROUP:
                best[number] = _improved(earlier, scores, first)
                continue
            scores, numbers = _chunk_top_k(scores, k)
            numbers = numbers + first
            if earlier is not None:
                scores, numbers = torch.cat((earlier[0], scores), dim=1), torch.cat((earlier[1], numbers), dim=1)
                if scores.shape[1] > k:
                    scores, order = scores.topk(k, dim=1, sorted=False)
                    numbers = numbers.gather(1, order)
            best[number] = (scores, numbers)
    found = [pair for pair in best if pair is not None]
    if not found:
        return queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def _improved(earlier: tuple[Tensor, Tensor], scores: Real[Tensor, "q c"], first: int) -> tuple[Tensor, Tensor]:
    """The k best of an ``earlier`` k and a further chunk, whose first key has the number ``first``."""
    q, k = earlier[0].shape
    groups = scores.shape[1] // GROUP
    whole = groups * GROUP
    least = earlier[0].amin(dim=1, keepdim=True)
    # element g + j * groups belongs to group g
    cube = scores[:, :whole].unflatten(1, (GROUP, groups))
    row, group = (cube.amax(dim=1) > least).nonzero(as_tuple=True)
    inside = cube[row, :, group]
    at, member = (inside > least[row]).nonzero(as_tuple=True)
    row, better, group = row[at], inside[at, member], group[at]
    counts = torch.bincount(row, minlength=q)
    m, rest = int(counts.max()), scores.shape[1] - whole
    if m == 0 and rest == 0:
        return earlier
    # rows have different numbers of better scores: each row's stand on the left of m places
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    lowest = -math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    candidates = scores.new_full((q, m), lowest)
    numbers = torch.zeros(q, m, dtype=torch.long, device=row.device)
    candidates[row, place], numbers[row, place] = better, group + member * groups + first
    tail = torch.arange(first + whole, first + scores.shape[1], device=row.device).expand(q, rest)
    joined = torch.cat((earlier[0], candidates, scores[:, whole:]), dim=1)
    joined_numbers = torch.cat((earlier[1], numbers, tail), dim=1)
    best = joined.topk(k, dim=1, sorted=False)
    return best.values, joined_numbers.gather(1, best.indices)


def _chunk_top_k(scores: Real[Tensor, "q c"], k: int) -> tuple[Tensor, Tensor]:
    c = scores.shape[1]
    if c <= k:
        return scores, torch.arange(c, device=scores.device).expand(scores.shape[0], c)
    size = 2 ** round(math.log2(math.sqrt(max(1.0, c / k))))
    groups = c // size
    if size < 2 or groups <= k or c % size:
        # the remainder of a chunk that does not divide is small: the last chunk of a row
        whole = groups * size
        if size >= 2 and groups > k and whole < c:
            head, head_numbers = _chunk_top_k(scores[:, :whole], k)
            tail = torch.arange(whole, c, device=scores.device).expand(scores.shape[0], c - whole)
            scores, order = torch.cat((head, scores[:, whole:]), dim=1).topk(k, dim=1, sorted=False)
            return scores, torch.cat((head_numbers, tail), dim=1).gather(1, order)
        best = scores.topk(k, dim=1, sorted=False)
        return best.values, best.indices
    # element g + j * groups belongs to group g
    maxima = scores.unflatten(1, (size, groups)).amax(dim=1)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, c, groups, device=scores.device)
    candidates = (chosen.unsqueeze(1) + members.view(1, size, 1)).flatten(1)
    best = scores.gather(1, candidates).topk(k, dim=1, sorted=False)
    return best.values, candidates.gather(1, best.indices)
