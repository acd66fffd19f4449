"""Generation of PaLM with and without its cache; `peers_hugging_face.py` compares it with its Hugging Face twin.

python tests/benchmarks/bench_generation.py --threads 1 2 --json generation.json
"""

import torch
from measure import arguments, in_turns, median, report, thread_counts, timed

from lm_core.generation.generate import generate
from palm_rlhf import PaLM

PROMPT = 128


def against_uncached(new_tokens: int) -> dict[str, object]:
    """One row: 3.5 M parameters, the same loop with and without the cache."""
    palm = PaLM(dim=256, depth=4, num_tokens=256).eval()
    prompt = torch.randint(256, (1, PROMPT))

    def run(use_cache: bool) -> object:
        return generate(palm, prompt, max_new_tokens=new_tokens, temperature=0.0, use_cache=use_cache)

    cached = median(in_turns({"cached": lambda: run(True)}, 3)["cached"])
    uncached = timed(lambda: run(False))  # once: seconds at 256 new tokens, minutes at 1,024
    return {
        "new tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "cached tokens/s": new_tokens / cached,
        "uncached tokens/s": new_tokens / uncached,
        "cached / uncached": uncached / cached,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], new_tokens={"type": int, "nargs": "+", "default": [64, 256]})
    rows = [against_uncached(new_tokens) for _ in thread_counts(options) for new_tokens in options.new_tokens]
    report("Generation with and without the cache, 3.5 M parameters, prompt 128, batch 1", rows, options.json)


if __name__ == "__main__":
    main()
