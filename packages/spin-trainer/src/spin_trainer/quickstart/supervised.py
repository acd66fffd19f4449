"""Supervised fine-tuning on the same data: the start of self-play, and its baseline."""

from typing import Any

import torch

from lm_core.checks import check_positive
from lm_core.data.epochs import UpdateOrder
from lm_core.distributed import loss_normalizer, rank, world_size
from lm_core.training.config import RunSettings
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.session import TrainingSession
from spin_trainer.data.sft_data import SFTDataset
from spin_trainer.model.response_scores import ResponseScores, collate


def fine_tune(
    model: Any,
    dataset: SFTDataset,
    *,
    updates: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    final_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> float:
    """Trains a model in place on the cross-entropy of the answers; every process takes its share of each batch.

    Args:
        model: ``CausalLM`` that is a module.
        dataset: prompts with answers.
        updates: number of optimizer updates.
        batch_size: answers per update.
        learning_rate: learning rate at the beginning, with linear decay.
        final_learning_rate: learning rate at the end, as a fraction of ``learning_rate``.
        weight_decay: weight decay of matrices.
        seed: seed of the order and of dropout.

    Returns:
        The loss of the last update, in nats/token.

    Raises:
        ValueError: ``updates`` is below 1, or ``batch_size`` is below the number of processes.
        KeyboardInterrupt: Ctrl-C was pressed; the current update is completed.
    """
    check_positive(updates, "updates")
    if batch_size < world_size():
        raise ValueError(f"batch_size must be at least the number of processes {world_size()}, got {batch_size}")

    def optimizer() -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
        adam = torch.optim.AdamW(optimizer_groups(model, weight_decay=weight_decay), lr=learning_rate)
        return adam, LearningRateSchedule(adam, kind="linear", total_steps=updates, final_scale=final_learning_rate)

    # a session without a folder: nothing is stored
    device = next(model.parameters()).device
    config = RunSettings(seed=seed, device=str(device), precision="fp32")
    session = TrainingSession("fine_tune", config=config, checkpoint_dir=None)
    session.register(model=model, objective=ResponseScores(model), optimizer=optimizer, max_steps=updates)
    order = UpdateOrder(
        len(dataset), batch_size=batch_size, seed=seed, key=("supervised",), rank=rank(), world_size=world_size()
    )
    # one batch per update; the loss is divided by the answer tokens of all processes
    loss = float("nan")
    with session.run():
        for update in session.steps():
            (indices,) = order.micro_batches(update)
            rows = [dataset[index] for index in indices]
            ids, answer, mask = collate([row.prompt for row in rows], [row.response for row in rows], device)
            _, normalizer = loss_normalizer(int(answer.sum()), device)
            session.backward(-session.module(ids, answer, mask).sum() / normalizer)
            loss = session.optimizer_step()["loss"]
    if session.outcome == "interrupted":
        raise KeyboardInterrupt
    return loss
