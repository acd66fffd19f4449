"""Searches and a training step next to faiss and the original `memorizing-transformers-pytorch` 0.4.1, in one run.

    nox -s bench_peers -- memorizing_transformer --sizes 8192 65536 262144 --queries 512 4096

Searches: the same unit vectors are put into our exact memory, into memories of ours that faiss searches, and into the
original's `KNNMemory` (an HNSW graph of faiss); the same queries are asked of all; recall@32 against `topk` over all
keys. Training: one forward and backward of a batch of 2 x 512 tokens with 8 heads of 64 in one memorizing layer, at
filled memories, of the same weights in both (`interop`); the memory then grows by the segment. "share of limit": what
scoring every query with every key would take at this machine's rate for one large float32 product, over ours. "products
alone / ours" is the same with these products as they are; it is above 1 where searches are screened in bfloat16.

Cost by size of the memory: rows of each size, drawn next to faiss Flat. An HNSW graph of 262,144 keys takes minutes to
build: with ``--kept FOLDER`` it is built once (``--rounds 0`` does only that), and later runs read it. ``--sizes``
without numbers measures training alone, ``--training-sizes`` without numbers searches alone. The original is looked for
in $BENCH_PEERS/memorizing-transformer.
"""

import argparse
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, compared, in_turns, matmul_flops, median, peer_folder, ratio, report, thread_counts

INDEXES: dict[str, dict[str, Any]] = {
    "faiss Flat": {"index": "Flat"},
    "faiss IVF256, nprobe 128": {"index": "IVF256,Flat", "nprobe": 128},
    "faiss HNSW32, ef 512": {"index": "HNSW32", "ef_search": 512},
}
TITLE = "The memory next to the original's and faiss"
DIM_HEAD, NEIGHBOURS, ROWS, SEGMENT, HEADS = 64, 32, 2, 512, 8


