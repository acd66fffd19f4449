"""Known traps of self-play trainers, through the trainer's API; traps of the loss are in test_spin.py.

Each test is named for what must hold. MIGRATING.md says which trap of the original each is about.
"""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from lm_core.checkpoints.checkpoint import list_checkpoints
from lm_core.data.epochs import seed_of
from lm_core.training.metrics import read_metrics
from spin_trainer import SPIN, SPINTrainer
from spin_trainer.data.opponent_answers import Sampling, answer_prompts, batches_by_length
from spin_trainer.quickstart.small_decoder import SmallDecoder

LN_2 = torch.tensor(2.0).log().item()
SAMPLING = Sampling(max_seq_len=10, eos_id=(11,), batch_size=6)


def expected_answers(model, dataset, iteration):
    found = {}
    prompts = [example.prompt for example in dataset]
    for number, rows in enumerate(batches_by_length([len(prompt) for prompt in prompts], 6)):
        seed = seed_of("answers", 0, iteration, "train", number)
        answers = answer_prompts(model, [prompts[row] for row in rows], SAMPLING, seed)
        found |= {row: answer.tokens for row, answer in zip(rows, answers, strict=True)}
    return [found[row] for row in range(len(prompts))]


def first_losses(folder):
    first = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        if "loss" in row:
            first.setdefault(row["iteration"], row["loss"])
    return first


def test_the_sampler_continues_after_the_last_token_of_each_prompt():
    # the original read the logits one position late, after its padding
    greedy = Sampling(max_seq_len=6, temperature=0.0, top_p=None)
    successor = torch.nn.Embedding.from_pretrained(20.0 * torch.roll(torch.eye(12), 1, dims=1), freeze=False)
    answers = answer_prompts(SPIN(successor).policy, [(3, 4), (7,), (1, 2, 3)], greedy, 0)

    assert [answer.tokens for answer in answers] == [(5, 6, 7, 8), (8, 9, 10, 11, 0), (4, 5, 6)]


def test_the_opponents_answers_are_those_of_the_promoted_weights_not_of_the_player(
    train, tmp_path, make_model, make_rows, rows_of
):
    _, result = train(iterations=2, mix_previous=False)
    before = make_model()
    promoted = SmallDecoder.from_pretrained(result.iterations_folder / "iteration-1")
    first, second = (
        [tuple(row["tokens"]) for row in sorted(rows_of(tmp_path / "run", kind), key=lambda row: row["row"])]
        for kind in ("answers-train-0", "answers-train-1")
    )

    assert result.steps == 4 + 4
    assert first == expected_answers(before, make_rows(12), 0)
    assert second == expected_answers(promoted, make_rows(12), 1)
    assert second != expected_answers(before, make_rows(12), 1)


def test_a_live_opponent_learns_from_other_answers_than_a_frozen_one(train):
    frozen, _ = train("frozen", epochs=3)
    live, _ = train("live", epochs=3, opponent="policy")

    assert not torch.equal(frozen.model.policy_model.embedding.weight, live.model.policy_model.embedding.weight)


def test_the_trainers_reference_stays_bit_identical_throughout_an_iteration(train, make_model):
    spin, seen = SPIN(make_model(), eos_id=11), []

    class Watch:
        def log(self, values, step):
            if "loss" in values:
                copies = spin.ref_model.exported().values()
                seen.append((values["iteration"], [copy.clone() for copy in copies]))

    train(model=spin, iterations=2, epochs=2, precompute_reference=False, trackers=[Watch()])
    for number in (0, 1):
        copies = [copy for iteration, copy in seen if iteration == number]
        assert len(copies) >= 8
        assert all(torch.equal(a, b) for copy in copies for a, b in zip(copy, copies[0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[0][1], seen[-1][1], strict=True))


def test_every_iteration_begins_at_a_loss_of_exactly_ln_2(train, tmp_path):
    # with the reference called in the same batch, both sides of the margin are the same numbers
    train(iterations=3, lambda_=1.0, precompute_reference=False)

    assert first_losses(tmp_path / "run") == {0: LN_2, 1: LN_2, 2: LN_2}


def test_from_stored_log_probs_every_iteration_begins_at_ln_2_to_rounding(train, tmp_path, make_model):
    train(iterations=3, lambda_=1.0, model=make_model().double())

    assert first_losses(tmp_path / "run") == pytest.approx(dict.fromkeys(range(3), math.log(2)), abs=1e-12)


def test_checkpoints_come_every_so_many_updates_and_at_the_end(train, tmp_path):
    # the original asked `checkpoint_every % steps`: with 3, at updates 1 and 3 only, and never at the end
    train(checkpoint_every=3, keep_checkpoints=None, epochs=2)
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]

    assert names == ["step-3", "step-6", "step-8"]


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(train, monkeypatch):
    norms = []

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for limit in (0.01, None):
        train(str(limit), rows=6, max_grad_norm=limit)

    assert norms[:2] == pytest.approx([0.01, 0.01], rel=1e-4)
    assert min(norms[2:]) > 0.02


