"""Searching a memory: time, recall@32 and bytes of each number format, beside the matrix product alone.

    nox -s bench -- memorizing_transformer_search --sizes 8192 65536 262144 --queries 512 4096

A second table has a training step (2 x 512 tokens, 8 heads in one memorizing layer) and generation at filled memories.
``--indexes "faiss Flat" "faiss IVF" "faiss HNSW"`` searches through faiss as well, in turns in the same run;
`peers_memorizing_transformer.py` sets faiss and the original beside the exact search.
"""

import math

import torch
from measure import arguments, in_turns, matmul_flops, median, ratio, report

from lm_core.generation.generate import generate
from memorizing_transformer import KNNMemory, MemorizingTransformer

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
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if chosen:
        import faiss

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


def model_row(size: int, threads: int, rounds: int, new_tokens: int = 32) -> dict[str, object]:
    """A training step, and generation, of a model whose memory holds ``size`` tokens a row."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    sizes = {"num_tokens": 256, "dim": 512, "depth": 2, "dim_head": DIM, "heads": 8, "memorizing_layers": 2}
    model = MemorizingTransformer(**sizes, max_knn_memories=size)
    memories = model.create_knn_memories(batch_size=2)
    memories[0].add(torch.stack((unit(2, size, DIM), torch.randn(2, size, DIM)), dim=-2))
    ids, labels = torch.randint(0, 256, (2, 2, 512))

    def step() -> None:
        model.zero_grad()
        model(ids, knn_memories=memories, labels=labels).backward()

    def generation() -> None:
        with memories.at_batch_indices([0]):
            generate(model, ids[:1, :8], max_new_tokens=new_tokens, knn_memories=memories)

    def beginning() -> None:
        with memories.at_batch_indices([0]):
            generate(model, ids[:1, :8], max_new_tokens=1, knn_memories=memories)

    seconds = in_turns({"step": step, "generation": generation, "beginning": beginning}, rounds)
    # the memory is copied once, before the first token
    spent = [whole - begun for whole, begun in zip(seconds["generation"], seconds["beginning"], strict=True)]
    return {
        "memories a row": size,
        "threads": threads,
        "training step, s": median(seconds["step"]),
        "generation, tokens/s": (new_tokens - 1) / median(spent),
        "copying the memory and the first token, ms": 1000 * median(seconds["beginning"]),
    }


def main() -> None:
    options = arguments(
        __doc__.split("\n")[0],
        sizes={"type": int, "nargs": "+", "default": [8192, 65536, 262144]},
        queries={"type": int, "nargs": "+", "default": [512]},
        indexes={"nargs": "*", "default": []},
    )
    rows, models = [], []
    for threads in options.threads:
        for size in options.sizes:
            for count in options.queries:
                rows += rows_of(size, count, threads, options.rounds, options.indexes)
            models.append(model_row(size, threads, min(2, options.rounds)))
    assert all(math.isfinite(row["ms"]) for row in rows)  # type: ignore[arg-type]
    report("Searches of a memory", rows, options.json)
    report("A model with filled memories", models, options.json)


if __name__ == "__main__":
    main()
