"""LoRA (arXiv 2106.09685) on the linear layers of a model, the baseline of composition at equal parameters.

``W <- W + B A``, with ``A`` random and ``B`` zero, so that training begins at the model as it is. It is a baseline and
no more: the sum is computed in every forward, and nothing is written to files.
"""

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lm_core.checks import check_positive, typed


class LowRankSum(nn.Module):
    """A parametrization of a weight ``(out, in)``: the weight plus a product of rank ``rank``."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_empty(rank, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used."""
        return weight + self.B @ self.A


@typed
def add_low_rank_(model: nn.Module, *, rank: int, leave: tuple[str, ...] = ()) -> list[nn.Parameter]:
    """Freezes a model and adds a trainable product to each of its linear layers, in place.

    Args:
        model: model whose linear layers are adapted.
        rank: rank of the products, at most the smaller width of a layer.
        leave: ends of the names of layers that stay as they are, such as the output layer.

    Returns:
        The new parameters.

    Raises:
        ValueError: the rank is below 1, or the model has no linear layer to add to.
    """
    check_positive(rank, "rank")
    layers = _linear_layers(model, leave)
    if not layers:
        raise ValueError(f"model must have a linear layer, got {type(model).__name__} without")
    for parameter in model.parameters():
        parameter.requires_grad = False
    added: list[nn.Parameter] = []
    for layer in layers:
        product = LowRankSum(layer.weight.detach(), min(rank, *layer.weight.shape))
        parametrize.register_parametrization(layer, "weight", product)
        added += [product.A, product.B]
    return added


def rank_for(model: nn.Module, parameters: int, leave: tuple[str, ...] = ()) -> int:
    """The rank whose products over all linear layers come closest to a number of parameters."""
    return max(1, round(parameters / max(sum(sum(layer.weight.shape) for layer in _linear_layers(model, leave)), 1)))


def _linear_layers(model: nn.Module, leave: tuple[str, ...]) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith(leave)]
