"""Pairs and prompts from plain documents, for reward models that need no human: real text against corrupted text.

A prompt and its continuation are cut out of a document. The rejected response is the same continuation spoilt in one
of the two ways in which samplers fail: some runs of its tokens are shuffled (noise: the same tokens, so that no count
of letters gives it away), or it gets stuck and repeats a few of its tokens to the end. Without the second kind, a
policy that is trained on the reward finds out soon that a row of blanks cannot be shuffled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core.checks import check_positive, typed
from palm_rlhf.data.preferences import Preference

_TRIES = 20  # a few pieces in a hundred are a row of blanks, which no corruption changes


@typed
def corrupted_pairs(
    documents: Sequence[Any],
    *,
    count: int,
    prompt_tokens: int = 32,
    response_tokens: int = 32,
    run: int = 8,
    loops: float = 1 / 3,
    seed: int = 0,
) -> list[Preference]:
    """Pairs of a real continuation and the same one spoilt.

    Args:
        documents: token ids of documents.
        count: pairs.
        prompt_tokens: of each prompt.
        response_tokens: of each response.
        run: tokens that are shuffled among themselves; one run to all of them are. A loop repeats at most so many.
        loops: part of the pairs whose rejected response gets stuck.
        seed: of the cuts and corruptions.

    Raises:
        ValueError: a number is out of range, or no document is long enough, or all its text is one repeated token.
    """
    check_positive(run, "run")
    check_positive(response_tokens, "response_tokens")
    if not 0 <= loops <= 1:
        raise ValueError(f"loops must be in [0, 1], got {loops}")
    generator = torch.Generator().manual_seed(seed)
    pairs: list[Preference] = []
    for _ in range(_TRIES):
        wanted = count - len(pairs)
        for piece in _cuts(documents, wanted, prompt_tokens + response_tokens, generator) if wanted else ():
            prompt, chosen = piece[:prompt_tokens], piece[prompt_tokens:]
            spoil = _stuck if float(torch.rand((), generator=generator)) < loops else _shuffled
            rejected = spoil(chosen, run, generator)
            if not torch.equal(rejected, chosen):
                pairs.append(Preference(prompt, chosen, rejected))
    if len(pairs) < count:
        raise ValueError(f"documents must have text that a corruption changes, got {len(pairs)} such pieces of {count}")
    return pairs


def _shuffled(response: Tensor, run: int, generator: torch.Generator) -> Tensor:
    """Some runs in another order within."""
    parts = list(response.split(run))
    number = int(torch.randint(1, len(parts) + 1, (), generator=generator))
    for place in torch.randperm(len(parts), generator=generator)[:number].tolist():
        parts[place] = parts[place][torch.randperm(parts[place].shape[0], generator=generator)]
    return torch.cat(parts)


def _stuck(response: Tensor, run: int, generator: torch.Generator) -> Tensor:
    """From some token on, the last few tokens again and again."""
    length = response.shape[0]
    period = int(torch.randint(1, min(run, length) + 1, (), generator=generator))
    start = int(torch.randint(period, max(period, length // 2) + 1, (), generator=generator))
    repeats = -(-(length - start) // period)
    return torch.cat((response[:start], response[start - period : start].repeat(repeats)))[:length]


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
    check_positive(count, "count")
    check_positive(length, "length")
    long_enough = [number for number in range(len(documents)) if len(documents[number]) >= length]
    if not long_enough:
        raise ValueError(f"documents must have one of at least {length} tokens, got {len(documents)} shorter ones")
    pieces = []
    for _ in range(count):
        chosen = long_enough[int(torch.randint(len(long_enough), (1,), generator=generator))]
        start = int(torch.randint(len(documents[chosen]) - length + 1, (1,), generator=generator))
        pieces.append(torch.tensor([int(token) for token in documents[chosen][start : start + length]]))
    return pieces
