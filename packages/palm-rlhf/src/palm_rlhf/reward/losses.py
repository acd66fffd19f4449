"""What reward models are trained on: pairs of responses, numbers, or bins.

Legend: b batch, k bins.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.checks import typed


@typed
def bradley_terry_loss(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], margin: Float[Tensor, " b"] | float = 0.0
) -> Float[Tensor, ""]:
    """``-log sigmoid(chosen - rejected - margin)``, the mean over pairs (arXiv 2203.02155, equation 1).

    Args:
        chosen: rewards of the better responses.
        rejected: rewards of the worse ones.
        margin: by how much the better should win, of each pair or of all (arXiv 2307.09288, equation 2).
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()


def squared_error(rewards: Float[Tensor, " b"], targets: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean squared error of scalar rewards."""
    return F.mse_loss(rewards, targets.to(rewards.dtype))


def bin_cross_entropy(logits: Float[Tensor, "b k"], bins: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Cross-entropy of binned rewards, the label of each being its bin."""
    return F.cross_entropy(logits, bins.long())
