"""Memories in files: what a kill leaves, who may use a folder, what survives a restart."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from memorizing_transformer import KNNMemory
from memorizing_transformer.memory.directory import MemoryDirectory

KILLS = int(os.environ.get("LM_FAULT_KILLS", "6"))

# Token t of row r has key t + r / 10 and value -t - r / 10 in every feature; rows are cleared now and then.
WRITER = """
import sys, torch
from memorizing_transformer import KNNMemory
storage, folder = sys.argv[1:]
memory = KNNMemory(4, 40, 2, folder, storage=storage)
generator = torch.Generator().manual_seed(int.from_bytes(__import__("os").urandom(4), "big"))
print("ready", flush=True)
while True:
    counts = torch.randint(1, 60, (1,), generator=generator).item()
    for row in range(2):
        start = memory.store.written[row]
        if start > 4000:
            memory.clear([row]); start = 0
        t = torch.arange(start, start + counts).float() + row / 10
        with memory.at_batch_indices([row]):
            memory.add(torch.stack((t, -t)).T[None, :, :, None].expand(1, -1, -1, 4).contiguous())
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is for POSIX")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_killed_writer_leaves_a_committed_prefix_with_matching_values(tmp_path, storage):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    delays = np.random.default_rng(0).uniform(0.0, 0.05, KILLS)
    seen = set()
    for delay in delays:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, storage, str(tmp_path / "memory")],
            stdout=subprocess.PIPE,
            env=environ,
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        memory = KNNMemory(4, 40, 2, tmp_path / "memory", storage=storage)
        for row in range(2):
            first, written = memory.store.first[row], memory.store.written[row]
            assert 0 <= first <= written <= first + 40
            kv = memory.store.tokens(row)
            expected = torch.arange(first, written).float() + row / 10
            error = 0.0 if storage == "float32" else 0.02 * (1 + written)
            torch.testing.assert_close(kv[:, 0], expected[:, None].expand(-1, 4), atol=error, rtol=0)
            assert torch.equal(kv[:, 1], -kv[:, 0])
            found = memory.retrieve(torch.ones(2, 1, 4), 40)
            assert int(found.mask[row].sum()) == written - first
            seen.add(written)
        memory.close()
    assert len(seen) > 1


class Interrupted(torch.Tensor):
    """A tensor that is interrupted when it is written somewhere, after so many of its tokens."""

    written = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            target, (row, span), value = args
            target[row, span.start : span.start + cls.written] = value[: cls.written].as_subclass(torch.Tensor)
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("written", [0, 1])
def test_what_is_about_to_be_overwritten_is_given_up_first(tmp_path, monkeypatch, written):
    memory = KNNMemory(1, 8, 1, tmp_path / "memory")
    memory.add(torch.arange(10.0)[None, :, None, None].expand(1, -1, 2, 1).contiguous())
    monkeypatch.setattr(Interrupted, "written", written)
    with pytest.raises(KeyboardInterrupt):
        memory.add(torch.full((1, 3, 2, 1), 99.0).as_subclass(Interrupted))
    memory.close()

    again = KNNMemory(1, 8, 1, tmp_path / "memory")
    assert again.store.tokens(0)[:, 0, 0].tolist() == [5, 6, 7, 8, 9]
    assert again.retrieve(torch.ones(1, 1, 1), 8).positions[0, 0].tolist() == [9, 8, 7, 6, 5, -1, -1, -1]
    again.add(torch.arange(10.0, 16.0)[None, :, None, None].expand(1, -1, 2, 1).contiguous())
    assert again.retrieve(torch.ones(1, 1, 1), 8).positions[0, 0].tolist() == [15, 14, 13, 12, 11, 10, 9, 8]
    again.close()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_named_memory_survives_a_restart(tmp_path, tiny_model, storage):
    model = tiny_model(knn_memories_directory=str(tmp_path), knn_storage=storage)
    ids = torch.randint(0, 20, (2, 16))
    memories = model.create_knn_memories(batch_size=2, name="mine")
    model(ids[:, :8], knn_memories=memories)
    expected = model(ids[:, 8:], knn_memories=memories, add_knn_memory=False)
    memories.cleanup()

    with model.knn_memories_context(batch_size=2, name="mine") as again:
        assert again.sizes == [[8, 8]]
        assert torch.equal(model(ids[:, 8:], knn_memories=again, add_knn_memory=False), expected)


def test_a_memory_on_disk_finds_what_one_in_memory_finds(tmp_path):
    disk, held = KNNMemory(4, 10, 2, tmp_path / "memory"), KNNMemory(4, 10, 2)
    for count in (3, 9, 25, 1):
        kv = torch.randn(2, count, 2, 4)
        disk.add(kv)
        held.add(kv)
        queries = torch.randn(2, 5, 4)
        assert torch.equal(disk.retrieve(queries, 4).positions, held.retrieve(queries, 4).positions)
        assert torch.equal(disk.retrieve(queries, 4).kv, held.retrieve(queries, 4).kv)
    disk.store.sync()
    disk.close()


def test_a_damaged_header_copy_is_named_and_the_other_is_used(tmp_path):
    memory = KNNMemory(1, 8, 1, tmp_path / "memory")
    for _ in range(3):
        memory.add(torch.ones(1, 1, 2, 1))
    memory.close()
    header = tmp_path / "memory" / "header.bin"
    content = bytearray(header.read_bytes())
    half = len(content) // 2
    newest = 3 % 2
    content[newest * half + 10] ^= 255
    header.write_bytes(content)
    with pytest.warns(UserWarning, match="one of two copies of the counts"):
        again = KNNMemory(1, 8, 1, tmp_path / "memory")
    assert again.sizes == [2]
    again.close()
    header.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="damaged"):
        KNNMemory(1, 8, 1, tmp_path / "memory")


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


