"""CoCa alone: memory of the contrastive losses at a large batch, and how cost grows with batch and caption length.

Memory is the growth of a subprocess's peak resident set over the latents and their gradients; open_clip's formulas hold
the matrix of similarities, 256 MiB for 8,192 pairs, several times.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, in_own_process, in_turns, median, memory_growth, report, thread_counts, timed
from peers_coca_open_clip import clip_loss, siglip_loss
from torch import Tensor
from torch.nn.functional import normalize

from coca import CoCa, sigmoid_contrastive_loss, softmax_contrastive_loss

LOSSES = {
    "softmax, open_clip's formula": lambda x, y, scale, bias: clip_loss(x, y, scale),
    "softmax, ours": lambda x, y, scale, bias: softmax_contrastive_loss(x, y, scale),
    "sigmoid, open_clip's formula": siglip_loss,
    "sigmoid, ours": sigmoid_contrastive_loss,
}


def measure_one(kind: str, pairs: int, dim: int) -> tuple[float, float]:
    """MB beyond latents and gradients of a loss with its gradient, and seconds."""

    def latents(pairs: int) -> list[Tensor]:
        return [normalize(torch.randn(pairs, dim), dim=-1).requires_grad_() for _ in range(2)]

    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    LOSSES[kind](*latents(64), scale, bias).backward()  # what any first step takes
    x, y = latents(pairs)
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    grown = memory_growth(lambda: LOSSES[kind](x, y, scale, bias).backward())
    return grown, timed(lambda: LOSSES[kind](x, y, scale, bias).backward())


def memory_rows(pairs: int, dim: int) -> list[dict[str, Any]]:
    rows = []
    for kind in LOSSES:
        megabytes, seconds = in_own_process(__file__, kind, pairs, dim)
        rows.append({"loss": kind, "threads": torch.get_num_threads(), "extra MB": megabytes, "seconds": seconds})
    return rows


def cost_rows(model: CoCa, batch: int, length: int, axis: str, rounds: int) -> list[dict[str, Any]]:
    image, text = torch.randn(batch, 64, 128), torch.randint(1, 1024, (batch, length))
    variants: dict[str, Callable[[], object]] = {
        "training step": lambda: model(text, image_tokens=image, return_loss=True).backward(),
        "captions": lambda: model.generate(image_tokens=image, max_new_tokens=length),
    }
    seconds = in_turns(variants, min(rounds, 3))
    return [
        {
            "what": f"{name}, {batch} x {length} tokens",
            "threads": torch.get_num_threads(),
            "tokens/s": batch * length / median(seconds[name]),
            "axis": f"{axis}, {name}",
            "size": batch if axis == "batch" else length,
            "cost": 1e3 * median(seconds[name]),
            "unit": "ms",
        }
        for name in variants
    ]


def main() -> None:
    options = arguments(
        __doc__ or "",
        batch={"type": int, "default": 8192, "help": "pairs"},
        dim={"type": int, "default": 512, "help": "features of a latent"},
    )
    if options.measure:
        torch.set_num_threads(options.threads[0])
        kind, *sizes = options.measure
        print(json.dumps(measure_one(kind, *map(int, sizes))))
        return
    losses, costs = [], []
    for _ in thread_counts(options):
        losses += memory_rows(options.batch, options.dim)
        torch.manual_seed(0)
        model = CoCa(dim=128, num_tokens=1024, unimodal_depth=2, multimodal_depth=2, dim_head=32, heads=4, bos_id=1)
        for batch in (8, 32, 128):
            costs += cost_rows(model, batch, 32, "batch", options.rounds)
        for length in (32, 128, 256):
            costs += cost_rows(model, 8, length, "caption length", options.rounds)
    title = f"Contrastive loss, forward and backward, {options.batch} pairs x {options.dim}"
    report(title, losses, options.json)
    report("Cost by batch and caption length, dim 128, 2 + 2 layers, 64 image tokens", costs, options.json)


if __name__ == "__main__":
    main()
