"""A policy with a critic: log-probabilities, entropies and values of responses in one forward.

The critic is token-level: its value at a position is a linear map of what the critic's network makes of the tokens up
to and including that position, so it never reads the token whose return it predicts. Pooled values are the mean over
the PROMPT only, one for the whole response.

Legend: b batch, n sequence, v vocabulary.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checks import typed
from lm_core.generation.decoding import Generation
from lm_core.generation.generate import generate
from lm_core.nn.masking import masked_mean
from lm_core.training.accelerator import Precision, autocast, pick_precision
from palm_rlhf.model.palm import PaLM
from palm_rlhf.rl.log_probs import Scores, score_responses
from palm_rlhf.rl.roles import ACTOR, CRITIC, Role, Roles
from palm_rlhf.rl.value_bins import ValueBins


@dataclass(frozen=True)
class Judgement:
    """What ``ActorCritic`` says of responses; everything is ``(b, n - 1)``, aligned with the token it precedes.

    Attributes:
        scores: log-probabilities and entropies.
        values: expected return before each response token.
        value_logits: ``(b, n - 1, bins)`` with binned values, else None.
    """

    scores: Scores
    values: Float[Tensor, "b m"] | None
    value_logits: Tensor | None


class ActorCritic(nn.Module):
    """Actor, critic and reference policy.

    Args:
        palm: the policy; see ``palm_rlhf.rl.roles.Roles``, also for the arguments not listed here.
        critic_palm: another network for the critic.
        pooled_values: one value for a response, from its prompt.
        value_range: makes the critic a classifier over bins of this range (HL-Gauss) instead of a regressor.
        value_bins: how many.
        with_critic: False is a policy alone.
        precision: of matrix products, in drawing, judging and learning alike; see ``lm_core.pick_precision``.
            Weights, log-probabilities, values and losses stay in float32.

    Raises:
        ValueError: see ``Roles``; also a critic's network without hidden states, or a precision the device has not.
    """

    @typed
    def __init__(
        self,
        palm: Any,
        critic_palm: Any = None,
        pooled_values: bool = False,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int | None = None,
        critic_lora_r: int | None = None,
        actor_lora_scope: str = ACTOR,
        critic_lora_scope: str = CRITIC,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        *,
        value_range: tuple[float, float] | None = None,
        value_bins: int = 51,
        with_critic: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.bins = None
        if value_range is not None:
            self.bins = ValueBins(low=value_range[0], high=value_range[1], bins=value_bins)
        self.roles = Roles(
            palm,
            critic=critic_palm,
            with_critic=with_critic,
            actor_lora=actor_lora,
            critic_lora=critic_lora,
            actor_lora_r=actor_lora_r,
            critic_lora_r=critic_lora_r,
            actor_lora_scope=actor_lora_scope,
            critic_lora_scope=critic_lora_scope,
            actor_dropout=actor_dropout,
            critic_dropout=critic_dropout,
        )
        self.pooled_values = pooled_values
        self.value_head: nn.Linear | None = None
        pick_precision(precision, self.device)  # refuses what the device cannot do
        if with_critic:
            weight = getattr(self.roles.critic, "output_weight", None)
            if not isinstance(weight, Tensor) or not hasattr(self.roles.critic, "hidden"):
                raise ValueError("critic needs a network that gives its hidden states (hidden and output_weight)")
            self.value_head = nn.Linear(weight.shape[1], 1 if self.bins is None else value_bins).to(weight)
            nn.init.zeros_(self.value_head.weight)  # at first every value is 0
            nn.init.zeros_(self.value_head.bias)

    @property
    def palm(self) -> Any:
        """The actor's network."""
        return self.roles.actor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.roles.actor.parameters()).device
        return device

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.precision, self.device)

    @property
    def vocab_size(self) -> int | None:
        """Ids must be below it; None if the network does not tell."""
        if isinstance(self.palm, PaLM):
            return self.palm.num_tokens
        size: int | None = getattr(self.palm, "vocab_size", None)
        return size

    @property
    def max_length(self) -> int | None:
        """Tokens a sequence may have; None if the network has no limit."""
        return getattr(self.palm, "max_length", None)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What is trained of the actor, in a fixed order."""
        return self.roles.role_parameters("actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        """What is trained of the critic, its head included, in a fixed order."""
        head = [] if self.value_head is None else list(self.value_head.parameters())
        return [*self.roles.role_parameters("critic"), *head]

    def generate(self, prompts: Any, *, role: Role = "actor", **settings: Any) -> Generation:
        """Responses of the actor (or the reference); arguments as of ``lm_core.generation.generate.generate``."""
        with self._computing(), self.roles.playing(role) as (network, arguments):
            return generate(network, prompts, **settings, **arguments)

    def score(
        self,
        ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        response_mask: Bool[Tensor, "b m"],
        *,
        role: Role = "actor",
        temperature: float = 1.0,
        kept: Tensor | None = None,
    ) -> Scores:
        """Log-probabilities and entropies of responses under the actor or the reference."""
        with self._computing(), self.roles.playing(role) as (network, arguments):
            return score_responses(
                network,
                ids,
                mask,
                response_mask,
                temperature=temperature,
                kept=kept,
                detach_output=self.roles.is_frozen(role),
                needs_mask=not isinstance(network, PaLM),
                **arguments,
            )

    def value_logits(
        self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], response_mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b m k"]:
        """What the value head says before each token but the first."""
        assert self.value_head is not None
        with self._computing(), self.roles.playing("critic") as (network, arguments):
            padded = {} if isinstance(network, PaLM) or bool(mask.all()) else {"mask": mask}
            hidden = network.hidden(ids, **padded, **arguments)[:, :-1].to(self.value_head.weight)
        if self.pooled_values:
            positions = torch.arange(hidden.shape[1], device=ids.device)
            # the state before the first response token is the last that belongs to the prompt
            prompt = positions <= response_mask.int().argmax(dim=1, keepdim=True)
            hidden = masked_mean(hidden, prompt, dim=1, keepdim=True).expand_as(hidden)
        logits: Tensor = self.value_head(hidden)
        return logits

    def values(self, logits: Float[Tensor, "b m k"]) -> Float[Tensor, "b m"]:
        """Values from the head's output."""
        return logits[..., 0] if self.bins is None else self.bins.expected(logits)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        response_mask: Bool[Tensor, "b m"],
        *,
        temperature: float = 1.0,
        kept: Tensor | None = None,
    ) -> Judgement:
        """Scores of the actor and values of the critic.

        Args:
            ids: prompts and responses, right-padded.
            mask: True at real tokens.
            response_mask: True where the next token is one of the response.
            temperature: responses were drawn at.
            kept: packed kept sets they were drawn from.
        """
        scores = self.score(ids, mask, response_mask, temperature=temperature, kept=kept)
        if self.value_head is None:
            return Judgement(scores, None, None)
        logits = self.value_logits(ids, mask, response_mask)
        values = self.values(logits).where(response_mask, 0)
        return Judgement(scores, values, logits if self.bins is not None else None)
