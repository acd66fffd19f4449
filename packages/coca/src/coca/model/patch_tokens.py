"""Common parts of the image encoders: checks of sizes and images, and the run through their blocks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm_core.checks import check_positive
from lm_core.nn.parallel_block import Positions


def check_sizes(image_size: int, patch_size: int, **sizes: int) -> None:
    """Raises ``ValueError`` for a size below 1, or patches that do not divide the image."""
    for name, value in {"image_size": image_size, "patch_size": patch_size, **sizes}.items():
        check_positive(value, name)
    if image_size % patch_size:
        raise ValueError(f"patch_size must divide image_size = {image_size}, got {patch_size}")


def check_images(images: Tensor, channels: int, image_size: int) -> None:
    """Raises ``ValueError`` for images of another shape than ``(b, channels, image_size, image_size)``."""
    expected = (channels, image_size, image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images must be (b, {', '.join(map(str, expected))}), got shape {tuple(images.shape)}")


def through_blocks(blocks: Iterable[nn.Module], x: Tensor, *, recompute: bool) -> Tensor:
    """Tokens after all blocks; with ``recompute`` a training step computes blocks again in the backward."""
    positions = Positions()  # the tokens have learned positions already
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, positions, use_reentrant=False) if recompute else block(x, positions)
    return x
