"""The quickstart: two tiny models, trained on the spot and composed for a task that neither can do alone.

Three baselines run the same way: the anchor alone, a composition with an augment that was never trained, and LoRA on
the anchor with as many parameters as the composition learns.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_pytorch.model.augment import AugmentParams
from calm_pytorch.model.blocks import hugging_face_blocks, x_transformer_blocks
from calm_pytorch.model.calm import CALM
from calm_pytorch.quickstart.attention_picture import draw_attention
from calm_pytorch.quickstart.kv_arithmetic import (
    KeyValueTask,
    accuracy,
    logits_of,
    small_decoder,
    token_name,
    train_alone,
)
from calm_pytorch.training.settings import FineTunerSettings
from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.checks import typed
from lm_core.distributed import rank
from lm_core.rng import seed_everything
from lm_core.training.accelerator import autocast
from lm_core.training.session import SavedValue, TrainingResult, TrainingSession, adamw

ASKED = 2000  # expressions of a final accuracy
CHECKED = 500  # expressions of the accuracies that are logged during training
OUTPUT_LAYER = ("to_logits", "lm_head")


@typed
@dataclass(frozen=True, kw_only=True)
class QuickstartSettings(FineTunerSettings):
    """Settings of the key-value arithmetic task: those of a run, and those of the two small models.

    Args:
        batch_size: expressions an update.
        augment_steps: updates of the augment on keys and values.
        anchor_steps: updates of the anchor on numbers.
        keys_share: fraction of the rows of an update that are over keys; the others are over numbers.
        dim: features of both models.
        reads: "sequence" lets the augment read the anchor's own expression as it grows, "prompt" reads it whole first.
        connect: "embedding" reads the augment's last layer from the embedding on, "layers" layer by layer.
        connections: number of connections, 1 to 4.
        learner: model that is trained on the expressions: "composition", "random-augment" (a composition whose augment
            is untrained), or "low-rank" (LoRA on the anchor with as many parameters).
        models: library of both models; "mixed" is an anchor of x-transformers and an augment of Hugging Face.

    Raises:
        ValueError, TypeError: as for ``FineTunerSettings``.
    """

    max_steps: int = 600
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.1
    beta2: float = 0.98
    max_grad_norm: float | None = 1.0
    batch_size: int = 128
    augment_steps: int = 600
    anchor_steps: int = 500
    keys_share: float = 0.75
    dim: int = 64
    reads: Literal["sequence", "prompt"] = "sequence"
    connect: Literal["embedding", "layers"] = "embedding"
    connections: int = 4
    learner: Literal["composition", "random-augment", "low-rank"] = "composition"
    models: Literal["x-transformers", "hugging-face", "mixed"] = "x-transformers"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("augment_steps", "anchor_steps", "dim")
        if not 0 < self.keys_share <= 1:
            raise ValueError(f"keys_share must be in (0, 1], got {self.keys_share}")
        if not 1 <= self.connections <= 4:
            raise ValueError(f"connections must be in [1, 4], got {self.connections}")
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of the 4 heads, got {self.dim}")

    @property
    def task(self) -> dict[str, Any]:
        """The settings that are not those of every run."""
        every = {entry.name for entry in fields(FineTunerSettings)}
        return {name: value for name, value in asdict(self).items() if name not in every}


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(TrainingResult):
    """Outcome of the run, and accuracies, each over 2,000 expressions.

    Attributes:
        held_out: accuracy over keys that no expression in training had.
        trained_keys: accuracy over the other keys.
        anchor_alone: accuracy of the unchanged anchor over held-out keys.
        numbers_before: accuracy of the unchanged anchor over numbers.
        numbers_after: accuracy of the trained model over numbers.
        learned: number of parameters that were trained on expressions.
    """

    held_out: float
    trained_keys: float
    anchor_alone: float
    numbers_before: float
    numbers_after: float
    learned: int


def small_models(
    task: KeyValueTask, settings: QuickstartSettings, *, trained: bool = True
) -> tuple[nn.Module, nn.Module]:
    """An anchor that computes and an augment that knows the keys; untrained, their weights come from a checkpoint."""
    seed_everything(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    of_augment: Any = "hugging-face" if settings.models == "mixed" else settings.models
    of_anchor: Any = "x-transformers" if settings.models == "mixed" else settings.models
    augment = small_decoder(task, dim=settings.dim, library=of_augment)
    anchor = small_decoder(task, dim=settings.dim, library=of_anchor)
    if not trained:
        return anchor, augment
    if settings.learner == "composition":
        train_alone(
            augment,
            lambda: task.pairs(64, 4, generator),
            steps=settings.augment_steps,
            learning_rate=2e-3,
            description="augment: keys",
            every_other=True,
        )
    train_alone(
        anchor,
        lambda: task.expressions(256, generator),
        steps=settings.anchor_steps,
        learning_rate=1e-3,
        description="anchor: numbers",
    )
    return anchor, augment.eval()


def compose_small(anchor: Any, augment: Any, settings: QuickstartSettings) -> CALM:
    """The composition of the two."""
    count, shared = settings.connections, settings.reads == "sequence"
    if settings.connect == "layers":
        pairs = [(layer, layer) for layer in range(5 - count, 5)]
        return CALM(anchor, AugmentParams(augment, connections=pairs, shared_sequence=shared))
    # the module that returns the embedded tokens, and each layer
    if hasattr(anchor, "get_input_embeddings"):
        blocks = [anchor.get_input_embeddings(), *hugging_face_blocks(anchor)]
    else:
        blocks = [anchor.emb_dropout, *x_transformer_blocks(anchor)]
    params = AugmentParams(augment, connections=[(4, i) for i in range(1, count + 1)], shared_sequence=shared)
    return CALM(anchor, params, anchor_transformer_blocks=blocks)


@dataclass(frozen=True)
class Learner:
    """A model that is trained on expressions.

    Attributes:
        model: model that is called.
        parameters: parameters that are trained.
        loss: returns the loss of rows at their last token.
        arguments: further arguments of the model, for logits.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    arguments: Callable[[Tensor], dict[str, Any]]


