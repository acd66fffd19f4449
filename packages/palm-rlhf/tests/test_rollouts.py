"""Rollouts: the ratio is 1 before the first update for every way of sampling, and nothing after the end counts."""

from functools import partial

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.rl.experience import score_rollout
from palm_rlhf.rl.log_probs import pack_kept, unpack_kept
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout, rollout_of

# A deprecated attribute of transformers, and peft's note on GPT-2's layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


@pytest.fixture
def prompts(prompt_ids):
    return load_prompts(prompt_ids)


@pytest.fixture(params=["palm", "llama", "gpt2"])
def make_base(request, make_palm, make_hugging_face):
    """Makes a model of one family, each time with the same weights."""
    return make_palm if request.param == "palm" else partial(make_hugging_face, request.param)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float64), (0.7, torch.float64), (0.7, torch.float32)])
def test_ratio_is_one_before_the_first_update(make_base, moved, prompts, filters, lora, temperature, dtype):
    base = make_base().to(dtype)
    policy = moved(ActorCritic(base, actor_lora=lora, critic_lora=lora).to(dtype).eval(), 0.3 if lora else 0.01)
    if isinstance(base, PaLM):  # logits of order one instead of 13: their rounding differs from batch to batch
        base.token_emb.weight.data.mul_(0.2)
    settings = SamplingSettings(max_new_tokens=6, temperature=temperature, filters=filters, eos_id=5, min_new_tokens=2)
    rollout = draw_rollout(policy, prompts, settings, generator=torch.Generator().manual_seed(0))
    # old ones a few rows at a time, new ones all together: the training forward has other batches than the rollout's
    old = score_rollout(policy, rollout, torch.zeros(len(rollout)), batch_size=2)
    new = policy(rollout.ids, rollout.mask, rollout.response_mask, temperature=temperature, kept=rollout.kept)
    ratio = (new.log_probs - old.log_probs).exp()
    assert bool(rollout.response_mask.any())
    assert (ratio - 1).abs().max() < (1e-10 if dtype == torch.float64 else 1e-6)


def test_log_probs_are_of_the_distribution_that_was_sampled(make_base, moved, prompts, filters):
    """Against one prompt at a time, without cache, padding or chunks; the reference against a model of its own."""
    untrained, policy = make_base().double(), ActorCritic(make_base().double(), with_critic=False).double()
    moved(policy.eval())  # GPT-2 has dropout, and is called below
    settings = SamplingSettings(max_new_tokens=5, temperature=0.7, filters=filters)
    rollout = draw_rollout(policy, prompts, settings, generator=torch.Generator().manual_seed(1))
    scores = score_rollout(policy, rollout, torch.zeros(len(rollout)), batch_size=6)
    for row in range(len(rollout)):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        ids = rollout.ids[row, :end]
        with torch.no_grad():
            if isinstance(untrained, PaLM):
                logits, plain = policy.palm(ids[None], finetune_scope="actor")[0] / 0.7, untrained(ids[None])[0] / 0.7
            else:
                with policy.as_role("actor") as (network, arguments):
                    logits = network(ids[None], **arguments)[0] / 0.7
                plain = untrained(ids[None]).logits[0] / 0.7
        for position in range(start, end):
            step = logits[position - 1]
            filtered = step[None]
            for function in settings.filters:
                filtered = function(filtered)
            wanted = {"log_probs": filtered[0], "unfiltered": step, "reference": plain[position - 1]}
            for name, row_logits in wanted.items():
                exact = row_logits.log_softmax(-1)[ids[position]].item()
                assert getattr(scores, name)[row, position - 1].item() == pytest.approx(exact, abs=1e-10)


