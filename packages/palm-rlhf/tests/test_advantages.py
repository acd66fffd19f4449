"""Advantages against naive float64 loops, and against formulas of another library where those are right."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.rl.advantages import (
    discounted_returns,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)

SETTINGS = settings(deadline=None, derandomize=True, max_examples=25)


def random_batch(seed):
    """Rewards, values and masks of responses that start and end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    spans = []
    for row in range(3):
        start = int(torch.randint(0, 6, (1,), generator=generator))
        end = int(torch.randint(start + 1, 8, (1,), generator=generator))
        mask[row, start:end] = True
        spans.append((start, end))
    return rewards, values, mask, spans


@SETTINGS
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.0, 0.9, 1.0]), lambda_=st.sampled_from([0.0, 0.7, 1.0]))
def test_generalized_advantages_are_the_exponential_sum_of_temporal_differences(seed, gamma, lambda_):
    rewards, values, mask, spans = random_batch(seed)
    wanted = torch.zeros_like(values)
    for row, (start, end) in enumerate(spans):
        for t in range(start, end):
            total = 0.0
            for k in range(t, end):
                following = values[row, k + 1].item() if k + 1 < end else 0.0
                total += (gamma * lambda_) ** (k - t) * (rewards[row, k] + gamma * following - values[row, k]).item()
            wanted[row, t] = total
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(advantages, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, (wanted + values).where(mask, 0), rtol=0, atol=1e-12)


@SETTINGS
@given(seed=st.integers(0, 10_000))
def test_what_lies_outside_responses_never_counts(seed):
    rewards, values, mask, _ = random_batch(seed)
    advantages, returns = generalized_advantages(rewards, values, mask)
    spoilt = generalized_advantages(rewards.where(mask, math.nan), values.where(mask, math.nan), mask)
    assert torch.equal(spoilt[0], advantages)
    assert torch.equal(spoilt[1], returns)


@SETTINGS
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.5, 1.0]))
def test_discounted_returns_are_sums_of_what_comes(seed, gamma):
    rewards, _, mask, spans = random_batch(seed)
    wanted = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(spans):
        for t in range(start, end):
            wanted[row, t] = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, end))
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma=gamma), wanted, rtol=0, atol=1e-12)


@SETTINGS
@given(seed=st.integers(0, 10_000))
def test_whitening_gives_the_valid_tokens_of_the_batch_mean_zero_and_deviation_one(seed):
    values, _, mask, _ = random_batch(seed)
    chosen = values[mask]
    if chosen.numel() < 2:
        return
    whitened = whiten(values, mask, epsilon=0.0)
    torch.testing.assert_close(whitened[mask], (chosen - chosen.mean()) / chosen.std(), rtol=1e-12, atol=1e-12)
    kept = whiten(values, mask, shift_mean=False, epsilon=0.0)[mask]
    torch.testing.assert_close(kept, (chosen - chosen.mean()) / chosen.std() + chosen.mean(), rtol=1e-12, atol=1e-12)
    assert bool((whitened[~mask] == 0).all())


def test_whitening_over_the_batch_keeps_the_difference_between_responses():
    """The original normalised each row alone, which takes away which response was better."""
    values = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    whitened = whiten(values, torch.ones(2, 2, dtype=torch.bool))
    assert bool((whitened[1] > whitened[0] + 1).all())


def test_whitening_equal_or_single_values_gives_zero():
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 9.0]]), mask).tolist() == [[0.0, 0.0]]
    assert whiten(torch.full((2, 2), 4.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0


@SETTINGS
@given(seed=st.integers(0, 10_000), group_size=st.integers(2, 4))
def test_leave_one_out_subtracts_the_mean_of_the_others(seed, group_size):
    scores = torch.randn(3 * group_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    advantages = leave_one_out_advantages(scores, group_size=group_size)
    for index in range(len(scores)):
        first = index // group_size * group_size
        others = [scores[k].item() for k in range(first, first + group_size) if k != index]
        assert advantages[index].item() == pytest.approx(scores[index].item() - sum(others) / len(others), abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_follow_their_definition(scale):
    scores = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    advantages = group_advantages(scores, group_size=4, scale=scale, epsilon=1e-4)
    whole = math.sqrt(sum((s - scores.mean().item()) ** 2 for s in scores.tolist()) / 11)
    for index, score in enumerate(scores.tolist()):
        group = scores[index // 4 * 4 : index // 4 * 4 + 4].tolist()
        mean = sum(group) / 4
        deviation = math.sqrt(sum((s - mean) ** 2 for s in group) / 3)
        divisor = {"group": deviation + 1e-4, "batch": whole + 1e-4, "none": 1.0}[scale]
        assert advantages[index].item() == pytest.approx((score - mean) / divisor, abs=1e-12)


def test_a_group_of_equal_scores_teaches_nothing():
    assert group_advantages(torch.full((4,), 0.7), group_size=4).abs().max() < 1e-3


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.zeros(4), group_size=1), "group_size must be at least 2"),
        (lambda: group_advantages(torch.zeros(5), group_size=2), "whole groups of 2"),
        (lambda: leave_one_out_advantages(torch.zeros(5), group_size=2), "whole groups of 2"),
        (lambda: generalized_advantages(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 3).bool()), "rewards must"),
        (
            lambda: discounted_returns(torch.zeros(1, 2), torch.ones(1, 2).bool(), gamma=2.0),
            "gamma and lambda_ must be in .0, 1., got 2.0 and 1.0",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
