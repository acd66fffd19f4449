"""x-transformers decoders of the plain kind, with the work of a layer and little beside it.

The library decides anew in every layer and for every token which of its many options are on. For one new token that
costs several times what the layer itself does. Here a decoder that has none of the options is run directly: the same
weights and the same modules for embeddings, feedforwards and residual sums (so hooks on these, which is where layers
end, are called), with normalisation, projections and attention written out, and keys and values in one buffer.

Whether a decoder is plain is found in ``plain_decoders``. Logits of whole sequences always come from the library's own
code, so that a composition begins bit for bit as its anchor; hidden states here differ from it by rounding.

Legend: b batch, n new tokens, m cached and new tokens, h heads, e features of a head, d feature.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calm_pytorch.model.hooks import Change, is_heard, is_recomputed
from calm_pytorch.model.plain_decoders import is_plain
from calm_pytorch.model.token_step import LayerWeights, gain_of, joined, layer_weights, normed, token_step
from lm_core.adapters import as_causal_lm
from lm_core.adapters.x_transformers import XTransformersCache, XTransformersLM
from lm_core.nn.attention import attend
from lm_core.nn.kv_cache import KVCache


class Layer(NamedTuple):
    """Attention and feedforward with their norms and residual sums."""

    attention_norm: Any
    attention: Any
    attention_sum: nn.Module
    feedforward_norm: Any
    feedforward: nn.Module
    feedforward_sum: nn.Module
    feedforward_parts: tuple[nn.Module, ...]


class DecoderStack:
    """A plain decoder.

    Args:
        net: a ``TransformerWrapper`` that ``is_plain``.
    """

    def __init__(self, net: Any) -> None:
        entries = [(norms[0], block, total) for norms, block, total in net.attn_layers.layers]
        self.net = net
        self.layers = [
            Layer(*one, *two, _parts_in_a_row(two[1].ff)) for one, two in zip(entries[::2], entries[1::2], strict=True)
        ]
        self._position_table: Any = net.pos_emb if isinstance(net.pos_emb, nn.Module) else None
        ends = [net.token_emb, net.emb_dropout, net.post_emb_norm, net.project_emb, net.pos_emb]
        ends += [net.attn_layers.final_norm]
        self._ends = [part for module in ends if isinstance(module, nn.Module) for part in module.modules()]
        called: list[Any] = [*self._ends, net.attn_layers.rotary_pos_emb]
        called += [part for layer in self.layers for part in (layer.attention_sum, layer.feedforward_sum)]
        called += [part for layer in self.layers for part in layer.feedforward_parts]
        inside = {id(part) for module in called if isinstance(module, nn.Module) for part in module.modules()}
        # what is not called as a module, so that hooks on it would be passed by
        passed_by = [module for module in net.modules() if id(module) not in inside]
        self._hooks = [
            hooks for m in passed_by for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self._passed_by = [(vars(module), module) for module in passed_by]
        self._places = [module._modules for module in net.modules()]
        self._parts = [list(places.values()) for places in self._places]

    def is_untouched(self) -> bool:
        """Whether all parts are the ones that were there (adapters put others in their places), and none is heard."""
        # a module equals only itself
        return [list(places.values()) for places in self._places] == self._parts and not self.is_heard()

    def is_heard(self) -> bool:
        """Whether something is attached to parts that are not called; gradient checkpointing does not count."""
        return any(self._hooks) or any(
            "forward" in names and not is_recomputed(module) for names, module in self._passed_by
        )

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        weights: Sequence[LayerWeights] | None = None,
        changes: Mapping[int, Change] | None = None,
    ) -> Tensor:
        """States ``(b, n, d)`` before the output layer.

        Args:
            ids: tokens; with a cache, the new ones.
            mask: ``(b, m)``, True at real tokens, padding first; None without padding, or where it comes last.
            cache: grows by the new tokens. It holds keys and values in one, ``(b, 2 g, m, e)``; the keys are not
                rotated, as in the library's own.
            weights: of ``token_step.layer_weights``, for the layers.
            changes: see ``token_step.token_step``, where that is what runs.
        """
        net, stack = self.net, self.net.attn_layers
        start = 0 if cache is None else cache.length
        total = start + ids.shape[1]
        quiet = mask is None and not net.training and not torch.is_grad_enabled()
        single = quiet and cache is not None and weights is not None and ids.shape[1] == 1
        bare = single and not any(is_heard(part) for part in self._ends)
        x = self._embedded_token(ids, start) if bare else self._embedded(ids, mask, start, total)
        angles = self._angles(total, ids.device)
        if single and cache is not None and weights is not None:
            x = token_step(self.layers, weights, x, cache, angles, changes or {})
            cache.advance(1)
            return normed(stack.final_norm, gain_of(stack.final_norm) if bare else None, x)
        for number, layer in enumerate(self.layers):
            weight = None if weights is None else weights[number].projections
            x = _layer(layer, number, x, angles=angles, weight=weight, mask=mask, cache=cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        out: Tensor = stack.final_norm(x)
        return out

    def behind(self, ids: Tensor, count: int) -> Tensor:
        """States ``(b, n, d)`` behind the first ``count`` layers, of tokens whose padding comes last."""
        n = ids.shape[1]
        x, angles = self._embedded(ids, None, 0, n), self._angles(n, ids.device)
        for number, layer in enumerate(self.layers[:count]):
            x = _layer(layer, number, x, angles=angles)
        return x

    def hidden_from(self, x: Tensor, count: int, changes: Mapping[int, Change]) -> Tensor:
        """``hidden`` from states ``behind`` the first ``count`` layers on.

        Args:
            x: states ``(b, n, d)``, with what is added there.
            count: layers that are not run.
            changes: of a layer, counted from 0, what becomes of its output.
        """
        angles = self._angles(x.shape[1], x.device)
        for number in range(count, len(self.layers)):
            x = _layer(self.layers[number], number, x, angles=angles)
            if number in changes:
                x = changes[number](x)
        out: Tensor = self.net.attn_layers.final_norm(x)
        return out

    def is_fixed(self, count: int) -> bool:
        """Whether the first ``count`` layers make the same of the same tokens each time, and nobody listens to them."""
        if not self.is_untouched():
            return False
        parts, attentions = list(self._ends), []
        for layer in self.layers[:count]:
            parts += [layer.attention_sum, layer.feedforward_sum, *layer.feedforward_parts]
            attentions.append(layer.attention.attend.attn_dropout)
        dropouts = [part for part in (*parts, *attentions) if isinstance(part, nn.Dropout)]
        return not any(map(is_heard, parts)) and not any(part.training and part.p > 0 for part in dropouts)

    def _angles(self, total: int, device: torch.device) -> Tensor | None:
        rotary = self.net.attn_layers.rotary_pos_emb
        if rotary is None:
            return None
        angles: Tensor = rotary(torch.arange(total, device=device))[0]
        return angles

    def _embedded(self, ids: Tensor, mask: Tensor | None, start: int, total: int) -> Tensor:
        """What goes into the first layer, of positions ``start`` to ``total``."""
        net = self.net
        x = net.token_emb(ids)
        if self._position_table is not None:
            # of each row, the first real token; a row without any starts at its end
            first = None if mask is None else torch.where(mask.any(dim=1), mask.int().argmax(dim=1), mask.shape[1])
            x = x + net.pos_emb(ids, pos=torch.arange(start, total, device=ids.device), seq_start_pos=first)
        embedded: Tensor = net.project_emb(net.emb_dropout(net.post_emb_norm(x)))
        return embedded

    def _embedded_token(self, ids: Tensor, position: int) -> Tensor:
        """``_embedded`` of a plain decoder's single tokens in evaluation mode, without the modules' calls."""
        x, table = F.embedding(ids, self.net.token_emb.emb.weight), self._position_table
        return x if table is None else torch.add(x, table.emb.weight[position], alpha=table.scale)


def _layer(layer: Layer, number: int, x: Tensor, **how: Any) -> Tensor:
    """What a layer makes of ``x``; ``how`` is what ``_attention`` takes beside these."""
    if is_recomputed(layer.attention):
        read = checkpoint(_attention, layer, number, x, use_reentrant=False, **how)
    else:
        read = _attention(layer, number, x, **how)
    x = layer.attention_sum(read, x)
    if is_recomputed(layer.feedforward):
        return layer.feedforward_sum(checkpoint(_feedforward, layer, x, use_reentrant=False), x)
    return layer.feedforward_sum(_feedforward(layer, x), x)


def _attention(
    layer: Layer,
    number: int,
    x: Tensor,
    *,
    angles: Tensor | None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    part = layer.attention
    b, n, _ = x.shape
    h, g = part.heads, part.kv_heads
    before = normed(layer.attention_norm, gain_of(layer.attention_norm), x)
    projected = F.linear(before, joined(part) if weight is None else weight)
    if cache is None:
        # split where the projection joined them: their gradients are put side by side, not padded and summed
        width = projected.shape[-1] // (h + 2 * g)
        parts = projected.split((h * width, g * width, g * width), dim=-1)
        q, k, v = (one.view(b, n, -1, width).transpose(1, 2) for one in parts)
    else:
        heads = projected.view(b, n, h + 2 * g, -1).transpose(1, 2)
        held = cache.append(number, heads[:, h:])
        q, k, v = heads[:, :h], held[:, :g], held[:, g:]
    if angles is not None:
        from x_transformers.x_transformers import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, angles), apply_rotary_pos_emb(k, angles)
    dropout = part.attend.attn_dropout.p if part.training else 0.0
    read = attend(q, k, v, mask=mask, causal=True, dropout=dropout, scale=part.attend.scale)
    return F.linear(read.transpose(1, 2).reshape(b, n, -1), part.to_out.weight)


def _feedforward(layer: Layer, x: Tensor) -> Tensor:
    x = normed(layer.feedforward_norm, gain_of(layer.feedforward_norm), x)
    for part in layer.feedforward_parts:
        x = part(x)
    return x


def _parts_in_a_row(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules a container calls one after the other, without the containers."""
    if type(module).__name__ != "Sequential":
        return (module,)
    return tuple(part for child in module.children() for part in _parts_in_a_row(child))


