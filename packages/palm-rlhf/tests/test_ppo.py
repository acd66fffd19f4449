"""PPO: the toy with a known answer, exact resume, global minibatches, metrics by their definitions."""

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.training.metrics import read_metrics
from palm_rlhf import PaLM
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.experience import score_rollout, token_rewards
from palm_rlhf.rl.objectives import GRPO, PPO, REINFORCE, Objective, TokenLoss
from palm_rlhf.rl.rollouts import rollout_of
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer


def mean_id(ids, prompt_lengths, lengths):
    return ids.float().sum(dim=1) / lengths  # hardly two responses have the same


LONG = pytest.mark.skipif(not os.environ.get("LM_LONG"), reason="a proof of minutes: set LM_LONG=1")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=LONG), pytest.param(2, marks=LONG)])
@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_a_toy_with_a_known_answer_is_learned_at_mixed_prompt_lengths(trainer, kind, seed):
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=16, dim=64, depth=2, dim_head=16, heads=4)
    rate = 1e-3 if kind is RLHFTrainer else 2e-3
    more = {"critic_lora": False, "critic_lr": rate} if kind is RLHFTrainer else {"group_size": 8}
    toy = trainer(
        palm, kind, actor_lora=False, actor_lr=rate, kl_div_loss_weight=0.0, seed=seed, epochs=4,
        minibatch_size=16, **more,
    )  # fmt: skip
    result = toy.train(num_episodes=24 * 64, update_timesteps=64, max_new_tokens=8)
    assert result.phases == 24
    assert result.metrics[0]["reward"] < 0.15
    assert result.metrics[-1]["reward"] >= 0.9


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_reported_ratio_is_one_before_the_first_update_of_each_phase(
    make_palm, trainer, kind, filters, temperature
):
    ppo = trainer(make_palm().double(), kind, actor_lr=1e-2, epochs=2, minibatch_size=8)
    result = ppo.train(
        num_episodes=48, update_timesteps=16, max_new_tokens=6, temperature=temperature, filters=filters,
        eos_id=3, max_batch_size=5,
    )  # fmt: skip
    for row in result.metrics:
        assert row["ratio_deviation_at_start"] < 1e-10
    assert any(row["ratio_max"] > 1.01 for row in result.metrics)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *product((RLHFTrainer, GRPOTrainer), ({}, {"actor_lora": False}, {"micro_batch_size": 3})),
        (RLHFTrainer, {"kl_in": "loss"}),  # where GRPO has it
    ],
)
def test_the_first_ratio_is_exactly_one_in_float32_for_any_batches_of_the_draw(make_palm, trainer, kind, changes):
    """Old log-probabilities are computed in the minibatches of the first pass: other shapes would round otherwise."""
    prompts = [torch.randint(13, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 40, 11, 70, 5, 23)]
    palm = make_palm(dim=96, depth=3)
    with torch.no_grad():
        palm.token_emb.weight.mul_(0.2)  # a spread of answers to choose from
    ppo = trainer(
        palm, kind, prompt_token_ids=prompts, reward=mean_id, actor_lr=1e-2, epochs=2,
        minibatch_size=8, **changes,
    )  # fmt: skip
    result = ppo.train(num_episodes=64, update_timesteps=32, max_new_tokens=12, eos_id=3, max_batch_size=5)
    assert [row["ratio_deviation_at_start"] for row in result.metrics] == [0.0] * 2
    assert any(row["ratio_max"] > 1.01 for row in result.metrics)


