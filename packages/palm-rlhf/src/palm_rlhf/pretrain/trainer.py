"""Pretraining of a language model on packed documents.

Each update takes ``gradient_accumulation`` micro-batches on every process and divides their summed loss by the number
of labels in ALL of them, so that an update does not depend on the distribution of its rows over micro-batches and
processes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.checkpoints.pretrained import check_vocabulary
from lm_core.checks import check_ids, typed
from lm_core.data.corpora import Corpus
from lm_core.data.packing import PackedBatches, ValidationBatches, bits_per_byte
from lm_core.distributed import loss_normalizer, rank, world_size
from lm_core.tokenizers import ByteTokenizer, Tokenizer
from lm_core.training.session import TrainingResult as SessionResult
from lm_core.training.session import TrainingSession, adamw
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.pretrain.evaluation import score
from palm_rlhf.pretrain.loss import NextTokenLoss

CURVES = ("train_bits_per_byte", "validation_bits_per_byte", "learning_rate", "grad_norm")

# Arguments of PaLM that the meaning of its weights depends on; others, such as dropout, may change on resume.
ARCHITECTURE = (
    *("dim", "num_tokens", "depth", "dim_head", "heads", "kv_heads", "ff_mult", "causal"),
    *("qk_rmsnorm", "qk_scale", "use_xpos", "rotary_xpos_scale_base"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingResult(SessionResult):
    """Result of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_bits_per_byte: loss on held-out text before training.
        last_bits_per_byte: loss on held-out text at the last validation.
    """

    first_bits_per_byte: float
    last_bits_per_byte: float
    checkpoints: Path


class PretrainTrainer:
    """Trains a PaLM on a corpus, resumably.

    Args:
        model: model to train, in place; moved to the device.
        corpus: documents in the ids of ``tokenizer``; see ``lm_core.data.corpora``.
        checkpoint_dir: folder of the run; see ``lm_core.training.run_directory.RunDirectory``.
        tokenizer: tokenizer with the ids that end and pad documents, stored in checkpoints; bytes by default.
        settings: optimizer, schedule, precision, logging and checkpoints.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows ("tensorboard", "wandb"), and objects with
            ``log(values, step=...)``.

    Raises:
        ValueError: the model is not causal, has LoRA scopes, or fewer tokens than the tokenizer; the device or the
            precision is not available; a side of the corpus is too small; a tracker is unknown; see also
            ``lm_core.training.accelerator``.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: PaLM,
        corpus: Corpus,
        checkpoint_dir: str | Path,
        tokenizer: Any = None,
        settings: TrainingSettings | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        # check that model and tokenizer fit each other
        self.settings = settings = TrainingSettings() if settings is None else settings
        self.tokenizer: Tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        check_vocabulary(self.tokenizer, model.num_tokens)
        if not model.causal:
            raise ValueError("model must be causal to be trained as a language model, got causal=False")
        if len(model.finetune_modules):
            raise ValueError(f"model must have no finetune scopes to be pretrained, got {list(model.finetune_modules)}")
        self.corpus = corpus
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("palm-rlhf",),
        )
        self.device = self.session.device
        # packed rows of both sides of the corpus
        packing: dict[str, Any] = {
            "sequence_length": settings.sequence_length,
            "batch_size": settings.batch_size,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id or 0,
            "rank": rank(),
            "world_size": world_size(),
        }
        self.batches = PackedBatches(documents=corpus.train, seed=settings.seed, **packing)
        self.validation_batches = ValidationBatches(
            documents=corpus.validation, max_tokens=settings.validation_tokens, **packing
        )
        self.model = self.session.place(model)
        self.objective = NextTokenLoss(model, precision=settings.precision)
        # what the session trains, checkpoints and records
        arguments = model.config["arguments"]
        self.session.register(
            model=model,
            objective=self.objective,
            optimizer=lambda: adamw(model, settings),
            blocks=model.blocks,
            state={"batches": self.batches},
            architecture={name: arguments[name] for name in ARCHITECTURE},
            identity={"validation_data": corpus.validation.fingerprint},
            tokenizer=self.tokenizer,
            validate=self._validate,
            record={"model": arguments},
            curves=CURVES,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; available once ``train`` has begun."""
        return self.session.optimizer

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``; a checkpoint is written in any case.

        Seeds the generators of Python, NumPy and torch, or restores them from the checkpoint.

        Raises:
            RuntimeError: another run is using the folder, or the loss was not finite too often in a row.
            CheckpointError: the checkpoint is damaged, or of another model, seed or number of processes.
            ValueError: the checkpoint belongs to other data or another sequence length.
            FileNotFoundError, FileExistsError: the folder does not suit ``resume``.
            OSError: a checkpoint could not be written; earlier ones are untouched.
        """
        with self.session.run() as session:
            for _ in session.steps():
                started = time.monotonic()
                batches = [next(self.batches) for _ in range(self.settings.gradient_accumulation)]
                for batch in batches:
                    check_ids(batch.ids, self.model.num_tokens, "corpus")
                labels, normalizer = loss_normalizer(sum(batch.num_labels for batch in batches), self.device)
                for batch in session.micro_batches(batches):
                    rows = batch.to(self.device)
                    session.backward(session.module(rows.ids, rows.labels, rows.document_ids, normalizer))
                update = session.optimizer_step()
                nats = update["loss"] * labels
                session.log(
                    update,
                    train_bits_per_byte=bits_per_byte(nats, max(1, round(labels)), self.corpus.train),
                    tokens_per_second=round(labels / (time.monotonic() - started)),
                    epoch=self.batches.epoch,
                )
        return session.result(
            TrainingResult,
            first_bits_per_byte=session.first_validation["validation_bits_per_byte"],
            last_bits_per_byte=session.last_validation["validation_bits_per_byte"],
        )

    def _validate(self) -> dict[str, float]:
        held_out = score(self.objective, self.validation_batches)
        return {"validation_bits_per_byte": held_out.bits_per_byte, "validation_loss": held_out.loss}
