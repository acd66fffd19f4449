"""What a GPU does with PaLM, the loss and the memory: training, decoding, memory of the loss, exact search.

    nox -s bench -- cuda

Half precision is bfloat16 and products' peak is measured beside the steps. The twin is Hugging Face's CohereForCausalLM
of the same sizes, with PyTorch's attention kernels. Without a CUDA device it says so and measures nothing.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import arguments, in_turns, median, ratio, report
from peers_hugging_face import cohere_twin, operations, stepped

from lm_core.generation.generate import generate
from lm_core.losses.losses import ACCELERATOR_TILE_BYTES, linear_cross_entropy
from memorizing_transformer import KNNMemory
from palm_rlhf import PaLM


def large_palm() -> PaLM:
    """211 M parameters."""
    torch.manual_seed(0)
    return PaLM(dim=1024, depth=12, heads=16, num_tokens=32_768).cuda()


def training(rounds: int) -> list[dict[str, object]]:
    """A row each for the step as written and compiled."""
    palm = large_palm().train()
    twin = cohere_twin(palm).cuda().train()
    batch, length = 8, 1024
    ids = torch.randint(32_768, (batch, length + 1), device="cuda")
    inputs = ids[:, :-1]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def narrow(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward()
        stepped(model, loss)

    compiled, compiled_twin = torch.compile(palm), torch.compile(twin)
    seconds = in_turns(
        {
            "product": lambda: a @ b,
            "as written": lambda: narrow(lambda: palm(ids, return_loss=True), palm),
            "twin as written": lambda: narrow(lambda: twin(inputs, labels=inputs).loss, twin),
            "compiled": lambda: narrow(lambda: compiled(ids, return_loss=True), palm),
            "twin compiled": lambda: narrow(lambda: compiled_twin(inputs, labels=inputs).loss, twin),
        },
        rounds,
    )
    peak = 2 * 8192**3 / median(seconds["product"])
    return [
        {
            "step": name,
            "PaLM tokens/s": batch * length / median(seconds[name]),
            "twin tokens/s": batch * length / median(seconds[f"twin {name}"]),
            "PaLM / twin": ratio(seconds[f"twin {name}"], seconds[name]),
            "PaLM of peak": operations(palm, batch, length) / median(seconds[name]) / peak,
            "peak TFLOP/s": peak / 1e12,
        }
        for name in ("as written", "compiled")
    ]


def decoding(rounds: int) -> list[dict[str, object]]:
    """A row for each batch size; the limit reads every weight once a token at the speed of a copy."""
    palm = large_palm().bfloat16().eval()
    twin = cohere_twin(palm).cuda().bfloat16()
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
    new, rows = 128, []
    for batch in (1, 16):
        prompt = torch.randint(32_768, (batch, 128), device="cuda")
        mask = torch.ones_like(prompt)
        seconds = in_turns(
            {
                "copy": lambda: target.copy_(source),
                "palm": lambda prompt=prompt: generate(palm, prompt, max_new_tokens=new, temperature=0.0),
                "twin": lambda prompt=prompt, mask=mask: twin.generate(
                    prompt, attention_mask=mask, max_new_tokens=new, do_sample=False
                ),
            },
            rounds,
        )
        bandwidth = 2 * source.numel() / median(seconds["copy"])
        weights = sum(parameter.numel() * parameter.element_size() for parameter in palm.parameters())
        rows.append(
            {
                "batch": batch,
                "PaLM tokens/s": batch * new / median(seconds["palm"]),
                "twin tokens/s": batch * new / median(seconds["twin"]),
                "PaLM / twin": ratio(seconds["twin"], seconds["palm"]),
                "share of limit": new * weights / bandwidth / median(seconds["palm"]),
                "copy GB/s": bandwidth / 1e9,
            }
        )
    return rows


def losses(rounds: int) -> list[dict[str, object]]:
    """A row for each vocabulary: 8,192 tokens of 1,024 features, forward and backward, in each implementation."""
    rows = []
    for vocabulary in (32_768, 131_072):
        hidden = torch.randn(1, 8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (0.05 * torch.randn(vocabulary, 1024, device="cuda")).bfloat16().requires_grad_()
        labels = torch.randint(vocabulary, (1, 8192), device="cuda")
        tile = max(ACCELERATOR_TILE_BYTES // (4 * vocabulary), 256)
        variants = {
            "plain": lambda h=hidden, w=weight, y=labels: F.cross_entropy((h @ w.T)[0].float(), y[0]),
            # with Liger-Kernel installed, its kernels; in tiles of a given size, our own operators
            "ours": lambda h=hidden, w=weight, y=labels: linear_cross_entropy(h, w, y),
            "tiles": lambda h=hidden, w=weight, y=labels, t=tile: linear_cross_entropy(h, w, y, chunk_size=t),
        }
        if hasattr(F, "linear_cross_entropy"):  # torch 2.13
            variants["torch"] = lambda h=hidden, w=weight, y=labels: F.linear_cross_entropy(
                h[0], w, y[0], options=torch.nn.LinearCrossEntropyOptions()
            )

        def step(loss_of: Callable[[], torch.Tensor], hidden=hidden, weight=weight) -> None:
            hidden.grad = weight.grad = None
            loss_of().backward()

        seconds = in_turns({name: (lambda f=function: step(f)) for name, function in variants.items()}, rounds)
        peaks = {}
        for name, function in variants.items():
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(function)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        rows.append(
            {
                "vocabulary": vocabulary,
                "plain ms": 1e3 * median(seconds["plain"]),
                "plain MB": peaks["plain"],
                **{
                    f"{name} time of plain": ratio(seconds[name], seconds["plain"])
                    for name in variants
                    if name != "plain"
                },
                **{f"{name} memory of plain": peaks[name] / peaks["plain"] for name in variants if name != "plain"},
            }
        )
    return rows


def searches(rounds: int) -> list[dict[str, object]]:
    """A row for each size of an exact memory on the device: 32 neighbours of 4,096 queries, 64 features."""
    rows = []
    for size in (65_536, 262_144):
        row: dict[str, object] = {"keys": size}
        kv = F.normalize(torch.randn(1, size, 2, 64, device="cuda"), dim=-1)
        queries = F.normalize(torch.randn(1, 4096, 64, device="cuda"), dim=-1)
        memories = {name: KNNMemory(64, size, 1, storage=name, device="cuda") for name in ("float32", "bfloat16")}
        for memory in memories.values():
            memory.add(kv)
        keys = kv[0, :, 0].contiguous()
        variants = {name: (lambda m=memory, q=queries: m.retrieve(q, 32)) for name, memory in memories.items()}
        variants["product alone"] = lambda q=queries, keys=keys: q[0] @ keys.T
        for name, times in in_turns(variants, rounds).items():
            row[f"{name} ms"] = 1e3 * median(times)
        rows.append(row)
    return rows


def memory_steps(rounds: int) -> list[dict[str, object]]:
    """A row for each number format: 128 tokens of 32 rows are searched for by 8 heads among 32,768, then added."""
    rows = []
    queries = F.normalize(torch.randn(32, 8 * 128, 64, device="cuda"), dim=-1)
    new = F.normalize(torch.randn(32, 128, 2, 64, device="cuda"), dim=-1)
    for name in ("float32", "bfloat16", "int8"):
        memory = KNNMemory(64, 32_768, 32, storage=name, device="cuda")
        for _ in range(64):
            memory.add(F.normalize(torch.randn(32, 512, 2, 64, device="cuda"), dim=-1))
        variants = {"retrieve": lambda m=memory: m.retrieve(queries, 32), "add": lambda m=memory: m.add(new)}
        times = in_turns(variants, rounds)
        row: dict[str, object] = {"storage": name}
        row |= {f"{part} ms": 1e3 * median(seconds) for part, seconds in times.items()}
        row["step ms"] = sum(1e3 * median(seconds) for seconds in times.values())
        rows.append(row)
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing is measured")
        return
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name()
    for title, made in {
        "PaLM, a training step of 8 x 1,024 tokens, 211 M parameters, bfloat16 autocast": training,
        "PaLM, 128 greedy tokens after a prompt of 128, 211 M parameters in bfloat16": decoding,
        "Loss from hidden states, 8,192 tokens, 1,024 features, bfloat16": losses,
        "Exact search of a memory, 4,096 queries, 32 neighbours": searches,
        "Memory step, 32 rows x 128 tokens x 8 heads, 32 neighbours among 32,768": memory_steps,
    }.items():
        report(f"{title} ({device})", made(options.rounds), options.json)


if __name__ == "__main__":
    main()
