"""PaLM (arXiv 2204.02311): parallel blocks with multi-query attention, SwiGLU, rotary positions and no biases.

Beyond the paper: xPos (arXiv 2212.10554) by default, grouped key/value heads, normalised queries and keys, LoRA scopes
that share one frozen base, and non-causal use as an encoder. The output layer is tied to the embedding.

Legend: b batch, n sequence, d feature, v vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checkpoints.weights import load_state_file
from lm_core.checks import check_ids, check_positive, check_probability, typed
from lm_core.generation.decoding import prompt_rows
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k
from lm_core.losses.losses import linear_cross_entropy
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.masking import maybe_and_mask, right_pad
from lm_core.nn.norms import LayerNorm
from lm_core.nn.parallel_block import ParallelBlock, Positions, called, called_as_constant
from lm_core.nn.rotary import RotaryEmbedding
from palm_rlhf.model.cache import PaLMCache
from palm_rlhf.model.inputs import as_matrix, check_extra_embed, check_inputs, for_all_positions, is_same_everywhere
from palm_rlhf.model.lora import (
    ATTENTION_TARGETS,
    LoRAScope,
    LoRASettings,
    MergedScope,
    lora_settings,
    target_dims,
    target_weights,
)

# Greatest rank (or the model's features, if more) and number of scopes in a checkpoint.
_MOST_LORA = 1024


class PaLM(PretrainedMixin):
    """PaLM: a causal language model, or a bidirectional encoder with causal=False.

    Args:
        dim: features of the residual stream.
        num_tokens: vocabulary size.
        depth: number of blocks.
        causal: restricts attention to a position itself and earlier ones.
        dim_head: features of a head; even.
        heads: query heads.
        kv_heads: key/value heads; 1 is multi-query attention (arXiv 1911.02150). Divides ``heads``.
        ff_mult: inner features of the feed-forward, as a multiple of ``dim``.
        attn_dropout: dropout on attention weights.
        ff_dropout: dropout on the feed-forward's inner features.
        qk_rmsnorm: L2-normalises queries and keys before the product, with learned gains and the scale ``qk_scale``.
        qk_scale: scale of the scores with ``qk_rmsnorm``.
        lora_r: default rank of fine-tuning scopes.
        rotary_xpos_scale_base: positions over which xPos decays by one power.
        use_xpos: xPos decay of attention with distance (causal models only).
        flash_attn: accepted for compatibility; the fastest kernel that fits is always chosen.
        finetune_scopes: names of LoRA scopes to add.
        cross_entropy_ignore_index: label that is excluded from the loss.
        gradient_checkpointing: recomputes blocks in the backward to save memory.

    Raises:
        ValueError: a size is below 1, ``dim_head`` is odd, or ``kv_heads`` does not divide ``heads``.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        depth: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int = 1,
        ff_mult: int = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8.0,
        lora_r: int = 8,
        rotary_xpos_scale_base: float = 512.0,
        use_xpos: bool = True,
        flash_attn: bool = True,
        finetune_scopes: Sequence[str] = (),
        cross_entropy_ignore_index: int = -100,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # check arguments before any weight is allocated
        if not 0 < qk_scale < math.inf:
            raise ValueError(f"qk_scale must be positive, got {qk_scale}")
        check_probability(attn_dropout, "attn_dropout")
        check_probability(ff_dropout, "ff_dropout")
        if isinstance(finetune_scopes, str):
            raise TypeError(f"finetune_scopes must be a list of names, got the text {finetune_scopes!r}")
        check_positive(ff_mult, "ff_mult")
        self.dim = dim
        self.num_tokens = num_tokens
        self.depth = depth
        self.causal = causal
        self.dim_head = dim_head
        self.heads = heads
        self.kv_heads = kv_heads
        self.lora_r = lora_r
        for name in ("dim", "num_tokens", "depth", "dim_head", "heads", "kv_heads", "lora_r"):
            check_positive(getattr(self, name), name)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
        self.cross_entropy_ignore_index = cross_entropy_ignore_index
        self.gradient_checkpointing = gradient_checkpointing

        # modules; the output layer is the embedding
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.rotary = RotaryEmbedding(dim_head, use_xpos=use_xpos and causal, scale_base=float(rotary_xpos_scale_base))
        self.layers = nn.ModuleList(
            ParallelBlock(
                dim=dim,
                dim_head=dim_head,
                heads=heads,
                kv_heads=kv_heads,
                ff_mult=ff_mult,
                causal=causal,
                attn_dropout=attn_dropout,
                ff_dropout=ff_dropout,
                qk_norm=qk_rmsnorm,
                qk_scale=float(qk_scale),
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim)
        self.finetune_modules = nn.ModuleDict()
        self.init_weights()
        for scope in finetune_scopes:
            self.add_finetune_params(scope)

    def init_weights(self) -> None:
        """Draws all base weights.

        | weight | distribution |
        |---|---|
        | token_emb (tied output) | normal, std 0.02 |
        | proj_in, both parts of proj_out | uniform in +-1/sqrt(fan in of the part) |
        | norms, q_scale, k_scale | one |
        """
        nn.init.normal_(self.token_emb.weight, std=0.02)
        for block in self.blocks():
            attn_out, ff_out = block.proj_out.weight.data.split((block.attn_dim, block.ff_dim), dim=1)
            for weight in (block.proj_in.weight.data, attn_out, ff_out):
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def blocks(self) -> Iterator[ParallelBlock]:
        """The model's blocks in order."""
        return iter(self.layers)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_emb.weight.device

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """The output layer's weight, which is the embedding's."""
        return self.token_emb.weight

    # ---------------------------------------------------------------- forward

    def hidden(
        self,
        x: Integer[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: PaLMCache | None = None,
        finetune_scope: str | None = None,
        disable_lora: bool = False,
        extra_embed: Float[Tensor, "..."] | None = None,
        document_ids: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Normalised features before the output layer; ``logits = hidden @ output_weight.T``.

        Args:
            x: token ids. Without ``causal``, negative ids are masked.
            mask: True at real tokens, of cached and new positions.
            cache: cache of ``init_cache``; ``x`` then holds the new tokens only. It stores the scope it was filled
                with, which later calls may omit.
            finetune_scope: LoRA scope to use; the base then takes no gradient.
            disable_lora: ignores ``finetune_scope``.
            extra_embed: embedding added to the token embeddings, broadcast.
            document_ids: positions attend only to positions with the same number (packed documents).

        Raises:
            ValueError: ids out of range, a shape that does not fit, an unknown scope, or a cache with ``causal=False``.
            TypeError: ids are no integers, or the mask is not boolean.
        """
        check_inputs(x, mask=mask, cache=cache, document_ids=document_ids, causal=self.causal)
        check_extra_embed(extra_embed, (*x.shape, self.dim))
        # LoRA scope and extra embedding: given, or those of the cache
        past = 0 if cache is None else cache.past
        scope = None if disable_lora else finetune_scope
        if cache is not None and past > 0:
            scope, extra_embed = cache.recalled(scope, disable_lora, extra_embed)
        lora = None if scope is None else self.scope_modules(scope)
        x = x if x.dtype in (torch.int64, torch.int32) else x.long()  # bytes of a corpus come as uint8
        if not self.causal:
            mask = maybe_and_mask(mask, x >= 0)
            x = x.clamp(min=0)

        # embeddings, positions and masks
        call = called if lora is None else called_as_constant
        h = self._embed(x, call)
        if extra_embed is not None:
            h = h + extra_embed.to(h.dtype)
        positions = Positions.of(self.rotary, h, cache=cache, mask=mask)
        if document_ids is not None:
            same = rearrange(document_ids, "b i -> b 1 i 1") == rearrange(document_ids, "b j -> b 1 1 j")
            visible = same if mask is None else same & rearrange(mask, "b j -> b 1 1 j")
            positions = replace(positions, mask=visible)
        # blocks; those of a scope get their adapters
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks()):
            adapters = None if lora is None else lora[layer]
            if recompute:
                h = checkpoint(block, h, positions, adapters=adapters, use_reentrant=False)
            else:
                h = block(h, positions, cache=cache, layer=layer, adapters=adapters)
        if cache is not None:
            if past == 0:
                cache.remember(scope, extra_embed)
            cache.masked = mask is not None
            cache.advance(x.shape[1])
        return call(self.norm, h)

    def forward(
        self,
        x: Integer[Tensor, "b n"],
        return_loss: bool = False,
        disable_lora: bool = False,
        finetune_scope: str | None = None,
        extra_embed: Float[Tensor, "..."] | None = None,
        return_only_embedding: bool = False,
        return_logits_with_embedding: bool = False,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: PaLMCache | None = None,
        *,
        document_ids: Int[Tensor, "b n"] | None = None,
        loss_normalizer: float | Tensor | None = None,
    ) -> Any:
        """Logits ``(b, n, v)``, or the outputs that the flags select.

        Args:
            x: token ids.
            return_loss: mean cross-entropy of each token given those before it, in nats per token.
            disable_lora: see ``hidden``.
            finetune_scope: see ``hidden``.
            extra_embed: see ``hidden``.
            return_only_embedding: returns the features of ``hidden`` instead of logits.
            return_logits_with_embedding: returns ``(logits, features)``.
            mask: see ``hidden``; padding is excluded from the loss.
            cache: see ``hidden``.
            document_ids: see ``hidden``; the first token of a document is excluded from the loss.
            loss_normalizer: divisor of the summed loss in place of the number of tokens (means over several batches).

        Raises:
            ValueError: see ``hidden``; also ``return_loss`` with ``causal=False``, a cache or one token.
        """
        settings: dict[str, Any] = {
            "disable_lora": disable_lora,
            "finetune_scope": finetune_scope,
            "extra_embed": extra_embed,
        }
        if return_loss:
            return self._loss(x, mask, cache, document_ids, loss_normalizer, settings)
        features = self.hidden(x, mask=mask, cache=cache, document_ids=document_ids, **settings)
        if return_only_embedding:
            return features
        # the tied output layer belongs to the base, which takes no gradient while a scope is used
        frozen = finetune_scope is not None and not disable_lora
        logits = F.linear(features, self.output_weight.detach() if frozen else self.output_weight)
        return (logits, features) if return_logits_with_embedding else logits

    def init_cache(self, batch_size: int, max_length: int, *, static: bool = False) -> PaLMCache:
        """An empty cache for ``batch_size`` rows with room for ``max_length`` tokens.

        Args:
            batch_size: batch rows.
            max_length: positions to allocate memory for.
            static: True for a cache of fixed capacity; see ``lm_core.nn.kv_cache.KVCache``.

        Raises:
            ValueError: the model is not causal.
        """
        if not self.causal:
            raise ValueError("a cache needs a causal model, got causal=False")
        return PaLMCache(layers=self.depth, batch_size=batch_size, max_length=max_length, static=static)

    # ------------------------------------------------------------- generation

    @typed
    def generate(
        self,
        seq_len: int | None = None,
        prompt: Any = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] | None = top_k,
        filter_thres: float = 0.9,
        pad_value: float | int = 0,
        eos_token: int | None = None,
        return_seq_without_prompt: bool = True,
        use_tqdm: bool = False,
        *,
        max_new_tokens: int | None = None,
        mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> Int[Tensor, "..."]:
        """Samples token ids after ``prompt``, right-padded.

        Args:
            seq_len: total length, the (longest) prompt included.
            prompt: ids ``(..., n)`` with any leading dimensions, or a list of 1-D tensors; None starts with a random
                token, which is part of the result.
            temperature: divisor of the logits, before the filter; 0 takes the most likely token.
            filter_logits_fn: filter, called as ``filter_logits_fn(logits, thres=filter_thres)``; None for none.
            filter_thres: threshold passed to ``filter_logits_fn``.
            pad_value: id that fills rows after their end (alias ``pad_id``).
            eos_token: id that ends a row (alias ``eos_id``).
            return_seq_without_prompt: False returns each row's prompt and response.
            use_tqdm: shows a progress bar.
            max_new_tokens: maximum number of new tokens, in place of ``seq_len``.
            mask: True at real tokens of a padded ``prompt``.
            prompt_lengths: lengths of a right-padded ``prompt``.
            eos_id: see ``eos_token``.
            pad_id: see ``pad_value``.
            generator: source of randomness.
            use_cache: False recomputes the whole sequence for each token.
            **kwargs: ``finetune_scope``, ``disable_lora``, ``extra_embed`` for the model, ``min_new_tokens``,
                ``repetition_penalty`` and ``compile`` for ``lm_core.generation.generate.generate``.

        Returns:
            ``(..., new)`` ids, with the leading dimensions of ``prompt``.

        Raises:
            ValueError: no or both lengths, a prompt as long as ``seq_len``, ids out of range; see also ``lm_core``.
        """
        if prompt is None:
            prompt = torch.randint(self.num_tokens, (1, 1), device=self.device, generator=generator)
            return_seq_without_prompt = False
        if not self.causal:
            raise ValueError("generation needs a causal model, got causal=False")
        # prompts as rows of their own lengths
        leading: tuple[int, ...] | None = None
        if isinstance(prompt, Tensor) and prompt.ndim > 0:
            leading = tuple(prompt.shape[:-1])
            prompt, mask = as_matrix(prompt), None if mask is None else as_matrix(mask)
            prompt_lengths = None if prompt_lengths is None else prompt_lengths.reshape(-1)
        rows = prompt_rows(prompt, mask, prompt_lengths)
        # the number of new tokens
        longest = max(row.shape[0] for row in rows)
        if (seq_len is None) == (max_new_tokens is None):
            raise ValueError(f"give seq_len or max_new_tokens, got {seq_len} and {max_new_tokens}")
        if max_new_tokens is None:
            assert seq_len is not None
            if seq_len <= longest:
                raise ValueError(f"seq_len must exceed the prompt's length {longest}, got {seq_len}")
            max_new_tokens = seq_len - longest
        if kwargs.get("extra_embed") is not None:
            kwargs["extra_embed"] = for_all_positions(kwargs["extra_embed"], len(rows), self.dim)
        pad_id = int(pad_value) if pad_id is None else pad_id
        result = generate(
            self,
            rows,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            filters=() if filter_logits_fn is None else (partial(filter_logits_fn, thres=filter_thres),),
            eos_id=eos_token if eos_id is None else eos_id,
            pad_id=pad_id,
            generator=generator,
            use_cache=use_cache,
            progress=use_tqdm,
            **kwargs,
        )
        # optional prompts, and the leading dimensions of the prompt
        tokens = result.tokens
        if not return_seq_without_prompt:
            whole = [
                torch.cat((row.to(tokens), response[:length]))
                for row, response, length in zip(rows, tokens, result.lengths.tolist(), strict=True)
            ]
            tokens, _ = right_pad(whole, pad_id)
        return tokens if leading is None else tokens.reshape(*leading, -1)

    # ------------------------------------------------------------- LoRA scopes

    @typed
    def add_finetune_params(
        self,
        scope: str,
        lora_r: int | None = None,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_rank_stabilized: bool = False,
        lora_targets: Sequence[str] = ATTENTION_TARGETS,
    ) -> None:
        """Adds a LoRA scope, whose initial output is zero.

        Args:
            scope: name of the scope.
            lora_r: rank, by default the model's ``lora_r``.
            lora_alpha: numerator of the scale; the rank by default.
            lora_dropout: dropout on the adapters' inputs, in training mode.
            lora_rank_stabilized: scales by ``alpha / sqrt(r)`` instead of ``alpha / r``.
            lora_targets: adapted matrices, out of ``q k v o ff_in ff_out``.

        Raises:
            ValueError: the scope exists, or a setting is out of range.
        """
        settings = lora_settings(
            r=self.lora_r if lora_r is None else lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            rank_stabilized=lora_rank_stabilized,
            targets=lora_targets,
        )
        self.add_scope(scope, settings)

    def remove_finetune_params(self, scope: str) -> LoRAScope:
        """Removes a scope and returns its modules.

        Raises:
            ValueError: there is no such scope.
        """
        removed = self.scope_modules(scope)
        del self.finetune_modules[scope]
        return removed

    def merge_finetune_params(self, scope: str) -> MergedScope:
        """Adds a scope's weights to the base and removes the scope.

        Returns:
            The argument of ``unmerge_finetune_params``, which undoes the merge up to rounding.

        Raises:
            ValueError: there is no such scope.
        """
        modules = self.remove_finetune_params(scope)
        self._add_deltas(modules, 1.0)
        return MergedScope(scope, modules)

    def unmerge_finetune_params(self, merged: MergedScope) -> None:
        """Subtracts a merged scope from the base and adds it as a scope.

        Raises:
            ValueError: a scope of this name has been added since.
        """
        if merged.scope in self.finetune_modules:
            raise ValueError(f"finetune scope {merged.scope!r} exists already; remove it before unmerging")
        self._add_deltas(merged.modules, -1.0)
        self.finetune_modules[merged.scope] = merged.modules.train(self.training)

    def palm_parameters(self) -> list[nn.Parameter]:
        """Parameters of the base without those of scopes, in a fixed order."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("finetune_modules.")]

    def finetune_parameters(self, scope: str = "default") -> Iterator[nn.Parameter]:
        """A scope's parameters.

        Raises:
            ValueError: there is no such scope.
        """
        return self.scope_modules(scope).parameters()

    def scope_modules(self, scope: str) -> LoRAScope:
        """The adapters of a scope.

        Raises:
            ValueError: there is no such scope.
        """
        if scope not in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r} not found; there are {list(self.finetune_modules)}")
        modules: LoRAScope = self.finetune_modules[scope]  # type: ignore[assignment]
        return modules

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Also bounds LoRA scopes, which are built before the file's weights are compared with the model's.

        Raises:
            CheckpointError: an argument is out of bounds; the message names it.
        """
        super().check_arguments(arguments)
        dim = arguments.get("dim")
        widest = max(_MOST_LORA, dim if isinstance(dim, int) else 0)
        scopes, r = arguments.get("finetune_scopes", ()), arguments.get("lora_r", 0)
        if isinstance(r, int) and r > widest:
            raise CheckpointError(f"lora_r must be at most {widest}, got {r}")
        _check_number_of_scopes(next(iter(scopes.values()), ()) if isinstance(scopes, Mapping) else scopes)

    def config_state(self) -> dict[str, Any]:
        """The scopes and their settings, for checkpoints; their weights are in the state dict."""
        settings = {scope: asdict(self.scope_modules(scope).settings) for scope in list(self.finetune_modules)}
        entries = [{"scope": scope, **entry, "targets": list(entry["targets"])} for scope, entry in settings.items()]
        return {"finetune_scopes": entries}

    def apply_config_state(self, state: dict[str, Any]) -> None:
        """Replaces the scopes by those of ``config_state``; their weights are loaded afterwards."""
        if "finetune_scopes" not in state:
            return
        _check_number_of_scopes(state["finetune_scopes"])
        for scope in list(self.finetune_modules):
            self.remove_finetune_params(scope)
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            for entry in state["finetune_scopes"]:
                settings = dict(entry)
                self.add_scope(settings.pop("scope"), lora_settings(**settings))

    def add_scope(self, scope: str, settings: LoRASettings) -> LoRAScope:
        """``add_finetune_params`` with checked settings; returns the new scope's modules.

        Raises:
            ValueError: the scope exists, or its name is not valid.
        """
        if scope in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r} exists already; there are {list(self.finetune_modules)}")
        # torch keeps submodules and methods of a module under one namespace
        if not scope or "." in scope or hasattr(self.finetune_modules, scope):
            raise ValueError(f"scope must be a non-empty name without dots and no attribute of modules, got {scope!r}")
        modules = LoRAScope(depth=self.depth, dims=target_dims(next(self.blocks())), settings=settings)
        self.finetune_modules[scope] = modules.to(self.token_emb.weight).train(self.training)
        return modules

    @torch.no_grad()
    def _add_deltas(self, modules: LoRAScope, sign: float) -> None:
        for block, adapters in zip(self.blocks(), modules.blocks(), strict=True):
            weights = target_weights(block)
            for target, adapter in adapters.by_target().items():
                weights[target] += sign * adapter.delta()

    # -------------------------------------------------------- dropout and files

    def set_dropout(self, dropout: float) -> "PaLM":
        """Sets attention and feed-forward dropout everywhere; returns self.

        Raises:
            ValueError: ``dropout`` is not in [0, 1).
        """
        check_probability(dropout, "dropout")
        for block in self.blocks():
            block.ff_dropout = dropout
            block.attention.dropout = dropout
        return self

    def load(self, path: str | Path) -> None:
        """Loads a state dict file of the original package, or of this one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or its weights belong to another architecture.
        """
        load_state_file(self, path)

    def _loss(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        document_ids: Tensor | None,
        normalizer: float | Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        if not self.causal:
            raise ValueError("return_loss needs a causal model, got causal=False")
        if cache is not None:
            raise ValueError("return_loss scores whole sequences: cache must be None")
        if x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f"return_loss needs at least two tokens a row, got shape {tuple(x.shape)}")
        check_inputs(x, mask=mask, cache=cache, document_ids=document_ids, causal=self.causal)
        if not x.is_cuda:
            check_ids(x, self.num_tokens, "x")
        # the last position predicts nothing, so its extra embedding is not used
        extra_embed = settings["extra_embed"]
        if extra_embed is not None and not is_same_everywhere(extra_embed):
            check_extra_embed(extra_embed, (*x.shape, self.dim))
            settings = {**settings, "extra_embed": extra_embed[..., :-1, :]}
        # exclude padding, and pairs of tokens from different documents
        labels = x[:, 1:].long()
        counts = None if mask is None else mask[:, 1:] & mask[:, :-1]
        if document_ids is not None:
            counts = maybe_and_mask(counts, document_ids[:, 1:] == document_ids[:, :-1])
        if counts is not None:
            labels = labels.masked_fill(~counts, self.cross_entropy_ignore_index)
        features = self.hidden(
            x[:, :-1],
            mask=None if mask is None else mask[:, :-1],
            document_ids=None if document_ids is None else document_ids[:, :-1],
            **settings,
        )
        frozen = settings["finetune_scope"] is not None and not settings["disable_lora"]
        weight = self.output_weight.detach() if frozen else self.output_weight
        ignore_index = self.cross_entropy_ignore_index
        return linear_cross_entropy(features, weight, labels, ignore_index=ignore_index, normalizer=normalizer)

    def _embed(self, x: Tensor, call: Callable[[nn.Module, Tensor], Any]) -> Tensor:
        try:
            return call(self.token_emb, x)
        except IndexError:
            check_ids(x, self.num_tokens, "x")
            raise


def _check_number_of_scopes(scopes: Any) -> None:
    if isinstance(scopes, list | tuple) and len(scopes) > _MOST_LORA:
        raise CheckpointError(f"finetune_scopes must be at most {_MOST_LORA}, got {len(scopes)}")
