"""Adapter of any module or function from token ids to logits, decoded without a cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lm_core.adapters.base import Adapter


class PlainLM(Adapter):
    """A callable ``ids (b, n) -> logits (b, n, v)`` as a causal language model.

    It has no ``init_cache``: decoding calls it on the whole sequence for each token. The callable receives no mask; its
    rows have their padding last, where it cannot affect the real tokens of a causal model.

    Args:
        function: an ``nn.Module``, whose parameters are shared, or any other callable. Its output is a tensor of logits
            or has an attribute ``logits``.
        vocab_size: bound of the ids, for a check; None skips the check.
    """

    def __init__(self, function: Callable[..., Any], *, vocab_size: int | None = None) -> None:
        super().__init__(function, vocab_size=vocab_size, max_length=None)

    def _whole(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        output = self.model(ids, **kwargs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"{self._described()} must return logits as a tensor, got {type(output).__name__}")
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ValueError(
                f"{self._described()} must return logits of shape (b, n, v) for ids of shape {tuple(ids.shape)}, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def _described(self) -> str:
        return getattr(self.model, "__name__", type(self.model).__name__)
