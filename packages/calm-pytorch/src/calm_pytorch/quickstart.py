"""The quickstart: two tiny models trained on the spot, composed, and asked what neither of them knows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calm_pytorch.attention_picture import draw_attention
from calm_pytorch.augment import AugmentParams
from calm_pytorch.blocks import x_transformer_blocks
from calm_pytorch.calm import CALM
from calm_pytorch.kv_arithmetic import (
    EQUALS,
    FIRST_KEY,
    MODULUS,
    PLUS,
    KeyValueTask,
    accuracy,
    small_decoder,
    train_alone,
)
from lm_core._checks import check_positive, typed
from lm_core.training import LearningRateSchedule, MetricsLog, clip_global_norm, progress_bar, seed_everything


@typed
@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The key-value arithmetic task: how long each part trains.

    Args:
        augment_steps: updates of the augment on keys and values.
        anchor_steps: updates of the anchor on numbers.
        steps: updates of the composition.
        batch_size: expressions an update.
        learning_rate: of the composition, at its peak.
        keys_share: the part of the rows of an update that are over keys; the others are over numbers.
        connect: "embedding" reads the augment's last layer from the embedding on, "layers" layer by layer.
        random_augment: leaves the augment untrained, as a baseline.
        seed: of weights, keys and expressions.
    """

    augment_steps: int = 150
    anchor_steps: int = 300
    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 2e-3
    keys_share: float = 0.75
    connect: str = "embedding"
    random_augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("augment_steps", "anchor_steps", "steps", "batch_size"):
            check_positive(getattr(self, name), name)
        if self.connect not in ("embedding", "layers"):
            raise ValueError(f"connect must be 'embedding' or 'layers', got {self.connect!r}")
        if not 0 < self.keys_share <= 1:
            raise ValueError(f"keys_share must be in (0, 1], got {self.keys_share}")


@dataclass(frozen=True)
class QuickstartResult:
    """Accuracies, each over 1,000 expressions.

    Attributes:
        composed: of the composition on keys it never trained on.
        anchor_alone: of the anchor on the same expressions.
        numbers_before: of the anchor on numbers.
        numbers_after: of the composition on numbers.
        seconds: of the whole run.
    """

    composed: float
    anchor_alone: float
    numbers_before: float
    numbers_after: float
    seconds: float


def small_models(task: KeyValueTask, settings: QuickstartSettings) -> tuple[Any, Any]:
    """An anchor that computes and an augment that knows the keys."""
    seed_everything(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    augment, anchor = small_decoder(task), small_decoder(task)
    if not settings.random_augment:
        train_alone(
            augment,
            lambda step: task.pairs(64, 4, generator),
            steps=settings.augment_steps,
            learning_rate=2e-3,
            every_other=True,
            weight_decay=0.01,
        )
    train_alone(anchor, lambda step: task.expressions(256, generator), steps=settings.anchor_steps, learning_rate=1e-3)
    return anchor, augment.eval()


def compose_small(anchor: Any, augment: Any, connect: str) -> CALM:
    """The composition with four connections."""
    blocks = x_transformer_blocks(anchor)
    if connect == "layers":
        return CALM(anchor, AugmentParams(augment, connections=[(i, i) for i in range(1, 5)]))
    params = AugmentParams(augment, connections=[(4, i) for i in range(1, 5)])
    return CALM(anchor, params, anchor_transformer_blocks=[anchor.emb_dropout, *blocks])


def run_quickstart(settings: QuickstartSettings, folder: str | Path) -> QuickstartResult:
    """Trains both models, composes them, and writes metrics, the adapter and ``attention.png`` into ``folder``."""
    started, task = time.monotonic(), KeyValueTask(seed=settings.seed)
    target = Path(folder)
    train_keys, held_out = task.split
    anchor, augment = small_models(task, settings)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    held_out_rows = task.expressions(1000, generator, held_out)
    number_rows = task.expressions(1000, generator)
    alone, numbers_before = accuracy(anchor, held_out_rows), accuracy(anchor, number_rows)
    calm = compose_small(anchor, augment, settings.connect)
    optimizer = torch.optim.AdamW(
        list(calm.trainable_parameters()), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = LearningRateSchedule(
        optimizer, kind="cosine", warmup_steps=max(1, settings.steps * 3 // 10), total_steps=settings.steps
    )

    def composed(rows: torch.Tensor) -> float:
        return accuracy(calm, rows, prompt=rows[:, :-1], return_loss=False)

    with (
        progress_bar(settings.steps, description="compose") as bar,
        MetricsLog(target / "metrics.jsonl", progress=bar) as log,
    ):
        over_keys = round(settings.batch_size * settings.keys_share)
        calm.train()
        for step in range(1, settings.steps + 1):
            rows = torch.cat(
                (
                    task.expressions(over_keys, generator, train_keys),
                    task.expressions(settings.batch_size - over_keys, generator),
                )
            )
            counted = torch.zeros_like(rows, dtype=torch.bool)
            counted[:, -1] = True
            loss = calm(rows, mask=counted, prompt=rows[:, :-1])
            optimizer.zero_grad()
            loss.backward()
            clip_global_norm(calm.trainable_parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 20 == 0:
                log.log(step, loss=loss)
        calm.eval()
        result = QuickstartResult(
            composed=composed(held_out_rows),
            anchor_alone=alone,
            numbers_before=numbers_before,
            numbers_after=composed(number_rows),
            seconds=time.monotonic() - started,
        )
        log.log(settings.steps, held_out_accuracy=result.composed, numbers_accuracy=result.numbers_after)
    calm.save_adapter(target / "adapter", overwrite=True)
    rows = held_out_rows[:64, :-1]
    labels = [_name(int(token)) for token in rows[0]]
    try:
        draw_attention(
            calm, rows[:1], rows[:1], output=target / "attention.png", anchor_labels=labels, augment_labels=labels
        )
    except ImportError:
        print("no picture: pip install matplotlib, then run the same command again")
    return result


def _name(token: int) -> str:
    if token < MODULUS:
        return str(token)
    return (
        f"key {token - FIRST_KEY}" if token >= FIRST_KEY else "=" if token == EQUALS else "+" if token == PLUS else "-"
    )