# ------------------------------------------------------------------------------------------------------- the adapter


class StackCache(XTransformersCache):
    """A cache of the library that keeps its keys and values in one buffer while a ``DecoderStack`` runs."""

    def __init__(self, batch_size: int, max_length: int = 1) -> None:
        super().__init__(batch_size)
        self.max_length = max_length
        self.buffer: KVCache | None = None
        self.weights: list[LayerWeights] | None = None

    def to_buffer(self, stack: DecoderStack) -> KVCache:
        """The buffer, filled with what the library has kept."""
        if self.buffer is None:
            self.weights = layer_weights(stack.layers)
            self.buffer = KVCache(
                layers=len(stack.layers), batch_size=self.batch_size, max_length=max(self.max_length, 1)
            )
            for number, (keys, values) in enumerate(self.layers):
                assert keys is not None
                assert values is not None
                self.buffer.append(number, torch.cat((keys, values), dim=1))
            self.buffer.advance(self.length)
            self.layers = []
        return self.buffer

    def to_layers(self, stack: DecoderStack) -> None:
        """Gives the library what the buffer has kept."""
        if self.buffer is not None and self.buffer.length > 0:
            part = stack.layers[0].attention
            sizes = (self.batch_size, 2 * part.kv_heads, 0, part.to_k.out_features // part.kv_heads)
            nothing = part.to_k.weight.new_empty(sizes)
            held = (self.buffer.append(number, nothing) for number in range(self.buffer.layers))
            self.layers = [(one[:, : part.kv_heads], one[:, part.kv_heads :]) for one in held]
        self.buffer = self.weights = None

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        if self.buffer is not None:
            self.buffer.reorder(index)

    def _clone(self) -> "StackCache":
        twin = StackCache(self.batch_size, self.max_length)
        twin.ids, twin.layers = self.ids, list(self.layers)
        twin.buffer, twin.weights = None if self.buffer is None else self.buffer.clone(), self.weights
        return twin


class PlainDecoderLM(XTransformersLM):
    """An x-transformers decoder that runs as a ``DecoderStack`` wherever it may.

    Args:
        model: a ``TransformerWrapper`` that ``is_plain``.
    """

    _cache_type = StackCache

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # in a tuple, so that nothing of the model is registered a second time
        self._stack = (DecoderStack(model),)

    @property
    def stack(self) -> DecoderStack:
        """What runs."""
        return self._stack[0]

    def _init_cache(self, batch_size: int, max_length: int) -> StackCache:
        super()._init_cache(batch_size, max_length)
        return StackCache(batch_size, max_length)

    def takes_changes(self, ids: Tensor, cache: Any, blocks: Sequence[nn.Module]) -> bool:
        """Whether ``hidden(ids, cache=cache, changes=...)`` changes the outputs of ``blocks`` itself, without hooks.

        So it is for single tokens without padding or gradients, if the blocks are the ends of the layers.
        """
        single = ids.shape[1] == 1 and cache.length > 0 and cache.mask is None and cache.weights is not None
        return (
            single
            and not torch.is_grad_enabled()
            and not self.model.training
            and self._ends_layers(blocks)
            and not self.stack.is_heard()  # that no part was replaced was seen when the weights were copied
        )

    def begins_behind(self, count: int, blocks: Sequence[nn.Module]) -> bool:
        """Whether states behind the first ``count`` layers stay the same, and the others can be run from there on.

        So it is if nothing is dropped or heard up to there, and ``blocks`` are the ends of the layers.
        """
        return self._ends_layers(blocks) and self.stack.is_fixed(count)

    def _ends_layers(self, blocks: Sequence[nn.Module]) -> bool:
        return all(block is layer.feedforward_sum for block, layer in zip(blocks, self.stack.layers, strict=False))

    def next_hidden(self, ids: Tensor, cache: StackCache, changes: Mapping[int, Change]) -> Tensor:
        """``hidden(ids, cache=cache, changes=changes)`` of tokens for which ``takes_changes`` holds."""
        ids, _ = self._checked(ids, None, cache)
        out = self._incremental(ids, None, cache, {"changes": changes}, hidden=True)
        cache.length += ids.shape[1]
        return out

    def _whole(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], *, hidden: bool) -> Tensor:
        if hidden and not kwargs and self.stack.is_untouched():
            return self.stack.hidden(ids)
        return super()._whole(ids, mask, kwargs, hidden=hidden)

    def _incremental(
        self, ids: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any], *, hidden: bool
    ) -> Tensor:
        changes = kwargs.get("changes")
        if changes is not None or (hidden and not kwargs and self.stack.is_untouched()):
            cache.ids = ids if cache.ids is None else torch.cat((cache.ids, ids), dim=1)
            return self.stack.hidden(ids, mask, cache.to_buffer(self.stack), cache.weights, changes)
        cache.to_layers(self.stack)
        return super()._incremental(ids, mask, cache, kwargs, hidden=hidden)


def as_fast_causal_lm(model: Any) -> Any:
    """``lm_core.adapters.as_causal_lm``, but for plain x-transformers decoders a ``PlainDecoderLM``."""
    adapted = as_causal_lm(model)
    if type(adapted) is XTransformersLM and adapted._offers_hidden and is_plain(adapted.model):
        return PlainDecoderLM(adapted.model)
    return adapted
