"""Training of a reward model on pairs or labels, with its accuracy on held-out examples; resumable exactly.

Processes share each minibatch and sum their gradients, so an update is the same on any number of processes. With
``fsdp`` they hold a shard of the weights each.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from lm_core.checks import check_ids, typed
from lm_core.data.epochs import UpdateOrder, held_out_split
from lm_core.distributed import rank, world_size
from lm_core.training.accelerator import autocast
from lm_core.training.blocks import blocks_of
from lm_core.training.config import CommonSettings
from lm_core.training.session import TrainingResult, TrainingSession, adamw
from palm_rlhf.data.preferences import Labelled, Preference, load_preferences
from palm_rlhf.data.prompts import as_tokenizer
from palm_rlhf.data.rollouts import joined
from palm_rlhf.reward.classifier import Classifier
from palm_rlhf.reward.losses import bradley_terry_loss
from palm_rlhf.reward.model import RewardModel


@typed
@dataclass(frozen=True, kw_only=True)
class RewardSettings(CommonSettings):
    """Training: optimizer, schedule, batches and the scale of rewards.

    Args:
        batch_size: examples per update, over all processes.
        micro_batch_size: examples per backward pass, on each process; by default the process's share of an update.
        validation_fraction: fraction of the data held out for validation.
        normalize: standardizes rewards learned from pairs after the last update: mean 0 over held-out chosen responses,
            standard deviation 1 over all held-out responses. Rewards learned from labels keep their scale.
    """

    max_steps: int = 200
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta2: float = 0.999
    validation_fraction: float = 0.1
    normalize: bool = True
    validate_every: int = 50
    checkpoint_every: int | None = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("batch_size", "micro_batch_size")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True)
class RewardResult(TrainingResult):
    """Result of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_accuracy: accuracy on held-out examples before training.
        last_accuracy: accuracy after training. For pairs: fraction with the higher reward on the chosen response (a tie
            counts half); for bins: fraction where the likeliest is right; for numbers: explained variance.
    """

    first_accuracy: float
    last_accuracy: float


class RewardOutputs(nn.Module):
    """Rewards of pairs, or outputs of the head for labels: what the loss reads, as the module that FSDP shards."""

    def __init__(self, model: RewardModel | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, are_pairs: bool, ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Rewards ``(b,)``, or outputs ``(b, k)`` of the head."""
        score: Any = self.model if are_pairs else self.model.logits
        return score(ids, prompt_lengths=prompt_lengths, lengths=lengths)


