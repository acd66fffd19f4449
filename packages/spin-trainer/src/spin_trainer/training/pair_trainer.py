"""The loop of the trainers on pairs of answers: make the pairs, score them, train, promote the policy.

Algorithm 1 of arXiv 2401.01335, which DPO (one iteration on pairs of a dataset) and self-rewarding (pairs that a score
selects) share. At the beginning of an iteration the policy is the reference: it scores all answers once, onto disk
(``data.iteration_data``). Checkpoints hold everything that the next update depends on, so a run that is killed in any
phase and resumed ends with the weights of an uninterrupted one, bit for bit (``lm_core.training.session``).
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.data.epochs import UpdateOrder, seed_of
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.training.session import SavedValue, TrainingResult
from spin_trainer.data.iteration_data import Interrupted, IterationData, Pair
from spin_trainer.data.opponent_answers import Answer, Engine
from spin_trainer.model.spin import Comparison
from spin_trainer.training.config import FineTuningSettings
from spin_trainer.training.pairs import PairComparison, PairMetrics
from spin_trainer.training.policy_trainer import PolicyTrainer
from spin_trainer.training.state import BestIteration, RunState
from spin_trainer.training.weights import fingerprint_of_weights

# Metrics that curves.png shows of a self-play run.
SHOWN = ("loss", "nll", "margin", "win_rate", "real_log_prob", "generated_log_prob", "generated_length", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class SPINResult(TrainingResult):
    """Result of a run in iterations; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        iterations: number of completed iterations.
        best_iteration: number of iterations after which held-out likelihood was best; None without validation data.
        history: held-out metrics before training and after each iteration.
        iterations_folder: folder with the policy after each iteration, in the format of its own library.
    """

    iterations: int
    best_iteration: int | None
    history: list[dict[str, float]]
    iterations_folder: Path

    @property
    def steps(self) -> int:
        """Number of completed updates."""
        return self.step


class PairTrainer(PolicyTrainer, ABC):
    """Trains a policy on pairs of a better and a worse answer, in iterations.

    Subclasses make the pairs of an iteration in ``_iteration_data``.

    Args:
        policy_model: see ``PolicyTrainer``.
        policy: see ``PolicyTrainer``.
        settings: see ``PolicyTrainer``.
        comparison: loss of a batch from policy and reference log-probabilities and the answer mask; see
            ``SPIN.comparison``.
        reference: live reference log-probabilities, for a reference that is not stored.
        needs_reference: False for a loss without reference.
        iterations: rounds of pairs, training and promotion.
        patience: iterations without better held-out likelihood before stopping at the best; None never stops.
        selected_by: held-out metric by which an iteration is the best; see ``BestIteration``.
        names: names of metrics in the log, by the name in ``PairMetrics``.
        engine: engine that generates answers instead of the policy; see ``started_engine``.
        common: further arguments of ``PolicyTrainer``.
    """

    def __init__(
        self,
        policy_model: nn.Module,
        policy: Any,
        settings: FineTuningSettings,
        *,
        comparison: Callable[[Tensor, Tensor, Tensor], Comparison],
        reference: Callable[..., Tensor] | None = None,
        needs_reference: bool = True,
        iterations: int = 1,
        patience: int | None = None,
        selected_by: str = "nll",
        names: Mapping[str, str] | None = None,
        engine: Any = None,
        **common: Any,
    ) -> None:
        super().__init__(policy_model, policy, settings, **common)
        assert self.checkpoint_folder is not None
        self.run_folder = self.checkpoint_folder
        self.iterations = iterations
        self.needs_reference = needs_reference
        self.live_reference = reference is not None
        self.pairs = PairComparison(self.scores, comparison, reference)
        self.state = RunState()
        self.best = BestIteration(self.run_folder / "best", patience, metric=selected_by)
        self.names = dict(names or {})
        self.engine = engine
        self._sent_step: int | None = None  # update whose weights the engine has
        self._valid: IterationData | None = None

    def _register_pairs(
        self,
        *,
        identity: Callable[[], Mapping[str, Any]],
        curves: Sequence[str],
        state: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        """Registers the run with the session; subclasses call it last in their constructor."""
        self._register(
            identity=identity,
            state={
                "run": SavedValue(lambda: asdict(self.state), lambda state: vars(self.state).update(state)),
                "best": SavedValue(lambda: {"history": self.best.history}, lambda state: vars(self.best).update(state)),
                **(state or {}),
            },
            max_steps=self.planned_updates,
            curves=[name for each in curves for name in (each, f"validation_{each}")],
            **arguments,
        )

    # -------------------------------------------------------------------------------- what differs by trainer

    @abstractmethod
    def _iteration_data(self) -> tuple[IterationData, IterationData | None]:
        """Pairs of the iteration, for training and held out, made now or read from disk; every process calls it."""

    def _reference_policy(self) -> Any:
        """The ``CausalLM`` that answers and scores at the beginning of an iteration."""
        return self.policy

    @abstractmethod
    def _pairs_of(self, iteration: int) -> int | None:
        """Number of pairs of an iteration; None if it is not known beforehand."""

    def _learning_rate(self) -> float:
        return self.settings.learning_rate

    def _decay_steps(self) -> int | None:
        return None

    def _answers(self, data: IterationData, pairs: Sequence[Pair], part: int) -> list[Answer]:
        """The worse answers of a micro-batch, the ``part``-th of its update over all processes."""
        return [data.answer(pair) for pair in pairs]

    def _after_update(self) -> None:
        """Called after each optimizer step."""

    def _export_path(self) -> Path:
        """Folder, below that of the run, of the policy after the current iteration."""
        return Path("iterations") / f"iteration-{self.iteration}"

    # --------------------------------------------------------------------------------------------------- loop

    @property
    def iteration(self) -> int:
        """Number of completed iterations."""
        return self.state.iteration

    @property
    def planned_updates(self) -> int | None:
        """Number of updates of the whole run unless it stops early; None if it depends on the pairs."""
        counts = [self._pairs_of(iteration) for iteration in range(self.iterations)]
        known = [self._updates_of(count) for count in counts if count is not None]
        total = sum(known) if len(known) == len(counts) else None
        return min((limit for limit in (total, self.settings.max_steps) if limit is not None), default=None)

    def _updates_of(self, pairs: int) -> int:
        """Number of updates of an iteration that ``max_steps`` does not cut short."""
        return self._order(pairs).updates_per_epoch * self.settings.epochs

    def _run(self, overwrite: bool) -> SPINResult:
        """Runs all iterations, or resumes the run; the body of ``train``."""
        state = self.state
        planned = self.planned_updates
        with self._training() as session:
            # with an update of the iteration done, it is not promoted yet
            while (
                state.iteration < self.iterations
                and session.outcome == "finished"
                and (state.update > 0 or planned is None or session.step < planned)
            ):
                if self.best.stops:
                    session.outcome = "stopped early"
                    break
                # make the pairs: until its first update the policy is the reference
                title = f"iteration {state.iteration + 1} of {self.iterations}"
                session.progress.set_description(f"{title}, generate")
                if state.update == 0:
                    state.opponent = fingerprint_of_weights(self.policy_model)
                try:
                    train, self._valid = self._iteration_data()
                except Interrupted:
                    session.outcome = "interrupted"
                    break
                # train on the pairs
                order = self._order(len(train.pairs), "pairs", self.iteration)
                updates = self._updates_of(len(train.pairs))
                if planned is not None:
                    updates = min(updates, planned - (session.step - state.update))
                session.progress.set_description(f"{title}, train")
                self._begin_training(updates)
                for _ in session.steps(session.step + updates - state.update, ends=False):
                    session.log(self._update(train, order))
                # promote the policy to the reference of the next iteration
                if session.outcome == "finished":
                    self._promote(overwrite)
            if session.outcome in ("finished", "stopped early"):
                self.best.put_back(self.policy_model)
                if self.engine is not None:
                    self.engine.close()
        return session.result(
            SPINResult,
            iterations=state.iteration,
            best_iteration=self.best.number,
            history=list(self.best.history),
            iterations_folder=self.run_folder / "iterations",
        )

    def _complete(self, splits: Sequence[IterationData | None], *, scores: bool = True) -> None:
        """Computes the rows of these data that are not on disk yet, with the policy as long as it is the reference.

        With ``scores=False`` answers alone.
        """
        policy = self._reference_policy() if self.state.update == 0 else None
        engine = None if policy is None or self.engine is None else self._answering()
        with contextlib.nullcontext() if policy is None else self.session.gathered():
            for split in splits:
                if split is not None:
                    scored = scores and self.needs_reference and not self.live_reference
                    split.complete(policy, lambda: self.session.stop_requested, scores=scored, engine=engine)

    def _answering(self) -> Any:
        """The generator of answers: the policy, or the engine with the policy's current weights."""
        if self.engine is None:
            return self.policy
        if self._sent_step != self.session.step:
            self.engine.update_weights(self.policy)
            self._sent_step = self.session.step
        return self.engine

    def _begin_training(self, updates: int) -> None:
        """Begins an iteration's training: seeds, first validation, new optimizer."""
        session, settings = self.session, self.settings
        if self.state.update == 0:
            seed_everything(seed_of("training", settings.seed, self.iteration, rank()) % 2**32)
            if not self.best.history:
                self._validate_iteration()
        elif session.optimizer is not None:
            return  # a second call of ``train`` within an iteration
        session.use_optimizer(*self._optimizer(updates, self._learning_rate(), self._decay_steps()))

    def _update(self, data: IterationData, order: UpdateOrder) -> dict[str, Any]:
        """Makes one optimizer update; returns its metrics."""
        started, session, state = time.monotonic(), self.session, self.state
        metrics = PairMetrics(self.device)
        total = len(order.indices(state.update))
        for index, rows in enumerate(session.micro_batches(self._micro_batches(order, state.update))):
            # a process without a pair takes one with weight 0, so that all run the same number of forwards
            pairs = [data.pairs[row] for row in rows or [0]]
            weights = torch.full((len(pairs),), float(bool(rows)), device=self.device)
            answers = self._answers(data, pairs, index * world_size() + rank())
            comparison = self._compared(data, pairs, answers, session.module)
            # gradients are averaged over processes, hence the factor world_size
            session.backward((comparison.losses * weights).sum() * world_size() / total)
            metrics.add(comparison, [data.dataset[pair.row] for pair in pairs], answers, weights)
        values = {**self._named(metrics.means()), **session.optimizer_step(), "iteration": self.iteration}
        self._after_update()
        if state.update == 0:
            values |= {f"opponent_{name}": value for name, value in data.summary().items()}
        state.update += 1
        return {**values, "pairs_per_second": round(total / max(time.monotonic() - started, 1e-9), 2)}

    def _compared(
        self, data: IterationData, pairs: Sequence[Pair], answers: Sequence[Answer], scores: nn.Module | None = None
    ) -> Comparison:
        """Compares pairs, with their stored reference log-probabilities unless these are live or not needed."""
        reference = None
        if not self.needs_reference:
            reference = [0.0] * len(pairs), [0.0] * len(pairs)
        elif not self.live_reference:
            reference = data.reference(pairs)
        return self.pairs.compare([data.dataset[pair.row] for pair in pairs], answers, reference, scores=scores)

    def _promote(self, overwrite: bool) -> None:
        """Ends an iteration: validates, exports the policy, saves the checkpoint that the next one starts from."""
        state = self.state
        self._validate_iteration()
        state.iteration += 1
        state.update = 0
        state.previous_opponent = state.opponent
        self.save(self._export_path(), overwrite=overwrite)
        self.session.use_optimizer(None)
        self.session.save()

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {self.names.get(name, name): value for name, value in metrics.items()}

    def _validate(self) -> dict[str, float]:
        if self._valid is None:
            return {}
        with self.session.gathered():
            metrics = self.pairs.validate(self._valid, self._compared, self.settings.rows_per_pass)
        return {f"validation_{name}": value for name, value in self._named(metrics).items()}

    def _validate_iteration(self) -> None:
        """Validates, if there is held-out data, and adds the metrics to the history."""
        metrics = {name.removeprefix("validation_"): value for name, value in self.session.validate().items()}
        if metrics:
            self.best.add(metrics, self.policy_model)


def started_engine(
    engine: Engine, model: Any, tokenizer: Any, *, max_length: int, arguments: Mapping[str, Any] | None
) -> Any:
    """The engine of answers of this name, with the architecture of ``model``; None for "lm_core".

    Args:
        engine: name of the engine.
        model: the policy, a model of transformers.
        tokenizer: its tokenizer.
        max_length: longest prompt with its answer, in tokens.
        arguments: further arguments of ``lm_core.engines.vllm.VLLMEngine``.

    Raises:
        ValueError: arguments for "lm_core", or several processes.
        ImportError, TypeError: see ``VLLMEngine``.
    """
    if engine == "lm_core":
        if arguments:
            raise ValueError(f"engine_arguments go with engine 'vllm', got {dict(arguments)} and 'lm_core'")
        return None
    from lm_core.engines.vllm import VLLMEngine

    settings = {"max_model_len": max_length, **(arguments or {})}
    return VLLMEngine(model, tokenizer=tokenizer, requirement="spin-trainer[vllm]", **settings)
