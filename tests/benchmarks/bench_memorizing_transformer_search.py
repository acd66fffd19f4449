"""Searching a memory: time, recall@32 and bytes, exact against faiss, in turns in one run.

nox -s bench -- memorizing_transformer_search --sizes 8192 65536 262144 --queries 512 4096
"""

import math

import torch
from measure import arguments, in_turns, matmul_flops, median, ratio, report

from memorizing_transformer import KNNMemory

DIM, NEIGHBOURS = 64, 32
INDEXES = {
    "faiss Flat": {"index": "Flat"},
    "faiss IVF": {"index": "IVF256,Flat", "nprobe": 64},
    "faiss HNSW": {"index": "HNSW32", "ef_search": 256},
}


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def recall(found: torch.Tensor, truth: torch.Tensor) -> float:
    hits = [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    return sum(hits) / len(hits)


def rows_of(size: int, count: int, threads: int, rounds: int, chosen: list[str]) -> list[dict[str, object]]:
    import faiss

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    kv, queries = torch.stack((unit(1, size, DIM), unit(1, size, DIM)), dim=-2), unit(1, count, DIM)
    formats = ("float32", "bfloat16", "int8")
    memories = {f"exact {storage}": KNNMemory(DIM, size, 1, storage=storage) for storage in formats}
    memories |= {name: KNNMemory(DIM, size, 1, backend="faiss", **INDEXES[name]) for name in chosen}
    for memory in memories.values():
        memory.add(kv)
    truth = memories["exact float32"].retrieve(queries, NEIGHBOURS).positions[0]
    variants = {name: (lambda memory=memory: memory.retrieve(queries, NEIGHBOURS)) for name, memory in memories.items()}
    keys = kv[0, :, 0].contiguous()
    variants["matmul alone"] = lambda: queries[0] @ keys.T
    seconds = in_turns(variants, rounds)
    peak = matmul_flops()
    rows = []
    for name, times in seconds.items():
        row: dict[str, object] = {
            "keys": size,
            "queries": count,
            "threads": threads,
            "search": name,
            "ms": 1000 * median(times),
            "ns a query and 1,000 keys": 1e12 * median(times) / size / count,
            "of the matmul peak": 2 * size * count * DIM / median(times) / peak,
            "exact is faster by": ratio(times, seconds["exact float32"]),
        }
        if name in memories:
            memory = memories[name]
            row["recall@32"] = recall(memory.retrieve(queries, NEIGHBOURS).positions[0], truth)
            row["bytes a token"] = memory.nbytes / len(memory)
        rows.append(row)
    return rows


def main() -> None:
    options = arguments(
        __doc__.split("\n")[0],
        sizes={"type": int, "nargs": "+", "default": [8192, 65536, 262144]},
        queries={"type": int, "nargs": "+", "default": [512, 4096]},
        indexes={"nargs": "+", "default": list(INDEXES)},
    )
    rows = []
    for threads in options.threads:
        for size in options.sizes:
            for count in options.queries:
                rows += rows_of(size, count, threads, options.rounds, options.indexes)
    assert all(math.isfinite(row["ms"]) for row in rows)  # type: ignore[arg-type]
    report("Searches of a memory", rows, options.json)


if __name__ == "__main__":
    main()
