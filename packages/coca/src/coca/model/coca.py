"""CoCa, Contrastive Captioners (arXiv 2205.01917): a contrastive and a captioning loss from one forward.

The lower half of the text decoder is unimodal and ends in a CLS embedding for the contrastive loss; the upper half also
attends to pooled image tokens and predicts the next token. Both losses come from one pass over the text.

Deviations from the paper: parallel blocks, multi-query attention and rotary positions, as in the original code; the
whole text is embedded for the contrastive loss, its last token included, in training and in inference. With
``block="sequential"`` the decoder is open_clip's: pre-norm blocks with biases, multi-head attention, learned positions,
and an output layer of its own.

Legend: b batch, n text tokens, m image tokens, q captioning tokens, d feature, l latent feature, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca.model.attentional_pooling import AttentionalPooling, Pooling
from coca.model.contrastive import global_mean, sigmoid_contrastive_loss, softmax_contrastive_loss
from coca.model.cross_attention import CoCaCache, MultimodalLayer
from coca.model.image_encoders import ImageEncoder, token_width
from coca.model.preprocessing import ImagePreprocessing
from coca.model.sequential_block import Activation, SequentialBlock
from coca.model.text_layout import IGNORED, TextLayout, encode_captions, layout_of
from lm_core.causal_lm import eval_mode
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_ids, check_mask, check_positive, typed
from lm_core.distributed import all_reduce_sum
from lm_core.generation.beam_search import beam_search
from lm_core.generation.decoding import Filter, prompt_rows, without_tokens
from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of
from lm_core.losses.losses import linear_cross_entropy
from lm_core.nn.masking import positions_from_mask, right_pad
from lm_core.nn.norms import LayerNorm, l2norm
from lm_core.nn.parallel_block import ParallelBlock, Positions
from lm_core.nn.rotary import RotaryEmbedding


@dataclass(frozen=True)
class CoCaLoss:
    """The losses of one forward, in nats.

    Attributes:
        total: weighted sum of both, to call ``backward`` on.
        caption: mean over the predicted tokens of all processes.
        contrastive: mean over the pairs of all processes.
    """

    total: Float[Tensor, ""]
    caption: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]


@dataclass(frozen=True)
class PairStates:
    """What the losses of matching texts and images are computed from.

    Attributes:
        image_latents: L2-normalised, ``(b, l)``.
        text_latents: L2-normalised, ``(b, l)``.
        hidden: features before the output layer at positions 0 to n-2; None if only latents were asked for.
        targets: labels of these positions, -100 where nothing is predicted.
    """

    image_latents: Float[Tensor, "b l"]
    text_latents: Float[Tensor, "b l"]
    hidden: Float[Tensor, "b n_minus_1 d"] | None
    targets: Int[Tensor, "b n_minus_1"]


class CoCa(PretrainedMixin):
    """Contrastive captioner: latents of images and texts to compare, and captions of images.

    Args:
        dim: features of the decoder.
        num_tokens: vocabulary size.
        unimodal_depth: layers that see text only.
        multimodal_depth: layers that also see the image.
        dim_latents: features of the latents; ``dim`` by default.
        image_dim: features of the image tokens; by default the width that ``img_encoder`` declares, else ``dim``.
        num_img_queries: image tokens that the decoder sees after pooling.
        dim_head: features of a head, an even number.
        heads: query heads.
        ff_mult: feed-forward inner features over ``dim``.
        img_encoder: module from images to tokens; see ``coca.model.image_encoders``. None for precomputed tokens.
        caption_loss_weight: factor of the captioning loss.
        contrastive_loss_weight: factor of the contrastive loss.
        pad_id: id of the padding after a text.
        pooling: "shared" (one attention for all queries, as in the original code), "parallel" or "cascade" (one pooler
            for each task, as in the paper).
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP) contrastive loss.
        init_logit_scale: factor of the similarities at the start; by default 1 / 0.07, or 10 for "sigmoid".
        max_logit_scale: upper bound of the similarities' factor.
        init_logit_bias: initial bias of the scores of the "sigmoid" loss.
        bos_id: token that begins a caption, for ``generate`` without a prefix.
        eos_id: token that ends a caption; may be ``pad_id``.
        freeze_img_encoder: keeps the encoder without gradient and in evaluation mode.
        gradient_checkpointing: recomputes the decoder's layers in the backward to save memory.
        block: "parallel" (the original code's layers) or "sequential" (open_clip's).
        max_text_length: largest number of tokens, for the learned positions of sequential blocks.
        pool_heads: heads of the pooling of sequential models; ``heads`` by default.
        activation: "gelu" or "quick_gelu", for sequential blocks.
        legacy_cls_mask: CLS of a sequential model also attends to the first padding token and not to itself, as in
            open_clip's published weights (``correct_cls_mask`` false).

    Raises:
        ValueError: a size is below 1, an id is not below ``num_tokens``, a scale is not positive, or the encoder
            declares another width of its tokens than ``image_dim``; a sequential model has no ``max_text_length``, or a
            parallel one has one.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        unimodal_depth: int,
        multimodal_depth: int,
        dim_latents: int | None = None,
        image_dim: int | None = None,
        num_img_queries: int = 256,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        img_encoder: nn.Module | None = None,
        caption_loss_weight: float = 1.0,
        contrastive_loss_weight: float = 1.0,
        pad_id: int = 0,
        pooling: Pooling = "shared",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        init_logit_scale: float | None = None,
        max_logit_scale: float = 100.0,
        init_logit_bias: float = -10.0,
        bos_id: int | None = None,
        eos_id: int | None = None,
        freeze_img_encoder: bool = False,
        gradient_checkpointing: bool = False,
        block: Literal["parallel", "sequential"] = "parallel",
        max_text_length: int | None = None,
        pool_heads: int | None = None,
        activation: Activation = "gelu",
        legacy_cls_mask: bool = False,
    ) -> None:
        super().__init__()
        # Derive what was left out, and check every size before anything is built.
        dim_latents = dim if dim_latents is None else dim_latents
        width = token_width(img_encoder)
        if image_dim is None:
            image_dim = dim if width is None else width
        sizes = {"unimodal_depth": unimodal_depth, "multimodal_depth": multimodal_depth, "dim_latents": dim_latents}
        sizes |= {"num_img_queries": num_img_queries, "dim_head": dim_head, "heads": heads, "ff_mult": ff_mult}
        for name, value in {"dim": dim, "num_tokens": num_tokens, "image_dim": image_dim, **sizes}.items():
            check_positive(value, name)
        if width is not None and width != image_dim:
            raise ValueError(f"image_dim must be the width of img_encoder's tokens, {width}, got {image_dim}")
        for name, value_id in (("pad_id", pad_id), ("bos_id", bos_id), ("eos_id", eos_id)):
            if value_id is not None and not 0 <= value_id < num_tokens:
                raise ValueError(f"{name} must be a token id in [0, {num_tokens}), got {value_id}")
        sequential = block == "sequential"
        if sequential != (max_text_length is not None):
            raise ValueError(
                f"max_text_length must be given for sequential blocks and for no others, got {max_text_length}"
            )
        pool_heads = heads if pool_heads is None else pool_heads
        check_positive(pool_heads, "pool_heads")
        if max_text_length is not None:
            check_positive(max_text_length, "max_text_length")
        if sequential and dim % pool_heads:
            raise ValueError(f"pool_heads must divide dim = {dim}, got {pool_heads}")
        for name, weight in (("caption", caption_loss_weight), ("contrastive", contrastive_loss_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}_loss_weight must be a finite number of at least 0, got {weight}")
        if init_logit_scale is None:
            init_logit_scale = 10.0 if loss == "sigmoid" else 1 / 0.07
        if not 0 < init_logit_scale <= max_logit_scale < math.inf:
            raise ValueError(
                f"init_logit_scale must be in (0, max_logit_scale = {max_logit_scale}], got {init_logit_scale}"
            )

        self.dim = dim
        self.num_tokens = num_tokens
        self.image_dim = image_dim
        self.pad_id = pad_id
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.caption_loss_weight = caption_loss_weight
        self.contrastive_loss_weight = contrastive_loss_weight
        self.max_logit_scale = max_logit_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.legacy_cls_mask = legacy_cls_mask
        # Largest number of tokens of a text; None for no limit (see ``lm_core.causal_lm.CausalLM``).
        self.max_length = max_text_length
        # Preprocessing of the training images; stored with checkpoints as preprocess.json.
        self.preprocessing: ImagePreprocessing | None = None

        # Modules: image side, text decoder, latents and the parameters of the contrastive loss.
        self.img_encoder: ImageEncoder | None = None
        if img_encoder is not None:
            self.img_encoder = ImageEncoder(img_encoder, width=image_dim, frozen=freeze_img_encoder)
        pooler = {"dim_head": dim_head, "heads": heads}
        if sequential:
            pooler = {"dim_head": dim // pool_heads, "heads": pool_heads, "kv_heads": pool_heads, "bias": True}
        self.pooling = AttentionalPooling(
            dim=dim, image_dim=image_dim, queries=num_img_queries, pooling=pooling, **pooler
        )
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.text_cls = nn.Parameter(torch.randn(dim))
        self.rotary = None if sequential else RotaryEmbedding(dim_head)
        self.position_emb: nn.Embedding | None = None
        self.output_layer: nn.Linear | None = None
        layer: dict[str, Any] = {"dim": dim, "dim_head": dim_head, "heads": heads, "ff_mult": ff_mult}
        if max_text_length is not None:
            self.position_emb = nn.Embedding(max_text_length + 1, dim)  # the last one is that of CLS
            nn.init.normal_(self.position_emb.weight, std=0.01)
            self.output_layer = nn.Linear(dim, num_tokens, bias=False)
            layer["activation"] = activation
        block_type = SequentialBlock if sequential else ParallelBlock
        self.unimodal_layers = nn.ModuleList(block_type(**layer) for _ in range(unimodal_depth))
        self.multimodal_layers = nn.ModuleList(MultimodalLayer(**layer) for _ in range(multimodal_depth))
        self.text_cls_norm = nn.LayerNorm(dim) if sequential else LayerNorm(dim)
        self.norm = nn.LayerNorm(dim) if sequential else LayerNorm(dim)
        self.text_to_latents = nn.Linear(dim, dim_latents, bias=False)
        self.image_to_latents = nn.Linear(dim, dim_latents, bias=False)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias))) if loss == "sigmoid" else None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_emb.weight.device

    @property
    def output_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the output layer: that of the token embedding, or of a layer of its own."""
        return (self.token_emb if self.output_layer is None else self.output_layer).weight

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Factor of the similarities, at most ``max_logit_scale``.

        The gradient passes through the bound; without it a scale that has reached the bound could never decrease.
        """
        log = self.log_logit_scale
        return (log - (log - math.log(self.max_logit_scale)).relu().detach()).exp()

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Clamps the stored scale to its bound; to be called after every optimizer step."""
        self.log_logit_scale.clamp_(max=math.log(self.max_logit_scale))

    # ----------------------------------------------------------------------------------------------- embeddings

    def embed_text(
        self, text: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """The state at CLS (after the final norm, not projected), and the states of the tokens.

        Args:
            text: token ids; without a mask trailing ``pad_id`` are padding.
            mask: True at real tokens, padding anywhere.

        Raises:
            TypeError, ValueError: see ``coca.model.text_layout.layout_of``.
        """
        layout, embedding, states = self._unimodal(text, mask)
        return embedding, layout.restored(states)

    def embed_image(
        self,
        images: Float[Tensor, "b c height width"] | None = None,
        image_tokens: Float[Tensor, "b m c"] | None = None,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b q d"]]:
        """The pooled embedding (not projected), and the pooled tokens that the decoder sees.

        Args:
            images: images for ``img_encoder``.
            image_tokens: output of an encoder, instead of images.

        Raises:
            ValueError: neither or both are passed, there is no encoder, or the tokens have another width.
        """
        if (images is None) == (image_tokens is None):
            raise ValueError(f"give images or image_tokens, got {'neither' if images is None else 'both'}")
        if images is not None:
            if self.img_encoder is None:
                raise ValueError("images need an img_encoder, got img_encoder=None; or pass image_tokens")
            image_tokens = self.img_encoder(images)
        assert image_tokens is not None
        if image_tokens.ndim != 3 or image_tokens.shape[-1] != self.image_dim or image_tokens.shape[1] == 0:
            raise ValueError(
                f"image_tokens must be (b, m, image_dim = {self.image_dim}) with at least one token, got shape "
                f"{tuple(image_tokens.shape)}"
            )
        # an encoder may be kept in another dtype than the decoder
        embedding, pooled = self.pooling(image_tokens.to(self.token_emb.weight.dtype))
        return embedding, pooled

    def encode_text(self, text: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b l"]:
        """L2-normalised text latents for retrieval and zero-shot classification; arguments as ``embed_text``."""
        return self._latents(self.text_to_latents, self._unimodal(text, mask)[1])

    def encode_image(
        self,
        images: Float[Tensor, "b c height width"] | None = None,
        image_tokens: Float[Tensor, "b m c"] | None = None,
    ) -> Float[Tensor, "b l"]:
        """L2-normalised image latents for retrieval and zero-shot classification; arguments as ``embed_image``."""
        return self._latents(self.image_to_latents, self.embed_image(images, image_tokens)[0])

    # ---------------------------------------------------------------------------------------------- whole model

    def forward(
        self,
        text: Int[Tensor, "b n"],
        images: Float[Tensor, "b c height width"] | None = None,
        image_tokens: Float[Tensor, "b m c"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        return_loss: bool = False,
        return_embeddings: bool = False,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        process_group: Any = None,
        gather: bool = True,
    ) -> Any:
        """Logits ``(b, n, v)``, or a loss or embeddings instead; logits at padding are undefined.

        Other arguments and errors are those of ``loss``.

        Args:
            return_loss: returns the total of ``loss``.
            return_embeddings: returns ``(text, image)`` as from ``embed_text`` and ``embed_image``: neither projected
                nor normalised, so not for comparison (use ``encode_text`` and ``encode_image``). Without an image the
                second is None.
        """
        if return_loss:
            collective: dict[str, Any] = {"process_group": process_group, "gather": gather}
            return self.loss(text, images, image_tokens, labels, mask=mask, **collective).total
        layout, text_embedding, states = self._unimodal(text, mask)
        if return_embeddings and images is None and image_tokens is None:
            return text_embedding, None
        image_embedding, pooled = self.embed_image(images, image_tokens)
        if return_embeddings:
            return text_embedding, image_embedding
        hidden = layout.restored(self._multimodal(states, pooled))
        return F.linear(hidden, self.output_weight) if self.output_layer is None else self.output_layer(hidden)

    def loss(
        self,
        text: Int[Tensor, "b n"],
        images: Float[Tensor, "b c height width"] | None = None,
        image_tokens: Float[Tensor, "b m c"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        process_group: Any = None,
        gather: bool = True,
    ) -> CoCaLoss:
        """Both losses of matching texts and images, from one pass.

        In a process group the values are those of the batch of all processes, and so is the gradient once it is
        averaged over them (as ``DistributedDataParallel`` does); every process must call it. Padding and labels of
        -100 are not predicted; without any label the captioning loss is 0.

        Args:
            text: token ids, at least two in a row; without a mask trailing ``pad_id`` are padding.
            images: images for ``img_encoder``.
            image_tokens: output of an encoder, instead of images.
            labels: target ids aligned with ``text``, which is the default: position i predicts label i + 1, and -100
                is ignored.
            mask: True at real tokens, padding anywhere.
            process_group: group of the processes that share a batch; None for all.
            gather: False computes the losses of this process's pairs alone, for instance to evaluate on one process.

        Raises:
            TypeError, ValueError: see ``embed_text`` and ``embed_image``; also rows that do not match, labels of
                another shape or out of range, or a text of one token.
        """
        collective: dict[str, Any] = {"process_group": process_group, "gather": gather}
        states = self.pair_states(text, images, image_tokens, labels, mask=mask)
        counted = (states.targets != IGNORED).sum()
        caption_loss = self.caption_loss(
            states, all_reduce_sum(counted, process_group) if gather else counted, **collective
        )
        contrastive = self.contrastive_loss(
            states.image_latents, states.text_latents, self.logit_scale, self.logit_bias, **collective
        )
        total = self.caption_loss_weight * caption_loss + self.contrastive_loss_weight * contrastive
        return CoCaLoss(total, caption_loss, contrastive)

    def pair_states(
        self,
        text: Int[Tensor, "b n"],
        images: Float[Tensor, "b c height width"] | None = None,
        image_tokens: Float[Tensor, "b m c"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        captions: bool = True,
    ) -> PairStates:
        """Latents of texts and images, and the features from which captions are predicted.

        Args:
            captions: False leaves out the multimodal layers.
            text, images, image_tokens, labels, mask: as in ``loss``, whose errors are raised.
        """
        layout, text_embedding, states = self._unimodal(text, mask)
        targets = layout.targets(labels)
        image_embedding, pooled = self.embed_image(images, image_tokens)
        return PairStates(
            self._latents(self.image_to_latents, image_embedding),
            self._latents(self.text_to_latents, text_embedding),
            self._multimodal(states[:, :-1], pooled) if captions else None,
            targets,
        )

    def caption_loss(
        self, states: PairStates, normalizer: Int[Tensor, ""], *, process_group: Any = None, gather: bool = True
    ) -> Float[Tensor, ""]:
        """This process's share of the captioning loss as ``global_mean`` gives it.

        Args:
            states: from ``pair_states``.
            normalizer: predicted tokens of the whole batch, of all processes.
            process_group, gather: as in ``loss``.
        """
        assert states.hidden is not None
        share = linear_cross_entropy(states.hidden, self.output_weight, states.targets, normalizer=normalizer)
        return global_mean(share, process_group=process_group, gather=gather)

    def contrastive_loss(
        self,
        image_latents: Float[Tensor, "b l"],
        text_latents: Float[Tensor, "b l"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
        **collective: Any,
    ) -> Float[Tensor, ""]:
        """The model's contrastive loss of matching latents: softmax, or sigmoid with a bias."""
        if logit_bias is None:
            return softmax_contrastive_loss(image_latents, text_latents, logit_scale, **collective)
        return sigmoid_contrastive_loss(image_latents, text_latents, logit_scale, logit_bias, **collective)

    # ----------------------------------------------------------------------- captions, and the CausalLM protocol

    def init_cache(self, batch_size: int, max_length: int, *, static: bool = False) -> CoCaCache:
        """An empty cache for ``batch_size`` captions of up to ``max_length`` tokens; see ``KVCache`` for ``static``."""
        layers = len(self.unimodal_layers) + len(self.multimodal_layers)
        return CoCaCache(layers=layers, batch_size=batch_size, max_length=max_length, static=static)

    def hidden(
        self,
        text: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: CoCaCache | None = None,
        pooled: Float[Tensor, "b q d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Features before the output layer, without CLS; ``logits = hidden @ output_weight.T``.

        With ``init_cache`` and ``output_weight`` this makes CoCa a language model for ``lm_core.generate`` and
        ``lm_core.token_log_probs``, given ``pooled=model.embed_image(images)[1]``.

        Args:
            text: token ids; with a cache, the new ones.
            mask: True at real tokens of cached and new positions.
            cache: cache from ``init_cache``; keeps the image's keys and values after the first call.
            pooled: pooled image tokens; required unless the cache has been filled.

        Raises:
            ValueError: there is no image, or shapes do not fit.
        """
        if text.dtype.is_floating_point or text.ndim != 2 or 0 in text.shape:
            raise ValueError(f"text must be integer ids (b, n), got {text.dtype} of shape {tuple(text.shape)}")
        past = 0 if cache is None else cache.past
        if mask is not None:
            check_mask(mask, "mask", (text.shape[0], past + text.shape[1]))
        elif cache is not None and cache.masked:
            raise ValueError("mask must be given, for all positions, since the cache was filled with a mask")
        if cache is not None and past == 0:
            cache.image = {}  # a forward that failed may have left keys and values
        x, positions = self._embedded(text, cache=cache, mask=mask)
        x = self._decode(self.unimodal_layers, x, positions, cache=cache)
        x = self._multimodal(x, pooled, positions, cache)
        if cache is not None:
            cache.masked = mask is not None
            cache.advance(text.shape[1])
        return x

    @torch.no_grad()
    @typed
    def generate(
        self,
        images: Tensor | None = None,
        image_tokens: Tensor | None = None,
        prefix: Any = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        filters: Sequence[Filter] = (),
        beams: int = 1,
        length_penalty: float = 1.0,
        min_new_tokens: int = 0,
        eos_id: int | Sequence[int] | None = None,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        return_prefix: bool = False,
        prefix_mask: Tensor | None = None,
        compile: bool = False,
        progress: bool = False,
    ) -> Int[Tensor, "b new"]:
        """Captions of images as token ids, right-padded with ``pad_id``, which is never generated unless it is EOS.

        Args:
            images: images for ``img_encoder``.
            image_tokens: output of an encoder, instead of images.
            prefix: beginning of the captions: ids ``(n,)`` for all, ``(b, n)``, or a list of 1-D tensors; by default
                ``bos_id``.
            max_new_tokens, temperature, top_k, top_p, min_p, filters, min_new_tokens, repetition_penalty, generator,
                use_cache, compile, progress: see ``lm_core.generation.generate.generate``.
            beams: width of the beam search; 1 for greedy decoding or sampling.
            length_penalty: length penalty of the beam search; see ``lm_core.generation.beam_search``.
            eos_id: token or tokens that end a caption; the model's by default.
            return_prefix: returns each caption with its prefix.
            prefix_mask: True at real tokens of a padded ``prefix``.

        Raises:
            ValueError: an argument is out of range, the prefix does not fit the images, or there is neither a prefix
                nor a ``bos_id``; settings of sampling together with beams; see also ``embed_image``.
            TypeError: a value is of another type.
        """
        sampling = filters_of(top_k=top_k, top_p=top_p, min_p=min_p)
        if beams > 1 and (temperature != 0.0 or sampling):
            raise ValueError(f"beams = {beams} searches: leave out temperature, top_k, top_p and min_p")
        if temperature == 0.0 and sampling:
            raise ValueError("top_k, top_p and min_p need a temperature above 0, got 0 (the most likely token)")
        # padding is generated only as the end of a caption, so it is excluded before the most likely tokens are chosen
        ends = self.eos_id if eos_id is None else eos_id
        is_end = self.pad_id in (ends if isinstance(ends, Sequence) else (ends,))
        filters = [*([] if is_end else [partial(without_tokens, ids=(self.pad_id,))]), *sampling, *filters]
        # the image is encoded once, in evaluation mode as the decoding is
        with eval_mode(self):
            pooled = self.embed_image(images, image_tokens)[1]
        rows = self._prefix_rows(prefix, prefix_mask, len(pooled))
        search = partial(generate, temperature=temperature, generator=generator)
        if beams != 1:
            search = partial(beam_search, beams=beams, length_penalty=length_penalty)
        result = search(
            self,
            rows,
            max_new_tokens=max_new_tokens,
            filters=filters,
            eos_id=ends,
            pad_id=self.pad_id,
            min_new_tokens=min_new_tokens,
            repetition_penalty=repetition_penalty,
            use_cache=use_cache,
            compile=compile,
            progress=progress,
            pooled=pooled,
        )
        if not return_prefix:
            return result.tokens
        captions = [
            torch.cat((row.to(tokens), tokens[:length]))
            for row, tokens, length in zip(rows, result.tokens, result.lengths.tolist(), strict=True)
        ]
        return right_pad(captions, self.pad_id)[0]

    @torch.no_grad()
    def zero_shot_classifier(
        self,
        class_names: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        tokenizer: Any,
        max_length: int | None = None,
    ) -> Float[Tensor, "classes l"]:
        """One L2-normalised latent for each class: the mean latent of its captions (arXiv 2103.00020, section 3.1).

        Args:
            class_names: class names to put into the templates.
            templates: captions with one ``{}``.
            tokenizer: caption tokenizer of the training; see ``lm_core.tokenizers``.
            max_length: tokens at which a caption is cut, as in training.

        Returns:
            ``(classes, l)``; ``model.encode_image(images) @ classifier.T`` is highest at the predicted class.

        Raises:
            TypeError: a string is passed instead of a list.
            ValueError: there is no class or template, a class is repeated, or a template has not exactly one ``{}``.
        """
        if isinstance(class_names, str) or isinstance(templates, str):
            raise TypeError("class_names and templates must be lists of strings, got one string")
        names, forms = list(class_names), list(templates)
        if not names or not forms:
            raise ValueError(f"class_names and templates must not be empty, got {len(names)} and {len(forms)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class_names must differ, got {twice[:8]} more than once")
        for form in forms:
            if form.count("{}") != 1:
                raise ValueError(f"each template must have exactly one {{}}, got {form!r}")
        latents = []
        if self.max_length is not None:
            max_length = min(max_length or self.max_length, self.max_length)
        with eval_mode(self):
            for name in names:
                captions = [form.replace("{}", name) for form in forms]
                texts = encode_captions(captions, tokenizer, self.pad_id, max_length)
                latents.append(self.encode_text(texts.to(self.device)).mean(dim=0))
        return l2norm(torch.stack(latents))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def write_assets(self, directory: Path) -> None:
        """Writes ``preprocess.json``, if the preprocessing is known."""
        if self.preprocessing is not None:
            self.preprocessing.save(directory)

    def read_assets(self, directory: Path) -> None:
        """Reads ``preprocess.json``, if there is one."""
        self.preprocessing = ImagePreprocessing.load_if_present(directory)

    # ------------------------------------------------------------------------------------------------------ parts

    def _latents(self, projection: nn.Module, embedding: Tensor) -> Float[Tensor, "b l"]:
        """L2-normalised projection, in the dtype of the weights: autocast's bfloat16 would leave ties in rankings."""
        with torch.autocast(embedding.device.type, enabled=False):
            return l2norm(projection(embedding.to(self.token_emb.weight.dtype)))

    def _unimodal(self, text: Tensor, mask: Tensor | None) -> tuple[TextLayout, Tensor, Tensor]:
        """The text's layout, the normalised state at CLS, and the states of the tokens in the layout's order."""
        layout = layout_of(text, mask, pad_id=self.pad_id, eos_id=self.eos_id, num_tokens=self.num_tokens)
        if self.position_emb is not None:
            return layout, *self._unimodal_sequential(layout, self.position_emb)
        assert self.rotary is not None
        x = layout.with_cls(self.token_emb(layout.ids), self.text_cls)
        x = self._decode(self.unimodal_layers, x, Positions.of(self.rotary, x))
        return layout, self.text_cls_norm(layout.cls_of(x)), x[:, :-1]

    def _unimodal_sequential(self, layout: TextLayout, position_emb: nn.Embedding) -> tuple[Tensor, Tensor]:
        """As ``_unimodal``, with CLS after the padding at the last learned position, as in open_clip."""
        ids, n, longest = layout.ids, layout.ids.shape[1], position_emb.num_embeddings - 1
        if n > longest:
            raise ValueError(f"text must have at most max_text_length = {longest} tokens a row, got {n}")
        if self.legacy_cls_mask and n < longest:
            ids = F.pad(ids, (0, 1), value=self.pad_id)  # the padding token that CLS attends to
        x, _ = self._embedded(ids)
        cls = self.text_cls + position_emb.weight[longest]
        x = torch.cat((x, cls.to(x.dtype).expand(len(x), 1, -1)), dim=1)
        # a token attends to itself and earlier ones; CLS to the real tokens of its row
        total = x.shape[1]
        index = torch.arange(total, device=x.device)
        seen_by_cls = index < rearrange(layout.lengths + self.legacy_cls_mask, "b -> b 1")
        if not self.legacy_cls_mask:
            seen_by_cls = seen_by_cls | (index == total - 1)
        causal = (index <= rearrange(index, "n -> n 1")).expand(len(x), -1, -1)
        mask = torch.cat((causal[:, :-1], rearrange(seen_by_cls, "b n -> b 1 n")), dim=1)
        x = self._decode(self.unimodal_layers, x, Positions(mask=mask))
        return self.text_cls_norm(x[:, -1]), x[:, :n]

    def _embedded(
        self, text: Tensor, *, cache: CoCaCache | None = None, mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "b n d"], Positions]:
        """Token embeddings, with learned positions where there are any, and the positions for the blocks."""
        x = self.token_emb(text)
        if self.position_emb is None:
            assert self.rotary is not None
            return x, Positions.of(self.rotary, x, cache=cache, mask=mask)
        past = 0 if cache is None else cache.past
        position = None if cache is None else cache.position
        total = past + text.shape[1]
        index = torch.arange(total, device=x.device) if mask is None else positions_from_mask(mask)
        if position is not None:
            # a static step reads the whole capacity, of which the positions up to this one count
            written = torch.arange(total, device=x.device) <= position
            visible = written.expand(x.shape[0], -1) if mask is None else mask & written
            x = x + self.position_emb(index.index_select(-1, position.view(1)))
            return x, Positions(mask=visible, every_query_sees_a_key=True)
        if total >= self.position_emb.num_embeddings:
            raise ValueError(f"text must have at most max_text_length = {self.max_length} tokens, got {total}")
        return x + self.position_emb(index[..., past:]), Positions(mask=mask)

    def _multimodal(
        self, x: Tensor, pooled: Tensor | None, positions: Positions | None = None, cache: CoCaCache | None = None
    ) -> Tensor:
        """Normalised features before the output layer."""
        if pooled is None and (cache is None or len(cache.image) < len(self.multimodal_layers)):
            raise ValueError(
                "pooled image tokens are needed for the first call: pass pooled=model.embed_image(images)[1]"
            )
        if pooled is not None and pooled.shape[0] != x.shape[0]:
            raise ValueError(f"text and images must have as many rows, got {x.shape[0]} and {pooled.shape[0]}")
        if positions is None:
            positions = Positions() if self.rotary is None else Positions.of(self.rotary, x)
        first = len(self.unimodal_layers)
        return self.norm(self._decode(self.multimodal_layers, x, positions, pooled, cache=cache, first=first))

    def _prefix_rows(self, prefix: Any, mask: Tensor | None, count: int) -> list[Tensor]:
        """The prefix of each of ``count`` captions, without padding."""
        if prefix is None:
            if self.bos_id is None:
                raise ValueError("prefix must be given, since the model was made without a bos_id")
            prefix = torch.tensor([self.bos_id])
        if isinstance(prefix, Tensor) and prefix.ndim == 1:
            prefix = prefix.expand(count, -1)
        rows = prompt_rows(prefix, mask)
        if len(rows) != count:
            raise ValueError(f"prefix must have a row for each of the {count} images, got {len(rows)}")
        for row in rows:
            check_ids(row, self.num_tokens, "prefix")
        return rows

    def _decode(
        self, layers: nn.ModuleList, x: Tensor, *inputs: Any, cache: CoCaCache | None = None, first: int = 0
    ) -> Tensor:
        """Applies ``layers`` in turn; ``first`` is the index of the first one in the cache."""
        recompute = self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(layers, start=first):
            if recompute:
                x = checkpoint(layer, x, *inputs, use_reentrant=False)
            else:
                x = layer(x, *inputs, cache=cache, layer=index)
        return x
