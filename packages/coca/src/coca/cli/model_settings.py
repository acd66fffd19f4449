"""From flags to a model: the decoder's sizes, our ViT or somebody else's encoder, and the tokenizer's ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from coca.model.attentional_pooling import Pooling
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from coca.model.vit import VisionTransformer
from lm_core.checks import typed


@typed
@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model: text decoder, image encoder, losses.

    Args:
        dim: features of the decoder.
        unimodal_depth: layers that see text only.
        multimodal_depth: layers that also see the image.
        dim_latents: features of the latents; null for dim.
        num_img_queries: image tokens that the decoder sees after pooling.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: feed-forward inner features over dim.
        pooling: one attention for all queries (shared), or one a task, side by side (parallel) or in turn (cascade).
        loss: contrastive loss, softmax (CLIP) or sigmoid (SigLIP).
        caption_loss_weight: factor of the captioning loss; 2 as in the paper's section 4.1.
        contrastive_loss_weight: factor of the contrastive loss.
        encoder: folder of a Hugging Face vision model, or organisation/name on the hub, instead of the own ViT.
        freeze_encoder: trains everything but the encoder.
        image_size: pixels; images are resized and cropped to a square. 0 takes 8 for the digits, what the encoder was
            made for, else 224.
        channels: 1 (grey) or 3 (RGB); 0 takes 1 for the digits, 3 for others.
        patch_size: of the own ViT; 0 takes a quarter or a fourteenth of image_size.
        vit_dim: features of the own ViT.
        vit_depth: blocks of the own ViT.
        vit_heads: query heads of the own ViT.
        gradient_checkpointing: recomputes layers in the backward to save memory.

    Raises:
        TypeError: a value is of another type.
    """

    dim: int = 64
    unimodal_depth: int = 1
    multimodal_depth: int = 1
    dim_latents: int | None = None
    num_img_queries: int = 16
    dim_head: int = 16
    heads: int = 4
    ff_mult: int = 4
    pooling: Pooling = "shared"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    caption_loss_weight: float = 2.0
    contrastive_loss_weight: float = 1.0
    encoder: str | None = None
    freeze_encoder: bool = False
    image_size: int = 0
    channels: int = 0
    patch_size: int = 0
    vit_dim: int = 64
    vit_depth: int = 2
    vit_heads: int = 4
    gradient_checkpointing: bool = False


def build_model(settings: ModelSettings, tokenizer: Any, preprocessing: ImagePreprocessing) -> CoCa:
    """A model for the tokens of ``tokenizer`` and images as ``preprocessing`` makes them.

    Raises:
        ValueError: sizes do not fit, or the tokenizer has no padding id.
        FileNotFoundError, ImportError: the encoder is not to be had.
    """
    if tokenizer.pad_id is None:
        raise ValueError(f"tokenizer must have a padding or an EOS id, got {tokenizer!r} without")
    return CoCa(
        dim=settings.dim,
        num_tokens=tokenizer.vocab_size,
        unimodal_depth=settings.unimodal_depth,
        multimodal_depth=settings.multimodal_depth,
        dim_latents=settings.dim_latents,
        num_img_queries=settings.num_img_queries,
        dim_head=settings.dim_head,
        heads=settings.heads,
        ff_mult=settings.ff_mult,
        img_encoder=_encoder(settings, preprocessing),
        caption_loss_weight=settings.caption_loss_weight,
        contrastive_loss_weight=settings.contrastive_loss_weight,
        pad_id=tokenizer.pad_id,
        pooling=settings.pooling,
        loss=settings.loss,
        bos_id=getattr(tokenizer, "bos_id", None),
        eos_id=tokenizer.eos_id,
        freeze_img_encoder=settings.freeze_encoder,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def _encoder(settings: ModelSettings, preprocessing: ImagePreprocessing) -> nn.Module:
    if settings.encoder is not None:
        return load_encoder(settings.encoder)
    size = preprocessing.image_size
    return VisionTransformer(
        image_size=size,
        patch_size=settings.patch_size or max(1, size // (14 if size >= 56 else 4)),
        dim=settings.vit_dim,
        depth=settings.vit_depth,
        channels=preprocessing.channels,
        dim_head=max(2, settings.vit_dim // settings.vit_heads),
        heads=settings.vit_heads,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def encoder_preprocessing(source: str, image_size: int, channels: int) -> ImagePreprocessing:
    """How a Hugging Face vision model wants its images: mean, deviation and size of its ``preprocessor_config.json``.

    Args:
        source: folder or ``organisation/name``.
        image_size: instead of the model's own; 0 takes that, or 224 where it says none.
        channels: instead of 3; 0 takes that.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the file is there and cannot be read.
    """
    try:
        from transformers.utils import cached_file
    except ImportError as error:
        raise ImportError(f'the encoder {source} needs the extra "hf": pip install "coca[hf]"') from error
    name = "preprocessor_config.json"
    try:
        path = cached_file(source, name)
    except OSError:  # an encoder without it
        path = None
    try:
        content: dict[str, Any] = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        size = content.get("crop_size") or content.get("size") or {}
        own = size if isinstance(size, int) else int(size.get("height") or size.get("shortest_edge") or 224)
        mean, std = (tuple(map(float, content.get(f"image_{key}") or (0.5,))) for key in ("mean", "std"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as the preparation of images: {error}") from error
    return ImagePreprocessing(image_size=image_size or own, channels=channels or 3, mean=mean, std=std)


def load_encoder(source: str) -> nn.Module:
    """The vision model in a folder, or of ``organisation/name`` on the hub; code from there is never run.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no vision model that could be loaded.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(f'the encoder {source} needs the extra "hf": pip install "coca[hf]"') from error
    try:
        model: Any = AutoModel.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers and the network raise
        raise ValueError(f"encoder {source!r} holds no vision model that could be loaded: {error}") from error
    return getattr(model, "vision_model", model)
