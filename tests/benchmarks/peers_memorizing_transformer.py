"""A memory and a training step beside the original `memorizing-transformers-pytorch` 0.4.1, with the same weights.

    nox -s bench_peers -- memorizing_transformer --sizes 8192 65536

Searches: the same unit vectors are put into both memories, the original's through its own `KNNMemory` (an HNSW graph
of faiss), and the same queries asked; recall@32 of both against `torch.topk` over all keys. Training: one forward and
backward of a batch of 2 x 512 tokens with 8 heads of 64 in one memorizing layer, at filled memories, of the same
weights in both (`interop`); the memory then grows by the segment. "share of limit" is the time of the matrix products
alone that score every query with every key, over ours: an exact search cannot be faster.

Cost by size of the memory: a row a size. The original is looked for in $BENCH_PEERS/memorizing-transformer.
"""

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import arguments, in_turns, median, ratio, report

DIM_HEAD, NEIGHBOURS, ROWS, SEGMENT, HEADS = 64, 32, 2, 512, 8


def original_package() -> Any:
    """The original's module."""
    folder = Path(os.environ.get("BENCH_PEERS", ""), "memorizing-transformer")
    if not folder.is_dir():
        raise SystemExit(f"the original package is not in {folder}: run nox -s bench_peers")
    sys.path.append(str(folder))
    import memorizing_transformers_pytorch.memorizing_transformers_pytorch as module
    from memorizing_transformers_pytorch.knn_memory import KNNMemory

    return module, KNNMemory


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def recall(kv: torch.Tensor, found: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor) -> float:
    """The part of the true 32 nearest keys that is among those found: scores at least that of the 32nd."""
    worst = (queries @ kv[:, 0].T).topk(NEIGHBOURS, dim=-1).values[:, -1:]
    scores = torch.einsum("qd,qkd->qk", queries, found[..., 0, :])
    return float(((scores >= worst - 1e-5) & mask).float().mean())


def search_row(original: Any, size: int, count: int, threads: int, rounds: int, folder: str) -> dict[str, Any]:
    from memorizing_transformer import KNNMemory

    kv, queries = torch.stack((unit(1, size, DIM_HEAD), unit(1, size, DIM_HEAD)), dim=-2), unit(1, count, DIM_HEAD)
    ours = KNNMemory(DIM_HEAD, size, 1)
    theirs = original(DIM_HEAD, size, 1, memmap_filename=f"{folder}/{size}.memmap", multiprocessing=False)
    for memory in (ours, theirs):
        memory.add(kv)
    keys = kv[0, :, 0].contiguous()
    seconds = in_turns(
        {
            "ours": lambda: ours.search(queries, NEIGHBOURS),
            "original": lambda: theirs.search(queries, NEIGHBOURS),
            "product": lambda: queries[0] @ keys.T,
        },
        rounds,
    )
    found = {name: memory.search(queries, NEIGHBOURS) for name, memory in (("ours", ours), ("original", theirs))}
    return {
        "what": f"search, {size:,} keys, {count} queries",
        "threads": threads,
        "original": f"{1000 * median(seconds['original']):.0f} ms",
        "ours": f"{1000 * median(seconds['ours']):.0f} ms",
        "times as fast": ratio(seconds["original"], seconds["ours"]),
        "share of limit": ratio(seconds["product"], seconds["ours"]),
        **{f"recall of {name}": recall(kv[0], kv_[0], mask[0], queries[0]) for name, (kv_, mask) in found.items()},
    }


def filled(memories: Any, size: int) -> None:
    for memory in memories:
        memory.add(torch.stack((unit(ROWS, size, DIM_HEAD), torch.randn(ROWS, size, DIM_HEAD)), dim=-2))


