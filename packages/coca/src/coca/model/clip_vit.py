"""Vision transformer of CLIP and open_clip (arXiv 2103.00020, section 2.4).

Patches by a convolution, a class token, learned positions, a norm before the blocks and none after them: CoCa's pooling
normalises the tokens itself.

Legend: b batch, c channels, n patches, d feature.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from coca.model.patch_tokens import check_images, check_sizes, through_blocks
from coca.model.sequential_block import Activation, SequentialBlock
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import typed


class CLIPVisionTransformer(PretrainedMixin):
    """CLIP's vision transformer from square images to a class token and patch tokens.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a patch; divides ``image_size``.
        dim: features of a token.
        depth: number of blocks.
        heads: heads of a block.
        channels: channels of the images.
        dim_head: features of a head.
        ff_mult: feed-forward inner features over ``dim``.
        activation: "gelu" or "quick_gelu".
        norm_tokens: normalises the tokens before the first block.
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
        heads: int,
        channels: int = 3,
        dim_head: int = 64,
        ff_mult: int = 4,
        activation: Activation = "gelu",
        norm_tokens: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "channels": channels, "dim_head": dim_head}
        check_sizes(image_size, patch_size, **sizes, heads=heads, ff_mult=ff_mult)
        self.image_size = image_size
        self.channels = channels
        self.dim = dim
        self.gradient_checkpointing = gradient_checkpointing
        self.to_tokens = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(dim**-0.5 * torch.randn(dim))
        self.positions = nn.Parameter(dim**-0.5 * torch.randn((image_size // patch_size) ** 2 + 1, dim))
        self.norm = nn.LayerNorm(dim) if norm_tokens else nn.Identity()
        block = {"dim": dim, "dim_head": dim_head, "heads": heads, "ff_mult": ff_mult}
        self.layers = nn.ModuleList(SequentialBlock(**block, causal=False, activation=activation) for _ in range(depth))

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n_plus_1 d"]:
        """The class token, then one token for each patch, row by row.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        check_images(images, self.channels, self.image_size)
        patches = rearrange(self.to_tokens(images), "b d h w -> b (h w) d")
        first = repeat(self.class_token.to(patches.dtype), "d -> b 1 d", b=len(images))
        x = self.norm(torch.cat((first, patches), dim=1) + self.positions)
        return through_blocks(self.layers, x, recompute=self.gradient_checkpointing and self.training)
