"""CoCa beside the original `CoCa-pytorch` 0.1.0 with the same weights: a training step, and captions.

The original has no captioning; its naive loop here is what its users write: the whole forward for every token.
`BENCH_PEERS` is the folder that holds `coca/` with the original installed into it.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, in_turns, median, ratio, report

sys.path.append(str(Path(os.environ["BENCH_PEERS"]) / "coca"))

from coca_pytorch.coca_pytorch import CoCa as Original

from coca import CoCa
from coca.interop import from_coca_pytorch

parsed = arguments(
    __doc__ or "",
    captions={"type": int, "default": 4, "help": "captions at a time"},
    tokens={"type": int, "default": 64, "help": "tokens of a caption"},
)
DIM, VOCABULARY, BATCH, TEXT, IMAGE = 256, 8192, 16, 65, 64


def training(models: dict[str, torch.nn.Module], threads: int) -> dict[str, Any]:
    text, image = torch.randint(1, VOCABULARY, (BATCH, TEXT)), torch.randn(BATCH, IMAGE, DIM)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=0.0) for name, model in models.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        models[name](text, image_tokens=image, return_loss=True).backward()
        optimizers[name].step()

    seconds = in_turns({name: partial(step, name) for name in models}, parsed.rounds)
    return {
        "what": f"training step, batch {BATCH}, text {TEXT}",
        "threads": threads,
        "original": f"{median(seconds['original']):.3f} s",
        "ours": f"{median(seconds['ours']):.3f} s",
        "times as fast": ratio(seconds["original"], seconds["ours"]),
    }


def captioning(original: torch.nn.Module, ours: CoCa, threads: int) -> list[dict[str, Any]]:
    image, start = torch.randn(parsed.captions, IMAGE, DIM), torch.ones(parsed.captions, 1, dtype=torch.long)

    @torch.no_grad()
    def naive() -> torch.Tensor:
        ids = start
        for _ in range(parsed.tokens):
            logits = original(ids, image_tokens=image)[:, -1]
            logits[:, 0] = -torch.inf
            ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
        return ids[:, 1:]

    settings = {"image_tokens": image, "prefix": start, "max_new_tokens": parsed.tokens}
    variants = {
        "original": naive,
        "captioning": partial(ours.generate, **settings),
        "captioning, uncached": partial(ours.generate, **settings, use_cache=False),
    }
    if not torch.equal(naive(), variants["captioning"]()):
        raise SystemExit("the original and ours must caption alike")
    seconds = in_turns(variants, parsed.rounds)
    count = parsed.captions * parsed.tokens
    return [
        {
            "what": f"{name}, {parsed.captions} x {parsed.tokens} tokens",
            "threads": threads,
            "original": f"{count / median(seconds['original']):.0f} tokens/s",
            "ours": f"{count / median(seconds[name]):.0f} tokens/s",
            "times as fast": ratio(seconds["original"], seconds[name]),
        }
        for name in ("captioning", "captioning, uncached")
    ]


rows = []
for threads in parsed.threads:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    original = Original(dim=DIM, num_tokens=VOCABULARY, unimodal_depth=3, multimodal_depth=3)
    ours = from_coca_pytorch(original.state_dict())
    rows += [training({"original": original, "ours": ours}, threads), *captioning(original, ours, threads)]
title = f"CoCa and the original, dim {DIM}, 3 + 3 layers, vocabulary {VOCABULARY}, {IMAGE} image tokens"
report(title, rows, parsed.json)
