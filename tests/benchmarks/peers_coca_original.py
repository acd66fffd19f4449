"""CoCa next to the original `CoCa-pytorch` 0.1.0 with the same weights: a training step, and captions.

The original has no captioning; its naive loop here is what its users write: the whole forward for every token.
`BENCH_PEERS` is the folder that holds `coca/` with the original installed into it.

The share of the limit is that of ours. A training step's limit is its matrix products at the best speed that large
products reach here; a caption's is reading the decoder's weights once a token at the speed of the memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import (
    arguments,
    compared,
    in_turns,
    matmul_flops,
    peer_folder,
    report,
    thread_counts,
    timed,
    tokens_per_second,
)
from torch.utils.flop_counter import FlopCounterMode

from coca import CoCa
from coca.interop import from_coca_pytorch

PEER = "CoCa-pytorch"
DIM, VOCABULARY, BATCH, TEXT, IMAGE = 256, 8192, 16, 65, 64


def training_flops(model: CoCa, step: Callable[[], object], batch: int) -> float:
    """Floating-point operations of a step's matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    # The counter does not look into the loss's own operator: three products with the vocabulary.
    return counter.get_total_flops() + 3 * 2 * batch * (TEXT - 1) * DIM * VOCABULARY


def training(models: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    text, image = torch.randint(1, VOCABULARY, (batch, TEXT)), torch.randn(batch, IMAGE, DIM)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=0.0) for name, model in models.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        models[name](text, image_tokens=image, return_loss=True).backward()
        optimizers[name].step()

    flops = training_flops(models["ours"], partial(step, "ours"), batch)
    limit = flops / matmul_flops()
    seconds = in_turns({name: partial(step, name) for name in models}, rounds)
    what = f"training step, batch {batch}, text {TEXT}"
    return compared(what, PEER, seconds, "{:.3f} s".format, limit=limit, axis="batch, training", size=batch)


@torch.no_grad()
def naive(original: Any, image: torch.Tensor, start: torch.Tensor, tokens: int) -> torch.Tensor:
    ids = start
    for _ in range(tokens):
        logits = original(ids, image_tokens=image)[:, -1]
        logits[:, 0] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return ids[:, 1:]


def weights_read(model: CoCa) -> float:
    """Seconds in which the memory gives the decoder's weights once."""
    parts = (model.unimodal_layers, model.multimodal_layers, model.token_emb)
    weights = [p.detach() for part in parts for p in part.parameters() if p.ndim == 2]
    return min(timed(lambda: [weight.sum() for weight in weights]) for _ in range(20))


def captioning(
    models: dict[str, Any], captions: int, tokens: int, rounds: int, axis: str, cached: bool = True
) -> dict[str, Any]:
    image, start = torch.randn(captions, IMAGE, DIM), torch.ones(captions, 1, dtype=torch.long)
    settings = {"image_tokens": image, "prefix": start, "max_new_tokens": tokens, "use_cache": cached}
    results: dict[str, torch.Tensor] = {}

    def run(name: str) -> None:
        if name == "ours":
            results[name] = models["ours"].generate(**settings)
        else:
            results[name] = naive(models["theirs"], image, start, tokens)

    seconds = in_turns({name: partial(run, name) for name in models}, rounds)
    if not torch.equal(results["theirs"], results["ours"]):
        raise SystemExit("the original and ours must caption alike")
    limit = weights_read(models["ours"]) * tokens if cached else None
    what = f"captions{'' if cached else ' without our cache'}, {captions} x {tokens} tokens"
    size = captions if axis.startswith("batch") else tokens
    return compared(what, PEER, seconds, tokens_per_second(captions * tokens), limit=limit, axis=axis, size=size)


def main() -> None:
    options = arguments(
        __doc__ or "",
        captions={"type": int, "default": 4, "help": "captions at a time"},
        tokens={"type": int, "default": 64, "help": "tokens of a caption"},
    )
    peer_folder("coca")
    from coca_pytorch.coca_pytorch import CoCa as Original

    rows = []
    for _ in thread_counts(options):
        torch.manual_seed(0)
        original = Original(dim=DIM, num_tokens=VOCABULARY, unimodal_depth=3, multimodal_depth=3)
        models = {"theirs": original, "ours": from_coca_pytorch(original.state_dict())}
        rows += [training(models, BATCH, options.rounds), training(models, BATCH // 4, 2)]
        few, length = options.captions, options.tokens
        rows.append(captioning(models, few, length, options.rounds, "new tokens"))
        rows.append(captioning(models, few, length // 2, 1, "new tokens, uncached", cached=False))
        rows += [captioning(models, few, tokens, 1, "new tokens") for tokens in (16, 32)]
        rows += [captioning(models, captions, 16, 1, "batch, captions") for captions in (1, 16)]
    title = f"CoCa and the original, dim {DIM}, 3 + 3 layers, vocabulary {VOCABULARY}, {IMAGE} image tokens"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
