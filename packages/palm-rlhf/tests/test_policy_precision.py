"""bf16: the same products in bfloat16 everywhere, so that old and new probabilities are of one distribution."""

import pytest
import torch

from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.experience import score_rollout
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_a_policy_learns_in_bfloat16_and_its_weights_stay_float32(make_palm, trainer, kind):
    more = {"critic_lr": 1e-2} if kind is RLHFTrainer else {"group_size": 8}
    ppo = trainer(make_palm(), kind, actor_lr=1e-2, kl_div_loss_weight=0.0, epochs=2, precision="bf16", **more)
    result = ppo.train(num_episodes=256, update_timesteps=32, max_new_tokens=5)
    assert result.metrics[-1]["reward"] > result.metrics[0]["reward"] + 0.2
    assert all(parameter.dtype == torch.float32 for parameter in ppo.actor_critic.parameters())
    # bfloat16 has 8 bits: rows of another width or batch are rounded elsewhere
    assert all(row["ratio_deviation_at_start"] < 0.05 for row in result.metrics)


def test_bfloat16_is_used_and_gives_log_probs_and_values_in_float32(make_palm, prompt_ids):
    policies = [ActorCritic(make_palm(), precision=precision) for precision in ("fp32", "bf16")]
    rollout = draw_rollout(policies[0], load_prompts(prompt_ids), SamplingSettings(max_new_tokens=5))
    exact, rounded = (score_rollout(policy, rollout, torch.zeros(6), batch_size=4) for policy in policies)
    for name in ("log_probs", "reference", "values"):
        assert getattr(rounded, name).dtype == torch.float32
        torch.testing.assert_close(getattr(rounded, name), getattr(exact, name), atol=0.2, rtol=0)
    assert not torch.equal(rounded.log_probs, exact.log_probs)


@pytest.mark.plain
@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_fsdp_and_deepspeed_are_refused_by_name_and_leave_the_model_alone(make_palm, trainer, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    palm = make_palm()
    before = list(palm.state_dict())
    with pytest.raises(ValueError, match=rf"(FSDP|DeepSpeed).* not supported.*{variable}"):
        trainer(palm)
    assert list(palm.state_dict()) == before
