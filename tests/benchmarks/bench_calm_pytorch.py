"""CALM: generation against the anchor alone, a training step with and without states read before, and how both grow.

    python tests/benchmarks/bench_calm_pytorch.py --threads 1 --json calm.json

Anchor 4 x 256, augment 8 x 256 (x-transformers), connected as the original does it, prompt 32 and up to 256 new
tokens; training at batch 4 and up to 512 tokens with prompts of 128. The limit of decoding is reading every weight of
the anchor and of the cross-attentions once a token, at the rate at which this machine multiplies one row with them.
"""

import warnings
from typing import Any

import torch
from measure import arguments, in_turns, median, ratio, read_bandwidth, report
from torch import Tensor, nn

from calm_pytorch import CALM, AugmentParams
from calm_pytorch.interop import ORIGINAL_ATTENTION, original_connections
from lm_core.generation.generate import generate

VOCABULARY, PROMPT, LONG_PROMPT, BATCH = 1024, 32, 128, 4


def decoder(depth: int) -> nn.Module:
    """An x-transformers decoder as the original's README has it, with its defaults."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=640, attn_layers=Decoder(dim=256, depth=depth, heads=4)
    ).eval()


def composition(**options: Any) -> CALM:
    """The composition both scripts measure, with the original's connections and heads."""
    torch.manual_seed(0)
    params = AugmentParams(decoder(8), connections=original_connections(8, 4), **options)
    return CALM(decoder(4), params, attn_kwargs=ORIGINAL_ATTENTION).eval()


def stepped(learned: Any, loss: Tensor) -> None:
    """A backward pass whose gradients are dropped."""
    loss.backward()
    learned.zero_grad(set_to_none=True)


def training_inputs(length: int) -> tuple[Tensor, Tensor]:
    """Sequences whose loss is over ``length`` tokens, and prompts."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(VOCABULARY, (BATCH, n), generator=generator) for n in (length + 1, LONG_PROMPT))  # type: ignore[return-value]


def decoding_weights(calm: CALM) -> list[Tensor]:
    """The matrices that one new token is multiplied with."""
    parts = [*calm.anchor_llm.modules(), *calm.cross_attns.modules()]
    once_a_prompt = {id(module) for block in calm.cross_attns.modules() for module in _of_contexts(block)}
    return [part.weight for part in parts if isinstance(part, nn.Linear) and id(part) not in once_a_prompt]


def _of_contexts(block: Any) -> list[nn.Module]:
    return [block.context_proj, block.attn.to_k, block.attn.to_v] if hasattr(block, "context_proj") else []


def generation_row(threads: int, rounds: int, new_tokens: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    calm, along = composition(), composition(shared_sequence=True)
    prompt, rates = torch.randint(VOCABULARY, (1, PROMPT)), []
    weights = decoding_weights(calm)
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(weights)),
            "composed": lambda: calm.generate(prompt, PROMPT + new_tokens, temperature=0.0),
            "along": lambda: along.generate(prompt, PROMPT + new_tokens, temperature=0.0),
            "anchor": lambda: generate(calm.anchor, prompt, max_new_tokens=new_tokens, temperature=0.0),
            "library": lambda: generate(calm.anchor_llm, prompt, max_new_tokens=new_tokens, temperature=0.0),
        },
        rounds,
    )
    limit = median(rates) / sum(weight.numel() * weight.element_size() for weight in weights)
    return {
        "new tokens": new_tokens,
        "threads": threads,
        "composed, tokens/s": new_tokens / median(seconds["composed"]),
        "augment reading along, tokens/s": new_tokens / median(seconds["along"]),
        "anchor alone, tokens/s": new_tokens / median(seconds["anchor"]),
        "composed / anchor alone": ratio(seconds["anchor"], seconds["composed"]),
        "composed / anchor through its library": ratio(seconds["library"], seconds["composed"]),
        "share of limit": new_tokens / median(seconds["composed"]) / limit,
    }


def training_row(threads: int, rounds: int, length: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    calm = composition().train()
    seq, prompt = training_inputs(length)
    states = calm.augment_states(prompt)
    seconds = in_turns(
        {
            "step": lambda: stepped(calm, calm(seq, prompt=prompt)),
            "kept": lambda: stepped(calm, calm(seq, augment_states=states)),
            "reading": lambda: calm.augment_states(prompt),
        },
        rounds,
    )
    return {
        "tokens": f"{BATCH} x {length}",
        "threads": threads,
        "step, s": median(seconds["step"]),
        "states kept, s": median(seconds["kept"]),
        "step / states kept": ratio(seconds["step"], seconds["kept"]),
        "share of time in the augment": ratio(seconds["reading"], seconds["step"]),
        "share with states kept": 0.0,
    }


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        new_tokens={"type": int, "nargs": "+", "default": [32, 128, 256]},
        tokens={"type": int, "nargs": "+", "default": [64, 256, 512]},
    )
    warnings.simplefilter("ignore")
    rows = [generation_row(threads, options.rounds, n) for threads in options.threads for n in options.new_tokens]
    report("CALM, generation, anchor 4 x 256, augment 8 x 256", rows, options.json)
    rows = [training_row(threads, options.rounds, n) for threads in options.threads for n in options.tokens]
    report("CALM, training step, prompt 128", rows, options.json)


if __name__ == "__main__":
    main()
