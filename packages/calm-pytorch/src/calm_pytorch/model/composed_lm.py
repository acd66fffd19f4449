"""A CALM as a ``lm_core.CausalLM``: one forward of the anchor with the augments read into it.

An augment's states are turned into keys and values once. While tokens are decoded, those of a static prompt stay as
they are, and those of a shared sequence grow by the new tokens, which the augment reads on from its own cache.

Legend: b batch, n new tokens, m augment positions, v vocabulary, d feature.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calm_pytorch.model.cross_attention import Context, OneRow
from calm_pytorch.model.decoder_stack import PlainDecoderLM
from calm_pytorch.model.hooks import Change, changing, checkpointing, hooks_outside_checkpoints
from lm_core.adapters.padding import moved_back, with_padding_first, with_padding_last
from lm_core.nn.kv_cache import KVCache


@dataclass(frozen=True)
class AnchorStart:
    """What the anchor makes of tokens up to the first layer that reads.

    Attributes:
        ids: the tokens ``(b, n)``, 0 at padding.
        hidden: states ``(b, n, d)`` behind that layer, before anything is read; whatever they are at padding.
    """

    ids: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class AugmentStates:
    """Hidden states of prompts, as ``CALM.augment_states`` reads them; ``CALM.forward`` takes them instead of prompts.

    Attributes:
        hiddens: for each augment, one ``(b, m, c)`` for each layer that is read; none for a shared sequence.
        masks: for each augment ``(b, m)``, True at real positions, or None.
        anchor: where the anchor may begin, or None. Of no effect with other tokens, or padding that does not come last.
    """

    hiddens: tuple[tuple[Tensor, ...], ...]
    masks: tuple[Tensor | None, ...]
    anchor: AnchorStart | None = None


@dataclass(frozen=True)
class Reading:
    """What the anchor sees of one augment in one forward: a context for each connection, and who may look where."""

    contexts: tuple[Context, ...]
    mask: Tensor | None
    causal: bool


class CALMCache:
    """The anchor's cache, and for each augment the keys and values the anchor reads.

    Attributes:
        length: positions of the anchor held.
        batch_size: rows held.
    """

    def __init__(self, calm: Any, batch_size: int, max_length: int) -> None:
        self.batch_size, self.length, self.max_length = batch_size, 0, max_length
        self.anchor = calm.anchor.init_cache(batch_size, max_length)
        self.augments = [a.init_cache(batch_size, max_length) if a.shared_sequence else None for a in calm.augments]
        self.static: list[Reading | None] = [None for _ in calm.augments]
        # for single tokens, found with the first one
        self.one_rows: list[list[OneRow | None]] | None = None
        self.changes: dict[int, Change] | None = None
        self.growing = [
            KVCache(layers=len(a.connections), batch_size=batch_size, max_length=max_length)
            if a.shared_sequence
            else None
            for a in calm.augments
        ]

    def reorder(self, index: Tensor) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        for cache in (self.anchor, *self.augments, *self.growing):
            if cache is not None:
                cache.reorder(index)
        for number, reading in enumerate(self.static):
            if reading is not None:
                contexts = tuple((k.index_select(0, index), v.index_select(0, index)) for k, v in reading.contexts)
                mask = None if reading.mask is None else reading.mask.index_select(0, index)
                self.static[number] = Reading(contexts, mask, reading.causal)
        self.batch_size, self.one_rows, self.changes = index.shape[0], None, None


def compose(
    calm: Any,
    ids: Tensor,
    *,
    mask: Tensor | None,
    states: AugmentStates | None,
    alignment: Sequence[Tensor | None] = (),
    cache: CALMCache | None = None,
    hidden: bool = False,
    anchor_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Logits ``(b, n, v)`` or hidden states ``(b, n, d)`` of the anchor that reads its augments.

    Args:
        calm: the model.
        ids: tokens; with a cache, the new ones.
        mask: ``(b, cached + n)``, True at real tokens, or None.
        states: of static prompts; only needed until a cache holds them.
        alignment: for each augment ``(b, n, m)``, True where an anchor position may look, or None.
        cache: of ``ComposedLM.init_cache``.
        hidden: gives states before the output layer.
        anchor_kwargs: for the anchor.
    """
    if cache is not None and hidden and mask is None and not anchor_kwargs:
        next_one = _like_the_last(calm, ids, cache)
        if next_one is not None:
            return next_one
    moved = None
    n = ids.shape[1]
    if mask is not None and (cache is None or cache.length == 0):
        # one layout for anchor and augments: position t of one is position t of the other
        moved = (with_padding_last if cache is None else with_padding_first)(ids.masked_fill(~mask, 0), mask)
        ids, mask = moved.ids, moved.mask
        order = moved.back.argsort(dim=1)
        alignment = [None if pairs is None else _rows_in_order(pairs, order) for pairs in alignment]
    readings = [
        _reading(calm, number, ids, mask, states, alignment[number] if alignment else None, cache)
        for number in range(len(calm.augments))
    ]
    kwargs: dict[str, Any] = {"mask": mask, **(anchor_kwargs or {})}
    if cache is not None:
        kwargs["cache"] = cache.anchor
    one_rows, learns = None, calm.training or torch.is_grad_enabled()
    if cache is not None and cache.length > 0 and ids.numel() == 1 and not learns and not _rounds(ids.device):
        cache.one_rows = one_rows = cache.one_rows or _one_rows(calm, readings)
    if hidden and cache is not None and mask is None and _takes_changes(calm, ids, cache.anchor):
        changes = _changes(calm, readings, one_rows)
        if one_rows is not None and not any(reading.causal for reading in readings):
            cache.changes = changes  # what is read stays the same
        out = calm.anchor.hidden(ids, changes=changes, **kwargs)
    elif hidden and cache is None and not anchor_kwargs and (begun := _known(calm, ids, states)) is not None:
        first, changes = calm.anchor_layers[0], _changes(calm, readings)
        out = calm.anchor.stack.hidden_from(changes[first - 1](begun), first, changes)
    else:
        forward: Callable[..., Tensor] = calm.anchor.hidden if hidden else calm.anchor
        with reading_anchor(calm, readings, one_rows):
            out = forward(ids, **kwargs)
    if cache is not None:
        for growing in cache.growing:
            if growing is not None:
                growing.advance(n)
        cache.length += n
    return out if moved is None else moved_back(out, moved)


