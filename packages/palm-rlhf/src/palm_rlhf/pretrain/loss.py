"""The training objective as a module: cross-entropy of packed rows, divided by a count of tokens.

A mean over each micro-batch would weigh its tokens by the number of its labels. So the sum is divided by the number of
labels of the WHOLE update (all micro-batches, all processes).

It is a module so that DDP wraps, FSDP shards and ``torch.compile`` compiles weights and loss together: the output layer
is used while its weight is gathered.

Legend: b batch, n sequence.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.data.packing import IGNORE_INDEX
from lm_core.losses.losses import linear_cross_entropy
from lm_core.training.accelerator import Precision, autocast


class NextTokenLoss(nn.Module):
    """Summed cross-entropy of a packed batch, divided by ``normalizer``.

    Args:
        model: a language model with ``hidden(ids, document_ids=...)`` and ``output_weight``, such as ``PaLM``.
        precision: precision of matrix products; see ``lm_core.training.accelerator.pick_precision``.
    """

    def __init__(self, model: nn.Module, *, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

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
            hidden = model.hidden(ids, document_ids=document_ids)
            return linear_cross_entropy(
                hidden, model.output_weight, labels, ignore_index=IGNORE_INDEX, normalizer=normalizer
            )
