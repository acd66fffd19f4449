"""The self-play training loop: generate the opponent's answers, train the policy, promote it to opponent.

Algorithm 1 of arXiv 2401.01335. At the beginning of an iteration the policy is the opponent: it answers all prompts and
scores all answers, once, onto disk (``data.iteration_data``). Answers are stored row by row and checkpoints hold
everything that the next update depends on, so a run that is killed in either phase and resumed ends with the weights of
an uninterrupted one, bit for bit (``lm_core.training.session``).
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.checkpoint import checkpoint_folder as folder_of_model
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import either, typed
from lm_core.cli.text_generation import SamplingFlags
from lm_core.data.epochs import UpdateOrder, seed_of
from lm_core.distributed import rank, world_size
from lm_core.generation.decoding import as_eos_ids
from lm_core.generation.sampling import top_p
from lm_core.rng import seed_everything
from lm_core.tokenizers import as_tokenizer, end_ids, load_tokenizer
from lm_core.training.blocks import blocks_of
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.session import SavedValue, TrainingResult, TrainingSession
from spin_trainer.data.iteration_data import Interrupted, IterationData, Pair
from spin_trainer.data.opponent_answers import Answer, Sampling, original_filter
from spin_trainer.data.sft_data import Overlong, SFTDataset, as_sft_dataset
from spin_trainer.model.activation_checkpointing import recomputed_activations
from spin_trainer.model.dropout import dropout_of
from spin_trainer.model.reference import FrozenReference
from spin_trainer.model.spin import SPIN
from spin_trainer.training.checks import check_accelerator, check_datasets, make_spin
from spin_trainer.training.config import SelfPlaySettings, value_of
from spin_trainer.training.pairs import PairComparison, PairMetrics
from spin_trainer.training.state import BestIteration, RunState, upgraded
from spin_trainer.training.weights import (
    export_policy,
    fingerprint_of_weights,
    is_partly_frozen,
    load_stored_weights,
    stored_weights,
    write_native_files,
)

SHOWN = ("loss", "nll", "margin", "win_rate", "real_log_prob", "generated_log_prob", "generated_length", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class SPINResult(TrainingResult):
    """Result of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        iterations: number of completed iterations.
        best_iteration: number of iterations after which held-out likelihood was best; None without validation data.
        history: held-out metrics before self-play and after each iteration.
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


