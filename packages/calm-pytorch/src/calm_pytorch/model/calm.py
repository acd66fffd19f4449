"""CALM, Composition to Augment Language Models (arXiv 2401.02412): a frozen anchor reads frozen augments.

A few cross-attentions between layers of the augments and layers of the anchor are the only weights that are trained.
An augment reads a prompt of its own once (the original implementation's way), or the anchor's own growing sequence (the
paper's), in which case position t of the anchor sees positions up to t of the augment and no later one.

Nothing is attached to the models outside a forward of the composition: hooks live as long as the call.

Legend: b batch, n sequence, m prompt positions, v vocabulary.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm_pytorch.model import adapter_files
from calm_pytorch.model.anchor import Anchor
from calm_pytorch.model.augment import Augment, AugmentParams, device_of
from calm_pytorch.model.blocks import BlocksFunction, attention_heads, freeze_all_layers_
from calm_pytorch.model.composed_lm import AugmentStates, ComposedLM
from calm_pytorch.model.cross_attention import CrossAttentionBlock
from calm_pytorch.model.hooks import HiddenPosition, unchanged_buffers
from calm_pytorch.model.inputs import IGNORED, each_augment, labels_of, real_tokens
from lm_core.causal_lm import eval_mode
from lm_core.checks import check_ids, check_mask, typed
from lm_core.generation.generate import sample
from lm_core.generation.sampling import top_p
from lm_core.losses.losses import linear_cross_entropy


class CALM(nn.Module):
    """An anchor language model composed with augments.

    The augments may be on other devices than the anchor, with which the connections are.

    Args:
        anchor_llm: a Hugging Face causal language model, an x-transformers decoder, or any causal module from ids to
            logits. Its parameters are frozen.
        augment_llms: the models it reads.
        attn_kwargs: options of ``CrossAttentionBlock``; the others keep their defaults (projection, RMSNorm, flash, and
            the anchor's heads).
        anchor_extract_blocks_fn: a function from the anchor to its blocks.
        anchor_transformer_blocks: the anchor's blocks, modules or names, in any order; or the name of a container.
        anchor_hidden_position: "output" changes the stream after a block, "input" before it; one for all, or one each.
        pad_id: marks padding in sequences and prompts; no model sees it.

    Attributes:
        augments: the frozen models that are read.
        cross_attns: the learned part, for each augment one ``CrossAttentionBlock`` for each connection.
        connections: for each augment its 1-indexed ``(augment_layer, anchor_layer)`` pairs.
        gradient_checkpointing: whether the anchor's blocks compute their activations again in the backward pass.

    Raises:
        ValueError: blocks, connections or positions do not fit the models.
        TypeError: the anchor is no causal language model, or an argument has another type.
    """

    @typed
    def __init__(
        self,
        anchor_llm: nn.Module,
        augment_llms: AugmentParams | Sequence[AugmentParams],
        *,
        attn_kwargs: dict[str, Any] | None = None,
        anchor_extract_blocks_fn: BlocksFunction | None = None,
        anchor_transformer_blocks: str | Sequence[nn.Module | str] | None = None,
        anchor_hidden_position: HiddenPosition | Sequence[HiddenPosition] = "output",
        pad_id: int = -1,
    ) -> None:
        super().__init__()
        params = [augment_llms] if isinstance(augment_llms, AugmentParams) else list(augment_llms)
        if not params:
            raise ValueError("augment_llms must hold at least one AugmentParams, got none")
        device = device_of(anchor_llm)
        self.pad_id = pad_id
        self.gradient_checkpointing = False
        # not modules, so that the models are registered once, under their own names
        self._reader = Anchor(
            anchor_llm, anchor_transformer_blocks, anchor_extract_blocks_fn, anchor_hidden_position, device
        )
        dims = self._reader.dims
        depth = len(dims)
        self.augments = tuple(Augment(entry, index, depth) for index, entry in enumerate(params))
        self.connections = [augment.connections for augment in self.augments]
        # the anchor's heads are the default of the cross-attentions
        options: dict[str, Any] = {"flash": True}
        heads = attention_heads(anchor_llm)
        if heads is not None:
            options |= {"heads": heads[0], "dim_head": heads[1]}
        self.attn_kwargs = options | (attn_kwargs or {})
        self.anchor_llm = anchor_llm
        self.augment_llms = nn.ModuleList(entry.model for entry in params)
        self.cross_attns = nn.ModuleList(
            nn.ModuleList(
                CrossAttentionBlock(
                    dim=dims[anchor_layer - 1], dim_context=augment.dims[augment_layer - 1], **self.attn_kwargs
                )
                for augment_layer, anchor_layer in augment.connections
            )
            for augment in self.augments
        ).to(device)
        freeze_all_layers_(self.anchor_llm)
        freeze_all_layers_(self.augment_llms)

    # ----------------------------------------------------------------------------------------------------- the parts

    @property
    def anchor(self) -> Any:
        """The anchor in the protocol of ``lm_core.generation.decoding.CausalLM``."""
        return self._reader.language_model

    @property
    def anchor_blocks(self) -> tuple[nn.Module, ...]:
        """Blocks at which the anchor's stream can be changed, in the order they run in."""
        return self._reader.blocks.modules

    @property
    def can_decode(self) -> bool:
        """True if generation uses caches; otherwise every token runs over the whole sequence."""
        return self.as_causal_lm().decodes

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the cross-attentions, the only ones that are learned."""
        return self.cross_attns.parameters()

    def as_causal_lm(self) -> ComposedLM:
        """This composition for ``lm_core.generate`` and other users of causal LMs; it shares all weights."""
        return ComposedLM(
            self._reader,
            self.augments,
            self.cross_attns,
            pad_id=self.pad_id,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @property
    def wiring(self) -> dict[str, Any]:
        """Connections, positions, widths and attention options, as JSON values; the learned weights depend on them."""
        anchor_layers = [[anchor_layer for _, anchor_layer in pairs] for pairs in self.connections]
        read = [(a, [augment_layer for augment_layer, _ in a.connections]) for a in self.augments]
        positions, dims = self._reader.blocks.positions, self._reader.dims
        return {
            "connections": [[list(pair) for pair in pairs] for pairs in self.connections],
            "shared_sequence": [augment.shared_sequence for augment in self.augments],
            "anchor_hidden_position": [[positions[layer - 1] for layer in layers] for layers in anchor_layers],
            "augment_hidden_position": [[a.positions[layer - 1] for layer in layers] for a, layers in read],
            "anchor_dims": [[dims[layer - 1] for layer in layers] for layers in anchor_layers],
            "augment_dims": [[a.dims[layer - 1] for layer in layers] for a, layers in read],
            "attn_kwargs": json.loads(json.dumps(self.attn_kwargs, default=str, sort_keys=True)),
        }

    def describe(self) -> str:
        """The wiring and the share of added parameters, as text."""
        added = sum(parameter.numel() for parameter in self.trainable_parameters())
        anchor = sum(parameter.numel() for parameter in self.anchor_llm.parameters())
        depth = len(self.anchor_blocks)
        lines = [f"anchor: {type(self.anchor_llm).__name__}, {depth} layers, {anchor:,} parameters"]
        for augment in self.augments:
            count = sum(parameter.numel() for parameter in augment.model.parameters())
            reads = "the anchor's sequence" if augment.shared_sequence else "a prompt"
            lines.append(f"{augment.name}: {augment.depth} layers, {count:,} parameters, reads {reads}")
            lines += [
                f"  layer {augment_layer:>3} ({augment.dims[augment_layer - 1]}) -> anchor layer {anchor_layer:>3} "
                f"({self._reader.dims[anchor_layer - 1]}, {self._reader.blocks.positions[anchor_layer - 1]})"
                for augment_layer, anchor_layer in augment.connections
            ]
        lines.append(f"added: {added:,} parameters, {added / max(anchor, 1):.1%} of the anchor's")
        lines.append(f"generation: {'cached' if self.can_decode else 'uncached'}")
        return "\n".join(lines)

    @typed
    def save_adapter(
        self, directory: str | Path, *, overwrite: bool = False, models: dict[str, Any] | None = None
    ) -> Path:
        """Writes the learned part, the wiring and the names of the models into a folder.

        Args:
            directory: a new or empty folder; with ``overwrite`` also one that holds an adapter, which is replaced
                atomically.
            overwrite: whether an adapter may be replaced.
            models: folder or hub name of the "anchor", and a list of those of the "augments", by which the commands
                find them; by default those that transformers knows.

        Raises:
            FileExistsError: there is something that may not be replaced.
            OSError: the folder cannot be written.
        """
        if models is None:
            names = [_name_of(model) for model in (self.anchor_llm, *self.augment_llms)]
            models = {"anchor": names[0], "augments": names[1:]} if all(names) else {}
        return adapter_files.save_adapter(self.cross_attns, self.wiring, directory, overwrite=overwrite, models=models)

    @typed
    def load_adapter(self, directory: str | Path) -> None:
        """Loads the learned part, strictly; see ``adapter_files.load_adapter``."""
        adapter_files.load_adapter(self.cross_attns, self.wiring, directory)

    # --------------------------------------------------------------------------------------------------- reading, loss

    @typed
    def augment_states(
        self,
        prompt: Tensor | Sequence[Tensor | None] | None,
        prompt_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> AugmentStates:
        """Hidden states of prompts, for any number of calls of ``forward``.

        Args:
            prompt: as for ``forward``.
            prompt_mask: as for ``forward``.

        Raises:
            ValueError: as ``forward``.
        """
        prompts = each_augment(prompt, self.augments, "prompt")
        masks = each_augment(prompt_mask, self.augments, "prompt_mask")
        return self.as_causal_lm().read_prompts(prompts, masks)

    @typed
    def forward(
        self,
        seq: Int[Tensor, "b n"],
        *,
        prompt: Tensor | Sequence[Tensor | None] | None = None,
        prompt_mask: Tensor | Sequence[Tensor | None] | None = None,
        mask: Tensor | None = None,
        return_loss: bool = True,
        anchor_llm_in_train_mode: bool = True,
        alignment: Tensor | Sequence[Tensor | None] | None = None,
        augment_states: AugmentStates | None = None,
        reduction: str = "mean",
    ) -> Float[Tensor, "..."]:
        """The mean cross-entropy of next tokens, or the logits.

        Args:
            seq: token ids; ``pad_id`` marks padding.
            prompt: what the augments read, one for all that read prompts, or one for each augment (None for those
                that share the sequence): ids ``(b, m)``, or floating point ``(b, *input_shape)``.
            prompt_mask: True at real positions of a prompt; by default where ids are not ``pad_id``.
            mask: ``(b, n)``, True at tokens that count in the loss; the others are still read.
            return_loss: False returns logits ``(b, n, v)``.
            anchor_llm_in_train_mode: False keeps the anchor in evaluation mode while the composition trains.
            alignment: ``(b, n, m)``, True where an anchor position may look (``align_by_offsets``); one for all
                augments, or one each.
            augment_states: result of ``augment_states``, instead of ``prompt``.
            reduction: "mean" or "sum" of the loss over counted tokens.

        Raises:
            ValueError: a shape, a number of prompts, or an id does not fit; it is named.
            TypeError: ids are not integers, or a mask is not boolean.
        """
        # check the arguments
        b, n = seq.shape
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if return_loss and n < 2:
            raise ValueError(f"seq must hold at least 2 tokens a row for a loss, got shape {tuple(seq.shape)}")
        if mask is not None:
            check_mask(mask, "mask", (b, n))
        real = real_tokens(seq, None, self.pad_id)
        vocab_size = getattr(self.anchor, "vocab_size", None)
        if vocab_size is not None and seq.device.type == "cpu":
            check_ids(seq if real is None else seq.masked_fill(~real, 0), vocab_size, "seq")
        if augment_states is not None and (prompt is not None or prompt_mask is not None):
            raise ValueError("give prompt or augment_states, not both")
        # the augments read their prompts
        states = self.augment_states(prompt, prompt_mask) if augment_states is None else augment_states
        for augment, hiddens in zip(self.augments, states.hiddens, strict=True):
            if hiddens and hiddens[0].shape[0] != b:
                raise ValueError(f"{augment.name}: prompt must have {b} rows, as seq has, got {hiddens[0].shape[0]}")
        pairs = self._alignment(alignment, states, b, n)
        # the anchor reads the augments; its last token has no label, but may decide rotary frequencies
        composed = self.as_causal_lm()
        inputs, labels = seq, labels_of(seq, mask, self.pad_id) if return_loss else None
        if return_loss and composed.max_cached_length is None:
            inputs = seq[:, :-1]
            real = None if real is None else real[:, :-1]
            pairs = [None if pair is None else pair[:, :-1] for pair in pairs]
        with contextlib.ExitStack() as stack:
            if not anchor_llm_in_train_mode:
                stack.enter_context(eval_mode(self.anchor_llm))
            stack.enter_context(unchanged_buffers(self.anchor_llm))
            # with hidden states the loss needs no logits in memory
            through_hidden = labels is not None and hasattr(self.anchor, "hidden")
            out = composed.read(inputs, mask=real, states=states, alignment=pairs, hidden=through_hidden)
        if labels is None:
            return out
        out = out[:, : labels.shape[1]]
        if through_hidden:
            weight = self.anchor.output_weight
            total = linear_cross_entropy(out, weight, labels, ignore_index=IGNORED, reduction="sum")
        else:
            logits = rearrange(out, "b n v -> (b n) v").float()
            total = F.cross_entropy(logits, rearrange(labels, "b n -> (b n)"), ignore_index=IGNORED, reduction="sum")
        return total if reduction == "sum" else total / (labels != IGNORED).sum().clamp(min=1)

    def _alignment(self, alignment: Any, states: AugmentStates, b: int, n: int) -> list[Tensor | None]:
        each = each_augment(alignment, self.augments, "alignment")
        for augment, pairs, hiddens in zip(self.augments, each, states.hiddens, strict=True):
            if pairs is None:
                continue
            if augment.shared_sequence:
                raise ValueError(f"{augment.name} shares the anchor's sequence: its alignment must be None")
            check_mask(pairs, "alignment", (b, n, hiddens[0].shape[1]))
        return each

    @torch.no_grad()
    @typed
    def generate(
        self,
        prompt: Tensor | Sequence[Tensor | None],
        seq_len: int,
        prompt_mask: Tensor | Sequence[Tensor | None] | None = None,
        filter_fn: Callable[..., Tensor] | None = top_p,
        filter_kwargs: dict[str, Any] | None = None,
        *,
        anchor_prompt: Tensor | None = None,
        temperature: float = 1.0,
        eos_id: int | Sequence[int] | None = None,
        pad_id: int | None = None,
        output_keep_prompt: bool = False,
        filters: Sequence[Callable[[Tensor], Tensor]] = (),
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "b n"]:
        """Continues prompts.

        Args:
            prompt: as for ``forward``; rows of different lengths are padded with ``pad_id`` or have a ``prompt_mask``.
            seq_len: length of the longest row, prompt included.
            prompt_mask: True at real positions.
            filter_fn: called as ``filter_fn(logits, **filter_kwargs)``; None for no filter. The default is not used if
                ``top_k``, ``top_p`` or ``min_p`` is passed.
            filter_kwargs: ``thres=0.9`` by default.
            anchor_prompt: ids ``(b, n)`` the anchor continues, padded with ``pad_id``; by default the first prompt of
                token ids.
            temperature: 0 takes the most likely token.
            eos_id: token or tokens that end a row.
            pad_id: fills rows after their end; by default this model's.
            output_keep_prompt: whether rows begin with their prompt.
            filters: own functions ``(b, v) -> (b, v)``, one after the other, instead of ``filter_fn``.
            use_cache: False runs over the whole sequence for each token.
            generator: source of randomness.
            **kwargs: further arguments of ``lm_core.generate``, such as ``top_k``, ``top_p`` and ``min_p``.

        Returns:
            Right-padded ids.

        Raises:
            ValueError: as ``forward`` and ``lm_core.sample``.
        """
        rows, inputs = self._generation_inputs(prompt, prompt_mask, anchor_prompt)
        is_default = filter_fn is top_p and filter_kwargs is None
        if filters or (is_default and kwargs.keys() & {"top_k", "top_p", "min_p"}):
            filter_fn = None
        return sample(
            self.as_causal_lm(),
            rows,
            seq_len,
            temperature=temperature,
            filter_fn=filter_fn,
            filter_kwargs=filter_kwargs,
            filters=filters,
            pad_id=self.pad_id if pad_id is None else pad_id,
            eos_id=eos_id,
            output_keep_prompt=output_keep_prompt,
            use_cache=use_cache,
            generator=generator,
            **inputs,
            **kwargs,
        )

    def _generation_inputs(
        self, prompt: Any, prompt_mask: Any, anchor_prompt: Tensor | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The rows the anchor continues, without padding, and the further arguments of ``ComposedLM``.

        Raises:
            ValueError: no ids are given to continue, or a prompt has another number of rows.
        """
        prompts = each_augment(prompt, self.augments, "prompt", shared_too=anchor_prompt is None)
        masks = each_augment(prompt_mask, self.augments, "prompt_mask", shared_too=anchor_prompt is None)
        start, start_mask = anchor_prompt, None
        if start is None:
            ids = [(p, m) for p, m in zip(prompts, masks, strict=True) if p is not None and not p.is_floating_point()]
            if not ids:
                raise ValueError("anchor_prompt must be given where no augment reads token ids, got None")
            start, start_mask = ids[0]
        if start_mask is not None:
            check_mask(start_mask, "prompt_mask", start.shape)
        real = real_tokens(start, start_mask, self.pad_id)
        rows = list(start) if real is None else [row[keep] for row, keep in zip(start, real, strict=True)]
        inputs: dict[str, Tensor] = {}
        device = device_of(self.anchor_llm)
        for index, (augment, read, mask) in enumerate(zip(self.augments, prompts, masks, strict=True)):
            if augment.shared_sequence or read is None:
                continue
            if read.shape[0] != len(rows):
                raise ValueError(f"{augment.name}: prompt must have {len(rows)} rows, got {read.shape[0]}")
            inputs[f"prompt_{index}"] = read.to(device)
            visible = real_tokens(read, mask, self.pad_id)
            if visible is not None:
                inputs[f"prompt_mask_{index}"] = visible.to(device)
        return rows, inputs


def _name_of(model: Any) -> str | None:
    """Folder or hub name that a transformers model was loaded from."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
