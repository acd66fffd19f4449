"""Static decoding steps: compiled by ``torch.compile``, or captured into CUDA graphs.

A step reads one token a row from a static cache (``lm_core.nn.kv_cache``), so all of its shapes are fixed. A compiled
step belongs to one model, number of rows and capacity and is kept as long as the model lives; inductor keeps its
kernels on disk for later processes. A CUDA graph belongs to one generation: capturing takes about as long as one eager
step, and neither memory nor addresses of weights are held afterwards.

Legend: b batch, v vocabulary.
"""

import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lm_core.adapters.base import Adapter

# Capacities are multiples of this, and of an eighth of a longer sequence: steps after different prompts are shared.
_SMALLEST_BUCKET = 128
_BACKEND = "inductor"

Step = Callable[..., Tensor]

_compiled_steps: WeakKeyDictionary[nn.Module, dict[tuple[int, int, bool], Step]] = WeakKeyDictionary()
_fallbacks: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def rounded_capacity(length: int, limit: int | None) -> int:
    """``length`` rounded up to a bucket, at most ``limit``."""
    bucket = max(_SMALLEST_BUCKET, 2 ** (length.bit_length() - 3))
    capacity = -(-length // bucket) * bucket
    return capacity if limit is None else min(capacity, limit)


def last_logits(
    model: Any,
    hidden_of: Callable[..., Tensor] | None,
    ids: Tensor,
    *,
    mask: Tensor | None,
    cache: Any,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
    output_weight: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Logits ``(b, v)`` after the last of ``ids``.

    Args:
        model: a ``CausalLM``.
        hidden_of: ``model.hidden``; None if the model has none.
        ids: tokens to read.
        mask: True at real tokens of cached and new positions.
        cache: cache of the model; None to read without one.
        product: multiplies hidden states with the output weight.
        output_weight: copy of the model's output weight, in another layout.
        **model_kwargs: further arguments of the model.
    """
    inputs = {"mask": mask} if cache is None else {"mask": mask, "cache": cache}
    if hidden_of is None:
        logits: Tensor = model(ids, **inputs, **model_kwargs)[:, -1]
        return logits
    hidden = hidden_of(ids, **inputs, **model_kwargs)[:, -1]
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return product(hidden, model.output_weight if output_weight is None else output_weight)
    of_layer: Tensor = layer(hidden)
    return of_layer


def reason_against_static_steps(model: Any) -> str | None:
    """Why a step of ``model`` must run eagerly, as a clause; None if nothing speaks against a static one."""
    if not isinstance(model, nn.Module):
        return "the model is no torch.nn.Module"
    for module in model.modules():
        name = type(module).__name__
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {name} has forward hooks, which run on the host"
        if hasattr(module, "_hf_hook"):
            return f"the weights of a {name} are loaded by accelerate when it is called"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "the weights are sharded"
    return None


def warn_of_fallback(model: Any, reason: str) -> None:
    """Warns once for a model that its steps run eagerly."""
    known = _fallbacks.setdefault(_owner(model), set()) if isinstance(model, nn.Module) else set()
    if reason not in known:
        known.add(reason)
        warnings.warn(f"decoding continues with the eager step: {reason}", RuntimeWarning, stacklevel=2)


def compiled_step(model: Any, rows: int, capacity: int, *, is_masked: bool) -> Step:
    """``last_logits`` compiled for steps of ``rows`` rows and a static cache of ``capacity`` positions."""
    steps = _compiled_steps.setdefault(_owner(model), {})
    key = (rows, capacity, is_masked)
    if key not in steps:
        # torch keeps compiled code with a function's code object, so each step gets a code object of its own: models
        # do not share a limit of recompilations, and the compiled code is freed together with its model.
        code = last_logits.__code__.replace()
        function = types.FunctionType(code, last_logits.__globals__, last_logits.__name__)
        function.__kwdefaults__ = last_logits.__kwdefaults__
        steps[key] = torch.compile(function, fullgraph=True, dynamic=False, backend=_BACKEND)
        size = f"{rows} row{'s' if rows > 1 else ''} of up to {capacity} tokens"
        tqdm.write(f"compiling the decoding step for {size}: about a minute unless cached", file=sys.stderr)
    return steps[key]


def _owner(model: nn.Module) -> nn.Module:
    """The module whose lifetime counts: an adapter may be new in each call."""
    return model.model if isinstance(model, Adapter) and isinstance(model.model, nn.Module) else model


class CapturedStep:
    """A function without arguments, captured into a CUDA graph.

    The function is not executed while it is captured. It must have run before, so that libraries and kernels are
    loaded, and must not wait for the device, change the host's state or allocate what later calls replace.

    Args:
        function: work on tensors that stay where they are.
        device: CUDA device of the work.
        generators: sources of randomness of the function, apart from the default one.
    """

    def __init__(
        self, function: Callable[[], object], device: torch.device, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        """Runs the captured work."""
        self._graph.replay()
