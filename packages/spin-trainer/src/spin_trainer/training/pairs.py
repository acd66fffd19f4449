"""Updates and validations of a policy on pairs of a human and a generated answer."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from lm_core.distributed import all_reduce_sum, rank, world_size
from lm_core.generation.decoding import eval_mode
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard, finish_update
from spin_trainer.data.iteration_data import IterationData
from spin_trainer.data.opponent_answers import Answer, Sampling, answer_prompts, batches_by_length, seed_of
from spin_trainer.data.pairs import MicroBatch, Pair, PairOrder
from spin_trainer.model.spin import SPIN, Comparison
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.pair_comparison import PairComparison
from spin_trainer.training.pair_measures import PairMeasures
from spin_trainer.training.parallel import ParallelPolicy
from spin_trainer.training.state import RunState


class PairTraining:
    """What is done with pairs: the loss, an update, a validation.

    Args:
        spin: policy and reference.
        settings: of self-play.
        sampling: how the opponent answers, where it answers live.
        parallel: how the policy is spread over processes.
        compare: pairs by policy and reference.
        guard: skips updates whose loss is not finite.
        state: where the run is.
    """

    def __init__(
        self,
        *,
        spin: SPIN,
        settings: SelfPlaySettings,
        sampling: Sampling,
        parallel: ParallelPolicy,
        compare: PairComparison,
        guard: NonFiniteGuard,
        state: RunState,
    ) -> None:
        self.spin, self.settings, self.sampling = spin, settings, sampling
        self.parallel, self.compare, self.guard, self.state = parallel, compare, guard, state

    def update(
        self, data: IterationData, order: PairOrder, optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule
    ) -> dict[str, Any]:
        """One optimizer update; its metrics."""
        started = time.monotonic()
        measures = PairMeasures(self.spin.device)
        batches = order.micro_batches(self.state.update)
        total = len(order.chosen(self.state.update))
        self.spin.policy_model.train()
        for number, batch in enumerate(batches, start=1):
            with self.parallel.synchronising(number == len(batches)):
                answers = self._answers(data, batch, number)
                comparison = self._compared(data, batch.pairs, answers, scores=self.parallel.called)
                weights = torch.tensor(batch.weights, device=self.spin.device)
                # gradients are averaged over processes, so each divides by its part of the pairs
                loss = (comparison.losses * weights).sum() * world_size() / total
                self.parallel.backward(loss)
            measures.add(comparison, [data.dataset[pair.row] for pair in batch.pairs], answers, weights)
        values = measures.summed(all_reduce_sum)
        finished = finish_update(
            self.state.steps + 1,
            values["loss"],
            self.spin.trainable_parameters(),
            optimizer=optimizer,
            schedule=schedule,
            guard=self.guard,
            max_grad_norm=self.settings.max_grad_norm,
        )
        self.spin.update_ema()
        return {
            **values,
            "iteration": self.state.iteration,
            **finished,
            "pairs_per_second": round(total / max(time.monotonic() - started, 1e-9), 2),
        }

    @torch.no_grad()
    def validate(self, data: IterationData) -> dict[str, float]:
        """Measures of all held-out pairs, each process its share; nothing is trained."""
        measures = PairMeasures(self.spin.device)
        lengths = [len(example.prompt) + len(example.response) for example in data.dataset]
        with self.parallel.whole(), eval_mode(self.spin.policy):
            for number, rows in enumerate(batches_by_length(lengths, self.settings.batch_size)):
                if number % world_size() == rank():
                    pairs = [Pair(row) for row in rows]
                    answers = [data.answer(pair) for pair in pairs]
                    comparison = self._compared(data, pairs, answers)
                    weights = torch.ones(len(rows), device=self.spin.device)
                    measures.add(comparison, [data.dataset[row] for row in rows], answers, weights)
        return measures.summed(all_reduce_sum)

    def live_answers(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        """Answers that the opponent gives now, drawn by ``seed``."""
        if self.settings.opponent == "policy":
            return answer_prompts(self.spin.policy, prompts, self.sampling, seed)
        with self.spin.ref_model.model() as reference:
            return answer_prompts(reference, prompts, self.sampling, seed)

    def _answers(self, data: IterationData, batch: MicroBatch, number: int) -> list[Answer]:
        if self.settings.opponent == "reference":
            return [data.answer(pair) for pair in batch.pairs]
        prompts = [data.dataset[pair.row].prompt for pair in batch.pairs]
        place = number * world_size() + rank()
        seed = seed_of("live", self.settings.seed, self.state.iteration, self.state.update, place)
        return self.live_answers(prompts, seed)

    def _compared(
        self, data: IterationData, pairs: Sequence[Pair], answers: Sequence[Answer], scores: Any = None
    ) -> Comparison:
        examples = [data.dataset[pair.row] for pair in pairs]
        return self.compare(
            [example.prompt for example in examples],
            [example.response for example in examples],
            [answer.tokens for answer in answers],
            None if self.settings.live_reference else data.reference(pairs),
            scores=scores,
        )
