"""Pairs and prompts from plain documents, for reward models that need no human: real text against corrupted text.

A prompt and its continuation are cut out of a document. The rejected response is the same continuation with runs of
its tokens shuffled: the same tokens in a wrong order, which no count of letters gives away.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core._checks import check_positive, typed
from palm_rlhf.preferences import Preference


@typed
def corrupted_pairs(
    documents: Sequence[Any],
    *,
    count: int,
    prompt_tokens: int = 32,
    response_tokens: int = 32,
    run: int = 8,
    seed: int = 0,
) -> list[Preference]:
    """Pairs of a real continuation and the same with each run of its tokens shuffled.

    Args:
        documents: token ids of documents.
        count: pairs.
        prompt_tokens: of each prompt.
        response_tokens: of each response.
        run: tokens that are shuffled among themselves.
        seed: of the cuts and shuffles.

    Raises:
        ValueError: a number is below 1, or no document is long enough.
    """
    check_positive(run, "run")
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for piece in _cuts(documents, count, prompt_tokens + response_tokens, generator):
        prompt, chosen = piece[:prompt_tokens], piece[prompt_tokens:]
        parts = [part[torch.randperm(part.shape[0], generator=generator)] for part in chosen.split(run)]
        pairs.append(Preference(prompt, chosen, torch.cat(parts)))
    return pairs


@typed
def document_prompts(documents: Sequence[Any], *, count: int, prompt_tokens: int = 32, seed: int = 0) -> list[Tensor]:
    """Prompts cut out of documents, of half to the whole of ``prompt_tokens``.

    Raises:
        ValueError: a number is below 1, or no document is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(1, prompt_tokens // 2), prompt_tokens + 1, (max(count, 1),), generator=generator)
    cuts = _cuts(documents, count, prompt_tokens, generator)
    return [cut[: int(length)] for cut, length in zip(cuts, lengths, strict=True)]


def _cuts(documents: Sequence[Any], count: int, length: int, generator: torch.Generator) -> list[Tensor]:
    for name, value in (("count", count), ("length", length)):
        check_positive(value, name)
    long_enough = [number for number in range(len(documents)) if len(documents[number]) >= length]
    if not long_enough:
        raise ValueError(f"documents must have one of at least {length} tokens, got {len(documents)} shorter ones")
    pieces = []
    for _ in range(count):
        chosen = long_enough[int(torch.randint(len(long_enough), (1,), generator=generator))]
        start = int(torch.randint(len(documents[chosen]) - length + 1, (1,), generator=generator))
        pieces.append(torch.tensor([int(token) for token in documents[chosen][start : start + length]]))
    return pieces
