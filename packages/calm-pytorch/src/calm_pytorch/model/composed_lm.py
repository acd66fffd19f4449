"""The composed model as a ``lm_core.CausalLM``: one forward of the anchor with the augments read into it.

An augment's states are turned into keys and values once. While tokens are decoded, those of a static prompt stay as
they are, and those of a shared sequence grow by the new tokens, which the augment reads from its own cache.

Legend: b batch, n new tokens, m augment positions, v vocabulary, d feature.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_pytorch.model.anchor import Anchor
from calm_pytorch.model.augment import Augment, device_of
from calm_pytorch.model.blocks import recomputed_parts
from calm_pytorch.model.cross_attention import Context
from calm_pytorch.model.hooks import changing, checkpointing, hooks_outside_checkpoints
from calm_pytorch.model.inputs import real_tokens
from lm_core.adapters.padding import moved_back, with_padding_first, with_padding_last
from lm_core.checks import check_mask
from lm_core.nn.kv_cache import KVCache


@dataclass(frozen=True)
class AugmentStates:
    """Hidden states of prompts, as ``CALM.augment_states`` reads them; ``CALM.forward`` takes them instead of prompts.

    Attributes:
        hiddens: for each augment, one ``(b, m, c)`` for each layer that is read; none for a shared sequence.
        masks: for each augment ``(b, m)``, True at real positions, or None.
    """

    hiddens: tuple[tuple[Tensor, ...], ...]
    masks: tuple[Tensor | None, ...]

    def selected(self, rows: Tensor) -> "AugmentStates":
        """The states of these rows."""
        hiddens = tuple(tuple(hidden[rows.to(hidden.device)] for hidden in layers) for layers in self.hiddens)
        masks = tuple(None if mask is None else mask[rows.to(mask.device)] for mask in self.masks)
        return AugmentStates(hiddens, masks)


class Reading(NamedTuple):
    """One augment as the anchor reads it in one forward: keys and values for each connection, and their mask."""

    contexts: tuple[Context, ...]
    mask: Tensor | None
    causal: bool


class CALMCache:
    """The anchor's cache, and for each augment the keys and values the anchor reads.

    Args:
        anchor: the frozen model that reads.
        augments: the read models.
        batch_size: rows.
        max_length: largest number of positions of the anchor.

    Attributes:
        length: positions of the anchor held.
        batch_size: rows held.
        static: for each augment that reads a prompt, its keys and values; empty before the first tokens.
        growing: for each augment that shares the sequence, keys and values of its connections.
        augments: for each augment that shares the sequence, its own cache.
    """

    def __init__(self, anchor: Any, augments: Sequence[Augment], batch_size: int, max_length: int) -> None:
        self.batch_size = batch_size
        self.length = 0
        self.anchor = anchor.init_cache(batch_size, max_length)
        self.static: dict[int, Reading] = {}
        self.growing: dict[int, KVCache] = {}
        self.augments: dict[int, Any] = {}
        self._devices = [device_of(augment.model) for augment in augments]
        for index, augment in enumerate(augments):
            if augment.shared_sequence:
                layers = len(augment.connections)
                self.growing[index] = KVCache(layers=layers, batch_size=batch_size, max_length=max_length)
                self.augments[index] = augment.init_cache(batch_size, max_length)

    def advance(self, count: int) -> None:
        """Counts the new positions as cached."""
        for keys_values in self.growing.values():
            keys_values.advance(count)
        self.length += count

    def reorder(self, index: Tensor) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        for cache in (self.anchor, *self.growing.values()):
            cache.reorder(index)
        for augment_index, cache in self.augments.items():
            cache.reorder(index.to(self._devices[augment_index]))
        for augment, reading in self.static.items():
            contexts = tuple((k.index_select(0, index), v.index_select(0, index)) for k, v in reading.contexts)
            mask = None if reading.mask is None else reading.mask.index_select(0, index)
            self.static[augment] = Reading(contexts, mask, reading.causal)
        self.batch_size = index.shape[0]


class ComposedLM(nn.Module):
    """A composition for ``lm_core.generate`` and other consumers of causal language models; see ``CALM.as_causal_lm``.

    Further arguments of a call: ``prompt_0``, ``prompt_mask_0``, ``prompt_1``, ... for the augments that read a prompt,
    counted from 0 among all augments. With a cache they are needed with the first tokens only.

    Args:
        anchor: the frozen model that reads.
        augments: the read models.
        cross_attns: for each augment one ``CrossAttentionBlock`` for each connection.
        pad_id: marks padding in prompts.
        gradient_checkpointing: whether the anchor's blocks compute their activations again in the backward pass.
    """

    def __init__(
        self,
        anchor: Anchor,
        augments: Sequence[Augment],
        cross_attns: nn.ModuleList,
        *,
        pad_id: int = -1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.anchor = anchor.language_model
        self.augments: Any = nn.ModuleList(augments)
        self.cross_attns: Any = cross_attns
        self.pad_id = pad_id
        self.gradient_checkpointing = gradient_checkpointing
        self.decodes = anchor.decodes and all(augment.decodes for augment in augments)
        self._reader = anchor
        # in tuples, so that nothing is registered a second time
        layers = sorted({layer for augment in augments for _, layer in augment.connections})
        self._read_from = anchor.blocks.modules[layers[0] - 1 :]
        self._blocks = anchor.blocks.layers(layers)
        # for each of these blocks its cross-attentions, with the indices of their augment and connection
        self._reads = tuple(
            tuple(
                (cross_attns[index][place], index, place)  # type: ignore[index]
                for index, augment in enumerate(augments)
                for place, (_, anchor_layer) in enumerate(augment.connections)
                if anchor_layer == layer
            )
            for layer in layers
        )

    @property
    def vocab_size(self) -> int | None:
        """Ids must be below it."""
        return getattr(self.anchor, "vocab_size", None)

    @property
    def model(self) -> nn.Module:
        """The anchor itself, whose generation config names the end tokens."""
        return self._reader.model

    @property
    def max_length(self) -> int | None:
        """Positions the anchor and the augments that share its sequence know."""
        limits = [getattr(self.anchor, "max_length", None)]
        limits += [augment.max_length for augment in self.augments if augment.shared_sequence]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    @property
    def _rotary_limits(self) -> list[int]:
        """Lengths at which the anchor, or an augment that shares its sequence, changes its rotary frequencies."""
        models = (self.anchor, *(augment for augment in self.augments if augment.shared_sequence))
        limits = {getattr(model, "max_cached_length", None) for model in models}
        return sorted(limit for limit in limits if limit is not None)

    @property
    def max_cached_length(self) -> int | None:
        """As of ``lm_core.adapters.huggingface.HuggingFaceLM``: the smallest of all models."""
        return next(iter(self._rotary_limits), None)

    @property
    def init_cache(self) -> Callable[[int, int], CALMCache]:
        """``init_cache(batch_size, max_length)``, if anchor and augments can decode incrementally."""
        if not self.decodes:
            raise AttributeError("the anchor, or an augment that shares its sequence, decodes without a cache only")
        return lambda batch_size, max_length: CALMCache(self.anchor, tuple(self.augments), batch_size, max_length)

    @property
    def output_weight(self) -> Tensor:
        """The anchor's output layer ``(v, d)``."""
        weight: Tensor = self.anchor.output_weight
        return weight

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: CALMCache | None = None,
        hidden: bool = False,
        **inputs: Tensor | None,
    ) -> Tensor:
        """Logits ``(b, n, v)``, or states ``(b, n, d)`` before the output layer.

        Args:
            ids: tokens; with a cache, the new ones.
            mask: ``(b, cached + n)``, True at real tokens, or None.
            cache: what ``init_cache`` returned.
            hidden: returns states instead of logits.
            **inputs: prompts and their masks.

        Raises:
            TypeError: a mask is not boolean, or an input has another name.
            ValueError: a shape does not fit, or a prompt is missing.
        """
        if mask is not None:
            check_mask(mask, "mask", (ids.shape[0], ids.shape[1] + (0 if cache is None else cache.length)))
        return self.read(ids, mask=mask, states=self._states(cache, inputs), cache=cache, hidden=hidden)

    @property
    def hidden(self) -> Callable[..., Tensor]:
        """``forward`` with ``hidden=True``, if the anchor gives hidden states."""
        if not hasattr(self.anchor, "hidden"):
            raise AttributeError("the anchor does not give hidden states")
        return partial(self.forward, hidden=True)

    def _states(self, cache: CALMCache | None, inputs: dict[str, Tensor | None]) -> AugmentStates | None:
        if cache is not None and cache.length > 0:
            return None
        indices = range(len(self.augments))
        known = {f"{name}_{index}" for name in ("prompt", "prompt_mask") for index in indices}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise TypeError(f"a composed model takes {sorted(known)}, got {unknown}")
        return self.read_prompts(
            [inputs.get(f"prompt_{index}") for index in indices],
            [inputs.get(f"prompt_mask_{index}") for index in indices],
        )

    # --------------------------------------------------------------------------------------------------- composition

    def read_prompts(self, prompts: Sequence[Tensor | None], masks: Sequence[Tensor | None]) -> AugmentStates:
        """Hidden states of one prompt and mask for each augment, None for those that share the sequence.

        Raises:
            ValueError: a prompt is missing, or one is given to an augment that shares the sequence.
        """
        hiddens: list[tuple[Tensor, ...]] = []
        real: list[Tensor | None] = []
        for augment, prompt, mask in zip(self.augments, prompts, masks, strict=True):
            states: tuple[tuple[Tensor, ...], Tensor | None] = ((), None)
            if augment.shared_sequence:
                if prompt is not None:
                    raise ValueError(f"{augment.name} reads the anchor's sequence: its prompt must be None")
            elif prompt is None:
                raise ValueError(f"{augment.name} reads a prompt: prompt must be given, got None")
            else:
                states = augment.read(prompt, real_tokens(prompt, mask, self.pad_id))
            hiddens.append(states[0])
            real.append(states[1])
        return AugmentStates(tuple(hiddens), tuple(real))

    def read(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None,
        states: AugmentStates | None,
        alignment: Sequence[Tensor | None] | None = None,
        cache: CALMCache | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits ``(b, n, v)`` or hidden states ``(b, n, d)`` of the anchor that reads its augments.

        Args:
            ids: tokens; with a cache, the new ones.
            mask: ``(b, cached + n)``, True at real tokens, or None.
            states: hidden states of static prompts; needed until a cache holds their keys and values.
            alignment: for each augment ``(b, n, m)``, True where an anchor position may look, or None.
            cache: what ``init_cache`` returned.
            hidden: returns states before the output layer.
        """
        alignment = [None] * len(self.augments) if alignment is None else alignment
        limits = self._rotary_limits if cache is None and mask is not None else ()
        if mask is not None and limits and ids.shape[1] > limits[0]:
            return self._read_by_rotary_limits(ids, mask, states, alignment, hidden=hidden)
        return self._read(ids, mask, states, alignment, cache, hidden=hidden)

    def _read_by_rotary_limits(
        self,
        ids: Tensor,
        mask: Tensor,
        states: AugmentStates | None,
        alignment: Sequence[Tensor | None],
        *,
        hidden: bool,
    ) -> Tensor:
        """``read`` of rows whose lengths are on the same side of every limit together, without further padding."""
        last = with_padding_last(ids.masked_fill(~mask, 0), mask)
        alignment = _in_moved_order(alignment, last.back)
        lengths = last.mask.sum(dim=1)
        kinds = lengths.unsqueeze(1) > torch.tensor(self._rotary_limits, device=ids.device)
        parts, order = [], []
        for kind in kinds.unique(dim=0):
            rows = (kinds == kind).all(dim=1).nonzero().squeeze(-1)
            longest = max(int(lengths[rows].max()), 1)
            part = self._read(
                last.ids[rows, :longest],
                last.mask[rows, :longest],
                None if states is None else states.selected(rows),
                [None if pairs is None else pairs[rows, :longest] for pairs in alignment],
                None,
                hidden=hidden,
            )
            parts.append(F.pad(part, (0, 0, 0, ids.shape[1] - longest)))
            order.append(rows)
        return moved_back(torch.cat(parts)[torch.cat(order).argsort()], last)

    def _read(
        self,
        ids: Tensor,
        mask: Tensor | None,
        states: AugmentStates | None,
        alignment: Sequence[Tensor | None],
        cache: CALMCache | None,
        *,
        hidden: bool,
    ) -> Tensor:
        moved = None
        if mask is not None and (cache is None or cache.length == 0):
            # one layout for anchor and augments: position t of one is position t of the other
            moved = (with_padding_last if cache is None else with_padding_first)(ids.masked_fill(~mask, 0), mask)
            ids, mask = moved.ids, moved.mask
            alignment = _in_moved_order(alignment, moved.back)
        readings = [self._reading(index, ids, mask, states, pairs, cache) for index, pairs in enumerate(alignment)]
        forward: Callable[..., Tensor] = self.anchor.hidden if hidden else self.anchor
        cached = {} if cache is None else {"cache": cache.anchor}
        with self._reading_anchor(readings):
            out = forward(ids, mask=mask, **cached)
        if cache is not None:
            cache.advance(ids.shape[1])
        return out if moved is None else moved_back(out, moved)

    def _reading(
        self,
        index: int,
        ids: Tensor,
        mask: Tensor | None,
        states: AugmentStates | None,
        alignment: Tensor | None,
        cache: CALMCache | None,
    ) -> Reading:
        """Augment ``index`` as the anchor reads it; a cache keeps its keys and values, or appends the new ones."""
        augment = self.augments[index]
        if augment.shared_sequence:
            augment_cache = None if cache is None else cache.augments[index]
            contexts = self._contexts(index, augment.read_on(ids, mask, augment_cache))
            if cache is not None:
                grown = cache.growing[index]
                contexts = tuple(grown.update(layer, *context) for layer, context in enumerate(contexts))
            return Reading(contexts, mask, True)
        if cache is not None and index in cache.static:
            return cache.static[index]
        if states is None:
            raise ValueError(f"{augment.name} reads a prompt: prompt must be given with the first tokens, got None")
        visible = states.masks[index]
        visible = None if visible is None else visible.to(ids.device)
        if alignment is not None:
            visible = alignment if visible is None else alignment & visible.unsqueeze(1)
        reading = Reading(self._contexts(index, states.hiddens[index]), visible, False)
        if cache is not None:
            cache.static[index] = reading
        return reading

    def _contexts(self, index: int, hiddens: Sequence[Tensor]) -> tuple[Context, ...]:
        augment, attentions = self.augments[index], self.cross_attns[index]
        of_layer = dict(zip(augment.layers, hiddens, strict=True))
        return tuple(
            attention.context(of_layer[augment_layer])
            for (augment_layer, _), attention in zip(augment.connections, attentions, strict=True)
        )

    @contextlib.contextmanager
    def _reading_anchor(self, readings: Sequence[Reading]) -> Iterator[None]:
        """Inside, each connected block of the anchor adds its cross-attention to the augments."""

        def change(block: int, hidden: Tensor) -> Tensor:
            for attention, index, place in self._reads[block]:
                context, mask, causal = readings[index].contexts[place], readings[index].mask, readings[index].causal
                hidden = attention(hidden, context=context, mask=mask, causal=causal)
            return hidden

        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled() and self.cross_attns.training:
                stack.enter_context(hooks_outside_checkpoints(self.anchor))
                if self.gradient_checkpointing:
                    stack.enter_context(checkpointing(recomputed_parts(self._reader.model, self._read_from)))
            stack.enter_context(changing(self._blocks.modules, self._blocks.positions, change, where="anchor"))
            yield


def _in_moved_order(alignment: Sequence[Tensor | None], back: Tensor) -> list[Tensor | None]:
    """Rows of ``alignment`` in the order of tokens that ``back`` puts back."""
    order = back.argsort(dim=1).unsqueeze(-1)
    return [None if pairs is None else pairs.gather(1, order.expand(-1, -1, pairs.shape[-1])) for pairs in alignment]
