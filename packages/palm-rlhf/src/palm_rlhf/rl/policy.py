"""Actor, critic and reference policy as adapters on one shared base; their log-probs and values of responses.

With LoRA all three are ONE network: actor and critic are adapters on a frozen base (scopes of a PaLM, peft adapters of
a Hugging Face model), and the reference is the base with adapters off. Without LoRA the network itself is trained and
the reference is a frozen copy of the initial weights; a critic with LoRA then adapts that frozen copy.

The critic is token-level: its value at a position is a linear map of its network's state for the tokens up to and
including that position, so it never reads the token whose return it predicts. Pooled values are the mean over the
PROMPT only, one for the whole response.

Legend: b batch, n sequence, m = n - 1, v vocabulary, k bins.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import Generation
from lm_core.checks import check_positive, check_probability, typed
from lm_core.generation.generate import generate
from lm_core.nn.masking import masked_mean
from lm_core.training.accelerator import Precision, autocast, pick_precision
from palm_rlhf.model.palm import PaLM
from palm_rlhf.rl.log_probs import PolicyOutput, hidden_scores, logit_scores
from palm_rlhf.rl.value_bins import ValueBins

Role = Literal["actor", "critic", "reference"]


class ActorCritic(nn.Module):
    """Actor, critic and reference policy.

    Args:
        palm: a ``PaLM``; a Hugging Face causal language model or a ``PeftModel`` of one, whose active adapter is then
            the actor; or any model that ``lm_core.adapters.as_causal_lm`` accepts (without LoRA).
        critic_palm: separate network of the critic; by default the policy's.
        pooled_values: predicts one value per response, from its prompt, instead of one per token.
        actor_lora: trains an adapter instead of the whole network.
        critic_lora: trains an adapter for the critic instead of a copy of the network.
        actor_lora_r: rank of the actor's adapter; the PaLM's ``lora_r`` by default, 8 for other models.
        critic_lora_r: rank of the critic's adapter; default as for ``actor_lora_r``.
        actor_lora_scope: name of the actor's adapter; an existing one is trained further.
        critic_lora_scope: name of the critic's adapter.
        actor_dropout: dropout on the inputs of the actor's adapter; without LoRA, everywhere in a PaLM.
        critic_dropout: dropout of the critic, likewise.
        value_range: lower and upper bound of a critic that classifies over bins (HL-Gauss); null for regression.
        value_bins: number of bins of ``value_range``.
        with_critic: False for a policy without a critic.
        precision: precision of matrix products, in sampling, scoring and training; see ``lm_core.pick_precision``.
            Weights, log-probabilities, values and losses stay in float32.

    Raises:
        ValueError: LoRA for a network that is neither a PaLM nor Hugging Face's, one scope for both roles, another rank
            than that of the existing scope, a policy that is not causal, a critic without hidden states, or a
            precision that the device does not support.
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
        actor_lora_scope: str = "actor",
        critic_lora_scope: str = "critic",
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        *,
        value_range: tuple[float, float] | None = None,
        value_bins: int = 51,
        with_critic: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        critic_lora = critic_lora and with_critic
        check_probability(actor_dropout, "actor_dropout")
        check_probability(critic_dropout, "critic_dropout")
        for name, r in (("actor_lora_r", actor_lora_r), ("critic_lora_r", critic_lora_r)):
            if r is not None:
                check_positive(r, name)
        if actor_lora and critic_lora and actor_lora_scope == critic_lora_scope:
            raise ValueError(f"actor and critic need scopes of different names, got {actor_lora_scope!r} for both")
        # networks; the reference and a critic without LoRA are copies made before adapters are added
        self.bins = None if value_range is None else ValueBins(low=value_range[0], high=value_range[1], bins=value_bins)
        actor = _language_model(palm, "palm")
        other = None if critic_palm is None else _language_model(critic_palm, "critic")
        _check_networks(actor, other or actor, actor_lora=actor_lora, critic_lora=critic_lora, with_critic=with_critic)
        self.precision = precision
        self.pooled_values = pooled_values
        self.reference = None if actor_lora else copy.deepcopy(actor).requires_grad_(False).eval()
        self.critic = None
        if with_critic:
            shared = actor if self.reference is None else self.reference
            self.critic = other or (shared if critic_lora else copy.deepcopy(actor))
        self.actor = actor
        pick_precision(precision, self.device)  # raises if the device does not support it
        self.scopes: dict[Role, str | None] = {"actor": None, "critic": None, "reference": None}
        # adapters, or dropout of the network itself
        parts: tuple[tuple[Role, Any, bool, str, int | None, float], ...] = (
            ("actor", actor, actor_lora, actor_lora_scope, actor_lora_r, actor_dropout),
            ("critic", self.critic, critic_lora, critic_lora_scope, critic_lora_r, critic_dropout),
        )
        for role, network, lora, scope, r, dropout in parts:
            if network is not None and lora:
                self.scopes[role] = _add_adapter(network, scope, r, dropout, adopt=role == "actor")
            elif isinstance(network, PaLM) and dropout:
                network.set_dropout(dropout)
            elif network is not None and dropout:
                raise ValueError(f"{role}_dropout without LoRA is set in the model's own configuration")
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        #: updates need the training mode; otherwise old and new log-probs come from evaluation mode
        self.learns_in_training_mode = actor_dropout > 0 or critic_dropout > 0 or recomputes
        self.value_head: nn.Linear | None = None
        if with_critic:
            weight = self.critic.output_weight  # type: ignore[union-attr]
            self.value_head = nn.Linear(weight.shape[1], 1 if self.bins is None else value_bins).to(weight)
            nn.init.zeros_(self.value_head.weight)  # initial values are 0
            nn.init.zeros_(self.value_head.bias)

    @property
    def palm(self) -> Any:
        """The actor's network."""
        return self.actor

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return torch.device(next(self.actor.parameters()).device)

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary; None if the network does not define it."""
        return _vocab_size(self.actor)

    @property
    def max_length(self) -> int | None:
        """Maximum length of a sequence; None if the network has no limit."""
        return getattr(self.actor, "max_length", None)

    @contextlib.contextmanager
    def as_role(self, role: Role, mask: Tensor | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The language model of a role and its keyword arguments, with that role's adapter and precision active."""
        network = {"actor": self.actor, "critic": self.critic, "reference": self.reference or self.actor}[role]
        scope = self.scopes[role]
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast(self.precision, self.device))
            if isinstance(network, PaLM):  # causal: padding on the right changes nothing
                yield network, {"disable_lora": True} if scope is None else {"finetune_scope": scope}
                return
            if _has_adapters(network):
                stack.enter_context(_active_adapter(network.model, scope))
            yield network, {} if mask is None or bool(mask.all()) else {"mask": mask}

    def actor_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the actor, in a fixed order."""
        return _trained(self.actor, self.scopes["actor"])

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the critic and its head, in a fixed order."""
        if self.value_head is None:
            return []
        return [*_trained(self.critic, self.scopes["critic"]), *self.value_head.parameters()]

    def generate(self, prompts: Any, *, role: Role = "actor", **settings: Any) -> Generation:
        """Responses of the actor or the reference; arguments as in ``lm_core.generate``."""
        with self.as_role(role) as (network, arguments):
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
        with_entropy: bool = False,
    ) -> PolicyOutput:
        """Log-probabilities of responses under the actor or the reference."""
        labels = ids[:, 1:][response_mask]
        sets = None if kept is None else kept[response_mask]
        with self.as_role(role, mask) as (network, arguments):
            weight = getattr(network, "output_weight", None)
            if isinstance(weight, Tensor) and hasattr(network, "hidden"):
                if role == "reference" or self.scopes[role] is not None:
                    weight = weight.detach()
                # only the positions before response tokens go through the output layer
                rows = network.hidden(ids, **arguments)[:, :-1][response_mask]
                scores = hidden_scores(rows, weight, labels, sets, temperature, with_entropy)
            else:
                logits = network(ids, **arguments)[:, :-1][response_mask]
                scores = logit_scores(logits, labels, sets, temperature, with_entropy)
        blank = scores[0].new_zeros(response_mask.shape)
        sampled, unfiltered = (blank.masked_scatter(response_mask, t) for t in scores[:2])
        entropy = None if scores[2] is None else blank.masked_scatter(response_mask, scores[2])
        return PolicyOutput(sampled, unfiltered, entropy)

    def value_logits(
        self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], response_mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b m k"]:
        """Outputs of the value head for positions 0 to n - 2."""
        assert self.value_head is not None
        with self.as_role("critic", mask) as (network, arguments):
            hidden = network.hidden(ids, **arguments)[:, :-1].to(self.value_head.weight)
        if self.pooled_values:
            positions = torch.arange(hidden.shape[1], device=ids.device)
            # the position before the first response token is the prompt's last
            prompt = positions <= response_mask.int().argmax(dim=1, keepdim=True)
            hidden = masked_mean(hidden, prompt, dim=1, keepdim=True).expand_as(hidden)
        return self.value_head(hidden)

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
    ) -> PolicyOutput:
        """Log-probabilities and entropies of the actor, values of the critic.

        Args:
            ids: prompts and responses, right-padded.
            mask: True at real tokens.
            response_mask: True where the next token belongs to the response.
            temperature: sampling temperature of the responses.
            kept: packed kept sets of a filtered draw; see ``palm_rlhf.rl.log_probs.pack_kept``.
        """
        output = self.score(ids, mask, response_mask, temperature=temperature, kept=kept, with_entropy=True)
        if self.value_head is None:
            return output
        logits = self.value_logits(ids, mask, response_mask)
        values = self.values(logits).where(response_mask, 0)
        return replace(output, values=values, value_logits=None if self.bins is None else logits, bins=self.bins)


