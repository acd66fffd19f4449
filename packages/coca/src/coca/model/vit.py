"""Compact vision transformer (arXiv 2010.11929), the package's own image encoder.

Patches, learned position embeddings, parallel blocks (the decoder's, without a causal mask) and a norm. It returns one
token for each patch and has no class token: CoCa pools by attention. Position embeddings start as two-dimensional sines
and cosines (arXiv 2104.02057, section 4): started near zero, they took several hundred updates to help on small images.

Legend: b batch, c channels, n patches, d feature.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from coca.model.patch_tokens import check_images, check_sizes, through_blocks
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import typed
from lm_core.nn.norms import LayerNorm
from lm_core.nn.parallel_block import ParallelBlock


class VisionTransformer(PretrainedMixin):
    """Vision transformer from square images to patch tokens.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a patch; divides ``image_size``.
        dim: features of a token.
        depth: number of blocks.
        channels: channels of the images.
        dim_head: features of a head.
        heads: query heads.
        ff_mult: feed-forward inner features over ``dim``.
        gradient_checkpointing: recomputes blocks in the backward to save memory.

    Raises:
        ValueError: a size is below 1, or ``patch_size`` does not divide ``image_size``.
    """

    @typed
    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        channels: int = 3,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "channels": channels, "dim_head": dim_head}
        check_sizes(image_size, patch_size, **sizes, heads=heads, ff_mult=ff_mult)
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.dim = dim
        self.gradient_checkpointing = gradient_checkpointing
        self.to_tokens = nn.Linear(channels * patch_size**2, dim, bias=False)
        self.positions = nn.Parameter(waves(image_size // patch_size, dim))
        self.layers = nn.ModuleList(
            ParallelBlock(dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult, causal=False) for _ in range(depth)
        )
        self.norm = LayerNorm(dim)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        """One token for each patch, row by row.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        check_images(images, self.channels, self.image_size)
        p = self.patch_size
        x = self.to_tokens(rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)) + self.positions
        x = through_blocks(self.layers, x, recompute=self.gradient_checkpointing and self.training)
        return self.norm(x)


def waves(side: int, dim: int) -> Float[Tensor, "n d"]:
    """Sines and cosines of row and column in a ``side x side`` grid, with wavelengths up to the grid's size."""
    count = -(-dim // 4)
    coordinates = torch.arange(side, dtype=torch.float32)
    frequencies = torch.pi * (max(side, 2) / 2) ** -torch.linspace(0, 1, count)
    angles = rearrange(coordinates, "s -> s 1") * frequencies
    along = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rows, columns = (t.expand(side, side, -1) for t in (rearrange(along, "s d -> s 1 d"), along))
    return rearrange(torch.cat((rows, columns), dim=-1), "h w d -> (h w) d")[:, :dim].clone()