def test_the_trainer_hands_adams_arguments_on(train):
    plain, _ = train("plain")
    other, _ = train("other", adam_kwargs={"eps": 1.0})

    assert not torch.equal(plain.model.policy_model.embedding.weight, other.model.policy_model.embedding.weight)


def test_a_spins_parameters_are_its_policys_and_its_state_holds_the_reference(make_model):
    model = make_model()
    spin = SPIN(model)

    assert [id(p) for p in spin.parameters()] == [id(p) for p in model.parameters()]
    assert spin.state_dict().keys() > {f"policy_model.{name}" for name in model.state_dict()}


def test_the_originals_call_form_and_defaults_are_taken(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)
    rows = torch.utils.data.TensorDataset(torch.randint(0, 11, (4, 9)), torch.tensor([2, 3, 4, 3]))
    trainer = SPINTrainer(
        make_model(),
        train_sft_dataset=rows,
        valid_sft_dataset=rows,
        max_seq_len=9,
        accelerate_kwargs={"cpu": True},
        spin_kwargs={"λ": 0.3},
        batch_size=2,
        grad_accum_steps=1,
        start_learning_rate=2e-6,
        valid_every=7,
        checkpoint_every=1,
        checkpoint_folder=str(tmp_path / "spin"),
    )
    trainer(overwrite_checkpoints=True)
    parameters = inspect.signature(SPINTrainer).parameters

    assert trainer.unwrapped_model.lambda_ == 0.3
    assert trainer.steps == 4
    assert trainer.is_main
    trainer.wait()
    trainer.log(something=1.0)
    assert (trainer.settings.gradient_accumulation, trainer.settings.validate_every) == (1, 7)
    assert (trainer.settings.learning_rate, trainer.settings.end_learning_rate) == (2e-6, 1e-7)
    assert (trainer.settings.temperature, trainer.sampling.top_p) == (0.7, 0.9)
    assert parameters["pad_id"].default == -1


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("kind", ["plain", "x-transformers"])
def test_any_language_model_plays_all_iterations(train, kind):
    torch.manual_seed(0)
    if kind == "plain":  # from ids to logits: no cache, no mask, no hidden states
        model = torch.nn.Sequential(torch.nn.Embedding(12, 8), torch.nn.Linear(8, 12))
    else:
        x_transformers = pytest.importorskip("x_transformers")
        layers = x_transformers.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
        model = x_transformers.TransformerWrapper(num_tokens=12, max_seq_len=16, attn_layers=layers)
    _, result = train(model=model, iterations=2)

    assert (result.outcome, result.iterations) == ("finished", 2)
    assert (result.iterations_folder / "iteration-2" / "model.safetensors").is_file()


def test_the_tests_that_the_documents_name_are_there():
    folder = Path(__file__).parent
    documents = "".join(file.read_text("utf-8") for file in folder.parent.glob("*.md"))
    named = set(re.findall(r"`(test_\w+)`", documents))
    written = set(re.findall(r"^def (test_\w+)", "".join(f.read_text("utf-8") for f in folder.glob("test_*.py")), re.M))

    assert len(named) > 35
    assert not named - written
