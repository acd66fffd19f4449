"""Loss and gradient of each objective, against naive loops over responses and tokens in float64.

The loops know nothing of tensors' batches: a response is a list of numbers, its loss a Python expression of the paper's
equation, and the gradient a central difference.
"""

import math
from dataclasses import replace

import pytest
import torch

from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.data.rollouts import rollout_of
from palm_rlhf.rl.advantages import entropy_shaped, group_advantages, zero_variance_groups
from palm_rlhf.rl.experience import Experience, token_rewards
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import token_weights
from palm_rlhf.rl.objectives import CISPO, GRPO, GSPO, PPO, RLOO, SPO, TPO, FlowRL, ReinforcePlusPlus

LENGTHS = [3, 1, 4, 2, 2, 5]  # two groups of three responses
GROUP = 3
SCORES = [0.3, 1.0, -0.4, 2.0, 2.0, 0.5]


@pytest.fixture
def batch():
    """Six responses of different lengths with old, current and reference log-probs in float64."""
    generator = torch.Generator().manual_seed(0)
    prompts = load_prompts([torch.tensor([1, 2])] * 3 + [torch.tensor([3])] * 3)
    rollout = rollout_of(prompts, [torch.arange(1, n + 1) for n in LENGTHS], finished=[True] * 5 + [False])
    experience = Experience.from_rollout(rollout, torch.tensor(SCORES, dtype=torch.float64))
    mask = experience.response_mask

    def draw(scale):
        values = -torch.rand(mask.shape, dtype=torch.float64, generator=generator) * scale
        return values.where(mask, 0)

    old, new = draw(2.0), draw(0.5)
    experience = replace(
        experience, log_probs=old, unfiltered=old, reference=draw(2.0), token_rewards=token_rewards(
            experience, None, kl_weight=0.0, missing_eos_penalty=0.0
        ), values=draw(1.0),
    )  # fmt: skip
    return experience, (old + new + 0.3).where(mask, 0)


def rows_of(values, mask):
    return [values[row][mask[row]].tolist() for row in range(len(values))]


def whole_loss(objective, experience, log_probs, **outputs):
    advantages, returns = objective.advantages(experience)
    experience = replace(experience, advantages=advantages.double(), returns=returns)
    output = PolicyOutput(log_probs, log_probs, **outputs)
    weights = token_weights(experience.response_mask, objective.aggregation, max_new_tokens=objective.constant_length)
    return (objective.token_loss(output, experience).policy * weights).sum()


def relative(kind="group"):
    """Advantages of the responses, by loops."""
    advantages = []
    for first in range(0, len(SCORES), GROUP):
        group = SCORES[first : first + GROUP]
        mean = sum(group) / GROUP
        spread = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        divisor = {"group": spread + 1e-4, "none": 1.0}[kind]
        advantages += [(r - mean) / divisor for r in group]
    return advantages


def sequence_mean(losses):
    return sum(sum(row) / len(row) for row in losses) / len(losses)


def token_mean(losses):
    return sum(map(sum, losses)) / sum(map(len, losses))


def clipped(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def surrogates(new, old, advantages, low, high):
    return [
        [clipped(math.exp(x - y), a, low, high) for x, y in zip(n, o, strict=True)]
        for n, o, a in zip(new, old, advantages, strict=True)
    ]


def grpo(new, old, **_):
    return sequence_mean(surrogates(new, old, relative(), 0.2, 0.2))


def dr_grpo(new, old, **_):
    return sum(map(sum, surrogates(new, old, relative("none"), 0.2, 0.28))) / (len(new) * 7)


def gspo(new, old, **_):
    losses = []
    for n, o, a in zip(new, old, relative(), strict=True):
        ratio = math.exp((sum(n) - sum(o)) / len(n))
        losses.append(clipped(ratio, a, 0.1, 0.2))
    return sum(losses) / len(losses)


def rloo(new, old, **_):
    advantages = []
    for row, score in enumerate(SCORES):
        first = row // GROUP * GROUP
        others = [SCORES[k] for k in range(first, first + GROUP) if k != row]
        advantages.append(score - sum(others) / len(others))
    return token_mean(surrogates(new, old, advantages, 0.2, 0.2))


def reinforce_plus_plus(new, old, **_):
    returns = [score for score, row in zip(SCORES, new, strict=True) for _ in row]
    mean = sum(returns) / len(returns)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in returns) / (len(returns) - 1) + 1e-8)
    return token_mean(surrogates(new, old, [(score - mean) / deviation for score in SCORES], 0.2, 0.2))


