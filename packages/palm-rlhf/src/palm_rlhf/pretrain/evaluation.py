"""Evaluation of a language model on held-out text, in bits per byte.

Bits per byte are comparable across tokenizers, unlike nats per token: the summed cross-entropy in nats, divided by ln 2
and by the bytes of text that the predicted tokens decode to. The first token of a document is not predicted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import eval_mode
from lm_core.checks import check_ids
from lm_core.data.documents import Documents
from lm_core.data.packing import ValidationBatches, bits_per_byte
from lm_core.distributed import sum_over_processes
from lm_core.tokenizers import Tokenizer
from lm_core.training.accelerator import Precision
from palm_rlhf.pretrain.loss import NextTokenLoss


@dataclass(frozen=True)
class Evaluation:
    """Result of a pass over held-out documents.

    Attributes:
        bits_per_byte: summed loss in bits, divided by the bytes of text.
        loss: mean loss of the predicted tokens, in nats.
        tokens: number of predicted tokens.
    """

    bits_per_byte: float
    loss: float
    tokens: int


@torch.no_grad()
def score(objective: NextTokenLoss, batches: ValidationBatches, *, progress: bool = False) -> Evaluation:
    """Scores every batch, in evaluation mode; every process passes its share and gets the result of all.

    Raises:
        ValueError: a token id is not below the model's ``num_tokens``.
    """
    device = next(objective.parameters()).device
    model: Any = objective.model
    vocabulary = getattr(model, "num_tokens", None) or model.vocab_size
    unit = torch.ones((), device=device)
    nats, labels = [], 0
    with eval_mode(objective):
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
            if vocabulary is not None:
                check_ids(batch.ids, vocabulary, "documents")
            labels += batch.num_labels
            rows = batch.to(device)
            nats.append(objective(rows.ids, rows.labels, rows.document_ids, unit))
    # summed on the CPU in double precision: many small sums are added, and an accelerator may have no float64
    total = sum_over_processes(float(torch.stack(nats).double().cpu().sum()), device)
    count = round(sum_over_processes(labels, device))
    return Evaluation(bits_per_byte(total, count, batches.documents), total / count, count)


def evaluate(
    model: Any,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: Precision = "auto",
    progress: bool = False,
    **arguments: Any,
) -> Evaluation:
    """Bits per byte of a model on documents.

    Args:
        model: a PaLM, or anything ``lm_core.adapters.as_causal_lm`` accepts.
        documents: documents in the ids of ``tokenizer``.
        tokenizer: tokenizer with the ids that end and pad documents.
        sequence_length: tokens per row; each is predicted from the earlier ones of its row.
        batch_size: rows per forward pass.
        max_tokens: approximate number of tokens, taken evenly from the documents; None for all.
        precision: "auto", "fp32" or "bf16".
        progress: shows a progress bar.
        **arguments: further arguments of the model, such as ``finetune_scope``.

    Raises:
        ValueError: a size below 1, or a token id that is not below the model's ``num_tokens``.
    """
    batches = ValidationBatches(
        documents=documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id or 0,
        max_tokens=max_tokens,
    )
    objective = NextTokenLoss(as_causal_lm(model), precision=precision, **arguments)
    return score(objective, batches, progress=progress)
