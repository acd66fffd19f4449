"""GSPO (arXiv 2507.18071): the clipped surrogate with one probability ratio for a whole response."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lm_core.checks import typed
from lm_core.nn.masking import masked_mean
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import clipped_surrogate
from palm_rlhf.rl.objectives.base import ClippedObjective, TokenLoss
from palm_rlhf.rl.objectives.group import GroupObjective


@typed
@dataclass(frozen=True, kw_only=True)
class GSPO(GroupObjective, ClippedObjective):
    """GSPO: group-relative advantages, clipped by the length-normalised ratio ``s = exp(mean(log-prob - old))``.

    Ratios of responses are much closer to 1 than ratios of tokens, hence the small clipping ranges (section 5.1).

    Args:
        ratio_level: "sequence" (equation 5), or "token", the same value with a gradient for each token alone
            (GSPO-token, equation 14), which differs only if advantages of one response differ.
    """

    eps_clip: float = 3e-4
    eps_clip_high: float | None = 4e-4
    ratio_level: Literal["sequence", "token"] = "sequence"

    per_response: ClassVar[bool] = True

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Minus the clipped surrogate of the response, at each of its tokens."""
        assert batch.advantages is not None
        mask = batch.response_mask
        old = (scores.log_probs if batch.log_probs is None else batch.log_probs).detach()
        # per token: the mean of its response, and for "token" the token's own gradient with value 0
        log_ratio = masked_mean(scores.log_probs - old, mask, dim=1, keepdim=True).expand_as(old)
        if self.ratio_level == "token":
            log_ratio = log_ratio.detach() + scores.log_probs - scores.log_probs.detach()
        loss, ratio, clipped = clipped_surrogate(
            log_ratio,
            log_ratio.new_zeros(log_ratio.shape),
            batch.advantages,
            eps_clip=self.eps_clip,
            eps_clip_high=self.eps_clip_high,
            dual_clip=self.dual_clip,
        )
        return TokenLoss(loss, ratio, clipped)
