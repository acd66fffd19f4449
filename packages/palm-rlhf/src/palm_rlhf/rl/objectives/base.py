"""The interface of an objective, and the options that all objectives share."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_core.checks import check_above_zero, check_positive, typed
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.kl import KLCoefficient, KLEstimator
from palm_rlhf.rl.log_probs import PolicyOutput
from palm_rlhf.rl.losses import Aggregation, clipped_surrogate


@dataclass(frozen=True)
class TokenLoss:
    """Losses of each token, neither masked nor weighted.

    Attributes:
        policy: loss of the policy.
        ratio: probability ratio of new and old policy; None for an objective without one.
        clipped: True where clipping removes the gradient.
        value: loss of the critic; None without one.
        value_weight: weight of ``value`` next to ``policy``.
        value_clipped: True where the clipped value loss is larger.
    """

    policy: Float[Tensor, "b m"]
    ratio: Float[Tensor, "b m"] | None = None
    clipped: Bool[Tensor, "b m"] | None = None
    value: Float[Tensor, "b m"] | None = None
    value_weight: float = 1.0
    value_clipped: Bool[Tensor, "b m"] | None = None


@typed
@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Objective of a policy: advantages of a batch of experience, and a loss for each token.

    Args:
        group_size: responses per prompt.
        kl_div_loss_weight: weight of the KL from the reference; 0 skips the computation of the reference.
        kl_in: "reward" subtracts the KL from token rewards, "loss" adds it to the loss.
        kl_estimator: estimator of the KL; see ``palm_rlhf.rl.kl``.
        kl_target: target of an adaptive weight, in nats per response; null keeps the weight fixed.
        kl_horizon: responses over which an adaptive weight changes by a fifth at most.
        beta_s: weight of the entropy bonus.
        aggregation: "token" averages over tokens, "sequence" first within and then over responses, "constant" divides
            the sum by ``constant_length`` times the number of responses.
        constant_length: divisor of the aggregation "constant", such as the maximum length of a response.
        missing_eos_penalty: penalty on the reward of a response without EOS or stop string.
        mask_truncated: leaves responses without EOS or stop string out of the loss; they still count in a baseline.
        entropy_advantage: weight of the token's entropy in its advantage, ``A + min(weight * H, |A| / bound)`` without
            gradient through H (arXiv 2506.14758); 0 adds nothing.
        entropy_advantage_bound: ``bound`` in that formula; above 1, the sign of an advantage never changes.
        dynamic_sampling: rounds in which groups of equal rewards are replaced by responses to further prompts
            (arXiv 2503.14476, section 3.2); groups that are still equal after them stay.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of another type.
    """

    group_size: int = 1
    kl_div_loss_weight: float = 0.1
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    beta_s: float = 0.0
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    missing_eos_penalty: float = 0.0
    mask_truncated: bool = False
    entropy_advantage: float = 0.0
    entropy_advantage_bound: float = 2.0
    dynamic_sampling: int = 0

    #: a critic is trained
    needs_values: ClassVar[bool] = False
    #: the loss compares the policy with the one that drew the tokens
    uses_ratio: ClassVar[bool] = True
    #: responses to one prompt are compared with each other
    compares_responses: ClassVar[bool] = False
    #: the loss of a response depends on the others to its prompt, so minibatches and micro-batches hold whole groups
    couples_responses: ClassVar[bool] = False
    #: log-probs of the reference enter the loss, also at KL weight 0
    needs_reference: ClassVar[bool] = False
    #: the loss of a token is proportional to its advantage
    weighs_by_advantage: ClassVar[bool] = True
    #: losses are per response, repeated over its tokens, so only the aggregation "sequence" averages them
    per_response: ClassVar[bool] = False
    #: default number of passes over the responses of a phase
    epochs: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_positive(self.group_size, "group_size")
        if self.compares_responses and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to compare responses to one prompt, got {self.group_size}")
        self.kl_coefficient()  # checks its arguments
        self._check_range(math.inf, "beta_s")
        if not math.isfinite(self.missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty must be finite, got {self.missing_eos_penalty}")
        if self.constant_length is not None:
            check_positive(self.constant_length, "constant_length")
        elif self.aggregation == "constant":
            raise ValueError('aggregation "constant" needs constant_length, got None')
        name = type(self).__name__
        if self.per_response and self.aggregation != "sequence":
            raise ValueError(f'aggregation must be "sequence" for {name}, got {self.aggregation!r}')
        self._check_range(math.inf, "entropy_advantage")
        if self.entropy_advantage and not self.weighs_by_advantage:
            raise ValueError(f"entropy_advantage must be 0 for {name}, got {self.entropy_advantage}")
        if not 1 < self.entropy_advantage_bound < math.inf:
            raise ValueError(f"entropy_advantage_bound must be above 1, got {self.entropy_advantage_bound}")
        if self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling must be at least 0, got {self.dynamic_sampling}")
        if self.dynamic_sampling and not self.compares_responses:
            raise ValueError(f"dynamic_sampling must be 0 for {name}, which compares no responses")

    @abstractmethod
    def advantages(self, experience: Experience) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"] | None]:
        """Advantages of each token over the global batch, and the critic's targets (None without a critic)."""

    @abstractmethod
    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Losses of each token.

        Args:
            scores: outputs of the current policy.
            batch: rows of an experience with advantages.
        """

    def network(self, features: int) -> tuple[nn.Module, float] | None:
        """A network of prompt features ``(b, features)`` and its learning rate; None if there is none.

        It is trained with the policy; its outputs are ``PolicyOutput.network``.
        """
        return None

    def kl_coefficient(self) -> KLCoefficient:
        """A new weight of the KL, fixed or adaptive."""
        return KLCoefficient(self.kl_div_loss_weight, target=self.kl_target, horizon=self.kl_horizon)

    def _check_range(self, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= high or math.isinf(value):
                raise ValueError(f"{name} must be a finite number in [0, {high}], got {value}")


@typed
@dataclass(frozen=True, kw_only=True)
class ClippedObjective(Objective):
    """An objective with PPO's clipped ratio (arXiv 1707.06347, equation 7).

    Args:
        eps_clip: distance from 1 at which the probability ratio is clipped.
        eps_clip_high: distance above 1, if different (arXiv 2503.14476, "clip-higher"); null for ``eps_clip``.
        dual_clip: largest ratio that multiplies a negative advantage (arXiv 1912.09729, equation 5); null for no limit.
    """

    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps_clip < 1:
            raise ValueError(f"eps_clip must be in (0, 1), got {self.eps_clip}")
        check_above_zero(self.eps_clip_high, "eps_clip_high")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")

    def token_loss(self, scores: PolicyOutput, batch: Experience) -> TokenLoss:
        """Minus the clipped surrogate of each token."""
        assert batch.advantages is not None
        return TokenLoss(
            *clipped_surrogate(
                scores.log_probs,
                batch.log_probs,
                batch.advantages,
                eps_clip=self.eps_clip,
                eps_clip_high=self.eps_clip_high,
                dual_clip=self.dual_clip,
            )
        )
