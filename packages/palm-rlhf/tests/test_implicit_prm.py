"""Implicit process rewards against their formula in float64, and a run that trains them along."""

import math

import pytest
import torch

from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.data.rollouts import rollout_of
from palm_rlhf.rl.implicit_prm import ImplicitPRM
from palm_rlhf.rl.policy import ActorCritic

LABELS = torch.tensor([1.0, 0.0, 1.0])


@pytest.fixture
def rollout():
    prompts = load_prompts([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])])
    return rollout_of(prompts, [torch.tensor([7, 8, 9]), torch.tensor([1]), torch.tensor([2, 3])])


@pytest.fixture
def prm(make_palm):
    model = ImplicitPRM(make_palm().double(), beta=0.3, learning_rate=1e-2, batch_size=2)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def naive(prm, rollout):
    """Credits of each response's tokens from whole log-softmaxes, a row at a time."""
    palm, credits = prm.model.palm, []
    for row in range(len(rollout)):
        first, last = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        ids = rollout.ids[row, :last]
        now = palm(ids[None], finetune_scope="prm")[0].log_softmax(-1)
        base = palm(ids[None], disable_lora=True)[0].log_softmax(-1)
        credits.append([0.3 * (now[t - 1, ids[t]] - base[t - 1, ids[t]]) for t in range(first, last)])
    return credits


def test_the_reward_of_a_token_is_the_scaled_log_ratio_of_model_and_reference(prm, rollout):
    credits = prm(rollout)
    assert credits.shape == rollout.ids.shape
    for row, wanted in enumerate(naive(prm, rollout)):
        first = int(rollout.prompt_lengths[row])
        assert credits[row, first : first + len(wanted)].tolist() == pytest.approx([w.item() for w in wanted], abs=1e-6)
        rest = credits[row].clone()
        rest[first : first + len(wanted)] = 0
        assert not rest.any()


def test_it_learns_outcomes_from_the_sum_within_the_sigmoid(prm, rollout):
    sums = [sum(row).item() for row in naive(prm, rollout)]
    chances = [1 / (1 + math.exp(-total)) for total in sums]
    wanted = -(math.log(chances[0]) + math.log(1 - chances[1]) + math.log(chances[2])) / 3
    losses = [prm.fit(rollout, LABELS) for _ in range(60)]
    assert losses[0] == pytest.approx(wanted, abs=1e-6)
    assert losses[-1] < 0.3 * losses[0]
    totals = rollout.totals(prm(rollout))
    assert ((totals > 0) == (LABELS > 0.5)).all()


def test_it_shares_the_policys_base_learns_along_and_resumes_bit_for_bit(make_palm, trainer, tmp_path):
    def outcome(ids, prompt_lengths):
        return (ids == 5).any(dim=1).float()

    def run(folder, *parts):
        for episodes in parts:
            palm = make_palm()
            prm = ImplicitPRM(palm, outcome=outcome, learning_rate=1e-2)
            learner = trainer(
                palm, reward=[prm, (0.5, outcome)], objective="rloo", group_size=4, actor_lr=1e-2, minibatch_size=8,
                checkpoint_dir=folder,
            )  # fmt: skip
            result = learner.train(num_episodes=episodes, update_timesteps=16, max_new_tokens=3)
        return [p.detach().clone() for p in (*learner.actor_parameters, *prm.parameters)], result.metrics[-1]

    (whole, row), (halves, _) = run(tmp_path / "a", 48), run(tmp_path / "b", 16, 48)
    assert row["prm_loss"] > 0
    assert row["rewards/outcome/mean"] <= 1
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda palm, r: ImplicitPRM(palm, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda palm, r: ImplicitPRM(palm, learning_rate=-1.0), "learning_rate must be"),
        (lambda palm, r: ImplicitPRM(palm, batch_size=0), "batch_size must be at least 1"),
        (lambda palm, r: ImplicitPRM(ActorCritic(palm)), "model must be an ActorCritic with with_critic=False"),
        (lambda palm, r: ImplicitPRM(palm).fit(r, torch.tensor([1.0])), r"labels must be 3 numbers in \[0, 1\]"),
        (
            lambda palm, r: ImplicitPRM(palm).fit(r, torch.tensor([1.0, 2.0, 0.0])),
            r"labels must be 3 numbers in \[0, 1\]",
        ),
    ],
)
def test_process_rewards_refuse_by_name(make_palm, rollout, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_palm(), rollout)
