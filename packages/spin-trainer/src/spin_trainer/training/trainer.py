"""Self-play fine-tuning (arXiv 2401.01335): the policy learns to prefer human answers to those of its opponent.

The opponent is the policy at the last promotion. The loop is that of ``training.pair_trainer``; the opponent's answers
are stored row by row, so that none is generated twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from lm_core.checks import either, typed
from lm_core.cli.text_generation import SamplingFlags
from lm_core.data.epochs import seed_of
from lm_core.generation.decoding import as_eos_ids
from lm_core.generation.sampling import top_p
from lm_core.tokenizers import end_ids
from lm_core.training.session import SavedValue
from spin_trainer.data.given_answers import read_answers
from spin_trainer.data.iteration_data import IterationData, Pair, answers_fingerprint
from spin_trainer.data.opponent_answers import Answer, Engine, Sampling, answer_prompts, original_filter
from spin_trainer.data.sft_data import Overlong, SFTDataset, as_sft_dataset, training_and_validation
from spin_trainer.model.reference import FrozenReference
from spin_trainer.model.spin import SPIN
from spin_trainer.training.checks import check_datasets, make_spin
from spin_trainer.training.config import SelfPlaySettings, value_of
from spin_trainer.training.pair_trainer import SHOWN, PairTrainer, SPINResult, started_engine
from spin_trainer.training.pairs import PairComparison
from spin_trainer.training.policy_trainer import opened
from spin_trainer.training.state import upgraded


class SPINTrainer(PairTrainer):
    """Fine-tunes any causal language model by self-play.

    Args:
        model: a ``SPIN``, or anything that ``lm_core.adapters.as_causal_lm`` accepts: transformers models with or
            without peft, x-transformers, PaLM, any module from ids to logits. Trained in place, moved to the device.
            A folder or hub name is loaded by ``lm_core.adapters.loading.load_causal_lm``, with its tokenizer.
        train_sft_dataset: prompts with human answers; see ``spin_trainer.data.sft_data``.
        valid_sft_dataset: held-out prompts with human answers.
        answers: the opponent's answers to the training prompts, made elsewhere, for the only iteration; see
            ``spin_trainer.data.given_answers``.
        engine: engine that generates answers: "lm_core", or "vllm" (extra ``vllm``) for transformers models.
        engine_arguments: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``.
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
        answers: Any = None,
        engine: Engine = "lm_core",
        engine_arguments: Mapping[str, Any] | None = None,
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
        self.settings: SelfPlaySettings = SelfPlaySettings.of(settings, config)
        if answers is not None and (self.settings.iterations > 1 or self.settings.opponent == "policy"):
            raise ValueError(
                "answers are those of the model at the start, so iterations must be 1 and opponent 'reference', got "
                f"{self.settings.iterations} and {self.settings.opponent!r}"
            )
        if engine != "lm_core" and (self.settings.live_reference or filters or filter_fn not in (top_p, None)):
            raise ValueError(
                f"engine {engine!r} needs a frozen, precomputed reference, and no filters of your own, got opponent "
                f"{self.settings.opponent!r}, precompute_reference {self.settings.precompute_reference}, "
                f"ref_model_ema_decay {self.settings.ref_model_ema_decay} and filters {[*filters, filter_fn]}"
            )
        model, tokenizer = opened(model, tokenizer)
        self.pad_id = pad_id
        folder = either(None, checkpoint_dir=checkpoint_dir, checkpoint_folder=checkpoint_folder)
        if eos_id is None:
            eos_id = model.eos_ids if isinstance(model, SPIN) else end_ids(tokenizer, model)
        self.eos_ids = as_eos_ids(eos_id)
        # datasets, and the sampling of answers to their prompts
        self.train_dataset: SFTDataset
        self.valid_dataset: SFTDataset | None
        self.train_dataset, self.valid_dataset = training_and_validation(
            partial(
                as_sft_dataset,
                max_seq_len=self.settings.max_seq_len,
                tokenizer=tokenizer,
                eos_id=self.eos_ids,
                pad_id=pad_id,
                template_kwargs=template_kwargs,
                overlong=overlong,
            ),
            {"train_sft_dataset": train_sft_dataset, "valid_sft_dataset": valid_sft_dataset},
            fraction=self.settings.validation_fraction,
            seed=self.settings.seed,
        )
        self.given: list[Answer] | None = None
        if answers is not None:
            self.given = read_answers(
                answers,
                self.train_dataset,
                max_seq_len=self.settings.max_seq_len,
                tokenizer=tokenizer,
                eos_ids=self.eos_ids,
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
            engine=engine,
        )
        # policy and reference
        self.model: SPIN = make_spin(model, self.settings, spin_kwargs, pad_id, self.eos_ids)
        datasets = {"train_sft_dataset": self.train_dataset, "valid_sft_dataset": self.valid_dataset}
        check_datasets(self.model.policy, self.settings.max_seq_len, datasets, self.eos_ids)
        if self.settings.early_stop_patience is not None and self.valid_dataset is None:
            raise ValueError(
                f"early_stop_patience needs a valid_sft_dataset, got {self.settings.early_stop_patience} and None"
            )
        # the session logs, stores and resumes the run
        live = partial(self.model.reference_log_probs, precision=self.settings.precision)
        super().__init__(
            self.model.policy_model,
            self.model.policy,
            self.settings,
            comparison=self.model.comparison,
            reference=live if self.settings.live_reference else None,
            needs_reference=not self.settings.reference_free,
            iterations=self.settings.iterations,
            patience=self.settings.early_stop_patience,
            engine=started_engine(
                engine,
                self.model.policy_model,
                tokenizer,
                max_length=self.settings.max_seq_len,
                arguments=engine_arguments,
            ),
            tokenizer=tokenizer,
            checkpoint_dir=Path("./spin-checkpoints" if folder is None else folder).expanduser(),
            resume=resume,
            trackers=trackers,
            accelerator=accelerator,
            accelerate_kwargs=accelerate_kwargs,
            adam_kwargs=adam_kwargs,
        )
        self.session.place(self.model)
        self._live_pairs = PairComparison(self.scores, self.model.comparison, live)
        self._base_lambda = self.model.lambda_
        self._register_pairs(
            state={
                # a live reference is needed by the iteration's later updates
                "reference": SavedValue(
                    lambda: self.model.ref_model.exported() if self.state.update and self.live_reference else None,
                    lambda state: self.model.ref_model.restore(state),
                ),
            },
            identity=lambda: {
                "train_sft_dataset": self.train_dataset.fingerprint,
                "valid_sft_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
                "opponent_kind": self.settings.opponent,
                "sampling": repr(sorted(self.sampling.description().items())),
                **({} if self.given is None else {"answers": answers_fingerprint(self.given)}),
            },
            curves=SHOWN,
            upgrade=upgraded,
            validate=None if self.valid_dataset is None else self._validate,
            shown=("iteration", "loss", "win_rate"),
        )
        if self.session.precisions.promoted:
            self.model.reset_reference()

    settings: SelfPlaySettings

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
        if not self.live_reference and isinstance(self.model.ref_model, FrozenReference):
            self.model.ref_model.release()  # its log-probabilities are on disk
        return self._run(overwrite)

    @property
    def _mixes(self) -> bool:
        """True if an iteration also trains on the previous one's answers."""
        return self.settings.mix_previous and self.settings.opponent == "reference"

    def _pairs_of(self, iteration: int) -> int:
        return len(self.train_dataset) * (2 if self._mixes and iteration > 0 else 1)

    def _learning_rate(self) -> float:
        return value_of(self.iteration, self.settings.learning_rates, self.settings.learning_rate)

    def _decay_steps(self) -> int | None:
        return self.settings.learning_rate_num_decay_steps

    def _after_update(self) -> None:
        self.model.update_ema()

    def _iteration_data(self) -> tuple[IterationData, IterationData | None]:
        """The opponent's answers and scores: generated now, or read from disk in the middle of an iteration."""
        settings, state, t = self.settings, self.state, self.iteration
        self.model.lambda_ = value_of(t, settings.lambdas, self._base_lambda)
        if state.update == 0 and self.live_reference:
            self.model.update_reference_model_with_policy()
        stored: Any = partial(
            IterationData,
            root=self.run_folder / "generations",
            sampling=self.sampling,
            score_batch_size=settings.rows_per_pass,
        )
        of_train: Any = partial(stored, dataset=self.train_dataset, split="train")
        previous = None
        if self._mixes and t > 0:
            previous = of_train(iteration=t - 1, weights=str(state.previous_opponent))
            previous.complete(None, scores=False)
        train = of_train(iteration=t, weights=state.opponent, previous=previous, answers=self.given)
        valid = None
        if self.valid_dataset is not None:
            valid = stored(dataset=self.valid_dataset, split="valid", iteration=t, weights=state.opponent)
        self._complete([train, valid])
        return train, valid

    def _answers(self, data: IterationData, pairs: Sequence[Pair], part: int) -> list[Answer]:
        """The opponent's stored or live answers to the pairs of a micro-batch."""
        if self.settings.opponent == "reference":
            return super()._answers(data, pairs, part)
        seed = seed_of("live", self.settings.seed, self.iteration, self.state.update, part)
        return self._live_answers([data.dataset[pair.row].prompt for pair in pairs], seed)

    def _live_answers(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        """Answers that the opponent generates now, drawn with ``seed``."""
        if self.settings.opponent == "policy":
            return answer_prompts(self.model.policy, prompts, self.sampling, seed)
        with self.model.ref_model.model() as reference:
            return answer_prompts(reference, prompts, self.sampling, seed)

    # ---------------------------------------------------------------------------- the original's API

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
        answers = self._live_answers([example.prompt for example in dataset], seed)
        return self._live_pairs.compare(dataset, answers).losses.mean()