def _like_the_last(calm: Any, ids: Tensor, cache: CALMCache) -> Tensor | None:
    """States of a token that is read as the one before it was; None where there was none, or something has changed."""
    if cache.changes is None or calm.training or _rounds(ids.device) or not _takes_changes(calm, ids, cache.anchor):
        return None
    out: Tensor = calm.anchor.next_hidden(ids, cache.anchor, cache.changes)
    cache.length += 1
    return out


def _rounds(device: torch.device) -> bool:
    """Whether autocast is on, in which the sums of single tokens would be rounded."""
    return torch.is_autocast_enabled(device.type)


def _is_direct(calm: Any) -> bool:
    """Whether the anchor can read its augments without hooks on its blocks."""
    return isinstance(calm.anchor, PlainDecoderLM) and all(position == "output" for position in calm.anchor_positions)


def _takes_changes(calm: Any, ids: Tensor, cache: Any) -> bool:
    """Whether the anchor reads its augments in this call without hooks on its blocks."""
    return _is_direct(calm) and calm.anchor.takes_changes(ids, cache, calm.anchor_blocks)


def anchor_start(calm: Any, ids: Tensor) -> AnchorStart | None:
    """Where the anchor may begin with tokens whose padding comes last; None where it has to run as a whole."""
    first = calm.anchor_layers[0]
    if not _is_direct(calm) or not calm.anchor.begins_behind(first, calm.anchor_blocks):
        return None
    with torch.no_grad():
        return AnchorStart(ids, calm.anchor.stack.behind(ids, first))


def _known(calm: Any, ids: Tensor, states: AugmentStates | None) -> Tensor | None:
    """What the anchor makes of these tokens up to the first layer that reads, if states hold it."""
    start = None if states is None else states.anchor
    if start is None or (calm.gradient_checkpointing and torch.is_grad_enabled()):
        return None
    same = start.ids.shape == ids.shape and torch.equal(start.ids, ids)
    begins = same and _is_direct(calm) and calm.anchor.begins_behind(calm.anchor_layers[0], calm.anchor_blocks)
    return start.hidden if begins else None


def _changes(calm: Any, readings: Sequence[Reading], one_rows: Any = None) -> dict[int, Change]:
    """For each connected layer of the anchor, counted from 0, what its output becomes."""
    steps: dict[int, list[Change]] = {layer: [] for layer in calm.anchor_layers}
    for number, reading in enumerate(readings):
        attentions = calm.cross_attns[number]
        rows = [None] * len(attentions) if one_rows is None else one_rows[number]
        connections = calm.augments[number].connections
        for (_, layer), attention, context, row in zip(connections, attentions, reading.contexts, rows, strict=True):
            settings = {"context": context, "mask": reading.mask, "causal": reading.causal}
            settings |= {} if row is None else {"one_row": row}
            steps[layer].append(partial(attention.attend_to, **settings))
    return {layer - 1: one[0] if len(one) == 1 else partial(_in_turn, one) for layer, one in steps.items()}


@contextlib.contextmanager
def reading_anchor(calm: Any, readings: Sequence[Reading], one_rows: Any = None) -> Iterator[None]:
    """Inside, each connected block of the anchor adds what it reads of the augments."""
    changes = list(_changes(calm, readings, one_rows).values())
    blocks = [calm.anchor_blocks[layer - 1] for layer in calm.anchor_layers]
    positions = [calm.anchor_positions[layer - 1] for layer in calm.anchor_layers]
    with contextlib.ExitStack() as stack:
        if torch.is_grad_enabled() and calm.training:
            stack.enter_context(hooks_outside_checkpoints(calm.anchor_llm))
            if calm.gradient_checkpointing:
                stack.enter_context(checkpointing(calm.recomputed_parts()))
        stack.enter_context(changing(blocks, positions, changes, where="anchor"))
        yield


