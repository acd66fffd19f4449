"""The memory: exact search, first in first out, formats, saved states."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from memorizing_transformer import KNNMemory, KNNMemoryList
from memorizing_transformer.memory.exact_search import (
    CPU_CHUNK,
    batched_top_k,
    exact_top_k,
    own_products,
    screened_top_k,
)
from memorizing_transformer.memory.knn_memory import warn_without_effect
from memorizing_transformer.memory.ring_storage import quantise

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def exact(queries, keys, k, chunk):
    return exact_top_k(queries, [(i, keys[i : i + chunk]) for i in range(0, len(keys), chunk)], k)


def screened(queries, keys, k, chunk):
    chunks = lambda: ((i, keys[i : i + chunk]) for i in range(0, len(keys), chunk))  # noqa: E731
    return screened_top_k(queries, chunks, k, lambda q, numbers: own_products(q, keys, numbers))


@pytest.mark.parametrize("search", [exact, screened])
@PROPERTY
@given(
    st.integers(1, 700),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["random", "few different keys", "nearly one key", "lengths from 1e-3 to 1e3", "far from 0"]),
    st.integers(0, 2**16),
)
def test_exact_search_equals_torch_topk_for_every_chunk_size(search, n, k, chunk, queries, kind, seed):
    keys, q = unit(n, 8, seed=seed).double(), unit(queries, 8, seed=seed + 1).double()
    if kind == "few different keys":
        keys = keys[torch.arange(n) % 3]
    elif kind == "nearly one key":
        keys = keys[:1] + 1e-4 * keys
    elif kind == "lengths from 1e-3 to 1e3":
        keys = keys * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    elif kind == "far from 0":
        keys = keys - 3 * q.mean(dim=0)  # most scores are negative
    scores, numbers = search(q, keys, k, chunk)
    found, every = min(k, n), q @ keys.T
    expected = every.topk(found).values

    torch.testing.assert_close(scores[:, :found], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(every.gather(1, numbers[:, :found]), expected, atol=1e-12, rtol=1e-12)
    assert bool((scores[:, found:] == -math.inf).all())
    assert all(len(set(row[:found].tolist())) == found for row in numbers)


@pytest.mark.parametrize("at", [3, 5000])
@pytest.mark.parametrize("of", ["a query", "a key"])
def test_nan_is_found_not_passed_by(of, at):
    queries, keys = unit(5, 8), unit(9000, 8, seed=1)
    (queries[2] if of == "a query" else keys[at]).fill_(math.nan)
    broken = [2] if of == "a query" else list(range(5))
    for scores, _ in (exact(queries, keys, 4, 4096), screened(queries, keys, 4, 4096)):
        assert scores.isnan().any(dim=1).nonzero().flatten().tolist() == broken


class Products(TorchDispatchMode):
    """Dtype and number of queries of each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith("aten::mm"):
            self.seen.append((args[0].dtype, len(args[0])))
        return function(*args, **(kwargs or {}))


def test_screening_falls_back_only_for_queries_whose_best_keys_are_too_close():
    apart, alike = torch.eye(16)[:1], torch.eye(16)[1:2]
    keys = torch.cat((apart * torch.linspace(0.1, 1, 500)[:, None], alike.expand(500, 16)))
    with Products() as products:
        screened(torch.cat((apart, alike, apart)), keys, 8, 128)

    assert set(products.seen) == {(torch.bfloat16, 3), (torch.float32, 1)}


