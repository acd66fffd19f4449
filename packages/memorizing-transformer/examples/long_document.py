"""Reads a long text into a memory, saves the memory, and continues the text from it in another process."""

import tempfile
from pathlib import Path

import torch

from lm_core.generation.generate import generate
from memorizing_transformer import MemorizingTransformer

torch.manual_seed(0)
model = MemorizingTransformer(num_tokens=256, dim=64, depth=2, dim_head=32, heads=2, segment_length=64)
text = torch.tensor(list(Path(__file__).read_bytes()))[None]

with model.knn_memories_context(batch_size=1) as memories, torch.no_grad():
    for segment in text.split(64, dim=1):
        model(segment, knn_memories=memories)
    with tempfile.TemporaryDirectory() as folder:
        memories.save(folder)
        again = model.create_knn_memories(batch_size=1)
        again.load(folder)
    print("tokens in memory:", memories.sizes)

result = generate(model, torch.tensor([list(b"import ")]), max_new_tokens=16, temperature=0.0, knn_memories=again)
print("new tokens:", result.tokens.tolist())
