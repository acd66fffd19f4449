"""Log-probabilities of tokens beside TRL's formula, forward and backward, over the size of the vocabulary.

    nox -s bench_peers -- formulas

TRL scores tokens from the full logits: the chosen logit less the log-sum-exp of its row; that is written out here. The
limit is three products (scores, and the gradients of both sides), at the matrix-product peak measured in turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import arguments, compared, in_turns, matmul_flops, median, report, thread_counts
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


def log_probs(vocabulary: int) -> dict[str, Any]:
    """Both in turns, after a check that they agree."""
    torch.manual_seed(0)
    hidden = torch.randn(4, TOKENS // 4, DIM, requires_grad=True)
    weight = (torch.randn(vocabulary, DIM) / DIM**0.5).requires_grad_()
    ids = torch.randint(vocabulary, (4, TOKENS // 4))

    def ours() -> Tensor:
        return hidden_log_probs(hidden, weight, ids)[:, -(TOKENS // 4 - 1) :].sum()

    def theirs() -> Tensor:
        return trl_log_probs(hidden, weight, ids).sum()

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    peaks: list[float] = []
    variants = {
        "peak": lambda: peaks.append(matmul_flops()),
        "ours": partial(stepped, ours, [hidden, weight]),
        "theirs": partial(stepped, theirs, [hidden, weight]),
    }
    return compared(
        f"log-probabilities of {TOKENS:,} tokens, vocabulary {vocabulary:,}",
        "TRL's formula",
        in_turns(variants, 5),
        limit=6.0 * TOKENS * vocabulary * DIM / median(peaks),
        axis="vocabulary",
        size=vocabulary,
    )


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        vocabulary={"type": int, "nargs": "+", "default": [8_192, 32_768, 131_072]},
    )
    rows = []
    for _ in thread_counts(options):
        rows += [log_probs(vocabulary) for vocabulary in options.vocabulary]
    report("Log-probabilities and TRL's formula, forward + backward, float32", rows, options.json)


if __name__ == "__main__":
    main()
