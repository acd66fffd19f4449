"""Fully sharded data parallelism (FSDP, arXiv 2304.11277) with unsharded checkpoints.

Uses ``torch.distributed``'s ``fully_shard``: each block is gathered for its own forward and backward. Checkpoints hold
FULL state dicts, so that one process can open them with ``from_pretrained``.

Gathering follows the forwards of modules: within the forward of the sharded module (the objective), the weights outside
of its blocks are whole, and those of a block within the block's forward. Work that reads weights elsewhere, or that
processes do at their own pace, such as generation, needs ``gathered``.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
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


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shards a module over all processes, in place, and moves it to the device one block at a time.

    Parameters become DTensors, except scalars, which cannot be sharded: the caller averages their gradients.

    Args:
        module: module called in training, on any device.
        blocks: submodules that are gathered one at a time.
        device: training device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size(),))}
    if scalars:
        options["ignored_params"] = scalars
    for parameter in module.parameters():
        # a model of another library may store weights transposed, and only contiguous ones can be sharded
        parameter.data = parameter.data.contiguous()
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(module, **options)
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
    # FSDP takes the first module that runs for its root, and refuses another one later
    with torch.no_grad(), quiet():
        module.forward = lambda: None
        module()
        del module.forward
    module.reshard()  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """True if parameters are sharded over processes and not gathered now."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, for which every process must call this; any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context in which every process holds all weights and can use the model alone; every process must enter it.

    For generation, and for evaluation on one process: nothing is trained in it, and changes of weights are lost.

    Args:
        module: module that ``shard`` sharded; any other is left as it is.
    """
    from torch.distributed.fsdp import FSDPModule

    if not is_sharded(module):
        yield
        return
    parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with quiet():
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)
        _forget_forwards(parts)


def _forget_forwards(parts: Iterable[Any]) -> None:
    """Clears the order of forwards that FSDP prefetches by: forwards of one process alone would make orders differ."""
    for part in parts:
        state = part._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is not None:
                group._post_forward_indices.clear()


@contextlib.contextmanager
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
    # not strict: a parameter that the loss does not touch has no state
    _states().set_optimizer_state_dict(model, optimizer, dict(state), options=_options(strict=False))


def _states() -> Any:
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _options(*, strict: bool = True) -> Any:
    return _states().StateDictOptions(full_state_dict=True, cpu_offload=True, strict=strict)
