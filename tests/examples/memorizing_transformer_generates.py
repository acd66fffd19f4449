"""A MemorizingTransformer decodes through the one loop of `lm_core`: greedily, by sampling, and by beams.

Its prompt is longer than a segment, so the earlier part of it is read from the kNN memory.

python memorizing_transformer_generates.py
"""

import torch

from lm_core import beam_search, generate, top_p
from memorizing_transformer import MemorizingTransformer

torch.manual_seed(0)
model = MemorizingTransformer(num_tokens=64, dim=32, depth=2, dim_head=16, heads=2, segment_length=16).eval()
prompts = [torch.randint(1, 64, (40,)), torch.randint(1, 64, (23,))]

greedy = generate(model, prompts, max_new_tokens=8, temperature=0.0)
alone = [generate(model, prompt[None], max_new_tokens=8, temperature=0.0).tokens[0] for prompt in prompts]
print(greedy.tokens.tolist())
assert torch.equal(greedy.tokens, torch.stack(alone))  # a batch is each prompt alone, each with its own memory

sampled = generate(
    model,
    prompts,
    max_new_tokens=8,
    temperature=0.8,
    filters=[lambda logits: top_p(logits, p=0.9)],
    generator=torch.Generator().manual_seed(1),
)
print(sampled.tokens.tolist())
beams = beam_search(model, prompts[0][None], max_new_tokens=8, beams=4)
print(beams.tokens.tolist())
