"""Preference pairs and prompts from plain documents, without human labels: real against corrupted continuations.

A prompt and its continuation are cut from a document. The rejected response is the same continuation, corrupted in one
of the two ways in which samplers fail: some runs of its tokens are shuffled (noise with the same tokens, so that token
counts do not identify it), or it repeats a few of its tokens to the end. Without the second kind, a policy trained on
the reward soon exploits that shuffling does not change a run of blanks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core.checks import check_positive, typed
from palm_rlhf.data.preferences import Preference

_TRIES = 20  # a few cuts in a hundred are runs of blanks, which no corruption changes


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
    """Pairs of a real continuation and a corrupted copy of it.

    Args:
        documents: token ids of documents.
        count: number of pairs.
        prompt_tokens: tokens per prompt.
        response_tokens: tokens per response.
        run: tokens per shuffled run (one or more runs of a response are shuffled), and longest repeated period.
        loops: fraction of the pairs whose rejected response repeats itself.
        seed: seed of the cuts and corruptions.

    Raises:
        ValueError: a number is out of range, or no document is long enough, or the text is one repeated token.
    """
    check_positive(run, "run")
    check_positive(response_tokens, "response_tokens")
    if not 0 <= loops <= 1:
        raise ValueError(f"loops must be in [0, 1], got {loops}")
    generator = torch.Generator().manual_seed(seed)
    pairs: list[Preference] = []
    # cuts that the corruption did not change are drawn again
    for _ in range(_TRIES):
        wanted = count - len(pairs)
        for piece in _cuts(documents, wanted, prompt_tokens + response_tokens, generator) if wanted else ():
            prompt, chosen = piece[:prompt_tokens], piece[prompt_tokens:]
            corrupt = _repeated if float(torch.rand((), generator=generator)) < loops else _shuffled
            rejected = corrupt(chosen, run, generator)
            if not torch.equal(rejected, chosen):
                pairs.append(Preference(prompt, chosen, rejected))
    if len(pairs) < count:
        raise ValueError(f"documents must have text that a corruption changes, got {len(pairs)} such pieces of {count}")
    return pairs


def _shuffled(response: Tensor, run: int, generator: torch.Generator) -> Tensor:
    """The response with the tokens of some runs in another order."""
    parts = list(response.split(run))
    changed = int(torch.randint(1, len(parts) + 1, (), generator=generator))
    for index in torch.randperm(len(parts), generator=generator)[:changed].tolist():
        parts[index] = parts[index][torch.randperm(parts[index].shape[0], generator=generator)]
    return torch.cat(parts)


def _repeated(response: Tensor, run: int, generator: torch.Generator) -> Tensor:
    """The response up to a random token, then its last few tokens repeated to the end."""
    length = response.shape[0]
    period = int(torch.randint(1, min(run, length) + 1, (), generator=generator))
    start = int(torch.randint(period, max(period, length // 2) + 1, (), generator=generator))
    repeats = -(-(length - start) // period)
    return torch.cat((response[:start], response[start - period : start].repeat(repeats)))[:length]


@typed
def document_prompts(documents: Sequence[Any], *, count: int, prompt_tokens: int = 32, seed: int = 0) -> list[Tensor]:
    """Prompts cut from documents, of half of ``prompt_tokens`` to all of them.

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
    long_enough = [index for index in range(len(documents)) if len(documents[index]) >= length]
    if not long_enough:
        raise ValueError(f"documents must have one of at least {length} tokens, got {len(documents)} shorter ones")
    pieces = []
    for _ in range(count):
        chosen = long_enough[int(torch.randint(len(long_enough), (1,), generator=generator))]
        start = int(torch.randint(len(documents[chosen]) - length + 1, (1,), generator=generator))
        pieces.append(torch.tensor([int(token) for token in documents[chosen][start : start + length]]))
    return pieces
