"""CALM next to the original package (CALM-Pytorch), the same models and connections in turns in one run.

    nox -s bench_peers -- calm

Anchor 4 x 256, augment 8 x 256 (x-transformers), prompt 32; training at batch 4 with prompts of 128. The original runs
over everything for each token. It is looked for in $BENCH_PEERS/calm-pytorch. The limit of decoding is reading every
weight of the anchor and of the cross-attentions once a token, at the rate at which this machine multiplies one row with
them; the limit of a training step is the products it cannot do without, at this machine's rate for one large product.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import (
    arguments,
    bytes_of,
    compared,
    in_own_process,
    in_turns,
    matmul_flops,
    median,
    memory_growth,
    peer_folder,
    ratio,
    read_bandwidth,
    report,
    thread_counts,
    tokens_per_second,
)
from torch import Tensor, nn

from calm_pytorch import CALM, AugmentParams
from calm_pytorch.interop import ORIGINAL_ATTENTION, original_connections
from lm_core.generation.generate import generate

PEER = "CALM-Pytorch"
VOCABULARY, PROMPT, LONG_PROMPT, BATCH = 1024, 32, 128, 4


def decoder(depth: int) -> nn.Module:
    """An x-transformers decoder as the original's README has it, with its defaults."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=640, attn_layers=Decoder(dim=256, depth=depth, heads=4)
    ).eval()


def composition(**options: Any) -> CALM:
    """Our CALM with the original's connections and heads."""
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


def original_composition(**options: Any) -> Any:
    """The original's CALM of the same models, by its own defaults."""
    peer_folder("calm-pytorch")
    import CALM_pytorch

    torch.manual_seed(0)
    return CALM_pytorch.CALM(decoder(4), CALM_pytorch.AugmentParams(decoder(8), **options))


def generation_row(new_tokens: int, rounds: int) -> dict[str, Any]:
    calm, along, original = composition(), composition(shared_sequence=True), original_composition()
    prompt, rates = torch.randint(VOCABULARY, (1, PROMPT)), []
    weights = decoding_weights(calm)
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(weights)),
            "ours": lambda: calm.generate(prompt, PROMPT + new_tokens),
            "along": lambda: along.generate(prompt, PROMPT + new_tokens),
            "anchor": lambda: generate(calm.anchor, prompt, max_new_tokens=new_tokens, temperature=1.0),
            "library": lambda: generate(calm.anchor_llm, prompt, max_new_tokens=new_tokens, temperature=1.0),
            "theirs": lambda: original.generate(prompt, PROMPT + new_tokens),
        },
        rounds,
    )
    return compared(
        f"{new_tokens} new tokens",
        PEER,
        seconds,
        tokens_per_second(new_tokens),
        limit=new_tokens * bytes_of(weights) / median(rates),
        axis="new tokens",
        size=new_tokens,
        **{
            "augment reading along, tokens/s": new_tokens / median(seconds["along"]),
            "of the anchor alone": ratio(seconds["anchor"], seconds["ours"]),
            "of the anchor through its library": ratio(seconds["library"], seconds["ours"]),
            "anchor alone, times as fast": ratio(seconds["theirs"], seconds["anchor"]),
        },
    )


