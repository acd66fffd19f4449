"""Memorizing Transformer (arXiv 2203.08913) with Transformer-XL memories (arXiv 1901.02860).

Pre-norm blocks of causal attention and a GELU feed-forward; some attentions also search a memory. T5 relative bias on
local attention. The output layer is not tied and has a bias, which ``hidden`` carries as a last feature of ones.

Shifting (ERNIE-Doc, arXiv 2012.15688, equation 3: a layer reads the output of the SAME layer, not its input): with a
shift of s, the i-th layer with a window (a memory) reads that of the (i + s)-th, or of the last, and adds to its own.

Legend: b batch, n sequence, d feature, v vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_mask, check_positive, check_probability, typed
from lm_core.generation.decoding import Filter
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k as top_fraction
from lm_core.losses.losses import linear_cross_entropy
from lm_core.nn.masking import maybe_and_mask
from memorizing_transformer.memory.knn_memory import Backend
from memorizing_transformer.memory.memory_list import CreatesMemories, KNNMemoryList
from memorizing_transformer.memory.ring_storage import StorageFormat
from memorizing_transformer.model.generation_cache import MemoryCache
from memorizing_transformer.model.knn_attention import Gate, MemorizingAttention, outside_graphs, packed, whole_number
from memorizing_transformer.model.layers import Layers
from memorizing_transformer.model.segment import (
    Documents,
    Past,
    XLMemories,
    find_documents,
    past_of_windows,
    remember,
    view_of,
)

# Largest arguments of a stored model: files are not trusted, and buffers of these sizes are allocated.
LARGEST = {
    "num_tokens": 2**24,
    "dim": 2**16,
    "dim_head": 2**12,
    "heads": 2**12,
    "knn_attn_heads": 2**12,
    "ff_mult": 2**8,
    "num_retrieved_memories": 2**16,
    "segment_length": 2**20,
    "xl_max_memories": 2**20,
}


class MemorizingTransformer(CreatesMemories, PretrainedMixin):
    """A causal language model with a kNN memory.

    Args:
        num_tokens: vocabulary size.
        dim: features of the residual stream.
        depth: number of layers.
        dim_head: features of a head.
        heads: query heads.
        knn_attn_heads: query heads of memorizing layers; ``heads`` by default.
        attn_dropout: dropout on attention weights.
        ff_mult: inner features of the feed-forward, as a multiple of ``dim``.
        ff_dropout: dropout in the feed-forward.
        memorizing_layers: layers with a memory, counted from 1; the middle one by default.
        max_knn_memories: capacity of a row's memory in tokens.
        num_retrieved_memories: memories retrieved for each query of each head.
        clear_memories_on_sos_token_id: token that begins a document, where the row's memory is emptied.
        clear_memories_on_eos_token_id: token that ends a document, where the row's memory is emptied.
        knn_memories_directory: folder for memory-mapped memories, which otherwise are on the model's device.
        shift_knn_memories_down: how many memorizing layers farther up the searched memory is; 0 is the layer's own.
        pad_id: padding token, neither seen nor predicted.
        xl_max_memories: tokens in the XL window; 0 for none.
        xl_memory_layers: layers with an XL window, counted from 1; all by default.
        shift_xl_memories_down: how many XL layers farther up the window is that a layer reads; 0 is its own.
        knn_memory_multiprocessing: accepted for compatibility, without effect.
        gate: "softmax" over local and retrieved keys together, or the paper's "sigmoid".
        gate_output: whether memorizing layers keep their plain attention, followed by one to the memory whose tanh gate
            starts at 0, as ``retrofit`` makes them.
        multi_head_keys: whether each head has its own keys and values.
        knn_backend: "exact" search, or an index of "faiss".
        knn_storage: number format of the memory.
        knn_index: factory string of faiss, such as "HNSW32".
        segment_length: tokens that generation and the command ``train`` read at once, before they enter the memory; a
            call of the model itself reads one segment of any length.
        cross_entropy_ignore_index: label that is ignored in the loss.

    Raises:
        ValueError: a size below 1, a layer that does not exist, or an option out of range; it is named.
        TypeError: an argument is of another type.
    """

    # a place on this machine: neither stored nor taken from a file
    directory_argument = "knn_memories_directory"
    local_arguments = frozenset({directory_argument})

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
        # checks
        knn_heads = heads if knn_attn_heads is None else knn_attn_heads
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "dim_head": dim_head, "heads": heads}
        sizes |= {"knn_attn_heads": knn_heads, "ff_mult": ff_mult, "max_knn_memories": max_knn_memories}
        sizes |= {"num_retrieved_memories": num_retrieved_memories, "segment_length": segment_length}
        for name, value in sizes.items():
            check_positive(value, name)
        check_probability(attn_dropout, "attn_dropout")
        check_probability(ff_dropout, "ff_dropout")
        self.xl_max_memories = whole_number(xl_max_memories, "xl_max_memories")
        for name, token in (
            ("clear_memories_on_sos_token_id", clear_memories_on_sos_token_id),
            ("clear_memories_on_eos_token_id", clear_memories_on_eos_token_id),
            ("pad_id", pad_id),
        ):
            if token is not None and not 0 <= token < num_tokens:
                raise ValueError(f"{name} must be a token in [0, {num_tokens}), got {token}")
        middle, every = max(1, depth // 2), range(1, depth + 1)
        self.memorizing_layers = layer_numbers(memorizing_layers, depth, "memorizing_layers", default=middle)
        self.xl_memory_layers = layer_numbers(xl_memory_layers, depth, "xl_memory_layers", default=every)
        if not self.xl_max_memories:
            self.xl_memory_layers = ()

        # attributes that the memories, the caches and the commands read
        self.num_tokens = num_tokens
        self.depth = depth
        self.dim_head = dim_head
        self.max_knn_memories = max_knn_memories
        self.segment_length = segment_length
        self.pad_id = pad_id
        self.sos_id = clear_memories_on_sos_token_id
        self.eos_id = clear_memories_on_eos_token_id
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

        # modules; norms and linear layers have PyTorch's initialisation
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        shared = {"dim_head": dim_head, "dropout": attn_dropout, "multi_head_keys": multi_head_keys}
        self.layers = Layers(
            dim=dim,
            depth=depth,
            memorizing_layers=self.memorizing_layers,
            xl_memory_layers=self.xl_memory_layers,
            shift_knn=whole_number(shift_knn_memories_down, "shift_knn_memories_down"),
            shift_xl=whole_number(shift_xl_memories_down, "shift_xl_memories_down"),
            plain={"heads": heads, **shared},
            memorizing={
                "heads": knn_heads,
                "num_retrieved_memories": num_retrieved_memories,
                "gate_output": gate_output,
                "gate": gate,
                **shared,
            },
            ff_mult=ff_mult,
            ff_dropout=ff_dropout,
        )
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Rejects arguments of a file that exceed ``LARGEST``; see ``PretrainedMixin.check_arguments``."""
        super().check_arguments(arguments)
        for name, largest in LARGEST.items():
            if isinstance(value := arguments.get(name), int | float) and value > largest:
                raise CheckpointError(f"{name} of a stored model must be at most {largest:,}, got {value:,}")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_emb.weight.device

    @property
    def output_weight(self) -> Float[Tensor, "v d1"]:
        """The output layer's weight with its bias as the last column; ``hidden`` has a one there.

        Raises:
            AttributeError: the output layer is wrapped or has hooks, so that only calling it gives the logits.
        """
        layer = self.to_logits
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if type(layer) is not nn.Linear or any(hooks):
            raise AttributeError("to_logits is wrapped or has hooks: logits are not hidden @ output_weight.T")
        return torch.cat((layer.weight, layer.bias.unsqueeze(1)), dim=1)

    def output_layer(self, hidden: Float[Tensor, "*b d1"]) -> Float[Tensor, "*b v"]:
        """Logits of the features of ``hidden``."""
        return self.to_logits(hidden[..., :-1])

    def memory_attentions(self) -> list[MemorizingAttention]:
        """The attentions that search a memory, in order."""
        return [module for module in self.layers.modules() if isinstance(module, MemorizingAttention)]

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
        """Logits ``(b, n, v)``, or with labels the mean loss in nats; with an XL window also the new XL memories.

        One call reads one segment. ``hidden`` reads a longer text as generation does.

        Args:
            x: token ids of one segment.
            knn_memories: memories to search, and then to extend; None for local attention only.
            xl_memories: XL memories returned by the previous call.
            labels: target of each position, ALIGNED with ``x``: nothing is shifted.
            add_knn_memory: whether the memories are extended.
            mask: True at real tokens, for cached and new positions.
            cache: cache of ``init_cache``; ``x`` then has the new tokens only.
            loss_normalizer: divisor of the summed loss, instead of the number of labels.

        Returns:
            ``logits`` or ``loss``; in a model with an XL window and without a cache ``(logits or loss, XLMemories)``.

        Raises:
            ValueError: ids out of range, shapes that do not fit, or memories of another batch or model.
            TypeError: ids or labels are not integers, or the mask is not boolean.
        """
        if labels is not None:
            if labels.shape != x.shape:
                raise ValueError(f"labels must have the shape of x {tuple(x.shape)}, got {tuple(labels.shape)}")
            self._check_ids(labels.masked_fill(labels == self.cross_entropy_ignore_index, 0), "labels")
        features, new = self.read(
            x, mask=mask, cache=cache, knn_memories=knn_memories, xl_memories=xl_memories, add_knn_memory=add_knn_memory
        )
        if labels is None:
            result = self.to_logits(features)
        else:
            result = self.loss(features, labels, normalizer=loss_normalizer)
        return result if new is None else (result, new)

    def hidden(
        self,
        x: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: MemoryCache | None = None,
        knn_memories: KNNMemoryList | None = None,
        **reading: Any,
    ) -> Float[Tensor, "b n d1"]:
        """Features with ``logits = hidden @ output_weight.T``, of a text of any length.

        Without a cache, the text is read as in generation: in segments of the model's ``segment_length``, each of which
        enters a copy of the memories when it is full. So log-probs equal those of generation, also past one segment.
        Gradients stay within a segment. Arguments as for ``read``, which with ``xl_memories`` reads one segment.
        """
        if cache is not None or reading:
            return _with_ones(self.read(x, mask=mask, cache=cache, knn_memories=knn_memories, **reading)[0])
        if x.ndim != 2 or x.shape[1] <= self.segment_length:
            return _with_ones(self.read(x, mask=mask, knn_memories=knn_memories, add_knn_memory=False)[0])
        x, new_mask = self._checked(x, mask, past=0, memories=knn_memories)
        cache = self.init_cache(*x.shape)
        cache.begin(self.token_emb.weight, knn_memories, adds=True)
        return _with_ones(self._read_pieces(x, new_mask, cache))

    def loss(
        self,
        features: Float[Tensor, "b n d"],
        labels: Int[Tensor, "b n"],
        *,
        reduction: Literal["mean", "none"] = "mean",
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats; all logits are materialised only if the output layer is wrapped or has hooks.

        Args:
            features: features of ``read``.
            labels: target of each position.
            reduction: "mean" over the labels, or "none".
            normalizer: divisor of the sum for "mean", instead of the number of labels.
        """
        ignored, labels = self.cross_entropy_ignore_index, labels.long()
        if self.pad_id is not None:
            labels = labels.masked_fill(labels == self.pad_id, ignored)
        weight = getattr(self, "output_weight", None)
        if weight is not None:
            return linear_cross_entropy(
                _with_ones(features), weight, labels, ignore_index=ignored, reduction=reduction, normalizer=normalizer
            )
        logits = self.to_logits(features).transpose(1, 2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")
        if reduction == "none":
            return losses
        return losses.sum() / ((labels != ignored).sum().clamp(min=1) if normalizer is None else normalizer)

    def read(
        self,
        x: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: MemoryCache | None = None,
        knn_memories: KNNMemoryList | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        add_knn_memory: bool = True,
    ) -> tuple[Float[Tensor, "b n d"], XLMemories | None]:
        """Features before the output layer, and the XL memories after the segment; arguments as for ``forward``.

        With a cache, ``knn_memories`` may be passed with the first tokens; they are copied, not changed.
        """
        x, new_mask = self._checked(x, mask, past=0 if cache is None else cache.length, memories=knn_memories)
        if cache is not None:
            if xl_memories is not None:
                raise ValueError("a cache has an XL window of its own: xl_memories must be None")
            cache.check_next(x, mask, knn_memories)
            if cache.length == 0:
                cache.begin(self.token_emb.weight, knn_memories, add_knn_memory)
            cache.length += x.shape[1]
            cache.masked = cache.masked or mask is not None
            # no gradients: a segment that is read in parts would lose those of its earlier parts
            with torch.no_grad():
                return self._read_pieces(x, new_mask, cache), None
        past = past_of_windows(xl_memories, layers=len(self.xl_memory_layers), b=x.shape[0], dim_head=self.dim_head)
        documents = find_documents(x, sos_id=self.sos_id, eos_id=self.eos_id, mask=new_mask)
        features, kept = self._features(x, past, new_mask, documents, knn_memories)
        memories = knn_memories if add_knn_memory else None
        return features, self._remember(kept, past, mask=new_mask, documents=documents, memories=memories)

    @outside_graphs
    def _remember(self, kept: Sequence[Tensor], past: Past, **segment: Any) -> XLMemories | None:
        """Extends the memories by a segment; returns the new XL memories, None without a window."""
        windows, window_mask = remember(self.layers.places(), kept, past, window=self.xl_max_memories, **segment)
        if not self.xl_max_memories:
            return None
        new = XLMemories(packed(window) for window in windows)
        new.mask = window_mask
        return new

    def _read_pieces(self, x: Tensor, mask: Tensor | None, cache: MemoryCache) -> Tensor:
        """Features of new tokens, read into the cache piece by piece; zeros at padding."""
        out = self.token_emb.weight.new_zeros(*x.shape, self.token_emb.embedding_dim)
        for columns, inside in cache.pieces(x, None if mask is None or bool(mask.all()) else mask):
            tokens = x.gather(1, columns)
            before = None if cache.documents is None else cache.documents.open
            documents = find_documents(tokens, sos_id=self.sos_id, eos_id=self.eos_id, mask=inside, before=before)
            features, kept = self._features(tokens, cache.past(), inside, documents, cache.memories)
            cache.append(kept, inside, documents)
            out = out.to(features.dtype)
            if inside is None:
                out.scatter_(1, columns.unsqueeze(-1).expand_as(features), features)
            else:
                out[inside.nonzero()[:, 0], columns[inside]] = features[inside]
        return out

    def _features(
        self, x: Tensor, past: Past, mask: Tensor | None, documents: Documents | None, memories: KNNMemoryList | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features before the output layer, and the new keys and values of each attention."""
        view = view_of(x, past, mask=mask, documents=documents)
        h, kept = self.layers(self.token_emb(x), view=view, past=past, memories=memories)
        return self.norm(h), kept

    def init_cache(
        self, batch_size: int, max_length: int, *, segment_length: int | None = None, static: bool = False
    ) -> MemoryCache:
        """An empty cache for ``batch_size`` rows of any length.

        Args:
            batch_size: batch rows.
            max_length: without effect, as ``static``; ``lm_core.generate`` passes both.
            segment_length: tokens in a segment, after which the memory grows; the model's by default.
            static: without effect: steps are not static.
        """
        length = self.segment_length if segment_length is None else segment_length
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("segment_length", length)):
            check_positive(value, name)
        # on the device even with knn_memories_directory: a cache is temporary
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=len(self.memorizing_layers))
        return MemoryCache(
            places=self.layers.places(),
            batch_size=batch_size,
            segment_length=length,
            window=self.xl_max_memories,
            dim_head=self.dim_head,
            make_memories=partial(create, **self.memory_settings, device=self.device),
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] | None = top_fraction,
        filter_thres: float = 0.9,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        filters: Sequence[Filter] = (),
        eos_id: int | Sequence[int] | None = None,
        pad_id: int = 0,
        knn_memories: KNNMemoryList | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "b new"]:
        """Continues prompts (ids ``(b, n)`` or a list of 1-D tensors) and returns the new ids, padded on the right.

        Args:
            prompt: text to continue.
            max_new_tokens: maximum number of new tokens per row.
            temperature: sampling temperature; 0 takes the most likely token.
            filter_logits_fn: the original's filter, called as ``filter_logits_fn(logits, thres=filter_thres)``, unless
                one of the next four arguments is passed; None for no filter.
            filter_thres: argument of ``filter_logits_fn``.
            top_k, top_p, min_p, filters: as for ``lm_core.generate``.
            eos_id: token or tokens that end a row.
            pad_id: padding after the end of a row.
            knn_memories: memories of earlier text, copied and not changed; None starts with empty ones.
            **kwargs: further arguments of ``lm_core.generate``.
        """
        chosen: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "filters": filters}
        if filter_logits_fn is not None and all(value in (None, ()) for value in chosen.values()):
            chosen["filters"] = (partial(filter_logits_fn, thres=filter_thres),)
        result = generate(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=eos_id,
            pad_id=pad_id,
            knn_memories=knn_memories,
            **chosen,
            **kwargs,
        )
        return result.tokens

    def _checked(
        self, x: Tensor, mask: Tensor | None, *, past: int, memories: KNNMemoryList | None
    ) -> tuple[Tensor, Tensor | None]:
        """Checks the arguments; returns the ids as int64, and a mask of real tokens (None: all)."""
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"x must have shape (b, n) with at least one row and token, got {tuple(x.shape)}")
        (b, n), fresh = x.shape, None
        if mask is not None:
            check_mask(mask, "mask", (b, past + n))
            fresh = mask[:, past:]
        self._check_ids(x, "x")
        if memories is not None:
            self._check_memories(memories, b)
        x = x.long()
        return x, fresh if self.pad_id is None else maybe_and_mask(fresh, x != self.pad_id)

    def _check_memories(self, memories: KNNMemoryList, b: int) -> None:
        sizes = self.dim_head, int(self.memory_settings["heads"])
        if len(memories) != len(self.memorizing_layers):
            raise ValueError(f"knn_memories must have {len(self.memorizing_layers)} memories, got {len(memories)}")
        for index, memory in enumerate(memories):
            if len(memory.scoped_indices) != b:
                raise ValueError(f"knn_memories have {len(memory.scoped_indices)} rows in scope, x has a batch of {b}")
            if (memory.dim, memory.heads) != sizes:
                raise ValueError(
                    f"knn_memories[{index}] must have dim {sizes[0]} and {sizes[1]} key heads, "
                    f"got {memory.dim} and {memory.heads}"
                )

    def _check_ids(self, ids: Tensor, name: str) -> None:
        """Checks the dtype, and the range except on a GPU, where reading values would wait for the device."""
        check_ids(ids[:0] if ids.is_cuda else ids, self.num_tokens, name)


def _with_ones(features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d1"]:
    """Features with a last feature of 1, the factor of the output layer's bias."""
    return F.pad(features, (0, 1), value=1.0)


def layer_numbers(
    layers: int | Sequence[int] | None, depth: int, name: str, *, default: int | Sequence[int]
) -> tuple[int, ...]:
    """Layer numbers in ascending order; raises ``ValueError`` if one does not exist or repeats."""
    layers = default if layers is None else layers
    chosen = (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in chosen if not 1 <= layer <= depth]
    if wrong:
        raise ValueError(f"{name} must be in 1 to {depth}, got {wrong}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} must be different from each other, got {list(chosen)}")
    return tuple(sorted(chosen))
