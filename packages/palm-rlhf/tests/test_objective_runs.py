"""Objectives in whole runs: a toy with a known answer, a known distribution, and the options of all objectives."""

import math
import os

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.importance import importance_weights, mismatch_metrics
from palm_rlhf.rl.objectives import CISPO, GRPO, GSPO, OBJECTIVES, PPO, REINFORCE, SPO, TPO, FlowRL
from palm_rlhf.rl.rollouts import rollout_of
from palm_rlhf.rl.trainer import RLHFTrainer

LONG = pytest.mark.skipif(not os.environ.get("LM_LONG"), reason="a proof of minutes: set LM_LONG=1")
SHORT = ("cispo", "flowrl", "reinforce")  # a few seconds each; test_ppo.py has the toy of ppo and grpo
REST = sorted(OBJECTIVES.keys() - {"ppo", "grpo", *SHORT})
RUNS = [*((name, 0) for name in SHORT), *(pytest.param(name, 0, marks=LONG) for name in REST)]
RUNS += [pytest.param(name, seed, marks=LONG) for name in (*SHORT, *REST) for seed in (1, 2)]
TOY = {"gspo": {"eps_clip": 0.05, "eps_clip_high": 0.05}, "reinforce": {"epochs": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_every_objective_learns_a_toy_with_a_known_answer(trainer, name, seed):
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=16, dim=64, depth=2, dim_head=16, heads=4)
    options = {"epochs": 4, "critic_lora": False, "critic_lr": 2e-3, **TOY.get(name, {})}
    toy = trainer(
        palm, objective=name, actor_lora=False, actor_lr=2e-3, kl_div_loss_weight=0.0, seed=seed, minibatch_size=16,
        **options,
    )  # fmt: skip
    # the short form stops as soon as the answer is found
    rewards = []
    for phases in range(1, 25):
        rewards += [row["reward"] for row in toy.train(num_episodes=phases * 64, max_new_tokens=8).metrics]
        if rewards[-1] >= 0.9 and not os.environ.get("LM_LONG"):
            break
    assert rewards[0] < 0.15
    assert rewards[-1] >= 0.9


TARGET_BETA = 2.0


def kl_from_target(objective, seed):
    """KL(target || policy) in nats after training on one-token responses, whose whole distribution is known."""
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=16, dim=32, depth=1, dim_head=16, heads=2)
    table = torch.zeros(16)
    table[[2, 7, 11]] = torch.tensor([1.5, 1.2, 1.5])  # three modes
    prompt = torch.tensor([1, 2, 3])
    with torch.no_grad():
        reference = palm(prompt[None])[0, -1].log_softmax(0)

    def reward(ids, prompt_lengths):
        return table[ids[:, 3]]

    learner = RLHFTrainer(
        palm, reward, objective=objective, prompts=[prompt], actor_lora=False, actor_lr=2e-3, minibatch_size=64,
        kl_div_loss_weight=0.0, epochs=2, seed=seed, device="cpu",
    )  # fmt: skip
    learner.train(num_episodes=60 * 128, update_timesteps=128, max_batch_size=128, max_new_tokens=1)
    with torch.no_grad():
        policy = palm(prompt[None])[0, -1].log_softmax(0)
    target = (reference + TARGET_BETA * table).log_softmax(0)
    return float((target.exp() * (target - policy)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=LONG), pytest.param(2, marks=LONG)])
def test_flowrl_matches_a_multimodal_target_that_grpo_leaves(seed):
    flow = kl_from_target(FlowRL(group_size=16, beta=TARGET_BETA, scale_rewards="none", network_lr=1e-2), seed)
    best = kl_from_target(GRPO(group_size=16), seed)
    assert flow < 0.05
    assert best > 10 * flow


def test_groups_stay_whole_in_minibatches_and_micro_batches(make_palm, trainer):
    tpo = trainer(make_palm(), objective=TPO(group_size=4), minibatch_size=8, micro_batch_size=4)
    rollout = tpo.rollout([p for p in PROMPTS for _ in range(4)], sampling=tpo.sampling(max_new_tokens=3))
    seen = []

    def spy(batch, weights):
        seen.append((batch.ids.tolist(), batch.prompt_lengths.tolist()))
        return type(tpo.update).loss(tpo.update, batch, weights)

    tpo.update.loss = spy
    tpo.step(rollout, torch.rand(len(rollout)))
    assert len(seen) == 4
    for ids, lengths in seen:
        assert len(ids) == 4
        assert len({tuple(row[:n]) for row, n in zip(ids, lengths, strict=True)}) == 1


