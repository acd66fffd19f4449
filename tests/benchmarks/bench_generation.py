"""Generation speed of PaLM: against Hugging Face's Cohere twin, against the weights' bandwidth, and without its cache.

    python tests/benchmarks/bench_generation.py --threads 1 2 --json generation.json

The twin has the same sizes (CohereForCausalLM with one key/value head). The limit is what decoding cannot beat: one
product with a single row for every weight, nothing else. Tokens a second include reading the prompt.
"""

import warnings

import torch
from measure import arguments, in_turns, matmul_flops, median, ratio, read_bandwidth, report, timed
from transformers import CohereConfig, CohereForCausalLM

from lm_core.generation.generate import generate
from palm_rlhf import PaLM

PROMPT = 128


def cohere_twin(palm: PaLM) -> CohereForCausalLM:
    """Hugging Face's model of the same sizes."""
    config = CohereConfig(
        vocab_size=palm.num_tokens,
        hidden_size=palm.dim,
        intermediate_size=4 * palm.dim,
        num_hidden_layers=palm.depth,
        num_attention_heads=palm.heads,
        num_key_value_heads=palm.kv_heads,
        logit_scale=1.0,
        use_qk_norm=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return CohereForCausalLM(config).eval()


def against_twin(new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    """One row: 22.5 M parameters, one prompt of 128 tokens, greedy."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    palm = PaLM(dim=512, depth=6, num_tokens=256).eval()
    twin = cohere_twin(palm)
    prompt = torch.randint(256, (1, PROMPT))
    mask = torch.ones_like(prompt)
    seconds = in_turns(
        {
            "palm": lambda: generate(palm, prompt, max_new_tokens=new_tokens, temperature=0.0),
            "twin": lambda: twin.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False),
        },
        rounds,
    )
    weights = [parameter.detach() for parameter in palm.parameters() if parameter.ndim == 2]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    limit = read_bandwidth(weights) / size
    speed = new_tokens / median(seconds["palm"])
    return {
        "new tokens": new_tokens,
        "threads": threads,
        "PaLM tokens/s": speed,
        "twin tokens/s": new_tokens / median(seconds["twin"]),
        "PaLM / twin": ratio(seconds["twin"], seconds["palm"]),
        "limit tokens/s": limit,
        "share of limit": speed / limit,
        "weights GB/s": limit * size / 1e9,
        "matmul GFLOP/s": matmul_flops() / 1e9,
    }


def against_uncached(new_tokens: int, threads: int) -> dict[str, object]:
    """One row: 3.5 M parameters, the same loop with and without the cache."""
    torch.set_num_threads(threads)
    palm = PaLM(dim=256, depth=4, num_tokens=256).eval()
    prompt = torch.randint(256, (1, PROMPT))

    def run(use_cache: bool) -> object:
        return generate(palm, prompt, max_new_tokens=new_tokens, temperature=0.0, use_cache=use_cache)

    cached = median(in_turns({"cached": lambda: run(True)}, 3)["cached"])
    uncached = timed(lambda: run(False))  # once: seconds at 256 new tokens, minutes at 1,024
    return {
        "new tokens": new_tokens,
        "threads": threads,
        "cached tokens/s": new_tokens / cached,
        "uncached tokens/s": new_tokens / uncached,
        "cached / uncached": uncached / cached,
    }


def main() -> None:
    lengths = {"type": int, "nargs": "+", "default": [64, 256]}
    uncached = {"type": int, "nargs": "*", "default": [64, 256], "help": "new tokens of the uncached loop"}
    options = arguments(__doc__.splitlines()[0], new_tokens=lengths, uncached=uncached)
    warnings.simplefilter("ignore")
    cases = [(new_tokens, threads) for threads in options.threads for new_tokens in options.new_tokens]
    rows = [against_twin(*case, options.rounds) for case in cases]
    report("Generation, 22.5 M parameters, float32, prompt 128, batch 1", rows, options.json)
    rows = [against_uncached(new_tokens, threads) for threads in options.threads for new_tokens in options.uncached]
    if rows:
        report("Generation with and without the cache, 3.5 M parameters, prompt 128, batch 1", rows, options.json)


if __name__ == "__main__":
    main()
