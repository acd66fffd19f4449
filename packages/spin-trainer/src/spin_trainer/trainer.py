"""Self-play fine-tuning, the whole loop: the opponent answers, the player learns to tell, the player is promoted.

Algorithm 1 of arXiv 2401.01335. At the beginning of an iteration the policy is the opponent, so it answers all prompts
and scores all answers, once and onto the disk (``iteration_data``); then it trains on pairs; then the next begins.

A checkpoint holds all that the next update depends on, and answers are kept row by row: a run that was killed in
either phase goes on to the weights, bit for bit, of one that was not (with equal settings, device, torch and number of
processes). At step N come first the row of metrics, then a validation, then the checkpoint.

Long because the loop and all that it resumes from are read together.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core._checks import typed
from lm_core.checkpoint import Checkpoint, load_checkpoint, on_main_process, save_checkpoint
from lm_core.distributed import all_reduce_sum, rank, world_size
from lm_core.generation import eval_mode
from lm_core.pretrained import PretrainedMixin
from lm_core.sampling import top_p
from lm_core.training import (
    InterruptHandler,
    LearningRateSchedule,
    MetricsLog,
    NonFiniteGuard,
    RunDirectory,
    clip_global_norm,
    pick_device,
    pick_precision,
    progress_bar,
    read_metrics,
    restore_rng,
    seed_everything,
)
from spin_trainer.best_iteration import BestIteration
from spin_trainer.curves import draw_curves
from spin_trainer.dropout import dropout_of
from spin_trainer.fingerprints import fingerprint_of_weights
from spin_trainer.iteration_data import IterationData
from spin_trainer.opponent_answers import Answer, Interrupted, Sampling, answer_prompts, batches_by_length, seed_of
from spin_trainer.pair_comparison import PairComparison
from spin_trainer.pair_measures import PairMeasures
from spin_trainer.pair_order import MicroBatch, Pair, PairOrder
from spin_trainer.policy_weights import export_policy, is_partly_frozen, load_stored_weights, stored_weights
from spin_trainer.reference import FrozenReference
from spin_trainer.self_play_settings import SelfPlaySettings
from spin_trainer.sft_data import Overlong, SFTDataset, as_sft_dataset
from spin_trainer.spin import SPIN, Comparison
from spin_trainer.training_checks import check_accelerator, check_datasets, check_same_run, make_spin
from spin_trainer.updates import optimizer_of

Outcome = Literal["finished", "stopped early", "interrupted"]


@dataclass(frozen=True)
class SPINResult:
    """How a run ended.

    Attributes:
        outcome: "finished", "stopped early" (held-out likelihood got no better) or "interrupted" (Ctrl-C, SIGTERM).
        iterations: iterations that are complete.
        best_iteration: number of iterations after which held-out likelihood was best; None without validation data.
        steps: updates done.
        history: held-out measures before self-play and after each iteration.
        iterations_folder: the policy after each iteration, as its own library opens it.
        curves: picture of the metrics; None if matplotlib is not installed or there is nothing to draw.
    """

    outcome: Outcome
    iterations: int
    best_iteration: int | None
    steps: int
    history: list[dict[str, float]]
    iterations_folder: Path
    curves: Path | None


class SPINTrainer:
    """Trains any causal language model by self-play; call it like a function.

    Args:
        model: what ``lm_core.adapters.as_causal_lm`` takes (Hugging Face with or without peft, x-transformers, a model
            of ours, any module from ids to logits), or a ``SPIN``. Trained in place, moved to the device.
        train_sft_dataset: prompts with human answers; see ``spin_trainer.sft_data``.
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
        checkpoint_folder: folder of the run.
        resume: "auto" goes on if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: objects with ``log(values, step=...)``.
        settings: fields of ``SelfPlaySettings``, of which ``max_seq_len`` is demanded.

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
        checkpoint_folder: str | Path = "./spin-checkpoints",
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        self.settings = SelfPlaySettings(**settings)
        self.tokenizer, self.pad_id, self.resume = tokenizer, pad_id, resume
        self.checkpoint_folder, self.trackers = Path(checkpoint_folder), list(trackers)
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
        self._adam_kwargs = dict(adam_kwargs or {})
        self.accelerator = check_accelerator(
            accelerator, accelerate_kwargs, self.device, self.checkpoint_folder, self.settings
        )
        self.model.to(self.device)
        self._base_lambda = self.model.lambda_
        self._frozen: str | None = None
        self._guard = NonFiniteGuard()
        self._parallel: Any = None
        self._log: Any = None
        self.iteration = self.steps = 0
        self.best = BestIteration(self.checkpoint_folder / "best", self.settings.early_stop_patience)
        self.compare = PairComparison(self.model, precision=self.settings.precision)
        self._update = 0  # within the iteration
        self._opponent = ""  # fingerprint of its weights
        self._previous_opponent: str | None = None

    # ------------------------------------------------------------------------------ what the original offers as well

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
            FileExistsError: the folder is there and ``overwrite`` is False.
        """
        folder = self.checkpoint_folder / path

        def write() -> None:
            if folder.exists() and not overwrite:
                raise FileExistsError(f"{folder} exists; overwrite=True replaces it")
            export_policy(self.model.policy_model, folder, self.tokenizer)

        on_main_process(write)
        return folder

    def calc_spin_loss(self, real_seq: Int[Tensor, "b n"], prompt_len: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch, with answers that the opponent gives now.

        Args:
            real_seq: prompts with human answers, padded with ``pad_id``.
            prompt_len: tokens of each prompt.
        """
        pairs = [
            (row[row != self.pad_id].tolist(), int(length)) for row, length in zip(real_seq, prompt_len, strict=True)
        ]
        dataset = as_sft_dataset(pairs, max_seq_len=self.settings.max_seq_len, pad_id=self.pad_id, name="real_seq")
        prompts = [example.prompt for example in dataset]
        seed = seed_of("live", self.settings.seed, self.iteration, self.steps)
        answers = self._live_answers(prompts, seed)
        real = [example.response for example in dataset]
        return self.compare(prompts, real, [answer.tokens for answer in answers]).losses.mean()

    # ----------------------------------------------------------------------------------------------------- the loop

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
        settings = self.settings
        outcome: Outcome = "finished"
        with self._run_directory() as run, contextlib.ExitStack() as stack:
            state = self._resume(run) if run.resumes else {}
            stack.enter_context(dropout_of(self.model.policy_model, settings.dropout))
            stack.callback(self.model.policy_model.train, self.model.policy_model.training)
            if self._parallel is None:
                self._parallel = self.accelerator.prepare_model(self.compare.scores, device_placement=False)
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
                    outcome = self._iterate(run, state, begun, interrupt, overwrite_checkpoints)
                    state = {}
            except Interrupted:
                outcome = "interrupted"
            if outcome != "interrupted":
                self.best.put_back(self.model.policy_model)
            self._log = None
            return SPINResult(
                outcome=outcome,
                iterations=self.iteration,
                best_iteration=self.best.number,
                steps=self.steps,
                history=list(self.best.history),
                iterations_folder=self.checkpoint_folder / "iterations",
                curves=draw_curves(run.metrics_path, run.curves_path) if self.is_main else None,
            )

    def _iterate(
        self, run: RunDirectory, state: Mapping[str, Any], begun: set[Any], interrupt: InterruptHandler, overwrite: bool
    ) -> Outcome:
        """One iteration from its beginning, or from where ``state`` was saved."""
        settings, t = self.settings, self.iteration
        if self.best.stops:
            return "stopped early"
        policy = self.model.policy_model
        self.model.lambda_ = settings.lambda_of(t) or self._base_lambda
        if not self._update:
            self._opponent = fingerprint_of_weights(policy)
            self.model.update_reference_model_with_policy()
        train, valid = self._data(interrupt, within=self._update > 0)
        if settings.live_reference:
            if self._update:
                self.model.ref_model.restore(state["reference"])
        elif isinstance(self.model.ref_model, FrozenReference):
            self.model.ref_model.release()
        order = PairOrder(
            pairs=train.pairs,
            batch_size=settings.batch_size,
            accumulation=settings.grad_accum_steps,
            epochs=settings.epochs,
            seed=settings.seed,
            iteration=t,
            rank=rank(),
            world_size=world_size(),
        )
        optimizer, schedule = optimizer_of(
            policy, settings, iteration=t, updates=order.updates, adam_kwargs=self._adam_kwargs
        )
        if self._update:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            restore_rng(state["rng"])
        else:
            seed_everything(seed_of("training", settings.seed, t, rank()) % 2**32)
            if f"iteration {t}" not in begun:
                self._log.log(self.steps, {"begins": f"iteration {t}", **train.summary()})
            if valid is not None and not self.best.history:
                begins = None if f"validation {t}" in begun else f"validation {t}"
                self.best.add(self._validate(valid, begins=begins, logged=begins is not None), policy)
        while self._update < order.updates:
            self._log.log(self.steps + 1, self._step(train, order, optimizer, schedule))
            self._update += 1
            self.steps += 1
            self._log.progress.update()
            last = self._update == order.updates
            if valid is not None and self._update % settings.valid_every == 0 and not last:
                self._validate(valid)
            stopping = interrupt.should_stop() and not last
            due = settings.checkpoint_every is not None and self._update % settings.checkpoint_every == 0
            if stopping or (due and not last):
                self._save_checkpoint(run, optimizer, schedule)
            if stopping:
                raise Interrupted
        if valid is not None:
            self.best.add(self._validate(valid), policy)
        self.iteration, self._update, self._previous_opponent = t + 1, 0, self._opponent
        self.save(Path("iterations") / f"iteration-{self.iteration}", overwrite=overwrite)
        self._save_checkpoint(run, None, None)
        return "stopped early" if self.best.stops else "finished"

    def _step(
        self, train: IterationData, order: PairOrder, optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule
    ) -> dict[str, Any]:
        """One optimizer update; its metrics."""
        measures = PairMeasures(self.device)
        batches = order.micro_batches(self._update)
        total = len(order.chosen(self._update))
        self.model.policy_model.train()
        for number, batch in enumerate(batches, start=1):
            with contextlib.nullcontext() if number == len(batches) else self.accelerator.no_sync(self._parallel):
                answers = self._answers(train, batch, number)
                comparison = self._compare_pairs(train, batch.pairs, answers, scores=self._parallel)
                weights = torch.tensor(batch.weights, device=self.device)
                # DDP averages over processes, so each divides by its part of the pairs
                loss = (comparison.losses * weights).sum() * world_size() / total
                self.accelerator.backward(loss)
            measures.add(comparison, [train.dataset[pair.row] for pair in batch.pairs], answers, weights)
        values = measures.summed(all_reduce_sum)
        learning_rate = schedule.learning_rate
        norm = clip_global_norm(self.model.trainable_parameters(), self.settings.max_grad_norm)
        if self._guard.allows(self.steps + 1, values["loss"], norm):
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        self.model.update_ema()
        return {
            **values,
            "iteration": self.iteration,
            "learning_rate": learning_rate,
            "grad_norm": float(norm),
            "skipped": self._guard.skipped,
        }

    @torch.no_grad()
    def _validate(self, valid: IterationData, *, logged: bool = True, begins: str | None = None) -> dict[str, float]:
        measures = PairMeasures(self.device)
        lengths = [len(example.prompt) + len(example.response) for example in valid.dataset]
        with eval_mode(self.model.policy):
            for number, rows in enumerate(batches_by_length(lengths, self.settings.batch_size)):
                if number % world_size() == rank():
                    pairs = [Pair(row) for row in rows]
                    answers = [valid.answer(pair) for pair in pairs]
                    comparison = self._compare_pairs(valid, pairs, answers)
                    weights = torch.ones(len(rows), device=self.device)
                    measures.add(comparison, [valid.dataset[row] for row in rows], answers, weights)
        values = measures.summed(all_reduce_sum)
        if logged:
            extra = {} if begins is None else {"begins": begins}
            self._log.log(self.steps, {**{f"validation_{name}": value for name, value in values.items()}, **extra})
        return values

    # --------------------------------------------------------------------------------------------- pairs and scores

    def _data(self, interrupt: InterruptHandler, *, within: bool) -> tuple[IterationData, IterationData | None]:
        """Training and held-out data of this iteration: made by the policy, or read if it has trained since."""
        live, t = self.settings.live_reference, self.iteration
        made: list[IterationData | None] = []
        for split, dataset in (("train", self.train_dataset), ("valid", self.valid_dataset)):
            if dataset is None:
                made.append(None)
                continue
            common: dict[str, Any] = {
                "dataset": dataset,
                "root": self.checkpoint_folder / "generations",
                "sampling": self.sampling,
                "split": split,
                "score_batch_size": self.settings.batch_size,
            }
            previous = None
            if split == "train" and self.settings.mix_previous and self.settings.opponent == "reference" and t > 0:
                previous = IterationData(iteration=t - 1, weights=str(self._previous_opponent), **common)
                previous.read(scores=False)
            data = IterationData(iteration=t, weights=self._opponent, previous=previous, **common)
            if within:
                data.read(scores=not live)
            else:
                data.complete(self.model.policy, lambda: interrupt.requested, scores=not live)
            made.append(data)
        train = made[0]
        assert train is not None
        return train, made[1]

    def _answers(self, train: IterationData, batch: MicroBatch, number: int) -> list[Answer]:
        if self.settings.opponent == "reference":
            return [train.answer(pair) for pair in batch.pairs]
        prompts = [train.dataset[pair.row].prompt for pair in batch.pairs]
        place = number * world_size() + rank()
        return self._live_answers(prompts, seed_of("live", self.settings.seed, self.iteration, self._update, place))

    def _live_answers(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        if self.settings.opponent == "policy":
            return answer_prompts(self.model.policy, prompts, self.sampling, seed)
        with self.model.ref_model.model() as reference:
            return answer_prompts(reference, prompts, self.sampling, seed)

    def _compare_pairs(
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

    # -------------------------------------------------------------------------------------------------- going on

    def _run_directory(self) -> RunDirectory:
        return RunDirectory(
            self.checkpoint_folder,
            resume=self.resume,
            seed=self.settings.seed,
            device=self.device,
            settings=asdict(self.settings),
            packages=("spin-trainer", "accelerate"),
        )

    def _resume(self, run: RunDirectory) -> dict[str, Any]:
        """Puts weights and counters where the newest checkpoint has them; refused before anything is changed."""
        checkpoint: Checkpoint = load_checkpoint(run.checkpoints)
        state = checkpoint.trainer_state
        check_same_run(checkpoint, self._identity())
        load_stored_weights(self.model.policy_model, checkpoint.model_state or {}, str(checkpoint.path))
        self.iteration, self._update, self.steps = state["iteration"], state["update"], checkpoint.step
        self._opponent, self._previous_opponent = state["opponent"], state["previous_opponent"]
        self.best.history = list(state["history"])
        self._guard.load_state_dict(state["guard"])
        return {**state, "rng": checkpoint.rng}

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a run to go on."""
        if self._frozen is None:
            self._frozen = fingerprint_of_weights(self.model.policy_model, trainable=False)
        return {
            "trainer": type(self).__name__,
            "train_sft_dataset": self.train_dataset.fingerprint,
            "valid_sft_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
            "frozen_weights": self._frozen,
            "seed": self.settings.seed,
            "batch": self.settings.batch_size * self.settings.grad_accum_steps * world_size(),
            "epochs": self.settings.epochs,
            "opponent_kind": self.settings.opponent,
            "sampling": repr(sorted(self.sampling.description().items())),
        }

    def _save_checkpoint(
        self, run: RunDirectory, optimizer: torch.optim.Optimizer | None, schedule: LearningRateSchedule | None
    ) -> None:
        self._log.sync()
        policy = self.model.policy_model
        within = optimizer is not None and schedule is not None
        save_checkpoint(
            run.checkpoints,
            self.steps,
            model=policy
            if isinstance(policy, PretrainedMixin) and not is_partly_frozen(policy)
            else stored_weights(policy),
            trainer_state={
                **self._identity(),
                "iteration": self.iteration,
                "update": self._update,
                "opponent": self._opponent,
                "previous_opponent": self._previous_opponent,
                "history": self.best.history,
                "guard": self._guard.state_dict(),
                "optimizer": optimizer.state_dict() if optimizer is not None else None,
                "schedule": schedule.state_dict() if schedule is not None else None,
                "reference": self.model.ref_model.exported() if within and self.settings.live_reference else None,
            },
            tokenizer=self.tokenizer,
            keep=self.settings.keep_checkpoints,
        )
