"""Memorizing Transformer (arXiv 2203.08913) with Transformer-XL memories (arXiv 1901.02860).

Pre-norm blocks of causal attention and a GELU feed-forward; some attentions also search a memory. A segment is read
against the memory as it was before it; afterwards what leaves the XL window is added, so nothing of a segment is found
by itself. T5 relative bias on local attention, learned once for plain and once for memorizing layers. The output layer
is not tied and has a bias, which ``hidden`` carries as a last feature of ones.

Shifting (ERNIE-Doc, arXiv 2012.15688, equation 3: a layer reads what the SAME layer gave out, not what it took in):
with a shift of s, the i-th layer that has a window (a memory) reads that of the (i + s)-th, or of the last; each adds
to its own.

Long because the model, its cached reading and its public call forms share one loop over layers.

Legend: b batch, n sequence, d feature, v vocabulary, h heads, j columns (remembered ones, then the segment's).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core._checks import check_ids, check_positive, check_probability, typed
from lm_core.checkpoint import PretrainedMixin
from lm_core.decoding import prompt_rows
from lm_core.generation import generate
from lm_core.losses import linear_cross_entropy
from lm_core.masking import maybe_and_mask, positions_from_mask
from lm_core.sampling import top_k
from memorizing_transformer.attention import LocalAttention, causal_distances
from memorizing_transformer.block import Attention, Block, FeedForward
from memorizing_transformer.cache import Kept, MemoryCache
from memorizing_transformer.knn_attention import Gate, KNNAttention, as_memories, packed
from memorizing_transformer.knn_memory import Backend
from memorizing_transformer.memory_list import KNNMemoryList
from memorizing_transformer.model_checks import check_inputs, check_window, layer_numbers, whole_number
from memorizing_transformer.relative_position import RelativePositionBias
from memorizing_transformer.ring_storage import StorageFormat
from memorizing_transformer.segment import (
    Documents,
    additive,
    find_documents,
    remembered_columns,
    split_columns,
    visible_pairs,
)


class XLMemories(list[Tensor]):
    """Keys and values ``(b, m, 2, d)`` (with several key heads ``(b, h, m, 2, d)``) of each XL layer, not normalised.

    Attributes:
        mask: ``(b, m)`` False at columns on the left that hold nothing; None where all hold something.
    """

    mask: Tensor | None = None


class MemorizingTransformer(PretrainedMixin):
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
        for name, value in (
            ("num_tokens", num_tokens),
            ("dim", dim),
            ("depth", depth),
            ("dim_head", dim_head),
            ("heads", heads),
            ("knn_attn_heads", knn_heads),
            ("ff_mult", ff_mult),
            ("max_knn_memories", max_knn_memories),
            ("num_retrieved_memories", num_retrieved_memories),
            ("segment_length", segment_length),
        ):
            check_positive(value, name)
        check_probability(attn_dropout, "attn_dropout")
        check_probability(ff_dropout, "ff_dropout")
        self.shift_knn = whole_number(shift_knn_memories_down, "shift_knn_memories_down")
        self.shift_xl = whole_number(shift_xl_memories_down, "shift_xl_memories_down")
        self.xl_max_memories = whole_number(xl_max_memories, "xl_max_memories")
        for name, token in (
            ("clear_memories_on_sos_token_id", clear_memories_on_sos_token_id),
            ("clear_memories_on_eos_token_id", clear_memories_on_eos_token_id),
            ("pad_id", pad_id),
        ):
            if token is not None and not 0 <= token < num_tokens:
                raise ValueError(f"{name} must be a token in [0, {num_tokens}), got {token}")
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
        self.position_bias = RelativePositionBias(heads=heads, scale=dim_head**0.5)
        self.knn_position_bias = RelativePositionBias(heads=knn_heads, scale=dim_head**0.5)
        # unused without memorizing layers, and processes that train together expect a gradient of all that needs one
        self.knn_position_bias.requires_grad_(bool(self.memorizing_layers))
        plain = partial(
            LocalAttention,
            dim=dim,
            heads=heads,
            dim_head=dim_head,
            dropout=attn_dropout,
            multi_head_keys=multi_head_keys,
        )
        memorizing = partial(
            KNNAttention,
            dim=dim,
            heads=knn_heads,
            dim_head=dim_head,
            dropout=attn_dropout,
            num_retrieved_memories=num_retrieved_memories,
            gate_output=gate_output,
            gate=gate,
            multi_head_keys=multi_head_keys,
        )
        self.blocks = nn.ModuleList()
        for layer in range(1, depth + 1):
            xl = self.xl_memory_layers.index(layer) if layer in self.xl_memory_layers else None
            memory = self.memorizing_layers.index(layer) if layer in self.memorizing_layers else None
            if memory is None:
                attentions = [Attention(dim, plain(), xl=xl, memory=None)]
            elif gate_output:
                attentions = [
                    Attention(dim, plain(), xl=xl, memory=None),
                    Attention(dim, memorizing(), xl=None, memory=memory),
                ]
            else:
                attentions = [Attention(dim, memorizing(), xl=xl, memory=memory)]
            feed_forward = FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout)
            self.blocks.append(Block(dim=dim, attentions=attentions, feed_forward=feed_forward))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    # ---------------------------------------------------------------------------------------------------- structure

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_emb.weight.device

    @property
    def output_weight(self) -> Float[Tensor, "v d1"]:
        """The output layer's weight with its bias as the last column; ``hidden`` has a one there."""
        return torch.cat((self.to_logits.weight, self.to_logits.bias.unsqueeze(1)), dim=1)

    def attentions(self) -> list[Attention]:
        """All attentions in the order they are applied."""
        return [one for block in self.blocks for one in block.attentions]  # type: ignore[union-attr]

    def memory_attentions(self) -> list[KNNAttention]:
        """Those that search a memory."""
        return [one.inner for one in self.attentions() if isinstance(one.inner, KNNAttention)]

    # ----------------------------------------------------------------------------------------------------- memories

    def create_knn_memories(
        self, *, batch_size: int, name: str | None = None, timeout: float = 10.0, **settings: Any
    ) -> KNNMemoryList:
        """Empty memories, one for each memorizing layer; with ``name``, what the folder of that name holds.

        Args:
            batch_size: rows.
            name: with ``knn_memories_directory``: a folder in it that is kept and can be opened again. Without it, a
                scratch folder that ``cleanup`` removes.
            timeout: seconds to wait for another process that uses the folder.
            **settings: arguments of ``KNNMemory`` other than the model's.

        Raises:
            ValueError: a name without ``knn_memories_directory``, or a folder with other memories.
            TimeoutError: another process uses the folder.
        """
        check_positive(batch_size, "batch_size")
        if name is not None and self.knn_memories_directory is None:
            raise ValueError(f"name {name!r} needs a model with knn_memories_directory, got None")
        create = KNNMemoryList.create_memories(
            batch_size=batch_size,
            num_memory_layers=len(self.memorizing_layers),
            memories_directory=self.knn_memories_directory,
            name=name,
            timeout=timeout,
        )
        place = {} if self.knn_memories_directory is not None else {"device": self.device}
        return create(**{**self.memory_settings, **place, **settings})

    @contextmanager
    def knn_memories_context(self, **settings: Any) -> Iterator[KNNMemoryList]:
        """``create_knn_memories`` for a block; files are let go of at its end, also after an error."""
        memories = self.create_knn_memories(**settings)
        try:
            yield memories
        finally:
            memories.cleanup()

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
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
            if labels.shape != x.shape:
                raise ValueError(f"labels must have the shape of x {tuple(x.shape)}, got {tuple(labels.shape)}")
            if not labels.is_cuda:
                counted = labels[labels != self.cross_entropy_ignore_index]
                check_ids(counted, self.num_tokens, "labels")
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
        window = check_window(xl_memories, len(self.xl_memory_layers), x.shape[0], self._xl_shape())
        xl_mask = xl_memories.mask if isinstance(xl_memories, XLMemories) else None
        x = x.long()
        n, past = x.shape[1], window[0].shape[2] if window else 0
        if self.pad_id is not None:
            mask = maybe_and_mask(mask, x != self.pad_id)
        documents = find_documents(x, sos_id=self.sos_id, eos_id=self.eos_id, mask=mask)
        distances = causal_distances(n, past + n, x.device).unsqueeze(0)
        if mask is not None:
            positions = positions_from_mask(mask)
            before = torch.arange(-past, 0, device=x.device).expand(x.shape[0], -1)
            distances = positions.unsqueeze(2) - torch.cat((before, positions), dim=1).unsqueeze(1)
            # two pads, or a pad and the token before it, have one position: the order of columns decides
            distances = distances.masked_fill(causal_distances(n, past + n, x.device) < 0, -1)
        visible = visible_pairs(
            distances,
            past=past,
            past_mask=xl_mask,
            key_mask=mask,
            query_documents=None if documents is None else documents.ids,
            key_documents=None if documents is None else documents.ids,
        )
        kept: dict[int, Tensor] = {}

        def remember(number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            kept[number] = torch.stack((k, v), dim=-2).detach()
            one = attentions[number]
            if one.xl is None or not past:
                return k, v
            old = window[min(one.xl + self.shift_xl, len(window) - 1)]
            return torch.cat((old[..., 0, :].to(k), k), dim=2), torch.cat((old[..., 1, :].to(v), v), dim=2)

        attentions = self.attentions()
        features = self._layers(x, distances, visible, past, documents, knn_memories, remember)
        if add_knn_memory and knn_memories and documents is not None:
            self._forget(knn_memories, documents)
        new = XLMemories() if self.xl_max_memories else None
        for number, one in enumerate(attentions):
            if one.xl is None and one.memory is None:
                continue
            has_window, columns = one.xl is not None, kept[number]
            old = past if has_window else 0
            if old and one.xl is not None:
                columns = torch.cat((window[one.xl].to(columns), columns), dim=2)
            keep = remembered_columns(
                past=old, past_mask=xl_mask if old else None, key_mask=mask, documents=documents, new=n
            )
            split = split_columns(columns, keep, self.xl_max_memories if has_window else 0)
            if has_window and new is not None:
                new.append(packed(split.staying))
                new.mask = split.staying_mask
            if one.memory is not None and knn_memories and add_knn_memory and split.leaving.shape[2]:
                knn_memories[one.memory].add(packed(as_memories(split.leaving)), mask=_finite(split))
        return features, new

    def _layers(
        self,
        x: Tensor,
        distances: Tensor,
        visible: Tensor,
        past: int,
        documents: Documents | None,
        memories: KNNMemoryList | None,
        remember: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The loop over layers, for a whole segment or a piece of one."""
        h = self._embed(x)
        plain = additive(self.position_bias(distances), visible)
        memorizing = additive(self.knn_position_bias(distances), visible) if self.memorizing_layers else plain
        reads_memory = None if documents is None else documents.ids == 0
        number = 0
        for block in self.blocks:
            for one in block.attentions:  # type: ignore[union-attr]
                columns = slice(None) if one.xl is not None else slice(past, None)
                step = partial(remember, number)
                normed = one.norm(h)
                if isinstance(one.inner, KNNAttention):
                    memory = None
                    if memories:
                        memory = memories[min(one.memory + self.shift_knn, len(memories) - 1)]
                    h = h + one.inner.attend(
                        normed,
                        bias=memorizing[..., columns],
                        memory=memory,
                        reads_memory=reads_memory,
                        remember=step,
                    )
                else:
                    h = h + one.inner(normed, bias=plain[..., columns], remember=step)
                number += 1
            h = block.feed(h)  # type: ignore[operator]
        h = self.norm(h)
        return F.pad(h, (0, 1), value=1.0)

    def _embed(self, x: Tensor) -> Tensor:
        try:
            return self.token_emb(x)
        except IndexError:
            check_ids(x, self.num_tokens, "x")
            raise

    def _forget(self, memories: KNNMemoryList, documents: Documents) -> None:
        begun = (documents.open > 0).nonzero().flatten().tolist()
        if begun:
            for memory in memories:
                memory.clear([memory.scoped_indices[row] for row in begun])

    def _xl_shape(self) -> tuple[int, ...]:
        shapes = [one.key_heads for one in self.attentions() if one.xl is not None]
        return (shapes[0] if shapes else 1, self.dim_head)

    def _check_memories(self, memories: KNNMemoryList | None, b: int) -> None:
        if memories is None:
            return
        if len(memories) != len(self.memorizing_layers):
            raise ValueError(f"knn_memories must have {len(self.memorizing_layers)} memories, got {len(memories)}")
        for number, memory in enumerate(memories):
            if len(memory.scoped_indices) != b:
                raise ValueError(f"knn_memories have {len(memory.scoped_indices)} rows in scope, x has a batch of {b}")
            if (memory.dim, memory.heads) != (self.dim_head, self.memory_settings["heads"]):
                raise ValueError(
                    f"knn_memories[{number}] must have dim {self.dim_head} and "
                    f"{self.memory_settings['heads']} key heads, "
                    f"got {memory.dim} and {memory.heads}"
                )

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
        attentions = self.attentions()
        windows = [number for number, one in enumerate(attentions) if one.xl is not None]
        kept = []
        for number, one in enumerate(attentions):
            reads = number if one.xl is None else windows[min(one.xl + self.shift_xl, len(windows) - 1)]
            kept.append(Kept(one.key_heads, one.xl is not None, reads, one.memory))
        return MemoryCache(
            kept=kept,
            batch_size=batch_size,
            segment_length=length,
            window=self.xl_max_memories,
            dim_head=self.dim_head,
            make_memories=self._scratch_memories,
        )

    def _scratch_memories(self, batch_size: int) -> KNNMemoryList:
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=len(self.memorizing_layers))
        return create(**self.memory_settings, device=self.device)

    @torch.no_grad()
    def _read_cached(
        self, x: Tensor, mask: Tensor | None, cache: MemoryCache, memories: KNNMemoryList | None, adds: bool
    ) -> Tensor:
        check_inputs(x, mask=mask, past=cache.length, num_tokens=self.num_tokens)
        if cache.batch_size != x.shape[0]:
            raise ValueError(f"cache holds {cache.batch_size} rows, got a batch of {x.shape[0]}")
        if mask is None and cache.masked:
            raise ValueError("mask is None but the cache was filled under one: pass the mask of all positions")
        if memories is not None and cache.length:
            raise ValueError("knn_memories go with the first tokens of a cache")
        self._check_memories(memories, x.shape[0])
        x = x.long()
        if cache.length == 0:
            cache.begin(self.token_emb.weight, memories, adds)
        fresh = None if mask is None else mask[:, cache.length :]
        if fresh is not None and bool(fresh.all()):
            fresh = None
        cache.masked = cache.masked or mask is not None
        cache.length += x.shape[1]
        if fresh is None and cache.is_even():
            return self._read_evenly(x, cache)
        return self._read_row_by_row(x, torch.ones_like(x, dtype=torch.bool) if fresh is None else fresh, cache)

    def _read_evenly(self, x: Tensor, cache: MemoryCache) -> Tensor:
        """Pieces up to the next end of a segment, the same in all rows."""
        outputs: list[Tensor] = []
        while x.shape[1]:
            if not cache.is_even():  # rows forgot different documents
                return torch.cat((*outputs, self._read_row_by_row(x, torch.ones_like(x, dtype=torch.bool), cache)), 1)
            piece = x[:, : cache.segment_length - cache.fill[0]]
            outputs.append(self._read_piece(piece, None, cache))
            x = x[:, piece.shape[1] :]
        return torch.cat(outputs, dim=1)

    def _read_row_by_row(self, x: Tensor, valid: Tensor, cache: MemoryCache) -> Tensor:
        """Pieces in which each row goes as far as the end of its own segment; padding is left out."""
        order = (~valid).long().sort(dim=1, stable=True).indices  # real tokens first, in their order
        remaining, done = valid.sum(dim=1).tolist(), [0] * x.shape[0]
        out = torch.zeros(*x.shape, self.dim + 1, dtype=self.token_emb.weight.dtype, device=x.device)
        while any(remaining):
            take = [min(left, cache.segment_length - fill) for left, fill in zip(remaining, cache.fill, strict=True)]
            n = max(take)
            steps = torch.arange(n, device=x.device)
            inside = steps < torch.tensor(take, device=x.device).unsqueeze(1)
            places = (steps + torch.tensor(done, device=x.device).unsqueeze(1)).clamp(max=x.shape[1] - 1)
            columns = order.gather(1, places)
            features = self._read_piece(x.gather(1, columns), inside, cache)
            out[inside.nonzero()[:, 0], columns[inside]] = features[inside]
            remaining = [left - count for left, count in zip(remaining, take, strict=True)]
            done = [before + count for before, count in zip(done, take, strict=True)]
        return out

    def _read_piece(self, x: Tensor, valid: Tensor | None, cache: MemoryCache) -> Tensor:
        """Tokens that stay within one segment of each row; ``valid`` is False at padding on the right."""
        n = x.shape[1]
        counts = [n] * x.shape[0] if valid is None else valid.sum(dim=1).tolist()
        used = max(fill + count for fill, count in zip(cache.fill, counts, strict=True))
        starts = torch.tensor(cache.fill[:1] if valid is None else cache.fill, device=x.device).unsqueeze(1)
        query_positions = starts + torch.arange(n, device=x.device)
        columns = torch.arange(-cache.window, used, device=x.device)
        distances = query_positions.unsqueeze(2) - columns
        documents = find_documents(x, sos_id=self.sos_id, eos_id=self.eos_id, mask=valid, before=cache.open_documents)
        cache.write_documents(documents, counts)
        is_uniform = valid is None and documents is None and cache.xl_lengths[0] == cache.window
        visible = visible_pairs(
            distances,
            past=cache.window,
            past_mask=None if is_uniform or not cache.window else cache.past_mask(x.device),
            query_documents=None if documents is None else documents.ids,
            key_documents=None if documents is None or cache.documents is None else cache.documents[:, :used],
        )

        def remember(number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return cache.remember(number, k, v, used, valid)

        features = self._layers(x, distances, visible, cache.window, documents, cache.memories, remember)
        cache.advance(counts)
        return features

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


def _finite(split: Any) -> Tensor | None:
    """What may be added: a loss that overflowed is the trainer's to skip, and must not stay in the memory."""
    if split.leaving.is_cuda or torch.compiler.is_compiling():
        return split.leaving_mask
    finite = torch.isfinite(split.leaving).all(dim=-1).all(dim=-1).all(dim=1)
    return split.leaving_mask if bool(finite.all()) else maybe_and_mask(split.leaving_mask, finite)
