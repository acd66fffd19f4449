"""``lm_core.nn.attention.attend`` against attention written out with einsum, forward and backward.

python tests/benchmarks/bench_attention.py --threads 1 2 --json attention.json
"""

from functools import partial

import torch
from measure import arguments, in_turns, median, ratio, report
from torch import Tensor, einsum

from lm_core.nn.attention import attend


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Multi-query causal attention as the formula says."""
    i, j = q.shape[-2], k.shape[-2]
    scores = einsum("b h i d, b j d -> b h i j", q, k[:, 0]) * q.shape[-1] ** -0.5
    hidden = torch.ones(i, j, dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
    return einsum("b h i j, b j d -> b h i d", scores.masked_fill(hidden, -1e30).softmax(dim=-1), v[:, 0])


def both_ways(function: partial[Tensor], inputs: tuple[Tensor, ...]) -> None:
    function(*inputs).sum().backward()
    for tensor in inputs:
        tensor.grad = None


def row(length: int, padded: bool, threads: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    shapes = ((4, 8, length, 64), (4, 1, length, 64), (4, 1, length, 64))
    inputs = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    mask = torch.ones(4, length, dtype=torch.bool) if padded else None
    ours, written_out = partial(attend, mask=mask, causal=True), partial(explicit, mask=mask)
    seconds = in_turns(
        {"attend": lambda: both_ways(ours, inputs), "einsum": lambda: both_ways(written_out, inputs)}, rounds
    )
    return {
        "length": length,
        "padding mask": padded,
        "threads": threads,
        "attend ms": 1e3 * median(seconds["attend"]),
        "einsum ms": 1e3 * median(seconds["einsum"]),
        "einsum / attend": ratio(seconds["einsum"], seconds["attend"]),
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], default_rounds=3)
    shapes = [(256, False), (256, True), (1024, False), (1024, True), (2048, False)]
    rows = [row(*shape, threads, options.rounds) for threads in options.threads for shape in shapes]
    report("Causal multi-query attention, batch 4, 8 heads of 64, forward + backward", rows, options.json)


if __name__ == "__main__":
    main()
