"""Equality with the formulas of trl 1.12.0's experimental PPO trainer where they are right, and where they are not.

Written out from reading it, in float64. Two of its mistakes: the score is put one position after the last token of a
response that is shorter than the batch's longest, so the critic is trained, and bootstrapped from, past the end; and
its advantages are whitened over one process's batch.
"""

import torch

from palm_rlhf.rl.advantages import generalized_advantages, whiten
from palm_rlhf.rl.losses import clipped_surrogate, clipped_value_loss, token_weights


def theirs(scores, kl, values, last, *, kl_coef, gamma, lam):
    """Advantages before whitening and returns; ``last`` is the index of each response's last token."""
    size = kl.shape[1]
    index = torch.arange(size).expand_as(kl)
    past_end = index > (last + 1)[:, None]
    values = values.masked_fill(past_end, 0)
    rewards = (-kl_coef * kl).masked_fill(index > last[:, None], 0)
    place = torch.where(last + 1 < size, last + 1, last)
    rewards[torch.arange(len(scores)), place] += scores
    following, columns = torch.zeros_like(scores), []
    for t in reversed(range(size)):
        after = values[:, t + 1] if t < size - 1 else 0.0
        following = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * following
        columns.append(following)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def ours(scores, kl, values, last, *, kl_coef, gamma, lam):
    mask = torch.arange(kl.shape[1]) <= last[:, None]
    rewards = (-kl_coef * kl).where(mask, 0)
    rewards[torch.arange(len(scores)), last] += scores
    return (*generalized_advantages(rewards, values, mask, gamma=gamma, lambda_=lam), mask)


def draw():
    generator = torch.Generator().manual_seed(0)
    kl, values = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    return torch.randn(4, dtype=torch.float64, generator=generator), kl * 0.1, values


SETTINGS = {"kl_coef": 0.05, "gamma": 0.98, "lam": 0.9}


def test_advantages_returns_and_losses_are_equal_where_no_response_is_padded():
    scores, kl, values = draw()
    last = torch.full((4,), 5)
    wanted, wanted_returns = theirs(scores, kl, values, last, **SETTINGS)
    advantages, returns, mask = ours(scores, kl, values, last, **SETTINGS)
    torch.testing.assert_close(advantages, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, wanted_returns, rtol=1e-12, atol=1e-12)
    centred = wanted - wanted.mean()
    whitened = whiten(advantages, mask)
    torch.testing.assert_close(whitened, centred * torch.rsqrt(wanted.var() + 1e-8), rtol=1e-12, atol=1e-12)
    new = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3
    ratio = new.exp()
    policy = torch.maximum(-whitened * ratio, -whitened * ratio.clamp(0.8, 1.2)).mean()
    value = values + new
    near = torch.clamp(value, values - 0.2, values + 0.2)
    critic = 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()
    weights = token_weights(mask)
    own = clipped_surrogate(new, torch.zeros_like(new), whitened).loss
    torch.testing.assert_close((own * weights).sum(), policy)
    loss, _ = clipped_value_loss(value, values, returns, value_clip=0.2)
    torch.testing.assert_close((loss * weights).sum(), critic)


def test_a_padded_response_scores_its_last_token_and_never_reads_the_value_after_it():
    scores, kl, values = draw()
    last = torch.tensor([5, 2, 3, 0])
    changed = values.clone()
    changed[1, 3] += 1.0  # after the end of the second response
    before, after = (ours(scores, kl, v, last, **SETTINGS)[0] for v in (values, changed))
    assert torch.equal(before, after)
    before, after = (theirs(scores, kl, v, last, **SETTINGS)[0][1, :3] for v in (values, changed))
    assert not torch.allclose(before, after)
