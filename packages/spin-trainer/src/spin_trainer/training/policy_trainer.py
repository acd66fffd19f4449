"""Base of the trainers: a policy in a training session, its optimizer, its batches, its checkpoints and exports."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.checkpoint import checkpoint_folder as folder_of_model
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import rank, world_size
from lm_core.tokenizers import as_tokenizer, load_tokenizer
from lm_core.training.blocks import blocks_of, enable_gradient_checkpointing
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.session import TrainingResult, TrainingSession
from spin_trainer.model.dropout import dropout_of
from spin_trainer.model.response_scores import ResponseScores
from spin_trainer.training.checks import check_accelerator
from spin_trainer.training.config import FineTuningSettings
from spin_trainer.training.weights import (
    export_policy,
    fingerprint_of_weights,
    is_partly_frozen,
    load_stored_weights,
    stored_weights,
    write_native_files,
)


@dataclass(frozen=True, kw_only=True)
class FineTuningResult(TrainingResult):
    """Result of a run of ``DPOTrainer`` or ``SFTTrainer``; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_validation: held-out metrics before training; empty without held-out data.
        last_validation: the newest held-out metrics.
        policy_folder: folder of the trained policy in the format of its own library; None until the run is complete.
    """

    first_validation: dict[str, float]
    last_validation: dict[str, float]
    policy_folder: Path | None


class PolicyTrainer:
    """A policy, its ``TrainingSession`` and what every trainer does with them; subclasses have the loop.

    Args:
        policy_model: module that is trained in place; moved to the device.
        policy: ``policy_model`` as a ``CausalLM``.
        settings: settings of the run.
        tokenizer: tokenizer that is stored with checkpoints and exports.
        checkpoint_dir: folder of the run; None stores nothing.
        resume: see ``lm_core.training.session.TrainingSession``.
        trackers: see ``lm_core.training.session.TrainingSession``.
        accelerator: ``accelerate.Accelerator`` to use instead of a new one.
        accelerate_kwargs: arguments of the new ``accelerate.Accelerator``.
        adam_kwargs: further arguments of ``torch.optim.AdamW``.

    Raises:
        ValueError, TypeError: the accelerator or the device does not fit, or the model cannot recompute activations.
    """

    settings: FineTuningSettings

    def __init__(
        self,
        policy_model: nn.Module,
        policy: Any,
        settings: FineTuningSettings,
        *,
        tokenizer: Any,
        checkpoint_dir: Path | None,
        resume: bool | Literal["auto"],
        trackers: Sequence[Any],
        accelerator: Any = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        adam_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(policy_model)()  # raises for a model without it
        self.settings = settings
        self.policy_model = policy_model
        self.policy = policy
        self.tokenizer = tokenizer
        self.checkpoint_folder = checkpoint_dir
        self.adam_kwargs = dict(adam_kwargs or {})
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("spin-trainer",),
            accelerator=check_accelerator(accelerator, accelerate_kwargs, settings.device),
        )
        self.device = self.session.device
        self.scores = ResponseScores(policy, precision=settings.precision)
        self._checkpointed: Mapping[str, Tensor] = {}
        self._stored_dtypes: dict[str, torch.dtype] = {}
        self._frozen_weights = cache(partial(fingerprint_of_weights, policy_model, trainable=False))

    def _register(self, *, identity: Callable[[], Mapping[str, Any]], **arguments: Any) -> None:
        """Registers the policy with the session; ``arguments`` are further ones of ``TrainingSession.register``."""
        policy, settings = self.session.place(self.policy_model), self.settings
        # of a partly frozen policy (LoRA) a checkpoint stores the trained parameters alone
        whole = isinstance(policy, PretrainedMixin) and not is_partly_frozen(policy) and not settings.fsdp
        self.session.register(
            model=policy,
            objective=self.scores,
            blocks=lambda: blocks_of(policy),
            identity=lambda: {
                "frozen_weights": self._frozen_weights(),
                "batch": settings.batch_size * settings.gradient_accumulation * world_size(),
                "epochs": settings.epochs,
                "max_steps": settings.max_steps,
                **identity(),
            },
            save_weights=lambda: policy if whole else self._stored_weights(),
            assets=None if whole else lambda folder: write_native_files(policy, folder, self._checkpointed),
            load_weights=lambda stored: load_stored_weights(policy, stored.model_state or {}, str(stored.path)),
            tokenizer=self.tokenizer,
            **arguments,
        )
        # names, since sharding replaces the parameters
        promoted = {id(parameter): dtype for parameter, dtype in self.session.precisions.promoted}
        self._stored_dtypes = {name: promoted[id(p)] for name, p in policy.named_parameters() if id(p) in promoted}

    def _stored_weights(self) -> Mapping[str, Tensor]:
        """Gathers the weights of a checkpoint, whose other files are written from them too."""
        self._checkpointed = stored_weights(self.policy_model)
        return self._checkpointed

    @contextlib.contextmanager
    def _training(self) -> Iterator[TrainingSession]:
        """Opens the run, with the dropout and the activation checkpointing of the settings."""
        self._frozen_weights()  # includes buffers, which a forward may change
        policy, settings = self.policy_model, self.settings
        with self.session.run() as session, dropout_of(policy, settings.dropout), contextlib.ExitStack() as stack:
            if settings.gradient_checkpointing:
                stack.callback(enable_gradient_checkpointing(policy))
            yield session

    def _order(self, rows: int, *key: int | str) -> UpdateOrder:
        """Order of this number of rows, by update."""
        settings = self.settings
        return UpdateOrder(
            rows,
            batch_size=settings.batch_size * settings.gradient_accumulation * world_size(),
            micro_batches=settings.gradient_accumulation,
            last="short",
            seed=settings.seed,
            key=key,
            rank=rank(),
            world_size=world_size(),
        )

    def _micro_batches(self, order: UpdateOrder, update: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
        """This rank's rows of each backward pass of an update: equally many lists on every rank, some may be empty.

        With ``lengths``, rows of similar length share a pass, longest first, so that little is padded.
        """
        total, size = len(order.indices(update)), self.settings.rows_per_pass
        passes = []
        for index, rows in enumerate(order.micro_batches(update)):
            batch = min(order.micro_batch_size, total - index * order.micro_batch_size)
            largest_share = -(-batch // world_size())
            passes += [rows[start : start + size] for start in range(0, largest_share, size)]
        if lengths is None:
            return passes
        left = iter(sorted(itertools.chain(*passes), key=lambda row: (-lengths[row], row)))
        return [list(itertools.islice(left, len(rows))) for rows in passes]

    def _optimizer(
        self, updates: int, learning_rate: float, decay_steps: int | None = None
    ) -> tuple[torch.optim.AdamW, LearningRateSchedule]:
        """AdamW, and its schedule: warmup, then linear decay as in the SPIN paper."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.policy_model, weight_decay=settings.weight_decay),
            **{"lr": learning_rate, "betas": (0.9, 0.99), **self.adam_kwargs},
        )
        warmup_steps = int(settings.warmup * updates)
        schedule = LearningRateSchedule(
            optimizer,
            kind="linear",
            warmup_steps=warmup_steps,
            total_steps=max(decay_steps or updates, warmup_steps + 1),
            final_scale=settings.end_learning_rate / settings.learning_rate,
        )
        return optimizer, schedule

    @property
    def steps(self) -> int:
        """Number of completed updates."""
        return self.session.step

    @property
    def is_main(self) -> bool:
        """True on the main process."""
        return rank() == 0

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Exports policy and tokenizer to ``checkpoint_folder / path``, in the dtypes in which the policy came.

        Every process must call it.

        Raises:
            FileExistsError: the folder exists and ``overwrite`` is False.
        """
        folder = (self.checkpoint_folder or Path()) / path
        export_policy(self.policy_model, folder, self.tokenizer, overwrite=overwrite, dtypes=self._stored_dtypes)
        return folder


def opened(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a trainer: a folder or hub name is loaded, with its tokenizer unless one is passed."""
    if isinstance(model, str | Path):
        if tokenizer is None:
            with contextlib.suppress(FileNotFoundError, ValueError):  # models of token ids have none
                tokenizer = load_tokenizer(folder_of_model(model))
        model = load_causal_lm(model)
    return model, None if tokenizer is None else as_tokenizer(tokenizer)
