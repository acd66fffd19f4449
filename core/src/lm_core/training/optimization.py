"""One optimizer update: weight decay groups, learning rate schedule, gradient clipping and the guard against NaN.

The schedule is a pure function of the number of updates done and is stepped once per update by the trainer. It is not
a torch scheduler because ``accelerate`` steps a prepared scheduler once per process.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lm_core.checks import check_positive, typed
from lm_core.distributed import any_rank

NO_DECAY = ("bias", "norm", "embedding")


def _kind_of(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if name.endswith("bias"):
        return "bias"
    # a gain or scale outside a norm layer counts as one, also one per head of shape (heads, 1, 1): decay would pull it
    # to zero. A column (n, 1) counts as a matrix: a low-rank factor of rank 1.
    scale_per_head = parameter.ndim > 2 and parameter.shape[1:].numel() == 1
    return "norm" if parameter.ndim < 2 or scale_per_head else "weight"


def optimizer_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    no_decay: Collection[str] = NO_DECAY,
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay, norms, biases and embeddings do not.

    The order is that of ``model.named_parameters()``, the same in every process. A parameter with several names (a
    tied embedding) appears once; it is an embedding if any of its owners is one. Frozen parameters are left out.

    Args:
        model: model with the parameters.
        weight_decay: weight decay of the first group; the second has 0.
        no_decay: kinds without decay, out of "bias", "norm" (and any other gain or scale), "embedding".
        parameters: subset of the model's parameters; None for all.

    Raises:
        ValueError: ``weight_decay`` is negative, a kind is unknown, or nothing is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    unknown = sorted(set(no_decay) - set(NO_DECAY))
    if unknown:
        raise ValueError(f"no_decay must contain only {NO_DECAY}, got {unknown}")
    wanted = None if parameters is None else {id(parameter) for parameter in parameters}
    kinds: dict[int, set[str]] = {}
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            kinds.setdefault(id(parameter), set()).add(_kind_of(owner, name, parameter))
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for _, parameter in model.named_parameters():
        if not parameter.requires_grad or (wanted is not None and id(parameter) not in wanted):
            continue
        (others if kinds[id(parameter)] & set(no_decay) else decayed).append(parameter)
    if not decayed and not others:
        raise ValueError(f"model must have trainable parameters, got a {type(model).__name__} with none")
    groups = ((decayed, weight_decay), (others, 0.0))
    # AdamW updates a group at once, which must be all sharded (FSDP) or all whole
    return [{"params": part, "weight_decay": decay} for group, decay in groups for part in _by_sharding(group) if part]


def _by_sharding(tensors: Iterable[Tensor]) -> tuple[list[Any], list[Any]]:
    """The sharded tensors (FSDP), and the others."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for tensor in tensors:
        parts[not hasattr(tensor, "full_tensor")].append(tensor)
    return parts