def make_learner(anchor: Any, augment: Any, settings: QuickstartSettings) -> Learner:
    """The cross-attentions of a composition, or LoRA on the anchor with about as many parameters."""
    calm = compose_small(anchor, augment, settings)
    parameters = list(calm.trainable_parameters())
    if settings.learner == "low-rank":

        def anchor_loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(logits_of(anchor(rows[:, :-1]))[:, -1], rows[:, -1])

        added = add_lora(anchor, sum(parameter.numel() for parameter in parameters))
        return Learner(anchor, added, anchor_loss, lambda rows: {})

    def prompt(rows: Tensor) -> dict[str, Any]:
        return {"prompt": rows[:, :-1]} if settings.reads == "prompt" else {}

    def loss(rows: Tensor) -> Tensor:
        counted = torch.zeros_like(rows, dtype=torch.bool)
        counted[:, -1] = True
        return calm(rows, mask=counted, **prompt(rows))

    return Learner(calm, parameters, loss, lambda rows: {"return_loss": False, **prompt(rows)})


def add_lora(model: nn.Module, count: int) -> list[nn.Parameter]:
    """Adds about ``count`` LoRA parameters (arXiv 2106.09685) to all linear layers but the output; freezes the rest."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if not name.endswith(OUTPUT_LAYER)}
    rank = max(1, round(count / sum(sum(layer.weight.shape) for layer in layers.values())))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)), model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class LearnerLoss(nn.Module):
    """The loss of a learner over rows, as a session calls it."""

    def __init__(self, learner: Learner, precision: Any) -> None:
        super().__init__()
        self.model = learner.model
        self.learner = learner
        self.precision = precision

    def forward(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of the last tokens."""
        with autocast(self.precision, rows.device):
            return self.learner.loss(rows)


