"""GRPO, without a critic, on a Hugging Face model: answers are rewarded for every token that is a 5.

python grpo_on_hugging_face.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_core import generate
from palm_rlhf import GRPOTrainer

torch.manual_seed(0)
policy = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
)


def reward(sequences: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    in_answer = torch.arange(sequences.shape[1]) >= prompt_lengths[:, None]
    return ((sequences == 5) & in_answer).float().sum(dim=1) / 8


prompts = [torch.tensor([1, 2, 3, 4]), torch.tensor([6, 7])]
trainer = GRPOTrainer(
    policy=policy,
    reward=reward,
    prompt_token_ids=prompts,
    group_size=8,
    actor_lora=False,
    actor_lr=3e-3,
    device="cpu",
)
result = trainer.train(num_episodes=480, update_timesteps=32, max_new_tokens=8)
rewards = [row["reward"] for row in result.metrics]
print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
print(generate(policy, prompts, max_new_tokens=8, temperature=0.0).tokens.tolist())
assert rewards[-1] > rewards[0]
