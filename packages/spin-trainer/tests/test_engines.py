"""Answers by an engine next to the policy: the run of the policy's own answers, with weights sent when they changed."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of
from lm_core.tokenizers import ByteTokenizer
from spin_trainer import SelfRewardingTrainer, SPINTrainer

MADE = []


class Engine:
    """An engine with the interface of ``lm_core.engines.vllm.VLLMEngine`` that generates with a copy of the weights."""

    def __init__(self, model, **arguments):
        self.arguments = arguments
        self.copy = None
        self.sent = 0
        self.closed = False
        MADE.append(self)

    def update_weights(self, model):
        self.copy = copy.deepcopy(model)
        self.sent += 1

    def generate(self, prompts, *, top_k, top_p, min_p, return_kept, **arguments):
        assert return_kept is False
        return generate(self.copy, prompts, filters=filters_of(top_k=top_k, top_p=top_p, min_p=min_p), **arguments)

    def close(self):
        self.closed = True


@pytest.fixture
def engine(monkeypatch):
    """The module of the engine replaced by one with ``Engine``; returns the list of engines that are made."""
    monkeypatch.setitem(sys.modules, "lm_core.engines.vllm", SimpleNamespace(VLLMEngine=Engine))
    MADE.clear()
    return MADE


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.policy_model.parameters()]


def test_an_engines_answers_are_those_of_the_promoted_weights(train, engine):
    own, result = train("own", iterations=2)
    other, same = train("engine", iterations=2, engine="vllm", engine_arguments={"dtype": "auto"})

    (made,) = engine
    assert made.arguments == {
        "tokenizer": None,
        "requirement": "spin-trainer[vllm]",
        "max_model_len": 10,
        "dtype": "auto",
    }
    assert (made.sent, made.closed) == (2, True)
    assert same.history == result.history
    assert all(torch.equal(a, b) for a, b in zip(weights_of(own), weights_of(other), strict=True))


def test_self_rewarding_draws_candidates_and_ratings_with_an_engine(engine, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "spin_trainer.training.self_reward.SelfRewardingSettings.score", lambda _, text: sum(map(ord, text)) % 5.0
    )
    runs = []
    for name in ("lm_core", "vllm"):
        trainer = SelfRewardingTrainer(
            make_model(num_tokens=259),
            train_dataset=["a", "bc", "d"],
            tokenizer=ByteTokenizer(),
            rating_max_new_tokens=4,
            max_seq_len=8,
            engine=name,
            learning_rate=1e-2,
            device="cpu",
            checkpoint_dir=tmp_path / name,
        )
        trainer.train()
        runs.append(weights_of(trainer))

    assert engine[0].sent == 1
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_run_does_not_resume_with_answers_of_another_engine(train, engine):
    train(max_steps=2)
    with pytest.raises(Exception, match=r"is of another run: .*sampling is .*'vllm'"):
        train(max_steps=2, engine="vllm")


@pytest.mark.plain
def test_without_vllm_the_error_names_the_extra(llama_model, make_rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"engine 'vllm' needs vLLM: pip install 'spin-trainer\[vllm\]'"):
        SPINTrainer(
            llama_model(),
            train_sft_dataset=make_rows(4),
            max_seq_len=10,
            eos_id=11,
            engine="vllm",
            checkpoint_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_arguments": {"a": 1}}, r"engine_arguments go with engine 'vllm', got {'a': 1} and 'lm_core'"),
        ({"engine": "vllm", "opponent": "policy"}, r"engine 'vllm' needs a frozen, precomputed reference"),
        ({"engine": "vllm", "filters": [lambda logits: logits]}, r"no filters of your own"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_anything_is_written(
    engine, make_model, make_rows, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        SPINTrainer(
            make_model(),
            train_sft_dataset=make_rows(4),
            max_seq_len=10,
            eos_id=11,
            checkpoint_dir=tmp_path / "run",
            **changes,
        )
    assert not (tmp_path / "run").exists()
    assert engine == []