def test_negative_scores_in_bfloat16_prove_nothing_of_keys_nearer_to_zero():
    # 1 + 2^-8 - 2^-12 is rounded down to 1 and 1 - 2^-9 + 2^-12 up to 1: the best key's rounded score is -2^-12
    best = torch.tensor([[1 + 2**-8 - 2**-12, -(1 - 2**-9 + 2**-12), -(2**-12)]])
    small, far = torch.tensor([[0.0, 0.0, 2**-10]]), torch.tensor([[-0.5, 0.0, 0.0]])
    # as integers, negative scores are the greater the farther they are from 0: far ones are kept, the best is not
    keys = torch.cat((small.expand(4, 3), far.expand(4, 3), best))
    scores, numbers = screened(torch.ones(1, 3), keys, 4, len(keys))

    assert scores.tolist() == [[21 * 2**-12, 2**-10, 2**-10, 2**-10]]
    assert int(numbers[0, 0]) == 8


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_memory_finds_the_same_with_and_without_screening(storage, monkeypatch):
    memory, queries = KNNMemory(16, 2 * CPU_CHUNK, 1, storage=storage), unit(1, 200, 16, seed=3)
    memory.add(torch.stack((unit(1, 9000, 16), unit(1, 9000, 16, seed=1)), dim=-2))
    found = {}
    for screens in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda screens=screens: screens)
        with Products() as products:
            found[screens] = memory.retrieve(queries, 32)
        assert any(dtype == torch.bfloat16 for dtype, _ in products.seen) == screens

    torch.testing.assert_close(found[True].scores, found[False].scores, atol=1e-6, rtol=0)
    same = (found[True].positions == found[False].positions).float().mean()
    assert same > 0.999  # scores that differ by a last bit may change places


