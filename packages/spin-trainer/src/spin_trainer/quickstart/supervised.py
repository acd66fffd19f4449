"""Supervised fine-tuning on the same data, briefly: the start that self-play needs, and what it is compared with."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lm_core.checks import check_positive
from lm_core.data.epochs import seed_of
from lm_core.training.optimization import clip_global_norm, optimizer_groups
from spin_trainer.data.sft_data import SFTDataset
from spin_trainer.model.response_scores import collate, response_log_probs


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
) -> Iterator[float]:
    """Minimises the cross-entropy of the answers, in place; yields the loss in nats/token after each update.

    Args:
        model: a ``CausalLM`` that is a module; used and left in the mode it is in.
        dataset: prompts with answers.
        updates: how many; the learning rate falls along a line to ``final_learning_rate`` times itself.
        batch_size: answers an update, drawn by ``seed``.
        learning_rate: at the beginning.
        final_learning_rate: at the end, as a fraction.
        weight_decay: of matrices.
        seed: of the draws.
    """
    check_positive(updates, "updates")
    check_positive(batch_size, "batch_size")
    module: nn.Module = model
    optimizer = torch.optim.AdamW(optimizer_groups(module, weight_decay=weight_decay), lr=learning_rate)
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed_of("supervised", seed))
    for update in range(updates):
        scale = 1 - (1 - final_learning_rate) * update / updates
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        rows = [dataset[row] for row in torch.randint(len(dataset), (batch_size,), generator=generator).tolist()]
        ids, answer, mask = collate([row.prompt for row in rows], [row.response for row in rows], device)
        loss = -response_log_probs(model, ids, answer, mask).sum() / answer.sum()
        loss.backward()
        clip_global_norm(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())
