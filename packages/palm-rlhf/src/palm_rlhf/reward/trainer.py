"""Training of a reward model on pairs or labels, with its accuracy on examples held out; resumable exactly.

Processes share each minibatch and add up their gradients, so two of them make the update that one would make.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import check_ids, check_positive, typed
from lm_core.distributed import all_reduce_gradients, all_reduce_sum, rank, world_size
from lm_core.rng import restore_rng, seed_everything
from lm_core.training.accelerator import InterruptHandler, pick_device, start_accelerator
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar
from lm_core.training.optimization import LearningRateSchedule, NonFiniteGuard, finish_update, optimizer_groups
from lm_core.training.run_directory import RunDirectory
from palm_rlhf.data.preferences import Labelled, Preference, as_batch, load_preferences
from palm_rlhf.data.prompts import as_tokenizer
from palm_rlhf.reward.losses import bin_cross_entropy, bradley_terry_loss, squared_error
from palm_rlhf.reward.model import RewardModel


@dataclass(frozen=True)
class RewardResult:
    """How training ended.

    Attributes:
        outcome: "finished" or "interrupted".
        step: updates done.
        first_accuracy: on held-out examples before training; NaN without any.
        last_accuracy: after it. Of pairs: how often the chosen response has the higher reward (a tie counts half); of
            bins: how often the likeliest is right; of numbers: the part of the variance explained.
        checkpoints: folder of the checkpoints; None without ``checkpoint_dir``.
        first_step: updates that had been done when this call began.
    """

    outcome: Literal["finished", "interrupted"]
    step: int
    first_accuracy: float
    last_accuracy: float
    checkpoints: Path | None
    first_step: int = 0


class RewardModelTrainer:
    """Trains a reward model.

    Args:
        reward_model: trained in place: its scope, head and embeddings.
        pairs: see ``load_preferences``.
        validation_pairs: held out; by default a tenth of ``pairs`` is, drawn once and for all.
        tokenizer: for texts; travels with checkpoints.
        max_steps: updates.
        batch_size: examples an update, of all processes together.
        learning_rate: at its peak.
        weight_decay: of matrices.
        max_grad_norm: gradients with a greater global norm are scaled down; None only measures it.
        normalize: after the last update, moves and scales the rewards learned from pairs so that those of held-out
            chosen responses have mean 0, and those of all held-out responses deviation 1. Labels keep their scale.
        validate_every: updates between validations.
        checkpoint_dir: folder of the run; None writes nothing.
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: how many stay.
        resume: "auto" goes on if there is a checkpoint, True demands one, False demands a fresh folder.
        seed: of order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.

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
    ) -> None:
        for name, value in (
            ("max_steps", max_steps),
            ("batch_size", batch_size),
            ("validate_every", validate_every),
            ("checkpoint_every", checkpoint_every),
        ):
            check_positive(value, name)
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate}")
        tokenizer = as_tokenizer(tokenizer)
        examples = load_preferences(pairs, tokenizer=tokenizer)
        if validation_pairs is None:
            # drawn, not every tenth: rows often alternate between labels
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
            held_out = [examples[number] for number in sorted(order[: len(examples) // 10])]
            examples = [examples[number] for number in sorted(order[len(examples) // 10 :])]
        else:
            held_out = load_preferences(validation_pairs, tokenizer=tokenizer)
        self.examples, self.held_out = examples, held_out
        for example in [*examples, *held_out]:
            _check(example, reward_model)
        self.device = pick_device(device)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        start_accelerator(self.device, tracker_names=[], folder=self.checkpoint_dir or Path("."))
        self.model = reward_model.to(self.device)
        self.tokenizer, self.resume = tokenizer, resume
        self.max_steps, self.batch_size, self.max_grad_norm, self.seed = max_steps, batch_size, max_grad_norm, seed
        self.normalize = normalize and isinstance(examples[0], Preference)
        self.validate_every, self.checkpoint_every, self.keep = validate_every, checkpoint_every, keep_checkpoints
        self.parameters = list(reward_model.trainable_parameters())
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(reward_model, weight_decay=weight_decay, parameters=self.parameters), lr=learning_rate
        )
        self.schedule = LearningRateSchedule(
            self.optimizer, kind="cosine", warmup_steps=max_steps // 20, total_steps=max_steps, final_scale=0.05
        )
        self.guard = NonFiniteGuard()
        self.step = 0
        self.first_accuracy = self.last_accuracy = float("nan")
        self._started = False

    def train(self) -> RewardResult:
        """Trains up to ``max_steps``, or until Ctrl-C; a checkpoint is written in any case.

        Raises:
            RuntimeError: another run is using the folder, or losses were not finite too often in a row.
            CheckpointError: the checkpoint is of another model, or damaged.
            ValueError: the checkpoint is of other data or settings.
        """
        outcome: Literal["finished", "interrupted"] = "finished"
        with contextlib.ExitStack() as stack:
            run = self._run(stack)
            if not self._started:
                self._start(run)
            log = self._log(run, stack)
            stack.callback(self.model.train, self.model.training)
            self.model.train()
            interrupt = stack.enter_context(InterruptHandler())
            first_step = self.step
            if self.step == 0:
                self.first_accuracy = self.last_accuracy = self.accuracy()
            while self.step < self.max_steps and outcome == "finished":
                loss = self._update()
                self.step += 1
                row = {"loss": loss, "learning_rate": self.schedule.learning_rate}
                last = self.step == self.max_steps
                if self.step % self.validate_every == 0 or last:
                    self._validate()
                    row["validation_accuracy"] = self.last_accuracy
                if log is not None:
                    log.log(self.step, row)
                    log.progress.update()
                if interrupt.should_stop() and not last:
                    outcome = "interrupted"
                if run is not None and (self.step % self.checkpoint_every == 0 or last or outcome == "interrupted"):
                    self._save(run)
            if run is not None and rank() == 0:
                with contextlib.suppress(ImportError, ValueError):
                    plot_curves(run.metrics_path, run.curves_path)
        checkpoints = None if run is None else run.checkpoints
        return RewardResult(outcome, self.step, self.first_accuracy, self.last_accuracy, checkpoints, first_step)

    def accuracy(self, examples: Sequence[Preference | Labelled] | None = None) -> float:
        """On held-out examples, or those given; see ``RewardResult``."""
        examples = self.held_out if examples is None else examples
        return _accuracy(type(examples[0]), *self._predictions(examples)) if examples else float("nan")

    def _validate(self) -> None:
        """Sets ``last_accuracy``; after the last update, rewards then get their scale."""
        normalize = self.normalize and self.step == self.max_steps
        if self.held_out:
            first, second = self._predictions(self.held_out)
            self.last_accuracy = _accuracy(type(self.held_out[0]), first, second)
        elif normalize:
            first, second = self._predictions(self.examples[:256])
        if normalize and float(deviation := torch.cat((first, second)).double().std()) > 0:
            self.model.standardize(mean=float(first.double().mean()), deviation=float(deviation))

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

    def _update(self) -> float:
        count = len(self.examples)
        number = self.step * self.batch_size
        rows: list[int] = []
        while len(rows) < min(self.batch_size, count):
            pass_, within = divmod(number + len(rows), count)
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + pass_) % 2**63)
            order = torch.randperm(count, generator=generator).tolist()
            rows += order[within : within + min(self.batch_size, count) - len(rows)]
        mine = [self.examples[row] for row in rows[rank() :: world_size()]]
        loss = torch.zeros((), device=self.device)
        if mine:
            first, second = self._scored(mine)
            if isinstance(mine[0], Preference):
                margin = torch.tensor([getattr(example, "margin", 0.0) for example in mine]).to(first)
                part = bradley_terry_loss(first, second, margin)
            else:
                part = (bin_cross_entropy if self.model.num_binned_output else squared_error)(first, second)
            part = part * (len(mine) / len(rows))
            part.backward()
            loss = part.detach()
        all_reduce_gradients(self.parameters)
        total = all_reduce_sum(loss)
        finish_update(
            self.step + 1,
            total,
            self.parameters,
            optimizer=self.optimizer,
            schedule=self.schedule,
            guard=self.guard,
            max_grad_norm=self.max_grad_norm,
        )
        return float(total)

    # ------------------------------------------------------------------------------------------ beginning, going on

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_steps": self.max_steps,
            "examples": len(self.examples),
        }

    def _run(self, stack: contextlib.ExitStack) -> RunDirectory | None:
        if self.checkpoint_dir is None:
            return None
        return stack.enter_context(
            RunDirectory(
                self.checkpoint_dir,
                resume="auto" if self._started else self.resume,
                seed=self.seed,
                device=self.device,
                settings=self._settings(),
                packages=("palm-rlhf",),
            )
        )

    def _log(self, run: RunDirectory | None, stack: contextlib.ExitStack) -> MetricsLog | None:
        if run is None:
            return None
        bar = stack.enter_context(
            progress_bar(self.max_steps, initial=self.step, description="reward", is_main=rank() == 0)
        )
        return stack.enter_context(
            MetricsLog(run.metrics_path, resume_step=self.step or -1, is_main=rank() == 0, progress=bar)
        )

    def _start(self, run: RunDirectory | None) -> None:
        self._started = True
        if run is None or not run.resumes:
            seed_everything((self.seed + rank()) % 2**32)
            return
        checkpoint: Checkpoint = load_checkpoint(run.checkpoints)
        state = checkpoint.trainer_state
        if state.get("trainer") != type(self).__name__:
            raise CheckpointError(f"{checkpoint.path} was not written by {type(self).__name__}")
        for name, value in self._settings().items():
            if state["settings"][name] != value:
                raise ValueError(f"{name} must be {state['settings'][name]} as in the run being resumed, got {value}")
        load_weights(self.model, checkpoint.model_state or {}, where=str(checkpoint.path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.first_accuracy, self.last_accuracy = state["accuracies"]
        self.step = checkpoint.step
        restore_rng(checkpoint.rng)

    def _save(self, run: RunDirectory) -> None:
        saves = getattr(self.tokenizer, "save_pretrained", None)
        save_checkpoint(
            run.checkpoints,
            self.step,
            model=self.model,
            trainer_state={
                "trainer": type(self).__name__,
                "settings": self._settings(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "guard": self.guard.state_dict(),
                "accuracies": (self.first_accuracy, self.last_accuracy),
            },
            tokenizer=self.tokenizer if callable(saves) else None,
            keep=self.keep,
        )


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