def test_autocast_around_a_search_does_not_round_it():
    memory, queries = KNNMemory(16, 500, 1), unit(1, 20, 16, seed=3)
    memory.add(torch.stack((unit(1, 500, 16), unit(1, 500, 16, seed=1)), dim=-2))
    outside = memory.retrieve(queries, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = memory.retrieve(queries, 8)

    assert torch.equal(inside.scores, outside.scores)
    assert torch.equal(inside.positions, outside.positions)


@PROPERTY
@given(st.lists(st.integers(0, 23), min_size=1, max_size=8), st.integers(1, 17), st.integers(1, 5))
def test_a_row_holds_its_last_tokens_at_every_wrap(counts, capacity, k):
    memory = KNNMemory(4, capacity, 2)
    history = torch.zeros(2, 0, 2, 4)
    for step, count in enumerate(counts):
        new = torch.stack((unit(2, count, 4, seed=step), unit(2, count, 4, seed=step + 100)), dim=-2)
        memory.add(new)
        history = torch.cat((history, new), dim=1)
        held = history[:, -capacity:]
        assert memory.sizes == [held.shape[1]] * 2
        for row in range(2):
            kept = memory.store.tokens(row)
            assert torch.equal(kept, held[row])
        queries = unit(2, 3, 4, seed=step + 7)
        found = memory.retrieve(queries, k)
        size = min(k, held.shape[1])
        expected = torch.einsum("bqd,bnd->bqn", queries, held[:, :, 0]).topk(size).values
        torch.testing.assert_close(found.scores[..., :size], expected, atol=1e-6, rtol=0)
        assert bool(found.mask[..., :size].all())
        assert not bool(found.mask[..., size:].any())
        if size:
            rows = torch.arange(2)[:, None, None]
            assert torch.equal(found.kv[..., :size, :, :], history[rows, found.positions[..., :size]])


def test_an_empty_memory_finds_nothing():
    kv, mask = KNNMemory(4, 8, 2).search(unit(2, 3, 5, 4), 6)

    assert kv.shape == (2, 3, 5, 6, 2, 4)
    assert not bool(mask.any())
    assert not bool(kv.any())


def test_rows_out_of_scope_are_neither_moved_nor_searched():
    memory = KNNMemory(4, 8, 3)
    memory.add(torch.randn(3, 2, 2, 4))
    with memory.at_batch_indices([2, 0]):
        new = torch.randn(2, 3, 2, 4)
        memory.add(new)
        found = memory.retrieve(new[..., 0, :], 1)
    assert memory.sizes == [5, 2, 5]
    assert memory.scoped_indices == [0, 1, 2]
    assert found.kv.shape[0] == 2
    assert torch.equal(memory.store.tokens(2)[-3:], new[0])


def test_the_scope_comes_back_after_an_error():
    memory = KNNMemory(4, 8, 3)
    with pytest.raises(KeyError), memory.at_batch_indices([1]):
        raise KeyError
    assert memory.scoped_indices == [0, 1, 2]


def test_a_mask_says_which_tokens_are_added():
    memory, kv = KNNMemory(4, 8, 2), torch.randn(2, 3, 2, 4)
    memory.add(kv, mask=torch.tensor([[True, False, True], [False, False, False]]))
    assert memory.sizes == [2, 0]
    assert torch.equal(memory.store.tokens(0), kv[0, [0, 2]])


@pytest.mark.parametrize(("storage", "goal"), [("float32", 512), ("bfloat16", 256), ("int8", 140)])
def test_bytes_of_a_stored_token_meet_their_goal(storage, goal):
    memory = KNNMemory(64, 1000, 2, storage=storage)
    memory.add(torch.randn(2, 10, 2, 64))
    assert memory.nbytes <= 2 * 256 * goal  # it grows on demand
    memory.add(torch.randn(2, 1500, 2, 64))
    assert memory.nbytes / len(memory) <= goal


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_narrow_formats_keep_numbers_to_their_precision(storage, tolerance):
    kv = torch.randn(1, 50, 2, 16)
    memory = KNNMemory(16, 64, 1, storage=storage)
    memory.add(kv)
    stored = memory.store.tokens(0)

    assert float((stored - kv[0]).abs().max() / kv.abs().max()) <= tolerance
    found = memory.retrieve(kv[..., 0, :], 1)
    assert torch.equal(found.positions.flatten(), (stored[:, 0] @ kv[0, :, 0].T).argmax(dim=0))


def test_quantising_is_exact_for_multiples_of_the_scale():
    numbers, scales = quantise(torch.tensor([[127.0, -64.0, 0.0, 1.0]]))
    assert numbers.tolist() == [[127, -64, 0, 1]]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("count", [0, 5, 8, 21])
def test_a_saved_memory_is_loaded_as_it_was(tmp_path, storage, count):
    memory, kv = KNNMemory(4, 8, 2, storage=storage), torch.randn(2, count, 2, 4)
    memory.add(kv)
    memory.clear([1])
    memory.save(tmp_path / "memory.pt")
    other = KNNMemory(4, 8, 2, storage=storage)
    other.add(torch.randn(2, 3, 2, 4))
    other.load(tmp_path / "memory.pt")
    queries = unit(2, 6, 4)

    mine, theirs = (vars(one.retrieve(queries, 3)) for one in (memory, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    memory.add(kv)
    other.add(kv)
    assert torch.equal(memory.retrieve(queries, 3).kv, other.retrieve(queries, 3).kv)


def test_selected_rows_are_copies():
    memory = KNNMemory(4, 8, 3)
    memory.add(torch.randn(3, 5, 2, 4))
    twin, queries = memory.selected([2, 2, 0]), unit(3, 4, 4)
    before = memory.retrieve(queries, 2).kv.clone()
    with memory.at_batch_indices([2]):
        assert torch.equal(memory.retrieve(queries[:1], 2).kv, twin.retrieve(queries, 2).kv[:1])
    twin.add(torch.randn(3, 6, 2, 4))
    assert torch.equal(memory.retrieve(queries, 2).kv, before)


def test_several_key_heads_search_their_own_keys():
    memory, kv = KNNMemory(4, 16, 2, heads=3), torch.randn(2, 3, 9, 2, 4)
    memory.add(kv)
    queries = unit(2, 3, 5, 4)
    found = memory.retrieve(queries, 2)
    expected = torch.einsum("bhqd,bhnd->bhqn", queries, kv[..., 0, :]).topk(2).values

    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=0)
    assert memory.sizes == [9, 9]


def test_options_without_effect_are_said_once(recwarn):
    warn_without_effect.cache_clear()
    memory = KNNMemory(4, 8, 1, multiprocessing=True)
    memory.search(unit(1, 2, 4), 1, nprobe=8, increment_hits=True)
    memory.search(unit(1, 2, 4), 1, nprobe=8, increment_hits=True)
    names = [str(warning.message).split()[0] for warning in recwarn]
    assert names == ["multiprocessing", "nprobe", "increment_hits"]


def test_a_list_clears_the_memories_it_is_told_to():
    memories = KNNMemoryList.create_memories(batch_size=2, num_memory_layers=2)(4, max_memories=8)
    for memory in memories:
        memory.add(torch.randn(2, 3, 2, 4))
    memories.clear_memory([0], memory_indices=[1])
    assert memories.sizes == [[3, 3], [0, 3]]
    with memories.at_batch_indices([1]) as scoped:
        assert scoped.batch_size == 1
    memories.cleanup()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.lists(st.integers(0, 50), min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.integers(0, 99),
)
def test_rows_that_are_searched_together_find_what_each_finds_alone(b, heads, capacity, lengths, k, storage, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = KNNMemory(6, capacity, b, heads=heads, storage=storage)
    shape = (b, heads) if heads > 1 else (b,)
    for n in lengths:
        mask = torch.rand(b, n, generator=generator) < 0.7
        memory.add(torch.randn(*shape, n, 2, 6, generator=generator), mask=mask)
    if seed % 3 == 0:
        memory.clear([seed % b])
    rows = list(range(b))[:: -1 if seed % 2 else 1][: 1 + seed % b]
    with memory.at_batch_indices(rows):
        queries = torch.randn(len(rows), *shape[1:], 5, 6, generator=generator)
        expected = memory.retrieve(queries, k)
        stored = memory._stored(rows)  # the way of accelerators, here on a CPU
        found = memory._search_together(stored, queries.reshape(len(stored), -1, 6), k, queries)
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.kv, expected.kv, rtol=0, atol=0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 90), st.integers(0, 99))
def test_the_batched_search_is_topk_for_every_chunk_size(keys, k, size, seed):
    generator = torch.Generator().manual_seed(seed)
    q, x = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (3, keys))
    exists = torch.rand(2, keys, generator=generator) < 0.8
    chunks = ((low, x[:, low : low + size], exists[:, low : low + size]) for low in range(0, keys, size))
    scores, numbers = batched_top_k(q, chunks, k)
    whole = (q @ x.transpose(1, 2)).masked_fill(~exists.unsqueeze(1), -torch.inf)
    best = torch.nn.functional.pad(whole, (0, max(0, k - keys)), value=-torch.inf).topk(k, dim=-1)
    torch.testing.assert_close(scores, best.values, rtol=0, atol=1e-12)
    there = scores.isfinite()
    assert torch.equal(numbers[there], best.indices[there])


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_rows_that_are_written_together_are_those_written_one_by_one(storage):
    together, alone = KNNMemory(4, 10, 3, storage=storage), KNNMemory(4, 10, 3, storage=storage)
    written = [0, 0, 0]
    for count, rows in ((4, [0, 1, 2]), (7, [0, 2]), (9, [1, 0])):
        new = torch.randn(len(rows), count, 2, 4)
        together.store._make_room({row: written[row] + count for row in rows})
        for row in rows:
            written[row] += count
        together.store._write_rows(rows, new, [written[row] for row in rows])
        for row in rows:
            together.store.written[row] = written[row]
            together.store.first[row] = max(0, written[row] - 10)
        with alone.at_batch_indices(rows):
            alone.add(new)
    for row in range(3):
        assert torch.equal(together.store.tokens(row), alone.store.tokens(row))
