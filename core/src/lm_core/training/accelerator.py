"""Device, precision, processes and signals of a training run.

Processes are started by torchrun, or by ``accelerate launch --multi_gpu``, which sets the same environment.
``start_accelerator`` rejects launchers that would silently do something else:
``accelerate launch --cpu --num_processes 2`` runs one process, ``accelerate``'s FSDP plugin becomes DDP on a CPU, and a
launcher's gradient accumulation divides losses again.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch.torch_version import TorchVersion

from lm_core.checks import typed
from lm_core.distributed import all_reduce_max

T = TypeVar("T")

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP plugin",
}


@typed
def pick_device(name: str = "auto") -> torch.device:
    """The device named ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes CUDA, then MPS, then the CPU. Under a launcher, ``auto`` and ``cuda`` select the GPU of this process
    (``LOCAL_RANK``).

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(candidate for candidate, present in available.items() if present)
    if not available[kind]:
        raise ValueError(f"device {name!r} was requested, but torch {torch.__version__} finds no {kind.upper()} device")
    if kind != "cuda":
        return torch.device(kind)
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(f"device cuda:{index} was requested, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


@typed
def pick_precision(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The compute dtype: ``auto`` is bfloat16 on a GPU with hardware support, float32 elsewhere.

    Raises:
        ValueError: fp16 on a CPU, where matrix products are many times slower than in float32 and gradients underflow
            without a scaler; or bf16 on a GPU without hardware support.
    """
    target = torch.device(device)
    has_bfloat16 = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if precision == "fp16" and target.type == "cpu":
        raise ValueError("precision fp16 is not supported on the CPU, got device 'cpu'; use bf16 or fp32")
    if precision == "bf16" and target.type == "cuda" and not has_bfloat16:
        raise ValueError(
            f"precision bf16 needs a GPU with bfloat16 support, got {torch.cuda.get_device_name(target)}; use fp16"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(precision: Precision, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """``torch.autocast`` in the dtype of ``pick_precision``; a null context in float32."""
    dtype = pick_precision(precision, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def check_compilable(device: torch.device) -> None:
    """Rejects a device on which ``torch.compile`` would compute wrong gradients.

    Raises:
        ValueError: the device is the CPU and torch is older than 2.7, which compiles a wrong gradient of embeddings.
    """
    if device.type == "cpu" and TorchVersion(torch.__version__) < "2.7":
        raise ValueError(
            f"compile=True on the CPU needs torch 2.7 or newer, got {torch.__version__}, which compiles the gradient "
            "of an embedding wrongly"
        )


def start_accelerator(device: torch.device, *, tracker_names: Sequence[str] = (), folder: str | Path = ".") -> Any:
    """An ``accelerate.Accelerator`` that leaves precision and gradient accumulation to the trainer.

    Args:
        device: training device, which selects the communication backend: gloo on the CPU, NCCL on CUDA.
        tracker_names: trackers to start later with ``init_trackers``.
        folder: folder for the files of trackers.

    Raises:
        ValueError: the launcher requests DeepSpeed, Megatron-LM or accelerate's FSDP plugin, or started one process of
            several; or a tracker is unknown or not installed.
        RuntimeError: the launcher started several processes, but they did not connect.
    """
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{name} is not supported: start with torchrun (DDP), with fsdp=True to shard the weights; got "
                f"{variable}={os.environ[variable]}"
            )
    if "WORLD_SIZE" not in os.environ:
        _check_single(device)
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin

    available = sorted(str(name) for name in get_available_trackers())
    missing = [name for name in tracker_names if name not in available]
    if missing:
        raise ValueError(f"trackers must be installed and known to accelerate, got {missing}; there are {available}")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(tracker_names) or None,
        project_dir=str(folder),
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise RuntimeError(f"{started} processes were started, but accelerate sees {accelerator.num_processes}")
    return accelerator


def _check_single(device: torch.device) -> None:
    """Rejects a single process, or warns of it, where a launcher was meant to start several."""
    # accelerate launch sets the first for every run, the second for several processes
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; start with "
            "torchrun --nproc_per_node N"
        )
    if launched and device.type == "cuda" and torch.cuda.device_count() > 1:
        warnings.warn(
            f"accelerate launch started one process, which trains on one of {torch.cuda.device_count()} GPUs; pass "
            "--multi_gpu, or start with torchrun --nproc_per_node N",
            stacklevel=4,
        )
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        warnings.warn(
            f"srun started {tasks} tasks, each of which is a run of its own; start one torchrun a node: "
            "srun --ntasks-per-node=1 torchrun --nproc_per_node N",
            stacklevel=4,
        )


class WorkAbandoned(BaseException):
    """Raised by a stop request in work that ``InterruptHandler.abandonable`` runs, past handlers of ``Exception``."""


@dataclass(eq=False)
class InterruptHandler:
    """Turns the first signal to stop into a request to stop after the current update; a second Ctrl-C stops at once.

    The signals are Ctrl-C (SIGINT), SIGTERM, SIGHUP and SIGUSR1, which SLURM can send before the time limit. A launcher
    forwards the signal that its processes have already received from the terminal or the scheduler, so repeats within
    ``grace`` seconds, and all further signals but Ctrl-C, count as the same request.

    A SIGHUP that this process ignores (``nohup``) stays ignored. Outside the main thread, where Python delivers no
    signals, nothing is handled.

    Args:
        grace: seconds after the first signal during which further ones are ignored.

    Attributes:
        received: number of the signal that requested the stop; 0 before.
    """

    grace: float = 1.0 if "TORCHELASTIC_RUN_ID" not in os.environ else 5.0

    def __post_init__(self) -> None:
        self.received = 0
        self._requested_at = 0.0
        self._abandons = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True once this process was asked to stop."""
        return self.received != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._requested_at > self.grace:
                raise KeyboardInterrupt
            return
        self.received = number
        self._requested_at = time.monotonic()
        when = "now" if self._abandons else "after this update"
        message = f"\n{signal.Signals(number).name}: stopping {when} and saving a checkpoint; Ctrl-C stops at once.\n"
        # os.write: the signal may have interrupted a print
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        if self._abandons:
            raise WorkAbandoned

    def should_stop(self) -> bool:
        """True if any process received a signal to stop, which all then have; all processes must call it together."""
        self.received = all_reduce_max(self.received)
        return self.requested

    def abandonable(self, work: Callable[[], T]) -> T | None:
        """The result of ``work``, which a request to stop ends by an exception; None if there was one."""
        try:
            try:
                self._abandons = True
                return None if self.requested else work()
            finally:
                self._abandons = False
        except WorkAbandoned:
            return None

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                handled = getattr(signal, name, None)  # Windows has the first two
                if handled is None or (name == "SIGHUP" and signal.getsignal(handled) is signal.SIG_IGN):
                    continue
                self._previous[handled] = signal.signal(handled, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handled, previous in self._previous.items():
            signal.signal(handled, previous)
        self._previous = {}
