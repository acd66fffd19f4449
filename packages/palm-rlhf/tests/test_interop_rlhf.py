"""Reward models and actor-critics of PaLM-rlhf-pytorch."""

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from palm_rlhf import PaLM
from palm_rlhf.interop.original_rlhf import actor_critic_from_palm_rlhf_pytorch, reward_model_from_palm_rlhf_pytorch
from palm_rlhf.interop.weight_files import convert_checkpoint
from palm_rlhf.reward.model import RewardModel


@torch.no_grad()
@pytest.mark.parametrize("case", ["reward_scalar", "reward_binned", "reward_full"])
def test_reward_models_with_and_without_bins_and_lora_predict_as_the_original(assert_same, golden, case):
    state, values = golden[case]
    model = reward_model_from_palm_rlhf_pytorch(state).eval().double()
    assert model.num_binned_output == (0 if case == "reward_scalar" else 5)
    assert (model.scope is None) == (case == "reward_full")
    arguments = (values["ids"], values["mask"], values["prompt-mask"])
    if case == "reward_scalar":
        assert_same(model(*arguments), values["rewards"])
    else:
        assert_same(model.logits(*arguments), values["logits"])


@torch.no_grad()
@pytest.mark.parametrize("case", ["actor_critic", "actor_critic_full"])
def test_an_actor_critic_gives_the_logits_and_values_of_the_original(assert_same, golden, case):
    state, values = golden[case]
    policy = actor_critic_from_palm_rlhf_pytorch(state).eval().double()
    ids = values["ids"]
    with policy.as_role("actor") as (network, arguments):
        assert_same(network(ids, **arguments), values["logits"])
    mask = torch.ones(ids.shape, dtype=torch.bool)
    seen = policy(ids, mask, mask[:, 1:]).values
    assert_same(seen, values["values"][:, :-1])


def test_actor_and_critic_of_the_original_share_one_base_where_their_bases_are_equal(golden):
    state, _ = golden["actor_critic"]
    policy = actor_critic_from_palm_rlhf_pytorch(state)
    assert policy.critic is policy.actor
    assert set(policy.palm.finetune_modules) == {"actor", "critic"}
    moved = {name: value + 0.01 if name.endswith("attn_out.weight") and "actor" in name else value for name, value in
             state.items()}  # fmt: skip
    apart = actor_critic_from_palm_rlhf_pytorch(moved)
    assert apart.critic is not apart.actor


@pytest.mark.archives
@torch.no_grad()
def test_converting_a_reward_model_file_gives_a_folder_that_opens_as_one(assert_same, golden, tmp_path):
    state, values = golden["reward_scalar"]
    torch.save(state, tmp_path / "old.pt")
    model = RewardModel.from_pretrained(convert_checkpoint(tmp_path / "old.pt", tmp_path / "new")).eval().double()
    rewards = model(values["ids"], mask=values["mask"], prompt_mask=values["prompt-mask"])
    assert_same(rewards, values["rewards"])
    palm = PaLM.from_pretrained(convert_checkpoint(tmp_path / "old.pt", tmp_path / "palm", prefix="palm"))
    assert "reward" in palm.finetune_modules


@pytest.mark.plain
def test_what_is_no_reward_model_or_actor_critic_is_refused_by_name(golden):
    state, _ = golden["causal"]
    with pytest.raises(CheckpointError, match=r"missing keys: prompt_embed, response_embed, to_pred\.weight"):
        reward_model_from_palm_rlhf_pytorch(state)
    with pytest.raises(CheckpointError, match="must hold the PaLMs actor_palm and critic_palm or critic"):
        actor_critic_from_palm_rlhf_pytorch(state)
    state, _ = golden["actor_critic"]
    headless = {name: value for name, value in state.items() if not name.endswith("bias")}
    with pytest.raises(CheckpointError, match="missing keys: value_head"):
        actor_critic_from_palm_rlhf_pytorch(headless)