def tpo(new, old, **_):
    utilities, total = relative(), 0.0
    for first in range(0, len(new), GROUP):
        rows = range(first, first + GROUP)
        target = [math.exp(sum(old[k]) + utilities[k] / 0.7) for k in rows]
        policy = [math.exp(sum(new[k])) for k in rows]
        total -= sum(q / sum(target) * math.log(p / sum(policy)) for q, p in zip(target, policy, strict=True))
    return total / (len(new) / GROUP)


LOG_Z = [0.3, 0.3, 0.3, -0.6, -0.6, -0.6]


def flowrl(new, old, *, reference, frozen, **_):
    losses = []
    for n, o, r, f, a, log_z in zip(new, old, reference, frozen, relative(), LOG_Z, strict=True):
        weight = min(max(math.exp(sum(f) - sum(o)), 0.8), 1.2)
        losses.append(weight * (log_z + sum(n) / len(n) - 2.0 * a - sum(r) / len(r)) ** 2)
    return sum(losses) / len(losses)


def cispo(new, old, *, frozen, **_):
    losses = []
    for n, o, f, a in zip(new, old, frozen, relative(), strict=True):
        losses.append([-min(max(math.exp(w - y), 0.9), 1.3) * a * x for x, y, w in zip(n, o, f, strict=True)])
    return token_mean(losses)


CASES = [
    (GRPO(group_size=GROUP), grpo),
    (
        GRPO(group_size=GROUP, scale_rewards="none", aggregation="constant", constant_length=7, eps_clip_high=0.28),
        dr_grpo,
    ),
    (GSPO(group_size=GROUP, eps_clip=0.1, eps_clip_high=0.2), gspo),
    (GSPO(group_size=GROUP, eps_clip=0.1, eps_clip_high=0.2, ratio_level="token"), gspo),
    (RLOO(group_size=GROUP, whiten_advantages=False), rloo),
    (ReinforcePlusPlus(), reinforce_plus_plus),
    (CISPO(group_size=GROUP, eps_clip=0.1, eps_clip_high=0.3), cispo),
    (TPO(group_size=GROUP, eta=0.7), tpo),
    (FlowRL(group_size=GROUP, beta=2.0), flowrl),
]


@pytest.mark.parametrize(("objective", "naive"), CASES)
def test_loss_and_gradient_equal_loops_over_the_papers_equation(batch, objective, naive):
    experience, new = batch
    mask = experience.response_mask
    new = new.clone().requires_grad_()
    outputs = {"network": torch.tensor(LOG_Z, dtype=torch.float64)} if isinstance(objective, FlowRL) else {}
    loss = whole_loss(objective, experience, new, **outputs)
    (gradient,) = torch.autograd.grad(loss, new)

    def at(values):
        # what the papers keep out of the gradient stays at the current policy
        return naive(
            rows_of(values, mask),
            rows_of(experience.log_probs, mask),
            reference=rows_of(experience.reference, mask),
            frozen=rows_of(new.detach(), mask),
        )

    assert loss.item() == pytest.approx(at(new.detach()), rel=1e-6)  # advantages are in float32
    for row, column in mask.nonzero().tolist():
        step = torch.zeros_like(new)
        step[row, column] = 1e-6
        difference = (at(new.detach() + step) - at(new.detach() - step)) / 2e-6
        assert gradient[row, column].item() == pytest.approx(difference, rel=1e-4, abs=1e-6)
    assert not gradient[~mask].any()


