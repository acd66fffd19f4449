"""Supervised fine-tuning: the loss of answer tokens alone, which no batching changes; exact resume; export."""

import pytest
import torch
import torch.nn.functional as F

from lm_core.training.metrics import read_metrics
from spin_trainer import SFTTrainer
from spin_trainer.quickstart.small_decoder import SmallDecoder


@pytest.fixture
def sft(tmp_path, monkeypatch, make_model, make_rows):
    """``sft(folder, **changes)`` runs a small supervised training; returns its trainer and result."""

    def run(folder="run", *, model=None, curves=False, **changes):
        if not curves:
            monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)
        arguments = {
            "train_dataset": make_rows(11),
            "valid_dataset": make_rows(5, seed=1),
            "max_seq_len": 10,
            "eos_id": 11,
            "batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-2,
            "device": "cpu",
            "checkpoint_dir": tmp_path / folder,
            **changes,
        }
        trainer = SFTTrainer(make_model() if model is None else model, **arguments)
        return trainer, trainer.train()

    return run


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.policy_model.parameters()]


def naive_loss(model, rows):
    """Cross-entropy of all answer tokens, row by row."""
    nats = tokens = 0
    for row in rows:
        ids = torch.tensor([*row.prompt, *row.response])
        first = len(row.prompt)
        nats = nats + F.cross_entropy(model(ids[None])[0, first - 1 : -1], ids[first:], reduction="sum")
        tokens += len(row.response)
    return nats / tokens


def test_the_loss_is_the_cross_entropy_of_all_answer_tokens(sft, make_model, make_rows):
    model = make_model().double()
    settings = {"adam_kwargs": {"eps": 1.0}, "max_grad_norm": None, "epochs": 1, "batch_size": 11}
    trainer, result = sft(model=make_model().double(), **settings)
    loss = naive_loss(model, make_rows(11))
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    held_out = naive_loss(model, make_rows(5, seed=1)).item()
    assert result.first_validation["validation_loss"] == pytest.approx(held_out, rel=1e-12)
    assert read_metrics(trainer.checkpoint_folder / "metrics.jsonl")[1]["loss"] == pytest.approx(loss.item(), rel=1e-12)
    # one update of Adam with eps 1: the step is learning_rate * g / (|g| + 1)
    for before, gradient, after in zip(model.parameters(), gradients, trainer.policy_model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 1e-2 * gradient / (gradient.abs() + 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 2, "gradient_accumulation": 2}, {"micro_batch_size": 1}, {"micro_batch_size": 3}]
)
def test_batches_and_micro_batches_change_nothing(sft, make_model, changes):
    one, _ = sft("one", model=make_model().double())
    other, _ = sft("other", model=make_model().double(), **changes)

    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_rows_of_similar_length_share_a_pass(sft):
    trainer, _ = sft(batch_size=11, micro_batch_size=3, epochs=1)
    passes = trainer._micro_batches(trainer._order(11, "sft"), 0, trainer._lengths)
    lengths = [trainer._lengths[row] for rows in passes for row in rows]

    assert [len(rows) for rows in passes] == [3, 3, 3, 2]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(row for rows in passes for row in rows) == list(range(11))


def test_a_policy_learns_its_answers_and_is_exported(sft, tmp_path):
    trainer, result = sft(epochs=8, curves=True)
    opened = SmallDecoder.from_pretrained(result.policy_folder)

    assert (result.outcome, result.step) == ("finished", 24)
    assert result.last_validation["validation_loss"] < 0.7 * result.first_validation["validation_loss"]
    assert (tmp_path / "run" / "curves.png").is_file()
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.policy_model.parameters(), strict=True))


@pytest.mark.parametrize("step", [2, 5])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(sft, stop_at, step, make_model):
    settings = {"checkpoint_every": 1, "dropout": 0.1}
    whole, _ = sft("whole", model=make_model(dropout=0.1), **settings)
    with pytest.raises(SystemExit, match="stopped here"):
        sft("parts", model=make_model(dropout=0.1), trackers=[stop_at(step)], **settings)
    resumed, result = sft("parts", model=make_model(dropout=0.1), **settings)

    assert result.step == 6
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole), strict=True))


def test_a_run_without_a_folder_writes_nothing(sft, tmp_path):
    _, result = sft(checkpoint_dir=None)

    assert result.policy_folder is None
    assert list(tmp_path.iterdir()) == []
