"""One optimizer update of a policy on a minibatch: loss, gradients over micro-batches and processes, metrics.

Processes share the minibatch, weigh their tokens by the GLOBAL minibatch and add up their gradients once, after the
last backward: two processes make the update that one would make. (``DistributedDataParallel`` is not used: a base that
carries the scopes of several models has parameters that a given loss does not touch.)
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm_core.distributed import all_reduce_gradients, rank, world_size
from lm_core.generation.decoding import eval_mode
from lm_core.training.optimization import NonFiniteGuard, clip_global_norm, optimizer_groups
from palm_rlhf.rl.config import PolicySettings
from palm_rlhf.rl.experience import Experience, rows_of
from palm_rlhf.rl.kl import KLCoefficient, kl_estimate
from palm_rlhf.rl.losses import clipped_surrogate, clipped_value_loss, reinforce_surrogate, token_weights
from palm_rlhf.rl.policy import ActorCritic, Judgement
from palm_rlhf.rl.state import Sums, combined, is_maximum


class PolicyUpdate:
    """Makes updates.

    Args:
        policy: what is trained.
        settings: of the run.
        kl: weight of the divergence from the reference.
    """

    def __init__(self, policy: ActorCritic, settings: PolicySettings, kl: KLCoefficient) -> None:
        self.policy, self.settings, self.kl = policy, settings, kl
        self.actor_parameters = policy.actor_parameters()
        self.critic_parameters = policy.critic_parameters()
        self.optimizer = torch.optim.AdamW(self._groups(), betas=settings.betas)
        self.guard = NonFiniteGuard()

    def __call__(self, experience: Experience, rows: Tensor, *, number: int) -> Sums:
        """Learns from some rows of an experience.

        Args:
            experience: of all processes, with advantages.
            rows: the minibatch, of all processes.
            number: of this update, for messages.

        Returns:
            What was measured, summed over the tokens of all processes; see ``update_metrics``.

        Raises:
            RuntimeError: losses were not finite too often in a row.
        """
        sums = self._accumulate(experience, rows.to(experience["ids"].device))
        all_reduce_gradients([*self.actor_parameters, *self.critic_parameters])
        norms = [
            clip_global_norm(group, self.settings.max_grad_norm)
            for group in (self.actor_parameters, self.critic_parameters)
            if group
        ]
        total = _over_processes(sums)
        norm = torch.stack([one.float() for one in norms]).sum()
        if self.guard.allows(number, torch.tensor(total["loss"]), norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**total, "grad_norm": float(norms[0]), "updates": 1.0}

    def _accumulate(self, experience: Experience, rows: Tensor) -> dict[str, Tensor]:
        """Gradients of this process's share of the rows, a micro-batch at a time."""
        settings, policy = self.settings, self.policy
        weights = token_weights(
            experience["response_mask"][rows], settings.aggregation, max_new_tokens=settings.constant_length
        )
        sums: dict[str, Tensor] = {}
        with _mode(policy):
            for part in self.micro_batches(torch.arange(rows.shape[0], device=rows.device)):
                loss, measured = self.loss(experience, rows[part], weights[part])
                loss.backward()
                for name, value in measured.items():
                    combine = torch.maximum if is_maximum(name) else torch.add
                    sums[name] = combine(sums[name], value) if name in sums else value
        return sums

    def micro_batches(self, rows: Tensor) -> Sequence[Tensor]:
        """What this process learns from of a minibatch, a micro-batch at a time; nothing if there are too few rows."""
        share = rows[rank() :: world_size()]
        return share.split(self.settings.micro_batch_size or max(1, share.shape[0])) if share.shape[0] else ()

    def loss(self, experience: Experience, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The share that some rows have in the loss of their minibatch, and sums for the metrics.

        Args:
            experience: with advantages.
            rows: of the experience.
            weights: of these rows' tokens in the minibatch.
        """
        settings = self.settings
        part = rows_of(experience, rows)
        mask = part["response_mask"]
        judgement = self.policy(
            part["ids"], part["mask"], mask, temperature=float(experience["temperature"]), kept=part.get("kept")
        )
        scores = judgement.scores
        weights = weights[:, : mask.shape[1]].to(scores.log_probs)
        if settings.advantage_estimator == "reinforce":
            surrogate = reinforce_surrogate(scores.log_probs, part["log_probs"], part["advantages"])
        else:
            surrogate = clipped_surrogate(
                scores.log_probs,
                part["log_probs"],
                part["advantages"],
                eps_clip=settings.eps_clip,
                eps_clip_high=settings.eps_clip_high,
            )
        divergence = kl_estimate(scores.unfiltered, part["reference"], settings.kl_estimator)
        policy_loss = (surrogate.loss * weights).sum()
        loss = policy_loss - settings.beta_s * (scores.entropy * weights).sum()
        if settings.kl_in == "loss" and self.kl.value:
            loss = loss + self.kl.value * (divergence * weights).sum()
        measured = {"policy_loss": policy_loss}
        if settings.advantage_estimator == "gae":
            value_loss, clipped = self._value_loss(judgement, part)
            value_loss = (value_loss * weights).sum()
            loss = loss + settings.value_loss_weight * value_loss
            measured |= {"value_loss": value_loss, "value_clipped_tokens": (clipped & mask).sum()}
        ratio = surrogate.ratio.where(mask, 1)
        measured |= {
            "loss": loss,
            "tokens": mask.sum(),
            "clipped_tokens": (surrogate.clipped & mask).sum(),
            "ratio_tokens": surrogate.ratio.where(mask, 0).sum(),
            "ratio_max": ratio.max(),
            "deviation_max": (ratio - 1).abs().max(),
            "entropy_tokens": scores.entropy.where(mask, 0).sum(),
            "step_kl_tokens": kl_estimate(part["log_probs"], scores.log_probs, "k3").where(mask, 0).sum(),
        }
        return loss, {name: value.detach().double() for name, value in measured.items()}

    def _value_loss(self, judgement: Judgement, part: Experience) -> tuple[Tensor, Tensor]:
        if self.policy.bins is not None:
            assert judgement.value_logits is not None
            loss = self.policy.bins.loss(judgement.value_logits, part["returns"])
            return loss, torch.zeros_like(part["response_mask"])
        assert judgement.values is not None
        return clipped_value_loss(
            judgement.values, part["values"], part["returns"].to(judgement.values), value_clip=self.settings.value_clip
        )

    def _groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        groups = []
        for parameters, rate, decay in (
            (self.actor_parameters, settings.actor_lr, settings.actor_wd),
            (self.critic_parameters, settings.critic_lr, settings.critic_wd),
        ):
            if parameters:
                made = optimizer_groups(self.policy, weight_decay=decay, parameters=parameters)
                groups += [{**group, "lr": rate} for group in made]
        return groups

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and guard."""
        return {"optimizer": self.optimizer.state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``, with the learning rates and decays of this run."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group, fresh in zip(self.optimizer.param_groups, self._groups(), strict=True):
            group.update({name: fresh[name] for name in ("lr", "weight_decay")})
        self.guard.load_state_dict(state["guard"])


def update_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics out of the sums of a phase's updates: means over updates, or over response tokens."""
    tokens, updates = max(sums["tokens"], 1.0), max(sums["updates"], 1.0)
    metrics = {
        "loss": sums["loss"] / updates,
        "policy_loss": sums["policy_loss"] / updates,
        "entropy": sums["entropy_tokens"] / tokens,
        "clip_fraction": sums["clipped_tokens"] / tokens,
        "ratio_mean": sums["ratio_tokens"] / tokens,
        "ratio_max": sums["ratio_max"],
        "step_kl": sums["step_kl_tokens"] / tokens,
        "grad_norm": sums["grad_norm"] / updates,
    }
    if "value_loss" in sums:
        metrics["value_loss"] = sums["value_loss"] / updates
        metrics["value_clip_fraction"] = sums["value_clipped_tokens"] / tokens
    return metrics


@contextlib.contextmanager
def _mode(policy: ActorCritic) -> Any:
    """Training mode where dropout or recomputation needs it; else old and new probabilities come from the same mode."""
    if not policy.roles.learns_in_training_mode:
        with eval_mode(policy):
            yield
        return
    was_training = policy.training
    policy.train()
    try:
        yield
    finally:
        policy.train(was_training)


def _over_processes(sums: Mapping[str, Tensor]) -> Sums:
    """Sums of all processes; one without rows has none."""
    own = {name: float(value) for name, value in sums.items()}
    if world_size() == 1:
        return own
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    return combined(*parts)