@pytest.mark.parametrize(
    ("objective", "epochs", "minibatch_size", "calls"),
    [
        (GRPO(group_size=4, kl_div_loss_weight=0.0), 1, 8, {"actor": 1}),
        (GRPO(group_size=4, kl_div_loss_weight=0.1), 1, 8, {"actor": 1, "reference": 1}),
        (GRPO(group_size=4, kl_div_loss_weight=0.0), 1, 4, {"actor": 4}),
        (REINFORCE(kl_div_loss_weight=0.0), 1, 4, {"actor": 2}),
        (REINFORCE(kl_div_loss_weight=0.1), 1, 8, {"actor": 2, "reference": 1}),
        (PPO(kl_div_loss_weight=0.0), 1, 8, {"actor": 1, "critic": 2}),
        (PPO(kl_div_loss_weight=0.0), 2, 8, {"actor": 3, "critic": 3}),
        (PPO(kl_div_loss_weight=0.1), 1, 8, {"actor": 2, "critic": 2, "reference": 1}),
    ],
)
def test_nothing_is_computed_that_the_objective_does_not_need(
    make_palm, trainer, objective, epochs, minibatch_size, calls
):
    ppo = trainer(make_palm(), objective=objective, epochs=epochs, minibatch_size=minibatch_size)
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=4), seed=1)
    roles, as_role = [], ppo.actor_critic.as_role
    ppo.actor_critic.as_role = lambda role, mask=None: roles.append(role) or as_role(role, mask)
    ppo.step(rollout, torch.linspace(0, 1, 8))
    assert Counter(roles) == calls


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_a_single_update_is_the_same_without_the_log_probs_of_the_draw(make_palm, trainer, kl):
    outcomes = []
    for learns_once in (True, False):
        grpo = trainer(make_palm().double(), GRPOTrainer, reward=mean_id, actor_lr=1e-2, kl_div_loss_weight=kl)
        if not learns_once:
            grpo.phase.learns_once = lambda count: False
        result = grpo.train(num_episodes=32, update_timesteps=16, max_new_tokens=5, eos_id=3)
        assert ("ratio_deviation_at_start" in result.metrics[0]) != learns_once
        weights = torch.cat([parameter.detach().flatten() for parameter in grpo.actor_parameters])
        outcomes.append((weights, [row.get("kl", 0.0) for row in result.metrics]))
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-12)
    assert (outcomes[0][1][1] != 0) == (kl > 0)


def test_objects_and_the_originals_keywords_mean_the_same(make_palm, fraction_of_fives, prompt_ids):
    objects = RLHFTrainer(
        make_palm(), fraction_of_fives, objective=PPO(eps_clip=0.1, beta_s=0.01), prompts=prompt_ids,
        config=RLConfig(actor_lr=1e-2, max_grad_norm=0.5, device="cpu", epochs=2),
    )  # fmt: skip
    flat = RLHFTrainer(
        palm=make_palm(), reward_model=fraction_of_fives, eps_clip=0.1, beta_s=0.01, prompt_token_ids=prompt_ids,
        actor_lr=1e-2, max_norm=0.5, device="cpu", epochs=2,
    )  # fmt: skip
    assert (flat.objective, flat.config) == (objects.objective, objects.config)
    for ppo in (objects, flat):
        ppo.train(num_episodes=16, update_timesteps=16, max_new_tokens=4)
    for a, b in zip(objects.actor_parameters, flat.actor_parameters, strict=True):
        assert torch.equal(a, b)


def test_an_objective_of_the_users_own_trains(make_palm, trainer):
    @dataclass(frozen=True, kw_only=True)
    class LikelihoodOfGoodOnes(Objective):
        threshold: float = 0.1

        def advantages(self, experience):
            return (experience.scores > self.threshold).float()[:, None] * experience.response_mask, None

        def token_loss(self, scores, batch):
            return TokenLoss(-batch.advantages * scores.log_probs)

    objective = LikelihoodOfGoodOnes(kl_div_loss_weight=0.0, group_size=1)
    own = trainer(make_palm(), objective=objective, actor_lr=2e-2)
    rows = own.train(num_episodes=256, update_timesteps=32, max_new_tokens=6).metrics
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1


