"""CALM beside the original package (CALM-Pytorch), the same models and connections in turns in one run.

    nox -s bench_peers -- calm

Anchor 4 x 256, augment 8 x 256 (x-transformers), prompt 32; training at batch 4 with prompts of 128. The original runs
over everything for each token. It is looked for in $BENCH_PEERS/calm-pytorch. The limit of decoding is reading every
weight of the anchor and of the cross-attentions once a token, at the rate at which this machine multiplies one row with
them; the limit of a training step is the products it cannot do without, at this machine's rate for one large product.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_calm_pytorch import (
    BATCH,
    LONG_PROMPT,
    PROMPT,
    VOCABULARY,
    composition,
    decoder,
    decoding_weights,
    stepped,
    training_inputs,
)
from measure import arguments, in_turns, matmul_flops, median, ratio, read_bandwidth, report
from torch import nn

from calm_pytorch import CALM, AugmentParams
from calm_pytorch.interop import ORIGINAL_ATTENTION
from lm_core.generation.generate import generate


def original_composition(**options: Any) -> Any:
    """The original's CALM of the same models, by its own defaults."""
    folder = Path(os.environ.get("BENCH_PEERS", ""), "calm-pytorch")
    if not (folder / "CALM_pytorch").is_dir():
        raise SystemExit(f"the original package is not in {folder}: run nox -s bench_peers")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import CALM_pytorch

    torch.manual_seed(0)
    return CALM_pytorch.CALM(decoder(4), CALM_pytorch.AugmentParams(decoder(8), **options))


def row(
    what: str, threads: int, seconds: dict[str, list[float]], shown: Callable[[float], str], axis: str, size: int
) -> dict[str, Any]:
    return {
        "what": what,
        "threads": threads,
        "CALM-Pytorch": shown(median(seconds["original"])),
        "ours": shown(median(seconds["ours"])),
        "times as fast": ratio(seconds["original"], seconds["ours"]),
        "axis": axis,
        "size": size,
        "cost": median(seconds["ours"]),
        "peer cost": median(seconds["original"]),
        "unit": "s",
    }


def generation_row(new_tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    calm, original = composition(), original_composition()
    prompt, rates = torch.randint(VOCABULARY, (1, PROMPT)), []
    weights = decoding_weights(calm)
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(weights)),
            "ours": lambda: calm.generate(prompt, PROMPT + new_tokens),
            "anchor": lambda: generate(calm.anchor, prompt, max_new_tokens=new_tokens, temperature=1.0),
            "library": lambda: generate(calm.anchor_llm, prompt, max_new_tokens=new_tokens, temperature=1.0),
            "original": lambda: original.generate(prompt, PROMPT + new_tokens),
        },
        rounds,
    )
    what = f"{new_tokens} new tokens"
    result = row(what, threads, seconds, lambda s: f"{new_tokens / s:.1f} tokens/s", "new tokens", new_tokens)
    limit = median(rates) / sum(weight.numel() * weight.element_size() for weight in weights)
    return result | {
        "share of limit": new_tokens / median(seconds["ours"]) / limit,
        "of the anchor alone": ratio(seconds["anchor"], seconds["ours"]),
        "of the anchor through its library": ratio(seconds["library"], seconds["ours"]),
        "anchor alone, times as fast": ratio(seconds["original"], seconds["anchor"]),
    }


