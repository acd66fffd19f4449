"""Pairs of a human and a generated answer: comparison by policy and reference, metrics, validation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from lm_core.distributed import all_reduce_sum, rank, world_size
from spin_trainer.data.iteration_data import IterationData, Pair
from spin_trainer.data.opponent_answers import Answer, Sampling, answer_prompts, batches_by_length
from spin_trainer.data.sft_data import Example
from spin_trainer.model.response_scores import ResponseScores, collate
from spin_trainer.model.spin import SPIN, Comparison
from spin_trainer.training.config import SelfPlaySettings

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
    """Compares human answers with the opponent's; ``sampling`` is for an opponent that answers live."""

    def __init__(self, spin: SPIN, settings: SelfPlaySettings, sampling: Sampling) -> None:
        self.spin = spin
        self.settings = settings
        self.sampling = sampling
        self.scores = ResponseScores(spin.policy, precision=settings.precision)

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
            examples: prompts with human answers.
            answers: answers of the opponent.
            reference: reference log-probabilities of human and of generated answers; computed here if None.
            scores: module to call instead of the plain ``ResponseScores``, such as its DDP wrapper.
        """
        prompts = [example.prompt for example in examples]
        both = [*(example.response for example in examples), *(answer.tokens for answer in answers)]
        ids, answer, mask = collate([*prompts, *prompts], both, self.spin.device)
        if reference is None:
            # before the policy's forward: a frozen reference runs in the policy's module
            reference_scores = self.spin.reference_log_probs(ids, answer, mask, precision=self.settings.precision)
        policy = (self.scores if scores is None else scores)(ids, answer, mask)
        if reference is not None:
            reference_scores = torch.tensor([*reference[0], *reference[1]], dtype=policy.dtype, device=policy.device)
        return self.spin.comparison(policy, reference_scores, answer)

    def of_pairs(
        self, data: IterationData, pairs: Sequence[Pair], answers: Sequence[Answer], scores: nn.Module | None = None
    ) -> Comparison:
        """``compare`` for pairs of an iteration, with stored reference log-probabilities unless they are live."""
        reference = None if self.settings.live_reference else data.reference(pairs)
        return self.compare([data.dataset[pair.row] for pair in pairs], answers, reference, scores=scores)

    def live_answers(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        """Answers that the opponent generates now, drawn with ``seed``."""
        if self.settings.opponent == "policy":
            return answer_prompts(self.spin.policy, prompts, self.sampling, seed)
        with self.spin.ref_model.model() as reference:
            return answer_prompts(reference, prompts, self.sampling, seed)

    @torch.no_grad()
    def validate(self, data: IterationData) -> dict[str, float]:
        """Metrics of all held-out pairs; each process takes its share of the batches."""
        metrics = PairMetrics(self.spin.device)
        lengths = [len(example.prompt) + len(example.response) for example in data.dataset]
        with eval_mode(self.spin.policy):
            for index, rows in enumerate(batches_by_length(lengths, self.settings.batch_size)):
                if index % world_size() == rank():
                    pairs = [Pair(row) for row in rows]
                    answers = [data.answer(pair) for pair in pairs]
                    weights = torch.ones(len(rows), device=self.spin.device)
                    comparison = self.of_pairs(data, pairs, answers)
                    metrics.add(comparison, [data.dataset[row] for row in rows], answers, weights)
        return metrics.means()
