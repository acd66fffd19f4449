"""Reads and changes the hidden states of blocks through hooks that live only as long as one ``with`` block.

Block outputs may be tensors, tuples, dataclasses or dicts: the hidden state is the first tensor in them, and its
replacement goes into an object of the same type.

Legend: b batch, n sequence, d feature.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm_core.adapters.huggingface import undisturbed
from lm_core.checks import typed

HiddenPosition = Literal["input", "output"]
_CHECKPOINT = partial(checkpoint, use_reentrant=False)


class _EnoughRead(BaseException):
    """Leaves a model's forward once its last wanted block has run; no ``except Exception`` of a model catches it."""


def _place_of_hidden(value: Any) -> Any:
    """Field, key or index of the first tensor in a block's output or arguments; None without one."""
    places: Any = ()
    if dataclasses.is_dataclass(value):
        places = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        places = value.items()
    elif isinstance(value, (tuple, list)):
        places = enumerate(value)
    return next((place for place, entry in places if isinstance(entry, Tensor)), None)


def hidden_of(value: Any, where: str) -> Tensor:
    """The first tensor in a block's output or arguments.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, Tensor):
        return value
    place = _place_of_hidden(value)
    if place is None:
        raise TypeError(f"{where} must give a tensor, or begin with one, got {type(value).__name__}")
    hidden: Tensor = getattr(value, place) if dataclasses.is_dataclass(value) else value[place]
    return hidden


def with_hidden(value: Any, hidden: Tensor) -> Any:
    """``value`` with its first tensor replaced, in an object of the same type; ``value`` itself is not changed."""
    if isinstance(value, Tensor):
        return hidden
    place = _place_of_hidden(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{place: hidden})
    if isinstance(value, Mapping):
        changed: Any = {**value, place: hidden}
        return changed if type(value) is dict else type(value)(changed)  # type: ignore[call-arg]
    entries = [*value[:place], hidden, *value[place + 1 :]]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def one_each(positions: Any, count: int, name: str) -> tuple[HiddenPosition, ...]:
    """``positions`` for each of ``count`` blocks.

    Raises:
        ValueError: another number of them, or one is neither "input" nor "output".
    """
    each: tuple[Any, ...] = (positions,) * count if isinstance(positions, str) else tuple(positions)
    if len(each) != count:
        raise ValueError(f"{name} must be one for all blocks or one for each of {count}, got {len(each)}")
    for position in each:
        if position not in ("input", "output"):
            raise ValueError(f"{name} must be 'input' or 'output', got {position!r}")
    return each


# ------------------------------------------------------------------------------------------------------------- hooks


@contextlib.contextmanager
def hooked(
    blocks: Sequence[nn.Module],
    positions: Sequence[HiddenPosition],
    visit: Callable[[int, Tensor], Tensor | None],
    *,
    where: str,
) -> Iterator[None]:
    """Calls ``visit(index, hidden)`` whenever a block runs; the hidden state becomes what it returns, if not None."""

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        is_keyword = not any(isinstance(argument, Tensor) for argument in args)
        inputs = kwargs if is_keyword else args
        changed = visit(index, hidden_of(inputs, f"{where}: the input of block {index + 1}"))
        if changed is None:
            return None
        inputs = with_hidden(inputs, changed)
        return (args, inputs) if is_keyword else (inputs, kwargs)

    def after(index: int, module: nn.Module, args: Any, output: Any) -> Any:
        changed = visit(index, hidden_of(output, f"{where}: the output of block {index + 1}"))
        return None if changed is None else with_hidden(output, changed)

    handles: list[Any] = []
    try:
        for index, (block, position) in enumerate(zip(blocks, positions, strict=True)):
            if position == "input":
                handles.append(block.register_forward_pre_hook(partial(before, index), with_kwargs=True))
            else:
                handles.append(block.register_forward_hook(partial(after, index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def changing(
    blocks: Sequence[nn.Module],
    positions: Sequence[HiddenPosition],
    change: Callable[[int, Tensor], Tensor | None],
    *,
    where: str,
) -> Iterator[None]:
    """``hooked`` for one forward, in which each block must run exactly once.

    Raises:
        RuntimeError: (on leaving) a block did not run, or (when it happens) runs a second time.
    """
    done: set[int] = set()

    def once(index: int, hidden: Tensor) -> Tensor | None:
        if index in done:
            raise RuntimeError(f"{where}: block {index + 1} ran more than once in one forward")
        done.add(index)
        return change(index, hidden)

    with hooked(blocks, positions, once, where=where):
        yield
    missing = [index + 1 for index in range(len(blocks)) if index not in done]
    if missing:
        raise RuntimeError(f"{where}: blocks {missing} did not run")


def read_hiddens(
    run: Callable[[], Any],
    blocks: Sequence[nn.Module],
    positions: Sequence[HiddenPosition],
    *,
    where: str,
    stop_early: bool = False,
) -> list[Tensor]:
    """Detached hidden states at ``blocks`` in a call of ``run()``.

    Args:
        run: calls the model.
        blocks: in the order they run in.
        positions: "input" or "output" for each block.
        where: names the model in errors.
        stop_early: leaves the model once the last block has been read.

    Raises:
        RuntimeError: a block did not run, or ran more than once.
    """
    hiddens: dict[int, Tensor] = {}

    def keep(index: int, hidden: Tensor) -> None:
        hiddens[index] = hidden.detach()
        if stop_early and len(hiddens) == len(blocks):
            raise _EnoughRead

    with changing(blocks, positions, keep, where=where), contextlib.suppress(_EnoughRead):
        run()
    return [hiddens[index] for index in range(len(blocks))]


def running_order(
    run: Callable[[], Any],
    model: nn.Module,
    blocks: Sequence[nn.Module],
    positions: Sequence[HiddenPosition],
    where: str,
) -> list[int]:
    """Indices of ``blocks`` in the order in which they run; the model stays undisturbed.

    Raises:
        ValueError: a block does not run, or runs more than once.
    """
    order: list[int] = []
    with undisturbed(model), hooked(blocks, positions, lambda index, hidden: order.append(index), where=where):
        run()
    silent = sorted(set(range(len(blocks))) - set(order))
    if silent:
        raise ValueError(f"{where}: blocks {[i + 1 for i in silent]} do not run in a forward of the model")
    if len(order) > len(blocks):
        repeated = sorted({i + 1 for i in order if order.count(i) > 1})
        raise ValueError(f"{where}: blocks {repeated} run more than once in a forward, give blocks that run once")
    return order


class ExtractHiddensWrapper(nn.Module):
    """A model that returns the hidden states of its blocks instead of its output.

    Args:
        model: the model.
        blocks: in the order they run in.
        hidden_positions: one for all, or one each.

    Raises:
        ValueError: there are no blocks, or another number of positions.
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        hidden_positions: HiddenPosition | Sequence[HiddenPosition] = "output",
    ) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must hold at least one module, got none")
        self.model = model
        self.hidden_positions = one_each(hidden_positions, len(blocks), "hidden_positions")
        # a tuple keeps the blocks out of this module's parameters, which are the model's
        self.blocks = tuple(blocks)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Calls the model; hidden states ``(b, n, d)``, detached, one for each block."""
        where = type(self.model).__name__
        return read_hiddens(lambda: self.model(*args, **kwargs), self.blocks, self.hidden_positions, where=where)


# ------------------------------------------------------------------------------------------ frozen models in training


@contextlib.contextmanager
def checkpointing(blocks: Sequence[nn.Module], how: Callable[..., Any] = _CHECKPOINT) -> Iterator[None]:
    """Inside, each block keeps only its input for the backward pass and computes the rest again.

    The block's own ``forward`` is what runs a second time, not the call with its hooks: what a hook adds is outside,
    and the second run, long after the hooks are gone, computes the same.

    Args:
        blocks: blocks that are computed again.
        how: ``how(function, *args)`` calls the function and arranges for its second run.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            instance_forward = block.__dict__.get("forward")
            original = block.forward

            def forward(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                return how(partial(original, **kwargs), *args)

            replaced.append((block, instance_forward))
            block.__dict__["forward"] = forward
        yield
    finally:
        for block, instance_forward in reversed(replaced):
            if instance_forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = instance_forward


@contextlib.contextmanager
def hooks_outside_checkpoints(model: nn.Module) -> Iterator[None]:
    """Inside, a Hugging Face model's own activation checkpointing recomputes what ``checkpointing`` does.

    In releases up to 5.17 at least it hands a block's whole call to the checkpoint, hooks included, and these are gone
    when the backward pass runs it again. Later ones (5.23) hand over the forward alone and are left as they are.
    """
    name = "_gradient_checkpointing_func"
    replaced = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]

    def handing_over_the_forward(how: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            block = getattr(getattr(function, "func", function), "__self__", None)
            if not isinstance(block, nn.Module):
                return how(function, *args, **kwargs)
            with checkpointing([block], how):
                return function(*args, **kwargs)

        return run

    try:
        for module, how in replaced:
            vars(module)[name] = handing_over_the_forward(how)
        yield
    finally:
        for module, how in replaced:
            vars(module)[name] = how


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the buffers of ``model`` on leaving: a frozen model's statistics do not follow the batches."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
