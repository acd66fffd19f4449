"""The loss against its equation, TRL's DPO formulas, an enumerated expectation and the tabular optimum."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_trainer import SPIN, self_play_losses, self_play_margins, win_rate

numbers = st.floats(-60, 0, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=6), st.floats(0.01, 5))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_logistic_and_hinge_equal_dpos_sigmoid_and_hinge(rows, lambda_):
    real, generated, ref_real, ref_generated = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    margins = self_play_margins(real, generated, ref_real, ref_generated, lambda_=lambda_)
    # TRL: logits = (chosen - rejected) - (ref_chosen - ref_rejected), losses of beta * logits
    logits = (real - generated) - (ref_real - ref_generated)

    torch.testing.assert_close(self_play_losses(margins), -F.logsigmoid(lambda_ * logits), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        self_play_losses(margins, "hinge"), torch.relu(1 - lambda_ * logits), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("logistic", math.log(1 + math.exp(-0.5))), ("hinge", 0.5), ("exponential", math.exp(-0.5)), ("correlation", 0.5)],
)
def test_each_loss_is_the_papers_function_of_the_margin(name, expected):
    loss = self_play_losses(torch.tensor([0.5], dtype=torch.float64), name)

    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_tie_counts_half_a_win():
    assert win_rate(torch.tensor([1.0, -1.0, 0.0, 2.0])).item() == 0.625


def sequence_probability(table, start, answer):
    log_probs, last, total = table.weight.detach().log_softmax(-1), start, 0.0
    for token in answer:
        total, last = total + log_probs[last, token].item(), token
    return math.exp(total)


@pytest.mark.parametrize("lambda_", [0.1, 1.0, 3.0])
def test_at_the_opponents_weights_the_expected_gradient_is_half_lambda_times_that_of_sft(lambda_):
    # every answer of two tokens out of three, real ones by a distribution of their own: an exact expectation
    torch.manual_seed(0)
    table = torch.nn.Embedding(3, 3, dtype=torch.float64)  # logits of the next token depend on the last one only
    spin = SPIN(table, lambda_=lambda_)
    answers = list(itertools.product(range(3), repeat=2))
    generator = torch.Generator().manual_seed(5)
    data = torch.rand(len(answers), generator=generator, dtype=torch.float64)
    data = data / data.sum()
    opponent = torch.tensor([sequence_probability(table, 0, answer) for answer in answers], dtype=torch.float64)
    pairs = list(itertools.product(range(len(answers)), repeat=2))
    weights = torch.stack([data[real] * opponent[generated] for real, generated in pairs])
    real = torch.tensor([[0, *answers[real]] for real, _ in pairs])
    generated = torch.tensor([[0, *answers[generated]] for _, generated in pairs])
    prompt_len = torch.ones(len(pairs), dtype=torch.long)

    losses = spin.compare(generated, real, prompt_len).losses
    (spin_gradient,) = torch.autograd.grad((weights * losses).sum(), table.weight)
    rows = torch.tensor([[0, *answer] for answer in answers])
    nll = F.cross_entropy(table(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    (sft_gradient,) = torch.autograd.grad((data * nll.reshape(len(answers), 2).sum(-1)).sum(), table.weight)

    assert opponent.sum().item() == pytest.approx(1, abs=1e-12)
    assert (spin_gradient - lambda_ / 2 * sft_gradient).abs().max().item() < 1e-12


@pytest.mark.parametrize("lambda_", [1.0, 2.0])
def test_the_minimum_over_tables_is_the_papers_optimum(lambda_):
    # section 5.2: p_(t+1) is proportional to p_t (p_data / p_t)^(1/lambda), so lambda = 1 reaches p_data at once
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    opponent = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18)

    def expected_loss():
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - opponent.log()
        margins = lambda_ * (ratio[:, None] - ratio[None, :])
        loss = (data[:, None] * opponent[None, :] * self_play_losses(margins.flatten()).view(4, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    expected = opponent * (data / opponent) ** (1 / lambda_)

    torch.testing.assert_close(logits.detach().softmax(0), expected / expected.sum(), rtol=0, atol=1e-9)
