"""Training parts, not a framework: the pieces from which each package's trainer composes its one readable loop.

| concept | module |
|---|---|
| optimizer groups, learning-rate schedule, clipping, non-finite guard | ``lm_core.training.optimization`` |
| rows of metrics, progress bar, curves | ``lm_core.training.metrics`` |
| the run's folder, its lock and its record | ``lm_core.training.run_directory`` |
| random states | ``lm_core.rng`` |
| devices, precision, Ctrl-C | here |
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Literal

import torch

from lm_core.checks import typed
from lm_core.distributed import any_rank
from lm_core.rng import capture_rng, restore_rng, seed_everything
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.optimization import (
    LearningRateSchedule,
    NonFiniteGuard,
    clip_global_norm,
    finish_update,
    learning_rate_scale,
    optimizer_groups,
)
from lm_core.training.run_directory import RunDirectory

__all__ = [
    "InterruptHandler",
    "LearningRateSchedule",
    "MetricsLog",
    "NonFiniteGuard",
    "RunDirectory",
    "autocast",
    "capture_rng",
    "clip_global_norm",
    "finish_update",
    "learning_rate_scale",
    "optimizer_groups",
    "pick_device",
    "pick_precision",
    "plot_curves",
    "progress_bar",
    "read_metrics",
    "restore_rng",
    "seed_everything",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@typed
def pick_device(name: str = "auto") -> torch.device:
    """The device named ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes CUDA, then MPS, then the CPU. Under a launcher, ``auto`` and ``cuda`` are this process's own GPU
    (``LOCAL_RANK``).

    Raises:
        ValueError: the name is another one, or this machine has no such device.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if kind == "cuda" and not has_cuda:
        raise ValueError(f"device {name!r} was asked for, but torch {torch.__version__} finds no CUDA device")
    if kind == "mps" and not has_mps:
        raise ValueError(f"device {name!r} was asked for, but torch {torch.__version__} finds no MPS device")
    if kind != "cuda":
        return torch.device(kind)
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(f"device cuda:{index} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


@typed
def pick_precision(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in: ``auto`` is bfloat16 on a GPU that has it in hardware, float32 elsewhere.

    Raises:
        ValueError: fp16 on a CPU, where a matrix product in it is many times slower than in float32 and gradients
            underflow without a scaler; or bf16 on a GPU without it.
    """
    place = torch.device(device)
    has_bfloat16 = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if precision == "fp16" and place.type == "cpu":
        raise ValueError("precision fp16 is not for the CPU, got device 'cpu'; use bf16 or fp32")
    if precision == "bf16" and place.type == "cuda" and not has_bfloat16:
        raise ValueError(f"precision bf16 needs a GPU that has it, got {torch.cuda.get_device_name(place)}; use fp16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(precision: Precision, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """``torch.autocast`` in the dtype of ``pick_precision``; nothing in float32."""
    dtype = pick_precision(precision, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


class InterruptHandler:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop after the update at hand; the second stops at once.

    ::

        with InterruptHandler() as interrupt:
            while step < total:
                ...one update...
                if interrupt.should_stop():
                    save_checkpoint(...)
                    break

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        signals: which signals.
        message: printed to standard error at the first.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        message: str = "Stopping after this update and saving a checkpoint; press Ctrl-C again to stop at once.",
    ) -> None:
        self.signals, self.message = tuple(signals), message
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # os.write: the signal may have come in the middle of a print
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self.message}\n".encode())

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; every process has to ask at the same time."""
        return any_rank(self.requested)

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
