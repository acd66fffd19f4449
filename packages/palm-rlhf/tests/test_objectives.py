"""Surrogates, value losses, token weights, KL estimates and binned values against independent float64 references."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.reward.losses import bradley_terry_loss
from palm_rlhf.rl.arguments import sort_arguments
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.kl import KLCoefficient, kl_estimate
from palm_rlhf.rl.losses import clipped_surrogate, clipped_value_loss, token_weights
from palm_rlhf.rl.objectives import PPO, REINFORCE
from palm_rlhf.rl.value_bins import ValueBins

SETTINGS = settings(deadline=None, derandomize=True, max_examples=30)


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@SETTINGS
@given(seed=st.integers(0, 10_000), high=st.sampled_from([None, 0.28]))
def test_clipped_surrogate_is_the_least_of_plain_and_clipped(seed, high):
    new, old, advantages = draw(seed, 3, 4, 5) * 0.3
    result = clipped_surrogate(new, old, advantages, eps_clip=0.2, eps_clip_high=high)
    for index in [(i, j) for i in range(4) for j in range(5)]:
        ratio = math.exp(new[index].item() - old[index].item())
        bounded = min(max(ratio, 0.8), 1.2 if high is None else 1.28)
        a = advantages[index].item()
        assert result.loss[index].item() == pytest.approx(-min(ratio * a, bounded * a), abs=1e-12)
        assert result.ratio[index].item() == pytest.approx(ratio, abs=1e-12)
        assert bool(result.clipped[index]) == (bounded * a < ratio * a)


def test_the_gradient_stops_where_clipping_wins_and_only_there():
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    clipped_surrogate(new, torch.zeros(4, dtype=torch.float64), advantages).loss.sum().backward()
    ratio = new.detach().exp()
    torch.testing.assert_close(new.grad, torch.stack([ratio[0] * 0, ratio[1] * 0, ratio[2], -ratio[3]]))


def test_surrogates_and_policy_gradient_have_one_gradient_before_the_first_update():
    new = draw(0, 6).requires_grad_()
    advantages = draw(1, 6)
    (a,) = torch.autograd.grad(clipped_surrogate(new, new.detach(), advantages).loss.sum(), new)
    (b,) = torch.autograd.grad((-advantages * new).sum(), new)
    torch.testing.assert_close(a, -advantages)
    torch.testing.assert_close(b, -advantages)


@SETTINGS
@given(seed=st.integers(0, 10_000), value_clip=st.sampled_from([None, 0.2]))
def test_clipped_value_loss_is_the_greater_of_both_errors(seed, value_clip):
    values, old, returns = draw(seed, 3, 6)
    loss, clipped = clipped_value_loss(values, old, returns, value_clip=value_clip)
    for k in range(6):
        v, o, r = values[k].item(), old[k].item(), returns[k].item()
        errors = [(v - r) ** 2]
        if value_clip is not None:
            errors.append((min(max(v, o - value_clip), o + value_clip) - r) ** 2)
        assert loss[k].item() == pytest.approx(max(errors) / 2, abs=1e-12)
        assert bool(clipped[k]) == (len(errors) == 2 and errors[1] > errors[0])


MASK = torch.tensor([[True, True, True, False], [False, True, False, False]])


def test_token_weights_are_the_three_means():
    per_token = draw(3, 2, 4)
    first, second = per_token[0, :3].sum(), per_token[1, 1]
    sums = {
        "token": (first + second) / 4,
        "sequence": (first / 3 + second) / 2,
        "constant": (first + second) / (2 * 5),
    }
    for kind, wanted in sums.items():
        torch.testing.assert_close((per_token * token_weights(MASK, kind, max_new_tokens=5)).sum(), wanted)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_follow_their_formulas(kind):
    p, q = draw(4, 2, 50)
    ratio = (q - p).exp()
    wanted = {"k1": -ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}[kind]
    torch.testing.assert_close(kl_estimate(p, q, kind), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_two_estimates_are_exact_in_expectation_over_the_policy(kind):
    p, q = draw(5, 2, 9).log_softmax(dim=-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), exact, rtol=1e-12, atol=1e-12)


def test_the_last_estimate_is_never_negative_and_the_kl_is_from_the_reference():
    p, q = draw(6, 2, 1000)
    assert kl_estimate(p, q, "k3").min() >= 0
    assert not torch.allclose(kl_estimate(p, q, "k3"), kl_estimate(q, p, "k3"))


def test_the_adaptive_coefficient_follows_its_rule_and_the_fixed_one_stays():
    fixed, adaptive = KLCoefficient(0.1), KLCoefficient(0.1, target=6.0, horizon=1000)
    for divergence in (100.0, 6.6, 0.0):
        fixed.update(divergence, 64)
        adaptive.update(divergence, 64)
    assert fixed.value == 0.1
    assert adaptive.value == pytest.approx(0.1 * (1 + 0.2 * 0.064) * (1 + 0.1 * 0.064) * (1 - 0.2 * 0.064))


def test_bradley_terry_is_minus_log_of_the_chance_that_the_better_wins():
    chosen, rejected, margin = draw(7, 3, 5)
    wanted = sum(-math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m in zip(chosen, rejected, margin, strict=True))
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(wanted / 5, abs=1e-12)


def test_binned_values_give_back_what_they_were_told():
    bins = ValueBins(low=-1.0, high=1.0, bins=41).double()
    values = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64)
    targets = bins.targets(values)
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(bins.expected(targets.clamp(min=1e-300).log()), values, rtol=0, atol=1e-3)


def test_binned_targets_are_a_normal_distribution_integrated_over_each_bin():
    bins = ValueBins(low=0.0, high=3.0, bins=3, sigma=0.75).double()

    def below(x):
        return 0.5 * (1 + math.erf((x - 1.2) / (0.75 * math.sqrt(2))))

    mass = [below(k + 1) - below(k) for k in range(3)]
    wanted = torch.tensor([m / sum(mass) for m in mass], dtype=torch.float64)
    torch.testing.assert_close(bins.targets(torch.tensor(1.2, dtype=torch.float64)), wanted)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PPO(eps_clip=1.5), r"eps_clip must be in \(0, 1\), got 1.5"),
        (lambda: PPO(eps_clip_high=0.0), "eps_clip_high must be"),
        (lambda: PPO(value_clip=-1.0), "value_clip must be"),
        (lambda: token_weights(MASK, "constant"), 'aggregation "constant" needs max_new_tokens'),
        (lambda: KLCoefficient(-1.0), "kl_div_loss_weight must be"),
        (lambda: KLCoefficient(0.1, target=0.0), "kl_target must be"),
        (lambda: ValueBins(low=1.0, high=0.0), "value_range must be"),
        (lambda: ValueBins(low=0.0, high=1.0, bins=1), "bins must be at least 2"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_objective_may_have_required_fields_which_a_keyword_of_the_trainer_sets():
    @dataclass(frozen=True, kw_only=True)
    class Thresholded(REINFORCE):
        threshold: float

    *_, objective, _ = sort_arguments("policy", None, [1], Thresholded, RLConfig(), {"threshold": 0.5, "gamma": 0.9})
    assert objective == Thresholded(threshold=0.5, gamma=0.9)
