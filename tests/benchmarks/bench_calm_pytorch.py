"""CALM: generation against the anchor alone, a training step with and without states read before.

    python tests/benchmarks/bench_calm_pytorch.py --threads 1 --json calm.json

Anchor 4 x 256, augment 8 x 256 (x-transformers), prompt 32 and 128 new tokens; training at batch 4 x 256, prompt 128.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import arguments, in_turns, median, ratio, report
from torch import Tensor, nn

from calm_pytorch import CALM, AugmentParams
from calm_pytorch.interop import original_connections
from lm_core.generation import generate

VOCABULARY, PROMPT, NEW = 1024, 32, 128


def decoder(depth: int) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=512, attn_layers=Decoder(dim=256, depth=depth, heads=4)
    ).eval()


def stepped(model: Any, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


def original_composition() -> Any:
    """The original package's CALM, if $BENCH_PEERS/calm-pytorch holds it."""
    folder = Path(os.environ.get("BENCH_PEERS", ""), "calm-pytorch")
    if not (folder / "CALM_pytorch").is_dir():
        return None
    sys.path.append(str(folder))
    import CALM_pytorch

    return CALM_pytorch.CALM(decoder(4), CALM_pytorch.AugmentParams(decoder(8)))


def measured(threads: int, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    anchor, augment = decoder(4), decoder(8)
    calm = CALM(
        anchor,
        AugmentParams(augment, connections=original_connections(8, 4)),
        attn_kwargs={"heads": 8, "dim_head": 64},
    ).eval()
    original = original_composition()
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    variants = {
        "composed": lambda: calm.generate(prompt, PROMPT + NEW, temperature=0.0),
        "anchor": lambda: generate(anchor, prompt, max_new_tokens=NEW, temperature=0.0),
    }
    if original is not None:
        variants["original"] = lambda: original.generate(prompt, PROMPT + NEW)
    seconds = in_turns(variants, rounds)
    row: dict[str, Any] = {"work": f"{NEW} tokens", "threads": threads}
    row |= {f"{name} tokens/s": NEW / median(times) for name, times in seconds.items()}
    row["composed / anchor"] = ratio(seconds["anchor"], seconds["composed"])
    if original is not None:
        row["composed / original"] = ratio(seconds["original"], seconds["composed"])
    rows.append(row)

    seq, long_prompt = torch.randint(VOCABULARY, (4, 257)), torch.randint(VOCABULARY, (4, 128))
    calm.train()
    states = calm.augment_states(long_prompt)
    steps = {
        "step": lambda: stepped(calm, calm(seq, prompt=long_prompt)),
        "step, states kept": lambda: stepped(calm, calm(seq, augment_states=states)),
    }
    if original is not None:
        steps["original step"] = lambda: stepped(original.cross_attns, original(seq, prompt=long_prompt))
    seconds = in_turns(steps, rounds)
    row = {"work": "training 4 x 256", "threads": threads}
    row |= {f"{name} s": median(times) for name, times in seconds.items()}
    if original is not None:
        row["original / step"] = ratio(seconds["original step"], seconds["step"])
        row["original / states kept"] = ratio(seconds["original step"], seconds["step, states kept"])
    row["share in the augment"] = 1 - ratio(seconds["step, states kept"], seconds["step"])
    rows.append(row)
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    warnings.simplefilter("ignore")
    rows = [row for threads in options.threads for row in measured(threads, options.rounds)]
    for work in dict.fromkeys(row["work"] for row in rows):
        report(f"CALM, {work}", [row for row in rows if row["work"] == work], options.json)


if __name__ == "__main__":
    main()
