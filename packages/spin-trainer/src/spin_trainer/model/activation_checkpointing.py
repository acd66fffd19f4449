"""Activation checkpointing of a transformers model (arXiv 1604.06174): less memory, a second forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def check_recomputable(model: nn.Module) -> str:
    """The word in the names of the model's methods that switch checkpointing on, "activation" or "gradient".

    Raises:
        TypeError: the model has no such method.
    """
    # transformers 5 has renamed the methods
    kind = next((kind for kind in ("activation", "gradient") if hasattr(model, f"{kind}_checkpointing_enable")), None)
    if kind is None:
        raise TypeError(f"gradient_checkpointing needs a transformers model, got {type(model).__name__}")
    return kind


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Context manager in which ``model`` recomputes its activations; one that already does stays as it is."""
    kind = check_recomputable(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    # the reentrant variant gives no gradients where the embeddings are frozen, as with LoRA
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
