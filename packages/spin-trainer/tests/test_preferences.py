"""Preference losses against naive float64 formulas, and DPO, whose result no batching changes."""

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.tokenizers import ByteTokenizer
from lm_core.training.metrics import read_metrics
from spin_trainer import DPOTrainer, Preference, PreferenceLoss, SFTDataset, as_preference_dataset
from spin_trainer.data.opponent_answers import Answer
from spin_trainer.model.preference_losses import PREFERENCE_LOSSES, log1mexp
from spin_trainer.quickstart.small_decoder import SmallDecoder
from spin_trainer.training import pair_trainer

EOS = 11
BYTES = ByteTokenizer()


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def naive_loss(name, pair, lengths, beta, epsilon=0.0, margin=0.0):
    """Loss of one pair in Python's floats, written from the papers' equations (TRL 1.12 has the same)."""
    chosen, rejected, ref_chosen, ref_rejected = pair
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    if name == "sigmoid":
        return -(1 - epsilon) * log_sigmoid(beta * delta) - epsilon * log_sigmoid(-beta * delta)
    if name == "robust":
        return (-(1 - epsilon) * log_sigmoid(beta * delta) + epsilon * log_sigmoid(-beta * delta)) / (1 - 2 * epsilon)
    if name == "hinge":
        return max(0.0, 1 - beta * delta)
    if name == "ipo":
        mean_delta = (chosen - ref_chosen) / lengths[0] - (rejected - ref_rejected) / lengths[1]
        return (mean_delta - 1 / (2 * beta)) ** 2
    mean_chosen, mean_rejected = chosen / lengths[0], rejected / lengths[1]
    if name == "simpo":
        return -log_sigmoid(beta * (mean_chosen - mean_rejected) - margin)
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (mean_chosen, mean_rejected)]
    return -mean_chosen - beta * log_sigmoid(math.log(odds[0] / odds[1]))