def _in_turn(steps: Sequence[Change], hidden: Tensor) -> Tensor:
    for step in steps:
        hidden = step(hidden)
    return hidden


def _reading(
    calm: Any,
    number: int,
    ids: Tensor,
    mask: Tensor | None,
    states: AugmentStates | None,
    alignment: Tensor | None,
    cache: CALMCache | None,
) -> Reading:
    augment, attentions = calm.augments[number], calm.cross_attns[number]
    if not augment.shared_sequence:
        held = None if cache is None else cache.static[number]
        if held is not None:
            return held
        if states is None:
            raise ValueError(f"{augment.name} reads a prompt: prompt must be given with the first tokens, got None")
        reading = Reading(_contexts(augment, attentions, states.hiddens[number]), states.masks[number], False)
        if alignment is not None:
            pairs = alignment if reading.mask is None else alignment & reading.mask.unsqueeze(1)
            reading = Reading(reading.contexts, pairs, False)
        if cache is not None:
            cache.static[number] = reading
        return reading
    hiddens = augment.read_on(ids, mask, None if cache is None else cache.augments[number])
    contexts = _contexts(augment, attentions, hiddens)
    if cache is not None:
        growing = cache.growing[number]
        assert growing is not None
        contexts = tuple(growing.update(place, *context) for place, context in enumerate(contexts))
    return Reading(contexts, mask, True)


def _contexts(augment: Any, attentions: Any, hiddens: Sequence[Tensor]) -> tuple[Context, ...]:
    of_layer = dict(zip(augment.layers, hiddens, strict=True))
    return tuple(
        attention.context(of_layer[augment_layer])
        for (augment_layer, _), attention in zip(augment.connections, attentions, strict=True)
    )


def _one_rows(calm: Any, readings: Sequence[Reading]) -> list[list[OneRow | None]]:
    """For each connection what single tokens are multiplied with; contexts that tokens extend are left as they are."""
    return [
        [
            attention.one_row(None if reading.causal else context)
            for attention, context in zip(attentions, reading.contexts, strict=True)
        ]
        for attentions, reading in zip(calm.cross_attns, readings, strict=True)
    ]


def _rows_in_order(pairs: Tensor, order: Tensor) -> Tensor:
    return pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, pairs.shape[-1]))


class ComposedLM(nn.Module):
    """What ``lm_core.generate`` and other consumers of causal language models take; shares all weights with the CALM.

    Further arguments of a call: ``prompt_0``, ``prompt_mask_0``, ``prompt_1``, ... for the augments that read a prompt,
    counted from 0 among all augments. With a cache they are needed with the first tokens only.

    Args:
        calm: the composed model.
    """

    def __init__(self, calm: Any) -> None:
        super().__init__()
        self.calm = calm

    @property
    def vocab_size(self) -> int | None:
        """Ids must be below it."""
        return getattr(self.calm.anchor, "vocab_size", None)

    @property
    def max_length(self) -> int | None:
        """Positions the anchor and the augments that share its sequence know."""
        limits = [getattr(self.calm.anchor, "max_length", None)]
        limits += [a.max_length for a in self.calm.augments if a.shared_sequence]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def forward(
        self, ids: Tensor, *, mask: Tensor | None = None, cache: CALMCache | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """Logits ``(b, n, v)``."""
        return self._run(ids, mask, cache, inputs, hidden=False)

    @property
    def init_cache(self) -> Callable[[int, int], CALMCache]:
        """``init_cache(batch_size, max_length)``, if anchor and augments can decode incrementally."""
        if not self.calm.can_decode:
            raise AttributeError("the anchor, or an augment that shares its sequence, decodes without a cache only")
        return partial(CALMCache, self.calm)

    @property
    def hidden(self) -> Callable[..., Tensor]:
        """States ``(b, n, d)`` before the output layer; arguments as of ``forward``."""
        if not hasattr(self.calm.anchor, "hidden"):
            raise AttributeError("the anchor does not give hidden states")
        return self._hidden

    @property
    def output_weight(self) -> Tensor:
        """The anchor's output layer ``(v, d)``."""
        weight: Tensor = self.calm.anchor.output_weight
        return weight

    def _hidden(
        self, ids: Tensor, *, mask: Tensor | None = None, cache: CALMCache | None = None, **inputs: Tensor | None
    ) -> Tensor:
        return self._run(ids, mask, cache, inputs, hidden=True)

    def _run(self, ids: Tensor, mask: Tensor | None, cache: Any, inputs: dict[str, Any], *, hidden: bool) -> Tensor:
        states = None
        if cache is None or cache.length == 0:
            numbers = range(len(self.calm.augments))
            known = {f"{name}_{number}" for name in ("prompt", "prompt_mask") for number in numbers}
            unknown = sorted(set(inputs) - known)
            if unknown:
                raise TypeError(f"a composed model takes {sorted(known)}, got {unknown}")
            states = self.calm.read_prompts(
                [inputs.get(f"prompt_{number}") for number in numbers],
                [inputs.get(f"prompt_mask_{number}") for number in numbers],
            )
        return compose(self.calm, ids, mask=mask, states=states, cache=cache, hidden=hidden)
