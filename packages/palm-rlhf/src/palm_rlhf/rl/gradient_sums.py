"""Gradients of all processes added up, once an update.

``DistributedDataParallel`` expects every parameter to be used in every forward; a base that carries the scopes of
several models has parameters that a given loss does not touch, and a process may have no row of a small minibatch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from lm_core.distributed import world_size


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up gradients over processes; a parameter that a process did not use counts as 0 there."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    for dtype in {parameter.dtype for parameter in parameters}:
        gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
