"""Two tiny Hugging Face models built from configurations, and one of x-transformers: composed, trained, asked.

python hugging_face.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from x_transformers import Decoder, TransformerWrapper

from calm_pytorch import CALM, AugmentParams

torch.manual_seed(0)
anchor = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
)
reads_prompt = GPT2LMHeadModel(
    GPT2Config(vocab_size=64, n_embd=48, n_layer=8, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
)
reads_along = TransformerWrapper(num_tokens=64, max_seq_len=128, attn_layers=Decoder(dim=32, depth=4, heads=2))

calm = CALM(anchor, [AugmentParams(reads_prompt), AugmentParams(reads_along, shared_sequence=True)])
print(calm.describe())

prompt = torch.randint(0, 64, (8, 6))
seq = torch.cat((prompt, prompt.flip(1)), dim=1)
counted = torch.arange(12).expand(8, 12) >= 6
optimizer = torch.optim.AdamW(list(calm.trainable_parameters()), lr=3e-3)
for step in range(60):
    loss = calm(seq, prompt=prompt, mask=counted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"{step:3} loss {loss.item():.3f}")
print(calm.generate(prompt[:1], 12, temperature=0.0).tolist())
