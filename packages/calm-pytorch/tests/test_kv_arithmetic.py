"""Expressions of the key-value task are right; strengths in the picture are attention weights."""

import dataclasses

import pytest
import torch

from calm_pytorch.quickstart.attention_picture import read_strengths
from calm_pytorch.quickstart.kv_arithmetic import (
    EQUALS,
    FIRST_KEY,
    MODULUS,
    PLUS,
    KeyValueTask,
    accuracy,
    small_decoder,
    token_name,
)
from calm_pytorch.quickstart.quickstart import QuickstartSettings, add_lora, run_quickstart


def test_expressions_are_right_and_of_the_keys_asked_for():
    task = KeyValueTask(keys=30, held_out=10, operands=3)
    known, held_out = task.split
    assert sorted(torch.cat((known, held_out)).tolist()) == list(range(30))
    rows = task.expressions(200, torch.Generator().manual_seed(0), held_out)
    for row in rows.tolist():
        total = 0
        for place in (0, 2, 4):
            key = row[place] - FIRST_KEY
            assert key in held_out.tolist()
            sign = 1 if place == 0 or row[place - 1] == PLUS else -1
            total += sign * int(task.values[key])
        assert row[5] == EQUALS
        assert row[6] == total % MODULUS


def test_every_number_has_about_as_many_keys():
    counts = torch.bincount(KeyValueTask().values, minlength=MODULUS)
    assert int(counts.max() - counts.min()) <= 1


def test_accuracy_counts_last_tokens():
    rows = torch.tensor([[1, 2, 3], [1, 2, 4]])

    def always_three(ids):
        return torch.nn.functional.one_hot(torch.full_like(ids, 3), 20).float()

    assert accuracy(always_three, rows) == 0.5


def test_tokens_have_names():
    assert [token_name(token) for token in (3, PLUS, EQUALS, FIRST_KEY + 7)] == ["3", "+", "=", "key 7"]


SHORT = QuickstartSettings(augment_steps=2, anchor_steps=2, max_steps=2, batch_size=4)


@pytest.mark.parametrize("models", ["x-transformers", "hugging-face", "mixed"])
@pytest.mark.parametrize("reads", ["sequence", "prompt"])
def test_the_quickstart_composes_models_of_any_library_in_both_modes(tmp_path, models, reads):
    result = run_quickstart(dataclasses.replace(SHORT, models=models, reads=reads), tmp_path / "run")
    assert 0 <= result.held_out <= 1
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()


def test_the_baseline_of_low_rank_learns_as_many_parameters_and_leaves_the_anchor_out_of_the_output(tmp_path):
    composed = run_quickstart(SHORT, tmp_path / "composed")
    low_rank = run_quickstart(dataclasses.replace(SHORT, learner="low-rank"), tmp_path / "low-rank")
    assert low_rank.learned == pytest.approx(composed.learned, rel=0.03)
    assert not (tmp_path / "low-rank" / "adapter").exists()
    model = small_decoder(KeyValueTask(), dim=64, library="hugging-face")
    add_lora(model, 20_000)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)


@pytest.mark.slow
def test_a_composition_computes_with_keys_it_never_trained_on_and_its_baselines_do_not(tmp_path):
    """The first seed of tests/benchmarks/study_calm_pytorch_arithmetic.py, cut to half the updates."""
    short = QuickstartSettings(augment_steps=400, anchor_steps=400, max_steps=300)
    composed = run_quickstart(short, tmp_path / "composed")
    assert composed.held_out >= 0.6
    assert composed.numbers_after >= composed.numbers_before - 0.02
    assert abs(composed.anchor_alone - 1 / MODULUS) < 0.03
    knows_nothing = run_quickstart(dataclasses.replace(short, learner="random-augment"), tmp_path / "random")
    assert abs(knows_nothing.held_out - 1 / MODULUS) < 0.03


def test_read_strengths_are_weights_of_each_connection(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    strengths = read_strengths(calm, ids(2, 5), ids(2, 4))
    assert [name for name, _ in strengths] == [
        "augment 0, layer 2 → anchor layer 2",
        "augment 0, layer 4 → anchor layer 4",
    ]
    for _, strength in strengths:
        assert strength.shape == (5, 4)
        assert bool((strength >= 0).all())
        assert float(strength.sum(dim=1).max()) <= 1 + 1e-5
    shared = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True, shared=True)
    for _, strength in read_strengths(shared, ids(1, 5)):
        assert torch.equal(strength, strength.tril())
