"""Starting ``accelerate`` in this process, and refusing by name what would silently do something else.

Processes are started by torchrun. Known to go wrong in silence: ``accelerate launch --cpu --num_processes 2`` runs one
process; ``accelerate``'s FSDP plugin becomes DDP on a CPU; a launcher's gradient accumulation divides losses again.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

_INSTEAD = "start with torchrun (DDP), with fsdp=True where the trainer has it"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP plugin",
}


def check_compilable(device: torch.device) -> None:
    """Raises where a model compiled by ``torch.compile`` would be trained wrongly.

    Raises:
        ValueError: the device is the CPU and torch older than 2.7, which compiles a wrong gradient of embeddings.
    """
    if device.type == "cpu" and TorchVersion(torch.__version__) < "2.7":
        raise ValueError(
            f"compile=True on the CPU needs torch 2.7 or newer, got {torch.__version__}, which compiles the gradient "
            "of an embedding wrongly"
        )


def start_accelerator(device: torch.device, *, tracker_names: Sequence[str] = (), folder: str | Path = ".") -> Any:
    """An ``accelerate.Accelerator`` that leaves precision and gradient accumulation to the trainer.

    Args:
        device: decides the backend between processes: gloo on the CPU, NCCL on CUDA.
        tracker_names: trackers to start later with ``init_trackers``.
        folder: where trackers that write files write them.

    Raises:
        ValueError: the launcher asks for DeepSpeed, Megatron-LM or a plugin of accelerate's, or a tracker is unknown
            or not installed.
        RuntimeError: the launcher started several processes, but they did not find each other.
    """
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ValueError(f"{name} is not supported: {_INSTEAD}; got {variable}={os.environ[variable]}")
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
