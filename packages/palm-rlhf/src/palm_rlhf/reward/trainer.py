"""Training of a reward model on pairs or labels, with its accuracy on held-out examples; resumable exactly.

Processes share each minibatch and sum their gradients, so two of them make the update that one would make.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.checks import check_ids, typed
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import rank, world_size
from lm_core.training.config import CommonSettings
from lm_core.training.session import TrainingResult, TrainingSession, adamw
from palm_rlhf.data.preferences import Labelled, Preference, as_batch, load_preferences
from palm_rlhf.data.prompts import as_tokenizer
from palm_rlhf.reward.losses import bin_cross_entropy, bradley_terry_loss, squared_error
from palm_rlhf.reward.model import RewardModel


@dataclass(frozen=True, kw_only=True)
class RewardResult(TrainingResult):
    """How training ended; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_accuracy: on held-out examples before training; NaN without any.
        last_accuracy: after it. Of pairs: how often the chosen response has the higher reward (a tie counts half); of
            bins: how often the likeliest is right; of numbers: the fraction of the variance explained.
    """

    first_accuracy: float
    last_accuracy: float


class RewardModelTrainer:
    """Trains a reward model.

    Args:
        reward_model: trained in place: its scope, head and embeddings.
        pairs: see ``load_preferences``.
        validation_pairs: held out; by default a tenth of ``pairs`` is, drawn once and for all.
        tokenizer: for texts; travels with checkpoints.
        max_steps: optimizer updates of the run.
        batch_size: examples an update, of all processes together.
        learning_rate: peak learning rate.
        weight_decay: weight decay of matrices.
        max_grad_norm: bound of the gradients' global norm; null only measures it.
        normalize: after the last update, moves and scales the rewards learned from pairs so that those of held-out
            chosen responses have mean 0, and those of all held-out responses deviation 1. Labels keep their scale.
        validate_every: updates between validations.
        checkpoint_dir: folder of the run; None writes nothing.
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: newest checkpoints that are kept; null for all.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.
        seed: seed of order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.

    Raises:
        ValueError: a number is out of range, ids or labels do not suit the model, or nothing is left to learn from.
    """

    @typed
    def __init__(
        self,
        *,
        reward_model: RewardModel,
        pairs: Any,
        validation_pairs: Any = None,
        tokenizer: Any = None,
        max_steps: int = 200,
        batch_size: int = 16,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        normalize: bool = True,
        validate_every: int = 50,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 100,
        keep_checkpoints: int | None = 2,
        resume: bool | Literal["auto"] = "auto",
        seed: int = 0,
        device: str = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        config = CommonSettings(
            max_steps=max_steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta2=0.999,
            max_grad_norm=max_grad_norm,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            precision="fp32",
            seed=seed,
            device=device,
        )
        tokenizer = as_tokenizer(tokenizer)
        examples = load_preferences(pairs, tokenizer=tokenizer)
        if validation_pairs is None:
            # drawn, not every tenth: rows often alternate between labels
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
            held_out = [examples[row] for row in sorted(order[: len(examples) // 10])]
            examples = [examples[row] for row in sorted(order[len(examples) // 10 :])]
        else:
            held_out = load_preferences(validation_pairs, tokenizer=tokenizer)
        self.examples = examples
        self.held_out = held_out
        for example in [*examples, *held_out]:
            _check(example, reward_model)
        self.session = TrainingSession(
            type(self).__name__,
            config=config,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("palm-rlhf",),
        )
        self.device = self.session.device
        self.model = reward_model.to(self.device)
        self.max_steps = max_steps
        self.normalize = normalize and isinstance(examples[0], Preference)
        self.batch_size = min(batch_size, len(examples))
        self.order = UpdateOrder(
            len(examples), batch_size=self.batch_size, seed=seed, rank=rank(), world_size=world_size()
        )
        parameters = list(reward_model.trainable_parameters())
        self.session.register(
            model=reward_model,
            optimizer=lambda: adamw(reward_model, config, parameters=parameters),
            gradients="sum",
            identity={"max_steps": max_steps, "batch_size": batch_size, "examples": _fingerprint(examples)},
            tokenizer=tokenizer,
            validate=self._validate,
            shown=("loss", "validation_accuracy"),
        )

    def train(self) -> RewardResult:
        """Trains up to ``max_steps``, or until Ctrl-C; a checkpoint is written in any case.

        Raises:
            RuntimeError: another run is using the folder, or losses were not finite too often in a row.
            CheckpointError: the checkpoint is of another model, other data or settings, or damaged.
        """
        with self.session.run() as session:
            for step in session.steps():
                (rows,) = self.order.micro_batches(step)
                if rows:
                    session.backward(self._loss([self.examples[row] for row in rows]))
                session.log(session.optimizer_step())
        return session.result(
            RewardResult,
            first_accuracy=session.first_validation.get("validation_accuracy", float("nan")),
            last_accuracy=session.last_validation.get("validation_accuracy", float("nan")),
        )

    def accuracy(self, examples: Sequence[Preference | Labelled] | None = None) -> float:
        """Accuracy on ``examples``, by default the held-out ones; see ``RewardResult``."""
        examples = self.held_out if examples is None else examples
        return _accuracy(type(examples[0]), *self._predictions(examples)) if examples else float("nan")

    def _validate(self) -> dict[str, float]:
        """Accuracy on held-out examples; after the last update, rewards then get their scale."""
        scaled = self.normalize and self.session.step == self.max_steps
        if not self.held_out and not scaled:
            return {}
        first, second = self._predictions(self.held_out or self.examples[:256])
        if scaled and float(deviation := torch.cat((first, second)).double().std()) > 0:
            self.model.standardize(mean=float(first.double().mean()), deviation=float(deviation))
        return {"validation_accuracy": _accuracy(type(self.held_out[0]), first, second)} if self.held_out else {}

    def _loss(self, examples: Sequence[Any]) -> Tensor:
        """This process's share of the loss of a minibatch."""
        first, second = self._scored(examples)
        if isinstance(examples[0], Preference):
            loss = bradley_terry_loss(first, second, torch.tensor([e.margin for e in examples]).to(first))
        else:
            loss = (bin_cross_entropy if self.model.num_binned_output else squared_error)(first, second)
        return loss * (len(examples) / self.batch_size)

    @torch.no_grad()
    def _predictions(self, examples: Sequence[Preference | Labelled]) -> tuple[Tensor, Tensor]:
        """``_scored`` of any number of examples, in evaluation mode, on the host."""
        with eval_mode(self.model):
            parts = [
                [tensor.cpu() for tensor in self._scored(examples[k : k + 64])] for k in range(0, len(examples), 64)
            ]
        first, second = (torch.cat(column) for column in zip(*parts, strict=True))
        return first, second

    def _scored(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected; or predictions (logits with bins) and labels."""
        if isinstance(examples[0], Preference):
            # one forward for both: half the calls, and one use of each parameter a backward
            prompts = [example.prompt for example in examples] * 2
            responses = [example.chosen for example in examples] + [example.rejected for example in examples]
            batch = as_batch(prompts, responses).to(self.device)
            chosen, rejected = self.model(batch.ids, prompt_lengths=batch.prompt_lengths, lengths=batch.lengths).chunk(
                2
            )
            return chosen, rejected
        batch = as_batch([example.prompt for example in examples], [example.response for example in examples])
        batch = batch.to(self.device)
        logits = self.model.logits(batch.ids, prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)
        labels = torch.tensor([example.label for example in examples], device=self.device)
        return (logits, labels.long()) if self.model.num_binned_output else (logits[:, 0], labels)


def _fingerprint(examples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        values = [value.tolist() if isinstance(value, Tensor) else value for value in vars(example).values()]
        digest.update(repr(values).encode())
    return digest.hexdigest()[:16]


def _accuracy(kind: type, first: Tensor, second: Tensor) -> float:
    """Of rewards of chosen and rejected, of logits of bins and bins, or of numbers and labels."""
    if issubclass(kind, Preference):
        return float(((first > second).float() + 0.5 * (first == second).float()).mean())
    if first.ndim == 2:
        return float((first.argmax(dim=-1) == second).float().mean())
    return float(1 - (first - second).square().mean() / second.var(correction=0).clamp(min=1e-12))


def _check(example: Preference | Labelled, model: RewardModel) -> None:
    if isinstance(example, Preference):
        check_ids(torch.cat((example.prompt, example.chosen, example.rejected)), model.palm.num_tokens, "pairs")
        return
    check_ids(torch.cat((example.prompt, example.response)), model.palm.num_tokens, "pairs")
    bins = model.num_binned_output
    if bins and (example.label != int(example.label) or not 0 <= example.label < bins):
        raise ValueError(f"labels must be bins in [0, {bins}), got {example.label}")