def _language_model(x: Any, name: str) -> Any:
    if isinstance(x, PaLM):
        if not x.causal:
            raise ValueError(f"{name} must be causal to be trained as a policy, got causal=False")
        return x
    if not callable(x):
        raise TypeError(f"{name} must be a PaLM or a causal language model, got {type(x).__name__}")
    network = as_causal_lm(x)
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise ValueError(f"{name} must have parameters to train, got {type(x).__name__}")
    return network


def _check_networks(actor: Any, critic: Any, *, actor_lora: bool, critic_lora: bool, with_critic: bool) -> None:
    for name, lora, network in (("actor_lora", actor_lora, actor), ("critic_lora", critic_lora, critic)):
        if lora and not isinstance(network, PaLM) and not _is_hugging_face(network):
            raise ValueError(f"{name} needs a PaLM or a Hugging Face model, got {type(network.model).__name__}")
    if not with_critic:
        return
    actor_size, critic_size = _vocab_size(actor), _vocab_size(critic)
    if actor_size is not None and critic_size is not None and critic_size < actor_size:
        raise ValueError(f"critic must know all {actor_size} tokens of the policy, got {critic_size}")
    if not isinstance(getattr(critic, "output_weight", None), Tensor) or not hasattr(critic, "hidden"):
        raise ValueError("critic needs a network that gives its hidden states (hidden and output_weight)")


