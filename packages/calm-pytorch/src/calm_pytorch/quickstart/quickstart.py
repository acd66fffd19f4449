"""The quickstart: two tiny models, trained on the spot and composed for a task that neither can do alone.

Three baselines run the same way: the anchor alone, a composition with an augment that was never trained, and LoRA on
the anchor with as many parameters as the composition learns.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from lm_core.checkpoints.checkpoint import save_checkpoint
from lm_core.checks import check_above_zero, check_positive, typed
from lm_core.rng import seed_everything
from lm_core.training.metrics import MetricsLog, progress_bar
from lm_core.training.optimization import LearningRateSchedule, clip_global_norm

ASKED = 2000  # expressions of a final accuracy
CHECKED = 500  # expressions of the accuracies that are logged during training
OUTPUT_LAYER = ("to_logits", "lm_head")


@typed
@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Settings of the key-value arithmetic task.

    Args:
        augment_steps: updates of the augment on keys and values.
        anchor_steps: updates of the anchor on numbers.
        max_steps: updates of the composition (or of the baseline).
        batch_size: expressions an update.
        learning_rate: peak learning rate of the composition (or of the baseline).
        keys_share: fraction of the rows of an update that are over keys; the others are over numbers.
        dim: features of both models.
        reads: "sequence" lets the augment read the anchor's own expression as it grows, "prompt" reads it whole first.
        connect: "embedding" reads the augment's last layer from the embedding on, "layers" layer by layer.
        connections: number of connections, 1 to 4.
        learner: model that is trained on the expressions: "composition", "random-augment" (a composition whose augment
            is untrained), or "low-rank" (LoRA on the anchor with as many parameters).
        models: library of both models; "mixed" is an anchor of x-transformers and an augment of Hugging Face.
        seed: seed of weights, keys and expressions.
    """

    augment_steps: int = 600
    anchor_steps: int = 500
    max_steps: int = 600
    batch_size: int = 128
    learning_rate: float = 2e-3
    keys_share: float = 0.75
    dim: int = 64
    reads: Literal["sequence", "prompt"] = "sequence"
    connect: Literal["embedding", "layers"] = "embedding"
    connections: int = 4
    learner: Literal["composition", "random-augment", "low-rank"] = "composition"
    models: Literal["x-transformers", "hugging-face", "mixed"] = "x-transformers"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("augment_steps", "anchor_steps", "max_steps", "batch_size", "dim"):
            check_positive(getattr(self, name), name)
        check_above_zero(self.learning_rate, "learning_rate")
        if not 0 < self.keys_share <= 1:
            raise ValueError(f"keys_share must be in (0, 1], got {self.keys_share}")
        if not 1 <= self.connections <= 4:
            raise ValueError(f"connections must be in [1, 4], got {self.connections}")
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of the 4 heads, got {self.dim}")


@dataclass(frozen=True)
class QuickstartResult:
    """Accuracies, each over 2,000 expressions.

    Attributes:
        held_out: accuracy over keys that no expression in training had.
        trained_keys: accuracy over the other keys.
        anchor_alone: accuracy of the unchanged anchor over held-out keys.
        numbers_before: accuracy of the unchanged anchor over numbers.
        numbers_after: accuracy of the trained model over numbers.
        learned: number of parameters that were trained on expressions.
        seconds: duration of the whole run.
    """

    held_out: float
    trained_keys: float
    anchor_alone: float
    numbers_before: float
    numbers_after: float
    learned: int
    seconds: float


