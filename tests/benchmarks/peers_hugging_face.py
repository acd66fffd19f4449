"""PaLM beside Hugging Face's Cohere model of the same sizes: decoding over new tokens, a training step over length.

    nox -s bench_peers -- hugging_face

The limits: decoding cannot beat one single-row product for every weight; a training step cannot beat the matrix-product
peak, which is measured beside each step.
"""

import warnings

import bench_generation
import bench_training
from measure import arguments, report

TWIN = "Hugging Face Cohere"


def decoding(new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    found = bench_generation.against_twin(new_tokens, threads, rounds)
    ours, twin = found["PaLM tokens/s"], found["twin tokens/s"]
    return {
        "what": f"PaLM decoding, {new_tokens} new tokens after 128",
        "threads": threads,
        TWIN: f"{twin:.0f} tokens/s",
        "ours": f"{ours:.0f} tokens/s",
        "times as fast": found["PaLM / twin"],
        "share of limit": found["share of limit"],
        "axis": "new tokens",
        "size": new_tokens,
        "cost": new_tokens / ours,
        "peer cost": new_tokens / twin,
        "unit": "s",
    }


def training(batch: int, length: int, threads: int, rounds: int) -> dict[str, object]:
    found = bench_training.row(batch, length, threads, rounds)
    ours, twin = found["PaLM tokens/s"], found["twin tokens/s"]
    return {
        "what": f"PaLM training step, {batch} x {length}",
        "threads": threads,
        TWIN: f"{twin:.0f} tokens/s",
        "ours": f"{ours:.0f} tokens/s",
        "times as fast": found["PaLM / twin"],
        "share of limit": found["PaLM of peak"],
        "axis": "sequence length at 2,048 tokens",
        "size": length,
        "cost": batch * length / ours,
        "peer cost": batch * length / twin,
        "unit": "s",
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], new_tokens={"type": int, "nargs": "+", "default": [16, 64, 256]})
    warnings.simplefilter("ignore")
    rounds = min(options.rounds, 3)
    rows = [decoding(new, threads, rounds) for threads in options.threads for new in options.new_tokens]
    shapes = [(8, 256), (4, 512), (1, 2048)]
    rows += [training(*shape, threads, rounds) for threads in options.threads for shape in shapes]
    report("PaLM and Hugging Face's Cohere twin, 22.5 M parameters, float32", rows, options.json)


if __name__ == "__main__":
    main()
