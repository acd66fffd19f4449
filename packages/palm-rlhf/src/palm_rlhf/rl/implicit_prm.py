"""Implicit process rewards: credit for each token from a model that was trained on outcomes alone.

A language model trained so that ``sigmoid(beta * sum(log-prob - reference log-prob))`` predicts the outcome of a
response gives ``beta * (log-prob - reference log-prob)`` as the reward of each token (arXiv 2412.01981, equation 5). It
may be trained along with the policy, on the outcomes of its responses (PRIME, arXiv 2502.01456).

Legend: b batch, n sequence.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.checks import check_above_zero, check_positive, typed
from lm_core.distributed import world_size
from palm_rlhf.data.rollouts import Rollout
from palm_rlhf.reward.log import RewardLog
from palm_rlhf.reward.rewards import RolloutReward, as_reward
from palm_rlhf.rl.policy import ActorCritic


class ImplicitPRM(RolloutReward):
    """Process rewards of a language model, relative to its reference.

    Args:
        model: a PaLM, which gets a LoRA scope "prm" and may be the policy's, a Hugging Face model of its own, or an
            ``ActorCritic`` without critic, whose actor and reference are then taken.
        beta: scale of the rewards.
        outcome: reward in [0, 1] of whole responses. In a run the model learns from its values, then scores the
            responses; validation scores alone. None for a model that stays as it is.
        learning_rate: learning rate of that training, by AdamW.
        batch_size: responses per forward pass.
        **options: further arguments of ``ActorCritic``, such as ``actor_lora_r``.

    Attributes:
        model: the ``ActorCritic`` of the process reward model.

    Raises:
        ValueError: a number is out of range, or the model has a critic.
    """

    @typed
    def __init__(
        self,
        model: Any,
        *,
        beta: float = 0.05,
        outcome: Any = None,
        learning_rate: float = 1e-4,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be a finite number above 0, got {beta}")
        check_above_zero(learning_rate, "learning_rate")
        check_positive(batch_size, "batch_size")
        if not isinstance(model, ActorCritic):
            model = ActorCritic(model, with_critic=False, actor_lora_scope="prm", **options)
        if model.value_head is not None:
            raise ValueError("model must be an ActorCritic with with_critic=False, got one with a critic")
        self.model: ActorCritic = model
        self.beta = beta
        self.outcome = None if outcome is None else as_reward(outcome)
        self.batch_size = batch_size
        self.parameters = self.model.actor_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Float[Tensor, "b n"]:
        """Rewards of tokens, in training after learning from the outcomes."""
        if self.outcome is not None and log is not None and log.learn:
            if world_size() > 1:
                raise ValueError(f"ImplicitPRM learns in one process only, got {world_size()} with an outcome")
            labels = rollout.totals(self.outcome(rollout, log).to(self.model.device))
            known = ~labels.isnan()
            loss = self.fit(rollout, labels.nan_to_num(), known) if bool(known.any()) else 0.0
            log.log_metric("prm_loss", loss)
        with torch.no_grad(), eval_mode(self.model):
            return self._credits(rollout.to(self.model.device))

    def fit(self, rollout: Rollout, labels: Float[Tensor, " b"], known: Tensor | None = None) -> float:
        """One update on outcomes in [0, 1]; returns the cross-entropy.

        Args:
            rollout: responses.
            labels: outcome of each response.
            known: False for responses without one; all by default.

        Raises:
            ValueError: another number of labels, or one outside [0, 1].
        """
        labels = labels.to(self.model.device, torch.float32)
        if labels.shape != (len(rollout),) or not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(f"labels must be {len(rollout)} numbers in [0, 1], got {labels.tolist()}"[:200])
        rollout = rollout.to(self.model.device)
        known = torch.ones_like(labels, dtype=torch.bool) if known is None else known
        total = 0.0
        with self.model.learning():
            for rows in torch.arange(len(rollout), device=labels.device).split(self.batch_size):
                logits = self._credits(rollout, rows).sum(dim=1)
                losses = F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none")
                loss = losses.where(known[rows], 0).sum() / known.sum()
                loss.backward()
                total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _credits(self, rollout: Rollout, rows: Tensor | None = None) -> Float[Tensor, "b n"]:
        """``beta * (log-prob - reference log-prob)`` of response tokens, 0 elsewhere."""
        if rows is None:
            parts = torch.arange(len(rollout), device=rollout.ids.device).split(self.batch_size)
            return torch.cat([self._credits(rollout, part) for part in parts])
        ids, mask, response = (t[rows] for t in (rollout.ids, rollout.mask, rollout.response_mask))
        with torch.no_grad():
            reference = self.model.score(ids, mask, response, role="reference").log_probs
        log_probs = self.model.score(ids, mask, response).log_probs
        return F.pad(self.beta * (log_probs - reference).float(), (1, 0))

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimizer state; empty for a model that does not learn."""
        if self.outcome is None:
            return {}
        return {
            "weights": {str(index): parameter.detach() for index, parameter in enumerate(self.parameters)},
            "optimizer": {
                str(index): dict(self.optimizer.state[parameter])
                for index, parameter in enumerate(self.parameters)
                if parameter in self.optimizer.state
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from ``state``."""
        for index, parameter in enumerate(self.parameters):
            parameter.data.copy_(state["weights"][str(index)])
            if str(index) in state["optimizer"]:
                moments = state["optimizer"][str(index)]
                self.optimizer.state[parameter] = {name: torch.as_tensor(value) for name, value in moments.items()}
