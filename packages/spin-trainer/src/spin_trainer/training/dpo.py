"""Preference optimisation on pairs of a dataset: DPO (arXiv 2305.18290) and its successors.

One iteration of ``training.pair_trainer`` on given answers: the policy at the start is the reference, and scores both
answers of every row once, onto disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lm_core.checks import typed
from lm_core.generation.decoding import as_eos_ids
from lm_core.tokenizers import end_ids
from spin_trainer.data.iteration_data import IterationData
from spin_trainer.data.opponent_answers import Sampling
from spin_trainer.data.preference_data import as_preference_dataset, rejected_answers
from spin_trainer.data.sft_data import Overlong, SFTDataset, training_and_validation
from spin_trainer.model.preference_losses import PreferenceLoss
from spin_trainer.training.checks import check_datasets, check_policy
from spin_trainer.training.config import FineTuningSettings
from spin_trainer.training.pair_trainer import PairTrainer
from spin_trainer.training.policy_trainer import FineTuningResult, opened
from spin_trainer.training.weights import fingerprint_of_weights

# Metrics of preference data, by their names in self-play.
NAMES = {
    "real_log_prob": "chosen_log_prob",
    "generated_log_prob": "rejected_log_prob",
    "real_length": "chosen_length",
    "generated_length": "rejected_length",
    "win_rate": "accuracy",
}


CURVES = ("loss", "margin", "accuracy", "chosen_log_prob", "rejected_log_prob", "grad_norm")


@typed
@dataclass(frozen=True, kw_only=True)
class DPOSettings(FineTuningSettings, PreferenceLoss):
    """Settings of preference optimisation.

    Args:
        batch_size: pairs per batch and process; an update has ``gradient_accumulation`` of these.
        micro_batch_size: pairs per backward pass, on each process; by default the whole batch. Smaller values only save
            memory.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    def __post_init__(self) -> None:
        FineTuningSettings.__post_init__(self)
        PreferenceLoss.__post_init__(self)

    @property
    def preference_loss(self) -> PreferenceLoss:
        """The loss alone."""
        return PreferenceLoss(**{field.name: getattr(self, field.name) for field in fields(PreferenceLoss)})