def test_the_penalty_of_spo_is_least_at_the_edge_of_its_range_and_pulls_back_from_beyond(batch):
    experience, new = batch
    objective = SPO(eps_clip=0.3, whiten_advantages=False)
    advantages, returns = objective.advantages(experience)
    experience = replace(experience, advantages=advantages, returns=returns)
    mask = experience.response_mask

    def losses(log_probs):
        output = PolicyOutput(log_probs, log_probs, values=torch.zeros_like(log_probs))
        return objective.token_loss(output, experience).policy

    found = losses(new)
    for row, column in mask.nonzero().tolist():
        ratio = math.exp(float(new[row, column] - experience.log_probs[row, column]))
        a = float(advantages[row, column])
        wanted = -ratio * a + abs(a) / (2 * 0.3) * (ratio - 1) ** 2
        assert found[row, column].item() == pytest.approx(wanted, abs=1e-12)
    edge = (1 + 0.3 * advantages.sign()).log()
    for shift, sign in ((0.0, 0), (0.2, 1), (-0.2, -1)):
        x = (experience.log_probs + edge + shift).requires_grad_()
        (gradient,) = torch.autograd.grad(losses(x).sum(), x)
        chosen = mask & (advantages != 0)
        assert torch.equal(
            gradient[chosen].where(gradient[chosen].abs() > 1e-12, 0).sign(), torch.full_like(gradient[chosen], sign)
        )


def test_dual_clip_bounds_the_loss_of_negative_advantages_at_every_token(batch):
    experience, new = batch
    new = (new + 1.0).where(experience.response_mask, 0)  # ratios up to 3.7
    objective = PPO(dual_clip=1.5, whiten_advantages=False)
    advantages = torch.linspace(-1, 1, new.numel(), dtype=torch.float64).view_as(new).flip(1)
    experience = replace(experience, advantages=advantages, returns=advantages)
    values = torch.zeros_like(new)
    loss = objective.token_loss(PolicyOutput(new, new, values=values), experience)
    bounded = 0
    for row, column in experience.response_mask.nonzero().tolist():
        ratio = math.exp(float(new[row, column] - experience.log_probs[row, column]))
        a = float(advantages[row, column])
        inner = -clipped(ratio, a, 0.2, 0.2)
        wanted = -inner if a >= 0 else -max(inner, 1.5 * a)
        bounded += a < 0 and inner < 1.5 * a
        assert loss.policy[row, column].item() == pytest.approx(wanted, abs=1e-12)
        assert bool(loss.clipped[row, column]) == (wanted != -ratio * a)
    assert bounded


def test_sequence_and_token_ratios_of_gspo_differ_in_gradient_only_for_different_advantages(batch):
    experience, new = batch
    gradients = {}
    for level in ("sequence", "token"):
        for name, factor in (("equal", torch.ones_like(new)), ("different", torch.arange(new.numel()).view_as(new))):
            x = new.clone().requires_grad_()
            objective = GSPO(group_size=GROUP, eps_clip=0.9, eps_clip_high=9.0, ratio_level=level)
            advantages, _ = objective.advantages(experience)
            changed = replace(experience, advantages=advantages.double() * factor)
            loss = objective.token_loss(PolicyOutput(x, x), changed).policy * token_weights(
                changed.response_mask, "sequence"
            )
            gradients[level, name] = torch.autograd.grad(loss.sum(), x)[0]
    torch.testing.assert_close(gradients["sequence", "equal"], gradients["token", "equal"])
    assert not torch.allclose(gradients["sequence", "different"], gradients["token", "different"])


