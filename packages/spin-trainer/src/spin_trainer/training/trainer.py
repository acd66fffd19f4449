"""Self-play fine-tuning, the whole loop: the opponent answers, the player learns to tell, the player is promoted.

Algorithm 1 of arXiv 2401.01335. At the beginning of an iteration the policy is the opponent, so it answers all prompts
and scores all answers, once and onto the disk (``iteration_data``); then it trains on pairs (``pair_training``); then
the next begins.

A checkpoint holds all that the next update depends on (``training_state``), and answers are kept row by row: a run that
was killed in either phase goes on to the weights, bit for bit, of one that was not (with equal settings, device, torch
and number of processes). At step N come first the row of metrics, then a validation, then the checkpoint.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.checkpoints.checkpoint import on_main_process
from lm_core.checks import typed
from lm_core.data.epochs import UpdateOrder, seed_of
from lm_core.distributed import rank, world_size
from lm_core.generation.sampling import top_p
from lm_core.rng import restore_rng, seed_everything
from lm_core.training.accelerator import InterruptHandler, pick_device, pick_precision
from lm_core.training.fsdp import check_shardable
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard, finish_update, optimizer_groups
from lm_core.training.run_directory import RunDirectory
from spin_trainer.data.iteration_data import IterationData, Pair
from spin_trainer.data.opponent_answers import Answer, Interrupted, Sampling
from spin_trainer.data.sft_data import Overlong, SFTDataset, as_sft_dataset
from spin_trainer.model.dropout import dropout_of
from spin_trainer.model.reference import FrozenReference
from spin_trainer.model.spin import SPIN
from spin_trainer.training.checks import check_accelerator, check_datasets, make_spin, run_folder
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.pairs import PairComparison, PairMeasures
from spin_trainer.training.parallel import ParallelPolicy
from spin_trainer.training.state import BestIteration, RunCheckpoints, RunState
from spin_trainer.training.weights import export_policy, fingerprint_of_weights

Outcome = Literal["finished", "stopped early", "interrupted"]


@dataclass(frozen=True)
class SPINResult:
    """How a run ended.

    Attributes:
        outcome: "finished", "stopped early" (held-out likelihood got no better) or "interrupted" (Ctrl-C, SIGTERM).
        iterations: iterations that are complete.
        best_iteration: number of iterations after which held-out likelihood was best; None without validation data.
        first_step: updates that were done when this call began.
        steps: updates done.
        seconds: that this call took.
        history: held-out measures before self-play and after each iteration.
        iterations_folder: the policy after each iteration, as its own library opens it.
        curves: picture of the metrics; None if matplotlib is not installed or there is nothing to draw.
    """

    outcome: Outcome
    iterations: int
    best_iteration: int | None
    first_step: int
    steps: int
    seconds: float
    history: list[dict[str, float]]
    iterations_folder: Path
    curves: Path | None


class SPINTrainer:
    """Trains any causal language model by self-play; call it like a function.

    Args:
        model: what ``lm_core.adapters.as_causal_lm`` takes (Hugging Face with or without peft, x-transformers, a model
            of ours, any module from ids to logits), or a ``SPIN``. Trained in place, moved to the device.
        train_sft_dataset: prompts with human answers; see ``spin_trainer.data.sft_data``.
        valid_sft_dataset: held-out ones.
        tokenizer: for texts and chats; it travels with the exported policies.
        accelerator: an ``accelerate.Accelerator`` of your own.
        accelerate_kwargs: arguments for the one that is made otherwise.
        adam_kwargs: further arguments of ``torch.optim.AdamW``.
        filter_fn: filter of the opponent's sampling; None for none.
        filter_kwargs: its arguments; ``thres=0.9`` for the default filter.
        pad_id: trailing ids of this value are taken off given sequences.
        eos_id: token or tokens that end an answer; by default the tokenizer's.
        overlong: "error" or "drop", for prompts that leave no room for an answer.
        spin_kwargs: arguments of ``SPIN``.
        checkpoint_dir: folder of the run, ./spin-checkpoints by default.
        checkpoint_folder: the same under the original's name.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: objects with ``log(values, step=...)``.
        settings: fields of ``SelfPlaySettings``, of which ``max_seq_len`` is demanded; ``grad_accum_steps``,
            ``start_learning_rate`` and ``valid_every`` are taken as the original's names of three of them.

    Raises:
        ValueError, TypeError: naming the argument, or the row of a dataset; nothing was changed.
    """

    @typed
    def __init__(
        self,
        model: Any,
        *,
        train_sft_dataset: Any,
        valid_sft_dataset: Any = None,
        tokenizer: Any = None,
        accelerator: Any = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        adam_kwargs: Mapping[str, Any] | None = None,
        filter_fn: Callable[..., Tensor] | None = top_p,
        filter_kwargs: Mapping[str, Any] | None = None,
        pad_id: int | None = -1,
        eos_id: int | Sequence[int] | None = None,
        overlong: Overlong = "error",
        spin_kwargs: Mapping[str, Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_folder: str | Path | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        self.settings = SelfPlaySettings.of(settings)
        self.tokenizer, self.pad_id, self.resume = tokenizer, pad_id, resume
        self.checkpoint_folder, self.trackers = run_folder(checkpoint_dir, checkpoint_folder), list(trackers)
        self.device = pick_device(self.settings.device) if accelerator is None else accelerator.device
        pick_precision(self.settings.precision, self.device)  # refuses what the device cannot do
        if eos_id is None and tokenizer is not None:
            eos_id = tokenizer.eos_id
        self.eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        read: Any = partial(
            as_sft_dataset,
            max_seq_len=self.settings.max_seq_len,
            tokenizer=tokenizer,
            eos_id=self.eos_ids[0] if self.eos_ids else None,
            pad_id=pad_id,
            overlong=overlong,
        )
        self.train_dataset: SFTDataset = read(train_sft_dataset)
        self.valid_dataset: SFTDataset | None = (
            None if valid_sft_dataset is None else read(valid_sft_dataset, name="valid_sft_dataset")
        )
        if filter_kwargs is None:
            filter_kwargs = {"thres": 0.9} if filter_fn is top_p else {}
        self.sampling = Sampling(
            max_seq_len=self.settings.max_seq_len,
            temperature=self.settings.temperature,
            filter_fn=filter_fn,
            filter_kwargs=dict(filter_kwargs),
            eos_id=self.eos_ids or None,
            batch_size=self.settings.generation_batch_size or 2 * self.settings.batch_size,
            seed=self.settings.seed,
            precision=self.settings.precision,
        )
        self.model: SPIN = make_spin(model, self.settings, spin_kwargs, pad_id, self.eos_ids)
        check_datasets(self.model, self.settings, self.train_dataset, self.valid_dataset, self.eos_ids)
        self.adam_kwargs = dict(adam_kwargs or {})
        self.accelerator = check_accelerator(accelerator, accelerate_kwargs, self.device, self.checkpoint_folder)
        if self.settings.fsdp:
            check_shardable(self.device)
        self.model.to(self.device)
        self._base_lambda = self.model.lambda_
        self._log: Any = None
        self.state = RunState()
        self.guard = NonFiniteGuard()
        self.best = BestIteration(self.checkpoint_folder / "best", self.settings.early_stop_patience)
        self.pairs = PairComparison(self.model, self.settings, self.sampling)
        self.parallel = ParallelPolicy(self.pairs.scores, self.model.policy_model, fsdp=self.settings.fsdp)
        self._checkpoints = RunCheckpoints(
            spin=self.model,
            parallel=self.parallel,
            best=self.best,
            guard=self.guard,
            live_reference=self.settings.live_reference,
            tokenizer=tokenizer,
            keep=self.settings.keep_checkpoints,
        )

    @property
    def iteration(self) -> int:
        """Iterations that are complete."""
        return self.state.iteration

    @property
    def steps(self) -> int:
        """Updates done."""
        return self.state.steps

    def __call__(self, overwrite_checkpoints: bool = True) -> SPINResult:
        """Runs all iterations, or goes on where the run in ``checkpoint_folder`` was.

        Seeds python's, numpy's and torch's generators, or puts them where the checkpoint had them.

        Args:
            overwrite_checkpoints: whether policies exported by an earlier run into this folder are replaced.

        Raises:
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
            CheckpointError, ValueError: the folder is of another run, or damaged.
            FileExistsError, FileNotFoundError: the folder does not suit ``resume`` or ``overwrite_checkpoints``.
        """
        settings, started = self.settings, time.monotonic()
        outcome: Outcome = "finished"
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            stored = self._checkpoints.read(run, self.state, self._identity()) if run.resumes else {}
            first_step = self.steps
            stack.enter_context(dropout_of(self.model.policy_model, settings.dropout))
            stack.callback(self.model.policy_model.train, self.model.policy_model.training)
            if not settings.live_reference and isinstance(self.model.ref_model, FrozenReference):
                self.model.ref_model.release()  # its log-probabilities are on the disk instead
            if not self.parallel.prepared:
                self.parallel.prepare(self.accelerator)
            bar = stack.enter_context(progress_bar(None, initial=self.steps, description="spin", is_main=self.is_main))
            self._log = stack.enter_context(
                MetricsLog(
                    run.metrics_path,
                    resume_step=self.steps if run.resumes else -1,
                    is_main=self.is_main,
                    trackers=self.trackers,
                    progress=bar,
                    shown=("iteration", "loss", "win_rate"),
                )
            )
            begun = {row.get("begins") for row in read_metrics(run.metrics_path)} if self.is_main else set()
            interrupt = stack.enter_context(InterruptHandler())
            try:
                while self.iteration < settings.iterations and outcome == "finished":
                    outcome = self._iterate(run, stored, begun, interrupt, overwrite_checkpoints)
                    stored = {}
            except Interrupted:
                outcome = "interrupted"
            if outcome != "interrupted":
                self.best.put_back(self.model.policy_model)
            self._log = None
            return SPINResult(
                outcome=outcome,
                iterations=self.iteration,
                best_iteration=self.best.number,
                first_step=first_step,
                steps=self.steps,
                seconds=time.monotonic() - started,
                history=list(self.best.history),
                iterations_folder=self.checkpoint_folder / "iterations",
                curves=on_main_process(lambda: draw_curves(run.metrics_path, run.curves_path)),
            )

    def _iterate(
        self,
        run: RunDirectory,
        stored: Mapping[str, Any],
        begun: set[Any],
        interrupt: InterruptHandler,
        overwrite: bool,
    ) -> Outcome:
        """One iteration from its beginning, or from where ``stored`` was saved."""
        settings, state, policy = self.settings, self.state, self.model.policy_model
        t = state.iteration
        if self.best.stops:
            return "stopped early"
        self.model.lambda_ = settings.lambda_of(t) or self._base_lambda
        within = state.update > 0
        if not within:
            state.opponent = fingerprint_of_weights(policy)
        if settings.live_reference:
            self.model.update_reference_model_with_policy()
            if within:
                self.model.ref_model.restore(stored["reference"])
        train = self._data("train", self.train_dataset, interrupt, within=within)
        valid = self._data("valid", self.valid_dataset, interrupt, within=within) if self.valid_dataset else None
        order = UpdateOrder(
            len(train.pairs),
            batch_size=settings.batch_size * settings.gradient_accumulation * world_size(),
            micro_batches=settings.gradient_accumulation,
            last="short",
            seed=settings.seed,
            key=("pairs", t),
            rank=rank(),
            world_size=world_size(),
        )
        updates = order.updates_per_epoch * settings.epochs
        optimizer, schedule = self._optimizer(t, updates)
        if within:
            self.parallel.load_optimizer_state(optimizer, stored["optimizer"])
            schedule.load_state_dict(stored["schedule"])
            restore_rng(stored["rng"])
        else:
            seed_everything(seed_of("training", settings.seed, t, rank()) % 2**32)
            if f"iteration {t}" not in begun:
                self._log.log(self.steps, {"begins": f"iteration {t}", **train.summary()})
            if valid is not None and not self.best.history:
                begins = None if f"validation {t}" in begun else f"validation {t}"
                self.best.add(self._validate(valid, begins=begins, logged=begins is not None), policy)
        while state.update < updates:
            self._log.log(self.steps + 1, self._update(train, order, optimizer, schedule))
            state.update += 1
            state.steps += 1
            self._log.progress.update()
            last = state.update == updates
            if valid is not None and state.update % settings.validate_every == 0 and not last:
                self._validate(valid)
            stopping = interrupt.should_stop() and not last
            due = settings.checkpoint_every is not None and state.update % settings.checkpoint_every == 0
            if stopping or (due and not last):
                self._log.sync()
                self._checkpoints.write(run, state, self._identity(), optimizer, schedule)
            if stopping:
                raise Interrupted
        if valid is not None:
            self.best.add(self._validate(valid), policy)
        state.iteration, state.update, state.previous_opponent = t + 1, 0, state.opponent
        self.save(Path("iterations") / f"iteration-{self.iteration}", overwrite=overwrite)
        self._log.sync()
        self._checkpoints.write(run, state, self._identity())
        return "stopped early" if self.best.stops else "finished"

    def _optimizer(self, iteration: int, updates: int) -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
        """AdamW and a learning rate that falls along a line; both new in each iteration, as in the paper."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.model.policy_model, weight_decay=settings.weight_decay),
            **{"lr": settings.learning_rate_of(iteration), "betas": (0.9, 0.99), **self.adam_kwargs},
        )
        rising = int(settings.warmup * updates)
        schedule = LearningRateSchedule(
            optimizer,
            kind="linear",
            warmup_steps=rising,
            total_steps=max(settings.learning_rate_num_decay_steps or updates, rising + 1),
            final_scale=settings.end_learning_rate / settings.learning_rate,
        )
        return optimizer, schedule

    def _update(
        self, data: IterationData, order: UpdateOrder, optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule
    ) -> dict[str, Any]:
        """One optimizer update; its metrics."""
        started = time.monotonic()
        measures = PairMeasures(self.device)
        batches = order.micro_batches(self.state.update)
        total = len(order.indices(self.state.update))
        self.model.policy_model.train()
        for number, indices in enumerate(batches, start=1):
            # a process without a pair takes one of no weight: all run the same number of forwards
            pairs = [data.pairs[index] for index in indices or [0]]
            weights = torch.full((len(pairs),), float(bool(indices)), device=self.device)
            with self.parallel.synchronising(number == len(batches)):
                answers = self._answers(data, pairs, number)
                comparison = self.pairs.of_pairs(data, pairs, answers, self.parallel.called)
                # gradients are averaged over processes, so each divides by its part of the pairs
                self.parallel.backward((comparison.losses * weights).sum() * world_size() / total)
            measures.add(comparison, [data.dataset[pair.row] for pair in pairs], answers, weights)
        values = measures.means()
        finished = finish_update(
            self.steps + 1,
            values["loss"],
            self.model.trainable_parameters(),
            optimizer=optimizer,
            schedule=schedule,
            guard=self.guard,
            max_grad_norm=self.settings.max_grad_norm,
        )
        self.model.update_ema()
        seconds = max(time.monotonic() - started, 1e-9)
        return {**values, "iteration": self.iteration, **finished, "pairs_per_second": round(total / seconds, 2)}

    def _answers(self, data: IterationData, pairs: Sequence[Pair], number: int) -> list[Answer]:
        """The opponent's answers to the pairs of micro-batch ``number``: stored ones, or live ones of the policy."""
        if self.settings.opponent == "reference":
            return [data.answer(pair) for pair in pairs]
        place = number * world_size() + rank()
        seed = seed_of("live", self.settings.seed, self.iteration, self.state.update, place)
        return self.pairs.live_answers([data.dataset[pair.row].prompt for pair in pairs], seed)

    def _validate(self, valid: IterationData, *, logged: bool = True, begins: str | None = None) -> dict[str, float]:
        with self.parallel.whole():
            values = self.pairs.validate(valid)
        if logged:
            extra = {} if begins is None else {"begins": begins}
            self._log.log(self.steps, {**{f"validation_{name}": value for name, value in values.items()}, **extra})
        return values

    def _data(self, split: str, dataset: SFTDataset, interrupt: InterruptHandler, *, within: bool) -> IterationData:
        """A dataset's answers and scores in this iteration: made by the policy, or read if it has trained since."""
        settings, t = self.settings, self.iteration
        make: Any = partial(
            IterationData,
            dataset=dataset,
            root=self.checkpoint_folder / "generations",
            sampling=self.sampling,
            split=split,
            score_batch_size=settings.batch_size,
        )
        previous = None
        if split == "train" and settings.mix_previous and settings.opponent == "reference" and t > 0:
            previous = make(iteration=t - 1, weights=str(self.state.previous_opponent))
            previous.read(scores=False)
        data: IterationData = make(iteration=t, weights=self.state.opponent, previous=previous)
        if within:
            data.read(scores=not settings.live_reference)
        else:
            with self.parallel.whole():
                data.complete(self.model.policy, lambda: interrupt.requested, scores=not settings.live_reference)
        return data

    def _run_directory(self) -> RunDirectory:
        return RunDirectory(
            self.checkpoint_folder,
            resume=self.resume,
            seed=self.settings.seed,
            device=self.device,
            settings=asdict(self.settings),
            packages=("spin-trainer", "accelerate"),
        )

    @functools.cached_property
    def _frozen_weights(self) -> str:
        return fingerprint_of_weights(self.model.policy_model, trainable=False)

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a run to go on."""
        return {
            "trainer": type(self).__name__,
            "train_sft_dataset": self.train_dataset.fingerprint,
            "valid_sft_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
            "frozen_weights": self._frozen_weights,
            "seed": self.settings.seed,
            "batch": self.settings.batch_size * self.settings.gradient_accumulation * world_size(),
            "epochs": self.settings.epochs,
            "opponent_kind": self.settings.opponent,
            "sampling": repr(sorted(self.sampling.description().items())),
            "fsdp": self.settings.fsdp,
        }

    # ---------------------------------------------------------------------------- what scripts for the original use

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return rank() == 0

    @property
    def unwrapped_model(self) -> SPIN:
        """Policy and reference."""
        return self.model

    def print(self, *message: Any) -> None:
        """Prints on the main process."""
        self.accelerator.print(*message)

    def log(self, **data: Any) -> None:
        """Adds a row to the metrics of a running training, and sends it to accelerate's trackers."""
        if self._log is not None:
            self._log.log(self.steps, data)
        self.accelerator.log(data, step=self.steps)

    def wait(self) -> None:
        """Waits for all processes."""
        self.accelerator.wait_for_everyone()

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the policy, with its tokenizer, into a folder below ``checkpoint_folder``; every process calls it.

        Raises:
            FileExistsError: the folder exists and ``overwrite`` is False.
        """
        folder = self.checkpoint_folder / path
        export_policy(self.model.policy_model, folder, self.tokenizer, overwrite=overwrite)
        return folder

    def calc_spin_loss(self, real_seq: Int[Tensor, "b n"], prompt_len: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch, with answers that the opponent gives now.

        Args:
            real_seq: prompts with human answers, padded with ``pad_id``.
            prompt_len: tokens of each prompt.
        """
        rows = [
            (row[row != self.pad_id].tolist(), int(length)) for row, length in zip(real_seq, prompt_len, strict=True)
        ]
        dataset = as_sft_dataset(rows, max_seq_len=self.settings.max_seq_len, pad_id=self.pad_id, name="real_seq")
        seed = seed_of("live", self.settings.seed, self.iteration, self.steps)
        answers = self.pairs.live_answers([example.prompt for example in dataset], seed)
        return self.pairs.compare(dataset, answers).losses.mean()


SHOWN = ("loss", "nll", "margin", "win_rate", "real_log_prob", "generated_log_prob", "generated_length", "grad_norm")


def draw_curves(metrics: Path, output: Path) -> Path | None:
    """Draws a run's measures over its updates; None without matplotlib, or with too few rows."""
    rows = read_metrics(metrics)
    names = [name for shown in SHOWN for name in (shown, f"validation_{shown}") if sum(name in row for row in rows) > 1]
    if sum("loss" in row for row in rows) < 2:
        return None  # one point is no curve
    try:
        return plot_curves(metrics, output, names=names) if names else None
    except ImportError:
        return None
