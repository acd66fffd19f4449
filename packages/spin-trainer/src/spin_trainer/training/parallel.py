"""How the policy is spread over processes: alone, copied to each (DDP), or in shards (FSDP, arXiv 2304.11277).

Under FSDP each process keeps a part of the weights, their gradients and the optimizer's state, and a block is whole for
its own forward and backward only. Answers are generated token by token and by each process at its own pace, which
shards do not allow: for that phase, in which there are no gradients and no optimizer, the weights are gathered once
(``whole``). What is saved are whole weights and whole optimizer states, so a checkpoint opens on one process.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        if isinstance(child, nn.ModuleList):
            for entry in child:
                # a list of lists is no block: it cannot be called
                yield from _entries(nn.ModuleList([entry])) if isinstance(entry, nn.ModuleList) else (entry,)
        else:
            yield from _entries(child)


class ParallelPolicy:
    """The scoring module as training calls it.

    Args:
        scores: of the policy.
        model: the policy as the caller gave it.
        fsdp: whether it is kept in shards.
    """

    def __init__(self, scores: ResponseScores, model: nn.Module, *, fsdp: bool) -> None:
        self.model, self.fsdp = model, fsdp
        self._scores: Any = scores
        self._accelerator: Any = None
        self.called: Any = None

    @property
    def prepared(self) -> bool:
        """Whether the model has been spread."""
        return self.called is not None

    def prepare(self, accelerator: Any) -> None:
        """Spreads the model over the processes, in place."""
        self._accelerator = accelerator
        if self.fsdp:
            sharding.shard(self._scores, iter(blocks_of(self.model)))
            self.called = self._scores
        else:
            self.called = accelerator.prepare_model(self._scores, device_placement=False)

    def synchronising(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: processes exchange gradients in the last one of an update only."""
        if self.fsdp:
            self._scores.set_requires_gradient_sync(last)
            return sharding.quiet()
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.called)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch."""
        self._accelerator.backward(loss)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every process has all weights and calls the model without the others; every process enters."""
        if not self.fsdp:
            yield
            return
        shards = [part for part in self._scores.modules() if callable(getattr(part, "reshard", None))]
        for part in shards:
            part.set_reshard_after_forward(False, recurse=False)
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.model.parameters()).device)
        with torch.no_grad(), sharding.quiet():
            self._scores(ids, ids == 0)  # any forward through the root gathers all
            try:
                yield
            finally:
                for part in shards:
                    part.reshard()
                    part.set_reshard_after_forward(part is not self._scores, recurse=False)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state, under FSDP on rank 0 only; every process calls it."""
        return sharding.full_optimizer_state(self._scores, optimizer) if self.fsdp else optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Takes what ``optimizer_state`` gave."""
        if self.fsdp:
            sharding.load_full_optimizer_state(self._scores, optimizer, state)
        else:
            optimizer.load_state_dict(dict(state))
