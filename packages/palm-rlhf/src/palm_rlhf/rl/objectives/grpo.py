"""GRPO (arXiv 2402.03300): responses compared with others to the same prompt, without a critic."""

from dataclasses import dataclass

from lm_core.checks import typed
from palm_rlhf.rl.objectives.base import ClippedObjective
from palm_rlhf.rl.objectives.group import GroupObjective


@typed
@dataclass(frozen=True, kw_only=True)
class GRPO(GroupObjective, ClippedObjective):
    """GRPO: clipped surrogate with group-relative advantages, and the k3 estimate of the KL in the loss (equation 4).

    Length normalisation is set by ``aggregation``: "sequence" (the paper), "constant" (Dr. GRPO, arXiv 2503.20783,
    together with ``scale_rewards="none"``) or "token", a plain mean over tokens (DAPO, arXiv 2503.14476).
    """

    kl_div_loss_weight: float = 0.04
