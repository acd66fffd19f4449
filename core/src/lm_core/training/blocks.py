"""The repeated blocks of a model: FSDP gathers them one at a time, ``torch.compile`` compiles each on its own, and
gradient checkpointing computes each again in the backward.

Regional compilation starts in the time that one block takes, since blocks of one class share the compiled code. Hooks,
such as those of FSDP, run around the compiled code.
"""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model of any library, in the order of its modules; empty if there are none.

    A submodule's blocks are the first of these that it has: what its method ``blocks()`` returns, the entries of its
    sequence ``blocks`` (timm), submodules of the classes in ``_no_split_modules`` (transformers), and the entries of
    its module lists. A block with a parameter that is also used outside of it, such as a tied embedding, is left out.

    Args:
        model: the model, or a module around it, such as a loss.
    """
    blocks = _visit(model, frozenset()) or list(_list_entries(model))
    owners = _owners(model)
    return [block for block in dict.fromkeys(blocks) if all(owners[key] == n for key, n in _owners(block).items())]


def _visit(module: nn.Module, unsplit: frozenset[str]) -> list[nn.Module]:
    method = getattr(module, "blocks", None)
    if isinstance(method, nn.ModuleList | nn.Sequential):
        return list(method)
    if callable(method) and not isinstance(method, nn.Module):
        return list(method())
    unsplit |= set(getattr(module, "_no_split_modules", None) or ())
    if not unsplit and isinstance(module, nn.ModuleList):
        return list(_list_entries(module))
    found = []
    for child in module.children():
        found += [child] if type(child).__name__ in unsplit else _visit(child, unsplit)
    return found


def _list_entries(module: nn.Module) -> Iterator[nn.Module]:
    """Entries of module lists; a list in a list cannot be called, so it is no block."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _list_entries(child)


def _owners(module: nn.Module) -> Counter[int]:
    """Number of modules that hold each parameter."""
    return Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))


@contextlib.contextmanager
def compiled_blocks(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Compiles the forwards of blocks as far as they train; restores them on exit.

    In evaluation mode without gradients, as in validation and generation, shapes vary too much to be worth compiling.
    """
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(_restore_forward, block, vars(block).get("forward"))
            block.forward = _CompiledForward(block)
        # dynamo looks at the gradients of a block's inputs, which are no leaves
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


class _CompiledForward:
    """The forward of a block, compiled in training mode and where gradients are computed."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.eager = block.forward
        self.compiled: Any = torch.compile(self.eager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.block.training or torch.is_grad_enabled()
        return (self.compiled if trains else self.eager)(*args, **kwargs)


def enable_gradient_checkpointing(model: nn.Module) -> Callable[[], None]:
    """Makes a model compute its blocks again in the backward (arXiv 1604.06174): less memory, a second forward.

    Args:
        model: a model of these packages or of transformers, also inside peft, an adapter or a loss.

    Returns:
        A function that restores the model.

    Raises:
        TypeError: the model has no gradient checkpointing.
    """
    restored: list[Callable[[], object]] = []
    _enable(model, restored)
    if not restored:
        raise TypeError(
            f"gradient_checkpointing needs a model of these packages or of transformers, got {type(model).__name__}"
        )

    def restore() -> None:
        for function in restored:
            function()

    return restore


def _enable(module: Any, restored: list[Callable[[], object]]) -> None:
    """Enables checkpointing in ``module``, or in its submodules, and appends the functions that undo it."""
    # transformers 5 has renamed the methods
    kind = next((kind for kind in ("activation", "gradient") if hasattr(module, f"{kind}_checkpointing_enable")), None)
    if kind is not None:
        if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            restored.append(lambda: None)  # it was enabled before, and stays so
            return
        # the reentrant variant gives no gradients where the embeddings are frozen, as with LoRA
        getattr(module, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
        restored.append(getattr(module, f"{kind}_checkpointing_disable"))
        return
    if isinstance(enabled := vars(module).get("gradient_checkpointing"), bool):
        module.gradient_checkpointing = True
        restored.append(functools.partial(setattr, module, "gradient_checkpointing", enabled))
    for child in module.children():
        _enable(child, restored)


def _restore_forward(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward
