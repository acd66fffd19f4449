"""Fingerprints: what generated answers and scores depend on, so that a cache is used for nothing else."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from spin_trainer.training.weights import whole


@torch.no_grad()
def fingerprint_of_weights(model: nn.Module, *, trainable: bool | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and values of a model's parameters, the same whether they are spread or not.

    Args:
        model: whose parameters and buffers.
        trainable: only parameters that train (True) or that do not (False).
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if trainable is not None and tensor.requires_grad is not trainable:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = whole(tensor.detach()).cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(description: Mapping[str, Any]) -> str:
    """SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def name_of_function(function: Callable[..., Any] | None) -> str | None:
    """Where a function is defined, as part of a fingerprint; of a partial, with its arguments."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        arguments = sorted(function.keywords.items())
        return f"{name_of_function(function.func)}{function.args!r}{arguments!r}"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
