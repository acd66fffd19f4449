"""SPIN: shifted sums, EOS, padding, frozen references; one test for each trap of the original."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from spin_trainer import SPIN, log_prob_from_model_and_seq, prompt_mask_from_len, set_dropout_
from spin_trainer.model.response_scores import collate, response_log_probs, response_mask
from spin_trainer.quickstart.small_decoder import SmallDecoder


class Plain(torch.nn.Module):
    """A module from ids to logits, without mask and cache."""

    def __init__(self, vocabulary=12):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, 8)
        self.rnn = torch.nn.GRU(8, 8, batch_first=True)
        self.out = torch.nn.Linear(8, vocabulary)

    def forward(self, ids):
        return self.out(self.rnn(self.embedding(ids))[0])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    real = torch.randint(0, 11, (3, 9), generator=generator)
    generated = torch.randint(0, 11, (3, 12), generator=generator)
    return generated, real, torch.tensor([2, 4, 3])


@pytest.mark.parametrize("kind", ["decoder", "plain"])
def test_a_shifted_sum_is_minus_the_summed_cross_entropy(make_model, batch, kind):
    model = make_model() if kind == "decoder" else Plain()
    _, real, prompt_len = batch
    answer = response_mask(real, prompt_len)
    with torch.no_grad():
        logits = model(real)
        sums = response_log_probs(SPIN(model).policy, real, answer)
    for row in range(3):
        start = int(prompt_len[row])
        expected = -F.cross_entropy(logits[row, start - 1 : -1], real[row, start:], reduction="sum")
        assert sums[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_that_predicts_the_next_token_scores_high_and_one_that_repeats_scores_low():
    # the original scored token i by logits at i, which rewarded repeating the current token
    successor = 20.0 * torch.roll(torch.eye(12), 1, dims=1)
    counting = torch.tensor([[3, 4, 5, 6, 7]])

    assert log_prob_from_model_and_seq(lambda ids: successor[ids], counting).sum().item() > -1e-4
    assert log_prob_from_model_and_seq(lambda ids: 20.0 * torch.eye(12)[ids], counting).sum().item() < -50


def test_the_loss_is_ln_2_exactly_before_training_and_after_promotion(make_model, batch):
    spin = SPIN(make_model(), lambda_=1.0)
    comparison, first = spin.compare(*batch), spin(*batch).item()
    policy_shift(spin)
    moved = spin(*batch).item()
    spin.update_reference_model_with_policy()

    assert comparison.margins.tolist() == [0.0, 0.0, 0.0]
    assert abs(moved - math.log(2)) > 1e-3
    assert first == spin(*batch).item() == torch.tensor(2.0).log().item()


def test_tokens_after_eos_change_nothing(make_model, batch):
    generated, real, prompt_len = batch
    generated[:, 7] = 11
    spin = SPIN(make_model(), eos_id=11, lambda_=1.0).double()
    policy_shift(spin)
    other = generated.clone()
    other[:, 8:] = 3

    before, after = spin(generated, real, prompt_len), spin(other, real, prompt_len)
    assert before.item() == pytest.approx(after.item(), abs=1e-12)
    assert SPIN(make_model()).compare(generated, real, prompt_len).policy_generated.tolist() != (
        SPIN(make_model()).compare(other, real, prompt_len).policy_generated.tolist()
    )


def policy_shift(spin):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in spin.policy_model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.2 * noise).to(parameter.dtype))


def test_an_eos_inside_the_prompt_ends_nothing(batch):
    _, real, prompt_len = batch
    real[:, 0] = 11

    assert response_mask(real, prompt_len, None, 11).equal(~prompt_mask_from_len(prompt_len, real))


@pytest.mark.parametrize("kind", ["decoder", "plain"])
def test_a_batch_of_padded_rows_gives_what_each_row_gives_alone(make_model, kind):
    model = (make_model() if kind == "decoder" else Plain()).double()
    policy = SPIN(model).policy
    prompts, answers = [(1, 2), (3,), (4, 5, 6)], [(7, 8), (9, 1, 2, 3, 11), (11,)]
    with torch.no_grad():
        ids, answer, mask = collate(prompts, answers)
        together = response_log_probs(policy, ids, answer, mask)
        for row, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
            alone = response_log_probs(policy, *collate([prompt], [response]))
            assert together[row].item() == pytest.approx(alone.item(), abs=1e-10)


def test_padding_by_id_or_by_mask_or_on_the_left_gives_one_loss(make_model):
    model = make_model().double()
    real = torch.tensor([[1, 2, 5, 11, -1, -1], [3, 4, 6, 7, 8, 11]])
    generated = torch.tensor([[1, 2, 9, -1], [3, 4, 5, 5]])
    prompt_len = torch.tensor([2, 2])
    by_id, by_mask = SPIN(model, pad_id=-1, lambda_=1.0), SPIN(model, lambda_=1.0)
    left = torch.tensor([[-1, -1, 1, 2, 5, 11], [3, 4, 6, 7, 8, 11]])
    policy_shift(by_id)

    # both references are the unmoved model: by_mask was made before the shift
    expected = by_id(generated, real, prompt_len)
    masked = by_mask(generated.clamp(min=0), real.clamp(min=0), prompt_len, generated != -1, real != -1)
    on_the_left = by_id(generated, left, prompt_len)

    assert masked.item() == pytest.approx(expected.item(), abs=1e-10)
    assert on_the_left.item() == pytest.approx(expected.item(), abs=1e-10)


def test_the_callers_batch_and_the_models_mode_stay_as_they_were(make_model):
    model = make_model().eval()
    real = torch.tensor([[1, 2, 5, -1]])
    generated = torch.tensor([[1, 2, 9, 4]])
    before = real.clone(), generated.clone()
    SPIN(model, pad_id=-1)(generated, real, torch.tensor([2]))

    assert real.equal(before[0])
    assert generated.equal(before[1])
    assert not model.training


def test_a_mean_divides_by_the_answers_length(make_model, batch):
    prompt_len = batch[2]
    summed, mean = SPIN(make_model()).compare(*batch), SPIN(make_model(), reduction="mean").compare(*batch)

    torch.testing.assert_close(mean.policy_real, summed.policy_real / (9 - prompt_len), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.policy_generated, summed.policy_generated / (12 - prompt_len), rtol=1e-6, atol=0)


def test_a_frozen_reference_is_bit_identical_over_many_updates(make_model, batch):
    # ema-pytorch with decay 1 copies the policy at updates 1, 11, ...
    spin = SPIN(make_model(), ref_model_ema_decay=1.0)
    before = {name: value.clone() for name, value in spin.ref_model.exported().items()}
    optimizer = torch.optim.SGD(spin.parameters(), lr=0.1)
    for _ in range(25):
        spin(*batch).backward()
        optimizer.step()
        spin.update_ema()

    after = spin.ref_model.exported()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(next(iter(before.values())), next(spin.policy_model.parameters()))


def test_a_moving_reference_follows_the_policy(make_model, batch):
    spin = SPIN(make_model(), ref_model_ema_decay=0.5, ema_kwargs={"update_after_step": 0, "update_every": 1})
    with torch.no_grad():
        spin.policy_model.embedding.weight.add_(1.0)
    for _ in range(12):
        spin.update_ema()
    ids = batch[1]

    assert (spin.ref_model(ids) - spin.policy_model(ids)).abs().max().item() < 0.1
    assert spin(*batch).requires_grad


def test_the_reference_keeps_a_graph_that_the_policy_has_built(make_model, batch):
    spin = SPIN(make_model().double(), lambda_=1.0)
    policy_shift(spin)
    alone = copy.deepcopy(spin.policy_model)
    loss = spin.policy_model(batch[1]).square().sum()
    with torch.no_grad():
        spin.ref_model(batch[1])
    loss.backward()
    alone(batch[1]).square().sum().backward()

    for parameter, expected in zip(spin.policy_model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_only_what_trains_is_copied(make_model):
    model = make_model()
    model.embedding.weight.requires_grad_(False)
    spin = SPIN(model)

    assert "embedding.weight" not in spin.ref_model.exported()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(spin.ref_model.exported())
    assert len(spin.trainable_parameters()) < len(list(spin.parameters()))


def test_a_step_at_a_large_vocabulary_holds_no_full_logits():
    vocabulary, tokens = 32_000, 192
    torch.manual_seed(0)
    model = SmallDecoder(num_tokens=vocabulary, dim=8, depth=1, heads=1, dim_head=8)
    spin = SPIN(model)
    generated, real = torch.randint(0, vocabulary, (2, 8, tokens))
    generated[:, :4] = real[:, :4]
    lengths = torch.full((8,), 4)
    full = 2 * 8 * (tokens - 4) * vocabulary * 4  # of the answers alone, in float32

    def largest_allocation(call):
        """Bytes of the operation that keeps the most, operations inside of others included."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
        return max(event.self_cpu_memory_usage for event in seen.events())

    with torch.no_grad():
        assert largest_allocation(lambda: model(torch.cat((generated, real)))) >= full
    assert largest_allocation(lambda: spin(generated, real, lengths).backward()) < full / 4


def test_dropout_reaches_modules_and_attention():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5))
    module.attention_dropout = 0.5
    set_dropout_(module, 0.0)

    assert (module.attention_dropout, module[0].p) == (0.0, 0.0)