def test_the_gradient_of_tpo_is_policy_minus_target_and_vanishes_at_the_target(batch):
    experience, _ = batch
    mask = experience.response_mask
    objective = TPO(group_size=GROUP)
    utilities = torch.tensor(relative(), dtype=torch.float64)
    old = experience.log_probs
    # one token of each response carries the change to the target
    at_target = old.clone()
    for row in range(len(LENGTHS)):
        at_target[row, int(mask[row].nonzero()[0])] += utilities[row]
    at_target.requires_grad_()
    (gradient,) = torch.autograd.grad(whole_loss(objective, experience, at_target), at_target)
    assert gradient.abs().max() < 1e-7
    x = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(whole_loss(objective, experience, x), x)
    for first in (0, 3):
        totals = old[first : first + 3].sum(dim=1)
        p, q = totals.softmax(0), (totals + utilities[first : first + 3]).softmax(0)
        for row in range(3):
            torch.testing.assert_close(
                gradient[first + row][mask[first + row]],
                ((p - q)[row] / 2).expand(LENGTHS[first + row]),  # the mean over two groups
                rtol=1e-5, atol=1e-7,
            )  # fmt: skip


def test_the_minimum_of_flowrl_is_the_reference_times_exponentiated_rewards():
    """A table of one-token responses: gradient descent on policy and log Z ends at the Boltzmann distribution."""
    generator = torch.Generator().manual_seed(3)
    reference, rewards = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    reference = reference.log_softmax(0)
    logits, log_z = reference.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, log_z], lr=0.05)
    prompts = load_prompts([torch.tensor([1])] * 6)
    experience = Experience.from_rollout(rollout_of(prompts, [torch.tensor([k]) for k in range(6)]), rewards)
    column = reference[:, None]
    experience = replace(experience, reference=column, advantages=rewards[:, None])
    objective = FlowRL(group_size=6, beta=1.5)
    for _ in range(800):
        policy = logits.log_softmax(0)[:, None]
        output = PolicyOutput(policy, policy, network=log_z.expand(6))
        objective.token_loss(output, experience).policy.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = (reference + 1.5 * rewards).softmax(0)
    torch.testing.assert_close(logits.softmax(0).detach(), wanted, rtol=0, atol=1e-6)
    assert log_z.item() == pytest.approx(torch.logsumexp(reference + 1.5 * rewards, 0).item(), abs=1e-5)


def test_cispo_gives_every_token_a_gradient_where_clipping_takes_it_from_grpo(batch):
    experience, new = batch
    new = (new + 2.0).where(experience.response_mask, 0)  # every ratio far above the range
    gradients = []
    for objective in (CISPO(group_size=GROUP, eps_clip_high=0.2), GRPO(group_size=GROUP)):
        x = new.clone().requires_grad_()
        gradients.append(torch.autograd.grad(whole_loss(objective, experience, x), x)[0])
    mask = experience.response_mask
    assert (gradients[0][mask] != 0).all()
    rising = torch.tensor(relative()) > 0
    assert not gradients[1][rising].any()


def test_advantages_divided_by_the_mean_reward_are_those_of_maxrl():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    advantages = group_advantages(scores, group_size=3, scale="mean").tolist()
    # one of three right, two of three right, none
    assert advantages == pytest.approx([2.0, -1.0, -1.0, 0.5, 0.5, -1.0, 0.0, 0.0, 0.0])
    assert zero_variance_groups(scores, group_size=3).tolist() == [False, False, True]


def test_the_entropy_term_of_an_advantage_is_bounded_and_has_no_gradient():
    advantages = torch.tensor([[2.0, -2.0, 0.1, 0.0]], dtype=torch.float64)
    entropy = torch.tensor([[1.0, 1.0, 5.0, 3.0]], dtype=torch.float64, requires_grad=True)
    shaped = entropy_shaped(advantages, entropy, weight=0.4, bound=2.0)
    wanted = [a + min(0.4 * h, abs(a) / 2.0) for a, h in zip(advantages[0].tolist(), entropy[0].tolist(), strict=True)]
    assert shaped[0].tolist() == pytest.approx(wanted)
    assert not shaped.requires_grad
