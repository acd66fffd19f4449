"""Transformer blocks of a model, and freezing of models.

A block is a module whose output (or input) is the residual stream between two layers. They are passed as modules
or names, returned by a function of the model, or searched for: in x-transformers by the layout of its stacks, elsewhere
as the longest list of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from calm_pytorch.model.hooks import HiddenPosition, one_each, read_hiddens, running_order
from lm_core.checks import typed

BlocksFunction = Callable[[nn.Module], Sequence[nn.Module]]


def set_module_requires_grad_(module: nn.Module, requires_grad: bool) -> None:
    """Sets ``requires_grad`` of every parameter of ``module``."""
    for parameter in module.parameters():
        parameter.requires_grad = requires_grad


def freeze_all_layers_(module: nn.Module) -> None:
    """Sets ``requires_grad`` of every parameter of ``module`` to False."""
    set_module_requires_grad_(module, False)


def x_transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The ends of the layers of an x-transformers ``TransformerWrapper``, ``ViTransformerWrapper`` or their stack.

    A layer may have more parts than attention and feedforward (cross-attention, a second feedforward): it ends where
    the stack's repeating block does, or, in a stack of another order, after its last feedforward.

    Raises:
        TypeError: the model has no stack of attention layers.
    """
    model: Any = getattr(transformer, "net", None) or transformer
    stack: Any = getattr(model, "attn_layers", model)
    if not hasattr(stack, "layers") or not hasattr(stack, "layer_types"):
        raise TypeError(f"x_transformer_blocks takes an x-transformers model, got {type(transformer).__name__}")
    kinds = list(stack.layer_types)
    period = getattr(stack, "len_default_block", None)
    regular = not getattr(stack, "has_custom_layer_types", False)
    if period is None or not regular or len(kinds) % period:
        ends = [i for i, kind in enumerate(kinds) if kind == "f" and kinds[i + 1 : i + 2] != ["f"]]
        if not ends or ends[-1] != len(kinds) - 1:
            ends = list(range(len(kinds))) if not ends else [*ends, len(kinds) - 1]
    else:
        ends = list(range(period - 1, len(kinds), period))
    # the last module of an entry adds the branch to the residual stream
    layers: Any = stack.layers
    return [layers[end][-1] for end in ends]


def hugging_face_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a (language) model: its longest list of modules of one class, the outermost of these.

    Raises:
        ValueError: there is no such list.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base: Any = model if unwrap is None else unwrap()
    if getattr(getattr(base, "config", None), "text_config", None) is not None and hasattr(base, "get_decoder"):
        base = base.get_decoder()  # the language model, not the vision tower next to it
    candidates: list[nn.ModuleList] = []
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(part) for part in module}) == 1:
            candidates.append(module)
    if not candidates:
        raise ValueError(f"no list of layers was found in {type(base).__name__}: give transformer_blocks")
    longest = max(len(layers) for layers in candidates)
    return list(next(layers for layers in candidates if len(layers) == longest))


@dataclass(frozen=True)
class Blocks:
    """Blocks of a model in the order they run in, each read after it or before it.

    Attributes:
        modules: the blocks.
        positions: "output" (after) or "input" (before) for each block.
        where: names the model in errors.
    """

    modules: tuple[nn.Module, ...]
    positions: tuple[HiddenPosition, ...]
    where: str

    @classmethod
    def found(
        cls,
        model: nn.Module,
        blocks: str | Sequence[nn.Module | str] | None,
        extract: BlocksFunction | None,
        positions: HiddenPosition | Sequence[HiddenPosition],
        *,
        run: Callable[[], Any],
        where: str,
        argument: str,
    ) -> "Blocks":
        """The blocks ``find_blocks`` gives, sorted with their positions.

        Args:
            model: model that has the blocks.
            blocks: as for ``find_blocks``.
            extract: as for ``find_blocks``.
            positions: one for all, or one each.
            run: calls the model, which stays undisturbed.
            where: names the model in errors.
            argument: names ``positions`` in errors.

        Raises:
            ValueError: as ``find_blocks``, another number of positions, or a block does not run once.
        """
        modules = find_blocks(model, blocks, extract, where)
        each = one_each(positions, len(modules), argument)
        order = running_order(run, model, modules, each, where)
        return cls(tuple(modules[i] for i in order), tuple(each[i] for i in order), where)

    def layers(self, layers: Sequence[int]) -> "Blocks":
        """Some of the blocks, by their numbers from 1."""
        modules = tuple(self.modules[layer - 1] for layer in layers)
        return Blocks(modules, tuple(self.positions[layer - 1] for layer in layers), self.where)

    def read(self, run: Callable[[], Any], *, stop_early: bool = False) -> list[Tensor]:
        """``read_hiddens`` of these blocks."""
        return read_hiddens(run, self.modules, self.positions, where=self.where, stop_early=stop_early)


