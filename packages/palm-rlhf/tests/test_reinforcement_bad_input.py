"""Bad input to rewards, prompts and trainers: each case names its argument, before anything is changed."""

import math

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM
from palm_rlhf.data.preferences import load_preferences
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.rewards import ClassifierReward, as_reward
from palm_rlhf.reward.trainer import RewardModelTrainer
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import rollout_of
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

pytestmark = pytest.mark.plain

PROMPTS = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
PAIR = {"prompt": [1], "chosen": [2], "rejected": [3]}


def zeros(ids, prompt_lengths):
    return torch.zeros(ids.shape[0])


def tiny_palm(**changes):
    return PaLM(**{"dim": 8, "num_tokens": 13, "depth": 1, "dim_head": 4, "heads": 2, **changes})


CONSTRUCTION = [
    ({"palm": None}, ValueError, "give one of palm, policy, actor_critic, got none"),
    ({"policy": "PaLM"}, ValueError, "give one of palm, policy, actor_critic, got palm and policy"),
    ({"palm": 3}, TypeError, "palm must be a PaLM or a causal language model, got int"),
    ({"prompts": ["a"]}, ValueError, "got prompts and prompt_token_ids"),
    ({"prompt_token_ids": []}, ValueError, "prompts must hold at least one prompt"),
    ({"prompt_token_ids": [torch.tensor([], dtype=torch.long)]}, ValueError, r"prompts\[0\] must hold at least one"),
    ({"prompt_token_ids": [torch.tensor([1.5])]}, TypeError, r"prompts\[0\] must be token ids"),
    ({"prompt_token_ids": [torch.tensor([99])]}, ValueError, r"prompts must hold token ids in \[0, 13\), got 99"),
    ({"prompt_token_ids": None, "prompts": ["text"]}, ValueError, "text, which needs a tokenizer"),
    ({"tokenizer": object()}, TypeError, "tokenizer must have encode and decode, got object"),
    ({"prompt_token_ids": None, "prompts_path": "missing.jsonl"}, FileNotFoundError, "prompts_path"),
    ({"reward_model": zeros}, ValueError, "give one of reward_model, reward"),
    ({"reward": 5}, TypeError, "reward must be a RewardModel, a callable"),
    ({"reward": []}, ValueError, "reward must hold at least one reward"),
    ({"reward": "nocolon"}, ValueError, 'reward must be "module:function"'),
    ({"reward": "no_such_module:f"}, ValueError, "cannot be imported"),
    ({"actor_lr": 0.0}, ValueError, "actor_lr must be"),
    ({"critic_lr": math.nan}, ValueError, "critic_lr must be"),
    ({"actor_wd": -1.0}, ValueError, "actor_wd must be"),
    ({"betas": (1.0, 0.9)}, ValueError, "betas must be"),
    ({"eps_clip": 1.0}, ValueError, "eps_clip must be"),
    ({"value_clip": 0.0}, ValueError, "value_clip must be"),
    ({"beta_s": -0.1}, ValueError, "beta_s must be"),
    ({"kl_div_loss_weight": -0.1}, ValueError, "kl_div_loss_weight must be"),
    ({"kl_target": -1.0}, ValueError, "kl_target must be"),
    ({"kl_estimator": "k4"}, TypeError, "kl_estimator"),
    ({"gamma": 1.1}, ValueError, "gamma must be"),
    ({"gae_lambda": -0.1}, ValueError, "gae_lambda must be"),
    ({"minibatch_size": 0}, ValueError, "minibatch_size must be at least 1"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be"),
    ({"max_grad_norm": 0.5, "max_norm": 2.0}, ValueError, "max_grad_norm and max_norm are one argument"),
    ({"pad_id": 1, "pad_value": 2}, ValueError, "pad_id and pad_value are one argument"),
    ({"objective": "rloo", "group_size": 1}, ValueError, "group_size must be at least 2"),
    ({"objective": "reinforce", "epochs": 2}, ValueError, "epochs must be 1"),
    ({"aggregation": "constant"}, ValueError, "constant_length"),
    ({"actor_dropout": 1.0}, ValueError, "actor_dropout must be"),
    ({"actor_lora_r": 0}, ValueError, "actor_lora_r must be at least 1"),
    ({"value_range": (1.0, 0.0)}, ValueError, "value_range must be"),
    ({"device": "tpu"}, ValueError, "device must be"),
    ({"seed": -1}, ValueError, "seed must be"),
    ({"precision": "fp8"}, TypeError, "precision"),
    ({"epsclip": 0.1}, TypeError, "'epsclip' is no option of PPO, RLConfig or ActorCritic; did you mean eps_clip"),
    ({"objective": "grpo", "value_clip": 0.1}, TypeError, "'value_clip' is no option of GRPO"),
    ({"objective": "pppo"}, ValueError, "objective must be one of ppo, grpo, rloo, reinforce, .*got 'pppo'"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), CONSTRUCTION)
def test_trainers_refuse_by_name_and_leave_the_model_alone(make_palm, changes, kind, message):
    palm = make_palm()
    before = palm.state_dict()
    with pytest.raises(kind, match=message):
        RLHFTrainer(**{"palm": palm, "prompt_token_ids": PROMPTS, "reward": zeros, "device": "cpu", **changes})
    assert list(palm.state_dict()) == list(before)


TRAINING = [
    ({}, "give max_new_tokens or max_seq_len"),
    ({"max_seq_len": 3}, r"prompts must be shorter than max_seq_len 3, the longest has 3 tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"max_new_tokens": 4, "temperature": 0.0}, "temperature must be"),
    ({"max_new_tokens": 4, "eos_token": 13}, r"eos_id must be in \[0, 13\), got 13"),
    ({"max_new_tokens": 4, "eos_token": 3, "eos_id": 3}, "eos_id and eos_token are one argument, got"),
    ({"max_new_tokens": 4, "num_episodes": 0}, "num_episodes must be at least 1"),
    ({"max_new_tokens": 4, "stop_strings": ["x"]}, "stop_strings need a tokenizer"),
    ({"max_new_tokens": 4, "update_timesteps": 0}, "update_timesteps must be at least 1"),
    ({"max_new_tokens": 4, "max_seq_len": 1}, "max_seq_len must be at least 2"),
    ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens must be"),
]


@pytest.mark.parametrize(("changes", "message"), TRAINING)
def test_train_refuses_by_name(make_palm, changes, message):
    trainer = RLHFTrainer(palm=make_palm(), prompt_token_ids=PROMPTS, reward=zeros, device="cpu")
    with pytest.raises(ValueError, match=message):
        trainer.train(**{"num_episodes": 4, **changes})
    assert trainer.updates == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda ids, prompt_lengths: torch.zeros(3), r"must return shape \(4,\)"),
        (lambda ids, prompt_lengths: torch.full((4,), math.nan), "rewards must be finite, got nan for response 0"),
        (lambda prompts, completions: [1.0] * len(prompts), "a reward on texts needs a tokenizer"),
    ],
)
def test_wrong_rewards_stop_training_before_an_update(make_palm, reward, message):
    trainer = RLHFTrainer(palm=make_palm(), prompt_token_ids=PROMPTS, reward=reward, device="cpu")
    with pytest.raises(ValueError, match=message):
        trainer.train(num_episodes=4, update_timesteps=4, max_new_tokens=3)
    assert trainer.updates == 0


