"""Sharding of a policy (FSDP, arXiv 2304.11277): its blocks, and phases with gathered weights.

Each process generates answers token by token at its own pace, which sharded weights do not allow. So the weights are
gathered once for that phase, which has no gradients and no optimizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lm_core.training import fsdp as sharding
from spin_trainer.model.response_scores import ResponseScores


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Submodules that FSDP gathers one at a time: ``blocks()``, ``_no_split_modules`` or entries of module lists."""
    blocks = getattr(model, "blocks", None)
    if callable(blocks) and not isinstance(blocks, nn.Module):
        return list(blocks())
    unsplit: set[str] = set()
    for module in model.modules():
        unsplit.update(getattr(module, "_no_split_modules", None) or ())
    if unsplit:
        return [module for module in model.modules() if type(module).__name__ in unsplit]
    return list(_list_entries(model))


def _list_entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        # a ModuleList inside a ModuleList cannot be called, so it is not a block
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _list_entries(child)


@contextlib.contextmanager
def whole_weights(scores: ResponseScores) -> Iterator[None]:
    """Context in which every process holds all weights and can call the model alone; every process must enter it."""
    sharded: list[Any] = [module for module in scores.modules() if callable(getattr(module, "reshard", None))]
    if not sharded:
        yield
        return
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(scores.parameters()).device)
    with torch.no_grad(), sharding.quiet():
        scores(ids, ids == 0)  # any forward through the root gathers all shards
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(module is not scores, recurse=False)
