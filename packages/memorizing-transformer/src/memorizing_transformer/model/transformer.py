"""Memorizing Transformer (arXiv 2203.08913) with Transformer-XL memories (arXiv 1901.02860).

Pre-norm blocks of causal attention and a GELU feed-forward; some attentions also search a memory. T5 relative bias on
local attention. The output layer is not tied and has a bias, which ``hidden`` carries as a last feature of ones.

Shifting (ERNIE-Doc, arXiv 2012.15688, equation 3: a layer reads what the SAME layer gave out, not what it took in):
with a shift of s, the i-th layer that has a window (a memory) reads that of the (i + s)-th, or of the last; each adds
to its own.

Segments are read in ``segment_reading``, new tokens behind a cache in ``cached_reading``, both through one loop in
``layers``.

Legend: b batch, n sequence, d feature, v vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_positive, check_probability, typed
from lm_core.generation.decoding import prompt_rows
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k
from lm_core.losses.losses import linear_cross_entropy
from lm_core.nn.masking import maybe_and_mask
from memorizing_transformer.memory.knn_memory import Backend
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.memory.memory_making import MakesMemories
from memorizing_transformer.memory.ring_storage import StorageFormat
from memorizing_transformer.model.cached_reading import CachedReader
from memorizing_transformer.model.generation_cache import MemoryCache, kept_of
from memorizing_transformer.model.knn_attention import Gate, KNNAttention
from memorizing_transformer.model.layers import Layers
from memorizing_transformer.model.model_checks import (
    check_inputs,
    check_labels,
    check_memories,
    check_token,
    layer_numbers,
    whole_number,
)
from memorizing_transformer.model.segment_reading import read_segment
from memorizing_transformer.model.xl_memories import XLMemories, check_window


class MemorizingTransformer(MakesMemories, PretrainedMixin):
    """A causal language model with a kNN memory.

    Args:
        num_tokens: vocabulary size.
        dim: features of the residual stream.
        depth: layers.
        dim_head: features of a head.
        heads: query heads.
        knn_attn_heads: query heads of memorizing layers; ``heads`` by default.
        attn_dropout: on attention weights.
        ff_mult: feed-forward inner features over ``dim``.
        ff_dropout: on them.
        memorizing_layers: layers with a memory, counted from 1; the middle one by default.
        max_knn_memories: tokens a row's memory holds.
        num_retrieved_memories: memories that each query of each head retrieves.
        clear_memories_on_sos_token_id: this token begins a document.
        clear_memories_on_eos_token_id: this token ends one.
        knn_memories_directory: keeps memories in memory-mapped files there; None keeps them on the model's device.
        shift_knn_memories_down: see the module.
        pad_id: a token that is padding, neither seen nor predicted; None for none.
        xl_max_memories: tokens of the XL window; 0 for none.
        xl_memory_layers: layers with an XL window, counted from 1; all by default.
        shift_xl_memories_down: see the module.
        knn_memory_multiprocessing: accepted for compatibility, without effect.
        gate: "softmax" over local and retrieved keys together, or the paper's "sigmoid".
        gate_output: memorizing layers keep their plain attention, and one to the memory is put behind it, through a
            tanh gate that begins at 0: for retrofitting (see ``retrofit``).
        multi_head_keys: keys and values of their own for each head, not one for all.
        knn_backend: "exact" search, or "faiss".
        knn_storage: number format of the memory.
        knn_index: factory string of faiss.
        segment_length: tokens between two times that the memory grows in generation; for training, however many are
            passed.
        cross_entropy_ignore_index: label that does not count in the loss.

    Raises:
        ValueError: a size below 1, a layer that does not exist, or an option out of range; it is named.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        knn_attn_heads: int | None = None,
        attn_dropout: float = 0.0,
        ff_mult: int = 4,
        ff_dropout: float = 0.0,
        memorizing_layers: int | Sequence[int] | None = None,
        max_knn_memories: int = 250_000,
        num_retrieved_memories: int = 32,
        clear_memories_on_sos_token_id: int | None = None,
        clear_memories_on_eos_token_id: int | None = None,
        knn_memories_directory: str | Path | None = None,
        shift_knn_memories_down: int | float = 0,
        pad_id: int | None = None,
        xl_max_memories: int = 0,
        xl_memory_layers: int | Sequence[int] | None = None,
        shift_xl_memories_down: int | float = 0,
        knn_memory_multiprocessing: bool = False,
        gate: Gate = "softmax",
        gate_output: bool = False,
        multi_head_keys: bool = False,
        knn_backend: Backend = "exact",
        knn_storage: StorageFormat = "float32",
        knn_index: str = "Flat",
        segment_length: int = 512,
        cross_entropy_ignore_index: int = -100,
    ) -> None:
        super().__init__()
        knn_heads = heads if knn_attn_heads is None else knn_attn_heads
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "dim_head": dim_head, "heads": heads}
        sizes |= {"knn_attn_heads": knn_heads, "ff_mult": ff_mult, "max_knn_memories": max_knn_memories}
        sizes |= {"num_retrieved_memories": num_retrieved_memories, "segment_length": segment_length}
        for name, value in sizes.items():
            check_positive(value, name)
        check_probability(attn_dropout, "attn_dropout")
        check_probability(ff_dropout, "ff_dropout")
        self.shift_xl = whole_number(shift_xl_memories_down, "shift_xl_memories_down")
        self.xl_max_memories = whole_number(xl_max_memories, "xl_max_memories")
        check_token(clear_memories_on_sos_token_id, num_tokens, "clear_memories_on_sos_token_id")
        check_token(clear_memories_on_eos_token_id, num_tokens, "clear_memories_on_eos_token_id")
        check_token(pad_id, num_tokens, "pad_id")
        middle = (max(1, depth // 2),)
        self.memorizing_layers = layer_numbers(memorizing_layers, depth, "memorizing_layers", default=middle)
        every = tuple(range(1, depth + 1)) if self.xl_max_memories else ()
        self.xl_memory_layers = layer_numbers(xl_memory_layers, depth, "xl_memory_layers", default=every)
        if not self.xl_max_memories:
            self.xl_memory_layers = ()
        self.num_tokens, self.dim, self.depth, self.dim_head, self.heads = num_tokens, dim, depth, dim_head, heads
        self.max_knn_memories, self.segment_length, self.pad_id = max_knn_memories, segment_length, pad_id
        self.sos_id, self.eos_id = clear_memories_on_sos_token_id, clear_memories_on_eos_token_id
        self.knn_memories_directory = knn_memories_directory
        self.cross_entropy_ignore_index = cross_entropy_ignore_index
        self.memory_settings: dict[str, Any] = {
            "dim": dim_head,
            "max_memories": max_knn_memories,
            "multiprocessing": knn_memory_multiprocessing,
            "backend": knn_backend,
            "storage": knn_storage,
            "index": knn_index,
            "heads": knn_heads if multi_head_keys else 1,
        }

        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        shared = {"dim_head": dim_head, "dropout": attn_dropout, "multi_head_keys": multi_head_keys}
        self.layers = Layers(
            dim=dim,
            depth=depth,
            memorizing_layers=self.memorizing_layers,
            xl_memory_layers=self.xl_memory_layers,
            shift_knn=whole_number(shift_knn_memories_down, "shift_knn_memories_down"),
            plain={"heads": heads, **shared},
            memorizing={
                "heads": knn_heads,
                "num_retrieved_memories": num_retrieved_memories,
                "gate_output": gate_output,
                "gate": gate,
                **shared,
            },
            feed_forward={"mult": ff_mult, "dropout": ff_dropout},
        )
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    # ---------------------------------------------------------------------------------------------------- structure

    @property
    def output_weight(self) -> Float[Tensor, "v d1"]:
        """The output layer's weight with its bias as the last column; ``hidden`` has a one there."""
        return torch.cat((self.to_logits.weight, self.to_logits.bias.unsqueeze(1)), dim=1)

    def memory_attentions(self) -> list[KNNAttention]:
        """Those that search a memory."""
        return [one.inner for one in self.layers.attentions() if isinstance(one.inner, KNNAttention)]

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        x: Int[Tensor, "b n"],
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        add_knn_memory: bool = True,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: MemoryCache | None = None,
        *,
        loss_normalizer: float | Tensor | None = None,
    ) -> Any:
        """Logits ``(b, n, v)``, or with labels the mean loss in nats; with XL memories also the new ones.

        Args:
            x: token ids of one segment.
            knn_memories: of ``create_knn_memories``; searched, and then added to. None attends locally alone.
            xl_memories: what the call before returned.
            labels: what each position should predict, ALIGNED with ``x``: nothing is shifted.
            add_knn_memory: False leaves the memories as they are.
            mask: True at real tokens, of cached and new positions.
            cache: what ``init_cache`` made; ``x`` then holds the new tokens only.
            loss_normalizer: divides the summed loss, instead of the number of labels.

        Returns:
            ``logits`` or ``loss``; in a model with an XL window and without a cache ``(logits or loss, XLMemories)``.

        Raises:
            ValueError: ids out of range, shapes that do not fit, or memories of another batch or model.
            TypeError: ids or labels are no integers, or the mask is not boolean.
        """
        if labels is not None:
            check_labels(labels, x, num_tokens=self.num_tokens, ignore_index=self.cross_entropy_ignore_index)
        settings: dict[str, Any] = {
            "knn_memories": knn_memories,
            "xl_memories": xl_memories,
            "add_knn_memory": add_knn_memory,
        }
        if cache is not None:
            features, new = self.hidden(x, mask=mask, cache=cache, **settings), None
        else:
            features, new = self.read(x, mask=mask, **settings)
        if labels is None:
            result = F.linear(features, self.output_weight.to(features.dtype))
        else:
            labels = labels.long()
            if self.pad_id is not None:
                labels = labels.masked_fill(labels == self.pad_id, self.cross_entropy_ignore_index)
            result = linear_cross_entropy(
                features,
                self.output_weight,
                labels,
                ignore_index=self.cross_entropy_ignore_index,
                normalizer=loss_normalizer,
            )
        return result if new is None else (result, new)

    def hidden(
        self,
        x: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: MemoryCache | None = None,
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        add_knn_memory: bool = True,
    ) -> Float[Tensor, "b n d1"]:
        """Features with ``logits = hidden @ output_weight.T``; arguments as for ``forward``.

        With a cache, ``knn_memories`` may be given with the first tokens: they are copied, not changed.
        """
        if cache is None:
            return self.read(
                x, mask=mask, knn_memories=knn_memories, xl_memories=xl_memories, add_knn_memory=add_knn_memory
            )[0]
        if xl_memories is not None:
            raise ValueError("a cache has an XL window of its own: xl_memories must be None")
        return self._read_cached(x, mask, cache, knn_memories, add_knn_memory)

    def read(
        self,
        x: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        add_knn_memory: bool = True,
    ) -> tuple[Float[Tensor, "b n d1"], XLMemories | None]:
        """Features of a segment, and the XL memories behind it; arguments as for ``forward``."""
        check_inputs(x, mask=mask, past=0, num_tokens=self.num_tokens)
        self._check_memories(knn_memories, x.shape[0])
        window = check_window(xl_memories, len(self.xl_memory_layers), x.shape[0], self.dim_head)
        x = x.long()
        if self.pad_id is not None:
            mask = maybe_and_mask(mask, x != self.pad_id)
        return read_segment(
            x,
            features_of=self._features,
            attentions=self.layers.attentions(),
            mask=mask,
            memories=knn_memories,
            adds=add_knn_memory,
            window=window,
            window_mask=xl_memories.mask if isinstance(xl_memories, XLMemories) else None,
            max_window=self.xl_max_memories,
            shift_window=self.shift_xl,
            sos_id=self.sos_id,
            eos_id=self.eos_id,
        )

    def _features(self, x: Tensor, **settings: Any) -> Tensor:
        """From ids to what the output layer is applied to; ``settings`` as for ``Layers.forward``."""
        return F.pad(self.norm(self.layers(self._embed(x), **settings)), (0, 1), value=1.0)

    def _embed(self, x: Tensor) -> Tensor:
        try:
            return self.token_emb(x)
        except IndexError:
            check_ids(x, self.num_tokens, "x")
            raise

    def _check_memories(self, memories: KNNMemoryList | None, b: int) -> None:
        layers, key_heads = len(self.memorizing_layers), int(self.memory_settings["heads"])
        check_memories(memories, b, layers=layers, dim_head=self.dim_head, key_heads=key_heads)

    # ------------------------------------------------------------------------------------------------- generation

    def init_cache(self, batch_size: int, max_length: int, *, segment_length: int | None = None) -> MemoryCache:
        """An empty cache for ``batch_size`` rows; it needs no room for ``max_length``, which it may exceed.

        Args:
            batch_size: rows.
            max_length: accepted because ``lm_core.generate`` tells it.
            segment_length: tokens between two times that the memory grows; the model's by default.
        """
        check_positive(batch_size, "batch_size")
        check_positive(max_length, "max_length")
        length = self.segment_length if segment_length is None else segment_length
        check_positive(length, "segment_length")
        return MemoryCache(
            kept=kept_of(self.layers.attentions(), self.shift_xl),
            batch_size=batch_size,
            segment_length=length,
            window=self.xl_max_memories,
            dim_head=self.dim_head,
            make_memories=self._memories_in_passing,
        )

    @torch.no_grad()
    def _read_cached(
        self, x: Tensor, mask: Tensor | None, cache: MemoryCache, memories: KNNMemoryList | None, adds: bool
    ) -> Tensor:
        check_inputs(x, mask=mask, past=cache.length, num_tokens=self.num_tokens)
        self._check_memories(memories, x.shape[0])
        x = x.long()
        cache.check_next(x, mask, memories)
        if cache.length == 0:
            cache.begin(self.token_emb.weight, memories, adds)
        fresh = cache.take_up(x, mask)
        if self.pad_id is not None:
            fresh = maybe_and_mask(fresh, x != self.pad_id)
        reader = CachedReader(
            cache, features_of=self._features, features=self.dim + 1, sos_id=self.sos_id, eos_id=self.eos_id
        )
        return reader.read(x, fresh)

    @torch.no_grad()
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] | None = top_k,
        filter_thres: float = 0.9,
        eos_id: int | None = None,
        pad_id: int = 0,
        knn_memories: KNNMemoryList | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "b new"]:
        """Continues prompts (ids ``(b, n)`` or a list of 1-D tensors) and returns the new ids, padded on the right.

        Args:
            prompt: what to continue.
            max_new_tokens: at most, a row.
            temperature: 0 takes the most likely token.
            filter_logits_fn: called as ``filter_logits_fn(logits, thres=filter_thres)``; None for no filter.
            filter_thres: see there.
            eos_id: ends a row.
            pad_id: written behind the end of a row.
            knn_memories: what was read before; copied, not changed. Without it the memory begins empty.
            **kwargs: further arguments of ``lm_core.generate``.
        """
        filters = () if filter_logits_fn is None else (partial(filter_logits_fn, thres=filter_thres),)
        given: dict[str, Any] = {} if knn_memories is None else {"knn_memories": knn_memories}
        result = generate(
            self,
            prompt_rows(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            filters=filters,
            eos_id=eos_id,
            pad_id=pad_id,
            **given,
            **kwargs,
        )
        return result.tokens