def _vocab_size(network: Any) -> int | None:
    size: int | None = network.num_tokens if isinstance(network, PaLM) else getattr(network, "vocab_size", None)
    return size


def _is_hugging_face(network: Any) -> bool:
    inner = getattr(network, "model", None)
    return any(cls.__name__ in ("PreTrainedModel", "PeftModel") for cls in type(inner).__mro__)


def _has_adapters(network: Any) -> bool:
    return hasattr(getattr(network, "model", None), "peft_config")


def _trained(network: Any, scope: str | None) -> list[nn.Parameter]:
    """Parameters of the adapter ``scope``, or of the whole network without one."""
    if isinstance(network, PaLM):
        return network.palm_parameters() if scope is None else list(network.finetune_parameters(scope))
    if scope is None:
        return list(network.parameters())
    return [parameter for name, parameter in network.named_parameters() if f".{scope}." in name]


def _add_adapter(network: Any, scope: str, r: int | None, dropout: float, *, adopt: bool) -> str:
    """Adds an adapter unless it exists; returns its name (with ``adopt``, the active adapter of a ``PeftModel``)."""
    if isinstance(network, PaLM):
        if scope not in network.finetune_modules:
            network.add_finetune_params(scope, r, lora_dropout=dropout)
        elif r not in (None, existing := network.scope_modules(scope).settings.r):
            raise ValueError(f"finetune scope {scope!r} exists with lora_r {existing}, got {r}; choose another scope")
        return scope
    from peft import LoraConfig, get_peft_model

    adapters = network.model.peft_config if _has_adapters(network) else {}
    if scope in adapters:
        return scope
    if adapters and adopt:
        return str(network.model.active_adapter)
    config = LoraConfig(r=r or 8, lora_alpha=r or 8, lora_dropout=dropout, target_modules="all-linear")
    if adapters:
        active = network.model.active_adapter
        network.model.add_adapter(scope, config)
        network.model.set_adapter(active)
    else:
        training = network.training
        network.model = get_peft_model(network.model, config, adapter_name=scope)
        network.train(training)
    _require_gradients([parameter for name, parameter in network.named_parameters() if ".lora_" in name])
    return scope


@contextlib.contextmanager
def _active_adapter(model: Any, scope: str | None) -> Iterator[None]:
    """Activates one peft adapter, or disables all; restores the previous state on exit."""
    before = model.active_adapter
    if scope == before:
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter() if scope is None else contextlib.nullcontext():
            if scope is not None:
                model.set_adapter(scope)
                _require_gradients(trainable)
            yield
    finally:
        if scope is not None:
            model.set_adapter(before)
        _require_gradients(trainable)


def _require_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Makes parameters trainable again: peft freezes every adapter but the active one on a switch."""
    for parameter in parameters:
        parameter.requires_grad_(True)