def connections_row(count: int, threads: int, rounds: int) -> dict[str, Any]:
    """32 new tokens with ``count`` connections spread over the layers, the same in both."""
    torch.set_num_threads(threads)
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    pairs = [(8 * i // count, 4 * i // count) for i in range(1, count + 1)]
    torch.manual_seed(0)
    params = AugmentParams(decoder(8), connections=pairs)
    calm = CALM(decoder(4), params, attn_kwargs=ORIGINAL_ATTENTION).eval()
    original = original_composition(connections=tuple(pairs))
    seconds = in_turns(
        {
            "ours": lambda: calm.generate(prompt, PROMPT + 32),
            "original": lambda: original.generate(prompt, PROMPT + 32),
        },
        rounds,
    )
    what = f"32 new tokens, {count} connections"
    return row(what, threads, seconds, lambda s: f"{32 / s:.1f} tokens/s", "connections", count)


def products(calm: CALM, length: int, *, kept: bool) -> float:
    """Floating-point operations of the matrix products of a training step."""
    tokens, context = BATCH * length, BATCH * LONG_PROMPT

    def size(module: nn.Module) -> int:
        return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))

    anchor: Any = calm.anchor_llm
    stack = size(anchor.attn_layers)
    first = min(anchor_layer for _, anchor_layer in calm.connections[0])
    depth = len(calm.anchor_blocks)
    # frozen: a product forward, one backward behind the first connection; learned: one more for their gradients
    behind = (depth - first) / depth
    work = tokens * (stack * (1 + behind) + 2 * size(anchor.to_logits))
    for block in calm.cross_attns[0]:
        learned = size(block)
        of_context = size(block.context_proj) + size(block.attn.to_k) + size(block.attn.to_v)
        work += 3 * tokens * (learned - of_context) + 3 * context * of_context - context * size(block.context_proj)
    if not kept:
        augment: Any = calm.augment_llms[0]
        last = max(augment_layer for augment_layer, _ in calm.connections[0])
        work += context * size(augment.attn_layers) * last / calm.augments[0].depth
    return 2.0 * work


def training_rows(length: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    calm, original = composition().train(), original_composition()
    seq, prompt = training_inputs(length)
    states, peaks = calm.augment_states(prompt), []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops(1024, 256, 1024)),
            "step": lambda: stepped(calm, calm(seq, prompt=prompt)),
            "kept": lambda: stepped(calm, calm(seq, augment_states=states)),
            "original": lambda: stepped(original.cross_attns, original(seq, prompt=prompt)),
        },
        rounds,
    )
    rows = []
    for name, what in (("step", "training step"), ("kept", "training step, states kept")):
        times = {"ours": seconds[name], "original": seconds["original"]}
        limit = products(calm, length, kept=name == "kept") / median(peaks)
        result = row(f"{what}, {BATCH} x {length}", threads, times, lambda s: f"{s:.3f} s", f"length, {what}", length)
        rows.append(result | {"share of limit": limit / median(seconds[name])})
    return rows


MEMORY = "--memory-of"


def peak_memory(name: str) -> float:
    """MiB that two training steps take beyond the models, in a process of its own; Linux tells it."""
    command = [sys.executable, __file__, MEMORY, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _print_peak_memory(name: str) -> None:
    torch.set_num_threads(1)
    seq, prompt = training_inputs(256)
    model: Any = original_composition() if name == "original" else composition().train()
    learned = model.cross_attns
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _resident("VmRSS")
    for _ in range(2):
        stepped(learned, model(seq, prompt=prompt))
    print(_resident("VmHWM") - before)


def main() -> None:
    warnings.simplefilter("ignore")
    if MEMORY in sys.argv:
        _print_peak_memory(sys.argv[-1])
        return
    options = arguments(
        __doc__.splitlines()[0],
        new_tokens={"type": int, "nargs": "+", "default": [32, 64, 128]},
        tokens={"type": int, "nargs": "+", "default": [64, 256]},
    )
    original_composition()
    rows = [
        generation_row(n, threads, min(options.rounds, 3)) for threads in options.threads for n in options.new_tokens
    ]
    report("CALM beside the original, generation from a prompt of 32", rows, options.json)
    rows = [connections_row(n, threads, min(options.rounds, 3)) for threads in options.threads for n in (1, 2, 4)]
    report("CALM beside the original, growth with the connections", rows, options.json)
    rows = [
        one for threads in options.threads for n in options.tokens for one in training_rows(n, threads, options.rounds)
    ]
    report("CALM beside the original, training with prompts of 128", rows, options.json)
    if not Path("/proc/self/clear_refs").exists():
        return
    memory = {name: peak_memory(name) for name in ("original", "ours")}
    row_of_memory = {
        "what": "peak memory of a step, 4 x 256",
        "threads": 1,
        "CALM-Pytorch": f"{memory['original']:.0f} MiB",
        "ours": f"{memory['ours']:.0f} MiB",
        "times as small": memory["original"] / memory["ours"],
    }
    report("CALM beside the original, memory", [row_of_memory], options.json)


if __name__ == "__main__":
    main()
