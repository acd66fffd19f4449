"""The frozen models whose hidden states are read: their blocks, widths and handling of padding.

A prompt reaches the model with its padding last and no padding id in it. A model that takes a mask (``mask_kwarg``,
known for Hugging Face and x-transformers encoders) or is causal gets the batch as it is; any other model gets the rows
of each length as a batch without padding. So a prompt's states are those of the prompt alone.

Legend: b batch, m prompt positions, n new positions, c augment features.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calm_pytorch.model.blocks import Blocks, BlocksFunction, hidden_widths
from calm_pytorch.model.connections import Connection, checked_connections, plan_connections
from calm_pytorch.model.hooks import HiddenPosition
from lm_core.adapters import as_causal_lm
from lm_core.adapters.huggingface import rope_by_length, undisturbed
from lm_core.adapters.padding import moved_back, with_padding_last
from lm_core.causal_lm import eval_mode
from lm_core.checks import check_ids, check_positive, typed


@typed
@dataclass
class AugmentParams:
    """A model to compose with, and its connections.

    Args:
        model: frozen when composed, on any device. Its first argument is the prompt.
        hidden_position: "output" reads states after a block, "input" before it; one for all, or one each.
        transformer_blocks: the blocks, modules or names, in any order; or the name of a container of them.
        extract_blocks_fn: a function from the model to its blocks.
        model_return_hiddens: the model returns a list of hidden states ``(b, m, c)`` itself; no blocks are needed.
        input_shape: shape of one prompt without the batch, for a model that reads floating point (images, audio).
        connections: 1-indexed ``(augment_layer, anchor_layer)`` pairs; None plans them (``plan_connections``).
        connect_every_num_layers: distance between planned connections, in layers of the deeper model.
        num_connections: number of planned connections, instead of their distance.
        mask_kwarg: the argument by which the model takes a mask, True at real tokens.
        shared_sequence: the augment reads the anchor's own growing sequence, causally, instead of a prompt.
    """

    model: nn.Module
    hidden_position: HiddenPosition | Sequence[HiddenPosition] = "output"
    transformer_blocks: str | Sequence[nn.Module | str] | None = None
    extract_blocks_fn: BlocksFunction | None = None
    model_return_hiddens: bool = False
    input_shape: tuple[int, ...] | None = None
    connections: Sequence[Sequence[int]] | None = None
    connect_every_num_layers: int = 4
    num_connections: int | None = None
    mask_kwarg: str | None = None
    shared_sequence: bool = False


class Augment(nn.Module):
    """A frozen model that is read, with the layers that are read.

    Attributes:
        model: the frozen model.
        name: name of the model in errors.
        depth: layers that can be read.
        dims: features of each of them.
        positions: whether each is read before its block ("input") or after it ("output").
        connections: 1-indexed ``(augment_layer, anchor_layer)`` pairs.
        layers: the augment layers that are read, rising.
        max_length: positions of a shared sequence that the model knows; None without a bound.
        max_cached_length: as of ``lm_core.adapters.huggingface.HuggingFaceLM``, of a shared sequence.
        decodes: whether its states of a growing sequence can be read from a cache; True where it reads a prompt.
    """

    def __init__(self, params: AugmentParams, number: int, anchor_depth: int) -> None:
        super().__init__()
        self.model = params.model
        self.name = f"augment {number} ({type(params.model).__name__})"
        self.input_shape = params.input_shape
        self.shared_sequence = params.shared_sequence
        if params.connect_every_num_layers is not None:
            check_positive(params.connect_every_num_layers, "connect_every_num_layers")
        if params.shared_sequence and (params.input_shape is not None or params.model_return_hiddens):
            raise ValueError(f"{self.name}: shared_sequence needs a language model with blocks, reading tokens")
        self._mask_kwarg = params.mask_kwarg if params.mask_kwarg is not None else _known_mask_kwarg(self.model)
        self._is_causal = bool(getattr(getattr(self.model, "attn_layers", None), "causal", False))
        self._vocab_size = vocabulary_of(self.model)
        # rotary frequencies that the longest row of a call decides
        self._changes_at = rope_by_length(getattr(self.model, "config", None))[1]
        self._settings = {"use_cache": False} if "use_cache" in _parameters_of(self.model) else {}
        # the layers; None for a model that returns its hidden states itself
        self._blocks: Blocks | None = None
        if not params.model_return_hiddens:
            self._blocks = Blocks.found(
                self.model,
                params.transformer_blocks,
                params.extract_blocks_fn,
                params.hidden_position,
                run=lambda: self._call(self._probe()),
                where=self.name,
                argument=f"{self.name}: hidden_position",
            )
        self.layers: list[int] = []
        with undisturbed(self.model):
            self.dims = hidden_widths(self._read(self._probe()), self.name)
        self.depth = len(self.dims)
        self.positions = ("output",) * self.depth if self._blocks is None else self._blocks.positions
        # the connections, and the layers they read
        self.connections: tuple[Connection, ...]
        if params.connections is None:
            self.connections = plan_connections(
                self.depth, anchor_depth, params.connect_every_num_layers, num_connections=params.num_connections
            )
        else:
            if params.num_connections is not None:
                raise ValueError(f"{self.name}: give connections or num_connections, not both")
            where = f"{self.name}: connections"
            self.connections = checked_connections(params.connections, self.depth, anchor_depth, where)
        self.layers = sorted({augment_layer for augment_layer, _ in self.connections})
        # in a tuple, so that the adapter does not register the model a second time
        self._language_model: tuple[Any, ...] = ()
        self.decodes = True
        self.max_length: int | None = None
        self.max_cached_length: int | None = None
        if self.shared_sequence:
            self._language_model = (as_causal_lm(self.model),)
            self.max_length = getattr(self._language_model[0], "max_length", None)
            self.max_cached_length = getattr(self._language_model[0], "max_cached_length", None)
            with undisturbed(self.model):
                self._refuse_what_looks_ahead()
                self.decodes = self._can_cache()

    # ---------------------------------------------------------------------------------------------- reading a prompt

    def _probe(self) -> Tensor:
        if self.input_shape is not None:
            return torch.zeros(1, *self.input_shape, device=device_of(self.model), dtype=_float_type(self.model))
        return torch.zeros(1, 2, dtype=torch.long, device=device_of(self.model))

    def _call(self, prompt: Tensor, **kwargs: Any) -> Any:
        return self.model(prompt, **self._settings, **kwargs)

    def _read(self, prompt: Tensor, **kwargs: Any) -> list[Tensor]:
        """States of ``self.layers``, in their order; of all layers before these are known."""
        if self._blocks is not None:
            blocks = self._blocks.layers(self.layers) if self.layers else self._blocks
            return blocks.read(lambda: self._call(prompt, **kwargs), stop_early=True)
        hiddens = self._call(prompt, **kwargs)
        if not isinstance(hiddens, (list, tuple)) or not hiddens or not isinstance(hiddens[0], Tensor):
            raise TypeError(f"{self.name}: model_return_hiddens needs a list of tensors, got {type(hiddens).__name__}")
        wanted = self.layers or range(1, len(hiddens) + 1)
        return [hiddens[layer - 1].detach() for layer in wanted]

    @torch.no_grad()
    def read(self, prompt: Tensor, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """States ``(b, m, c)`` of a prompt at each of ``self.layers``, 0 at padding; and their mask.

        Raises:
            ValueError: an id is out of range, a shape does not fit, or a float prompt came without ``input_shape``.
        """
        device = device_of(self.model)
        prompt, mask = prompt.to(device), None if mask is None else mask.to(device)
        self._check(prompt, mask)
        with eval_mode(self.model):
            if prompt.is_floating_point():
                kwargs = {} if mask is None or self._mask_kwarg is None else {self._mask_kwarg: mask}
                return self._checked(self._read(prompt.to(_float_type(self.model)), **kwargs), mask)
            if mask is None or bool(mask.all()):
                return self._checked(self._read(prompt), None)
            last = with_padding_last(prompt.masked_fill(~mask, 0), mask)
            if self._changes_at is not None and prompt.shape[1] > self._changes_at:
                hiddens = self._read_by_length(last.ids, last.mask)
            elif self._mask_kwarg is not None:
                hiddens = self._read(last.ids, **{self._mask_kwarg: last.mask})
            elif self._is_causal:
                hiddens = self._read(last.ids)
            else:
                hiddens = self._read_by_length(last.ids, last.mask)
        self._checked(hiddens, mask)
        return self._checked([moved_back(hidden, last) for hidden in hiddens], mask)

    def _checked(self, hiddens: list[Tensor], mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if mask is None:
            return tuple(hiddens), None
        for hidden in hiddens:
            if hidden.shape[:2] != mask.shape:
                raise ValueError(
                    f"{self.name}: prompt_mask must have the shape of its states {tuple(hidden.shape[:2])}, "
                    f"got {tuple(mask.shape)}"
                )
        return tuple(hidden.masked_fill(~mask.unsqueeze(-1), 0.0) for hidden in hiddens), mask

    def _read_by_length(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        lengths = mask.sum(dim=1)
        hiddens: list[Tensor] = []
        for length in sorted(set(lengths.tolist()) - {0}):
            rows = (lengths == length).nonzero().squeeze(-1)
            read = self._read(ids[rows, :length])
            if not hiddens:
                hiddens = [part.new_zeros(*ids.shape, part.shape[-1]) for part in read]
            for hidden, part in zip(hiddens, read, strict=True):
                hidden[rows, :length] = part
        return hiddens or [torch.zeros(*ids.shape, self.dims[layer - 1], device=ids.device) for layer in self.layers]

    def _check(self, prompt: Tensor, mask: Tensor | None) -> None:
        if prompt.is_floating_point():
            if self.input_shape is None:
                raise ValueError(
                    f"{self.name} reads token ids unless AugmentParams has input_shape, got a prompt of {prompt.dtype}"
                )
            if tuple(prompt.shape[1:]) != tuple(self.input_shape):
                raise ValueError(
                    f"{self.name}: prompt must have shape (b, {', '.join(map(str, self.input_shape))}), "
                    f"got {tuple(prompt.shape)}"
                )
        elif self.input_shape is not None:
            raise TypeError(f"{self.name} reads floating point of shape {self.input_shape}, got {prompt.dtype}")
        elif prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"{self.name}: prompt must have shape (b, m) with m at least 1, got {tuple(prompt.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{self.name}: prompt_mask must be boolean, got {mask.dtype}")
        if prompt.is_floating_point():
            return
        if mask is not None and mask.shape != prompt.shape:
            raise ValueError(
                f"{self.name}: prompt_mask must have the prompt's shape {tuple(prompt.shape)}, got {tuple(mask.shape)}"
            )
        if self._vocab_size is not None and prompt.device.type == "cpu":
            check_ids(
                prompt if mask is None else prompt.masked_fill(~mask, 0), self._vocab_size, f"{self.name}: prompt"
            )

    # ------------------------------------------------------------------------------------ reading the anchor's sequence

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        """The model's own cache, for ``read_on``."""
        return self._language_model[0].init_cache(batch_size, max_length)

    @torch.no_grad()
    def read_on(self, ids: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, ...]:
        """States ``(b, n, c)`` of the anchor's tokens; with a cache, of the new ones.

        Args:
            ids: new tokens.
            mask: ``(b, cached + n)``, or None.
            cache: what ``init_cache`` returned, or None.
        """
        model, device = self._language_model[0], device_of(self.model)
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        forward = getattr(model, "hidden", model)
        assert self._blocks is not None
        blocks = self._blocks.layers(self.layers)
        kwargs = {} if cache is None else {"cache": cache}
        with eval_mode(self.model):
            # with a cache the model runs to its end, or the layers above would lack these tokens
            hiddens = blocks.read(lambda: forward(ids, mask=mask, **kwargs), stop_early=cache is None)
        if mask is not None:
            real = mask[:, -ids.shape[1] :].unsqueeze(-1)
            hiddens = [hidden.masked_fill(~real, 0.0) for hidden in hiddens]
        return tuple(hiddens)

    def _refuse_what_looks_ahead(self) -> None:
        ids = torch.zeros(2, 3, dtype=torch.long, device=device_of(self.model))
        if self._vocab_size is None or self._vocab_size > 1:
            ids[1, -1] = 1
        for hidden in self.read_on(ids, None, None):
            if not torch.allclose(hidden[0, :2].float(), hidden[1, :2].float(), rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"{self.name} must be causal to share a sequence, but its states depend on later tokens"
                )

    def _can_cache(self) -> bool:
        if not hasattr(self._language_model[0], "init_cache"):
            return False
        ids = torch.zeros(1, 3, dtype=torch.long, device=device_of(self.model))
        cache = self.init_cache(1, 3)
        try:
            steps = [self.read_on(ids[:, :2], None, cache), self.read_on(ids[:, 2:], None, cache)]
        except RuntimeError:
            return False  # some models do not call their blocks with a cache
        return all(part.shape[1] == count for step, count in zip(steps, (2, 1), strict=True) for part in step)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def vocabulary_of(model: nn.Module) -> int | None:
    """Vocabulary size of a known model; None for others."""
    inner: Any = model
    if hasattr(inner, "get_input_embeddings"):
        try:
            return getattr(inner.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:
            return None
    for name in ("num_tokens", "vocab_size"):
        if isinstance(getattr(inner, name, None), int):
            return int(getattr(inner, name))
    return None


def _float_type(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _parameters_of(model: nn.Module) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _known_mask_kwarg(model: nn.Module) -> str | None:
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if packages & {"transformers", "peft"} and "attention_mask" in _parameters_of(model):
        return "attention_mask"
    causal = getattr(getattr(model, "attn_layers", None), "causal", None)
    if "x_transformers" in packages and causal is False and "mask" in _parameters_of(model):
        return "mask"
    return None
