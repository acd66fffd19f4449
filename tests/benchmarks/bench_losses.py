"""linear_cross_entropy and hidden_log_probs against the plain losses: time and peak memory of forward and backward.

    python tests/benchmarks/bench_losses.py --vocabulary 32768 131072 --threads 1 --json losses.json

``--variants "linear_cross_entropy none"`` measures losses of single tokens too, ``"torch linear_cross_entropy chunks"``
torch's own loss. Every variant runs in a process of its
own, whose peak resident memory above its inputs is what it needed; the variants take turns for several rounds, and the
fastest time and the largest memory count.
"""

import json
from collections.abc import Callable

import torch
from measure import arguments, in_own_process, memory_growth, report, thread_counts, timed
from torch import Tensor
from torch.nn import functional as F

from lm_core.losses.losses import hidden_log_probs, linear_cross_entropy

# variant -> the plain computation it is compared with
VARIANTS = {
    "plain cross_entropy": None,
    "linear_cross_entropy": "plain cross_entropy",
    "linear_cross_entropy none": "plain cross_entropy",
    "torch linear_cross_entropy": "plain cross_entropy",
    "torch linear_cross_entropy chunks": "plain cross_entropy",
    "plain log_probs": None,
    "hidden_log_probs": "plain log_probs",
}
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain cross_entropy": lambda hidden, weight, ids: F.cross_entropy((hidden @ weight.T)[0], ids[0]),
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy none": lambda *batch: linear_cross_entropy(*batch, reduction="none").mean(),
    "torch linear_cross_entropy": lambda *batch: _of_torch(*batch, chunks=False),
    "torch linear_cross_entropy chunks": lambda *batch: _of_torch(*batch, chunks=True),
    "plain log_probs": lambda hidden, weight, ids: (
        (hidden[:, :-1] @ weight.T).log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).mean()
    ),
    "hidden_log_probs": lambda *batch: hidden_log_probs(*batch).mean(),
}


def _of_torch(hidden: Tensor, weight: Tensor, ids: Tensor, *, chunks: bool) -> Tensor:
    """``F.linear_cross_entropy`` of torch 2.13."""
    options = torch.nn.LinearCrossEntropyOptions() if chunks else None
    return F.linear_cross_entropy(hidden[0], weight, ids[0], options=options)


def measure_one(variant: str, vocabulary: int, tokens: int, dim: int, repeats: int) -> tuple[float, float]:
    """Seconds of the fastest repeat, and peak MB above the inputs."""

    def inputs(vocabulary: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.empty(1, tokens, dim).normal_(generator=generator).requires_grad_()
        weight = torch.empty(vocabulary, dim).normal_(std=0.05, generator=generator).requires_grad_()
        return hidden, weight, torch.randint(vocabulary, (1, tokens), generator=generator)

    def step(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
        hidden.grad = weight.grad = None
        LOSSES[variant](hidden, weight, ids).backward()

    step(*inputs(64, 64))  # libraries allocate on first use
    batch = inputs(vocabulary, tokens)
    seconds: list[float] = []
    memory = memory_growth(lambda: seconds.extend(timed(lambda: step(*batch)) for _ in range(repeats)))
    return min(seconds), memory


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        default_rounds=2,
        vocabulary={"type": int, "nargs": "+", "default": [32768]},
        tokens={"type": int, "default": 4096},
        dim={"type": int, "default": 512},
        repeats={"type": int, "default": 1, "help": "steps a process"},
        variants={
            "nargs": "+",
            "choices": VARIANTS,
            "default": [name for name in VARIANTS if not name.endswith(("none", "chunks")) and "torch" not in name],
        },
    )
    if options.measure:
        torch.set_num_threads(options.threads[0])
        variant, *sizes = options.measure
        print(json.dumps(measure_one(variant, *map(int, sizes))))
        return
    rows = []
    for threads in thread_counts(options):
        for vocabulary in options.vocabulary:
            measured: dict[str, list[tuple[float, float]]] = {variant: [] for variant in options.variants}
            for _ in range(options.rounds):
                for variant, results in measured.items():
                    sizes = (vocabulary, options.tokens, options.dim, options.repeats)
                    results.append(in_own_process(__file__, variant, *sizes))
            best = {
                variant: (min(seconds for seconds, _ in results), max(memory for _, memory in results))
                for variant, results in measured.items()
            }
            for variant, (seconds, memory) in best.items():
                row = {"vocabulary": vocabulary, "threads": threads, "loss, forward + backward": variant}
                row |= {"seconds": seconds, "peak MB": memory}
                plain = best.get(VARIANTS[variant] or "")
                if plain:
                    row |= {"time / plain": seconds / plain[0], "memory / plain": memory / plain[1]}
                rows.append(row)
    report(f"Losses of {options.tokens:,} tokens of {options.dim} features", rows, options.json)


if __name__ == "__main__":
    main()
