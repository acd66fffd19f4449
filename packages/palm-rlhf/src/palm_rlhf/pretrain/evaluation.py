"""How well a language model predicts held-out text, in bits per byte.

Bits per byte compare across tokenizers where nats per token do not: the summed cross-entropy in nats, over ln 2, over
the bytes of text that the predicted tokens stand for. The first token of a document has nothing before it and is not
predicted.
"""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

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
    """What a pass over held-out documents gave.

    Attributes:
        bits_per_byte: summed loss in bits, over bytes of text.
        loss: mean over the predicted tokens, in nats.
        tokens: how many were predicted.
    """

    bits_per_byte: float
    loss: float
    tokens: int


@torch.no_grad()
def score(objective: NextTokenLoss, batches: ValidationBatches, *, progress: bool = False) -> Evaluation:
    """Scores every batch, in evaluation mode; every process calls it with its share and gets the result of all.

    Raises:
        ValueError: a token id is not below the model's ``num_tokens``.
    """
    device = next(objective.parameters()).device
    vocabulary = int(objective.model.num_tokens)  # type: ignore[arg-type]
    one = torch.ones((), device=device)
    nats, labels = [], 0
    with eval_mode(objective):
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress, leave=False):
            check_ids(batch.ids, vocabulary, "documents")
            labels += batch.num_labels
            rows = batch.to(device)
            nats.append(objective(rows.ids, rows.labels, rows.document_ids, one))
    # summed on the CPU in double precision: many small sums are added, and an accelerator may have no float64
    total = sum_over_processes(float(torch.stack(nats).double().cpu().sum()), device)
    count = round(sum_over_processes(labels, device))
    return Evaluation(bits_per_byte(total, count, batches.documents), total / count, count)


def evaluate(
    model: nn.Module,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Evaluation:
    """Bits per byte of a model on documents.

    Args:
        model: a language model with ``hidden(ids, document_ids=...)``, ``output_weight`` and ``num_tokens``.
        documents: the text, in the ids of ``tokenizer``.
        tokenizer: says which id ends a document.
        sequence_length: tokens a row; each token is predicted from those before it in its row.
        batch_size: rows at a time.
        max_tokens: about so many tokens, spread evenly over the documents; None for all.
        precision: "auto", "fp32" or "bf16".
        progress: shows a progress bar.

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
    return score(NextTokenLoss(model, precision=precision), batches, progress=progress)