def run_quickstart(
    settings: QuickstartSettings,
    folder: str | Path,
    *,
    resume: bool | Literal["auto"] = "auto",
    trackers: Sequence[Any] = (),
) -> QuickstartResult:
    """Trains both models and a learner; writes checkpoints and metrics, and a composition's adapter and picture.

    Args:
        settings: settings of the run.
        folder: folder of the run, from which an interrupted one resumes.
        resume: as for ``FineTuner``.
        trackers: as for ``FineTuner``.

    Raises:
        FileNotFoundError, FileExistsError, CheckpointError: the folder does not suit ``resume`` or the settings.
        ValueError: with ``compile`` or ``fsdp``.
    """
    for name in ("compile", "fsdp"):
        if getattr(settings, name):
            raise ValueError(f"{name} must be false in the quickstart, whose models are too small for it, got true")
    task, target = KeyValueTask(seed=settings.seed), Path(folder).expanduser()
    known, held_out = task.split
    session = TrainingSession(
        "Quickstart",
        config=settings,
        checkpoint_dir=target,
        resume=resume,
        trackers=trackers,
        packages=("calm-pytorch", "x-transformers"),
    )
    # both models alone, and what the anchor can do without the augment; a run that resumes has all of it
    begins = resume is not True and latest_checkpoint(target / "checkpoints") is None
    anchor, augment = (model.to(session.device) for model in small_models(task, settings, trained=begins))
    generator = torch.Generator().manual_seed(settings.seed + 1)

    def draw(count: int, keys: Tensor | None = None) -> Tensor:
        return task.expressions(count, generator, keys).to(session.device)

    def set_draws(state: Tensor) -> None:
        generator.set_state(state)

    over_held_out, over_known, over_numbers = draw(ASKED, held_out), draw(ASKED, known), draw(ASKED)
    checked = draw(CHECKED, held_out)
    alone = [accuracy(anchor, rows) for rows in (over_held_out, over_numbers)] if begins else []
    # training on expressions over some of the keys, accuracy over the others
    learner = make_learner(anchor, augment, settings)
    session.register(
        model=learner.model,
        objective=LearnerLoss(learner, settings.precision),
        optimizer=lambda: adamw(learner.model, settings, parameters=learner.parameters),
        state={
            "draws": SavedValue(generator.get_state, set_draws),
            "alone": SavedValue(lambda: alone, alone.extend),
        },
        identity=settings.task,
        validate=lambda: {"validation_accuracy": accuracy(learner.model, checked, **learner.arguments(checked))},
        curves=("loss", "validation_accuracy", "learning_rate", "grad_norm"),
        shown=("loss", "validation_accuracy"),
    )
    over_keys = round(settings.batch_size * settings.keys_share)
    with session.run():
        for _ in session.steps():
            started = time.monotonic()
            over_numbers_now = draw(settings.batch_size - over_keys)
            rows = torch.cat((draw(over_keys, known), over_numbers_now))
            session.backward(session.module(rows))
            values = session.optimizer_step()
            session.log(values, expressions_per_second=round(len(rows) / (time.monotonic() - started)))
    right, right_trained, right_numbers = (
        accuracy(learner.model, rows, **learner.arguments(rows)) for rows in (over_held_out, over_known, over_numbers)
    )
    if isinstance(learner.model, CALM) and rank() == 0:
        learner.model.save_adapter(target / "adapter", overwrite=True)
        _draw(learner, over_held_out[:1, :-1], target / "attention.png")
    return session.result(
        QuickstartResult,
        held_out=right,
        trained_keys=right_trained,
        anchor_alone=alone[0],
        numbers_before=alone[1],
        numbers_after=right_numbers,
        learned=sum(parameter.numel() for parameter in learner.parameters),
    )


def _draw(learner: Learner, ids: Tensor, output: Path) -> None:
    labels = [token_name(int(token)) for token in ids[0]]
    prompt = None if learner.model.augments[0].shared_sequence else ids  # type: ignore[index, union-attr]
    try:
        draw_attention(learner.model, ids, prompt, output=output, anchor_labels=labels, augment_labels=labels)
    except ImportError:
        print("no picture: pip install matplotlib, then run the same command again")
