"""memorizing_transformer: attention over a large external memory of past keys and values.

>>> import torch
>>> from memorizing_transformer import MemorizingTransformer
>>> model = MemorizingTransformer(num_tokens=256, dim=64, depth=2, dim_head=32, heads=2)
>>> segments = torch.randint(0, 256, (2, 3, 128)).unbind(1)
>>> with model.knn_memories_context(batch_size=2) as memories:
...     for segment in segments:
...         logits = model(segment, knn_memories=memories)
>>> logits.shape, memories.sizes
(torch.Size([2, 128, 256]), [[384, 384]])
"""

from memorizing_transformer.memory.datastore import Datastore
from memorizing_transformer.memory.knn_memory import KNNMemory, Retrieved
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.generation_cache import MemoryCache
from memorizing_transformer.model.knn_attention import KNNAttention
from memorizing_transformer.model.knn_lm import KNNLM, build_datastore
from memorizing_transformer.model.segment import XLMemories
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.retrofit import open_gates, retrofit

__all__ = [
    "KNNLM",
    "Datastore",
    "KNNAttention",
    "KNNMemory",
    "KNNMemoryList",
    "MemorizingTransformer",
    "MemoryAugmentedLM",
    "MemoryCache",
    "Retrieved",
    "XLMemories",
    "build_datastore",
    "open_gates",
    "retrofit",
]

__version__ = "0.1.0"
