"""bf16: products in bfloat16 everywhere alike, so that old and new probabilities are of one distribution."""

import pytest
import torch

from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.experience import score_rollout
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(13, (n,), generator=generator) for n in (2, 7, 4, 3)]


def fives(ids, prompt_lengths, lengths):
    position = torch.arange(ids.shape[1])
    response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return ((ids == 5) & response).sum(dim=1) / response.sum(dim=1)


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_a_policy_learns_in_bfloat16_and_its_weights_stay_float32(make_palm, kind):
    palm = make_palm()
    more = {"critic_lr": 1e-2} if kind is RLHFTrainer else {"group_size": 8}
    trainer = kind(
        palm=palm, prompt_token_ids=prompts(), reward=fives, actor_lr=1e-2, kl_div_loss_weight=0.0, epochs=2,
        device="cpu", precision="bf16", **more,
    )  # fmt: skip
    result = trainer.train(num_episodes=256, update_timesteps=32, max_new_tokens=5)
    assert result.metrics[-1]["reward"] > result.metrics[0]["reward"] + 0.2
    assert all(parameter.dtype == torch.float32 for parameter in trainer.actor_critic.parameters())
    # bfloat16 has 8 bits: rows of another width or batch are rounded elsewhere
    assert all(row["ratio_deviation_at_start"] < 0.05 for row in result.metrics)


def test_bfloat16_is_used_and_gives_log_probs_and_values_in_float32(make_palm):
    policies = [ActorCritic(make_palm(), precision=precision) for precision in ("fp32", "bf16")]
    rollout = draw_rollout(policies[0], load_prompts(prompts()), SamplingSettings(max_new_tokens=5))
    exact, rounded = (score_rollout(policy, rollout, torch.zeros(4), batch_size=4) for policy in policies)
    for name in ("log_probs", "reference", "values"):
        assert getattr(rounded, name).dtype == torch.float32
        torch.testing.assert_close(getattr(rounded, name), getattr(exact, name), atol=0.2, rtol=0)
    assert not torch.equal(rounded.log_probs, exact.log_probs)


@pytest.mark.plain
@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_fsdp_and_deepspeed_are_refused_by_name_and_leave_the_model_alone(make_palm, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    palm = make_palm()
    before = list(palm.state_dict())
    with pytest.raises(ValueError, match=rf"(FSDP|DeepSpeed).* not supported.*{variable}"):
        RLHFTrainer(palm=palm, prompt_token_ids=prompts(), reward=fives, device="cpu")
    assert list(palm.state_dict()) == before


@pytest.mark.plain
def test_the_commands_refuse_fsdp_by_name(capsys):
    from palm_rlhf.cli import main

    with pytest.raises(SystemExit):
        main(["ppo", "--fsdp"])
    assert "unknown argument --fsdp" in capsys.readouterr().err


@pytest.mark.plain
def test_a_precision_that_there_is_not_is_refused(make_palm):
    with pytest.raises((ValueError, TypeError), match="precision"):
        RLHFTrainer(palm=make_palm(), prompt_token_ids=prompts(), reward=fives, device="cpu", precision="fp8")