PROMPTS = [torch.tensor(ids) for ids in ([1, 2], [3, 4, 5], [6], [7, 8])]


@pytest.mark.parametrize(
    "objective", [TPO(group_size=4), FlowRL(group_size=4), GSPO(group_size=4), CISPO(group_size=4)]
)
def test_micro_batches_do_not_change_an_update(make_palm, trainer, objective):
    weights = []
    for size in (None, 4):
        learner = trainer(
            make_palm().double(), objective=objective, minibatch_size=16, micro_batch_size=size, actor_lr=1e-2
        )
        rollout = learner.rollout([p for p in PROMPTS for _ in range(4)], sampling=learner.sampling(max_new_tokens=3))
        learner.step(rollout, torch.linspace(0, 1, 16) ** 2)
        weights.append([p.detach().clone() for p in learner.actor_parameters])
    assert any(bool(p.abs().max() > 1e-3) for p in weights[0])
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_a_run_of_flowrl_resumes_bit_for_bit_with_its_network(make_palm, trainer, tmp_path):
    def run(folder, *parts):
        learner = None
        for episodes in parts:
            learner = trainer(
                make_palm(), objective=FlowRL(group_size=4), actor_lr=1e-2, checkpoint_dir=folder, minibatch_size=8
            )
            learner.train(num_episodes=episodes, update_timesteps=16, max_new_tokens=3)
        return [p.detach() for p in (*learner.actor_parameters, *learner.update.network_parameters)]

    whole, halves = run(tmp_path / "a", 48), run(tmp_path / "b", 16, 48)
    assert any(bool(p.abs().sum() > 0) for p in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_truncated_responses_are_left_out_of_the_loss(make_palm, trainer):
    rollout = rollout_of(
        load_prompts([PROMPTS[0]] * 4), [torch.tensor(r) for r in ([1, 2], [3], [4, 5, 6], [7])],
        finished=[True, True, False, True],
    )  # fmt: skip
    rewards = torch.tensor([1.0, 0.0, 5.0, 0.5])
    losses = {}
    for masked in (False, True):
        learner = trainer(
            make_palm(), objective=GRPO(group_size=4, mask_truncated=masked, aggregation="token"),
            kl_div_loss_weight=0.0,
        )  # fmt: skip
        losses[masked] = learner.step(rollout, rewards)["policy_loss"]
    mean, spread = rewards.mean(), rewards.std() + 1e-4
    advantages = (rewards - mean) / spread
    lengths = torch.tensor([2.0, 1.0, 3.0, 1.0])
    kept = torch.tensor([True, True, False, True])
    assert losses[False] == pytest.approx(float(-(advantages * lengths).sum() / 7), abs=1e-5)
    assert losses[True] == pytest.approx(float(-(advantages * lengths)[kept].sum() / 4), abs=1e-5)


def test_groups_of_equal_rewards_are_counted_and_redrawn_up_to_a_limit(make_palm, trainer):
    drawn = []

    def reward(ids, prompt_lengths):
        drawn.append(len(ids))
        return torch.arange(len(ids)) % 4 * float(len(drawn) > 2)  # the first two batches are equal in every group

    for rounds, equal in ((0, 1.0), (1, 1.0), (3, 0.0)):
        drawn.clear()
        learner = trainer(make_palm(), reward=reward, objective=GRPO(group_size=4, dynamic_sampling=rounds))
        row = learner.train(num_episodes=8, update_timesteps=8, max_new_tokens=3).metrics[0]
        assert row["zero_variance_groups"] == equal
        assert len(drawn) == min(rounds, 2) + 1
        assert learner.phase.redrawn == 2 * min(rounds, 2)


def test_token_rewards_are_credits_of_tokens_and_sum_to_the_reward(make_palm, trainer):
    learner = trainer(make_palm(), objective=REINFORCE(whiten_advantages=False), kl_div_loss_weight=0.0)
    rollout = rollout_of(load_prompts(PROMPTS[:2]), [torch.tensor([5, 6]), torch.tensor([9])])
    credits = torch.tensor([[9.0, 9.0, 1.0, 2.0], [9.0, 9.0, 9.0, 4.0]])  # of prompts: without effect
    seen = {}
    begin = learner.phase.begin
    learner.phase.begin = lambda experience, metrics: (seen.update(e=experience, m=metrics), begin(experience, metrics))
    learner.step(rollout, credits)
    assert seen["e"].scores.tolist() == [3.0, 4.0]
    assert seen["m"]["reward"] == 3.5
    returns = torch.tensor([[0.0, 3.0, 2.0], [0.0, 0.0, 4.0]])
    wanted = (returns - 3.0).where(rollout.response_mask, 0)
    torch.testing.assert_close(seen["e"].advantages, wanted)


@pytest.mark.parametrize("objective", ["ppo", "grpo", "rloo", "tpo"])
def test_token_rewards_train_every_objective(make_palm, trainer, objective):
    def reward(ids, prompt_lengths):
        return (ids == 5).float()

    options = {} if objective == "ppo" else {"group_size": 4}
    learner = trainer(make_palm(), reward=reward, objective=objective, **options)
    row = learner.train(num_episodes=16, update_timesteps=16, max_new_tokens=4).metrics[0]
    assert 0 <= row["reward"] <= 4


@pytest.mark.parametrize("correction", ["token", "sequence", "token_mask", "sequence_mask", "none"])
def test_importance_weights_are_truncated_ratios(correction):
    generator = torch.Generator().manual_seed(0)
    ours, engine = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(5, 4, generator=generator) > 0.3
    weights = importance_weights(ours, engine, mask, correction=correction, cap=1.5)
    for row in range(5):
        columns = mask[row].nonzero()[:, 0].tolist()
        for column in range(4):
            over = columns if correction.startswith("sequence") else [column]
            ratio = math.exp(sum(float(ours[row, k] - engine[row, k]) for k in over))
            wanted = 1.0 if correction == "none" else min(ratio, 1.5)
            if correction.endswith("mask") and ratio > 1.5:
                wanted = 0.0
            assert weights[row, column].item() == pytest.approx(wanted if mask[row, column] else 0.0)


def test_the_mismatch_of_an_engine_is_reported_and_corrected(make_palm, trainer):
    prompts, responses = load_prompts(PROMPTS[:2] * 2), [torch.tensor(r) for r in ([5, 6], [9], [1, 2, 3], [4])]
    learner = trainer(make_palm(), objective=REINFORCE(whiten_advantages=False), kl_div_loss_weight=0.0)
    plain = rollout_of(prompts, responses)
    own = learner.actor_critic.score(plain.ids, plain.mask, plain.response_mask).log_probs.detach()
    shift = torch.tensor([[0.2], [-0.1], [0.0], [-3.0]])
    engine = [(own - shift)[row][plain.response_mask[row]].clamp(max=0) for row in range(4)]
    rewards = torch.tensor([1.0, 0.0, 2.0, 3.0])
    row = learner.step(rollout_of(prompts, responses, log_probs=engine), rewards)
    difference = torch.cat([own[r][plain.response_mask[r]] - engine[r] for r in range(4)]).double()
    assert row["engine_mismatch_max"] == pytest.approx(float(difference.abs().max()), abs=1e-5)
    assert row["engine_kl"] == pytest.approx(float((difference.exp() - 1 - difference).mean()), abs=1e-5)
    assert mismatch_metrics(own, own, plain.response_mask)["engine_kl"] == 0
    # the loss of REINFORCE with each token's weight
    lengths = torch.tensor([2, 1, 3, 1])
    tokens = torch.repeat_interleave(rewards, lengths)
    log_probs = torch.cat([own[r][plain.response_mask[r]] for r in range(4)])
    weight = difference.exp().clamp(max=2.0).float()
    wanted = -(weight * (tokens - tokens.mean()) * log_probs).mean()
    assert row["policy_loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_the_entropy_in_the_advantage_changes_the_update_and_not_the_critic(make_palm, trainer):
    rows = []
    for weight in (0.0, 0.4):
        learner = trainer(make_palm(), objective=PPO(entropy_advantage=weight), epochs=1, minibatch_size=8)
        rollout = learner.rollout(sampling=learner.sampling(max_new_tokens=3))
        rows.append(learner.step(rollout, torch.linspace(0, 1, 8)))
    assert rows[0]["policy_loss"] != rows[1]["policy_loss"]
    assert rows[0]["value_loss"] == rows[1]["value_loss"]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GSPO(eps_clip=0.0), r"eps_clip must be in \(0, 1\), got 0.0"),
        (lambda: GSPO(aggregation="token"), 'aggregation must be "sequence" for GSPO'),
        (lambda: GSPO(group_size=1), "group_size must be at least 2"),
        (lambda: CISPO(eps_clip=1.0), r"eps_clip must be in \(0, 1\), got 1.0"),
        (lambda: CISPO(eps_clip_high=-0.5), "eps_clip_high must be"),
        (lambda: TPO(eta=0.0), "eta must be a finite number above 0, got 0.0"),
        (lambda: TPO(eta=math.inf), "eta must be a finite number above 0, got inf"),
        (lambda: TPO(entropy_advantage=0.1), "entropy_advantage must be 0 for TPO"),
        (lambda: FlowRL(beta=-1.0), "beta must be a finite number above 0"),
        (lambda: FlowRL(beta=math.nan), "beta must be a finite number above 0, got nan"),
        (lambda: FlowRL(network_lr=0.0), "network_lr must be"),
        (lambda: FlowRL(network_size=0), "network_size must be at least 1"),
        (lambda: FlowRL(aggregation="constant", constant_length=4), 'aggregation must be "sequence" for FlowRL'),
        (lambda: GRPO(dual_clip=1.0), "dual_clip must be above 1, got 1.0"),
        (lambda: SPO(dual_clip=3.0), "dual_clip must be None for SPO, got 3.0"),
        (lambda: SPO(eps_clip_high=0.3), "eps_clip_high must be None for SPO, got 0.3"),
        (lambda: PPO(entropy_advantage=-0.1), "entropy_advantage must be a finite number in"),
        (lambda: PPO(entropy_advantage_bound=1.0), "entropy_advantage_bound must be above 1"),
        (lambda: PPO(dynamic_sampling=2), "dynamic_sampling must be 0 for PPO"),
        (lambda: GRPO(dynamic_sampling=-1), "dynamic_sampling must be at least 0, got -1"),
    ],
)
def test_an_objective_refuses_a_value_out_of_range_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda make: make(objective=TPO(group_size=4), minibatch_size=6),
            "minibatch_size must be a multiple of group_",
        ),
        (lambda make: make(objective=TPO(group_size=4), micro_batch_size=2), "micro_batch_size must be a multiple of"),
        (lambda make: make(objective="gsp"), "objective must be one of ppo, grpo"),
        (lambda make: make(objective="grpo", importance_cap=0.0), "importance_cap must be"),
        (
            lambda make: make(objective=GRPO(group_size=2, scale_rewards="mean")).step(
                two(), torch.tensor([1.0, -2.0])
            ),
            'rewards must be at least 0 at scale_rewards "mean", got -2.0',
        ),
        (lambda make: two(log_probs=[torch.zeros(1)]), "log_probs must be one row for each of 2 responses, got 1"),
        (
            lambda make: two(log_probs=[torch.zeros(2), torch.zeros(1)]),
            r"log_probs\[0\] must hold one number for each of 1",
        ),
        (
            lambda make: two(log_probs=[torch.tensor([0.5]), torch.zeros(1)]),
            r"log_probs\[0\] must be finite and at most 0",
        ),
        (lambda make: two(log_probs=[torch.zeros(1), torch.tensor([math.nan])]), r"log_probs\[1\] must be finite"),
        (lambda make: two(log_probs=[torch.zeros(1).long()] * 2), r"log_probs\[0\] must hold one number for each of 1"),
        (lambda make: make(objective="rloo").step(two(), torch.zeros(2, 3)), r"shape \(2,\) or \(2, 2\)"),
        (
            lambda make: make(objective="reinforce").step(two(), torch.tensor([[0.0, math.inf], [0.0, 0.0]])),
            "rewards must be finite, got inf for response 0",
        ),
    ],
)
def test_a_run_refuses_what_does_not_fit_its_objective(make_palm, trainer, run, message):
    with pytest.raises(ValueError, match=message):
        run(lambda **options: trainer(make_palm(), **options))


def two(**options):
    return rollout_of(load_prompts([torch.tensor([1])] * 2), [torch.tensor([2]), torch.tensor([3])], **options)