@typed
def learning_rate_scale(
    step: int,
    *,
    kind: Literal["cosine", "linear", "constant"] = "cosine",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    final_scale: float = 0.1,
) -> float:
    """Factor on the learning rate of update ``step`` (the first is 0).

    Rises linearly to 1 over ``warmup_steps`` (the first update has 1 / warmup_steps, never 0), then falls along a half
    cosine or a line to ``final_scale`` at ``total_steps`` and stays there; "constant" stays at 1.

    Raises:
        ValueError: a negative size, ``final_scale`` outside [0, 1], or no ``total_steps`` past the warmup for a
            schedule that falls.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step and warmup_steps must not be negative, got {step} and {warmup_steps}")
    if not 0 <= final_scale <= 1:
        raise ValueError(f"final_scale must be in [0, 1], got {final_scale}")
    if kind != "constant" and (total_steps is None or total_steps <= warmup_steps):
        raise ValueError(f"total_steps must be greater than warmup_steps = {warmup_steps}, got {total_steps}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant" or total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    fall = progress if kind == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - final_scale) * fall


class LearningRateSchedule:
    """Sets the learning rates of an optimizer; call ``step()`` after each update.

    Args:
        optimizer: anything with ``param_groups``, whose current learning rates are the peaks.
        kind, warmup_steps, total_steps, final_scale: arguments of ``learning_rate_scale``; ``kind`` must be "constant"
            with a ``scheduler``, which replaces it.
        scheduler: torch class such as ``CosineAnnealingLR``, whose rates are scaled by the warmup.
        scheduler_kwargs: its arguments other than the optimizer.

    Raises:
        ValueError: as for ``learning_rate_scale``; or both a ``scheduler`` and a ``kind`` that falls are set.
    """

    @typed
    def __init__(
        self,
        optimizer: Any,
        *,
        kind: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        final_scale: float = 0.1,
        scheduler: type[LRScheduler] | None = None,
        scheduler_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if scheduler is not None and kind != "constant":
            raise ValueError(f'kind must be "constant" with a scheduler, got {kind!r}')
        self.settings: dict[str, Any] = {
            "kind": kind,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "final_scale": final_scale,
        }
        learning_rate_scale(0, **self.settings)
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else scheduler(optimizer, **(scheduler_kwargs or {}))
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps_done = 0
        self._apply()

    def _apply(self) -> None:
        self._set([peak * learning_rate_scale(self.steps_done, **self.settings) for peak in self.peaks])

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a compiled or capturable optimizer keeps the tensor
            else:
                group["lr"] = rate

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first group, for the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Counts an update and sets the learning rates of the next one."""
        if self.scheduler is not None:
            self._set(self.peaks)  # some schedulers compute the next rate from the current one
            self.scheduler.step()
            self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.steps_done += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The number of updates done, and the state of a torch scheduler; the rest follows from the settings."""
        if self.scheduler is None:
            return {"steps_done": self.steps_done}
        kept = {
            name: value
            for name, value in self.scheduler.state_dict().items()
            if isinstance(value, int | float | list) and not isinstance(value, bool)
        }
        return {"steps_done": self.steps_done, "peaks": list(self.peaks), "scheduler": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes at the update of ``state``; call it after the optimizer's ``load_state_dict``.

        Raises:
            ValueError: the state comes from another kind of schedule.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        self.steps_done = int(state["steps_done"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
            self.peaks = list(state["peaks"])
        self._apply()


def clip_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales gradients so that their norm over all parameters is at most ``max_norm``.

    Args:
        parameters: parameters or tensors with gradients; those without are ignored.
        max_norm: maximum norm; None only measures.

    Returns:
        The norm before clipping, a scalar on the gradients' device.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    bound = math.inf if max_norm is None else max_norm
    sharded, others = _by_sharding(parameters)
    if not sharded or all(parameter.grad is None for parameter in others):
        norm = torch.nn.utils.clip_grad_norm_([*sharded, *others], bound)
        full = getattr(norm, "full_tensor", None)  # sharded gradients give a sharded norm
        return norm if full is None else full()
    # some of each: scalars are not sharded
    parts = [clip_global_norm(part, None) for part in (sharded, others)]
    norm = torch.linalg.vector_norm(torch.stack(parts))
    scale = (bound / (norm + 1e-6)).clamp(max=1.0)
    for parameter in [*sharded, *others]:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            local.mul_(scale)
    return norm


@dataclass
class NonFiniteGuard:
    """Guard that skips an update whose loss or gradient norm is infinite or NaN.

    All processes must call it together: one process's NaN makes all of them skip.

    Attributes:
        max_consecutive: number of skipped updates in a row that ends the run.
        skipped: updates skipped so far.
        consecutive: updates skipped since the last good one.
    """

    max_consecutive: int = 10
    skipped: int = 0
    consecutive: int = 0

    def __post_init__(self) -> None:
        check_positive(self.max_consecutive, "max_consecutive")

    def allows(self, step: int, loss: "Tensor | float", grad_norm: "Tensor | float | None" = None) -> bool:
        """True if update ``step`` may be made; otherwise counts it as skipped.

        Raises:
            RuntimeError: ``max_consecutive`` updates in a row were skipped.
        """
        values = [loss] if grad_norm is None else [loss, grad_norm]
        tensors = [torch.as_tensor(value).detach().float().mean() for value in values]
        finite = torch.stack([torch.isfinite(tensor.to(tensors[0].device)) for tensor in tensors]).all()
        if not any_rank(not bool(finite)):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.consecutive >= self.max_consecutive:
            norm = "" if grad_norm is None else f", gradient norm {float(tensors[1])}"
            raise RuntimeError(
                f"the loss or the gradient was not finite in {self.consecutive} updates in a row, the last at step "
                f"{step} (loss {float(tensors[0])}{norm}); lower the learning rate, clip gradients, or check the data"
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """The counts of skipped updates."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the counts of ``state``."""
        self.skipped = int(state["skipped"])
        self.consecutive = int(state["consecutive"])


def finish_update(
    number: int,
    loss: "Tensor | float",
    parameters: Iterable[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    schedule: LearningRateSchedule,
    guard: NonFiniteGuard,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Clips the gradients, steps the optimizer unless something is not finite, and clears the gradients.

    Args:
        number: number of this update, from 1.
        loss: loss over all processes.
        parameters: parameters whose gradients are clipped together.
        optimizer: optimizer, which a skipped update does not step.
        schedule: learning rate schedule, which a skipped update does not step.
        guard: guard that decides and counts skipped updates.
        max_grad_norm: maximum gradient norm; None only measures.

    Returns:
        Metrics: ``learning_rate`` of this update, ``grad_norm`` before clipping, updates ``skipped`` so far.

    Raises:
        RuntimeError: too many updates in a row were skipped.
    """
    learning_rate = schedule.learning_rate
    norm = clip_global_norm(parameters, max_grad_norm)
    if guard.allows(number, loss, norm):
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return {"learning_rate": learning_rate, "grad_norm": float(norm), "skipped": guard.skipped}
