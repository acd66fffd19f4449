"""The training objective as a module: cross-entropy of packed rows, divided by a count of tokens.

A mean over each micro-batch would weigh its tokens by the number of its labels. So the sum is divided by the number of
labels of the WHOLE update (all micro-batches, all processes).

It is a module so that DDP wraps, FSDP shards and ``torch.compile`` compiles weights and loss together: the output layer
is used while its weight is gathered.

Legend: b batch, n sequence.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.data.packing import IGNORE_INDEX
from lm_core.losses.losses import linear_cross_entropy, token_log_probs
from lm_core.nn.masking import right_pad
from lm_core.training.accelerator import Precision, autocast


class NextTokenLoss(nn.Module):
    """Summed cross-entropy of a packed batch, divided by ``normalizer``.

    Args:
        model: a language model with ``hidden(ids, document_ids=...)`` and ``output_weight``, such as ``PaLM``; or any
            other ``CausalLM``, which gets each document of a row as a row of its own.
        precision: precision of matrix products; see ``lm_core.training.accelerator.pick_precision``.
        **arguments: further arguments of the model, such as ``finetune_scope``.
    """

    def __init__(self, model: nn.Module, *, precision: Precision = "fp32", **arguments: Any) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.arguments = arguments
        self.takes_documents = "document_ids" in inspect.signature(getattr(model, "hidden", lambda: None)).parameters

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b n"],
        document_ids: Int[Tensor, "b n"],
        normalizer: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss in nats; positions with the label -100 are excluded."""
        model: Any = self.model
        with autocast(self.precision, ids.device):
            if not self.takes_documents:
                pieces, mask = _documents(ids, labels, document_ids)
                scores = token_log_probs(model, pieces, mask=mask, **self.arguments)
                return -scores.sum() / normalizer
            hidden = model.hidden(ids, document_ids=document_ids, **self.arguments)
            return linear_cross_entropy(
                hidden, model.output_weight, labels, ignore_index=IGNORE_INDEX, normalizer=normalizer
            )


def _documents(ids: Tensor, labels: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The documents of packed rows with their last label, ``(pieces, n)`` right-padded, and their mask."""
    pieces = []
    for row, row_labels, owners in zip(ids, labels, document_ids, strict=True):
        for owner in owners.unique().tolist():
            counted = row_labels[(owners == owner) & (row_labels != IGNORE_INDEX)]
            if counted.numel():
                pieces.append(torch.cat((row[owners == owner][:1], counted)))
    return right_pad(pieces or [ids[0, :1]], 0)