def test_a_stored_kept_set_survives_an_update_and_has_the_gradients_of_masked_logits(
    make_palm, moved, prompts, filters
):
    policy = moved(ActorCritic(make_palm().double(), with_critic=False))
    settings = SamplingSettings(max_new_tokens=6, filters=filters)
    rollout = draw_rollout(policy, prompts, settings, generator=torch.Generator().manual_seed(0))
    moved(policy, 1.0)  # a nucleus of the new logits would lose sampled tokens
    mask, parameters = rollout.response_mask, policy.actor_parameters()
    scores = policy.score(rollout.ids, rollout.mask, mask, kept=rollout.kept)
    assert bool(torch.isfinite(scores.log_probs).all())
    assert bool((scores.log_probs[mask] < 0).any())
    got = torch.autograd.grad(scores.log_probs.sum(), parameters)
    logits = policy.palm(rollout.ids, finetune_scope="actor")[:, :-1][mask]
    if filters:
        logits = logits.masked_fill(~unpack_kept(rollout.kept[mask], 13), -torch.inf)
    labels = rollout.ids[:, 1:][mask]
    wanted = torch.autograd.grad(logits.log_softmax(-1).gather(-1, labels[:, None]).sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_packed_sets_are_an_eighth_of_a_byte_a_token_and_come_back():
    kept = torch.rand(3, 4, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_kept(kept)
    assert packed.shape == (3, 4, 2)
    assert torch.equal(unpack_kept(packed, 13), kept)


def test_nothing_of_vocabulary_size_is_kept_of_a_rollout(make_palm, prompts):
    policy = ActorCritic(make_palm(num_tokens=1000), with_critic=True)
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=5))
    experience = score_rollout(policy, rollout, torch.zeros(len(rollout)), batch_size=6)
    for value in experience.tensors().values():
        assert value.numel() <= len(rollout) * rollout.ids.shape[1]


def test_response_masks_have_the_end_token_and_nothing_after_it(make_palm, moved, prompts):
    policy = moved(ActorCritic(make_palm(), with_critic=False), 1.0)
    settings = SamplingSettings(max_new_tokens=12, eos_id=3)
    rollout = draw_rollout(policy, prompts, settings, generator=torch.Generator().manual_seed(0))
    ended = 0
    for row in range(len(rollout)):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        response = rollout.ids[row, start:end].tolist()
        assert rollout.response_mask[row].nonzero().flatten().tolist() == list(range(start - 1, end - 1))
        assert 3 not in response[:-1]
        assert bool(rollout.finished[row]) == (response[-1] == 3)
        ended += response[-1] == 3
    assert ended > 0


def test_total_length_limits_each_row(make_palm, prompts):
    policy = ActorCritic(make_palm(), with_critic=False)
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=99, max_seq_len=9))
    assert rollout.lengths.tolist() == [9] * 6