def rlhf(palm, **changes):
    return RLHFTrainer(palm=palm, prompt_token_ids=PROMPTS, reward=zeros, device="cpu", **changes)


OTHERS = [
    (lambda palm: GRPOTrainer(palm=palm, group_size=1), "group_size must be at least 2"),
    (lambda palm: GRPOTrainer(palm=palm, group_size=0), "group_size must be at least 1"),
    (lambda palm: ActorCritic(palm, tiny_palm(num_tokens=12)), "critic must know all 13 tokens of the policy, got 12"),
    (lambda palm: ActorCritic(palm, actor_lora_scope="x", critic_lora_scope="x"), "scopes of different names"),
    (lambda palm: ActorCritic(lambda ids: ids), "palm must have parameters to train"),
    (lambda palm: ActorCritic(torch.nn.Embedding(13, 13)), "actor_lora needs a PaLM or a Hugging Face model"),
    (lambda palm: ActorCritic(torch.nn.Embedding(13, 13), None, False, False, False), "critic needs a network that"),
    (lambda palm: (ActorCritic(palm, actor_lora_r=2), ActorCritic(palm, actor_lora_r=4)), "exists with lora_r 2"),
    (lambda palm: rlhf(palm).step(rollout_of(load_prompts(PROMPTS), PROMPTS), torch.zeros(3)), r"shape \(2,\)"),
    (lambda palm: rlhf(palm).step(rollout_of(load_prompts(PROMPTS), [torch.tensor([99])] * 2)), "rollout must hold"),
    (lambda palm: rollout_of(load_prompts(PROMPTS), [torch.tensor([1])]), "responses must be one for each of 2"),
    (lambda palm: rollout_of(load_prompts(PROMPTS), [torch.tensor([], dtype=torch.long)] * 2), "at least one token"),
    (lambda palm: rlhf(palm).generate(9, PROMPTS[0], 0), "num_samples must be at least 1"),
    (lambda palm: RewardModel(palm, num_binned_output=1), "num_binned_output must be 0 or at least 2"),
    (lambda palm: RewardModel(palm, dropout=1.0), "dropout must be"),
    (lambda palm: RewardModel(palm)(torch.ones(1, 3).long(), prompt_lengths=torch.ones(2).long()), "prompt_lengths"),
    (lambda palm: RewardModel(palm)(torch.ones(1, 3).long(), mask=torch.ones(1, 2).bool()), "mask must have the shape"),
    (lambda palm: RewardModel(palm)(torch.ones(1, 3).long(), labels=torch.ones(2)), "labels must have shape"),
    (
        lambda palm: RewardModel(palm, num_binned_output=3)(torch.ones(1, 3).long(), labels=torch.tensor([3])),
        r"labels must be in \[0, 3\)",
    ),
    (lambda palm: RewardModelTrainer(reward_model=RewardModel(palm), pairs=[]), "pairs must hold at least one"),
    (lambda palm: RewardModelTrainer(reward_model=RewardModel(palm), pairs=[PAIR], max_steps=0), "max_steps must"),
    (
        lambda palm: RewardModelTrainer(reward_model=RewardModel(palm), pairs=[{**PAIR, "chosen": [99]}]),
        r"pairs must hold token ids in \[0, 13\), got 99",
    ),
    (lambda palm: load_preferences([{"prompt": [1]}]), "must have prompt, chosen and rejected"),
    (lambda palm: load_preferences([{**PAIR, "chosen": "text"}]), "needs a tokenizer"),
    (lambda palm: load_preferences([PAIR, {"prompt": [1], "response": [2], "label": 1}]), "got both"),
    (lambda palm: load_prompts([{"question": "x"}], tokenizer=ByteTokenizer()), r"prompts\[0\] must have a column"),
    (lambda palm: load_prompts([""], tokenizer=ByteTokenizer()), r"prompts\[0\] must hold at least one token"),
    (lambda palm: ClassifierReward(torch.nn.Linear(1, 1), None), "num_labels=1"),
    (lambda palm: as_reward("module:"), 'reward must be "module:function"'),
]


@pytest.mark.parametrize(("call", "message"), OTHERS)
def test_everything_else_refuses_by_name(make_palm, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_palm())