class RewardModelTrainer:
    """Trains a reward model.

    Args:
        reward_model: model to train, in place: a ``RewardModel`` (its scope, head and embeddings) or a ``Classifier``.
        pairs: pairs or labelled responses; see ``load_preferences``.
        validation_pairs: held-out examples; by default ``validation_fraction`` of ``pairs``, drawn with a fixed seed.
        tokenizer: tokenizer of texts; stored in checkpoints.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        checkpoint_dir: folder of the run; None writes nothing.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.
        settings: optimizer, batches, logging and checkpoints.
        **options: fields of ``settings`` to override.

    Raises:
        ValueError: a number is out of range, ids or labels do not fit the model, or there are too few pairs to hold
            some out.
        TypeError: an option is unknown or of another type.
    """

    @typed
    def __init__(
        self,
        *,
        reward_model: RewardModel | Classifier,
        pairs: Any,
        validation_pairs: Any = None,
        tokenizer: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        settings: RewardSettings | None = None,
        **options: Any,
    ) -> None:
        # training and held-out examples
        self.settings = settings = replace(settings or RewardSettings(), **options)
        tokenizer = as_tokenizer(tokenizer)
        load = partial(load_preferences, tokenizer=tokenizer, template_kwargs=template_kwargs)
        examples = load(pairs)
        held_out = [] if validation_pairs is None else load(validation_pairs)
        for example in [*examples, *held_out]:
            _check(example, reward_model)
        if validation_pairs is None:
            # drawn, not every tenth: rows often alternate between labels
            count = int(len(examples) * settings.validation_fraction)
            if not count:
                raise ValueError(
                    f"pairs must be at least {math.ceil(1 / settings.validation_fraction)} to hold out "
                    f"{settings.validation_fraction} of them, got {len(examples)}; pass validation_pairs "
                    "(--validation_data) or a larger validation_fraction"
                )
            examples, held_out = held_out_split(examples, count, 0, "validation")
        self.examples = examples
        self.held_out = held_out
        # device, order of examples, and what the session trains and checkpoints
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("palm-rlhf",),
        )
        self.device = self.session.device
        self.model = self.session.place(reward_model)
        self.outputs = RewardOutputs(reward_model)
        self.precision = settings.precision
        standardizable = isinstance(reward_model, RewardModel) and isinstance(examples[0], Preference)
        self.normalize = settings.normalize and standardizable
        self.batch_size = min(settings.batch_size, len(examples))
        self.order = UpdateOrder(
            len(examples), batch_size=self.batch_size, seed=settings.seed, rank=rank(), world_size=world_size()
        )
        files = reward_model.session_arguments() if isinstance(reward_model, Classifier) else {}
        frozen = {"frozen": reward_model.frozen_hash()} if isinstance(reward_model, Classifier) else {}
        self.session.register(
            model=reward_model,
            objective=self.outputs,
            blocks=lambda: blocks_of(reward_model),
            **files,
            optimizer=lambda: adamw(reward_model, settings, parameters=reward_model.trainable_parameters()),
            gradients="sum",
            identity={
                "max_steps": settings.max_steps,
                "batch_size": settings.batch_size,
                "examples": _fingerprint(examples),
                "held_out": _fingerprint(held_out),
                **frozen,
            },
            tokenizer=tokenizer,
            validate=self._validate,
            shown=("loss", "validation_accuracy"),
        )

    def train(self) -> RewardResult:
        """Trains up to ``max_steps``, or until Ctrl-C; a checkpoint is written in any case.

        Raises:
            RuntimeError: another run is using the folder, or losses were not finite too often in a row.
            CheckpointError: the checkpoint is damaged, or of another model, other data or other settings.
        """
        with self.session.run() as session:
            for step in session.steps():
                (rows,) = self.order.micro_batches(step)
                share = -(-self.batch_size // world_size())
                size = self.settings.micro_batch_size or share
                # as many passes on every process, which FSDP needs: one without rows takes an example of weight 0
                parts = [rows[start : start + size] for start in range(0, share, size)]
                for part in session.micro_batches(parts):
                    examples = [self.examples[row] for row in part]
                    session.backward(self._loss(examples) if examples else 0 * self._loss(self.examples[:1]))
                session.log(session.optimizer_step())
        return session.result(
            RewardResult,
            first_accuracy=session.first_validation["validation_accuracy"],
            last_accuracy=session.last_validation["validation_accuracy"],
        )

    def accuracy(self, examples: Sequence[Preference | Labelled] | None = None) -> float:
        """Accuracy on ``examples``, by default the held-out ones; see ``RewardResult``."""
        examples = self.held_out if examples is None else examples
        return _accuracy(type(examples[0]), *self._predictions(examples))

    def _validate(self) -> dict[str, float]:
        """Accuracy on held-out examples; standardizes rewards after the last update."""
        scaled = self.normalize and self.session.step == self.settings.max_steps
        first, second = self._predictions(self.held_out)
        if scaled and float(deviation := torch.cat((first, second)).double().std()) > 0:
            assert isinstance(self.model, RewardModel)
            if self.settings.fsdp:
                self.outputs.reshard()  # type: ignore[operator]  # gathered weights are copies
            self.model.standardize(mean=float(first.double().mean()), deviation=float(deviation))
        return {"validation_accuracy": _accuracy(type(self.held_out[0]), first, second)}

    def _loss(self, examples: Sequence[Any]) -> Tensor:
        """This process's share of the loss of a minibatch."""
        first, second = self._scored(examples, self.session.module)
        if isinstance(examples[0], Preference):
            loss = bradley_terry_loss(first, second, torch.tensor([e.margin for e in examples]).to(first))
        else:
            loss = (F.cross_entropy if self.model.num_binned_output else F.mse_loss)(first, second)
        return loss * (len(examples) / self.batch_size)

    @torch.no_grad()
    def _predictions(self, examples: Sequence[Preference | Labelled]) -> tuple[Tensor, Tensor]:
        """``_scored`` of any number of examples, in evaluation mode, on the CPU."""
        with eval_mode(self.outputs):
            parts = [
                [tensor.cpu() for tensor in self._scored(examples[k : k + 64], self.outputs)]
                for k in range(0, len(examples), 64)
            ]
        first, second = (torch.cat(column) for column in zip(*parts, strict=True))
        return first, second

    def _scored(self, examples: Sequence[Any], module: nn.Module) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected responses; or predictions (logits of bins) and labels."""
        are_pairs = isinstance(examples[0], Preference)
        prompts = [example.prompt for example in examples]
        if are_pairs:
            # one forward for both: half the calls, and one use of each parameter per backward
            prompts, responses = prompts * 2, [e.chosen for e in examples] + [e.rejected for e in examples]
        else:
            responses = [example.response for example in examples]
        ids, prompt_lengths, lengths = (tensor.to(self.device) for tensor in joined(prompts, responses))
        with autocast(self.precision, self.device):
            outputs = module(are_pairs, ids, prompt_lengths, lengths)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if are_pairs:
            chosen, rejected = outputs.chunk(2)
            return chosen, rejected
        labels = torch.tensor([example.label for example in examples], device=self.device)
        return (outputs, labels.long()) if self.model.num_binned_output else (outputs[:, 0], labels.to(outputs.dtype))


def _fingerprint(examples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        values = [value.tolist() if isinstance(value, Tensor) else value for value in vars(example).values()]
        digest.update(repr(values).encode())
    return digest.hexdigest()[:16]


def _accuracy(kind: type, first: Tensor, second: Tensor) -> float:
    """Accuracy of the outputs of ``_scored``; see ``RewardResult``."""
    if issubclass(kind, Preference):
        return float(((first > second).float() + 0.5 * (first == second).float()).mean())
    if first.ndim == 2:
        return float((first.argmax(dim=-1) == second).float().mean())
    return float(1 - (first - second).square().mean() / second.var(correction=0).clamp(min=1e-12))


def _check(example: Preference | Labelled, model: RewardModel | Classifier) -> None:
    size = model.palm.num_tokens if isinstance(model, RewardModel) else model.num_tokens
    if isinstance(example, Preference):
        check_ids(torch.cat((example.prompt, example.chosen, example.rejected)), size, "pairs")
        return
    check_ids(torch.cat((example.prompt, example.response)), size, "pairs")
    bins = model.num_binned_output
    if bins and (example.label != int(example.label) or not 0 <= example.label < bins):
        raise ValueError(f"labels must be bins in [0, {bins}), got {example.label}")
