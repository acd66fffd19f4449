"""One optimizer update of a policy on a minibatch: loss, gradients over micro-batches and processes, metrics.

Processes share the minibatch, weigh their tokens by the GLOBAL minibatch and sum their gradients once, after the last
backward: two processes make the same update as one. (``DistributedDataParallel`` is not used: a base with the scopes of
several models has parameters without a gradient.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.distributed import all_reduce_gradients, rank, world_size
from lm_core.training.optimization import NonFiniteGuard, clip_global_norm, learning_rate_scale, optimizer_groups
from palm_rlhf.rl.advantages import entropy_shaped
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.experience import Experience, all_gathered
from palm_rlhf.rl.kl import KLCoefficient, kl_estimate
from palm_rlhf.rl.losses import token_weights
from palm_rlhf.rl.objectives import Objective
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.state import Sums, combined, is_maximum


class PolicyUpdate:
    """Optimizer updates of a policy."""

    def __init__(
        self,
        policy: ActorCritic,
        objective: Objective,
        config: RLConfig,
        *,
        kl: KLCoefficient,
        guard: NonFiniteGuard,
        network: tuple[nn.Module, float] | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.config = config
        self.kl = kl
        self.network: nn.Module | None = None if network is None else network[0]
        self.network_lr = 0.0 if network is None else network[1]
        self.unit = objective.group_size if objective.couples_responses else 1
        self.actor_parameters = policy.actor_parameters()
        self.critic_parameters = policy.critic_parameters()
        self.network_parameters = [] if self.network is None else list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self._groups(), betas=config.betas)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        #: updates of the whole run, over which learning rates rise and fall; None keeps them at their peaks
        self.total_steps: int | None = None
        self.guard = guard

    def __call__(self, experience: Experience, rows: Tensor, *, number: int) -> Sums:
        """Makes one update on some rows of the global experience.

        Returns:
            Sums over the tokens of all processes; see ``update_metrics``.

        Raises:
            RuntimeError: losses were not finite in too many updates in a row.
        """
        sums = self._accumulate(experience, rows.to(experience.ids.device))
        groups = [group for group in (self.actor_parameters, self.critic_parameters, self.network_parameters) if group]
        all_reduce_gradients([parameter for group in groups for parameter in group])
        norms = [clip_global_norm(group, self.config.max_grad_norm) for group in groups]
        total = combined(*all_gathered([{name: float(value) for name, value in sums.items()}]))
        norm = torch.stack([part.float() for part in norms]).sum()
        scale = self._learning_rate_scale(number)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        if self.guard.allows(number, torch.tensor(total["loss"]), norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = self.config.actor_lr * scale
        return {**total, "grad_norm": float(norms[0]), "learning_rate": rate, "updates": 1.0}

    def _learning_rate_scale(self, number: int) -> float:
        """Factor on the learning rates of the update ``number``, counted from 1."""
        total = self.total_steps
        if total is None:
            return 1.0
        return learning_rate_scale(
            number - 1,
            warmup_steps=int(self.config.warmup * total),
            total_steps=total,
            final_scale=self.config.final_learning_rate,
        )

    def _accumulate(self, experience: Experience, rows: Tensor) -> dict[str, Tensor]:
        """Gradients of this process's share of the rows, a micro-batch at a time."""
        objective = self.objective
        mask = experience.response_mask[rows]
        if objective.mask_truncated:
            mask = mask & experience.finished[rows, None]
        weights = token_weights(mask, objective.aggregation, max_new_tokens=objective.constant_length)
        sums: dict[str, Tensor] = {}
        with self.policy.learning():
            for part in self.micro_batches(torch.arange(rows.shape[0], device=rows.device)):
                loss, measured = self.loss(experience.rows(rows[part]), weights[part])
                loss.backward()
                for name, value in measured.items():
                    combine = torch.maximum if is_maximum(name) else torch.add
                    sums[name] = combine(sums[name], value) if name in sums else value
        return sums

    def micro_batches(self, rows: Tensor) -> Sequence[Tensor]:
        """This process's share of a minibatch, a micro-batch at a time; empty if there are too few rows."""
        units = rows.reshape(-1, self.unit)[rank() :: world_size()]
        if not units.shape[0]:
            return ()
        size = units.shape[0] if self.config.micro_batch_size is None else self.config.micro_batch_size // self.unit
        return [part.flatten() for part in units.split(size)]

    def loss(self, batch: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of some rows as their share of the minibatch's, and sums for the metrics."""
        objective, mask = self.objective, batch.response_mask
        output = self.policy(batch.ids, batch.mask, mask, **batch.sampled_by())
        assert output.entropy is not None
        # loss of the policy, entropy bonus and KL
        weights = weights[:, : mask.shape[1]].to(output.log_probs)
        if self.network is not None:
            assert batch.prompt_features is not None
            output = replace(output, network=self.network(batch.prompt_features[:, 0]))
        if objective.entropy_advantage:
            assert batch.advantages is not None
            shaped = entropy_shaped(
                batch.advantages,
                output.entropy.to(batch.advantages),
                weight=objective.entropy_advantage,
                bound=objective.entropy_advantage_bound,
            )
            batch = replace(batch, advantages=shaped.where(mask, 0))
        terms = objective.token_loss(output, batch)
        # responses of another engine have importance weights
        sampled = weights if batch.importance is None else weights * batch.importance.to(weights)
        policy_loss = (terms.policy * sampled).sum()
        loss = policy_loss
        if objective.beta_s:
            loss = loss - objective.beta_s * (output.entropy * weights).sum()
        if objective.kl_in == "loss" and batch.reference is not None:
            kl = kl_estimate(output.unfiltered, batch.reference, objective.kl_estimator)
            loss = loss + self.kl.value * (kl * weights).sum()
        # sums for the metrics, and the loss of the critic
        measured = {
            "policy_loss": policy_loss,
            "tokens": mask.sum(),
            "responses": torch.tensor(len(batch)),
            "entropy_tokens": output.entropy.where(mask, 0).sum(),
        }
        if terms.value is not None:
            value_loss = (terms.value * weights).sum()
            loss = loss + terms.value_weight * value_loss
            measured["value_loss"] = value_loss
        if terms.value_clipped is not None:
            measured["value_clipped_tokens"] = (terms.value_clipped & mask).sum()
        if terms.ratio is not None and terms.clipped is not None:
            ratio = terms.ratio.where(mask, 1)
            measured |= {
                "clipped_tokens": (terms.clipped & mask).sum(),
                "ratio_tokens": terms.ratio.where(mask, 0).sum(),
                "ratio_max": ratio.max(),
                "deviation_max": (ratio - 1).abs().max(),
                # k3 of old and new policy
                "step_kl_tokens": (ratio - 1 - ratio.log()).sum(),
            }
        if batch.reference is not None and batch.unfiltered is None:
            measured["kl_tokens"] = (output.unfiltered - batch.reference).where(mask, 0).sum()
        measured["loss"] = loss
        return loss, {name: value.detach().double() for name, value in measured.items()}

    def _groups(self) -> list[dict[str, Any]]:
        config = self.config
        groups = []
        for parameters, rate, decay in (
            (self.actor_parameters, config.actor_lr, config.actor_wd),
            (self.critic_parameters, config.critic_lr, config.critic_wd),
        ):
            if parameters:
                split = optimizer_groups(self.policy, weight_decay=decay, parameters=parameters)
                groups += [{**group, "lr": rate} for group in split]
        if self.network is not None:
            groups.append({"params": self.network_parameters, "lr": self.network_lr, "weight_decay": 0.0})
        return groups


def update_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a phase from the sums of its updates: means over updates, response tokens or responses."""
    per_update = ("loss", "policy_loss", "value_loss", "grad_norm", "learning_rate")
    per_token = {
        "entropy": "entropy_tokens",
        "clip_fraction": "clipped_tokens",
        "ratio_mean": "ratio_tokens",
        "step_kl": "step_kl_tokens",
        "value_clip_fraction": "value_clipped_tokens",
        "kl_per_token": "kl_tokens",
    }
    means = [(name, name, "updates") for name in per_update]
    means += [(name, source, "tokens") for name, source in per_token.items()]
    means.append(("kl", "kl_tokens", "responses"))
    metrics = {name: sums[source] / max(sums[count], 1.0) for name, source, count in means if source in sums}
    return metrics | ({"ratio_max": sums["ratio_max"]} if "ratio_max" in sums else {})
