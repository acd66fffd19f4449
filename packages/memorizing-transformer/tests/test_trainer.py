"""Training on documents in order: the stream, resume, processes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from unittest.mock import Mock

import pytest
import torch

from lm_core.checkpoints.checkpoint import load_checkpoint
from lm_core.data.corpora import load_corpus
from lm_core.data.documents import tokenise
from lm_core.rng import seed_everything
from memorizing_transformer import MemorizingTransformer, open_gates
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.documents import DocumentSegments, DocumentStreams
from memorizing_transformer.training.evaluation import evaluate
from memorizing_transformer.training.trainer import MemoryTrainer

EOS = 257
TEXTS = [chr(97 + n % 4) * (7 + 13 * n % 71) + str(n) for n in range(24)]


def corpus():
    return load_corpus([text + "-" + text[::-1] for text in TEXTS], validation_fraction=0.2)


def model(seed=0, **settings):
    seed_everything(seed)
    defaults = {
        "num_tokens": 259,
        "dim": 16,
        "depth": 2,
        "dim_head": 8,
        "heads": 2,
        "num_retrieved_memories": 4,
        "max_knn_memories": 20,
        "xl_max_memories": 6,
        "clear_memories_on_eos_token_id": EOS,
    }
    return MemorizingTransformer(**{**defaults, **settings})


def settings(**changes):
    defaults = {
        "max_steps": 6,
        "segment_length": 8,
        "batch_size": 2,
        "validate_every": 3,
        "checkpoint_every": 3,
        "validation_documents": 3,
        "device": "cpu",
    }
    return TrainingSettings(**{**defaults, **changes})


def new_trainer(folder, directory=None, trackers=(), **changes):
    one = model(attn_dropout=0.1, knn_memories_directory=directory)
    run = {"checkpoint_dir": folder, "settings": settings(**changes), "trackers": trackers}
    return MemoryTrainer(model=one, corpus=corpus(), **run)


def trained(folder, directory=None, **changes):
    trainer = new_trainer(folder, directory, **changes)
    return trainer, trainer.train()


def assert_same_weights(one, other):
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), atol=0, rtol=0)


def test_gates_stand_still_without_a_memory_and_are_opened_for_the_first_one(tmp_path):
    one = model(gate="sigmoid")
    (gate,) = [attention.gate for attention in one.memory_attentions()]
    begun = gate.detach().clone()

    def train(name, use_memory):
        chosen = settings(use_memory=use_memory, weight_decay=0.5)
        MemoryTrainer(model=one, corpus=corpus(), checkpoint_dir=tmp_path / name, settings=chosen).train()

    train("without", use_memory=False)
    assert torch.equal(gate, begun)
    assert open_gates(one)
    torch.testing.assert_close(gate.sigmoid(), torch.full_like(gate, 0.5))
    train("with", use_memory=True)
    trained_gate = gate.detach().clone()
    assert bool((trained_gate != 0).all())
    assert not open_gates(one)  # it has been trained
    assert torch.equal(gate, trained_gate)
    assert not open_gates(model(gate="softmax"))


def streams(batch_size, **changes):
    return DocumentStreams(documents=tokenise(TEXTS), segment_length=5, batch_size=batch_size, eos_id=EOS, **changes)


def test_each_row_reads_documents_whole_and_in_order():
    documents = [document.tolist() for document in tokenise(TEXTS)]
    segments = list(islice(streams(3), 200))
    read = [torch.cat([getattr(s, name) for s in segments], 1) for name in ("ids", "labels", "positions")]
    first_epoch = []
    for ids, labels, positions in zip(*(part.tolist() for part in read), strict=True):
        ends = [at + 1 for at, token in enumerate(ids) if token == EOS]
        for number, (start, end) in enumerate(pairwise((0, *ends))):
            assert ids[start : end - 1] in documents
            assert labels[start:end] == [*ids[start + 1 : end], -100]
            assert positions[start:end] == list(range(end - start))
            first_epoch += [ids[start : end - 1]] if number < 8 else []
    assert sorted(first_epoch) == sorted(documents)


def test_two_processes_read_what_one_reads():
    whole, first, second = streams(4), streams(2, rank=0, world_size=2), streams(2, rank=1, world_size=2)
    for _ in range(50):
        assert torch.equal(next(whole).ids, torch.cat((next(first).ids, next(second).ids)))


def test_a_stream_continues_where_it_was():
    stream, other = streams(2), streams(2)
    for _ in range(37):
        next(stream)
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for _ in range(60):
        assert torch.equal(next(stream).ids, next(other).ids)


def test_held_out_documents_are_each_read_once():
    documents = tokenise(TEXTS)
    segments = DocumentSegments(documents=documents, segment_length=6, batch_size=3, eos_id=EOS)
    assert int(sum(s.mask.sum() for s in segments)) == documents.num_tokens + len(documents)
    assert sum(s.num_labels for s in segments) == documents.num_tokens
    assert int((torch.cat([s.ids[s.mask] for s in segments]) == EOS).sum()) == len(documents)


def test_evaluation_equals_each_document_alone():
    documents = tokenise(TEXTS[:7])
    # without a memory: segments of a packed row begin elsewhere than those of a document alone
    one = model(memorizing_layers=(), xl_max_memories=200).double().eval()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    nats = 0.0
    for document in documents:
        ids = torch.tensor([*document.tolist(), EOS])
        nats += torch.nn.functional.cross_entropy(one(ids[None, :-1])[0][0], ids[1:], reduction="sum").item()
    together = evaluate(one, documents, eos_id=EOS, segment_length=8, batch_size=1)
    assert together.loss == pytest.approx(nats / documents.num_tokens, abs=1e-9)


def test_the_memory_gains_exactly_nothing_before_the_first_eviction(tmp_path):
    trainer, result = trained(tmp_path / "run")
    held_out = {"eos_id": EOS, "segment_length": 512, "batch_size": 2}
    on = evaluate(trainer.model, corpus().validation, **held_out)
    off = evaluate(trainer.model, corpus().validation, use_memory=False, **held_out)
    assert on.by_position == off.by_position
    assert result.last.bits_per_byte != result.without_memory.bits_per_byte


def saved_kv(trainer, folder):
    state = load_checkpoint(trainer.session.save(folder)).rng["state"]
    return [memory["kv"] for memory in state["remembered"]["memories"]]


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    _part, result = trained(tmp_path / "parts", tmp_path / "memories", max_seconds=1e-6)
    assert result.outcome == "out of time"
    resumed, result = trained(tmp_path / "parts", tmp_path / "memories")
    assert result.step == 6
    assert_same_weights(whole, resumed)
    mine, theirs = saved_kv(whole, tmp_path / "first"), saved_kv(resumed, tmp_path / "second")
    torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(7))


def test_an_error_leaves_no_memory_files_and_checkpoints_and_the_next_call_have_the_memories(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    fails_once = Mock(side_effect=[*[None] * 5, SystemExit("stopped"), *[None] * 9])
    trainer = new_trainer(tmp_path / "run", tmp_path / "memories", [Mock(log=fails_once)])
    with pytest.raises(SystemExit, match="stopped"):
        trainer.train()
    assert list((tmp_path / "memories").iterdir()) == []
    assert all(len(kv) for kv in saved_kv(trainer, tmp_path / "between")[0])
    assert trainer.train().step == 6
    assert_same_weights(whole, trainer)
    assert list((tmp_path / "memories").iterdir()) == []


def test_training_learns_and_draws_curves(tmp_path):
    _, result = trained(tmp_path / "run", max_steps=30, learning_rate=1e-2)
    assert result.outcome == "finished"
    assert result.last.bits_per_byte < 0.8 * result.first_bits_per_byte
    assert result.curves.is_file()


@pytest.mark.plain
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own, at a graph break
def test_a_compiled_run_trains_and_stores_what_another_does(tmp_path):
    def weights(name, **changes):
        one = model(depth=4, memorizing_layers=[2, 3], gate="sigmoid").double()  # Adam makes much of rounding
        run = {"checkpoint_dir": tmp_path / name, "settings": settings(**changes)}
        MemoryTrainer(model=one, corpus=corpus(), **run).train()
        return one.state_dict()

    compiled = weights("compiled", compile=True)
    torch.testing.assert_close(compiled, weights("eager"), atol=1e-9, rtol=0)
    stored = MemorizingTransformer.from_pretrained(tmp_path / "compiled" / "checkpoints" / "step-6")
    torch.testing.assert_close(stored.state_dict(), compiled, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 4}, "segment_length is 4, but was 8"),
        ({"seed": 1}, "seed is 1, but was 0"),
        ({"use_memory": False}, "use_memory is False, but was True"),
    ],
)
def test_another_run_is_not_resumed_by_mistake(tmp_path, changes, message):
    trained(tmp_path / "run", max_steps=3)
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "run", **changes)


def test_a_run_is_not_resumed_with_other_held_out_documents(tmp_path):
    trained(tmp_path / "run", max_steps=3)
    documents = corpus()
    other = replace(documents, validation=tokenise(["other text"]))
    run = {"checkpoint_dir": tmp_path / "run", "settings": settings()}
    with pytest.raises(ValueError, match="validation_data is"):
        MemoryTrainer(model=model(attn_dropout=0.1), corpus=other, **run).train()


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_trainer as t
from torch.distributed import is_initialized, get_world_size
size = int(sys.argv[3])
trainer = t.MemoryTrainer(model=t.model().double(), corpus=t.corpus(), checkpoint_dir=sys.argv[2],
                          settings=t.settings(batch_size=size, gradient_accumulation=2, fsdp=sys.argv[4] == "fsdp"))
trainer.train()
assert get_world_size() == 2
"""


@pytest.mark.distributed
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_with_rows_of_their_own_train_like_one_with_all_rows(tmp_path, wrapper):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = os.path.dirname(os.path.abspath(__file__))
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={port}"]
    command = [sys.executable, *launch, str(tmp_path / "ranks.py"), here, str(tmp_path / "two"), "2", wrapper]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = MemoryTrainer(
        model=model().double(),  # Adam makes much of a gradient that is nothing but rounding
        corpus=corpus(),
        checkpoint_dir=tmp_path / "one",
        settings=settings(batch_size=4, gradient_accumulation=2),
    )
    alone.train()
    both = MemorizingTransformer.from_pretrained(tmp_path / "two" / "checkpoints" / "step-6")
    torch.testing.assert_close(both.state_dict(), alone.model.state_dict(), atol=1e-10, rtol=0)
