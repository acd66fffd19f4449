"""Hugging Face policies: actor and critic are peft adapters on one base, with the guarantees of PaLM policies."""

import pytest
import torch

from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_reference_is_the_model_as_it_came_and_only_adapters_train(make_hugging_face, moved):
    model = make_hugging_face()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits.detach().log_softmax(dim=-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    base = {id(parameter) for parameter in model.parameters()}
    policy = moved(ActorCritic(model), 0.2)
    mask = torch.ones(1, 4, dtype=torch.bool)
    output = policy(ids, mask, mask[:, 1:])
    (output.log_probs.sum() + output.values.sum()).backward()
    trained = [*policy.actor_parameters(), *policy.critic_parameters()]
    assert not base & {id(parameter) for parameter in trained}
    assert all(parameter.grad is not None for parameter in trained)
    assert all(p.grad is None for p in policy.parameters() if id(p) in base)
    reference = policy.score(ids, mask, mask[:, 1:], role="reference")
    torch.testing.assert_close(reference.log_probs[0], before)
    assert not torch.allclose(output.log_probs, reference.log_probs)
    assert all(parameter.requires_grad for parameter in trained)


@pytest.mark.parametrize("kind", [RLHFTrainer, GRPOTrainer])
def test_a_hugging_face_policy_learns_and_its_run_resumes(make_hugging_face, trainer, kind, tmp_path):
    def run(name):
        rates = {"critic_lr": 1e-2} if kind is RLHFTrainer else {"group_size": 8}
        return trainer(
            make_hugging_face(), kind, actor_lr=2e-2, kl_div_loss_weight=0.0, epochs=2, checkpoint_dir=tmp_path / name,
            **rates,
        )  # fmt: skip

    whole = run("whole")
    result = whole.train(num_episodes=192, update_timesteps=32, max_new_tokens=5)
    assert result.metrics[-1]["reward"] > result.metrics[0]["reward"] + 0.3
    first = run("two")
    first.train(num_episodes=96, update_timesteps=32, max_new_tokens=5)
    second = run("two")
    second.train(num_episodes=192, update_timesteps=32, max_new_tokens=5)
    for name, value in whole.actor_critic.state_dict().items():
        assert torch.equal(value, second.actor_critic.state_dict()[name]), name


def test_a_peft_model_of_the_user_is_trained_further_by_its_own_adapter(make_hugging_face):
    import peft

    model = peft.get_peft_model(
        make_hugging_face(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine"
    )
    policy = ActorCritic(model, with_critic=False)
    names = [
        name for name, parameter in policy.named_parameters() if any(parameter is p for p in policy.actor_parameters())
    ]
    assert names
    assert all(".mine." in name for name in names)


def test_a_prompt_as_long_as_the_model_allows_is_refused_and_one_shorter_is_answered(make_hugging_face, trainer):
    def run(length):
        return trainer(make_hugging_face("gpt2"), prompt_token_ids=[torch.ones(2).long(), torch.ones(length).long()])

    with pytest.raises(ValueError, match="prompts must be shorter than the model's limit 64, the longest has 64"):
        run(64).train(num_episodes=4, max_new_tokens=4)
    assert run(63).train(num_episodes=2, max_new_tokens=4).metrics[0]["response_length"] == 1
