"""Searching through faiss: stated recall, what has left the ring, the GPU's indexes."""

import sys

import pytest
import torch

from memorizing_transformer import KNNMemory

faiss = pytest.importorskip("faiss")


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def check_recall(stated, device="cpu", **options):
    """Fills a memory past its capacity; compares what it finds with what an exact one finds."""
    n, capacity = 9000, 6000
    kv = torch.stack((unit(1, n, 64), unit(1, n, 64, seed=1)), dim=-2).to(device)
    queries = unit(1, 100, 64, seed=2).to(device)
    memory = KNNMemory(64, capacity, 1, backend="faiss", device=device, **options)
    exact = KNNMemory(64, capacity, 1, device=device)
    for written in range(1500, n + 1, 1500):
        for one in (memory, exact):
            one.add(kv[:, written - 1500 : written])
        # at 7500 the index still holds what has left the ring, at 9000 it has been rebuilt
        found = memory.retrieve(queries, 32)
        assert int(found.positions.min()) >= written - capacity

    pairs = zip(found.positions[0].tolist(), exact.retrieve(queries, 32).positions[0].tolist(), strict=True)
    assert sum(len(set(mine) & set(truth)) for mine, truth in pairs) >= stated * 32 * len(queries[0])
    torch.testing.assert_close(found.kv, kv[0, found.positions[0]].unsqueeze(0))
    return found


@pytest.mark.parametrize(
    ("index", "stated", "options"),
    [
        ("Flat", 1.0, {}),
        ("IVF64,Flat", 0.9, {"nprobe": 40}),
        ("HNSW32", 0.9, {"ef_search": 512}),
        ("PCA64,IVF64,Flat", 0.9, {"nprobe": 40}),
    ],
)
def test_an_index_has_its_stated_recall_and_nothing_that_has_left_the_ring(index, stated, options):
    check_recall(stated, index=index, **options)


@pytest.mark.parametrize("index", ["Flat", "HNSW16", "IVF4,Flat"])
def test_a_cleared_row_finds_only_what_came_after(index):
    memory = KNNMemory(8, 400, 2, backend="faiss", index=index, nprobe=4)
    old, new = unit(2, 300, 2, 8), unit(2, 200, 2, 8, seed=1)
    memory.add(old)
    memory.clear([1])
    with memory.at_batch_indices([1]):
        memory.add(new[1:])
    found = memory.retrieve(new[..., 0, :], 3)
    assert memory.sizes == [300, 200]
    assert torch.equal(found.kv[1, :, 0], new[1])
    assert not any(torch.equal(found.kv[0, number, 0], new[0, number]) for number in range(200))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """faiss as on a GPU: its indexes have no selectors and take pointers. Yields the list of indexes moved to it."""
    from memorizing_transformer.memory import faiss as ours

    made = []

    class Resources:
        def setTempMemory(self, size):
            assert size > 0

    class ParameterSpace:
        def set_index_parameter(self, index, name, value):
            assert name == "nprobe"
            index.index.nprobe = value

    class OnGPU:
        def __init__(self, resources, number, index):
            assert isinstance(resources, Resources)
            assert number == 0
            self.index = index
            made.append(self)

        def __getattr__(self, name):
            assert name in {"ntotal", "train_c", "add_c", "reset"}
            return getattr(self.index, name)

        def search_c(self, n, queries, k, scores, numbers, parameters):
            assert parameters is None
            self.index.search_c(n, queries, k, scores, numbers)

    ours.gpu_resources.cache_clear()
    fakes = {"StandardGpuResources": Resources, "GpuParameterSpace": ParameterSpace, "index_cpu_to_gpu": OnGPU}
    for name, value in fakes.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ours, "has_gpu", lambda device: True)
    yield made
    ours.gpu_resources.cache_clear()


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat"])
def test_without_selectors_the_index_never_holds_what_has_left_the_ring(pretended_gpu, index):
    memory = KNNMemory(8, 400, 1, backend="faiss", index=index, nprobe=4)
    exact = KNNMemory(8, 400, 1)
    for step in range(9):
        part = torch.stack((unit(1, 150, 8, seed=step), unit(1, 150, 8, seed=step + 50)), dim=-2)
        memory.add(part)
        exact.add(part)
        queries = unit(1, 20, 8, seed=step + 99)
        mine, theirs = memory.retrieve(queries, 5), exact.retrieve(queries, 5)
        assert torch.equal(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-6, rtol=0)
        assert pretended_gpu[-1].ntotal <= 400
    assert pretended_gpu[-1].ntotal == 400


def test_a_gpu_index_gives_a_bounded_number_of_neighbours(pretended_gpu):
    memory = KNNMemory(8, 4000, 1, backend="faiss")
    memory.add(unit(1, 10, 2, 8))
    with pytest.raises(ValueError, match="topk must be at most 2048"):
        memory.retrieve(unit(1, 1, 8), 2049)


def test_a_graph_index_stays_on_the_cpu(pretended_gpu):
    memory = KNNMemory(8, 4000, 1, backend="faiss", index="HNSW16")
    memory.add(unit(1, 10, 2, 8))
    assert memory.retrieve(unit(1, 1, 8), 3).positions.min() >= 0
    assert pretended_gpu == []


@pytest.mark.cuda
@pytest.mark.parametrize(("index", "stated"), [("Flat", 1.0), ("IVF64,Flat", 0.9), ("HNSW32", 0.9)])
def test_a_memory_on_the_gpu_is_searched_there(index, stated, monkeypatch):
    from memorizing_transformer.memory.faiss import has_gpu

    device, on_gpu = torch.device("cuda"), []
    if hasattr(faiss, "index_cpu_to_gpu"):
        move = faiss.index_cpu_to_gpu
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *args: on_gpu.append(move(*args)) or on_gpu[-1])
    assert check_recall(stated, device, index=index).kv.is_cuda
    assert bool(on_gpu) == (has_gpu(device) and not index.startswith("HNSW"))


@pytest.mark.plain
def test_without_faiss_the_error_names_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or on Linux with an NVIDIA GPU faiss-gpu"):
        KNNMemory(4, 8, 1, backend="faiss")
