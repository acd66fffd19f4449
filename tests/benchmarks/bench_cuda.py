"""What a GPU does with PaLM, Llama, the loss and the memory: training, decoding, memory of the loss, exact search.

    nox -s bench -- cuda

Half precision is bfloat16 and products' peak is measured beside the steps. The twin is Hugging Face's CohereForCausalLM
of the same sizes, with PyTorch's attention kernels. Decoding replays a CUDA graph of the step; the Llama has 0.5 B
random weights. Without a CUDA device it says so and measures nothing.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import arguments, bytes_of, in_turns, median, ratio, report
from peers_hugging_face import cohere_twin, operations, stepped
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lm_core.adapters import as_causal_lm
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


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / median(in_turns({"copy": lambda: target.copy_(source)}, 5)["copy"])


def new_tokens_of(model: torch.nn.Module, batch: int, new: int, compile: bool = False) -> Callable[[], torch.Tensor]:
    """Greedy generation of ``new`` tokens after a prompt of 128."""
    prompt = torch.randint(32_768, (batch, 128), device="cuda")
    return lambda: generate(model, prompt, max_new_tokens=new, temperature=0.0, compile=compile).tokens


def theirs(model: PreTrainedModel, batch: int, new: int) -> Callable[[], torch.Tensor]:
    """The same with transformers' own loop, at its default settings."""
    prompt = torch.randint(32_768, (batch, 128), device="cuda")
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def decoding(rounds: int) -> list[dict[str, object]]:
    """A row for each size and batch size; the limit reads every weight once a token at the speed of a copy."""
    bandwidth, new, rows = copy_bandwidth(), 128, []
    sizes = {"211 M": large_palm, "1.4 B": lambda: PaLM(dim=2048, depth=24, heads=16, num_tokens=32_768).cuda()}
    for name, build in sizes.items():
        palm = build().bfloat16().eval()
        weights = bytes_of(list(palm.parameters()))
        for batch, compile in ((1, False), (1, True), (16, False)):
            seconds = in_turns({"palm": new_tokens_of(palm, batch, new, compile)}, rounds)["palm"]
            rows.append(
                {
                    "PaLM": name,
                    "batch": batch,
                    "compiled": compile,
                    "tokens/s": batch * new / median(seconds),
                    "share of limit": new * weights / bandwidth / median(seconds),
                    "copy GB/s": bandwidth / 1e9,
                }
            )
        del palm
        torch.cuda.empty_cache()
    return rows


def decoding_next_to_transformers(rounds: int) -> list[dict[str, object]]:
    """A row for each model and batch size: PaLM and its twin, and one Llama with both loops."""
    palm = large_palm().bfloat16().eval()
    twin = cohere_twin(palm).cuda().bfloat16()
    sizes = {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24, "vocab_size": 32_768}
    heads = {"num_attention_heads": 20, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    llama = LlamaForCausalLM(config).cuda().bfloat16().eval()
    rows, new = [], 64
    for name, ours, other, batches in (("PaLM 211 M", palm, twin, (1, 16)), ("Llama 0.5 B", llama, llama, (1, 32))):
        ours = as_causal_lm(ours)
        for batch in batches:
            variants = {"ours": new_tokens_of(ours, batch, new), "theirs": theirs(other, batch, new)}
            seconds = in_turns(variants, min(rounds, 3))
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "tokens/s": batch * new / median(seconds["ours"]),
                    "transformers tokens/s": batch * new / median(seconds["theirs"]),
                    "times as fast": ratio(seconds["theirs"], seconds["ours"]),
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
        "PaLM, 128 greedy tokens after a prompt of 128, bfloat16": decoding,
        "64 greedy tokens next to transformers' generate, bfloat16": decoding_next_to_transformers,
        "Loss from hidden states, 8,192 tokens, 1,024 features, bfloat16": losses,
        "Exact search of a memory, 4,096 queries, 32 neighbours": searches,
        "Memory step, 32 rows x 128 tokens x 8 heads, 32 neighbours among 32,768": memory_steps,
    }.items():
        report(f"{title} ({device})", made(options.rounds), options.json)


if __name__ == "__main__":
    main()