numbers = st.floats(-40, -0.01, allow_nan=False)
pairs = st.lists(
    st.tuples(st.tuples(numbers, numbers, numbers, numbers), st.tuples(st.integers(1, 6), st.integers(1, 6))),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@given(rows=pairs, beta=st.floats(0.05, 3), epsilon=st.floats(0, 0.45), margin=st.floats(0, 2))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_each_loss_and_its_gradient_are_those_of_its_formula(name, rows, beta, epsilon, margin):
    values = [pair for pair, _ in rows]
    lengths = [pair for _, pair in rows]
    options = {"label_smoothing": epsilon} if name in ("sigmoid", "robust") else {}
    options |= {"simpo_margin": margin} if name == "simpo" else {}
    loss = PreferenceLoss(loss=name, beta=beta, **options)
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(values, dtype=torch.float64).unbind(-1)
    policy = torch.cat([chosen, rejected]).requires_grad_()
    answer = torch.arange(6) < torch.tensor([n for column in zip(*lengths, strict=True) for n in column])[:, None]
    compared = loss.comparison(policy, torch.cat([ref_chosen, ref_rejected]), answer)

    naive = {"beta": beta, "epsilon": options.get("label_smoothing", 0.0), "margin": margin}
    expected = [naive_loss(name, pair, size, **naive) for pair, size in rows]
    torch.testing.assert_close(compared.losses.tolist(), expected, rtol=1e-9, atol=1e-11)
    (gradient,) = torch.autograd.grad(compared.losses.sum(), policy)
    step = 1e-6
    for row, (pair, size) in enumerate(rows):
        if name == "hinge" and abs(1 - beta * (pair[0] - pair[2] - pair[1] + pair[3])) < 1e-4:
            continue  # no derivative there
        for column in (0, 1):
            ends = [
                naive_loss(name, [x + sign * step * (i == column) for i, x in enumerate(pair)], size, **naive)
                for sign in (1, -1)
            ]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[row + column * len(rows)].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(st.floats(-60, -1e-12))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_log1mexp_is_exact_at_both_ends_and_has_no_nan_gradient(value):
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    log1mexp(x).backward()

    assert log1mexp(x).item() == pytest.approx(math.log(-math.expm1(value)), rel=1e-9)
    assert math.isfinite(x.grad.item())


def test_a_probability_of_one_has_a_finite_loss():
    policy = torch.zeros(2, requires_grad=True)  # both answers certain
    losses = PreferenceLoss(loss="orpo").comparison(policy, policy.detach(), torch.ones(2, 1, dtype=torch.bool)).losses
    losses.sum().backward()

    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


def preferences(count, seed=0):
    """Digits to sort; the rejected answer is in reverse."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        digits = [generator.randrange(10) for _ in range(generator.randrange(2, 5))]
        chosen, rejected = (tuple(sorted(digits, reverse=down)) for down in (False, True))
        rows.append(
            Preference((*digits, 10), (*chosen, EOS), rejected=Answer((*rejected[: len(digits) - 1], EOS), True))
        )
    return SFTDataset(rows)


@pytest.fixture
def dpo(tmp_path, monkeypatch, make_model):
    """``dpo(folder, **changes)`` runs a small DPO; returns its trainer and result."""

    def run(folder="run", *, model=None, train=None, curves=False, **changes):
        if not curves:
            monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)
        arguments = {
            "train_dataset": preferences(11) if train is None else train,
            "valid_dataset": preferences(5, seed=1),
            "max_seq_len": 10,
            "eos_id": EOS,
            "batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-2,
            "device": "cpu",
            "checkpoint_dir": tmp_path / folder,
            **changes,
        }
        trainer = DPOTrainer(make_model() if model is None else model, **arguments)
        return trainer, trainer.train()

    return run


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.policy_model.parameters()]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_a_policy_learns_to_prefer_the_chosen_answers(dpo, tmp_path, loss):
    trainer, result = dpo(loss=loss, epochs=4, curves=loss == "sigmoid")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")

    assert (result.outcome, result.step) == ("finished", 12)
    assert result.last_validation["validation_loss"] < result.first_validation["validation_loss"]
    assert result.last_validation["validation_margin"] > result.first_validation["validation_margin"]
    assert result.last_validation["validation_accuracy"] >= 0.8
    assert {"chosen_log_prob", "rejected_log_prob", "accuracy", "margin"} <= set(rows[-2])
    opened = SmallDecoder.from_pretrained(result.policy_folder)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), trainer.policy_model.parameters(), strict=True))
    assert (tmp_path / "run" / "curves.png").is_file() is (loss == "sigmoid")


def test_the_first_loss_is_ln_2_and_the_gradient_is_that_of_a_naive_dpo(dpo, make_model):
    model, train = make_model().double(), preferences(4)
    trainer, result = dpo(
        model=make_model().double(), train=train, epochs=1, adam_kwargs={"eps": 1.0}, max_grad_norm=None
    )
    # one update of Adam with eps 1: the step is learning_rate * g / (|g| + 1)
    naive = 0.0
    for row in train:
        margins = 0.0
        for answer, sign in ((row.response, 1), (row.rejected.tokens, -1)):
            logits = model(torch.tensor([[*row.prompt, *answer]]))[0].log_softmax(-1)
            at = torch.arange(len(row.prompt) - 1, len(row.prompt) + len(answer) - 1)
            log_prob = logits[at, torch.tensor(answer)].sum()
            margins = margins + sign * (log_prob - log_prob.detach())
        naive = naive - torch.nn.functional.logsigmoid(0.1 * margins) / len(train)
    gradients = torch.autograd.grad(naive, list(model.parameters()))

    assert result.first_validation["validation_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert naive.item() == pytest.approx(math.log(2), abs=1e-12)
    for before, gradient, after in zip(model.parameters(), gradients, trainer.policy_model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 1e-2 * gradient / (gradient.abs() + 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 2, "gradient_accumulation": 2}, {"micro_batch_size": 1}, {"micro_batch_size": 3}]
)
@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_batches_and_micro_batches_change_nothing(dpo, make_model, changes, loss):
    one, _ = dpo("one", model=make_model().double(), loss=loss)
    other, _ = dpo("other", model=make_model().double(), loss=loss, **changes)

    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_padding_and_order_change_nothing(dpo, make_model):
    # all rows in one update: the order within it, and rows of other lengths next to them, have no influence
    rows = list(preferences(8))
    one, _ = dpo("one", model=make_model().double(), train=SFTDataset(rows), batch_size=8, epochs=1)
    other, _ = dpo("other", model=make_model().double(), train=SFTDataset(rows[::-1]), batch_size=8, epochs=1)
    alone, _ = dpo(
        "alone", model=make_model().double(), train=SFTDataset(rows), batch_size=8, epochs=1, micro_batch_size=1
    )

    for a, b, c in zip(weights_of(one), weights_of(other), weights_of(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10)


def test_reference_log_probs_are_computed_once(dpo, monkeypatch):
    calls = []
    score = pair_trainer.IterationData._score
    monkeypatch.setattr(
        pair_trainer.IterationData,
        "_score",
        lambda self, model, batch, rows: calls.append((self.split, tuple(rows))) or score(self, model, batch, rows),
    )
    dpo(epochs=3)

    for split, count in (("train", 11), ("valid", 5)):
        assert sorted(row for name, rows in calls if name == split for row in rows) == list(range(count))


def test_a_reference_free_loss_scores_nothing_with_a_reference(dpo, tmp_path):
    dpo(loss="simpo")
    assert not list((tmp_path / "run" / "reference").rglob("rows-*.jsonl"))


def test_another_reference_model_gives_the_loss_of_its_log_probs(dpo, make_model):
    _, result = dpo(reference_model=make_model(3), epochs=1)
    _, same = dpo("same", reference_model=make_model(), epochs=1)
    _, plain = dpo("plain", epochs=1)

    assert result.first_validation["validation_loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert same.last_validation == plain.last_validation


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_dpo_ends_bit_for_bit_as_an_uninterrupted_one(dpo, stop_at, step):
    whole, _ = dpo("whole", checkpoint_every=1)
    with pytest.raises(SystemExit, match="stopped here"):
        dpo("parts", checkpoint_every=1, trackers=[stop_at(step)])
    resumed, result = dpo("parts", checkpoint_every=1)

    assert result.step == 6
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole), strict=True))


CHAT = [{"role": "user", "content": "a b"}]
ROWS = [
    {"prompt": "a b", "chosen": " c", "rejected": " d"},
    {"chosen": "a b c", "rejected": "a b d"},
    {"prompt": list(b"a b"), "chosen": [*b" c", BYTES.eos_id], "rejected": [*b" d", BYTES.eos_id]},
]
CHATS = [
    {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "c"}], "rejected": "d"},
    {"prompt": CHAT, "chosen": "c", "rejected": [{"role": "assistant", "content": "d"}]},
    {side: [*CHAT, {"role": "assistant", "content": text}] for side, text in (("chosen", "c"), ("rejected", "d"))},
]
CHATS.append({"prompt": "a b", **CHATS[-1]})


@pytest.mark.parametrize("rows", [ROWS, CHATS])
def test_every_form_of_a_row_gives_the_same_ids(rows):
    examples = [as_preference_dataset([row], max_seq_len=64, tokenizer=BYTES)[0] for row in rows]
    prompt = [BYTES.bos_id, *b"a b"] if rows is ROWS and BYTES.encode("a")[0] == BYTES.bos_id else None

    assert prompt is None or list(examples[0].prompt) == prompt
    assert {(e.prompt, e.response, e.rejected) for e in examples[:2]} == {
        (examples[0].prompt, examples[0].response, examples[0].rejected)
    }
    assert len({(e.response, e.rejected) for e in examples}) == 1
    assert examples[0].rejected.finished


def test_a_truncated_rejected_answer_gets_no_end():
    (example,) = as_preference_dataset(
        [{"prompt": "a", "chosen": "b", "rejected": "c" * 20}], max_seq_len=8, tokenizer=BYTES
    )
    assert not example.rejected.finished
    assert BYTES.eos_id not in example.rejected.tokens


def test_preferences_are_read_from_files(tmp_path, dpo):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "chosen": f"{n}", "rejected": "x"}) + "\n" for n in range(6)))
    dataset = as_preference_dataset(file, max_seq_len=16, tokenizer=BYTES)

    assert len(dataset) == 6
    assert dataset.split(0.5)[0].fingerprint != dataset.split(0.5)[1].fingerprint