def searched(memory: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Wraps a memory's search so that the last queries and what was found can be looked at."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    name = "retrieve" if hasattr(memory, "retrieve") else "search"
    search: Callable[..., Any] = getattr(memory, name)

    def spied(queries: torch.Tensor, *given: Any, **named: Any) -> Any:
        result = search(queries, *given, **named)
        kv, mask = (result.kv, result.mask) if name == "retrieve" else result
        calls[:] = [(queries.detach(), kv.detach() * mask[..., None, None])]
        return result

    setattr(memory, name, spied)
    return calls


def training_row(module: Any, size: int, threads: int, rounds: int, folder: str) -> dict[str, Any]:
    from memorizing_transformer.interop import from_memorizing_transformers_pytorch

    # both memories hold `size` keys at every timed step; the original's is made larger, for it is reset when it is full
    room = size + (rounds + 2) * SEGMENT
    settings: dict[str, Any] = {"num_retrieved_memories": NEIGHBOURS, "max_knn_memories": room}
    sizes: dict[str, Any] = {"num_tokens": 256, "dim": 512, "depth": 2, "dim_head": DIM_HEAD, "heads": HEADS}
    place = {"knn_memories_directory": f"{folder}/train-{size}"}
    theirs = module.MemorizingTransformer(**sizes, **settings, **place, memorizing_layers=2)
    ours = from_memorizing_transformers_pytorch(theirs.state_dict(), dim_head=DIM_HEAD, **settings)
    memories = {
        "ours": ours.create_knn_memories(batch_size=ROWS),
        "original": theirs.create_knn_memories(batch_size=ROWS),
    }
    for one in memories.values():
        filled(one, size)
    ids, labels = torch.randint(0, 256, (2, ROWS, SEGMENT))

    def step(name: str, model: Any) -> None:
        model.zero_grad()
        model(ids, knn_memories=memories[name], labels=labels).backward()

    q, keys = unit(ROWS, HEADS * SEGMENT, DIM_HEAD), unit(ROWS, size, DIM_HEAD)
    seconds = in_turns(
        {
            "ours": lambda: step("ours", ours),
            "original": lambda: step("original", theirs),
            "product": lambda: [row @ more.T for row, more in zip(q, keys, strict=True)],
        },
        rounds,
    )
    recalls = {}
    for name, model in (("ours", ours), ("original", theirs)):
        memory = memories[name][0]
        calls = searched(memory)
        held = torch.as_tensor(memory.store.data[:, :, 0] if name == "ours" else memory.db[:, :, 0].copy())
        model(ids, knn_memories=memories[name], add_knn_memory=False)
        used = memory.sizes[0] if name == "ours" else int(memory.db_offsets[0])
        queries, kv = calls[0]
        queries, kv = queries.flatten(1, -2)[:, ::16], kv.flatten(1, -4)[:, ::16]
        worst = (queries @ held[:, :used].mT).topk(NEIGHBOURS, dim=-1).values[..., -1:]
        scores = torch.einsum("bqd,bqkd->bqk", queries, kv[..., 0, :])
        recalls[f"recall of {name}"] = float((scores >= worst - 1e-5).float().mean())
    for one in memories.values():
        one.cleanup()
    return {
        "what": f"training step, {ROWS} x {SEGMENT} tokens, {HEADS} heads, {size:,} memories a row",
        "threads": threads,
        "original": f"{median(seconds['original']):.2f} s",
        "ours": f"{median(seconds['ours']):.2f} s",
        "times as fast": ratio(seconds["original"], seconds["ours"]),
        "share of limit": ratio(seconds["product"], seconds["ours"]),
        **recalls,
    }


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        sizes={"type": int, "nargs": "+", "default": [8192, 65536]},
        queries={"type": int, "nargs": "+", "default": [512]},
    )
    module, original = original_package()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        import faiss

        faiss.omp_set_num_threads(threads)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the original's
            for size in options.sizes:
                rows += [
                    search_row(original, size, count, threads, options.rounds, folder) for count in options.queries
                ]
                rows.append(training_row(module, size, threads, options.rounds, folder))
    assert all(math.isfinite(row["times as fast"]) for row in rows)
    report("The memory beside the original's", rows, options.json)


if __name__ == "__main__":
    main()