def small_models(task: KeyValueTask, settings: QuickstartSettings) -> tuple[nn.Module, nn.Module]:
    """An anchor that computes and an augment that knows the keys."""
    seed_everything(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    of_augment: Any = "hugging-face" if settings.models == "mixed" else settings.models
    of_anchor: Any = "x-transformers" if settings.models == "mixed" else settings.models
    augment = small_decoder(task, dim=settings.dim, library=of_augment)
    anchor = small_decoder(task, dim=settings.dim, library=of_anchor)
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


def train_learner(
    learner: Learner, task: KeyValueTask, settings: QuickstartSettings, generator: torch.Generator, log: MetricsLog
) -> None:
    """Trains on expressions over the keys that are not held out, and over numbers."""
    known, held_out = task.split
    checked = task.expressions(CHECKED, generator, held_out)
    optimizer = torch.optim.AdamW(learner.parameters, lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, settings.max_steps // 10)
    schedule = LearningRateSchedule(optimizer, kind="cosine", warmup_steps=warmup, total_steps=settings.max_steps)
    over_keys = round(settings.batch_size * settings.keys_share)
    learner.model.train()
    started = time.monotonic()
    for step in range(1, settings.max_steps + 1):
        over_numbers = task.expressions(settings.batch_size - over_keys, generator)
        loss = learner.loss(torch.cat((task.expressions(over_keys, generator, known), over_numbers)))
        optimizer.zero_grad()
        loss.backward()
        learning_rate, norm = schedule.learning_rate, clip_global_norm(learner.parameters, 1.0)
        optimizer.step()
        schedule.step()
        log.progress.update()
        if step % 20 == 0 or step in (1, settings.max_steps):
            speed = settings.batch_size * step / (time.monotonic() - started)
            log.log(step, loss=loss, learning_rate=learning_rate, grad_norm=norm, expressions_per_second=speed)
        if step % 100 == 0 and step < settings.max_steps:
            log.log(step, validation_accuracy=accuracy(learner.model, checked, **learner.arguments(checked)))
    learner.model.eval()


def run_quickstart(settings: QuickstartSettings, folder: str | Path) -> QuickstartResult:
    """Trains both models and a learner; writes metrics and a checkpoint, and a composition's adapter and picture."""
    started, task = time.monotonic(), KeyValueTask(seed=settings.seed)
    target = Path(folder)
    known, held_out = task.split
    # both models alone, and what the anchor can do without the augment
    anchor, augment = small_models(task, settings)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    over_held_out, over_known = (task.expressions(ASKED, generator, keys) for keys in (held_out, known))
    over_numbers = task.expressions(ASKED, generator)
    alone, numbers_before = accuracy(anchor, over_held_out), accuracy(anchor, over_numbers)
    # training on expressions over some of the keys, accuracy over the others
    learner = make_learner(anchor, augment, settings)
    with (
        progress_bar(settings.max_steps, description=settings.learner) as bar,
        MetricsLog(target / "metrics.jsonl", progress=bar) as log,
    ):
        train_learner(learner, task, settings, generator, log)
        right, right_trained, right_numbers = (
            accuracy(learner.model, rows, **learner.arguments(rows))
            for rows in (over_held_out, over_known, over_numbers)
        )
        log.log(
            settings.max_steps,
            validation_accuracy=right,
            validation_accuracy_trained_keys=right_trained,
            validation_accuracy_numbers=right_numbers,
        )
    if isinstance(learner.model, CALM):
        learner.model.save_adapter(target / "adapter", overwrite=True)
        _draw(learner, over_held_out[:1, :-1], target / "attention.png")
    result = QuickstartResult(
        held_out=right,
        trained_keys=right_trained,
        anchor_alone=alone,
        numbers_before=numbers_before,
        numbers_after=right_numbers,
        learned=sum(parameter.numel() for parameter in learner.parameters),
        seconds=time.monotonic() - started,
    )
    save_checkpoint(
        target / "checkpoints",
        settings.max_steps,
        model={str(number): parameter for number, parameter in enumerate(learner.parameters)},
        config={"settings": asdict(settings)},
        trainer_state={"result": asdict(result)},
    )
    return result


def _draw(learner: Learner, ids: Tensor, output: Path) -> None:
    labels = [token_name(int(token)) for token in ids[0]]
    prompt = None if learner.model.augments[0].shared_sequence else ids  # type: ignore[index, union-attr]
    try:
        draw_attention(learner.model, ids, prompt, output=output, anchor_labels=labels, augment_labels=labels)
    except ImportError:
        print("no picture: pip install matplotlib, then run the same command again")
