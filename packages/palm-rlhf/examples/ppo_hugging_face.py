"""PPO for a Hugging Face model with peft: actor and critic are adapters on one frozen base, the reference is the base.

The model is tiny and random, so nothing is downloaded; ``AutoModelForCausalLM.from_pretrained("folder")`` works the
same. The reward is a function of texts in the form that TRL uses.
"""

import peft
import torch
import transformers

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import RLHFTrainer

torch.manual_seed(0)
tokenizer = ByteTokenizer()
config = transformers.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.1,
)
base = transformers.LlamaForCausalLM(config)
frozen = base.lm_head.weight.detach().clone()
# the model's own adapter becomes the actor; a model without one gets an adapter on all its linear layers
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"), adapter_name="actor")


def letters(prompts: list[str], completions: list[str], language: list[str]) -> list[float]:
    """Fraction of lower-case letters in each response; ``language`` is a column of the prompts' rows."""
    assert set(language) == {"en", "la"}
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]


trainer = RLHFTrainer(
    policy=model,
    prompts=[{"prompt": "Hello, ", "language": "en"}, {"prompt": "Ave", "language": "la"}],
    tokenizer=tokenizer,
    reward=letters,
    actor_lr=1e-2,
    critic_lr=1e-2,
    kl_div_loss_weight=0.01,
    epochs=2,
    seed=1,
    device="cpu",
)
result = trainer.train(num_episodes=12 * 32, update_timesteps=32, max_new_tokens=8)
for row in (result.metrics[0], result.metrics[-1]):
    print(f"reward {row['reward']:.2f}, KL from the reference {row['kl']:.2f} nats a response")
assert result.metrics[-1]["reward"] > result.metrics[0]["reward"] + 0.1
assert torch.equal(base.lm_head.weight, frozen)
assert sorted(model.peft_config) == ["actor", "critic"]