def original_package() -> Any:
    """The original's module."""
    peer_folder("memorizing-transformer")
    import memorizing_transformers_pytorch.memorizing_transformers_pytorch as module
    from memorizing_transformers_pytorch.knn_memory import KNNMemory

    return module, KNNMemory


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def threshold(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The score of the 32nd nearest key of each query."""
    parts = [(part @ keys.T).topk(NEIGHBOURS, dim=-1).values[:, -1:] for part in queries.split(256)]
    return torch.cat(parts)


def recall(worst: torch.Tensor, found: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor) -> float:
    """The part of what was found that is among the true 32 nearest keys: that scores at least as much as the 32nd."""
    scores = torch.einsum("qd,qkd->qk", queries, found[..., 0, :])
    return float(((scores >= worst - 1e-5) & mask).float().mean())


def search_rows(original: Any, size: int, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our exact search next to each peer, for each number of queries."""
    from memorizing_transformer import KNNMemory

    rounds, kept = options.rounds, options.kept
    kv = torch.stack((unit(1, size, DIM_HEAD), unit(1, size, DIM_HEAD)), dim=-2)
    memories: dict[str, Any] = {"exact": KNNMemory(DIM_HEAD, size, 1)}
    for name in options.indexes:
        memories[name] = KNNMemory(DIM_HEAD, size, 1, backend="faiss", **INDEXES[name])
    file = f"{folder}/{size}.memmap"
    memories["original"] = original(DIM_HEAD, size, 1, memmap_filename=file, multiprocessing=False)
    with all_cores_in_faiss():  # building graphs is not what is timed
        for name, memory in memories.items():
            if kept is not None and "HNSW" in name:
                add_with_kept_graph(memory, kv, kept / f"{name.split(',')[0].replace(' ', '-')}-{size}.index")
            elif name == "exact" or rounds:
                memory.add(kv)
    keys = kv[0, :, 0].contiguous()
    rows = []
    for count in options.queries if rounds else []:
        queries, found = unit(1, count, DIM_HEAD), {}

        def ask(name: str, queries: torch.Tensor = queries, found: dict[str, Any] = found) -> None:
            found[name] = memories[name].search(queries, NEIGHBOURS)

        variants = {name: partial(ask, name) for name in memories}
        seconds = in_turns({**variants, "product": lambda: queries[0] @ keys.T}, rounds)  # noqa: B023
        peak = matmul_flops()
        some = queries[0, :512]
        worst = threshold(keys, some)
        recalls = {name: recall(worst, *(part[0, :512] for part in parts), some) for name, parts in found.items()}
        for name in [*options.indexes, "original"]:
            # faiss Flat is the other exact one: its rows are a series by size
            series = {"axis": f"memories, {count} queries", "size": size} if name == "faiss Flat" else {}
            row = compared(
                f"search, {size:,} keys, {count} queries, {name}",
                "peer",
                {"ours": seconds["exact"], "theirs": seconds[name]},
                "{:.3f} s".format,
                limit=2 * size * count * DIM_HEAD / peak,
                **series,
            )
            row |= {"products alone / ours": ratio(seconds["product"], seconds["exact"])}
            row |= {"recall of the peer": recalls[name], "recall of ours": recalls["exact"]}
            row |= {"ours, ps a query and key": 1e12 * median(seconds["exact"]) / size / count}
            rows.append(row)
    return rows


def add_with_kept_graph(memory: Any, kv: torch.Tensor, file: Path) -> None:
    """Adds ``kv``; its graph is read from ``file``, or built and written there."""
    import faiss

    row = memory.indexes[0]
    if file.is_file():
        row.index.index = faiss.read_index(str(file))
        memory.add(kv)  # finds them in the index
        return
    memory.add(kv)
    file.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(row.index.index, str(file))


@contextmanager
def all_cores_in_faiss() -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


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


def training_row(module: Any, size: int, rounds: int, folder: str, ef_search: int | None = None) -> dict[str, Any]:
    """A step of both; with ``ef_search`` the original's graph is searched more broadly than it can be told to."""
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
        "theirs": theirs.create_knn_memories(batch_size=ROWS),
    }
    with all_cores_in_faiss():
        for one in memories.values():
            filled(one, size)
    if ef_search is not None:
        for knn in memories["theirs"][0].knns:
            knn.index.hnsw.efSearch = ef_search
    ids, labels = torch.randint(0, 256, (2, ROWS, SEGMENT))

    def step(name: str, model: Any) -> None:
        model.zero_grad()
        model(ids, knn_memories=memories[name], labels=labels).backward()

    q, keys = unit(ROWS, HEADS * SEGMENT, DIM_HEAD), unit(ROWS, size, DIM_HEAD)
    seconds = in_turns(
        {
            "ours": lambda: step("ours", ours),
            "theirs": lambda: step("theirs", theirs),
            "product": lambda: [row @ more.T for row, more in zip(q, keys, strict=True)],
        },
        rounds,
    )
    recalls = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        memory = memories[name][0]
        calls = searched(memory)
        held = torch.as_tensor(memory.store.data[:, :, 0] if name == "ours" else memory.db[:, :, 0].copy())
        model(ids, knn_memories=memories[name], add_knn_memory=False)
        used = memory.sizes[0] if name == "ours" else int(memory.db_offsets[0])
        queries, kv = calls[0]
        queries, kv = queries.flatten(1, -2)[:, ::16], kv.flatten(1, -4)[:, ::16]
        worst = (queries @ held[:, :used].mT).topk(NEIGHBOURS, dim=-1).values[..., -1:]
        scores = torch.einsum("bqd,bqkd->bqk", queries, kv[..., 0, :])
        recalls[name] = float((scores >= worst - 1e-5).float().mean())
    for one in memories.values():
        one.cleanup()
    what = f"training step, {ROWS} x {SEGMENT} tokens, {HEADS} heads, {size:,} memories a row"
    row = compared(what + ("" if ef_search is None else f", the original at efSearch {ef_search}"), "peer", seconds)
    row |= {"products alone / ours": ratio(seconds["product"], seconds["ours"])}
    return row | {"recall of the peer": recalls["theirs"], "recall of ours": recalls["ours"]}


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        sizes={"type": int, "nargs": "*", "default": [8192, 65536]},
        queries={"type": int, "nargs": "+", "default": [512]},
        training_sizes={"type": int, "nargs": "*", "default": [65536]},
        ef_search={
            "type": int,
            "default": 1024,
            "help": "the original's step once more, at a recall like ours; 0: not",
        },
        indexes={"nargs": "*", "default": list(INDEXES)},
        kept={"type": Path, "default": None, "help": "folder of graphs that were built before"},
    )
    module, original = original_package()
    rows = []
    for threads in thread_counts(options):
        import faiss

        faiss.omp_set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the original's
            for size in options.sizes:
                torch.manual_seed(size)  # the same keys in every run, which kept graphs are of
                rows += search_rows(original, size, folder, options)
                report(TITLE, rows, options.json)
            for size in options.training_sizes if options.rounds else []:
                rows.append(training_row(module, size, options.rounds, folder))
                if options.ef_search:
                    rows.append(training_row(module, size, 1, folder, options.ef_search))
    assert all(math.isfinite(row["times as fast"]) for row in rows)
    report(TITLE, rows, options.json)


if __name__ == "__main__":
    main()