def hidden_widths(hiddens: Sequence[Tensor], where: str) -> tuple[int, ...]:
    """Features of each layer's hidden states.

    Raises:
        ValueError: hidden states are not ``(b, n, d)``, or have no features.
    """
    for layer, hidden in enumerate(hiddens, start=1):
        if hidden.ndim != 3 or hidden.shape[-1] < 1:
            raise ValueError(f"{where}: layer {layer} must give (b, n, d), got shape {tuple(hidden.shape)}")
    return tuple(hidden.shape[-1] for hidden in hiddens)


def recomputed_parts(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules to compute again in the backward pass, so that the activations of ``blocks`` need not be kept.

    A block is a whole layer in most libraries, and is computed again as such. In x-transformers it is only the sum at
    a layer's end: there it is the attentions and feedforwards after the first of ``blocks``, or all of them.
    """
    stack: Any = getattr(getattr(model, "net", None) or model, "attn_layers", None)
    entries: list[Any] = list(getattr(stack, "layers", ()))
    if not entries:
        return list(blocks)
    begin = next((index + 1 for index, entry in enumerate(entries) if entry[-1] is blocks[0]), 0)
    return [entry[1] for entry in entries[begin:]]


@typed
def find_blocks(
    model: nn.Module,
    blocks: str | Sequence[nn.Module | str] | None,
    extract: BlocksFunction | None,
    where: str,
) -> list[nn.Module]:
    """The requested blocks of ``model``, in the order of the request.

    Args:
        model: model that has the blocks.
        blocks: modules or their names, or the name of a container of them; None to search.
        extract: function from the model to its blocks.
        where: names the model in errors.

    Raises:
        ValueError: there is none, one is no part of the model or comes twice, or none are known for such a model.
        TypeError: the function gave something else than modules.
    """
    if blocks is not None and extract is not None:
        raise ValueError(f"{where}: give transformer_blocks or extract_blocks_fn, not both")
    named = dict(model.named_modules(remove_duplicate=False))
    if isinstance(blocks, str):
        blocks = list(_named(named, blocks, where).children())
    if blocks is not None:
        chosen = [_named(named, block, where) if isinstance(block, str) else block for block in blocks]
    elif extract is not None:
        chosen = list(extract(model))
    else:
        chosen = _known_blocks(model, where)
    known = {id(module) for module in named.values()}
    for number, block in enumerate(chosen, start=1):
        if not isinstance(block, nn.Module):
            raise TypeError(f"{where}: block {number} must be a module, got {type(block).__name__}")
        if id(block) not in known:
            raise ValueError(f"{where}: block {number} ({type(block).__name__}) is no part of the model")
    if len({id(block) for block in chosen}) < len(chosen):
        raise ValueError(f"{where}: each block must come once, got {len(chosen)} with repetitions")
    if not chosen:
        raise ValueError(f"{where}: at least one transformer block is needed, got none")
    return chosen


def _named(named: dict[str, nn.Module], name: str, where: str) -> nn.Module:
    if name not in named:
        raise ValueError(f"{where}: no module is named {name!r}")
    return named[name]


def _known_blocks(model: nn.Module, where: str) -> list[nn.Module]:
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "x_transformers" in packages:
        return x_transformer_blocks(model)
    try:
        return hugging_face_blocks(model)
    except ValueError as error:
        raise ValueError(
            f"{where}: the blocks of a {type(model).__name__} are not known, give transformer_blocks (modules or "
            "names) or extract_blocks_fn"
        ) from error


def attention_heads(model: nn.Module) -> tuple[int, int] | None:
    """Number of heads and features a head of a known model; None for others."""
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(width, int):
        head_width = getattr(config, "head_dim", None)
        return heads, head_width if isinstance(head_width, int) else width // heads
    heads, head_width = getattr(model, "heads", None), getattr(model, "dim_head", None)
    if isinstance(heads, int) and isinstance(head_width, int):
        return heads, head_width
    for module in model.modules():
        part: Any = module
        if type(part).__name__ == "Attention" and hasattr(part, "to_q") and isinstance(getattr(part, "heads", 0), int):
            return part.heads, part.to_q.out_features // part.heads
    return None
