"""Sharding of a policy over processes (FSDP, arXiv 2304.11277): its blocks, and phases with whole weights.

Answers are generated token by token and by each process at its own pace, which shards do not allow: for that phase, in
which there are no gradients and no optimizer, the weights are gathered once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lm_core.training import fsdp as sharding
from spin_trainer.model.response_scores import ResponseScores


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are gathered one at a time.

    A model's own ``blocks()``; what transformers says it must not split; else the entries of the outermost lists of
    modules.
    """
    own = getattr(model, "blocks", None)
    if callable(own) and not isinstance(own, nn.Module):
        return list(own())
    whole: set[str] = set()
    for module in model.modules():
        whole.update(getattr(module, "_no_split_modules", None) or ())
    if whole:
        return [module for module in model.modules() if type(module).__name__ in whole]
    return list(_entries(model))


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        # a list of lists is no block: it cannot be called
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _entries(child)


@contextlib.contextmanager
def whole_weights(scores: ResponseScores) -> Iterator[None]:
    """Inside, every process has all weights of what training calls, and calls it without the others; all enter."""
    shards: list[Any] = [part for part in scores.modules() if callable(getattr(part, "reshard", None))]
    if not shards:
        yield
        return
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(scores.parameters()).device)
    with torch.no_grad(), sharding.quiet():
        scores(ids, ids == 0)  # any forward through the root gathers all
        try:
            yield
        finally:
            for part in shards:
                part.reshard()
                part.set_reshard_after_forward(part is not scores, recurse=False)