def test_stop_strings_end_a_response_with_the_token_that_completes_them(make_palm):
    class Letters(ByteTokenizer):
        def decode(self, ids):
            return "".join("ab"[int(i) % 2] for i in ids)

    tokenizer = Letters()
    policy = ActorCritic(make_palm(num_tokens=259), with_critic=False)
    prompts = load_prompts(["xy", "z"], tokenizer=tokenizer)
    settings = SamplingSettings(max_new_tokens=20, stop_strings=("ab",), eos_id=257, temperature=9.0)
    rollout = draw_rollout(policy, prompts, settings, tokenizer=tokenizer, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        text = tokenizer.decode(rollout.ids[row, int(rollout.prompt_lengths[row]) : int(rollout.lengths[row])].tolist())
        assert text.endswith("ab")
        assert "ab" not in text[:-1]
    assert rollout.finished.tolist() == [True, True]


def test_a_stop_string_in_a_long_response_takes_few_decodes(make_palm):
    class Counting(ByteTokenizer):
        decodes = 0

        def decode(self, ids):
            Counting.decodes += len(ids) > 400
            return "".join("ab"[int(i) == 7] for i in ids)

    policy = ActorCritic(make_palm(num_tokens=259), with_critic=False)

    class Script:
        """Token 7 at step 450 only, token 3 elsewhere."""

        step = -1

        def __call__(self, logits):
            self.step += 1
            token = torch.tensor([7 if self.step == 450 else 3])
            return torch.full_like(logits, -torch.inf).index_fill(1, token, 0)

    prompts = load_prompts([torch.tensor([1, 2, 3])])
    settings = SamplingSettings(max_new_tokens=460, stop_strings=("ab",), filters=[Script()])
    rollout = draw_rollout(policy, prompts, settings, tokenizer=Counting())
    assert int(rollout.lengths[0]) == 3 + 451
    assert Counting.decodes < 20


def test_a_real_token_zero_is_no_padding(make_palm):
    """The original stripped every id equal to the pad value."""
    prompts = load_prompts([torch.tensor([0, 0, 4])])
    rollout = rollout_of(prompts, [torch.tensor([0, 2, 0])])
    assert rollout.response_mask.sum() == 3
    assert bool(rollout.mask.all())
    policy = ActorCritic(make_palm())
    scores = policy.score(rollout.ids, rollout.mask, rollout.response_mask).log_probs
    assert (scores[0, 2:] < 0).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_values_see_only_the_past(make_palm, pooled, moved):
    policy = moved(ActorCritic(make_palm(), pooled_values=pooled))
    prompts = load_prompts([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    first = rollout_of(prompts, [torch.tensor([6, 7, 8]), torch.tensor([9, 1, 2, 3])])
    second = rollout_of(prompts, [torch.tensor([6, 2, 5]), torch.tensor([9, 1, 7, 4])])
    a, b = (policy(r.ids, r.mask, r.response_mask).values for r in (first, second))
    torch.testing.assert_close(a[0, :4], b[0, :4])  # before the token that differs, and before the one after 6
    torch.testing.assert_close(a[1, :4], b[1, :4])
    assert pooled == torch.allclose(a[0, 4], b[0, 4])


def test_one_base_serves_actor_critic_reference_and_reward_and_takes_no_gradient(make_palm, moved, prompts):
    palm = make_palm()
    policy, reward = moved(ActorCritic(palm)), RewardModel(palm)
    scopes = [*policy.actor_parameters(), *policy.critic_parameters()]
    base = {id(p) for p in palm.palm_parameters()}
    trained_ids = {id(p) for p in [*scopes, *reward.trainable_parameters()]}
    assert {id(p) for module in (policy, reward) for p in module.parameters()} == base | trained_ids
    assert not base & trained_ids
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=4))
    output = policy(rollout.ids, rollout.mask, rollout.response_mask)
    (output.log_probs.sum() + output.values.sum()).backward()
    assert all(parameter.grad is None for parameter in palm.palm_parameters())
    assert all(parameter.grad is not None for parameter in scopes)


def test_values_of_a_row_do_not_depend_on_the_rest_of_the_batch(make_palm, moved, prompts):
    """The original shifted values along the batch: each row was trained on its neighbour's."""
    policy = moved(ActorCritic(make_palm().double()).double())
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=5))
    together = policy(rollout.ids, rollout.mask, rollout.response_mask).values
    for row in range(len(rollout)):
        ids, length = rollout.ids[row : row + 1], int(rollout.lengths[row])
        with policy.as_role("critic") as (network, arguments):
            features = network.hidden(ids[:, :length], **arguments)
        alone = (features @ policy.value_head.weight.t() + policy.value_head.bias)[0, :-1, 0]
        place = rollout.response_mask[row, : length - 1]
        torch.testing.assert_close(together[row, : length - 1][place], alone[place], rtol=1e-9, atol=1e-12)


def test_log_probs_of_hardly_possible_tokens_are_exact(make_palm):
    """The original clamped probabilities at 1e-20: below, log-probabilities were -46 and without gradient."""
    palm = make_palm(num_tokens=13).double()
    with torch.no_grad():
        palm.token_emb.weight.mul_(60)
    policy = ActorCritic(palm, with_critic=False)
    rollout = rollout_of(load_prompts([torch.tensor([1, 2, 3])]), [torch.arange(13)])
    scores = policy.score(rollout.ids, rollout.mask, rollout.response_mask).log_probs[0, 2:]
    wanted = palm(rollout.ids)[0, 2:-1].log_softmax(dim=-1).gather(-1, rollout.ids[0, 3:, None])[:, 0]
    assert wanted.min() < -100
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-9)


def test_a_critic_of_another_width_is_its_own_network(make_palm, prompts):
    policy = ActorCritic(make_palm(), make_palm(dim=24))
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=3))
    assert policy.value_head.weight.shape == (1, 24)
    assert policy(rollout.ids, rollout.mask, rollout.response_mask).values.shape == rollout.response_mask.shape
