"""The causal language model protocol shared by generation, losses, trainers and adapters.

Legend: b batch, n sequence, v vocabulary, d feature.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model: ids ``(b, n)`` to logits ``(b, n, v)``.

    ``mask (b, cached + n)`` is True at real tokens; positions are ``mask.cumsum(-1) - 1``. A model that decodes
    incrementally also has ``init_cache(batch_size, max_length)`` and accepts ``cache=``: ids are then the new tokens,
    and the cache has ``reorder(index)``, after which row ``r`` is the former row ``index[r]``.
    With ``init_cache(..., static=True)`` its steps can be compiled and captured (``lm_core.nn.kv_cache``).
    ``hidden(ids, *, mask, cache)`` with ``output_weight (v, d)`` avoids the full logits; ``output_layer``, if present,
    is the module that maps hidden states to logits. ``max_length``, if present and not None, bounds prompt and new
    tokens together.
    """

    def __call__(self, ids: Tensor, *, mask: Tensor | None = None, cache: Any = None, **kwargs: Any) -> Tensor:
        """Logits of every position in ``ids``."""


@dataclass(frozen=True)
class Generation:
    """Generated tokens, without the prompt.

    Attributes:
        tokens: ``(b, new)`` token ids, right-padded with ``pad_id``.
        lengths: ``(b,)`` number of new tokens in each row, EOS included.
        log_probs: ``(b, new)`` float32 log-probabilities of the tokens under the distribution they were drawn from
            (at temperature 0 the unfiltered one of temperature 1, in beam search the filtered one); 0 at padding.
        finished: ``(b,)`` True where the row ended with EOS, not at the length limit.
    """

    tokens: Int[Tensor, "b new"]
    lengths: Int[Tensor, " b"]
    log_probs: Float[Tensor, "b new"]
    finished: Bool[Tensor, " b"]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of every submodule is restored on exit, also after an exception."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: Any) -> torch.device | None:
    """Device of the model's parameters; None if it has none."""
    if not isinstance(model, nn.Module):
        return None
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device
