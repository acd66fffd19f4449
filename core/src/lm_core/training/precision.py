"""Float32 master weights of models stored in half precision (mixed precision training, arXiv 1710.03740).

An update of a bfloat16 weight is lost when it is smaller than half of the last of its 8 bits: at the learning rates of
fine-tuning, almost all are. Trained weights are therefore float32, and autocast computes in bfloat16. Frozen weights
keep their dtype; layers of both kinds then meet in the stored dtype, with and without autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
_BYTES = 16  # weight, gradient and AdamW's two means, each of 4 bytes


@dataclass(frozen=True)
class Precisions:
    """Dtypes of a model's weights, as stored and as trained; printed as one line.

    Attributes:
        stored_dtype: dtype of the promoted weights before training; without any, of most weights.
        trained: number of trained parameters.
        total: number of all parameters.
        promoted: parameters that became float32, with their stored dtypes.
    """

    stored_dtype: torch.dtype
    trained: int
    total: int
    promoted: tuple[tuple[nn.Parameter, torch.dtype], ...]

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """The promoted weights in their stored dtypes, for exports; they are float32 again on exit."""
        masters = [(parameter, parameter.data) for parameter, _ in self.promoted]
        try:
            for parameter, dtype in self.promoted:
                parameter.data = parameter.data.to(dtype)
            yield
        finally:
            for parameter, master in masters:
                parameter.data = master

    def __str__(self) -> str:
        stored = str(self.stored_dtype).removeprefix("torch.")
        gigabytes = self.trained * _BYTES / 1e9
        return (
            f"weights stored in {stored}, trained in float32: {self.trained / 1e6:.2f} of {self.total / 1e6:.2f} "
            f"million parameters, {gigabytes:.2f} GB with gradients and AdamW"
        )


def float32_masters(*models: nn.Module) -> Precisions:
    """Makes the trained half precision weights of a model float32, in place; frozen ones keep their dtype.

    In a model with frozen half precision weights, each module with weights of its own casts its inputs to their dtype,
    and a promoted one its output to the stored dtype. peft's layers do this themselves.

    Args:
        *models: model, and further modules trained with it.
    """
    parameters = {id(p): p for model in models for p in model.parameters() if p.is_floating_point()}
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    promoted = {id(p): (p, p.dtype) for p in trained if p.dtype in HALF}
    # not of a float32 copy that is not trained, such as a reference
    counted: dict[torch.dtype, int] = {}
    for parameter in [p for p, _ in promoted.values()] or parameters.values():
        counted[parameter.dtype] = counted.get(parameter.dtype, 0) + parameter.numel()
    for parameter, _ in promoted.values():
        parameter.data = parameter.data.float()
    frozen_half = any(not p.requires_grad and p.dtype in HALF for p in parameters.values())
    if promoted and frozen_half:
        stored_dtypes = {key: dtype for key, (_, dtype) in promoted.items()}
        for model in models:
            _cast_between_layers(model, stored_dtypes)
    return Precisions(
        stored_dtype=max(counted, key=lambda dtype: counted[dtype], default=torch.float32),
        trained=sum(parameter.numel() for parameter in trained),
        total=sum(parameter.numel() for parameter in parameters.values()),
        promoted=tuple(promoted.values()),
    )


def _cast_between_layers(model: nn.Module, stored_dtypes: dict[int, torch.dtype]) -> None:
    adapters = {
        id(part)
        for layer in model.modules()
        if any(base.__name__ == "BaseTunerLayer" for base in type(layer).__mro__)
        for part in layer.modules()
    }
    for module in model.modules():
        weights = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not weights or id(module) in adapters or any(True for _ in module.children()):
            continue
        stored = next((stored_dtypes[id(p)] for p in weights if id(p) in stored_dtypes), None)
        if getattr(module, "_casts", None) is None and (stored is not None or weights[0].dtype in HALF):
            casts = _Casts(stored)
            module._casts = casts  # type: ignore[assignment]
            module.register_forward_pre_hook(casts.inputs, with_kwargs=True)
            if stored is not None:
                module.register_forward_hook(casts.output)


class _Casts:
    """Forward hooks of a layer: inputs in the dtype of its weights, output in the stored dtype."""

    def __init__(self, stored: torch.dtype | None) -> None:
        self._stored = stored

    def inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        weight = next(p for p in module.parameters(recurse=False) if p.is_floating_point())

        def cast(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(weight.dtype) if is_float and value.dtype in (torch.float32, *HALF) else value

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self._stored) if isinstance(output, Tensor) and output.is_floating_point() else output
