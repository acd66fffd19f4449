"""A reward model trained on pairs of texts, then PPO against it: reward model, policy and reference share ONE base.

The preference is simple: responses in digits are better than responses in letters.
"""

import random

import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM, RewardModel, RewardModelTrainer, RLHFTrainer

torch.manual_seed(0)
chance = random.Random(0)
tokenizer = ByteTokenizer()
palm = PaLM(num_tokens=tokenizer.vocab_size, dim=64, depth=2, dim_head=16, heads=4)


def word(letters: str) -> str:
    return "".join(chance.choices(letters, k=6))


# pretrain a base that writes words of letters and digits
optimizer = torch.optim.AdamW(palm.parameters(), lr=3e-3)
for _ in range(80):
    lines = [f"{word('abcdef')}: {word('0123456789ghijklmnop')}" for _ in range(32)]
    palm(torch.tensor([tokenizer.encode(line) for line in lines]), return_loss=True).backward()
    optimizer.step()
    optimizer.zero_grad()
palm.eval()

pairs = [
    {"prompt": f"{word('abcdef')}: ", "chosen": word("0123456789"), "rejected": word("0123456789ghijklmnop")}
    for _ in range(300)
]
reward_model = RewardModel(palm, dropout=0.0)
accuracy = RewardModelTrainer(
    reward_model=reward_model, pairs=pairs, tokenizer=tokenizer, max_steps=60, learning_rate=5e-3, device="cpu"
).train()
print(f"accuracy on held-out pairs: {accuracy.first_accuracy:.2f} before, {accuracy.last_accuracy:.2f} after")

trainer = RLHFTrainer(
    palm=palm,
    reward_model=reward_model,
    prompts=[f"{word('abcdef')}: " for _ in range(32)],
    tokenizer=tokenizer,
    actor_lr=1e-2,
    critic_lr=1e-2,
    kl_div_loss_weight=0.1,
    epochs=2,
    device="cpu",
)
result = trainer.train(num_episodes=20 * 32, update_timesteps=32, max_new_tokens=6)
for row in (result.metrics[0], result.metrics[-1]):
    print(f"reward {row['reward']:.2f}, KL {row['kl']:.2f}, explained variance {row['explained_variance']:.2f}")
print(trainer.generate(24, "fade: ", num_samples=8).tolist())
print(sorted(palm.finetune_modules), "share one base of", len(palm.palm_parameters()), "tensors")
assert result.metrics[-1]["reward"] > result.metrics[0]["reward"]