def test_one_update_descends_the_clipped_objective_written_out_by_hand(make_palm, trainer):
    """Gradients of the first update against equation 7 over unpadded rows, one at a time."""
    palm = make_palm().double()
    ppo = trainer(palm, kl_div_loss_weight=0.3, max_grad_norm=None, epochs=1, minibatch_size=8, beta_s=0.02)
    ppo.actor_critic.double()
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=5, eos_token=3), seed=4)
    rewards = torch.linspace(-1, 2, 8)
    experience = score_rollout(ppo.actor_critic, rollout, rewards, batch_size=8)
    tokens = int(rollout.response_mask.sum())
    advantages = []
    for row in range(8):
        start, end = int(rollout.prompt_lengths[row]) - 1, int(rollout.lengths[row]) - 1
        kl = experience.unfiltered[row, start:end] - experience.reference[row, start:end]
        token_rewards = -0.3 * kl
        token_rewards[-1] += rewards[row]
        following, own = 0.0, []
        for r in reversed(token_rewards.tolist()):  # values are 0 before the first update
            following = r + 0.95 * following
            own.append(following)
        advantages.append(torch.tensor(own[::-1], dtype=torch.float64))
    flat = torch.cat(advantages)
    loss = torch.zeros((), dtype=torch.float64)
    for row, own in enumerate(advantages):
        start, end = int(rollout.prompt_lengths[row]) - 1, int(rollout.lengths[row]) - 1
        ids = rollout.ids[row, : end + 1]
        log_probs = palm(ids[None], finetune_scope="actor")[0].log_softmax(dim=-1)[start:end]
        chosen = log_probs.gather(-1, ids[start + 1 :, None])[:, 0]
        whitened = (own - flat.mean()) / flat.std()
        loss = loss - ((chosen - chosen.detach()).exp() * whitened).sum() / tokens
        loss = loss + 0.02 * (log_probs.exp() * log_probs).sum() / tokens
        loss = loss + 0.5 * 0.5 * own.square().sum().detach() / tokens  # the critic's value is 0
    wanted = torch.autograd.grad(loss, ppo.actor_parameters)
    seen = []
    ppo.optimizer.step = lambda: seen.extend(p.grad.clone() for p in ppo.actor_parameters)
    metrics = ppo.step(rollout, rewards)
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)  # rewards are float32
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_micro_batches_change_nothing(make_palm, trainer):
    outcomes = []
    for size in (None, 1, 3):
        palm = make_palm().double()
        ppo = trainer(palm, micro_batch_size=size, minibatch_size=8, epochs=2, actor_lr=1e-2)
        ppo.actor_critic.double()
        ppo.train(num_episodes=16, update_timesteps=8, max_new_tokens=5, eos_token=3)
        outcomes.append(torch.cat([p.detach().flatten() for p in ppo.actor_parameters]))
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-7, atol=1e-9)


def test_metrics_follow_their_definitions(make_palm, trainer, moved):
    ppo = trainer(make_palm(), minibatch_size=8, epochs=1, kl_div_loss_weight=0.5)
    moved(ppo.actor_critic, 0.2)
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=6, eos_token=3), seed=1)
    rewards = torch.linspace(0, 1, 8)
    old = score_rollout(ppo.actor_critic, rollout, rewards, batch_size=8)
    mask = rollout.response_mask
    metrics = ppo.step(rollout, rewards)
    kl = [(old.unfiltered[row] - old.reference[row])[mask[row]].sum().item() for row in range(8)]
    lengths = [int(mask[row].sum()) for row in range(8)]
    assert metrics["reward"] == pytest.approx(0.5)
    assert metrics["kl"] == pytest.approx(sum(kl) / 8, abs=1e-5)
    assert metrics["reward_with_kl"] == pytest.approx(0.5 - 0.5 * sum(kl) / 8, abs=1e-5)
    assert metrics["response_length"] == pytest.approx(sum(lengths) / 8)
    assert metrics["eos_rate"] == pytest.approx(sum(rollout.finished.tolist()) / 8)
    assert metrics["clip_fraction"] == 0
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    per_token = token_rewards(old, old.unfiltered - old.reference, kl_weight=0.5, missing_eos_penalty=0.0)
    _, returns = ppo.objective.advantages(replace(old, token_rewards=per_token))
    unexplained = (returns - old.values)[mask].var() / returns[mask].var()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-4)
    assert 0 < metrics["entropy"] < math.log(13)


