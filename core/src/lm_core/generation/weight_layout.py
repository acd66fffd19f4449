"""Weights laid out for decoding: column by column where a product of a few rows reads them faster so.

A decoding step multiplies a handful of rows with every weight, and reading the weights is most of its time. A product
of one row with a weight ``(out, in)`` stored row by row is ``out`` dot products of length ``in``; stored column by
column it adds ``in`` columns of length ``out``. The longer the inner loop, the closer it comes to the speed of memory,
so a weight with at least as many outputs as inputs gains: 49152 x 576 is read at 11.6 GB/s as stored and at 23.6 by
columns, 576 x 1536 at 16.8 and 12.7 (``tests/benchmarks/bench_decoding_layout.py`` checks the choice). Products of many
rows do not depend on the layout.

The weights are those of the ``nn.Linear`` modules that a step calls with few rows, which the first step shows: an image
encoder, an unused expert or a module that is quantised, compiled or sharded stays as it is. A copy takes the
parameter's place in its module for the time of one generation. The parameter itself is neither written nor moved, so
that optimizers, graphs, tied modules and other threads keep what they hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Above these, products are no longer bound by the order in which a weight is read.
_FEW_ROWS = 4
# A copy costs about as much as it saves on a dozen tokens.
_STEPS_WORTH_A_COPY = 16
# Smaller weights stay in the processor's cache.
_SMALLEST_BYTES = 2**18
# All copies of one generation take at most so much memory.
_COPIED_BYTES = 2**30


class WeightLayout:
    """The laid-out weights of one generation; a context that puts the parameters back on leaving.

    Args:
        model: its ``nn.Linear`` modules are laid out.
        steps: tokens to come at most; a few are not worth a copy.
    """

    def __init__(self, model: Any, *, steps: int) -> None:
        self._linears: list[nn.Linear] = []
        if steps >= _STEPS_WORTH_A_COPY and isinstance(model, nn.Module):
            modules = list(model.modules())
            # A compiled graph would be compiled again for weights of another layout.
            if not any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in modules):
                self._linears = [module for module in modules if type(module) is nn.Linear]
        self._steps = steps
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the weight's identity: itself and its copy
        self._replaced: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def __enter__(self) -> "WeightLayout":
        return self

    def __exit__(self, *error: object) -> None:
        for linear, parameter, copy in self._replaced:
            # Another one, if somebody has put it there in the meantime, is theirs.
            if linear._parameters.get("weight") is copy:
                linear._parameters["weight"] = parameter  # type: ignore[assignment]
        self._replaced.clear()
        self._copies.clear()

    @contextmanager
    def first_step(self) -> Iterator[None]:
        """Watches one decoding step and then lays out the weights that it has read for few rows."""
        read: dict[nn.Linear, None] = {}

        def note(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.numel() <= _FEW_ROWS * linear.out_features:
                read[linear] = None

        handles = [linear.register_forward_hook(note, prepend=True) for linear in self._linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for linear in read:
            weight = linear._parameters["weight"]
            if weight is not None and (copy := self.laid_out(weight, rows=1)) is not weight:
                linear._parameters["weight"] = copy  # type: ignore[assignment]
                self._replaced.append((linear, weight, copy))

    def laid_out(self, weight: Tensor, *, rows: int) -> Tensor:
        """A copy of ``weight`` that is read faster in products of ``rows`` rows, or the weight itself."""
        if id(weight) in self._copies:
            return self._copies[id(weight)][1]
        if rows > _FEW_ROWS or self._steps < _STEPS_WORTH_A_COPY or not _gains(weight):
            return weight
        held = sum(copy.nbytes for _, copy in self._copies.values())
        if held + weight.nbytes > _COPIED_BYTES:
            return weight
        copy = nn.Parameter(by_columns(weight), requires_grad=weight.requires_grad)
        self._copies[id(weight)] = weight, copy
        return copy


def by_columns(weight: Tensor) -> Tensor:
    """A copy of a weight ``(out, in)`` stored column by column, without gradient."""
    return weight.detach().t().contiguous().t()


def _gains(weight: Tensor) -> bool:
    """Whether a product of few rows reads a weight ``(out, in)`` faster by columns."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        return False
    wide = weight.ndim == 2 and weight.shape[0] >= weight.shape[1]
    return wide and weight.is_contiguous() and weight.nbytes >= _SMALLEST_BYTES
