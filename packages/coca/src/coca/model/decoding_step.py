"""One new token a row through the whole decoder: the case that decides how fast captions are made.

The same formulas as the layers' ``forward``, without submodule calls and branches, whose cost in Python would
show beside that of the products, and with weights packed for a few rows (``coca.model.packed_weights``).

Legend: b batch, d feature, v vocabulary.
"""

from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca.model.block import ParallelBlock
from coca.model.cross_attention import CrossAttention
from coca.model.multimodal import MultimodalLayer
from coca.model.packed_weights import Product, Products, packed_product, plain_product
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm

# Packing all weights takes as long as four steps save.
_STEPS_WORTH_PACKING = 8


class DecodingStep:
    """The decoder's layers as functions of one token a row, with the weights they have now.

    Args:
        model: a ``CoCa`` for which ``is_plain`` holds.
        steps: how many steps are expected; a copy of the weights is worth it only for several.
    """

    def __init__(self, model: Any, *, steps: int) -> None:
        self._product = packed_product if steps >= _STEPS_WORTH_PACKING else plain_product
        self._unimodal: list[tuple[ParallelBlock, Products]] = [
            (block, self._products(block)) for block in model.unimodal_layers
        ]
        self._multimodal: list[tuple[ParallelBlock, Products, CrossAttention, Products]] = [
            (layer.block, self._products(layer.block), layer.cross_attention, self._products(layer.cross_attention))
            for layer in model.multimodal_layers
        ]
        self._norm: LayerNorm = model.norm
        self._output: Product | None = None
        self._output_weight: Tensor = model.output_weight

    def hidden(
        self,
        x: Float[Tensor, "b d"],
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        image: tuple[tuple[Tensor, Tensor], ...],
        mask: Bool[Tensor, "b total"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Normalised features behind the token whose embedding is ``x``; the caller advances the cache.

        Args:
            x: embeddings of the new tokens.
            rotation: cosine and signed sine at their positions, ``(1, d)`` or ``(b, 1, d)``.
            cache: keys and values of the text so far.
            image: keys and values of the image for each multimodal layer.
            mask: True at real tokens of cached and new positions.
        """
        visible = None
        if mask is not None:
            visible = rearrange(mask, "b j -> b 1 1 j")
            rotation = (rotation[0].unsqueeze(1), rotation[1].unsqueeze(1))
        place = 0
        for block, products in self._unimodal:
            x = block.decode(x, rotation, partial(cache.update, place), products, visible)
            place += 1
        for (block, products, attention, attention_products), keys_values in zip(self._multimodal, image, strict=True):
            x = block.decode(x, rotation, partial(cache.update, place), products, visible)
            x = attention.decode(x, keys_values, attention_products)
            place += 1
        return torch.layer_norm(x, self._norm.gamma.shape, self._norm.gamma, None, self._norm.eps)

    def logits(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """The output layer."""
        if self._output is None:
            self._output = self._product(self._output_weight)
        return self._output(hidden)

    def _products(self, layer: ParallelBlock | CrossAttention) -> Products:
        return Products(self._product(layer.proj_in.weight), self._product(layer.proj_out.weight))


def is_plain(model: Any) -> bool:
    """Whether the decoder is made of our own layers and nobody listens to their calls, which a step does not make."""
    kinds = (nn.ModuleList, MultimodalLayer, ParallelBlock, CrossAttention, LayerNorm, nn.Linear, nn.Identity)
    parts = [
        module for part in (model.unimodal_layers, model.multimodal_layers, model.norm) for module in part.modules()
    ]
    return all(type(part) in kinds and not part._forward_hooks and not part._forward_pre_hooks for part in parts)