@pytest.mark.parametrize(("kl_in", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_kl_is_from_the_reference_and_pulls_back_to_it(make_palm, trainer, kl_in, estimator):
    """The original measured the policy against its own last step, which anchors nothing."""
    divergences = []
    for weight in (1e-9, 5.0):  # at 0 the KL is not measured
        ppo = trainer(
            make_palm(), actor_lr=2e-2, kl_div_loss_weight=weight, kl_in=kl_in, kl_estimator=estimator, epochs=2, seed=1
        )
        divergences.append(ppo.train(num_episodes=256, update_timesteps=32, max_new_tokens=6).metrics[-1]["kl"])
    assert divergences[1] < divergences[0] / 3


@pytest.mark.parametrize(("kl_in", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_a_policy_far_from_its_reference_comes_back_to_it(make_palm, trainer, moved, kl_in, estimator):
    ppo = trainer(
        make_palm(), reward=lambda ids, prompt_lengths: torch.zeros(len(ids)), actor_lr=2e-2, kl_div_loss_weight=1.0,
        kl_in=kl_in, kl_estimator=estimator,
    )  # fmt: skip
    moved(ppo.actor_critic, 0.2)
    rows = ppo.train(num_episodes=256, update_timesteps=32, max_new_tokens=6).metrics
    assert 0 < rows[-1]["kl"] < rows[0]["kl"] / 2


@pytest.mark.parametrize(
    "options", [{"actor_lora": False, "critic_lora": False}, {"critic_lora": False}, {"actor_lora": False}]
)
def test_trains_with_and_without_lora_and_the_reference_stays(make_palm, trainer, options):
    palm = make_palm()
    before = {name: value.clone() for name, value in palm.state_dict().items()}
    ppo = trainer(palm, max_norm=0.5, **options)
    ids = torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    reference = ppo.actor_critic.score(ids, mask, mask[:, 1:], role="reference").log_probs
    ppo.train(num_episodes=16, update_timesteps=8, max_new_tokens=4)
    torch.testing.assert_close(ppo.actor_critic.score(ids, mask, mask[:, 1:], role="reference").log_probs, reference)
    moved = any(not torch.equal(value, palm.state_dict()[name]) for name, value in before.items())
    assert moved == (options.get("actor_lora") is False)


def test_a_second_trainer_on_one_palm_continues_with_its_scopes(make_palm, trainer):
    palm = make_palm()
    trainer(palm, actor_lr=1e-2).train(num_episodes=8, update_timesteps=8, max_new_tokens=4)
    learned = [parameter.clone() for parameter in palm.finetune_parameters("actor")]
    second = trainer(palm)
    assert all(torch.equal(a, b) for a, b in zip(learned, second.actor_parameters, strict=True))
    second.train(num_episodes=8, update_timesteps=8, max_new_tokens=4)


@pytest.mark.parametrize("objective", ["rloo", "grpo", "reinforce"])
def test_other_objectives_train_without_a_critic(make_palm, trainer, objective):
    ppo = trainer(make_palm(), objective=objective, epochs=1, actor_lr=1e-2)
    assert ppo.critic_parameters == []
    result = ppo.train(num_episodes=32, update_timesteps=16, max_new_tokens=4)
    assert result.phases == 2
    assert math.isfinite(result.metrics[-1]["loss"])


def test_a_critic_of_bins_learns_the_returns(make_palm, trainer):
    ppo = trainer(make_palm(), value_range=(0.0, 1.0), value_bins=11, critic_lr=2e-2, kl_div_loss_weight=0.0)
    result = ppo.train(num_episodes=96, update_timesteps=16, max_new_tokens=4)
    assert result.metrics[-1]["value_loss"] < result.metrics[0]["value_loss"]


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_resume_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(make_palm, trainer, tmp_path, kind):
    more = {} if kind is GRPOTrainer else {"kl_target": 1.0, "actor_dropout": 0.1}
    schedule = {"num_episodes": 48, "update_timesteps": 16, "max_new_tokens": 5, "eos_token": 3}
    options = {"minibatch_size": 4, "epochs": 2, "actor_lr": 1e-2, "checkpoint_every": 3, "keep_checkpoints": None}

    def run(folder):
        return trainer(make_palm(), kind, checkpoint_dir=folder, **options, **more)

    whole = run(tmp_path / "whole")
    whole.train(**schedule)
    broken = run(tmp_path / "broken")
    real, calls = broken._next_update, 0

    def killed():
        nonlocal calls
        calls += 1
        if calls == 13:  # in the second phase, after a checkpoint in the middle of its first epoch
            raise KeyboardInterrupt
        real()

    broken._next_update = killed
    with pytest.raises(KeyboardInterrupt):
        broken.train(**schedule)
    resumed = run(tmp_path / "broken")
    resumed.train(**schedule)
    assert resumed.updates == whole.updates == 24
    for name, value in whole.actor_critic.state_dict().items():
        assert torch.equal(value, resumed.actor_critic.state_dict()[name]), name
    rows = [
        [
            {k: v for k, v in row.items() if not k.endswith(("_second", "_seconds"))}
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [8, 16, 24]  # updates, as everywhere
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken")]
    assert samples[0] == samples[1]
    assert samples[0].count("\n") == 3 * 4  # phases by samples


def test_a_checkpoint_opens_as_a_palm_and_answers_as_the_actor(make_palm, trainer, tmp_path):
    ppo = trainer(make_palm(), checkpoint_dir=tmp_path, actor_lr=1e-2)
    ppo.train(num_episodes=16, update_timesteps=8, max_new_tokens=4)
    palm = PaLM.from_pretrained(latest_checkpoint(tmp_path / "checkpoints"))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(palm(ids, finetune_scope="actor"), ppo.actor_critic.palm(ids, finetune_scope="actor"))
    assert (tmp_path / "curves.png").is_file()
    assert (tmp_path / "samples.jsonl").is_file()


def test_responses_made_elsewhere_are_learned_from(make_palm, trainer):
    ppo = trainer(make_palm(), reward=None, prompt_token_ids=None, actor_lr=1e-2)
    prompts = load_prompts([torch.tensor([1, 2]), torch.tensor([3, 4, 5])])
    rollout = rollout_of(prompts, [torch.tensor([6, 7]), torch.tensor([8, 9, 1])])
    before = ppo.actor_critic.score(rollout.ids, rollout.mask, rollout.response_mask).log_probs.sum(dim=1)
    for _ in range(5):
        ppo.step(rollout, torch.tensor([1.0, -1.0]))
    after = ppo.actor_critic.score(rollout.ids, rollout.mask, rollout.response_mask).log_probs.sum(dim=1)
    assert after[0] - before[0] > after[1] - before[1]


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_the_originals_names_mean_what_the_common_ones_do(make_palm, trainer, kind):
    outcomes = []
    # gradients below AdamW's epsilon, or their scale would not matter
    for names in ({"max_grad_norm": 1e-7, "pad_id": 7}, {"max_norm": 1e-7, "pad_value": 7}, {}):
        ppo = trainer(make_palm(), kind, reward=mean_id, actor_lr=1e-2, **names)
        assert ppo.config.pad_id == (7 if names else 0)
        end = {"eos_token": 3} if "max_norm" in names else {"eos_id": 3}
        result = ppo.train(num_episodes=16, update_timesteps=16, max_new_tokens=4, **end)
        assert result.metrics[0]["eos_rate"] > 0
        outcomes.append(torch.cat([parameter.detach().flatten() for parameter in ppo.actor_parameters]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_best_of_n_takes_the_response_with_the_highest_reward(make_palm, trainer):
    ppo = trainer(make_palm())
    ids = ppo.generate(12, torch.tensor([1, 2, 3]), num_samples=16)
    assert ids.ndim == 1
    assert ids.shape[0] == 9
    scores = []
    real = ppo.score
    ppo.score = lambda rollout: scores.append(real(rollout)) or scores[-1]
    best = ppo.generate(12, torch.tensor([1, 2, 3]), num_samples=16)
    again = [ppo.generate(12, torch.tensor([1, 2, 3]), generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)
    assert (best == 5).float().mean().item() == pytest.approx(scores[0].max().item())


def test_a_missing_end_costs_its_penalty(make_palm, trainer):
    ppo = trainer(make_palm())
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=5, eos_token=3), seed=1)
    experience = score_rollout(ppo.actor_critic, rollout, torch.ones(8), batch_size=8)
    rewards = token_rewards(experience, None, kl_weight=0.0, missing_eos_penalty=0.25)
    objective = PPO(gae_lambda=1.0, whiten_advantages=False)
    _, returns = objective.advantages(replace(experience, token_rewards=rewards))
    for row in range(8):
        first = int(rollout.prompt_lengths[row]) - 1
        assert returns[row, first].item() == pytest.approx(1.0 if rollout.finished[row] else 0.75)
