"""Weights packed for products with a few rows, which is what decoding makes.

A step of decoding multiplies a handful of rows with every weight, and reading the weights takes most of its time. The
general product reads a weight stored row by row far below the speed of memory; oneDNN's reads a blocked copy two to
three times as fast, for one row as for sixty-four. A copy costs as much as a few steps save, so it is made for a
caption of more than a few tokens, kept no longer than that caption, and can therefore never be stale.

Only for float32 on a CPU whose PyTorch has oneDNN; everything else takes the plain product.

Legend: r rows, i input features, o output features.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# The rows that the layout is chosen for: one made for a single row is slow for several, but not the other way round.
_ROWS = 16


@runtime_checkable
class Product(Protocol):
    """``x (r, i)`` to ``x @ weight.T``, plus ``residual (r, o)`` if given; without gradient in the weight."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product, ``(r, o)``."""


class Products(NamedTuple):
    """With the weights of a layer's projections in and out."""

    proj_in: Product
    proj_out: Product


def plain_product(weight: Float[Tensor, "o i"]) -> Product:
    """The product with a weight as it is."""
    weight = weight.detach()

    def multiply(x: Tensor, residual: Tensor | None = None) -> Tensor:
        # Added outside the product, so that under autocast the residual stream stays in float32.
        product = F.linear(x, weight)
        return product if residual is None else residual + product

    return multiply


def packed_product(weight: Float[Tensor, "o i"]) -> Product:
    """As ``plain_product``, from a copy of the weight in blocks where that is faster."""
    if not can_be_packed(weight):
        return plain_product(weight)
    # The operators that torch.compile itself uses for weights that stay constant.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    multiply_add = torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return multiply(x, packed, None, "none", [], "")
        return multiply_add(x, residual, packed, None, "add")

    return product


def can_be_packed(weight: Tensor) -> bool:
    """Whether ``packed_product`` makes a copy in blocks."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