class SPINTrainer:
    """Fine-tunes any causal language model by self-play.

    Args:
        model: a ``SPIN``, or anything that ``lm_core.adapters.as_causal_lm`` accepts: transformers models with or
            without peft, x-transformers, PaLM, any module from ids to logits. Trained in place, moved to the device.
            A folder or hub name is loaded by ``lm_core.adapters.loading.load_causal_lm``, with its tokenizer.
        train_sft_dataset: prompts with human answers; see ``spin_trainer.data.sft_data``.
        valid_sft_dataset: held-out prompts with human answers.
        tokenizer: tokenizer of texts and chats, saved with the exported policies: a transformers tokenizer, a folder or
            hub name, or an object with the protocol of ``lm_core.tokenizers``.
        accelerator: ``accelerate.Accelerator`` to use instead of a new one.
        accelerate_kwargs: arguments of the new ``accelerate.Accelerator``.
        adam_kwargs: further arguments of ``torch.optim.AdamW``.
        filters: further logits filters of the opponent's sampling, functions ``(b, v) -> (b, v)``.
        filter_fn: the original's logits filter, in place of ``top_p``; None for no filter.
        filter_kwargs: arguments of ``filter_fn``.
        pad_id: padding id; it is removed from the end of sequences.
        eos_id: token or tokens that end an answer, by default those of tokenizer and model; () for none.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        overlong: handling of prompts that leave no room for an answer: "error", or "drop" the row.
        spin_kwargs: further arguments of ``SPIN``.
        checkpoint_dir: folder of the run, ./spin-checkpoints by default.
        checkpoint_folder: ``checkpoint_dir`` under the original's name.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of ``accelerate``'s trackers, and objects with ``log(values, step=...)``.
        config: settings of self-play.
        settings: fields of ``SelfPlaySettings``, instead of ``config``; the original's ``grad_accum_steps``,
            ``start_learning_rate`` and ``valid_every`` are accepted too.

    Raises:
        ValueError, TypeError: an argument or a dataset's row is invalid; raised before anything is written.
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
        filters: Sequence[Callable[[Tensor], Tensor]] = (),
        filter_fn: Callable[..., Tensor] | None = top_p,
        filter_kwargs: Mapping[str, Any] | None = None,
        pad_id: int | None = -1,
        eos_id: int | Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        overlong: Overlong = "error",
        spin_kwargs: Mapping[str, Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_folder: str | Path | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        config: SelfPlaySettings | None = None,
        **settings: Any,
    ) -> None:
        self.settings = SelfPlaySettings.of(settings) if config is None else config
        if config is not None and settings:
            raise ValueError(f"pass config or single settings, not both; got config and {sorted(settings)}")
        if isinstance(model, str | Path):
            if tokenizer is None:
                with contextlib.suppress(FileNotFoundError, ValueError):  # models of token ids have none
                    tokenizer = load_tokenizer(folder_of_model(model))
            model = load_causal_lm(model)
        tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        folder = either(None, checkpoint_dir=checkpoint_dir, checkpoint_folder=checkpoint_folder)
        self.checkpoint_folder = Path("./spin-checkpoints" if folder is None else folder).expanduser()
        if eos_id is None:
            eos_id = model.eos_ids if isinstance(model, SPIN) else end_ids(tokenizer, model)
        self.eos_ids = as_eos_ids(eos_id)
        # datasets, and the sampling of answers to their prompts
        read: Any = partial(
            as_sft_dataset,
            max_seq_len=self.settings.max_seq_len,
            tokenizer=tokenizer,
            eos_id=self.eos_ids,
            pad_id=pad_id,
            template_kwargs=template_kwargs,
            overlong=overlong,
        )
        self.train_dataset: SFTDataset = read(train_sft_dataset)
        self.valid_dataset: SFTDataset | None = (
            None if valid_sft_dataset is None else read(valid_sft_dataset, name="valid_sft_dataset")
        )
        if self.settings.validation_fraction > 0:
            if self.valid_dataset is not None:
                raise ValueError(
                    "pass validation data or validation_fraction, not both; got a valid_sft_dataset and "
                    f"{self.settings.validation_fraction}"
                )
            self.train_dataset, self.valid_dataset = self.train_dataset.split(
                self.settings.validation_fraction, seed=self.settings.seed
            )
        chosen = {field.name: getattr(self.settings, field.name) for field in fields(SamplingFlags)}
        changed = original_filter(filter_fn, filter_kwargs)
        self.sampling = Sampling(
            **{**chosen, **changed, "own_filters": (*changed.get("own_filters", ()), *filters)},
            max_seq_len=self.settings.max_seq_len,
            max_new_tokens=self.settings.max_new_tokens,
            eos_id=self.eos_ids or None,
            batch_size=self.settings.generation_batch_size or 2 * self.settings.batch_size,
            seed=self.settings.seed,
            precision=self.settings.precision,
        )
        # policy and reference
        self.model: SPIN = make_spin(model, self.settings, spin_kwargs, pad_id, self.eos_ids)
        check_datasets(self.model, self.settings, self.train_dataset, self.valid_dataset, self.eos_ids)
        self.adam_kwargs = dict(adam_kwargs or {})
        # the session logs, stores and resumes the run
        self.session = TrainingSession(
            type(self).__name__,
            config=self.settings,
            checkpoint_dir=self.checkpoint_folder,
            resume=resume,
            trackers=trackers,
            packages=("spin-trainer",),
            accelerator=check_accelerator(accelerator, accelerate_kwargs, self.settings.device),
        )
        self.device = self.session.device
        self.session.place(self.model)
        self.state = RunState()
        self.best = BestIteration(self.checkpoint_folder / "best", self.settings.early_stop_patience)
        self.pairs = PairComparison(self.model, self.settings, self.sampling)
        self._base_lambda = self.model.lambda_
        self._valid: IterationData | None = None
        policy, live_reference = self.model.policy_model, self.settings.live_reference
        # of a partly frozen policy (LoRA) a checkpoint stores the trained parameters alone
        whole = isinstance(policy, PretrainedMixin) and not is_partly_frozen(policy) and not self.settings.fsdp
        self._checkpointed: Mapping[str, Tensor] = {}
        self._frozen_weights = cache(partial(fingerprint_of_weights, policy, trainable=False))
        self.session.register(
            model=policy,
            objective=self.pairs.scores,
            blocks=lambda: blocks_of(policy),
            state={
                "run": SavedValue(lambda: asdict(self.state), lambda state: vars(self.state).update(state)),
                "best": SavedValue(lambda: {"history": self.best.history}, lambda state: vars(self.best).update(state)),
                # a live reference is needed by the iteration's later updates
                "reference": SavedValue(
                    lambda: self.model.ref_model.exported() if self.state.update and live_reference else None,
                    lambda state: self.model.ref_model.restore(state),
                ),
            },
            identity=lambda: {
                "train_sft_dataset": self.train_dataset.fingerprint,
                "valid_sft_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
                "frozen_weights": self._frozen_weights(),
                "batch": self.settings.batch_size * self.settings.gradient_accumulation * world_size(),
                "epochs": self.settings.epochs,
                "max_steps": self.settings.max_steps,
                "opponent_kind": self.settings.opponent,
                "sampling": repr(sorted(self.sampling.description().items())),
            },
            upgrade=upgraded,
            save_weights=lambda: policy if whole else self._stored_weights(),
            assets=None if whole else lambda folder: write_native_files(policy, folder, self._checkpointed),
            load_weights=lambda stored: load_stored_weights(policy, stored.model_state or {}, str(stored.path)),
            tokenizer=tokenizer,
            validate=None if self.valid_dataset is None else self._validate,
            max_steps=self.planned_updates,
            curves=[name for shown in SHOWN for name in (shown, f"validation_{shown}")],
            shown=("iteration", "loss", "win_rate"),
        )
        if self.session.precisions.promoted:
            self.model.reset_reference()
        # names, since sharding replaces the parameters
        promoted = {id(parameter): dtype for parameter, dtype in self.session.precisions.promoted}
        self._stored_dtypes = {name: promoted[id(p)] for name, p in policy.named_parameters() if id(p) in promoted}

    @property
    def iteration(self) -> int:
        """Number of completed iterations."""
        return self.state.iteration

    @property
    def steps(self) -> int:
        """Number of completed updates."""
        return self.session.step

    @property
    def planned_updates(self) -> int:
        """Number of updates of the whole run, unless it stops early."""
        total = sum(self._updates_of(iteration) for iteration in range(self.settings.iterations))
        return min(total, self.settings.max_steps or total)

    def _updates_of(self, iteration: int) -> int:
        """Number of updates of an iteration that ``max_steps`` does not cut short."""
        pairs = len(self.train_dataset) * (2 if self._mixes and iteration > 0 else 1)
        return self._order(pairs).updates_per_epoch * self.settings.epochs

    @property
    def _mixes(self) -> bool:
        """True if an iteration also trains on the previous one's answers."""
        return self.settings.mix_previous and self.settings.opponent == "reference"

    def train(self, *, overwrite: bool = True) -> SPINResult:
        """Runs all iterations, or resumes the run in ``checkpoint_dir``.

        Seeds the generators of Python, NumPy and torch, or restores their states from the checkpoint.

        Args:
            overwrite: whether to replace policies that an earlier run exported into this folder.

        Raises:
            RuntimeError: another run is using the folder, or too many losses in a row were not finite.
            CheckpointError, ValueError: the folder belongs to another run or is damaged.
            FileExistsError, FileNotFoundError: the folder contradicts ``resume`` or ``overwrite``.
        """
        settings, state, policy = self.settings, self.state, self.model.policy_model
        planned = self.planned_updates
        self._frozen_weights()  # includes buffers, which a forward may change
        with (
            self.session.run() as session,
            dropout_of(policy, settings.dropout),
            recomputed_activations(policy) if settings.gradient_checkpointing else contextlib.nullcontext(),
        ):
            if not settings.live_reference and isinstance(self.model.ref_model, FrozenReference):
                self.model.ref_model.release()  # its log-probabilities are on disk
            # with an update of the iteration done, it is not promoted yet
            while (
                state.iteration < settings.iterations
                and session.outcome == "finished"
                and (state.update > 0 or session.step < planned)
            ):
                if self.best.stops:
                    session.outcome = "stopped early"
                    break
                # generate: until its first update the policy is the opponent
                self.model.lambda_ = value_of(state.iteration, settings.lambdas, self._base_lambda)
                title = f"iteration {state.iteration + 1} of {settings.iterations}"
                session.progress.set_description(f"{title}, generate")
                try:
                    train = self._opponent_data()
                except Interrupted:
                    session.outcome = "interrupted"
                    break
                # train on pairs of a human and a generated answer
                order = self._order(len(train.pairs))
                left = planned - (session.step - state.update)
                updates = min(self._updates_of(state.iteration), left)
                session.progress.set_description(f"{title}, train")
                self._begin_training(updates)
                for _ in session.steps(session.step + updates - state.update, ends=False):
                    session.log(self._update(train, order))
                # promote the policy to the next iteration's opponent
                if session.outcome == "finished":
                    self._promote(overwrite)
            if session.outcome in ("finished", "stopped early"):
                self.best.put_back(policy)
        return session.result(
            SPINResult,
            iterations=state.iteration,
            best_iteration=self.best.number,
            history=list(self.best.history),
            iterations_folder=self.checkpoint_folder / "iterations",
        )

    def _opponent_data(self) -> IterationData:
        """The opponent's answers and scores: generated now, or read from disk in the middle of an iteration."""
        settings, state, t = self.settings, self.state, self.iteration
        opponent = None
        if state.update == 0:
            opponent = self.model.policy
            state.opponent = fingerprint_of_weights(self.model.policy_model)
            if settings.live_reference:
                self.model.update_reference_model_with_policy()
        stored: Any = partial(
            IterationData,
            root=self.checkpoint_folder / "generations",
            sampling=self.sampling,
            score_batch_size=settings.batch_size,
        )
        of_train: Any = partial(stored, dataset=self.train_dataset, split="train")
        previous = None
        if self._mixes and t > 0:
            previous = of_train(iteration=t - 1, weights=str(state.previous_opponent))
            previous.complete(None, scores=False)
        splits: list[IterationData] = [of_train(iteration=t, weights=state.opponent, previous=previous)]
        if self.valid_dataset is not None:
            splits.append(stored(dataset=self.valid_dataset, split="valid", iteration=t, weights=state.opponent))
            self._valid = splits[-1]
        with contextlib.nullcontext() if opponent is None else self.session.gathered():
            for split in splits:
                split.complete(opponent, lambda: self.session.stop_requested, scores=not settings.live_reference)
        return splits[0]

    def _order(self, pairs: int) -> UpdateOrder:
        """Order of this number of pairs, by update and micro-batch."""
        accumulation = self.settings.gradient_accumulation
        return UpdateOrder(
            pairs,
            batch_size=self.settings.batch_size * accumulation * world_size(),
            micro_batches=accumulation,
            last="short",
            seed=self.settings.seed,
            key=("pairs", self.iteration),
            rank=rank(),
            world_size=world_size(),
        )

    def _begin_training(self, updates: int) -> None:
        """Begins an iteration's training: seeds, first validation, new optimizer with linear decay as in the paper."""
        settings, session, t = self.settings, self.session, self.iteration
        if self.state.update == 0:
            seed_everything(seed_of("training", settings.seed, t, rank()) % 2**32)
            if not self.best.history:
                self._validate_iteration()
        elif session.optimizer is not None:
            return  # a second call of ``train`` within an iteration
        learning_rate = value_of(t, settings.learning_rates, settings.learning_rate)
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.model.policy_model, weight_decay=settings.weight_decay),
            **{"lr": learning_rate, "betas": (0.9, 0.99), **self.adam_kwargs},
        )
        warmup_steps = int(settings.warmup * updates)
        schedule = LearningRateSchedule(
            optimizer,
            kind="linear",
            warmup_steps=warmup_steps,
            total_steps=max(settings.learning_rate_num_decay_steps or updates, warmup_steps + 1),
            final_scale=settings.end_learning_rate / settings.learning_rate,
        )
        session.use_optimizer(optimizer, schedule)

    def _update(self, data: IterationData, order: UpdateOrder) -> dict[str, Any]:
        """Makes one optimizer update; returns its metrics."""
        started, session, state = time.monotonic(), self.session, self.state
        metrics = PairMetrics(self.device)
        total = len(order.indices(state.update))
        for micro_batch, indices in enumerate(session.micro_batches(order.micro_batches(state.update))):
            # a process without a pair takes one with weight 0, so that all run the same number of forwards
            pairs = [data.pairs[index] for index in indices or [0]]
            weights = torch.full((len(pairs),), float(bool(indices)), device=self.device)
            answers = self._answers(data, pairs, micro_batch)
            comparison = self.pairs.of_pairs(data, pairs, answers, session.module)
            # gradients are averaged over processes, hence the factor world_size
            session.backward((comparison.losses * weights).sum() * world_size() / total)
            metrics.add(comparison, [data.dataset[pair.row] for pair in pairs], answers, weights)
        values = {**metrics.means(), **session.optimizer_step(), "iteration": self.iteration}
        self.model.update_ema()
        if state.update == 0:
            values |= {f"opponent_{name}": value for name, value in data.summary().items()}
        state.update += 1
        return {**values, "pairs_per_second": round(total / max(time.monotonic() - started, 1e-9), 2)}

    def _answers(self, data: IterationData, pairs: Sequence[Pair], micro_batch: int) -> list[Answer]:
        """The opponent's stored or live answers to the pairs of a micro-batch."""
        if self.settings.opponent == "reference":
            return [data.answer(pair) for pair in pairs]
        part = micro_batch * world_size() + rank()
        seed = seed_of("live", self.settings.seed, self.iteration, self.state.update, part)
        return self.pairs.live_answers([data.dataset[pair.row].prompt for pair in pairs], seed)

    def _promote(self, overwrite: bool) -> None:
        """Ends an iteration: validates, exports the policy, saves the checkpoint that the next one starts from."""
        state = self.state
        self._validate_iteration()
        state.iteration += 1
        state.update = 0
        state.previous_opponent = state.opponent
        self.save(Path("iterations") / f"iteration-{self.iteration}", overwrite=overwrite)
        self.session.use_optimizer(None)
        self.session.save()

    def _stored_weights(self) -> Mapping[str, Tensor]:
        """Gathers the weights of a checkpoint, whose other files are written from them too."""
        self._checkpointed = stored_weights(self.model.policy_model)
        return self._checkpointed

    def _validate(self) -> dict[str, float]:
        assert self._valid is not None
        with self.session.gathered():
            return {f"validation_{name}": value for name, value in self.pairs.validate(self._valid).items()}

    def _validate_iteration(self) -> None:
        """Validates, if there is held-out data, and adds the metrics to the history."""
        metrics = {name.removeprefix("validation_"): value for name, value in self.session.validate().items()}
        if metrics:
            self.best.add(metrics, self.model.policy_model)

    # ---------------------------------------------------------------------------- the original's API

    @property
    def is_main(self) -> bool:
        """True on the main process."""
        return rank() == 0

    @property
    def unwrapped_model(self) -> SPIN:
        """The ``SPIN`` with policy and reference."""
        return self.model

    def __call__(self, overwrite_checkpoints: bool = True) -> SPINResult:
        """Calls ``train``, for scripts of the original."""
        return self.train(overwrite=overwrite_checkpoints)

    def print(self, *message: Any) -> None:
        """Prints on the main process."""
        self.session.accelerator.print(*message)

    def log(self, **data: Any) -> None:
        """Logs values to the metrics of the running training and to accelerate's trackers."""
        if self.session.module is not None:
            self.session.log(data)
        self.session.accelerator.log(data, step=self.steps)

    def wait(self) -> None:
        """Waits until all processes have reached this call."""
        self.session.accelerator.wait_for_everyone()

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Exports policy and tokenizer to ``checkpoint_folder / path``, in the dtypes in which the policy came.

        Every process must call it.

        Raises:
            FileExistsError: the folder exists and ``overwrite`` is False.
        """
        folder = self.checkpoint_folder / path
        export_policy(self.model.policy_model, folder, self.tokenizer, overwrite=overwrite, dtypes=self._stored_dtypes)
        return folder

    def calc_spin_loss(self, real_seq: Int[Tensor, "b n"], prompt_len: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Loss of a batch, with answers that the opponent generates now.

        Args:
            real_seq: prompts with human answers, padded with ``pad_id``.
            prompt_len: number of tokens in each prompt.
        """
        dataset = as_sft_dataset(
            list(zip(real_seq, prompt_len, strict=True)),
            max_seq_len=self.settings.max_seq_len,
            eos_id=self.eos_ids,
            pad_id=self.pad_id,
            name="real_seq",
        )
        seed = seed_of("live", self.settings.seed, self.iteration, self.steps)
        answers = self.pairs.live_answers([example.prompt for example in dataset], seed)
        return self.pairs.compare(dataset, answers).losses.mean()
