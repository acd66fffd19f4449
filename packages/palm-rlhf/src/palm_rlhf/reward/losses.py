"""Pairwise loss of reward models. Legend: b batch."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lm_core.checks import typed


@typed
def bradley_terry_loss(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], margin: Float[Tensor, " b"] | float = 0.0
) -> Float[Tensor, ""]:
    """``-log sigmoid(chosen - rejected - margin)``, the mean over pairs (arXiv 2203.02155, equation 1).

    Args:
        chosen: rewards of the preferred responses.
        rejected: rewards of the rejected responses.
        margin: margin of the preferred over the rejected response, per pair or for all (arXiv 2307.09288, equation 2).
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()
