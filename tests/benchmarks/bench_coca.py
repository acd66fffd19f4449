"""CoCa alone: memory of the contrastive losses at a large batch, and how cost grows with batch and caption length.

Memory is the growth of a subprocess's peak resident set over the latents and their gradients; open_clip's formulas hold
the matrix of similarities, 256 MiB for 8,192 pairs, several times.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, in_turns, median, report

from coca import CoCa

MEMORY = """
import json, resource, sys, time, torch, torch.nn.functional as F
kind, b, d, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
from coca import softmax_contrastive_loss, sigmoid_contrastive_loss
def latents(b):
    return [F.normalize(torch.randn(b, d), dim=-1).requires_grad_() for _ in range(2)]
scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
def plain_softmax(x, y):
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
def plain_sigmoid(x, y):
    logits = scale * x @ y.T + bias
    return -F.logsigmoid((2 * torch.eye(len(x)) - 1) * logits).sum() / len(x)
loss = {"softmax, open_clip's formula": plain_softmax, "sigmoid, open_clip's formula": plain_sigmoid,
        "softmax, ours": lambda x, y: softmax_contrastive_loss(x, y, scale),
        "sigmoid, ours": lambda x, y: sigmoid_contrastive_loss(x, y, scale, bias)}[kind]
loss(*latents(64)).backward()
x, y = latents(b)
x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started = peak(), time.perf_counter()
loss(x, y).backward()
print(json.dumps([peak() - before, time.perf_counter() - started]))
"""

parsed = arguments(
    __doc__ or "",
    batch={"type": int, "default": 8192, "help": "pairs"},
    dim={"type": int, "default": 512, "help": "features of a latent"},
)


def memory_rows(threads: int) -> list[dict[str, Any]]:
    rows = []
    for loss in ("softmax", "sigmoid"):
        for whose in ("open_clip's formula", "ours"):
            sizes = (str(parsed.batch), str(parsed.dim), str(threads))
            command = [sys.executable, "-c", MEMORY, f"{loss}, {whose}", *sizes]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            megabytes, seconds = json.loads(done.stdout)
            rows.append({"loss": f"{loss}, {whose}", "threads": threads, "extra MiB": megabytes, "seconds": seconds})
    return rows


def cost_rows(model: CoCa, batch: int, length: int, threads: int, axis: str) -> list[dict[str, Any]]:
    image, text = torch.randn(batch, 64, 128), torch.randint(1, 1024, (batch, length))
    variants: dict[str, Callable[[], object]] = {
        "training step": lambda: model(text, image_tokens=image, return_loss=True).backward(),
        "captions": lambda: model.generate(image_tokens=image, max_new_tokens=length),
    }
    seconds = in_turns(variants, min(parsed.rounds, 3))
    return [
        {
            "what": f"{name}, {batch} x {length} tokens",
            "threads": threads,
            "tokens/s": batch * length / median(seconds[name]),
            "axis": f"{axis}, {name}",
            "size": batch if axis == "batch" else length,
            "cost": 1e3 * median(seconds[name]),
            "unit": "ms",
        }
        for name in variants
    ]


for threads in parsed.threads:
    torch.set_num_threads(threads)
    title = f"Contrastive loss, forward and backward, {parsed.batch} pairs x {parsed.dim}"
    report(title, memory_rows(threads), parsed.json)
    torch.manual_seed(0)
    model = CoCa(dim=128, num_tokens=1024, unimodal_depth=2, multimodal_depth=2, dim_head=32, heads=4, bos_id=1)
    rows = []
    for batch in (8, 32, 128):
        rows += cost_rows(model, batch, 32, threads, "batch")
    for length in (32, 128, 256):
        rows += cost_rows(model, 8, length, threads, "caption length")
    report("Cost by batch and caption length, dim 128, 2 + 2 layers, 64 image tokens", rows, parsed.json)
