"""linear_cross_entropy and hidden_log_probs against the plain losses: time and peak memory of forward and backward.

    python tests/benchmarks/bench_losses.py --vocabulary 32768 131072 --threads 1 --json losses.json

``--variants "linear_cross_entropy none"`` measures losses of single tokens too.

Every variant runs in a process of its own, whose peak resident memory above its inputs is what it needed; the variants
take turns for several rounds, and the fastest time and the largest memory count.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# variant -> the plain computation it is compared with
VARIANTS = {
    "plain cross_entropy": None,
    "linear_cross_entropy": "plain cross_entropy",
    "linear_cross_entropy none": "plain cross_entropy",
    "plain log_probs": None,
    "hidden_log_probs": "plain log_probs",
}
DEFAULT = [variant for variant in VARIANTS if variant != "linear_cross_entropy none"]


def peak_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(variant: str, vocabulary: int, tokens: int, dim: int, threads: int, repeats: int) -> dict[str, float]:
    """Runs one variant in this process: seconds of the fastest repeat, and peak bytes above the inputs."""
    import torch
    from torch.nn import functional as F

    from lm_core.losses.losses import hidden_log_probs, linear_cross_entropy

    torch.set_num_threads(threads)

    def inputs(vocabulary: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.empty(1, tokens, dim).normal_(generator=generator).requires_grad_()
        weight = torch.empty(vocabulary, dim).normal_(std=0.05, generator=generator).requires_grad_()
        return hidden, weight, torch.randint(vocabulary, (1, tokens), generator=generator)

    def plain_log_probs(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (hidden[:, :-1] @ weight.T).log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).mean()

    losses: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "plain cross_entropy": lambda hidden, weight, ids: F.cross_entropy((hidden @ weight.T)[0], ids[0]),
        "linear_cross_entropy": linear_cross_entropy,
        "linear_cross_entropy none": lambda *batch: linear_cross_entropy(*batch, reduction="none").mean(),
        "plain log_probs": plain_log_probs,
        "hidden_log_probs": lambda *batch: hidden_log_probs(*batch).mean(),
    }

    def step(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> float:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        torch.autograd.backward(losses[variant](hidden, weight, ids))
        return time.perf_counter() - start

    step(*inputs(64, 64))  # libraries allocate on first use
    batch = inputs(vocabulary, tokens)
    before = peak_resident_bytes()
    seconds = min(step(*batch) for _ in range(repeats))
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes() - before}


def table(results: list[dict[str, object]]) -> str:
    lines = [
        "| vocabulary | threads | loss, forward + backward | seconds | of plain | peak MB | of plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        ratios = [f"{row[key]:.3f}" if row[key] is not None else "" for key in ("time_ratio", "memory_ratio")]
        lines.append(
            f"| {row['vocabulary']} | {row['threads']} | {row['variant']} | {row['seconds']:.2f} | {ratios[0]} "
            f"| {float(str(row['peak_bytes'])) / 1e6:.0f} | {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2, help="processes a variant")
    parser.add_argument("--repeats", type=int, default=1, help="steps a process")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the child process: one variant
    arguments = parser.parse_args()

    if arguments.measure is not None:
        sizes = arguments.vocabulary[0], arguments.tokens, arguments.dim, arguments.threads[0], arguments.repeats
        print(json.dumps(measure(arguments.measure, *sizes)))
        return

    results: list[dict[str, object]] = []
    for vocabulary in arguments.vocabulary:
        for threads in arguments.threads:
            best: dict[str, dict[str, float]] = {}
            for _ in range(arguments.rounds):
                for variant in arguments.variants:
                    options = {"vocabulary": vocabulary, "tokens": arguments.tokens, "dim": arguments.dim}
                    options |= {"threads": threads, "repeats": arguments.repeats}
                    flags = [f"--{name}={value}" for name, value in options.items()]
                    command = [sys.executable, __file__, f"--measure={variant}", *flags]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    once = json.loads(output)
                    earlier = best.get(variant, once)
                    best[variant] = {
                        "seconds": min(earlier["seconds"], once["seconds"]),
                        "peak_bytes": max(earlier["peak_bytes"], once["peak_bytes"]),
                    }
            for variant, result in best.items():
                plain = best.get(VARIANTS[variant] or "")
                time_ratio = result["seconds"] / plain["seconds"] if plain else None
                memory_ratio = result["peak_bytes"] / plain["peak_bytes"] if plain else None
                ratios = {"time_ratio": time_ratio, "memory_ratio": memory_ratio}
                results.append({"variant": variant, "vocabulary": vocabulary, "threads": threads, **result, **ratios})
    print(table(results))
    if arguments.json is not None:
        settings = {"tokens": arguments.tokens, "dim": arguments.dim, "results": results}
        arguments.json.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
