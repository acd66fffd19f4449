"""A kNN memory for a pretrained transformers model (Memorizing Transformers, arXiv 2203.08913, section 4.4).

A text is read in segments. Each segment is one forward of the model on the segment and the ``window`` tokens before it,
and in some layers every query also retrieves from a memory of the keys and values of all earlier tokens of its
document, which have left the window. Learned are a gate and a temperature for each head of those layers, and optionally
LoRA adapters; the model itself is frozen.

Retrieved keys carry no position, as in the paper: they are taken before rotary embeddings. A token's keys are those of
its first reading. Documents, rows and padding are treated as in ``MemorizingTransformer``.

Legend: b batch, n sequence, v vocabulary, d feature, g key heads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.adapters import HuggingFaceLM, as_causal_lm
from lm_core.adapters.huggingface import undisturbed
from lm_core.adapters.loading import lora
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_mask, check_positive, typed
from lm_core.losses.losses import linear_cross_entropy
from memorizing_transformer.memory.knn_memory import Backend
from memorizing_transformer.memory.memory_list import CreatesMemories, KNNMemoryList
from memorizing_transformer.memory.ring_storage import StorageFormat
from memorizing_transformer.model.attention import stacked
from memorizing_transformer.model.augmented_cache import AugmentedCache
from memorizing_transformer.model.memory_reader import MemoryReader, ReaderGate
from memorizing_transformer.model.projected_attention import ProjectedAttention, find_attentions
from memorizing_transformer.model.segment import Documents, Past, Place, XLMemories, find_documents, remember
from memorizing_transformer.model.transformer import layer_numbers

# Largest arguments of a stored model: files are not trusted.
LARGEST = {"num_retrieved": 2**16, "segment_length": 2**20, "window": 2**20, "lora_r": 2**12}
IGNORED = -100


class MemoryAugmentedLM(CreatesMemories, PretrainedMixin):
    """A transformers causal language model with a kNN memory in some of its attention layers.

    Hooks on the model's projections exist during a call only, so the model itself stays as it was.

    Args:
        model: a transformers causal language model, which is frozen. LoRA adapters of peft in it are trained.
        layers: layers with a memory, counted from 1; the one three quarters up by default.
        max_memories: capacity of a row's memory in tokens.
        num_retrieved: memories retrieved for each query of each head.
        gate: "sigmoid" (the paper's, starts at 1.8 % of a head's output) or "tanh" (starts at exactly 0).
        segment_length: tokens that are read at once, before they leave the window.
        window: tokens before a segment that are read with it.
        storage: number format of the memory.
        backend: "exact" search, or an index of "faiss".
        index: factory string of faiss.
        clear_memories_on_sos_token_id: token that begins a document, where the row's memory is emptied.
        clear_memories_on_eos_token_id: token that ends a document, where the row's memory is emptied.
        lora_r: rank of LoRA adapters to add to all linear layers of the model; None for none.
        memories_directory: folder for memory-mapped memories, which otherwise are on the model's device.

    Raises:
        ValueError: a size below 1, a layer that does not exist, a window too long for the model's positions, or a model
            whose attention has no projections that can be hooked; it is named.
        TypeError: ``model`` is no causal language model of transformers, or an argument is of another type.
    """

    directory_argument = "memories_directory"
    local_arguments = frozenset({directory_argument})
    max_length = None

    @typed
    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int | Sequence[int] | None = None,
        max_memories: int = 32_768,
        num_retrieved: int = 32,
        gate: ReaderGate = "sigmoid",
        segment_length: int = 512,
        window: int = 512,
        storage: StorageFormat = "float32",
        backend: Backend = "exact",
        index: str = "Flat",
        clear_memories_on_sos_token_id: int | None = None,
        clear_memories_on_eos_token_id: int | None = None,
        lora_r: int | None = None,
        memories_directory: str | Path | None = None,
    ) -> None:
        super().__init__()
        # checks
        sizes = {"max_memories": max_memories, "num_retrieved": num_retrieved, "segment_length": segment_length}
        for name, value in sizes.items():
            check_positive(value, name)
        if window < 0:
            raise ValueError(f"window must be at least 0, got {window}")
        if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
            raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
        whole: Any = model
        inner = whole.get_base_model() if hasattr(model, "get_base_model") else model
        attentions = find_attentions(inner)
        default = max(1, 3 * len(attentions) // 4)
        self.memorizing_layers = layer_numbers(layers, len(attentions), "layers", default=default)
        if not self.memorizing_layers:
            raise ValueError("layers must name at least one layer, got none")
        vocabulary = int(whole.get_input_embeddings().num_embeddings)
        for name, token in (
            ("clear_memories_on_sos_token_id", clear_memories_on_sos_token_id),
            ("clear_memories_on_eos_token_id", clear_memories_on_eos_token_id),
        ):
            if token is not None and not 0 <= token < vocabulary:
                raise ValueError(f"{name} must be a token in [0, {vocabulary}), got {token}")
        chosen = [attentions[layer - 1] for layer in self.memorizing_layers]
        shapes = {(attention.key_heads, attention.dim_head) for attention in chosen}
        if len(shapes) > 1:
            raise ValueError(f"layers must have equal numbers and sizes of key heads, got {sorted(shapes)}")

        # frozen model, adapters, readers
        if not hasattr(model, "peft_config"):
            model.requires_grad_(False)
            model = model if lora_r is None else lora(model, r=lora_r)
            chosen = [find_attentions(inner)[layer - 1] for layer in self.memorizing_layers]
        elif lora_r is not None:
            raise ValueError(f"lora_r must be None for a model that has adapters, got {lora_r}")
        self.model = model
        self.readers = nn.ModuleList(
            MemoryReader(heads=attention.heads, num_retrieved=num_retrieved, gate=gate) for attention in chosen
        )
        device = next(model.parameters()).device
        self.readers.to(device)

        # attributes that memories, caches and commands read
        self.num_tokens = vocabulary
        self.segment_length = segment_length
        self.window = window
        self.sos_id = clear_memories_on_sos_token_id
        self.eos_id = clear_memories_on_eos_token_id
        self.max_knn_memories = max_memories
        self.memories_directory = memories_directory
        ((key_heads, dim_head),) = shapes
        self.memory_settings: dict[str, Any] = {
            "dim": dim_head,
            "max_memories": max_memories,
            "backend": backend,
            "storage": storage,
            "index": index,
            "heads": key_heads,
        }
        # the places in the windows: keys and values of each layer, then the token ids
        count = len(chosen)
        self._places = [
            Place(number=number, key_heads=key_heads, xl=number, memory=number, reads_xl=number, reads_memory=number)
            for number in range(count)
        ]
        self._places.append(Place(number=count, key_heads=1, xl=count, memory=None, reads_xl=count, reads_memory=None))
        # not submodules: they share the model's
        self.__dict__["_attentions"] = chosen
        self.__dict__["_adapter"] = None
        if device.type != "meta":
            self._adapted()

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Rejects arguments of a file that exceed ``LARGEST``; see ``PretrainedMixin.check_arguments``."""
        super().check_arguments(arguments)
        for name, largest in LARGEST.items():
            if isinstance(value := arguments.get(name), int | float) and value > largest:
                raise CheckpointError(f"{name} of a stored model must be at most {largest:,}, got {value:,}")

    def _adapted(self) -> HuggingFaceLM:
        """The adapter of the model, made at the first use; the model is tried on a few tokens."""
        adapter: HuggingFaceLM | None = self.__dict__["_adapter"]
        if adapter is None:
            adapter = as_causal_lm(self.model)
            limits = [limit for limit in (adapter.max_length, adapter.max_cached_length) if limit is not None]
            if limits and self.segment_length + self.window > min(limits):
                raise ValueError(
                    f"segment_length {self.segment_length} and window {self.window} must together be at most the "
                    f"model's {min(limits)} positions"
                )
            sizes = {size for attention in self._attentions for size in (attention.heads, attention.key_heads)}
            n = next(n for n in range(3, 12) if n not in sizes)
            with undisturbed(self.model), ExitStack() as stack:
                notes = [stack.enter_context(attention.observed()) for attention in self._attentions]
                adapter(torch.arange(n, device=self.device).unsqueeze(0) % self.num_tokens)
            for attention, noted in zip(self._attentions, notes, strict=True):
                attention.learn_layout(noted, n)
            self.__dict__["_adapter"] = adapter
        return adapter

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.num_tokens

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Gates and temperatures, and LoRA adapters."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def memory_attentions(self) -> list[MemoryReader]:
        """The readers of the layers with a memory, in order."""
        return list(self.readers)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------------- reading

    def forward(
        self,
        x: Int[Tensor, "b n"],
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        add_knn_memory: bool = True,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: AugmentedCache | None = None,
        *,
        loss_normalizer: float | Tensor | None = None,
    ) -> Any:
        """Logits ``(b, n, v)`` of a text of any length, read through the memory segment by segment.

        With ``knn_memories``, ``xl_memories`` or ``labels`` and without a cache, one call reads one segment, as in
        ``MemorizingTransformer``; arguments and results are then those of ``MemorizingTransformer.forward``.

        Raises:
            ValueError: ids out of range, shapes that do not fit, or memories of another batch or model.
            TypeError: ids or labels are not integers, or the mask is not boolean.
        """
        if cache is not None or all(part is None for part in (knn_memories, xl_memories, labels)):
            return self._logits(self._through_memory(x, mask, cache, knn_memories, add_knn_memory))
        if labels is not None:
            if labels.shape != x.shape:
                raise ValueError(f"labels must have the shape of x {tuple(x.shape)}, got {tuple(labels.shape)}")
            check_ids(labels.masked_fill(labels == IGNORED, 0), self.num_tokens, "labels")
        states, window = self.read(
            x, mask=mask, knn_memories=knn_memories, xl_memories=xl_memories, add_knn_memory=add_knn_memory
        )
        result = self._logits(states) if labels is None else self.loss(states, labels, normalizer=loss_normalizer)
        return result if window is None else (result, window)

    @property
    def hidden(self) -> Callable[..., Tensor]:
        """``hidden(ids, *, mask=None, cache=None, knn_memories=None)``: logits are ``hidden @ output_weight.T``.

        Without a cache, the text is read as in generation: in segments, each of which enters a copy of the memories.
        """
        if not hasattr(self._adapted(), "hidden"):
            raise AttributeError("logits are not hidden @ output_weight.T")
        return self._hidden

    def _hidden(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: AugmentedCache | None = None,
        knn_memories: KNNMemoryList | None = None,
    ) -> Float[Tensor, "b n d"]:
        return self._through_memory(ids, mask, cache, knn_memories, True)

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the output layer; raises ``AttributeError`` if logits are not a product with it."""
        return self._adapted().output_weight

    @property
    def init_cache(self) -> Callable[..., AugmentedCache]:
        """``init_cache(batch_size, max_length)``: an empty cache for rows of any length."""
        if not hasattr(self._adapted(), "init_cache"):
            raise AttributeError(f"{type(self.model).__name__} has no cache that can be used")
        return self._init_cache

    def _init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        segment_length: int | None = None,
        static: bool = False,
        incremental: bool = True,
    ) -> AugmentedCache:
        length = self.segment_length if segment_length is None else segment_length
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("segment_length", length)):
            check_positive(value, name)
        # on the device even with memories_directory: a cache is temporary
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=len(self.memorizing_layers))
        return AugmentedCache(
            places=self._places,
            batch_size=batch_size,
            segment_length=length,
            window=self.window,
            dim_head=self.memory_settings["dim"],
            make_memories=lambda: create(**self.memory_settings, device=self.device),
            incremental=incremental,
        )

    def _through_memory(
        self, x: Tensor, mask: Tensor | None, cache: AugmentedCache | None, memories: KNNMemoryList | None, adds: bool
    ) -> Tensor:
        """States of new tokens, read through a cache; without one, of a whole text, with gradients."""
        new_mask = self._checked(x, mask, past=0 if cache is None else cache.length, memories=memories)
        x = x.long()
        like = next(self.model.parameters())
        if cache is None:
            cache = self._init_cache(*x.shape, incremental=False)
            cache.begin(like, memories, adds=True)
            return self._read_pieces(x, new_mask, cache)
        cache.check_next(x, mask, memories)
        if cache.length == 0:
            cache.begin(like, memories, adds)
        cache.length += x.shape[1]
        cache.masked = cache.masked or mask is not None
        with torch.no_grad():
            return self._read_pieces(x, new_mask, cache)

    def _read_pieces(self, x: Tensor, mask: Tensor | None, cache: AugmentedCache) -> Tensor:
        """States of new tokens, piece by piece within the segments of the rows; zeros at padding."""
        out: Tensor | None = None
        for columns, inside in cache.pieces(x, None if mask is None or bool(mask.all()) else mask):
            tokens = x.gather(1, columns)
            before = None if cache.documents is None else cache.documents.open
            documents = find_documents(tokens, sos_id=self.sos_id, eos_id=self.eos_id, mask=inside, before=before)
            states, kept = self._read_piece(tokens, inside, documents, cache)
            cache.append(kept, inside, documents)
            out = states.new_zeros(*x.shape, states.shape[-1]) if out is None else out
            if inside is None:
                index = columns.unsqueeze(-1).expand_as(states)
                out = out.scatter(1, index, states)
            else:
                out = out.index_put((inside.nonzero()[:, 0], columns[inside]), states[inside])
        assert out is not None
        return out

    def _read_piece(
        self, tokens: Tensor, inside: Tensor | None, documents: Documents | None, cache: AugmentedCache
    ) -> tuple[Tensor, list[Tensor]]:
        """States of a piece, and what is kept of it; through the model's own cache if that can be used."""
        live = cache.live
        n = tokens.shape[1]
        is_even = inside is None and (documents is None or bool((documents.ids == cache.open_documents[:, None]).all()))
        if not (cache.incremental and is_even):
            cache.live = None
            context = cache.context()
            return self._read_documents(tokens, inside, documents, context, cache.open_documents, cache.memories)
        adapter = self._adapted()
        if live is None:
            # the tokens before the piece again, padded on the left
            rows = [torch.cat((row, new)) for row, new in zip(cache.context(), tokens, strict=True)]
            longest = max(len(row) for row in rows)
            ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
            lengths = torch.tensor([len(row) for row in rows], device=ids.device).unsqueeze(1)
            columns = torch.arange(longest, device=ids.device)
            mask = columns >= longest - lengths
            live = cache.live = adapter.init_cache(len(rows), longest + self.segment_length)
            cache.live_mask = None if bool(mask.all()) else mask
        else:
            ids = tokens
            if cache.live_mask is not None:
                cache.live_mask = F.pad(cache.live_mask, (0, n), value=True)
        recalls = None
        if documents is not None:
            recalls = (documents.ids[:, :1] == 0).expand(-1, ids.shape[1])
        states, kept = self._call(ids, cache.live_mask, cache.memories, recalls, cache=live)
        kept = [kv[:, :, -n:] for kv in kept]
        return states[:, -n:], [*kept, _as_kept(tokens)]

    def read(
        self,
        x: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        add_knn_memory: bool = True,
    ) -> tuple[Tensor, XLMemories | None]:
        """States of one segment for ``loss``, and the window for the next one (None if ``window`` is 0).

        Args:
            x: token ids of one segment.
            mask: True at real tokens.
            knn_memories: memories to search, and then to extend; None for the model alone.
            xl_memories: window returned by the previous call.
            add_knn_memory: whether the memories are extended.
        """
        mask = self._checked(x, mask, past=0, memories=knn_memories)
        x = x.long()
        past = self._past(xl_memories, x)
        documents = find_documents(x, sos_id=self.sos_id, eos_id=self.eos_id, mask=mask)
        context = [x.new_empty(0)] * len(x)
        if past.windows:
            ids = past.windows[-1][:, 0, :, 0, 0]
            context = [row if past.window_mask is None else row[past.window_mask[r]] for r, row in enumerate(ids)]
        states, kept = self._read_documents(x, mask, documents, context, x.new_zeros(len(x)), knn_memories)
        windows, window_mask = remember(
            self._places,
            kept,
            past,
            mask=mask,
            documents=documents,
            window=self.window,
            memories=knn_memories if add_knn_memory else None,
        )
        if not self.window:
            return states, None
        new = XLMemories(windows)
        new.mask = window_mask
        return states, new

    def _past(self, xl_memories: Sequence[Tensor] | None, x: Tensor) -> Past:
        if xl_memories is None:
            return Past()
        if len(xl_memories) != len(self._places):
            raise ValueError(f"xl_memories must have {len(self._places)} entries, got {len(xl_memories)}")
        if any(len(part) != len(x) for part in xl_memories):
            raise ValueError(f"xl_memories must have {len(x)} rows, got {[len(part) for part in xl_memories]}")
        return Past(list(xl_memories), xl_memories.mask if isinstance(xl_memories, XLMemories) else None)

    def _read_documents(
        self,
        tokens: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None,
        documents: Documents | None,
        context: Sequence[Int[Tensor, " _"]],
        open_before: Int[Tensor, " b"],
        memories: KNNMemoryList | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """States of tokens that may be of several documents, each of which is read on its own.

        Args:
            tokens: new tokens.
            mask: False at padding.
            documents: documents of the tokens; None if all are of one.
            context: for each row, the tokens before the new ones that the model reads again.
            open_before: for each row, the document of its context.
            memories: memories to search, which have the batch's rows in scope.
        """
        (b, n), device = tokens.shape, tokens.device
        numbers = torch.zeros_like(tokens) if documents is None else documents.ids
        out: Tensor | None = None
        kept: list[Tensor] = []
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        # runs of one document: of each row the first, then the second, ...
        runs = [_runs(numbers[row], real[row]) for row in range(b)]
        for turn in range(max(len(row) for row in runs)):
            rows = [row for row in range(b) if turn < len(runs[row])]
            before = [
                context[row]
                if turn == 0 and int(numbers[row, runs[row][0][0]]) == int(open_before[row])
                else tokens[row, :0]
                for row in rows
            ]
            texts = [torch.cat((old, tokens[row, runs[row][turn]])) for old, row in zip(before, rows, strict=True)]
            longest = max(len(text) for text in texts)
            # no mask: nothing sees the padding after it, and sliding windows of padding only would give NaN
            ids = torch.stack([F.pad(text, (0, longest - len(text))) for text in texts])
            recalls = [int(numbers[row, runs[row][turn][0]]) == 0 for row in rows]
            searched = memories if any(recalls) else None
            may_recall = None if all(recalls) else torch.tensor(recalls, device=device).unsqueeze(1).expand(-1, longest)
            with ExitStack() as stack:
                if searched is not None and len(rows) < b:
                    searched = stack.enter_context(
                        searched.at_batch_indices([searched[0].scoped_indices[row] for row in rows])
                    )
                states, new = self._call(ids, None, searched, may_recall)
            if (
                out is None
                and len(rows) == b
                and all(len(runs[row]) == 1 and len(runs[row][0]) == n for row in range(b))
            ):
                starts = {len(old) for old in before}
                if len(starts) == 1:  # the usual case, without copies
                    start = starts.pop()
                    return states[:, start:], [*(kv[:, :, start:] for kv in new), _as_kept(tokens)]
            if out is None:
                out = states.new_zeros(b, n, states.shape[-1])
                kept = [kv.new_zeros(b, kv.shape[1], n, 2, kv.shape[-1]) for kv in new]
            for at, (row, old) in enumerate(zip(rows, before, strict=True)):
                columns, start = runs[row][turn], len(old)
                row_index = torch.full_like(columns, row)
                out = out.index_put((row_index, columns), states[at, start : start + len(columns)])
                for whole, kv in zip(kept, new, strict=True):
                    whole[row, :, columns] = kv[at, :, start : start + len(columns)]
        assert out is not None
        return out, [*kept, _as_kept(tokens)]

    def _call(
        self,
        ids: Int[Tensor, "r m"],
        mask: Bool[Tensor, "r total"] | None,
        memories: KNNMemoryList | None,
        may_recall: Bool[Tensor, "r m"] | None,
        cache: Any = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One forward of the model with its layers hooked: its states (or logits), and new keys and values."""
        adapter = self._adapted()
        kept: list[Tensor] = []

        def mix(reader: MemoryReader, number: int) -> Callable[..., Tensor]:
            def mixed(q: Tensor, k: Tensor, v: Tensor, local: Tensor) -> Tensor:
                kept.append(stacked(k, v))
                memory = None if memories is None else memories[number]
                out: Tensor = reader(local, q, memory=memory, may_recall=may_recall)
                return out

            return mixed

        with ExitStack() as stack:
            for number, (attention, reader) in enumerate(zip(self._attentions, self.readers, strict=True)):
                stack.enter_context(attention.hooked(mix(reader, number)))  # type: ignore[arg-type]
            states = getattr(adapter, "hidden", adapter)(ids, mask=mask, cache=cache)
        if len(kept) != len(self.readers):
            raise RuntimeError(
                f"each memorizing layer must be called once, got {len(kept)} calls of {len(self.readers)} layers: "
                "gradient checkpointing of the model must be off"
            )
        return states, kept

    @property
    def _attentions(self) -> list[ProjectedAttention]:
        attentions: list[ProjectedAttention] = self.__dict__["_attentions"]
        return attentions

    # --------------------------------------------------------------------------------------------------- output, loss

    def _logits(self, states: Tensor) -> Tensor:
        adapter = self._adapted()
        if not hasattr(adapter, "hidden"):
            return states
        layer: Any = adapter._output_layer()
        logits: Tensor = layer(states)
        return logits

    def loss(
        self,
        states: Tensor,
        labels: Int[Tensor, "b n"],
        *,
        reduction: Literal["mean", "none"] = "mean",
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of the result of ``read``; arguments are those of ``MemorizingTransformer.loss``."""
        labels = labels.long()
        if hasattr(self._adapted(), "hidden"):
            return linear_cross_entropy(
                states, self.output_weight, labels, ignore_index=IGNORED, reduction=reduction, normalizer=normalizer
            )
        logits = states.transpose(1, 2).to(torch.promote_types(states.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        if reduction == "none":
            return losses
        return losses.sum() / ((labels != IGNORED).sum().clamp(min=1) if normalizer is None else normalizer)

    def _checked(self, x: Tensor, mask: Tensor | None, *, past: int, memories: KNNMemoryList | None) -> Tensor | None:
        """Checks the arguments; returns the mask of the new tokens (None: all are real)."""
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"x must have shape (b, n) with at least one row and token, got {tuple(x.shape)}")
        b, n = x.shape
        if mask is not None:
            check_mask(mask, "mask", (b, past + n))
        check_ids(x[:0] if x.is_cuda else x, self.num_tokens, "x")
        if memories is not None:
            sizes = int(self.memory_settings["dim"]), int(self.memory_settings["heads"])
            if len(memories) != len(self.memorizing_layers):
                raise ValueError(f"knn_memories must have {len(self.memorizing_layers)} memories, got {len(memories)}")
            for index, memory in enumerate(memories):
                if len(memory.scoped_indices) != b:
                    raise ValueError(
                        f"knn_memories have {len(memory.scoped_indices)} rows in scope, x has a batch of {b}"
                    )
                if (memory.dim, memory.heads) != sizes:
                    raise ValueError(
                        f"knn_memories[{index}] must have dim {sizes[0]} and {sizes[1]} key heads, "
                        f"got {memory.dim} and {memory.heads}"
                    )
        return None if mask is None else mask[:, past:]


def _as_kept(tokens: Int[Tensor, "b n"]) -> Int[Tensor, "b 1 n 2 1"]:
    """Token ids in the shape of keys and values, so that they move through the window with these."""
    return tokens[:, None, :, None, None].expand(-1, 1, -1, 2, 1)


def _runs(numbers: Int[Tensor, " n"], real: Bool[Tensor, " n"]) -> list[Int[Tensor, " _"]]:
    """Columns of the real tokens of each document."""
    columns = real.nonzero().squeeze(1)
    if len(columns) == 0:
        return []
    of = numbers[columns]
    lengths = torch.unique_consecutive(of, return_counts=True)[1]
    return list(columns.split(lengths.tolist()))
