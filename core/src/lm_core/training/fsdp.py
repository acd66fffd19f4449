"""Fully sharded data parallelism (FSDP, arXiv 2304.11277) with unsharded checkpoints.

Uses ``torch.distributed``'s ``fully_shard``: each block is gathered for its own forward and backward. Checkpoints hold
FULL state dicts, so that one process can open them with ``from_pretrained``.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from lm_core.distributed import world_size


def check_shardable(device: torch.device) -> None:
    """Rejects a run whose model cannot be sharded.

    Raises:
        ValueError: there is one process; or ``device`` is the CPU and torch older than 2.7, which shards on GPUs only.
    """
    if world_size() == 1:
        raise ValueError("fsdp=True needs several processes, got one; start them with torchrun --nproc_per_node N")
    if device.type == "cpu" and TorchVersion(torch.__version__) < "2.7":
        raise ValueError(f"fsdp=True on the CPU needs torch 2.7 or newer, got {torch.__version__}")


def shard(module: nn.Module, blocks: Iterator[nn.Module]) -> None:
    """Shards a module over all processes, in place.

    Args:
        module: module called in training; its parameters become DTensors.
        blocks: submodules that are gathered one at a time.
    """
    for parameter in module.parameters():
        # a model of another library may store weights transposed, and only contiguous ones can be sharded
        parameter.data = parameter.data.contiguous()
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)
    fully_shard(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences FSDP's warning about in-place changes of a block's output, which the models here never make."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict, on the CPU of rank 0 and empty on other ranks. Every rank calls it."""
    return dict(_states().get_model_state_dict(model, options=_options()))


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full optimizer state by parameter name, on the CPU of rank 0. Every rank calls it."""
    return dict(_states().get_optimizer_state_dict(model, optimizer, options=_options()))


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads each rank's shard of a full optimizer state, which every rank has read."""
    _states().set_optimizer_state_dict(model, optimizer, dict(state), options=_options())


def _states() -> Any:
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _options() -> Any:
    return _states().StateDictOptions(full_state_dict=True, cpu_offload=True)
