"""PaLM beside the original package (PaLM-rlhf-pytorch), the same sizes in turns in one run.

    nox -s bench_peers -- palm

The original decodes without a cache, so few tokens are asked of it. It is looked for in $BENCH_PEERS/palm-rlhf.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from bench_training import operations, stepped
from measure import arguments, in_turns, matmul_flops, median, ratio, report

from lm_core.generation import generate
from palm_rlhf import PaLM

PROMPT = 128
SIZES = {"dim": 512, "depth": 6, "num_tokens": 256}


def original_package() -> type:
    """The original's PaLM class."""
    folder = Path(os.environ.get("BENCH_PEERS", ""), "palm-rlhf")
    if not folder.is_dir():
        raise SystemExit(f"the original package is not in {folder}: run nox -s bench_peers")
    sys.path.append(str(folder))
    import palm_rlhf_pytorch

    return palm_rlhf_pytorch.PaLM


def generation_row(original_class: type, new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    palm, original = PaLM(**SIZES), original_class(**SIZES)
    prompt = torch.randint(256, (1, PROMPT))
    seconds = in_turns(
        {
            "palm": lambda: generate(palm, prompt, max_new_tokens=new_tokens),
            "original": lambda: original.generate(PROMPT + new_tokens, prompt),
        },
        rounds,
    )
    return {
        "new tokens": new_tokens,
        "threads": threads,
        "PaLM tokens/s": new_tokens / median(seconds["palm"]),
        "original tokens/s": new_tokens / median(seconds["original"]),
        "PaLM / original": ratio(seconds["original"], seconds["palm"]),
    }


def training_row(original_class: type, threads: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    palm, original = PaLM(**SIZES), original_class(**SIZES)
    ids = torch.randint(1, 256, (4, 513))
    peaks: list[float] = []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops()),
            "palm": lambda: stepped(palm, palm(ids, return_loss=True)),
            "original": lambda: stepped(original, original(ids, return_loss=True)),
        },
        rounds,
    )
    work = operations(palm, 4, 512)
    return {
        "batch": "4 x 512",
        "threads": threads,
        "PaLM tokens/s": 2048 / median(seconds["palm"]),
        "original tokens/s": 2048 / median(seconds["original"]),
        "PaLM / original": ratio(seconds["original"], seconds["palm"]),
        "PaLM of matmul peak": work / median(seconds["palm"]) / median(peaks),
        "original of matmul peak": work / median(seconds["original"]) / median(peaks),
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], new_tokens={"type": int, "nargs": "+", "default": [32, 64]})
    warnings.simplefilter("ignore")
    original = original_package()
    cases = [(new_tokens, threads) for threads in options.threads for new_tokens in options.new_tokens]
    rows = [generation_row(original, *case, min(options.rounds, 3)) for case in cases]
    report("Generation beside the original, 22.5 M parameters, prompt 128", rows, options.json)
    rows = [training_row(original, threads, options.rounds) for threads in options.threads]
    report("Training step beside the original, 22.5 M parameters", rows, options.json)


if __name__ == "__main__":
    main()