READERS = {
    "search": lambda memory, row: memory.retrieve(torch.ones(3, 1, memory.dim), 2),
    "state": lambda memory, row: memory.state_dict(),
    "copy": lambda memory, row: memory.selected([row]),
    "tokens": lambda memory, row: memory.store.tokens(row),
}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_every_flipped_bit_of_a_token_is_found_when_its_row_is_read(tmp_path, storage, dim):
    folder = tmp_path / "memory"
    memory = KNNMemory(dim, 6, 3, folder, storage=storage)
    memory.add(torch.randn(3, 8, 2, dim))  # wraps
    memory.close()
    generator = np.random.default_rng(0)
    names = ["data.bin", "checksums.bin"] + (["scales.bin"] if storage == "int8" else [])
    for number, name in enumerate(4 * names):
        bits = 8 * (folder / name).stat().st_size
        bit = int(generator.integers(bits))
        damaged, others = 3 * bit // bits, {0, 1, 2} - {3 * bit // bits}
        flipped(folder / name, bit)
        memory = KNNMemory(dim, 6, 3, folder, storage=storage)
        for row in others:
            memory.store.tokens(row)
        with pytest.raises(ValueError, match=f"is damaged: 1 of 6 tokens of row {damaged} differ"):
            list(READERS.values())[number % len(READERS)](memory, damaged)
        memory.close()
        flipped(folder / name, bit)
    with closing(KNNMemory(dim, 6, 3, folder, storage=storage)) as memory:
        for read in READERS.values():
            read(memory, 1)


def test_a_row_that_is_damaged_can_be_cleared_and_filled_again(tmp_path):
    memory = KNNMemory(2, 6, 1, tmp_path / "memory")
    memory.add(torch.ones(1, 4, 2, 2))
    memory.close()
    flipped(tmp_path / "memory" / "data.bin", 3)
    with closing(KNNMemory(2, 6, 1, tmp_path / "memory")) as memory:
        with pytest.raises(ValueError, match="is damaged"):
            memory.retrieve(torch.ones(1, 1, 2), 1)
        memory.clear()
        memory.add(torch.ones(1, 2, 2, 2))
        assert int(memory.retrieve(torch.ones(1, 1, 2), 4).mask.sum()) == 2


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_memory_of_the_format_without_checksums_opens_and_gets_them(tmp_path, storage):
    folder = tmp_path / "memory"
    memory = KNNMemory(4, 6, 2, folder, storage=storage)
    memory.add(torch.randn(2, 8, 2, 4))
    expected = memory.store.tokens(1)
    memory.close()
    (folder / "checksums.bin").unlink()
    meta = (folder / "memory.json").read_text().replace('"format_version": 2', '"format_version": 1')
    (folder / "memory.json").write_text(meta)
    for _ in range(2):
        with closing(KNNMemory(4, 6, 2, folder, storage=storage)) as memory:
            assert torch.equal(memory.store.tokens(1), expected)
    flipped(folder / "data.bin", 3)
    with closing(KNNMemory(4, 6, 2, folder, storage=storage)) as memory, pytest.raises(ValueError, match="damaged"):
        memory.store.tokens(0)


HOLDER = """
import sys, time
from memorizing_transformer.memory.directory import MemoryDirectory
held = MemoryDirectory(sys.argv[1], "mine")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
held.close()
time.sleep(60)
"""


def test_a_second_process_is_told_within_its_timeout_and_waits_if_that_is_enough(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "3"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"process {holder.pid}"):
            MemoryDirectory(tmp_path, "mine", timeout=0.3)
        assert time.monotonic() - started < 2.5
        MemoryDirectory(tmp_path).close()  # another run in the same parent needs no waiting
        MemoryDirectory(tmp_path, "mine", timeout=60.0).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_one_process_does_not_wait_for_itself(tmp_path, tiny_model):
    model = tiny_model(knn_memories_directory=str(tmp_path))
    with model.knn_memories_context(batch_size=1, name="mine"):
        with model.knn_memories_context(batch_size=1) as nested:
            nested[0].add(torch.ones(1, 1, 2, 8))
        with pytest.raises(RuntimeError, match="already uses"):
            model.create_knn_memories(batch_size=1, name="mine")


def test_a_second_memory_in_the_same_folder_leaves_the_first_as_it_was(tmp_path, tiny_model):
    model, ids = tiny_model(knn_memories_directory=str(tmp_path)), torch.randint(0, 20, (1, 8))
    first = model.create_knn_memories(batch_size=1, name="first")
    model(ids, knn_memories=first)
    before = first[0].state_dict()["kv"][0].clone()
    second = model.create_knn_memories(batch_size=1, name="second")
    model((ids + 1) % 20, knn_memories=second)
    with model.knn_memories_context(batch_size=1) as third, model.knn_memories_context(batch_size=1) as fourth:
        model(ids, knn_memories=third)
        assert fourth.sizes == [[0]]
    assert torch.equal(first[0].state_dict()["kv"][0], before)
    assert not torch.equal(second[0].state_dict()["kv"][0], before)
    first.cleanup()
    second.cleanup()


def test_a_context_cleans_up_after_an_error(tmp_path, tiny_model):
    model = tiny_model(knn_memories_directory=str(tmp_path))
    with pytest.raises(KeyError, match="1"), model.knn_memories_context(batch_size=1):
        raise KeyError(len(list(tmp_path.iterdir())))
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_of_a_killed_process_is_removed(tmp_path):
    code = "import sys, os; from memorizing_transformer.memory.directory import MemoryDirectory\n"
    code += "held = MemoryDirectory(sys.argv[1]); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with closing(MemoryDirectory(tmp_path)) as mine:
        assert list(tmp_path.iterdir()) == [tmp_path / mine.path.name]
