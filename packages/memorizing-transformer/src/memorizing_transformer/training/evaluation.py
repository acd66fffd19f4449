"""Bits per byte on held-out documents, over all tokens and by position.

The position of a token is the number of tokens of its document before it. The gain of a memory is measured on the
same segments with the same weights, with memory and without.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from lm_core.causal_lm import eval_mode
from lm_core.checkpoints.weights import unwrapped
from lm_core.checks import typed
from lm_core.data.documents import Documents
from lm_core.data.packing import IGNORE_INDEX
from lm_core.distributed import all_reduce_sum, rank, world_size
from lm_core.training.accelerator import Precision, autocast
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.segment import XLMemories
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.documents import DocumentSegments

# First position of each bucket of positions.
RANGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a pass over held-out documents.

    Attributes:
        bits_per_byte: summed loss in bits, divided by bytes of text.
        loss: mean over the predicted tokens, in nats.
        tokens: number of predicted tokens.
        by_position: first position of each range that has tokens, number of its tokens, and their mean loss in nats.
    """

    bits_per_byte: float
    loss: float
    tokens: int
    by_position: list[tuple[int, int, float]]


@typed
@torch.no_grad()
def evaluate(
    model: nn.Module,
    documents: Documents,
    *,
    eos_id: int,
    segment_length: int = 512,
    batch_size: int = 4,
    max_documents: int | None = None,
    use_memory: bool = True,
    precision: Precision = "auto",
    progress: bool = False,
    ranges: Sequence[int] = RANGES,
) -> Evaluation:
    """Scores a model, in evaluation mode, on held-out documents; memories are empty at the start of each.

    With several processes all call it: each reads its share of the documents, and all get the same result.

    Args:
        model: a ``MemorizingTransformer`` or ``MemoryAugmentedLM``, which may be compiled or wrapped for several
            processes; it must clear its memories at ``eos_id``.
        documents: the text, in the model's token ids.
        eos_id: token after every document.
        segment_length: tokens in a segment.
        batch_size: documents read in parallel.
        max_documents: number of documents; None for all.
        use_memory: False reads without kNN memories (the XL window stays).
        precision: "auto", "fp32" or "bf16".
        progress: whether a progress bar is shown.
        ranges: first position of each bucket of ``by_position``, ascending from 0.

    Raises:
        ValueError: the model does not clear its memories at ``eos_id``, or the ranges are not ascending from 0.
        TypeError: the model is neither.
    """
    model = unwrapped(model)
    if not isinstance(model, MemorizingTransformer | MemoryAugmentedLM):
        raise TypeError(f"model must be a MemorizingTransformer or a MemoryAugmentedLM, got {type(model).__name__}")
    if list(ranges) != sorted(set(ranges)) or ranges[0] != 0:
        raise ValueError(f"ranges must ascend from 0, got {list(ranges)}")
    if model.eos_id != eos_id:
        raise ValueError(
            f"model must have clear_memories_on_eos_token_id = {eos_id}, which ends the documents, got {model.eos_id}"
        )
    segments = DocumentSegments(
        documents=documents,
        segment_length=segment_length,
        batch_size=batch_size,
        eos_id=eos_id,
        max_documents=max_documents,
        rank=rank(),
        world_size=world_size(),
    )
    device = model.device
    # number of tokens and summed loss of each bucket of positions
    sums = torch.zeros(len(ranges), 2, dtype=torch.float64)
    edges = torch.tensor(ranges[1:], dtype=torch.long)
    window: XLMemories | None = None
    memory: AbstractContextManager[KNNMemoryList | None] = nullcontext()
    if use_memory:
        memory = model.knn_memories_context(batch_size=batch_size)
    with eval_mode(model), memory as memories:
        for segment in tqdm(segments, desc="evaluate", unit="segment", disable=not progress, leave=False):
            ids, labels = segment.ids.to(device), segment.labels.to(device)
            mask = None if segment.mask is None else segment.mask.to(device)
            with autocast(precision, device):
                features, window = model.read(ids, mask=mask, knn_memories=memories, xl_memories=window)
                losses = model.loss(features, labels, reduction="none")
            counted = segment.labels != IGNORE_INDEX
            bucket = torch.bucketize(segment.positions[counted], edges, right=True)
            sums[:, 0].index_add_(0, bucket, torch.ones(bucket.shape[0], dtype=torch.float64))
            sums[:, 1].index_add_(0, bucket, losses.double().cpu()[counted])
    # totals over all processes
    bytes_ = torch.tensor([segments.num_bytes, segments.num_tokens], dtype=torch.float64)
    totals = torch.cat((sums.flatten(), bytes_))
    totals = all_reduce_sum(totals.to(device) if device.type == "cuda" else totals).cpu()
    sums, (num_bytes, num_tokens) = totals[:-2].view(-1, 2), totals[-2:].tolist()
    count, nats = float(sums[:, 0].sum()), float(sums[:, 1].sum())
    pairs = zip(ranges, sums.tolist(), strict=True)
    by_position = [(first, int(tokens), total / tokens) for first, (tokens, total) in pairs if tokens]
    bits = nats / math.log(2) / (count * num_bytes / num_tokens)
    return Evaluation(bits, nats / count, int(count), by_position)
