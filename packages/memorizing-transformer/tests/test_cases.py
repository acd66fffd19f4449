"""Cases from the field: reports and questions of users, each with its right value."""

import copy
import errno
import json
import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch

from lm_core import beam_search, generate
from lm_core.checkpoints.checkpoint import CheckpointError, save_checkpoint
from lm_core.checkpoints.manifest import write_manifest
from lm_core.data.documents import tokenise
from lm_core.losses.losses import token_log_probs
from memorizing_transformer import KNNMemory, KNNMemoryList, MemorizingTransformer, XLMemories, retrofit
from memorizing_transformer.training.evaluation import evaluate

PROMPTS = [3, 12, 19]


def kv(n, rows=1, dim=4, seed=0):
    return torch.randn(rows, n, 2, dim, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("settings", [{}, {"xl_max_memories": 5}, {"clear_memories_on_eos_token_id": 3}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_of_generated_text_equal_those_of_generation_past_one_segment(tiny_model, settings, temperature):
    model = tiny_model(**settings)  # segments of 8
    for length in PROMPTS:
        prompt = torch.randint(0, 20, (2, length))
        result = generate(model, prompt, max_new_tokens=20, temperature=temperature)
        scores = token_log_probs(model, torch.cat((prompt, result.tokens), dim=1))
        torch.testing.assert_close(scores[:, length - 1 :].float(), result.log_probs, atol=1e-6, rtol=0)


def test_log_probs_of_padded_rows_equal_those_of_each_row_alone(tiny_model):
    model = tiny_model(xl_max_memories=5)
    ids, mask = torch.randint(0, 20, (3, 30)), torch.zeros(3, 30, dtype=torch.bool)
    for row, length in enumerate(PROMPTS):
        mask[row, 30 - length :] = True
    scores = token_log_probs(model, ids, mask=mask)
    for row, length in enumerate(PROMPTS):
        alone = token_log_probs(model, ids[row : row + 1, 30 - length :])
        torch.testing.assert_close(scores[row, 30 - length :], alone[0], atol=1e-10, rtol=0)


def test_a_given_memory_is_read_and_not_changed_by_scores_and_by_generation_without_a_cache(tiny_model):
    model, prompt = tiny_model(), torch.randint(0, 20, (1, 5))
    memories = model.create_knn_memories(batch_size=1)
    memories[0].add(torch.nn.functional.normalize(kv(10, dim=8), dim=-1).double())
    cached, uncached = (
        generate(model, prompt, max_new_tokens=20, temperature=0.0, knn_memories=memories, use_cache=cache)
        for cache in (True, False)
    )
    torch.testing.assert_close(cached.log_probs, uncached.log_probs, atol=1e-6, rtol=0)
    scores = token_log_probs(model, torch.cat((prompt, cached.tokens), dim=1), knn_memories=memories)
    torch.testing.assert_close(scores[:, 4:].float(), cached.log_probs, atol=1e-6, rtol=0)
    assert memories.sizes == [[10]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_equal_prompts_with_a_memory_each_are_continued_as_each_alone(tiny_model, use_cache):
    model, prompt = tiny_model(), torch.tensor([[1, 2]])
    memories = model.create_knn_memories(batch_size=3)
    memories[0].add(torch.nn.functional.normalize(kv(10, rows=3, dim=8), dim=-1).double())
    settings = {"max_new_tokens": 20, "temperature": 0.0, "use_cache": use_cache}
    free = generate(model, prompt.repeat(3, 1), knn_memories=memories, **settings).tokens.tolist()
    ends = [{row.index(token) if token in row else 20 for row in free} for token in range(20)]
    settings["eos_id"] = next(token for token in range(20) if len(ends[token]) > 1)
    together = generate(model, prompt.repeat(3, 1), knn_memories=memories, **settings)
    assert len(set(together.lengths.tolist())) > 1  # finished rows leave the batch
    beams = beam_search(model, prompt.repeat(3, 1), beams=2, max_new_tokens=6, knn_memories=memories)
    for row in range(3):
        with memories.at_batch_indices([row]) as own:
            alone = generate(model, prompt, knn_memories=own, **settings)
            length = int(alone.lengths[0])
            assert int(together.lengths[row]) == length
            torch.testing.assert_close(together.log_probs[row, :length], alone.log_probs[0], atol=1e-6, rtol=0)
            assert torch.equal(
                beams.tokens[row], beam_search(model, prompt, beams=2, max_new_tokens=6, knn_memories=own).tokens[0]
            )


def test_gradients_of_a_long_text_are_those_of_its_segments(tiny_model, read_in_segments):
    model, ids = tiny_model(xl_max_memories=5), torch.randint(0, 20, (2, 28))
    model.zero_grad()
    token_log_probs(model, ids).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits, _ = read_in_segments(model, ids, model.create_knn_memories(batch_size=2))
    logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, expected, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ a memory in files

FULL_DISK = """
import sys, torch
from memorizing_transformer import KNNMemory
memory = KNNMemory(64, 4096, 1, sys.argv[1] + "/memory", storage=sys.argv[2])
kv = torch.randn(1, 16, 2, 64, generator=torch.Generator().manual_seed(0))
try:
    for number in range(300):
        memory.add(kv + number)
except OSError as error:
    print(error.errno)
before = memory.sizes[0]
assert before == 16 * number
print(before)
assert torch.equal(memory.store.tokens(0)[-16:], (kv + number - 1)[0]) or sys.argv[2] == "int8"
memory.close()
again = KNNMemory(64, 4096, 1, sys.argv[1] + "/memory", storage=sys.argv[2])
assert again.sizes == [before]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk in a namespace")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, storage):
    mount = f'mount -t tmpfs -o size=512k none {tmp_path} && exec "$@"'
    run = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if subprocess.run([*run, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts no file system in a namespace")
    command = [*run, sys.executable, "-c", FULL_DISK, str(tmp_path), storage]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # SIGBUS is -7
    code, tokens = map(int, done.stdout.split())
    assert code == errno.ENOSPC
    assert 0 < tokens < 4096


def refuse_blocks(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_state_that_does_not_fit_on_the_disk_leaves_the_memory_as_it_was(tmp_path, monkeypatch):
    memory, other = KNNMemory(4, 2000, 1, tmp_path / "memory"), KNNMemory(4, 2000, 1)
    memory.add(kv(5))
    other.add(kv(1500, seed=1))
    monkeypatch.setattr(os, "posix_fallocate", refuse_blocks, raising=False)
    with pytest.raises(OSError, match="No space left on device; nothing was added to the memory"):
        memory.load_state_dict(other.state_dict())
    with pytest.raises(OSError, match="No space left"):
        memory.add(kv(1500))
    assert torch.equal(memory.store.tokens(0), kv(5)[0])
    memory.close()


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_system_without_preallocation_writes_zeros_to_new_blocks_only(tmp_path, monkeypatch, storage):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    shape = (4, 600, 2, tmp_path / "memory")
    expected = KNNMemory(4, 600, 2, storage=storage)
    for seed, count in enumerate((200, 300, 150, 40)):  # wraps, and is opened again each time
        memory = KNNMemory(*shape, storage=storage)
        for each in (memory, expected):
            each.add(kv(count, rows=2, seed=seed))
        for row in range(2):
            assert torch.equal(memory.store.tokens(row), expected.store.tokens(row))
        memory.close()


@pytest.mark.parametrize("name", ["data.bin", "scales.bin", "header.bin", "memory.json"])
@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 16), os.remove], ids=["cut", "removed"])
def test_a_cut_or_missing_file_of_a_memory_is_refused(tmp_path, name, damage):
    memory = KNNMemory(4, 8, 2, tmp_path / "memory", storage="int8")
    memory.add(kv(5, rows=2))
    memory.close()
    damage(tmp_path / "memory" / name)
    with pytest.raises((ValueError, OSError), match=f"{name}|must be new or empty"):
        KNNMemory(4, 8, 2, tmp_path / "memory", storage="int8")


@pytest.mark.parametrize(("first", "written"), [(3, 2), (-1, 2), (0, 9), (2**40, 2**62)])
def test_impossible_counts_in_the_header_are_refused(tmp_path, first, written):
    memory = KNNMemory(4, 8, 1, tmp_path / "memory")
    memory.store.first, memory.store.written = [first], [written]
    memory.store.clear([])  # writes the header
    memory.close()
    with pytest.raises(ValueError, match=r"header\.bin is damaged: a row of 8 tokens"):
        KNNMemory(4, 8, 1, tmp_path / "memory")


def test_the_files_of_an_open_memory_are_not_opened_a_second_time(tmp_path):
    memory = KNNMemory(4, 8, 1, tmp_path / "memory")
    memory.add(kv(5))
    with pytest.raises(RuntimeError, match="another memory uses the files"):
        KNNMemory(4, 8, 1, tmp_path / "memory")
    memory.close()
    again = KNNMemory(4, 8, 1, tmp_path / "memory")
    assert torch.equal(again.store.tokens(0), kv(5)[0])
    again.close()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = tiny_model(knn_memories_directory="~/memories")
    with model.knn_memories_context(batch_size=1, name="mine") as memories:
        memories.save("~/saved")
        memories.load("~/saved")
    memory = KNNMemory(4, 8, 1, "~/files")
    memory.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "memories", "saved"]


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "torch.save": None,
}


@pytest.fixture(params=COPIES)
def copied(request, tmp_path):
    def through_torch(one):
        torch.save(one, tmp_path / "one.pt")
        return torch.load(tmp_path / "one.pt", weights_only=False)

    return COPIES[request.param] or through_torch


@pytest.mark.parametrize("settings", [{}, {"backend": "faiss"}, {"storage": "int8"}, {"heads": 2}])
def test_a_copy_of_a_memory_in_files_is_independent(tmp_path, copied, settings):
    memory = KNNMemory(4, 10, 2, tmp_path / "memory", **settings)
    new = kv(7, rows=2) if "heads" not in settings else kv(7, rows=4).view(2, 2, 7, 2, 4)
    queries = new[..., 0, :]
    memory.add(new)
    twin = copied(memory)
    before = memory.retrieve(queries, 3)
    assert torch.equal(twin.retrieve(queries, 3).kv, before.kv)
    twin.add(-new)
    assert memory.sizes == [7, 7]
    assert twin.sizes == [10, 10]
    assert torch.equal(memory.retrieve(queries, 3).kv, before.kv)
    assert int(twin.retrieve(queries, 10).mask.sum()) == queries.shape[:-1].numel() * 10
    memory.close()
    assert twin.sizes == [10, 10]


def test_a_copy_of_the_memories_does_not_own_their_folder(tmp_path, tiny_model, copied):
    model, ids = tiny_model(knn_memories_directory=str(tmp_path)), torch.randint(0, 20, (2, 8))
    memories = model.create_knn_memories(batch_size=2, name="mine")
    model(ids, knn_memories=memories)
    twin = copied(memories)
    assert isinstance(twin, KNNMemoryList)
    assert twin.sizes == memories.sizes == [[8, 8]]
    if copied is not copy.copy:  # which shares the memories, as that of a list does
        twin.clear_memory()
        twin.cleanup()
    model(ids, knn_memories=memories)
    assert memories.sizes == [[16, 16]]
    memories.cleanup()


def test_a_model_and_its_xl_window_are_copied_whole(tiny_model, copied):
    model, ids = tiny_model(xl_max_memories=5, gate="sigmoid"), torch.randint(0, 20, (2, 8))
    logits, window = model(ids)
    window.mask = torch.ones(2, 5, dtype=torch.bool)
    twin, other = copied(model), copied(window)
    assert isinstance(other, XLMemories)
    assert torch.equal(other.mask, window.mask)
    assert torch.equal(twin(ids)[0], logits)
    assert torch.equal(twin(ids, xl_memories=other)[0], model(ids, xl_memories=window)[0])
    assert twin.config == model.config


# ----------------------------------------------------------------------------------------------------- saved memories


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_flipped_bit_in_a_saved_memory_is_refused_and_keeps_the_old_content(tmp_path, storage):
    saved, memory = (KNNMemory(8, 30, 2, storage=storage) for _ in range(2))
    saved.add(kv(25, rows=2, dim=8))
    memory.add(kv(4, rows=2, dim=8, seed=1))
    before = memory.store.tokens(0)
    saved.save(tmp_path / "memory.safetensors")
    content = (tmp_path / "memory.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    loaded = 0
    for bit in torch.randint(0, 8 * len(content), (200,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        try:
            memory.load(tmp_path / "flipped.safetensors")
        except ValueError:
            assert torch.equal(memory.store.tokens(0), before)
        else:  # a bit that nothing depends on
            loaded += 1
            assert torch.equal(memory.store.tokens(0), saved.store.tokens(0))
            memory.clear()
            memory.add(kv(4, rows=2, dim=8, seed=1))
    assert loaded < 20


def with_first(value):
    return lambda state: {**state, "first": value}


DAMAGES = {
    "NaN": lambda state: {**state, "kv": [torch.full_like(state["kv"][0], torch.nan), *state["kv"][1:]]},
    "more than the capacity": lambda state: {**state, "kv": [kv(9)[0], *state["kv"][1:]]},
    "another dtype": lambda state: {**state, "kv": [part.double() for part in state["kv"]]},
    "another shape": lambda state: {**state, "kv": [part[..., :3] for part in state["kv"]]},
    "no tensors": lambda state: {**state, "kv": [1, 2]},
    "kv missing": lambda state: {name: value for name, value in state.items() if name != "kv"},
    "a version of true": lambda state: {**state, "format_version": True},
    "first missing": lambda state: {name: value for name, value in state.items() if name != "first"},
    "first negative": with_first([-1, 0]),
    "first too great": with_first([2**70, 0]),
    "first too few": with_first([0]),
    "first as text": with_first(["0", "0"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("in_files", [False, True])
def test_a_damaged_state_is_refused_and_keeps_the_old_content(tmp_path, damage, in_files):
    memory = KNNMemory(4, 8, 2, tmp_path / "memory" if in_files else None)
    memory.add(kv(5, rows=2))
    with pytest.raises(ValueError, match="saved"):
        memory.load_state_dict(damage(memory.state_dict()))
    assert torch.equal(memory.store.tokens(0), kv(5, rows=2)[0])
    memory.close()


def test_key_heads_of_a_row_with_different_tokens_are_refused():
    memory = KNNMemory(4, 8, 1, heads=2)
    memory.add(kv(5, rows=2).unsqueeze(0))
    state = memory.state_dict()
    with pytest.raises(ValueError, match="key heads of row 0"):
        memory.load_state_dict({**state, "first": [0, 1]})


def test_a_folder_with_one_damaged_layer_changes_no_layer(tmp_path, tiny_model):
    model, ids = tiny_model(memorizing_layers=[1, 2]), torch.randint(0, 20, (1, 8))
    memories, other = (model.create_knn_memories(batch_size=1) for _ in range(2))
    model(ids, knn_memories=memories)
    memories.save(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged"):
        other.load(tmp_path)
    state = memories.state_dict()
    with pytest.raises(ValueError, match="saved memory is damaged"):
        other.load_state_dict([state[0], {**state[1], "first": [-1]}])
    assert other.sizes == [[0], [0]]
    file.write_bytes(content)
    other.load(tmp_path)
    assert other.sizes == [[8], [8]]


@pytest.mark.archives
def test_files_of_an_earlier_version_are_read(tmp_path):
    memory, again = KNNMemoryList([KNNMemory(4, 8, 2)]), KNNMemoryList([KNNMemory(4, 8, 2)])
    memory[0].add(kv(5, rows=2))
    torch.save(memory[0].state_dict(), tmp_path / "layer-1.pt")
    again.load(tmp_path)
    assert torch.equal(again[0].store.tokens(1), kv(5, rows=2)[1])


# -------------------------------------------------------------------------------------------------------------- masks


MASKED_CALLS = {
    "forward": lambda model, ids, mask: model(ids, mask=mask),
    "hidden": lambda model, ids, mask: model.hidden(ids, mask=mask),
    "hidden of several segments": lambda model, ids, mask: model.hidden(ids.repeat(1, 3), mask=mask.repeat(1, 3)),
    "read": lambda model, ids, mask: model.read(ids, mask=mask),
    "cache": lambda model, ids, mask: model(ids, mask=mask, cache=model.init_cache(2, 8)),
    "generate": lambda model, ids, mask: model.generate(ids, mask=mask, max_new_tokens=2),
    "lm_core.generate": lambda model, ids, mask: generate(model, ids, mask=mask, max_new_tokens=2),
    "token_log_probs": lambda model, ids, mask: token_log_probs(model, ids, mask=mask),
    "add": lambda model, ids, mask: KNNMemory(4, 8, 2).add(kv(8, rows=2), mask=mask),
    "xl_memories": lambda model, ids, mask: model(ids, xl_memories=window_with(mask)),
    "may_recall": lambda model, ids, mask: model.memory_attentions()[0](
        torch.zeros(2, 8, 32).double(), bias=torch.zeros(1, 4, 8, 8).double(), may_recall=mask
    ),
}


def window_with(mask):
    window = XLMemories([torch.zeros(2, 8, 2, 8).double()] * 3)
    window.mask = mask
    return window


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
@pytest.mark.parametrize("call", MASKED_CALLS.values(), ids=MASKED_CALLS)
def test_a_mask_that_is_not_boolean_is_refused(tiny_model, call, dtype):
    with pytest.raises(TypeError, match="bool"):
        call(tiny_model(xl_max_memories=8), torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=dtype))


@pytest.mark.plain
@pytest.mark.parametrize("name", ["forward", "hidden", "read", "cache", "add"])
def test_a_mask_that_is_no_tensor_is_refused(tiny_model, name):
    with pytest.raises(TypeError, match="mask must be a boolean tensor, got list"):
        MASKED_CALLS[name](tiny_model(), torch.zeros(2, 8, dtype=torch.long), [[True] * 8] * 2)


# ---------------------------------------------------------------------------------------------------------- processes


RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_trainer as runs
from memorizing_transformer.training.evaluation import evaluate
from lm_core.checkpoints.checkpoint import save_checkpoint
from lm_core.distributed import data_parallel, rank, release, world_size
trainer = runs.MemoryTrainer(
    model=runs.model(memorizing_layers=[1, 2], xl_max_memories=0).double(),
    corpus=runs.corpus(),
    checkpoint_dir=sys.argv[2],
    settings=runs.settings(batch_size=int(sys.argv[3])),
)
trainer.train()
if world_size() > 1:
    wrapped = data_parallel(trainer.model, trainer.device)
    save_checkpoint(sys.argv[2] + "/wrapped", 6, model=wrapped)
    release(wrapped)
for documents in (1, 3, None):  # of three, and of one, some processes have fewer
    reading = {"eos_id": runs.EOS, "segment_length": 8, "max_documents": documents}
    score = evaluate(trainer.model, runs.corpus().validation, **reading)
    line = json.dumps([rank(), documents, score.bits_per_byte, score.loss, score.tokens, score.by_position])
    sys.stdout.write(line + "\\n")  # in one piece, since torchrun's ranks write to the same pipe
"""


def run_ranks(tmp_path, name, processes, batch_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, here = tmp_path / "ranks.py", os.path.dirname(os.path.abspath(__file__))
    script.write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), f"--master_port={port}"]
    command = [sys.executable, *(launch if processes > 1 else ()), str(script), here, str(tmp_path / name)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(batch_size)], capture_output=True, text=True, timeout=240, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return MemorizingTransformer.from_pretrained(tmp_path / name / "checkpoints" / "step-6"), rows


@pytest.mark.distributed
def test_a_model_of_memorizing_layers_only_trains_and_is_evaluated_on_two_processes_as_on_one(tmp_path):
    one, alone = run_ranks(tmp_path, "one", 1, 4)
    two, both = run_ranks(tmp_path, "two", 2, 2)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), atol=1e-10, rtol=0)
    wrapped = MemorizingTransformer.from_pretrained(tmp_path / "two" / "wrapped" / "step-6")
    torch.testing.assert_close(wrapped.state_dict(), two.state_dict(), atol=0, rtol=0)
    assert len(both) == 6
    for _, documents, bits, loss, tokens, by_position in both:
        expected = next(row for row in alone if row[1] == documents)
        assert [bits, loss] == pytest.approx(expected[2:4], abs=1e-3)  # documents meet in other segments
        assert tokens == expected[4]
        assert [row[:2] for row in by_position] == [row[:2] for row in expected[5]]


# ------------------------------------------------------------------------------------------------ files from strangers


HOSTILE = {
    "dim": 10**9,
    "depth": 10**9,
    "num_tokens": 10**12,
    "dim_head": 10**9,
    "heads": 10**9,
    "knn_attn_heads": 10**8,
    "ff_mult": 10**9,
    "num_retrieved_memories": 10**9,
    "segment_length": 10**12,
    "xl_max_memories": 10**12,
    "max_knn_memories": 10**15,
    "memorizing_layers": list(range(10**6)),
    "shift_xl_memories_down": 10**400,
    "knn_storage": "int4",
    "gate": 3,
}


@pytest.fixture
def stored(tmp_path):
    """``stored(model, **arguments)``: a folder of ``model`` in whose config.json these arguments are replaced."""

    def store(model, **arguments):
        folder = model.save_pretrained(tmp_path / "model")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["arguments"] |= arguments
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_manifest(folder)
        return folder

    return store


@pytest.mark.plain
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sizes_of_a_stored_model_are_refused_before_anything_is_built(tiny_model, stored, name):
    folder = stored(tiny_model(), **{name: HOSTILE[name]})
    with pytest.raises(CheckpointError, match=name):
        MemorizingTransformer.from_pretrained(folder)


def test_a_stored_model_does_not_choose_where_memories_are_written(tmp_path, tiny_model, stored):
    model = tiny_model(knn_memories_directory=str(tmp_path / "mine"), memorizing_layers=())
    folder = stored(model, knn_memories_directory=str(tmp_path / "elsewhere"))
    assert MemorizingTransformer.from_pretrained(folder).knn_memories_directory is None
    again = MemorizingTransformer.from_pretrained(folder, knn_memories_directory=str(tmp_path / "mine"))
    assert retrofit(again).knn_memories_directory == str(tmp_path / "mine")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.plain
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_as_the_model_itself(tmp_path, tiny_model, wrap):
    model = tiny_model()
    folder = save_checkpoint(tmp_path, 3, model=wrap(model))
    again = MemorizingTransformer.from_pretrained(folder)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_evaluated_as_the_model_itself(tiny_model, wrap):
    model, documents = tiny_model(clear_memories_on_eos_token_id=19), tokenise([[1, 2, 3] * 9, [4, 5] * 9])
    reading = {"eos_id": 19, "segment_length": 8}
    assert evaluate(wrap(model), documents, **reading) == evaluate(model, documents, **reading)
    with pytest.raises(TypeError, match="model must be a MemorizingTransformer or a MemoryAugmentedLM, got Linear"):
        evaluate(torch.nn.Linear(2, 2), documents, **reading)
