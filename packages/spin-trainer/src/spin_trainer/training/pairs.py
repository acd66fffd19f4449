"""Pairs of a better (human) and a worse (generated) answer: comparison by policy and reference, metrics, validation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from lm_core.distributed import all_reduce_sum, rank, world_size
from spin_trainer.data.iteration_data import IterationData, Pair
from spin_trainer.data.opponent_answers import Answer, batches_by_length
from spin_trainer.data.sft_data import Example
from spin_trainer.model.response_scores import ResponseScores, collate
from spin_trainer.model.spin import Comparison

# Metrics averaged over pairs; log-probabilities are those of whole answers, in nats.
PER_PAIR = (
    *("loss", "margin", "win_rate", "real_log_prob", "generated_log_prob"),
    *("real_length", "generated_length", "truncation_rate"),
)


class PairMetrics:
    """Running sums of the metrics of pairs, kept on the device, in float64 where the device supports it."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(PER_PAIR) + 1, dtype=dtype, device=device)

    def add(
        self, comparison: Comparison, examples: Sequence[Example], answers: Sequence[Answer], weights: Tensor
    ) -> None:
        """Adds a batch; ``weights (b,)`` holds the weight of each pair."""
        margins, device = comparison.margins.detach(), self.sums.device
        columns = [
            comparison.losses.detach(),
            margins,
            (margins > 0) + 0.5 * (margins == 0),
            comparison.policy_real.detach(),
            comparison.policy_generated.detach(),
            torch.tensor([len(example.response) for example in examples], device=device),
            torch.tensor([len(answer.tokens) for answer in answers], device=device),
            torch.tensor([float(not answer.finished) for answer in answers], device=device),
            torch.ones_like(margins),
        ]
        self.sums += torch.stack([column.to(self.sums.dtype) for column in columns]) @ weights.to(self.sums.dtype)

    def means(self) -> dict[str, float]:
        """Means over the pairs of all processes; every process must call it and gets the same result."""
        *sums, count = all_reduce_sum(self.sums).tolist()
        values = {name: total / count for name, total in zip(PER_PAIR, sums, strict=True)}
        values["nll"] = -values["real_log_prob"]
        return values


class PairComparison:
    """Compares better answers with worse ones.

    Args:
        scores: log-probabilities of answers under the policy.
        comparison: loss of a batch from its log-probabilities; see ``SPIN.comparison``.
        reference: reference log-probabilities, computed live; arguments as for ``response_log_probs``.
    """

    def __init__(
        self,
        scores: ResponseScores,
        comparison: Callable[[Tensor, Tensor, Tensor], Comparison],
        reference: Callable[..., Tensor] | None = None,
    ) -> None:
        self.scores = scores
        self.comparison = comparison
        self.reference = reference

    def compare(
        self,
        examples: Sequence[Example],
        answers: Sequence[Answer],
        reference: tuple[list[float], list[float]] | None = None,
        *,
        scores: nn.Module | None = None,
    ) -> Comparison:
        """Loss, margin and log-probabilities of each pair, from one forward of the policy.

        Args:
            examples: prompts with the better answers.
            answers: the worse answers.
            reference: reference log-probabilities of better and of worse answers; computed live if None.
            scores: module to call instead of the plain ``ResponseScores``, such as its DDP wrapper.
        """
        prompts = [example.prompt for example in examples]
        both = [*(example.response for example in examples), *(answer.tokens for answer in answers)]
        device = next(self.scores.parameters()).device
        ids, answer, mask = collate([*prompts, *prompts], both, device)
        if reference is None:
            assert self.reference is not None
            # before the policy's forward: a frozen reference runs in the policy's module
            reference_scores = self.reference(ids, answer, mask)
        policy = (self.scores if scores is None else scores)(ids, answer, mask)
        if reference is not None:
            reference_scores = torch.tensor([*reference[0], *reference[1]], dtype=policy.dtype, device=policy.device)
        return self.comparison(policy, reference_scores, answer)

    @torch.no_grad()
    def validate(
        self,
        data: IterationData,
        compared: Callable[[IterationData, list[Pair], list[Answer]], Comparison],
        batch_size: int,
    ) -> dict[str, float]:
        """Metrics of all held-out pairs; each process takes its share of the batches."""
        device = next(self.scores.parameters()).device
        metrics = PairMetrics(device)
        lengths = [len(example.prompt) + len(example.response) for example in data.dataset]
        with eval_mode(self.scores):
            for index, rows in enumerate(batches_by_length(lengths, batch_size)):
                if index % world_size() == rank():
                    pairs = [Pair(row) for row in rows]
                    answers = [data.answer(pair) for pair in pairs]
                    weights = torch.ones(len(rows), device=device)
                    comparison = compared(data, pairs, answers)
                    metrics.add(comparison, [data.dataset[row] for row in rows], answers, weights)
        return metrics.means()
