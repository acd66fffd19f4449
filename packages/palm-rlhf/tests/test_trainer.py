"""Pretraining through its public entry point: updates independent of batching, exact resume, early errors."""

import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion

from lm_core.checkpoints.checkpoint import list_checkpoints
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.data.corpora import split_documents
from lm_core.data.documents import tokenise
from lm_core.data.packing import PackedBatches
from lm_core.tokenizers import ByteTokenizer, load_tokenizer
from lm_core.training.optimization import learning_rate_scale
from palm_rlhf import PaLM
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.pretrain.evaluation import evaluate
from palm_rlhf.pretrain.loss import NextTokenLoss
from palm_rlhf.pretrain.trainer import PretrainTrainer

TINY = TrainingSettings(
    max_steps=6,
    sequence_length=24,
    batch_size=2,
    learning_rate=1e-2,
    validate_every=3,
    validation_tokens=200,
    checkpoint_every=2,
    keep_checkpoints=None,
    device="cpu",
)


@pytest.fixture(scope="module")
def corpus():
    """Documents of 3 to 90 bytes, so that micro-batches hold different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 90, (60,), generator=generator).tolist()
    texts = [bytes(torch.randint(97, 105, (length,), generator=generator).tolist()) for length in lengths]
    return split_documents(tokenise(texts), 0.2)


def tiny_palm(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    arguments = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_tokens": 259, **overrides}
    return PaLM(**arguments).to(dtype)


@pytest.fixture
def trainer_of(corpus, tmp_path):
    """``trainer_of(palm, **settings)``: a trainer on the corpus with some of the settings of ``TINY`` changed."""

    def make(palm=None, *, folder=tmp_path, trackers=(), documents=corpus, **changes):
        palm, settings = palm or tiny_palm(), replace(TINY, **changes)
        return PretrainTrainer(
            model=palm, corpus=documents, checkpoint_dir=folder, settings=settings, trackers=trackers
        )

    return make


class StopAt:
    """A tracker that presses Ctrl-C when it gets the metrics of an update."""

    def __init__(self, step):
        self.step = step

    def log(self, values, step):
        if step == self.step and "loss" in values:
            signal.raise_signal(signal.SIGINT)


def rows_of(folder, *, without=("tokens_per_second",)):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def equal_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------- the objective


def test_packed_loss_equals_each_document_alone(corpus):
    palm = tiny_palm(torch.float64)
    batch = next(PackedBatches(documents=corpus.train, sequence_length=40, batch_size=3, eos_id=257, pad_id=258))

    expected, labels = torch.zeros((), dtype=torch.float64), 0
    for ids, row_labels, owners in zip(batch.ids, batch.labels, batch.document_ids, strict=True):
        for owner in owners.unique().tolist():
            part = owners == owner
            scores = palm(ids[part][None])[0]
            counted = row_labels[part] != -100
            expected += F.cross_entropy(scores[counted], row_labels[part][counted], reduction="sum")
            labels += int(counted.sum())
    expected_gradient = torch.autograd.grad(expected / labels, palm.token_emb.weight)[0]

    loss = NextTokenLoss(palm)(batch.ids, batch.labels, batch.document_ids, torch.tensor(labels, dtype=torch.float64))
    gradient = torch.autograd.grad(loss, palm.token_emb.weight)[0]
    assert torch.allclose(loss, expected / labels, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("batch_size", "gradient_accumulation"), [(1, 8), (4, 2)])
def test_one_row_by_eight_micro_batches_equals_eight_rows_at_once(
    corpus, trainer_of, tmp_path, batch_size, gradient_accumulation
):
    def train(name, **sizes):
        trainer = trainer_of(tiny_palm(torch.float64), folder=tmp_path / name, max_steps=4, **sizes)
        trainer.train()
        return trainer.model.state_dict(), rows_of(tmp_path / name)

    whole, whole_rows = train("whole", batch_size=8)
    split, split_rows = train("split", batch_size=batch_size, gradient_accumulation=gradient_accumulation)

    batches = PackedBatches(documents=corpus.train, sequence_length=24, batch_size=1, eos_id=257)
    assert len({next(batches).num_labels for _ in range(8)}) > 1  # a mean of means would differ
    for name, weight in whole.items():
        assert torch.allclose(split[name], weight, rtol=0, atol=1e-12), name
    for one, other in zip(whole_rows, split_rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_learning_rate_steps_once_an_update_also_with_accumulation(trainer_of, tmp_path):
    trainer_of(max_steps=5, warmup=0.4, gradient_accumulation=3, final_learning_rate=0.1).train()

    rates = [row["learning_rate"] for row in rows_of(tmp_path) if "loss" in row]
    scales = [learning_rate_scale(step, warmup_steps=2, total_steps=5, final_scale=0.1) for step in range(5)]
    assert rates == pytest.approx([1e-2 * scale for scale in scales])


def test_an_update_with_a_nan_is_skipped_and_counted(trainer_of, tmp_path):
    trainer = trainer_of()
    seen, calls = [], {"training": 0}

    def poison(module, arguments, loss):
        if not module.training:
            return loss
        calls["training"] += 1
        seen.append(trainer.model.token_emb.weight.detach().clone())
        return loss * float("nan") if calls["training"] == 3 else loss

    trainer.objective.register_forward_hook(poison)
    trainer.train()

    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])  # nothing was learned from the third
    assert not torch.equal(seen[3], seen[4])
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None


def test_training_in_bfloat16_keeps_float32_weights_and_learns(trainer_of):
    trainer = trainer_of(max_steps=20, precision="bf16")
    result = trainer.train()

    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert result.last_bits_per_byte < result.first_bits_per_byte - 1


@pytest.mark.plain
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="torch compiles wrong gradients before 2.7")
def test_a_compiled_run_learns_the_same(trainer_of, tmp_path):
    eager, compiled = (trainer_of(folder=tmp_path / str(on), max_steps=3, compile=on) for on in (False, True))
    expected, result = eager.train(), compiled.train()

    assert result.last_bits_per_byte == pytest.approx(expected.last_bits_per_byte, rel=1e-5)
    for name, weight in eager.model.state_dict().items():
        assert torch.allclose(compiled.model.state_dict()[name], weight, rtol=0, atol=1e-4), name


@pytest.mark.plain
def test_compiling_is_refused_where_torch_compiles_wrong_gradients(trainer_of, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    with pytest.raises(ValueError, match=r"compile=True on the CPU needs torch 2.7 or newer, got 2.6.0"):
        trainer_of(compile=True)


@pytest.mark.cuda
def test_training_on_a_gpu_learns_what_the_cpu_learns(trainer_of, tmp_path):
    def bits(device, precision="fp32"):
        folder = tmp_path / f"{device}-{precision}"
        return trainer_of(folder=folder, device=device, precision=precision).train().last_bits_per_byte

    cpu = bits("cpu")
    assert bits("cuda") == pytest.approx(cpu, rel=1e-3)
    assert bits("cuda", "bf16") == pytest.approx(cpu, rel=3e-2)


# --------------------------------------------------------------------------------------------------- bits per byte


class PairTokenizer:
    """Two letters of a to h a token, then EOS."""

    vocab_size = 65
    eos_id = 64
    pad_id = None

    def encode(self, text):
        return [8 * (ord(one) - 97) + ord(two) - 97 for one, two in zip(text[::2], text[1::2], strict=True)]

    def decode(self, ids):
        return "".join(chr(97 + i // 8) + chr(97 + i % 8) for i in ids if i != self.eos_id)

    def save_pretrained(self, directory):
        (directory / "pairs.txt").write_text("pairs")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()], ids=["bytes", "pairs"])
def test_bits_per_byte_are_bits_of_predicted_tokens_over_their_bytes(tokenizer):
    texts = ["abcdefgh" * 3, "hgfedcba" * 2, "abab" * 5]
    documents = tokenise(texts, tokenizer=tokenizer)
    palm = tiny_palm(torch.float64, num_tokens=tokenizer.vocab_size)

    nats, labels, size, tokens = 0.0, 0, 0, 0
    for number, text in enumerate(texts):
        ids = torch.tensor([*tokenizer.encode(text), tokenizer.eos_id])
        log_probs = palm(ids[None]).detach()[0].log_softmax(-1)
        nats -= float(log_probs[:-1].gather(-1, ids[1:, None]).sum())
        labels += len(ids) - 1
        size, tokens = size + len(text), tokens + len(ids) - 1
        assert len(documents[number]) == len(ids) - 1
    held_out = evaluate(palm, documents, tokenizer, sequence_length=100, batch_size=2, precision="fp32")

    assert held_out.tokens == labels
    assert held_out.loss == pytest.approx(nats / labels, rel=1e-12)
    # every document predicts as many tokens as it has, its EOS in place of its first: so bytes over bytes
    assert labels == tokens
    assert held_out.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_evaluation_leaves_the_model_in_its_mode_and_the_generator_alone(corpus):
    palm = tiny_palm(attn_dropout=0.5)
    palm.train()
    state = torch.get_rng_state()

    first = evaluate(palm, corpus.validation, ByteTokenizer(), max_tokens=300)
    assert palm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(palm, corpus.validation, ByteTokenizer(), max_tokens=300) == first


# ------------------------------------------------------------------------------------------------ resuming, stopping


@pytest.mark.parametrize(("stop_at", "same_trainer"), [(1, False), (3, False), (5, False), (2, True)])
def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(trainer_of, tmp_path, stop_at, same_trainer):
    def trainer(name, *trackers):
        return trainer_of(tiny_palm(attn_dropout=0.2, ff_dropout=0.2), folder=tmp_path / name, trackers=trackers)

    whole, stopped = trainer("whole"), trainer("parts", StopAt(stop_at))
    resumed = stopped if same_trainer else trainer("parts")
    whole_result = whole.train()
    interrupted = stopped.train()
    if not same_trainer:
        torch.manual_seed(123)  # what happens between must not matter
    result = resumed.train()

    assert (interrupted.outcome, interrupted.step) == ("interrupted", stop_at)
    assert (result.outcome, result.first_step, result.step) == ("finished", stop_at, TINY.max_steps)
    assert equal_weights(whole.model, resumed.model)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert result.first_bits_per_byte == whole_result.first_bits_per_byte
    assert result.last_bits_per_byte == whole_result.last_bits_per_byte
    optimizers = [one.optimizer.state_dict()["state"] for one in (whole, resumed)]
    for number, state in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][number][name]) for name, value in state.items())


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_checkpoints_that_open_alone_with_their_tokenizer(trainer_of, tmp_path):
    trainer = trainer_of(keep_checkpoints=2)
    result = trainer.train()

    assert [path.name for path in list_checkpoints(result.checkpoints)] == ["step-4", "step-6"]
    assert equal_weights(PaLM.from_pretrained(result.checkpoints / "step-6"), trainer.model)
    assert load_tokenizer(result.checkpoints / "step-6") == ByteTokenizer()
    assert result.curves == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["sequence_length"] == 24
    assert record["settings"]["model"]["dim"] == 16


def test_trackers_get_every_row(trainer_of, tmp_path):
    rows = []
    trainer_of(trackers=[SimpleNamespace(log=lambda values, step: rows.append({"step": step, **values}))]).train()

    assert rows == rows_of(tmp_path, without=())
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3, 6]


def test_a_tracker_of_accelerate_is_started_and_finished(trainer_of, tmp_path):
    pytest.importorskip("tensorboard")
    trainer_of(trackers=["tensorboard"]).train()

    (events,) = (tmp_path / "palm-rlhf").glob("events.*")
    assert b"train_bits_per_byte" in events.read_bytes()
    assert b"validation_bits_per_byte" in events.read_bytes()


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_steps": 2.5}, "max_steps"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1, got 0"),
        ({"validation_tokens": 0}, "validation_tokens must be at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"warmup": 1.0}, r"warmup must be a fraction of the updates in \[0, 1\), got 1.0"),
        ({"final_learning_rate": 2}, r"final_learning_rate must be in \[0, 1\], got 2"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        replace(TINY, **changes)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ({"num_tokens": 256}, {}, ValueError, "model must have num_tokens >= 259, the tokenizer's vocab_size, got 256"),
        ({"causal": False}, {}, ValueError, "model must be causal"),
        ({"finetune_scopes": ["actor"]}, {}, ValueError, r"no finetune scopes to be pretrained, got \['actor'\]"),
        ({}, {"tokenizer": object()}, TypeError, "tokenizer must have encode, decode"),
        ({}, {"resume": "maybe"}, TypeError, "resume"),
        ({}, {"corpus": "stdlib"}, TypeError, "corpus"),
        ({}, {"model": nn.Linear(2, 2)}, TypeError, "model"),
        ({}, {"trackers": ["a-tracker-nobody-has"]}, ValueError, "trackers must be installed and known to accelerate"),
        ({}, {"trackers": [3]}, TypeError, "trackers must have log"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name_before_anything_is_written(
    corpus, tmp_path, model, arguments, error, message
):
    palm = tiny_palm(**model)
    before = {name: weight.clone() for name, weight in palm.state_dict().items()}
    given = {"model": palm, "corpus": corpus, "checkpoint_dir": tmp_path / "run", "settings": TINY, **arguments}

    with pytest.raises(error, match=message):
        PretrainTrainer(**given).train()
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert all(torch.equal(weight, before[name]) for name, weight in palm.state_dict().items())


@pytest.mark.plain
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", r"DeepSpeed is not supported: start with torchrun \(DDP\), with fsdp=True"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_FSDP", "accelerate's FSDP plugin is not supported"),
    ],
)
def test_launchers_that_would_do_something_else_are_refused_by_name(trainer_of, monkeypatch, variable, message):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        trainer_of()


@pytest.mark.plain
def test_a_checkpoint_of_something_else_is_refused_by_name_and_changes_nothing(trainer_of, tmp_path):
    trainer_of().train()
    other = split_documents(tokenise([b"other text " * 5, b"more of it " * 5]), 0.2)
    cases = [
        (tiny_palm(dim=32), {}, CheckpointError, "another architecture: dim is 32, but was 16"),
        (tiny_palm(use_xpos=False), {}, CheckpointError, "use_xpos is False, but was True"),
        (tiny_palm(dim_head=4, heads=4), {}, CheckpointError, "dim_head is 4, but was 8, heads is 4, but"),
        (tiny_palm(torch.float64), {}, CheckpointError, "dtypes that differ"),
        (tiny_palm(), {"seed": 1}, ValueError, "seed is 1, but was 0"),
        (tiny_palm(), {"sequence_length": 25}, ValueError, "sequence_length is 25, but was 24"),
        (tiny_palm(), {"documents": other}, ValueError, "is of another run: validation_data"),
    ]
    for palm, changes, error, message in cases:
        nn.init.constant_(palm.norm.gamma, 7.0)
        before = {name: weight.clone() for name, weight in palm.state_dict().items()}
        with pytest.raises(error, match=message):
            trainer_of(palm, **changes).train()
        assert all(torch.equal(weight, before[name]) for name, weight in palm.state_dict().items())
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-2", "step-4", "step-6"]


@pytest.mark.plain
def test_a_corpus_with_ids_the_model_lacks_is_refused_by_value(trainer_of):
    class Wide(PairTokenizer):
        vocab_size = 100_000

    documents = tokenise([[1, 2, 3, 50_000] * 20, [4, 5, 6] * 20], tokenizer=Wide())
    with pytest.raises(ValueError, match=r"must hold token ids in \[0, 259\), got 50000"):
        trainer_of(documents=split_documents(documents, 0.5)).train()
