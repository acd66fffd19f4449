"""Exact nearest neighbours by inner product, in chunks, without ever holding the whole score matrix.

Selecting ``k`` of ``c`` scores costs more than the product that makes them. So the scores of a chunk are cut into
groups and the best of each group is taken (one vectorised pass). Of the first chunk, the ``k`` best groups are looked
into: the ``k`` best scores always lie in the ``k`` groups with the best maxima. Of later chunks only groups whose best
score beats the worst of the ``k`` found so far matter; they become few soon. Groups are strided, so that the maximum
runs over an outer dimension.

Legend: q queries, c keys of a chunk, d feature, k neighbours, m groups of a row that are looked into.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A tile of scores stays in a CPU's cache; an accelerator wants few large products.
CPU_CHUNK, CPU_TILE = 4096, 256
ACCELERATOR_CHUNK, ACCELERATOR_TILE = 65536, 4096
GROUP = 8  # scores of a group in later chunks


def chunk_size_for(device: torch.device) -> int:
    """Keys that are scored at a time."""
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


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
    tile = CPU_TILE if queries.device.type == "cpu" else ACCELERATOR_TILE
    tiles = queries.split(tile)
    best: list[tuple[Tensor, Tensor] | None] = [None] * len(tiles)
    for first, keys in chunks:
        for number, part in enumerate(tiles):
            scores, earlier = part @ keys.t(), best[number]
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
        return (
            queries.new_full((queries.shape[0], k), -math.inf),
            torch.zeros(queries.shape[0], k, dtype=torch.long, device=queries.device),
        )
    scores, order = torch.cat([pair[0] for pair in found]).sort(dim=1, descending=True)
    numbers = torch.cat([pair[1] for pair in found]).gather(1, order)
    missing = k - scores.shape[1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
        numbers = torch.nn.functional.pad(numbers, (0, missing))
    return scores, numbers


def _improved(earlier: tuple[Tensor, Tensor], scores: Float[Tensor, "q c"], first: int) -> tuple[Tensor, Tensor]:
    """The k best of an ``earlier`` k and a further chunk, whose first key has the number ``first``."""
    q, k = earlier[0].shape
    groups = scores.shape[1] // GROUP
    whole = groups * GROUP
    # element g + j * groups belongs to group g
    cube = scores[:, :whole].unflatten(1, (GROUP, groups))
    row, group = (cube.amax(dim=1) > earlier[0].amin(dim=1, keepdim=True)).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=q)
    m, rest = int(counts.max()), scores.shape[1] - whole
    if m == 0 and rest == 0:
        return earlier
    # rows have different numbers of such groups: each row's stand on the left of m places
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    members = torch.arange(GROUP, device=row.device) * groups
    candidates = scores.new_full((q, m, GROUP), -math.inf)
    numbers = torch.zeros(q, m, GROUP, dtype=torch.long, device=row.device)
    candidates[row, place], numbers[row, place] = cube[row, :, group], group.unsqueeze(1) + members + first
    tail = torch.arange(first + whole, first + scores.shape[1], device=row.device).expand(q, rest)
    joined = torch.cat((earlier[0], candidates.flatten(1), scores[:, whole:]), dim=1)
    joined_numbers = torch.cat((earlier[1], numbers.flatten(1), tail), dim=1)
    best = joined.topk(k, dim=1, sorted=False)
    return best.values, joined_numbers.gather(1, best.indices)


def _chunk_top_k(scores: Float[Tensor, "q c"], k: int) -> tuple[Tensor, Tensor]:
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
