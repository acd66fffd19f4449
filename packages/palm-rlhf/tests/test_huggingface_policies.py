"""Hugging Face policies: actor, critic and reference are peft adapters on one base, and all holds as for PaLM."""

from functools import partial

import pytest
import torch

from lm_core.generation.sampling import top_k, top_p
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.experience import score_rollout
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(kind="llama"):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(
        vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    )
    return transformers.GPT2LMHeadModel(config).eval()


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(13, (n,), generator=generator) for n in (2, 7, 4, 3)]


def shaken(policy, scale=0.2):
    with torch.no_grad():
        for parameter in [*policy.actor_parameters(), *policy.critic_parameters()]:
            parameter.add_(torch.randn_like(parameter) * scale)
    return policy


FILTERS = {"none": (), "top-k": (partial(top_k, k=4),), "top-p": (partial(top_p, p=0.6),)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("filters", list(FILTERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ratio_is_one_before_the_first_update(kind, lora, filters, dtype):
    policy = ActorCritic(tiny(kind).to(dtype), actor_lora=lora, critic_lora=lora)
    policy.to(dtype)
    torch.manual_seed(9)
    shaken(policy, 0.2 if lora else 0.01)
    settings = SamplingSettings(max_new_tokens=6, temperature=0.7, filters=FILTERS[filters], eos_id=5, min_new_tokens=2)
    rollout = draw_rollout(policy, load_prompts(prompts()), settings, generator=torch.Generator().manual_seed(0))
    # old ones a row at a time, new ones all together: the training forward has other batches than the rollout's
    old = score_rollout(policy, rollout, torch.zeros(4), batch_size=1)
    new = policy.eval()(rollout.ids, rollout.mask, rollout.response_mask, temperature=0.7, kept=rollout.kept)
    ratio = (new.log_probs - old.log_probs).exp()
    assert bool(rollout.response_mask.any())
    assert (ratio - 1).abs().max() < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("filters", list(FILTERS))
def test_log_probs_are_of_the_distribution_that_was_sampled(filters):
    """Against one row at a time, without cache, padding or stored sets."""
    policy = ActorCritic(tiny().double(), with_critic=False)
    policy.double()
    torch.manual_seed(9)
    shaken(policy)
    settings = SamplingSettings(max_new_tokens=5, temperature=0.7, filters=FILTERS[filters])
    rollout = draw_rollout(policy, load_prompts(prompts()), settings, generator=torch.Generator().manual_seed(1))
    scores = score_rollout(policy, rollout, torch.zeros(4), batch_size=4)
    for row in range(4):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        ids = rollout.ids[row, :end]
        with torch.no_grad(), policy.as_role("actor") as (network, arguments):
            logits = network(ids[None], **arguments)[0] / 0.7
        for position in range(start, end):
            filtered = logits[position - 1][None]
            for function in settings.filters:
                filtered = function(filtered)
            wanted = filtered[0].log_softmax(-1)[ids[position]].item()
            assert scores.log_probs[row, position - 1].item() == pytest.approx(wanted, abs=1e-10)


def test_the_reference_is_the_model_as_it_came_and_only_adapters_train():
    model = tiny()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits.detach().log_softmax(dim=-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    base = {id(parameter) for parameter in model.parameters()}
    policy = shaken(ActorCritic(model))
    mask = torch.ones(1, 4, dtype=torch.bool)
    judgement = policy(ids, mask, mask[:, 1:])
    (judgement.log_probs.sum() + judgement.values.sum()).backward()
    trained = [*policy.actor_parameters(), *policy.critic_parameters()]
    assert not base & {id(parameter) for parameter in trained}
    assert all(parameter.grad is not None for parameter in trained)
    assert all(p.grad is None for p in policy.parameters() if id(p) in base)
    reference = policy.score(ids, mask, mask[:, 1:], role="reference")
    torch.testing.assert_close(reference.log_probs[0], before)
    assert not torch.allclose(judgement.log_probs, reference.log_probs)
    assert all(parameter.requires_grad for parameter in trained)


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_a_hugging_face_policy_learns_and_its_run_resumes(kind, tmp_path):
    def reward(ids, prompt_lengths, lengths):
        position = torch.arange(ids.shape[1])
        response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
        return ((ids == 5) & response).sum(dim=1) / response.sum(dim=1)

    def trainer(name):
        rates = {"critic_lr": 1e-2} if kind is RLHFTrainer else {"group_size": 8}
        return kind(
            policy=tiny(), prompt_token_ids=prompts(), reward=reward, actor_lr=2e-2, kl_div_loss_weight=0.0, epochs=2,
            device="cpu", checkpoint_dir=tmp_path / name, **rates,
        )  # fmt: skip

    whole = trainer("whole")
    result = whole.train(num_episodes=320, update_timesteps=32, max_new_tokens=5)
    assert result.metrics[-1]["reward"] > result.metrics[0]["reward"] + 0.3
    first = trainer("two")
    first.train(num_episodes=160, update_timesteps=32, max_new_tokens=5)
    second = trainer("two")
    second.train(num_episodes=320, update_timesteps=32, max_new_tokens=5)
    for name, value in whole.actor_critic.state_dict().items():
        assert torch.equal(value, second.actor_critic.state_dict()[name]), name


def test_a_peft_model_of_the_user_is_trained_further_by_its_own_adapter():
    import peft

    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    policy = ActorCritic(model, with_critic=False)
    names = [
        name for name, parameter in policy.named_parameters() if any(parameter is p for p in policy.actor_parameters())
    ]
    assert names
    assert all(".mine." in name for name in names)


def test_a_prompt_as_long_as_the_model_allows_is_refused_and_one_shorter_is_answered():
    def trainer(length):
        return RLHFTrainer(
            policy=tiny("gpt2"), prompt_token_ids=[torch.ones(2).long(), torch.ones(length).long()], device="cpu",
            reward=lambda ids, prompt_lengths: torch.zeros(len(ids)),
        )  # fmt: skip

    with pytest.raises(ValueError, match="prompts must be shorter than the model's limit 64, the longest has 64"):
        trainer(64).train(num_episodes=4, max_new_tokens=4)
    assert trainer(63).train(num_episodes=2, max_new_tokens=4).metrics[0]["response_length"] == 1
