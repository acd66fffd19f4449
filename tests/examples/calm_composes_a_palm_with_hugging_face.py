"""CALM composes a PaLM, which stays as it is, with a Hugging Face model that reads along, and decodes with both caches.

python calm_composes_a_palm_with_hugging_face.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from calm_pytorch import CALM, AugmentParams
from lm_core import generate
from palm_rlhf import PaLM

torch.manual_seed(0)
VOCABULARY = 64
anchor = PaLM(num_tokens=VOCABULARY, dim=64, depth=4, dim_head=16, heads=4)
augment = GPT2LMHeadModel(
    GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=8, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
)
before = {name: value.clone() for name, value in anchor.state_dict().items()}

calm = CALM(anchor, AugmentParams(augment, shared_sequence=True))
print(calm.describe())

rows = torch.arange(16)[:, None] + torch.arange(12)  # each token follows the one before it
optimizer = torch.optim.AdamW(list(calm.trainable_parameters()), lr=1e-2)
for step in range(60):
    loss = calm(rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"{step:3} loss {loss.item():.3f}")
print(f"end loss {loss.item():.3f}")

calm.eval()
continued = generate(calm.as_causal_lm(), rows[:2, :6], max_new_tokens=6, temperature=0.0)
print(continued.tokens.tolist())
uncached = generate(calm.as_causal_lm(), rows[:2, :6], max_new_tokens=6, temperature=0.0, use_cache=False)
assert torch.equal(continued.tokens, uncached.tokens)
assert all(torch.equal(value, before[name]) for name, value in anchor.state_dict().items())
