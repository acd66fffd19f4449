"""Measures of pairs, summed over batches and processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spin_trainer.data.opponent_answers import Answer
from spin_trainer.data.sft_data import Example
from spin_trainer.model.spin import Comparison

# Means over pairs; log-probabilities and the negative log-likelihood are those of whole answers, in nats.
PER_PAIR = (
    *("loss", "margin", "win_rate", "real_log_prob", "generated_log_prob"),
    *("real_length", "generated_length", "truncation_rate"),
)


class PairMeasures:
    """Sums of what ``Comparison`` and the answers say, in float64 where the device has it.

    Args:
        device: where comparisons are; collectives need it.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(PER_PAIR) + 1, dtype=dtype, device=device)

    def add(
        self, comparison: Comparison, examples: Sequence[Example], answers: Sequence[Answer], weights: Tensor
    ) -> None:
        """Adds a batch; ``weights (b,)`` say how much each pair counts."""
        margins = comparison.margins.detach()
        to = self._sums
        columns = [
            comparison.losses.detach(),
            margins,
            (margins > 0) + 0.5 * (margins == 0),
            comparison.policy_real.detach(),
            comparison.policy_generated.detach(),
            torch.tensor([len(example.response) for example in examples], device=to.device),
            torch.tensor([len(answer.tokens) for answer in answers], device=to.device),
            torch.tensor([float(not answer.finished) for answer in answers], device=to.device),
            torch.ones_like(margins),
        ]
        self._sums += torch.stack([column.to(to.dtype) for column in columns]) @ weights.to(to.dtype)

    def summed(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all pairs of all processes, every process the same."""
        *sums, count = over_processes(self._sums).tolist()
        values = {name: total / count for name, total in zip(PER_PAIR, sums, strict=True)}
        values["nll"] = -values["real_log_prob"]
        return values
