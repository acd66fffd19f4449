"""Layouts of weights for decoding on a CPU: oneDNN's blocks, or column by column.

A decoding step multiplies a handful of rows with every weight, and reading the weights is most of its time.

- Blocks. With one row, blocks are read at 1.2 to 2.2 times the speed of a row-major weight where the processor has
  AVX-512 (4736 x 512: 33.5 against 15.1 GB/s, 512 x 2048: 28.4 against 17.7). With 2 to 64 rows the general product
  reads at a third of the speed of oneDNN's. Where all weights of a step stay in the processor's cache, a single row
  gains less than the operator's call costs, but for large weights (256 x 256: 15 against 9 microseconds, 2048 x 512: 67
  against 87).
- Columns. For one row on a processor without AVX-512, and in a compiled step, where blocks cannot be used: a weight
  with twice as many outputs as inputs is read faster column by column (AVX2, GB/s by row, column and block: 49152 x
  576: 11.6, 21.2, 13.2; 1536 x 576: 12.4, 15.6, 13.5), one with fewer is not (576 x 576: 11.6, 10.8, 9.2; 576 x 1536:
  18.0, 12.8, 11.7).

``tests/benchmarks/bench_decoding_layout.py`` measures them.

The weights are those of the ``nn.Linear`` modules that a step calls with few rows, as observed in the first step: an
image encoder, an unused expert or a module that is quantised, compiled or sharded is left alone. During one generation
the instance of such a module has a ``forward`` that reads a copy; hooks still run. Calls that the copy cannot serve
(gradients, autocast, another dtype, many rows, a weight replaced meanwhile) use the module's original ``forward``. The
parameter is neither written nor moved.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Maximum rows of a product with a copy in blocks.
_MOST_ROWS = 64
# Rows that blocks are optimised for: blocks for a single row are slow with several, but not the other way round.
_TYPICAL_ROWS = 16
# A copy costs about as much as it saves on a dozen tokens.
_STEPS_WORTH_A_COPY = 16
# Smaller weights fit the processor's innermost caches.
_SMALLEST_BYTES = 2**18
# The same for products of one row, if a step reads no more weights than the processor's outermost cache holds.
_SMALLEST_BYTES_CACHED = 2**22
_CACHED_BYTES = 2**24
# Rows with which a column-major weight is still read faster than a row-major one.
_MOST_ROWS_BY_COLUMN = 1
# Maximum memory of all copies of one generation.
_COPIED_BYTES = 2**30


@dataclass(frozen=True)
class _Copy:
    """A weight and its copy in blocks, or column by column."""

    weight: Tensor
    copied: Tensor
    by_column: bool

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """``F.linear(x, weight, bias)``; None if the copy cannot be used."""
        if x.numel() > _MOST_ROWS * x.shape[-1] or x.dtype != torch.float32:
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if self.by_column:
            return F.linear(x, self.copied, bias)
        # The operator that torch.compile itself uses for constant weights.
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.copied, bias, "none", [], "")
        return result


class WeightLayout(AbstractContextManager["WeightLayout"]):
    """Context manager with the copied weights of one generation, freed on exit.

    Args:
        model: model whose ``nn.Linear`` modules are copied.
        steps: maximum number of tokens to come; a few are not worth a copy.
        compiled: True for a step that is compiled, which reads no blocks.
    """

    def __init__(self, model: Any, *, steps: int, compiled: bool = False) -> None:
        self._compiled = compiled
        self._linears: list[nn.Linear] = []
        self._enabled = steps >= _STEPS_WORTH_A_COPY and _has_blocks()
        if self._enabled and isinstance(model, nn.Module):
            modules = list(model.modules())
            # A compiled graph would be recompiled for weights of another layout.
            if not any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in modules):
                self._linears = [module for module in modules if type(module) is nn.Linear]
        self._copies: dict[int, _Copy] = {}  # by the weight's identity
        self._bytes_of_step = 0
        self._forwards: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []

    def __exit__(self, *error: object) -> None:
        for linear, forward in self._forwards:
            # A forward that somebody else has set in the meantime stays.
            if vars(linear).get("forward") is forward:
                del vars(linear)["forward"]
        self._forwards.clear()
        self._copies.clear()

    @contextmanager
    def first_step(self) -> Iterator[None]:
        """Observes one decoding step, then copies the weights that it has multiplied with few rows."""
        read: dict[nn.Linear, int] = {}

        def note(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            read[linear] = max(read.get(linear, 0), output.numel() // linear.out_features)

        handles = [linear.register_forward_hook(note, prepend=True) for linear in self._linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._bytes_of_step = sum(linear.weight.nbytes for linear in read)
        for linear, rows in read.items():
            copy = None if "forward" in vars(linear) else self._copy(linear.weight, rows)
            if copy is not None:
                forward = _forward_of(linear, copy)
                linear.__dict__["forward"] = forward
                self._forwards.append((linear, forward))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x (rows, in) @ weight.T`` for a weight that belongs to no module."""
        copy = self._copy(weight, x.shape[0])
        result = None if copy is None else copy.product(x)
        return F.linear(x, weight) if result is None else result

    def laid_out(self, weight: Tensor) -> Tensor:
        """The copy by column of a weight that belongs to no module; the weight itself if there is none."""
        copy = self._copies.get(id(weight))
        return copy.copied if copy is not None and copy.by_column else weight

    def _copy(self, weight: Tensor, rows: int) -> _Copy | None:
        """A copy of ``weight`` that is faster in products of ``rows`` rows; None if it would not be."""
        copy = self._copies.get(id(weight))
        cached = rows == 1 and self._bytes_of_step <= _CACHED_BYTES
        smallest = _SMALLEST_BYTES_CACHED if cached else _SMALLEST_BYTES
        if copy is not None or not self._enabled or rows > _MOST_ROWS or not _is_copyable(weight, smallest):
            return copy
        if sum(copy.weight.nbytes for copy in self._copies.values()) + weight.nbytes > _COPIED_BYTES:
            return None
        if self._compiled or (rows <= _MOST_ROWS_BY_COLUMN and not _reads_blocks_faster()):
            if rows > _MOST_ROWS_BY_COLUMN or weight.shape[0] < 2 * weight.shape[1]:
                return None
            copy = _Copy(weight, weight.detach().t().contiguous().t(), by_column=True)
        else:
            blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
            copy = _Copy(weight, blocks, by_column=False)
        self._copies[id(weight)] = copy
        return copy


def _forward_of(linear: nn.Linear, copy: _Copy) -> Callable[[Tensor], Tensor]:
    """``linear.forward`` that uses ``copy`` where it can and the module still has the copied weight."""

    def forward(input: Tensor) -> Tensor:  # the argument's name in nn.Linear
        result = copy.product(input, linear.bias) if linear.weight is copy.weight else None
        return nn.Linear.forward(linear, input) if result is None else result

    return forward


def _has_blocks() -> bool:
    """True if this PyTorch has oneDNN's products with blocked weights."""
    enabled = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _reads_blocks_faster() -> bool:
    """True if a product of one row reads blocks faster than any other layout."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_copyable(weight: Tensor, smallest: int) -> bool:
    """True for a plain contiguous float32 matrix on the CPU of at least ``smallest`` bytes."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        return False
    return weight.ndim == 2 and weight.is_contiguous() and weight.nbytes >= smallest
