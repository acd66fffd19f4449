"""Log-probabilities of tokens beside TRL's formula, forward and backward, over the size of the vocabulary.

    nox -s bench_peers -- formulas

TRL scores tokens from the full logits: the chosen logit less the log-sum-exp of its row; that is written out here. The
limit is three products (scores, and the gradients of both sides), at the matrix-product peak measured in turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import arguments, in_turns, matmul_flops, median, ratio, report
from torch import Tensor

from lm_core.losses.losses import hidden_log_probs

TOKENS, DIM = 1024, 512


def trl_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of ids[:, 1:] from full logits."""
    logits = hidden[:, :-1] @ weight.t()
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return chosen - torch.stack([row.logsumexp(-1) for row in logits])


def stepped(loss: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    loss().backward()
    for leaf in leaves:
        leaf.grad = None


def row(
    what: str, peer: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor], work: float
) -> dict[str, Any]:
    """Both in turns, after making sure that they agree."""
    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    peaks: list[float] = []
    variants = {
        "peak": lambda: peaks.append(matmul_flops()),
        "ours": partial(stepped, ours, leaves),
        "theirs": partial(stepped, theirs, leaves),
    }
    seconds = in_turns(variants, 5)
    cost, peer_cost = median(seconds["ours"]), median(seconds["theirs"])
    return {
        "what": what,
        "threads": torch.get_num_threads(),
        peer: f"{1000 * peer_cost:.0f} ms",
        "ours": f"{1000 * cost:.0f} ms",
        "times as fast": ratio(seconds["theirs"], seconds["ours"]),
        "share of limit": work / cost / median(peaks),
        "cost": 1000 * cost,
        "peer cost": 1000 * peer_cost,
        "unit": "ms",
    }


def log_probs(vocabulary: int) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(4, TOKENS // 4, DIM, requires_grad=True)
    weight = (torch.randn(vocabulary, DIM) / DIM**0.5).requires_grad_()
    ids = torch.randint(vocabulary, (4, TOKENS // 4))
    found = row(
        f"log-probabilities of {TOKENS:,} tokens, vocabulary {vocabulary:,}",
        "TRL's formula",
        lambda: hidden_log_probs(hidden, weight, ids)[:, -(TOKENS // 4 - 1) :].sum(),
        lambda: trl_log_probs(hidden, weight, ids).sum(),
        [hidden, weight],
        6.0 * TOKENS * vocabulary * DIM,
    )
    return {**found, "axis": "vocabulary", "size": vocabulary}


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        vocabulary={"type": int, "nargs": "+", "default": [8_192, 32_768, 131_072]},
    )
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += [log_probs(vocabulary) for vocabulary in options.vocabulary]
    report("Log-probabilities and TRL's formula, forward + backward, float32", rows, options.json)


if __name__ == "__main__":
    main()