class DPOTrainer(PairTrainer):
    """Trains any causal language model on pairs of a chosen and a rejected answer.

    Args:
        model: anything that ``lm_core.adapters.as_causal_lm`` accepts, or a folder or hub name. Trained in place.
        train_dataset: prompts with chosen and rejected answers; see ``spin_trainer.data.preference_data``.
        valid_dataset: held-out pairs.
        reference_model: reference in the same forms, for one that is not the policy at the start. Of a policy with new
            LoRA adapters the start is the base model.
        tokenizer: tokenizer of texts and chats, saved with the policy; see ``SPINTrainer``.
        accelerator: ``accelerate.Accelerator`` to use instead of a new one.
        adam_kwargs: further arguments of ``torch.optim.AdamW``.
        eos_id: token or tokens that end an answer, by default those of tokenizer and model; () for none.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        overlong: handling of prompts that leave no room for an answer: "error", or "drop" the row.
        checkpoint_dir: folder of the run.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of ``accelerate``'s trackers, and objects with ``log(values, step=...)``.
        config: settings.
        settings: fields of ``DPOSettings``, instead of ``config``.

    Raises:
        ValueError, TypeError: an argument or a dataset's row is invalid; raised before anything is written.
    """

    settings: DPOSettings

    @typed
    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        valid_dataset: Any = None,
        reference_model: Any = None,
        tokenizer: Any = None,
        accelerator: Any = None,
        adam_kwargs: Mapping[str, Any] | None = None,
        eos_id: int | Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        overlong: Overlong = "error",
        checkpoint_dir: str | Path = "./dpo-checkpoints",
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        config: DPOSettings | None = None,
        **settings: Any,
    ) -> None:
        self.settings = DPOSettings.of(settings, config)
        loss = self.settings.preference_loss
        if reference_model is not None and not loss.needs_reference:
            raise ValueError(f"reference_model must be None, since loss {loss.loss!r} has no reference")
        model, tokenizer = opened(model, tokenizer)
        policy = check_policy(model, "model")
        self.eos_ids = as_eos_ids(end_ids(tokenizer, policy) if eos_id is None else eos_id)
        self.train_dataset, self.valid_dataset = training_and_validation(
            partial(
                as_preference_dataset,
                max_seq_len=self.settings.max_seq_len,
                tokenizer=tokenizer,
                eos_id=self.eos_ids,
                template_kwargs=template_kwargs,
                overlong=overlong,
            ),
            {"train_dataset": train_dataset, "valid_dataset": valid_dataset},
            fraction=self.settings.validation_fraction,
            seed=self.settings.seed,
        )
        datasets = {"train_dataset": self.train_dataset, "valid_dataset": self.valid_dataset}
        check_datasets(policy, self.settings.max_seq_len, datasets, self.eos_ids)
        self._reference = (
            None if reference_model is None else check_policy(opened(reference_model, tokenizer)[0], "reference_model")
        )
        self._reference_weights = None if self._reference is None else fingerprint_of_weights(self._reference)
        super().__init__(
            model,
            policy,
            self.settings,
            comparison=loss.comparison,
            needs_reference=loss.needs_reference,
            names=NAMES,
            tokenizer=tokenizer,
            checkpoint_dir=Path(checkpoint_dir).expanduser(),
            resume=resume,
            trackers=trackers,
            accelerator=accelerator,
            adam_kwargs=adam_kwargs,
        )
        self._register_pairs(
            identity=lambda: {
                "train_dataset": self.train_dataset.fingerprint,
                "valid_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
                "reference_model": self._reference_weights,
                "loss": [getattr(loss, field.name) for field in fields(loss)],
            },
            curves=CURVES,
            validate=None if self.valid_dataset is None else self._validate,
            shown=("loss", "accuracy"),
        )

    def train(self, *, overwrite: bool = True) -> FineTuningResult:
        """Trains for all epochs, or resumes the run in ``checkpoint_dir``.

        Seeds the generators of Python, NumPy and torch, or restores their states from the checkpoint.

        Args:
            overwrite: whether to replace a policy that an earlier run exported into this folder.

        Raises:
            RuntimeError: another run is using the folder, or too many losses in a row were not finite.
            CheckpointError, ValueError: the folder belongs to another run or is damaged.
            FileExistsError, FileNotFoundError: the folder contradicts ``resume`` or ``overwrite``.
        """
        result = self._run(overwrite)
        folder = self.run_folder / self._export_path()
        return self.session.result(
            FineTuningResult,
            first_validation=self.session.first_validation,
            last_validation=self.session.last_validation,
            policy_folder=folder if result.iterations else None,
        )

    def _pairs_of(self, iteration: int) -> int:
        return len(self.train_dataset)

    def _export_path(self) -> Path:
        return Path("policy")

    def _reference_policy(self) -> Any:
        return self.policy if self._reference is None else self._reference.to(self.device)

    def _iteration_data(self) -> tuple[IterationData, IterationData | None]:
        """The pairs, with reference log-probabilities computed now, or read from disk after the first update."""

        def of(dataset: SFTDataset | None, split: str) -> IterationData | None:
            if dataset is None:
                return None
            return IterationData(
                dataset=dataset,
                answers=rejected_answers(dataset),
                root=self.run_folder / "reference",
                sampling=Sampling(max_seq_len=self.settings.max_seq_len, precision=self.settings.precision),
                split=split,
                iteration=0,
                weights=self._reference_weights or self.state.opponent,
                score_batch_size=self.settings.rows_per_pass,
            )

        train, valid = of(self.train_dataset, "train"), of(self.valid_dataset, "valid")
        assert train is not None
        self._complete([train, valid])
        return train, valid