def connections_row(count: int, rounds: int) -> dict[str, Any]:
    """32 new tokens with ``count`` connections spread over the layers, the same in both."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    pairs = [(8 * i // count, 4 * i // count) for i in range(1, count + 1)]
    torch.manual_seed(0)
    params = AugmentParams(decoder(8), connections=pairs)
    calm = CALM(decoder(4), params, attn_kwargs=ORIGINAL_ATTENTION).eval()
    original = original_composition(connections=tuple(pairs))
    seconds = in_turns(
        {
            "ours": lambda: calm.generate(prompt, PROMPT + 32),
            "theirs": lambda: original.generate(prompt, PROMPT + 32),
        },
        rounds,
    )
    what = f"32 new tokens, {count} connections"
    return compared(what, PEER, seconds, tokens_per_second(32), axis="connections", size=count)


def products(calm: CALM, length: int, *, kept: bool) -> float:
    """Floating-point operations of the matrix products of a training step."""
    tokens, context = BATCH * length, BATCH * LONG_PROMPT

    def size(module: nn.Module) -> int:
        return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))

    anchor: Any = calm.anchor_llm
    stack = size(anchor.attn_layers)
    first = min(anchor_layer for _, anchor_layer in calm.connections[0])
    depth = len(calm.anchor_blocks)
    # frozen: a product forward, one backward after the first connection; learned: one more for their gradients
    after = (depth - first) / depth
    work = tokens * (stack * (1 + after) + 2 * size(anchor.to_logits))
    for block in calm.cross_attns[0]:
        learned = size(block)
        of_context = size(block.context_proj) + size(block.attn.to_k) + size(block.attn.to_v)
        work += 3 * tokens * (learned - of_context) + 3 * context * of_context - context * size(block.context_proj)
    if not kept:
        augment: Any = calm.augment_llms[0]
        last = max(augment_layer for augment_layer, _ in calm.connections[0])
        work += context * size(augment.attn_layers) * last / calm.augments[0].depth
    return 2.0 * work


def training_rows(length: int, rounds: int) -> list[dict[str, Any]]:
    calm, original = composition().train(), original_composition()
    seq, prompt = training_inputs(length)
    states, peaks = calm.augment_states(prompt), []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops(1024, 256, 1024)),
            "step": lambda: stepped(calm, calm(seq, prompt=prompt)),
            "kept": lambda: stepped(calm, calm(seq, augment_states=states)),
            "reading": lambda: calm.augment_states(prompt),
            "theirs": lambda: stepped(original.cross_attns, original(seq, prompt=prompt)),
        },
        rounds,
    )
    rows = []
    for name, what in (("step", "training step"), ("kept", "training step, states kept")):
        times = {"ours": seconds[name], "theirs": seconds["theirs"]}
        limit = products(calm, length, kept=name == "kept") / median(peaks)
        series: dict[str, Any] = {"axis": f"length, {what}", "size": length}
        reading = ratio(seconds["reading"], seconds["step"]) if name == "step" else 0.0
        series["share of time in the augment"] = reading
        rows.append(compared(f"{what}, {BATCH} x {length}", PEER, times, "{:.3f} s".format, limit=limit, **series))
    return rows


def memory_of_two_steps(name: str) -> float:
    """MB that two training steps take beyond the models."""
    seq, prompt = training_inputs(256)
    model: Any = original_composition() if name == "theirs" else composition().train()

    def steps() -> None:
        for _ in range(2):
            stepped(model.cross_attns, model(seq, prompt=prompt))

    return memory_growth(steps)


def memory_row() -> dict[str, Any]:
    memory = {name: in_own_process(__file__, name, threads=1) for name in ("theirs", "ours")}
    return {
        "what": "peak memory of a step, 4 x 256",
        "threads": 1,
        PEER: f"{memory['theirs']:.0f} MB",
        "ours": f"{memory['ours']:.0f} MB",
        "times as small": memory["theirs"] / memory["ours"],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    options = arguments(
        __doc__.splitlines()[0],
        new_tokens={"type": int, "nargs": "+", "default": [32, 64, 128]},
        tokens={"type": int, "nargs": "+", "default": [64, 256]},
    )
    if options.measure:
        torch.set_num_threads(options.threads[0])
        print(json.dumps(memory_of_two_steps(*options.measure)))
        return
    rounds, generation, connections, training = min(options.rounds, 3), [], [], []
    for _ in thread_counts(options):
        generation += [generation_row(new_tokens, rounds) for new_tokens in options.new_tokens]
        connections += [connections_row(count, rounds) for count in (1, 2, 4)]
        training += [row for length in options.tokens for row in training_rows(length, options.rounds)]
    report("CALM next to the original, generation from a prompt of 32", generation, options.json)
    report("CALM next to the original, growth with the connections", connections, options.json)
    report("CALM next to the original, training with prompts of 128", training, options.json)
    if Path("/proc/self/clear_refs").exists():
        report("CALM next to the original, memory", [memory_row()], options.json)


if __name__ == "__main__":
    main()
