"""A training step of PaLM against Hugging Face's Cohere twin, and the share of the matrix-product peak it reaches.

    python tests/benchmarks/bench_training.py --threads 1 2 --json training.json

A step is forward and backward of the mean cross-entropy at 22.5 M parameters. The peak is measured in every round, next
to the steps. Operations: 6 for each weight and token, and 12 for each layer, head feature and attended pair.
"""

import torch
from bench_generation import cohere_twin
from measure import arguments, in_turns, matmul_flops, median, ratio, report
from torch import Tensor, nn

from palm_rlhf import PaLM


def operations(palm: PaLM, batch: int, length: int) -> float:
    """Of forward and backward; causal attention counts half of its pairs."""
    weights = sum(parameter.numel() for parameter in palm.parameters())
    attention = 12 * palm.depth * palm.heads * palm.dim_head * length / 2
    return batch * length * (6 * weights + attention)


def stepped(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad()


def row(batch: int, length: int, threads: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    palm = PaLM(dim=512, depth=6, num_tokens=256).train()
    twin = cohere_twin(palm).train()
    ids = torch.randint(256, (batch, length + 1))
    inputs = ids[:, :-1]
    peaks: list[float] = []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops()),
            "palm": lambda: stepped(palm, palm(ids, return_loss=True)),
            "twin": lambda: stepped(twin, twin(inputs, labels=inputs).loss),
        },
        rounds,
    )
    work = operations(palm, batch, length)
    peaks = peaks[1:]
    share = median([work / s / peak for s, peak in zip(seconds["palm"], peaks, strict=True)])
    twin_share = median([work / s / peak for s, peak in zip(seconds["twin"], peaks, strict=True)])
    return {
        "batch": batch,
        "length": length,
        "threads": threads,
        "PaLM tokens/s": batch * length / median(seconds["palm"]),
        "twin tokens/s": batch * length / median(seconds["twin"]),
        "PaLM / twin": ratio(seconds["twin"], seconds["palm"]),
        "PaLM of peak": share,
        "twin of peak": twin_share,
        "matmul GFLOP/s": median(peaks) / 1e9,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], default_rounds=3)
    shapes = [(8, 256), (4, 512), (1, 2048)]
    rows = [row(*shape, threads, options.rounds) for threads in options.threads for shape in shapes]
    report("Training step, 22.5 M parameters, float32", rows, options.json)


if __name__ == "__main__":
    main()
