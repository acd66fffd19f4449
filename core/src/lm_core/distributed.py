"""Collectives between the processes of a training run; with a single process they return their input.

:func:`all_gather` is for losses over the global batch, such as CLIP's contrastive loss (arXiv 2103.00020): every rank
gathers the features of all ranks, computes the same loss, and the backward sums the gradients of each feature over
ranks. ``DistributedDataParallel`` then divides by the number of ranks, which leaves exactly the gradient of one
process with the whole batch, for the towers and for parameters of the loss itself (a temperature) alike. Slicing the
gradient without the sum, as is often done, loses the other ranks' share.

``torch.distributed`` is queried at call time, so a module may be imported before the process group exists.

Legend: b batch of this rank, s sum of the batches of all ranks, w ranks.
"""

import atexit
import gc
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")

Group = Any  # torch.distributed.ProcessGroup, which a build without distributed support lacks

if dist.is_available():
    # DDP imports this, and its functions keep the group that exists at import as their default: gloo's threads then
    # outlive destroy_process_group, and one that frees a tensor while the interpreter exits aborts the process
    import torch.distributed.nn.functional


def is_distributed() -> bool:
    """True once a process group exists (even one of a single process)."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Number of processes in the group (None for all); 1 when not distributed."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: Group = None) -> int:
    """Rank of this process within the group (None for all); 0 when not distributed, -1 outside the group."""
    return dist.get_rank(group) if is_distributed() else 0


def barrier(group: Group = None) -> None:
    """Waits until every process of the group has reached this call."""
    if not _alone(group):
        dist.barrier(group=group)


def all_reduce_sum(t: Shaped[Tensor, "*shape"], group: Group = None) -> Shaped[Tensor, "*shape"]:
    """Sum of ``t`` over the ranks, as a new tensor without gradient; for counts and logged numbers.

    Raises:
        ValueError: this process is not in the group.
    """
    total = t.detach().clone(memory_format=torch.contiguous_format)
    if not _alone(group):
        dist.all_reduce(total, group=group)
    return total


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums gradients over the processes, once an update; a parameter without a gradient counts as 0.

    For models that ``DistributedDataParallel`` cannot wrap, since it expects every process to use every parameter in
    each forward: adapters of several models on one base, or a minibatch with fewer rows than processes.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def sum_over_processes(value: float | int, device: torch.device) -> float:
    """Sum of ``value`` over all processes, each of which calls it.

    ``device`` is the training device: NCCL takes no CPU tensors.
    """
    local = torch.tensor(value, dtype=torch.float64)
    return float(all_reduce_sum(local.to(device) if device.type == "cuda" else local))


def loss_normalizer(labels: float | int, device: torch.device) -> tuple[float, Tensor]:
    """Number of labels on all processes, and the divisor of each process's summed loss.

    DDP and FSDP average gradients over processes, so each process divides by the mean number of labels a process, not
    by its own: every label then has the same weight.

    Args:
        labels: labels of this process in all micro-batches of the update.
        device: training device, which the divisor is put on.
    """
    total = sum_over_processes(labels, device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return total, torch.tensor(total / world_size(), dtype=dtype, device=device)


def any_rank(flag: bool) -> bool:
    """True on every rank if ``flag`` is True on any, for joint decisions such as stopping or skipping an update."""
    return bool(all_reduce_max(int(flag)))


def all_reduce_max(value: int) -> int:
    """The largest ``value`` of all ranks."""
    if _alone(None):
        return value
    # an NCCL-only group reduces GPU tensors only
    largest = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def broadcast_object(value: T, source: int = 0, group: Group = None) -> T:
    """The value passed by rank ``source`` of the group; the values of other ranks are ignored.

    The value is pickled, between processes of one run only.

    Raises:
        ValueError: ``source`` is not a rank of the group, or this process is not in it.
    """
    alone = _alone(group)
    if not 0 <= source < world_size(group):
        raise ValueError(f"source must be a rank in [0, {world_size(group)}), got {source}")
    if alone:
        return value
    values = [value]
    dist.broadcast_object_list(
        values, src=source if group is None else dist.get_global_rank(group, source), group=group
    )
    return values[0]


def all_gather(
    x: Shaped[Tensor, " b *rest"], group: Group = None
) -> tuple[Shaped[Tensor, " s *rest"], Int[Tensor, " w"]]:
    """Concatenates the tensors of all ranks along their first dimension; differentiable.

    Every rank of the group must call it, and if the result is used in a loss, every rank must run its backward: the
    backward is an all-reduce. A rank without samples passes a tensor of 0 rows, which must require a gradient if those
    of the other ranks do.

    Args:
        x: this rank's part, shape (b, ...); b may differ from rank to rank, the rest and the dtype may not.
        group: the process group; None for all processes.

    Returns:
        The parts of all ranks in rank order, (s, ...), and the number of rows of each, int64 of shape (w,). When not
        distributed, or alone in the group, ``x`` itself and its size.

    Raises:
        ValueError: ``x`` has no dimension, or its shape, dtype or ``requires_grad`` differs between ranks (raised on
            every rank); or this process is not in the group.
    """
    if _alone(group):
        if x.ndim == 0:
            raise ValueError("x must have a first dimension to gather along, got a scalar")
        return x, torch.tensor([x.shape[0]], device=x.device)
    rows = x.shape[0] if x.ndim > 0 else -1
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    # a rank that raised on its own bad input would leave the others waiting: all compare descriptions, and all raise
    signature = zlib.crc32(repr((x.ndim, tuple(x.shape[1:]), x.dtype)).encode())
    description = torch.tensor([rows, signature, needs_gradient], dtype=torch.int64, device=x.device)
    described = [torch.empty_like(description) for _ in range(world_size(group))]
    dist.all_gather(described, description, group=group)
    table = torch.stack(described)
    sizes, signatures, gradients = table.T.tolist()
    if min(sizes) < 0:
        raise ValueError(
            f"x must have a first dimension to gather along on every rank, got {sizes} rows (-1: a scalar)"
        )
    if len(set(signatures)) > 1:
        raise ValueError(
            f"x must have one dtype and one shape but for its first dimension on every rank, got {x.dtype} and "
            f"{tuple(x.shape)} on rank {rank(group)}, and others on {_differing(signatures, signature)}"
        )
    if len(set(gradients)) > 1:
        raise ValueError(
            f"x must require a gradient on every rank or on none, got {needs_gradient} on rank {rank(group)} and "
            f"{not needs_gradient} on {_differing(gradients, int(needs_gradient))}"
        )
    if max(sizes) == 0:
        return x, table[:, 0]
    return _AllGather.apply(x, sizes, group), table[:, 0]  # type: ignore[no-untyped-call]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes = sizes
        ctx.group = group
        # collectives take equal shapes only: short parts are padded, and the padding is cut off afterwards
        padded = x.contiguous()
        if x.shape[0] < max(sizes):
            padded = torch.cat((padded, x.new_zeros((max(sizes) - x.shape[0], *x.shape[1:]))))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def make_replicas_equal(model: nn.Module, device: torch.device) -> None:
    """Gives every process rank 0's parameters; every process calls it.

    Trainable ones are sent, since adapters may have been made before seeding; of the frozen ones, which usually come
    from the same file, only those whose checksums differ.

    Args:
        model: the model, on any device.
        device: training device, over which one parameter at a time is sent.

    Raises:
        ValueError: the processes have other names, shapes or dtypes of parameters.
    """
    if world_size() == 1:
        return
    parameters = dict(model.named_parameters())
    described = [(name, tuple(value.shape), str(value.dtype)) for name, value in parameters.items()]
    first = broadcast_object(described)
    differing = sorted({str(entry[0]) for entry in set(described) ^ set(first)})
    if any_rank(bool(differing)):
        raise ValueError(f"every process must have the same parameters as rank 0, got others: {differing[:8]}")
    for parameter in parameters.values():
        if parameter.requires_grad:
            _send(parameter, device)
    checksums = torch.stack([checksum(value).to(device) for value in parameters.values()])
    expected = checksums.clone()
    dist.broadcast(expected, src=0)
    differs = all_reduce_sum((checksums != expected).any(dim=1).long())
    for value, count in zip(parameters.values(), differs.tolist(), strict=True):
        if count:
            _send(value, device)


def _send(parameter: Tensor, device: torch.device) -> None:
    """Broadcasts a tensor of rank 0, in place."""
    value = parameter.detach().to(device).contiguous()
    dist.broadcast(value, src=0)
    parameter.data.copy_(value)


def checksum(t: Tensor) -> Tensor:
    """Two int64 sums over the bits of ``t``, the second weighted by position, computed on its device."""
    value = t.detach().contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    total = torch.zeros(2, dtype=torch.int64, device=t.device)
    for start, part in enumerate(value.reshape(-1).view(integer).split(2**22)):
        bits = part.long()
        position = torch.arange(1, len(bits) + 1, device=t.device) + start
        total += torch.stack((bits.sum(), (bits * position).sum()))
    return total


def data_parallel(module: nn.Module, device: torch.device, **options: Any) -> nn.Module:
    """``module``, which is on ``device``, in a ``DistributedDataParallel`` with further ``options``.

    A loss need not touch every parameter (``find_unused_parameters``), except under reentrant gradient checkpointing,
    whose inner backward DDP would count as a second one. Call ``release`` when training ends.
    """
    from torch.nn.parallel import DistributedDataParallel

    options = {"find_unused_parameters": not _checkpoints_reentrantly(module), **options}
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **options)


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """True for a transformers model with ``gradient_checkpointing_enable({"use_reentrant": True})``."""
    functions = (
        getattr(part, "_gradient_checkpointing_func", None)
        for part in module.modules()
        if getattr(part, "gradient_checkpointing", False)
    )
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def release(wrapper: nn.Module) -> None:
    """Drops a ``DistributedDataParallel``'s references to the process group; it cannot be called afterwards.

    Its ``Reducer`` holds the group. If that is the last reference, collected after ``destroy_process_group``, it joins
    gloo's threads while it holds the GIL, for which a thread that frees a tensor waits, and the process hangs.
    """
    for name in ("logger", "reducer", "process_group"):
        setattr(wrapper, name, None)


def end_process_group() -> None:
    """Destroys the process group, if there is one, in an order that neither aborts nor hangs the process.

    All DDP wrappers release the group first. Then the group ends and joins its threads: one that outlives the
    interpreter aborts the process ("terminate called without an active exception").
    """
    if not is_distributed():
        return
    from torch.nn.parallel import DistributedDataParallel

    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel):  # isinstance would load lazy modules
            release(candidate)
    gc.collect()
    dist.destroy_process_group()
    gc.collect()


def end_process_group_at_exit() -> None:
    """Registers ``end_process_group`` with ``atexit``, to run before everything registered earlier."""
    atexit.unregister(end_process_group)
    atexit.register(end_process_group)


def _alone(group: Group) -> bool:
    if not is_distributed():
        return True
    if dist.get_rank(group) < 0:
        raise ValueError(f"group must contain this process, got a group without global rank {dist.get_rank()}")
    return dist.get_world_size(group) == 1


def _differing(values: list[int], local: int) -> str:
    return "rank " + ", ".join(str(other) for other, value in enumerate(values) if value != local)
