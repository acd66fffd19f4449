"""Training on documents in order: the stream, resume, processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

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


def trained(folder, **changes):
    one = model(attn_dropout=0.1)
    trainer = MemoryTrainer(model=one, corpus=corpus(), checkpoint_dir=folder, settings=settings(**changes))
    return trainer, trainer.train()


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


def test_each_row_reads_documents_whole_and_in_order():
    documents = tokenise(TEXTS)
    streams = DocumentStreams(documents=documents, segment_length=5, batch_size=3, eos_id=EOS)
    rows = [[], [], []]
    labels, positions = [[], [], []], [[], [], []]
    for _ in range(200):
        segment = next(streams)
        for row in range(3):
            rows[row] += segment.ids[row].tolist()
            labels[row] += segment.labels[row].tolist()
            positions[row] += segment.positions[row].tolist()
    known = {tuple(document.tolist()) for document in documents}
    for row in range(3):
        ends = [at for at, token in enumerate(rows[row]) if token == EOS]
        starts = [0, *(at + 1 for at in ends[:-1])]
        read = [tuple(rows[row][a:b]) for a, b in zip(starts, ends, strict=True)]
        assert set(read) <= known
        for a, b in zip(starts, ends, strict=True):
            assert labels[row][a : b + 1] == [*rows[row][a + 1 : b + 1], -100]
            assert positions[row][a : b + 1] == list(range(b + 1 - a))
    first_epoch = [text for row in range(3) for text in read_until(rows[row], 8)]
    assert sorted(first_epoch) == sorted(known_texts(documents))


def read_until(tokens, count):
    parts, current = [], []
    for token in tokens:
        if token == EOS:
            parts.append(tuple(current))
            current = []
        else:
            current.append(token)
    return parts[:count]


def known_texts(documents):
    return [tuple(document.tolist()) for document in documents]


def test_two_processes_read_what_one_reads():
    documents = tokenise(TEXTS)
    make = lambda size, rank, world: DocumentStreams(  # noqa: E731
        documents=documents, segment_length=5, batch_size=size, eos_id=EOS, rank=rank, world_size=world
    )
    whole, first, second = make(4, 0, 1), make(2, 0, 2), make(2, 1, 2)
    for _ in range(50):
        assert torch.equal(next(whole).ids, torch.cat((next(first).ids, next(second).ids)))


def test_a_stream_goes_on_where_it_was():
    documents = tokenise(TEXTS)
    make = lambda: DocumentStreams(documents=documents, segment_length=5, batch_size=2, eos_id=EOS)  # noqa: E731
    stream = make()
    for _ in range(37):
        next(stream)
    other = make()
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
    one = model().double().eval()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    together = evaluate(one, documents, eos_id=EOS, segment_length=8, batch_size=1)
    nats = 0.0
    for document in documents:
        ids = torch.from_numpy(np.append(document.astype(np.int64), EOS))[None]
        memories, window = one.create_knn_memories(batch_size=1), None
        losses = []
        with torch.no_grad():
            for at in range(0, ids.shape[1] - 1, 8):
                logits, window = one(ids[:, at : at + 8], knn_memories=memories, xl_memories=window)
                labels = ids[:, at + 1 : at + 9]
                losses.append(
                    torch.nn.functional.cross_entropy(logits[0, : labels.shape[1]], labels[0], reduction="sum")
                )
        nats += float(sum(losses))
    # segments of the packed row begin elsewhere than those of a document alone, so memory is filled at other times;
    # without a memory and with a window that holds everything they agree
    plain = model(memorizing_layers=(), xl_max_memories=200).double().eval()
    whole = evaluate(plain, documents, eos_id=EOS, segment_length=8, batch_size=1)
    exact = 0.0
    with torch.no_grad():
        for document in documents:
            ids = torch.from_numpy(np.append(document.astype(np.int64), EOS))[None]
            logits, _ = plain(ids[:, :-1])
            exact += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    assert whole.loss == pytest.approx(exact / documents.num_tokens, abs=1e-9)
    assert together.loss == pytest.approx(nats / documents.num_tokens, rel=0.05)


def test_the_memory_gains_exactly_nothing_before_the_first_eviction(tmp_path):
    trainer, result = trained(tmp_path / "run")
    held_out = {"eos_id": EOS, "segment_length": 512, "batch_size": 2}
    on = evaluate(trainer.model, corpus().validation, **held_out)
    off = evaluate(trainer.model, corpus().validation, use_memory=False, **held_out)
    assert on.by_position == off.by_position
    assert result.last.bits_per_byte != result.without_memory.bits_per_byte


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    _part, result = trained(tmp_path / "parts", max_seconds=1e-6)
    assert result.outcome == "out of time"
    assert result.step < 6
    resumed, result = trained(tmp_path / "parts")
    assert result.step == 6
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    mine, theirs = whole.objective.memories, resumed.objective.memories
    for a, b in zip(mine.state_dict(), theirs.state_dict(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["kv"], b["kv"], strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(7))


def test_training_learns_and_draws_curves(tmp_path):
    _, result = trained(tmp_path / "run", max_steps=30, learning_rate=1e-2)
    assert result.outcome == "finished"
    assert result.last.bits_per_byte < 0.8 * result.first_bits_per_byte
    assert result.curves.is_file()


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


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_trainer as t
from torch.distributed import is_initialized, get_world_size
size = int(sys.argv[3])
trainer = t.MemoryTrainer(model=t.model().double(), corpus=t.corpus(), checkpoint_dir=sys.argv[2],
                          settings=t.settings(batch_size=size, gradient_accumulation=2))
trainer.train()
assert get_world_size() == 2
"""


@pytest.mark.distributed
def test_two_processes_with_rows_of_their_own_train_like_one_with_all_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = os.path.dirname(os.path.abspath(__file__))
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={port}"]
    command = [sys.executable, *launch, str(tmp_path / "ranks.py"), here, str(tmp_path / "two"), "2"]
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
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], weight, atol=1e-10, rtol=0, msg=name)
