"""Supervised fine-tuning: the cross-entropy of the answers given their prompts, in nats per answer token."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.causal_lm import eval_mode
from lm_core.checks import typed
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import all_reduce_sum, loss_normalizer, rank, world_size
from lm_core.generation.decoding import as_eos_ids
from lm_core.tokenizers import end_ids
from spin_trainer.data.opponent_answers import batches_by_length
from spin_trainer.data.sft_data import Overlong, SFTDataset, as_sft_dataset, training_and_validation
from spin_trainer.model.response_scores import collate
from spin_trainer.training.checks import check_datasets, check_policy
from spin_trainer.training.config import FineTuningSettings
from spin_trainer.training.policy_trainer import FineTuningResult, PolicyTrainer, opened


@typed
@dataclass(frozen=True, kw_only=True)
class SFTSettings(FineTuningSettings):
    """Settings of supervised fine-tuning.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    learning_rate: float = 2e-5


class SFTTrainer(PolicyTrainer):
    """Fine-tunes any causal language model on prompts with answers.

    Only answer tokens count. The loss of an update is a mean over all of its answer tokens, on any number of processes
    and micro-batches. Rows of similar length share a backward pass, so that little is padded.

    Args:
        model: anything that ``lm_core.adapters.as_causal_lm`` accepts, or a folder or hub name. Trained in place.
        train_dataset: prompts with answers; see ``spin_trainer.data.sft_data``.
        valid_dataset: held-out prompts with answers.
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
        settings: fields of ``SFTSettings``, instead of ``config``.

    Raises:
        ValueError, TypeError: an argument or a dataset's row is invalid; raised before anything is written.
    """

    settings: SFTSettings

    @typed
    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        valid_dataset: Any = None,
        tokenizer: Any = None,
        accelerator: Any = None,
        adam_kwargs: Mapping[str, Any] | None = None,
        eos_id: int | Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        overlong: Overlong = "error",
        checkpoint_dir: str | Path | None = "./sft-checkpoints",
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        config: SFTSettings | None = None,
        **settings: Any,
    ) -> None:
        self.settings = SFTSettings.of(settings, config)
        model, tokenizer = opened(model, tokenizer)
        policy = check_policy(model, "model")
        self.eos_ids = as_eos_ids(end_ids(tokenizer, policy) if eos_id is None else eos_id)
        self.train_dataset, self.valid_dataset = training_and_validation(
            partial(
                as_sft_dataset,
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
        super().__init__(
            model,
            policy,
            self.settings,
            tokenizer=tokenizer,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).expanduser(),
            resume=resume,
            trackers=trackers,
            accelerator=accelerator,
            adam_kwargs=adam_kwargs,
        )
        self._lengths = [len(example.prompt) + len(example.response) for example in self.train_dataset]
        updates = self.planned_updates
        self._register(
            identity=lambda: {
                "train_dataset": self.train_dataset.fingerprint,
                "valid_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
            },
            optimizer=lambda: self._optimizer(updates, self.settings.learning_rate),
            validate=None if self.valid_dataset is None else self._validate,
            max_steps=updates,
            curves=["loss", "validation_loss", "grad_norm", "learning_rate"],
            shown=("loss", "tokens_per_second"),
        )

    @property
    def planned_updates(self) -> int:
        """Number of updates of the whole run."""
        total = self._order(len(self.train_dataset), "sft").updates_per_epoch * self.settings.epochs
        return min(total, self.settings.max_steps or total)

    def train(self, *, overwrite: bool = True) -> FineTuningResult:
        """Trains for all epochs, or resumes the run in ``checkpoint_dir``; see ``DPOTrainer.train``."""
        order = self._order(len(self.train_dataset), "sft")
        with self._training() as session:
            for update in session.steps():
                session.log(self._update(order, update))
        finished = session.outcome == "finished" and self.checkpoint_folder is not None
        return session.result(
            FineTuningResult,
            first_validation=session.first_validation,
            last_validation=session.last_validation,
            policy_folder=self.save("policy", overwrite=overwrite) if finished else None,
        )

    def _update(self, order: UpdateOrder, update: int) -> dict[str, Any]:
        """Makes one optimizer update; returns its metrics."""
        started = time.monotonic()
        passes = self._micro_batches(order, update, self._lengths)
        tokens = sum(len(self.train_dataset[row].response) for rows in passes for row in rows)
        total, normalizer = loss_normalizer(tokens, self.device)
        for rows in self.session.micro_batches(passes):
            # a process without a row takes one with weight 0, so that all run the same number of forwards
            log_probs = self._log_probs(rows or [0], self.session.module)
            self.session.backward(-log_probs.sum() * float(bool(rows)) / normalizer)
        values = self.session.optimizer_step()
        return {**values, "tokens_per_second": round(total / max(time.monotonic() - started, 1e-9), 1)}

    def _log_probs(self, rows: Sequence[int], scores: Any, dataset: SFTDataset | None = None) -> torch.Tensor:
        """Summed log-probability of each answer."""
        examples = [(self.train_dataset if dataset is None else dataset)[row] for row in rows]
        prompts, answers = [example.prompt for example in examples], [example.response for example in examples]
        batch = collate(prompts, answers, self.device)
        log_probs: torch.Tensor = scores(*batch)
        return log_probs

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out loss in nats per answer token and per answer; each process takes its share of the batches."""
        dataset = self.valid_dataset
        assert dataset is not None
        sums = torch.zeros(3, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        lengths = [len(example.prompt) + len(example.response) for example in dataset]
        with self.session.gathered(), eval_mode(self.scores):
            for index, rows in enumerate(batches_by_length(lengths, self.settings.rows_per_pass)):
                if index % world_size() == rank():
                    tokens = sum(len(dataset[row].response) for row in rows)
                    nats = -self._log_probs(rows, self.scores, dataset).sum().to(sums.dtype)
                    sums += torch.stack([nats, sums.new_tensor(tokens), sums.new_tensor(len(rows))])
        nats, tokens, answers = all_reduce_sum(sums).tolist()
        return {"validation_loss": nats / tokens, "validation_nll": nats / answers}
