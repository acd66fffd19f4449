"""Who plays which part in reinforcement learning: actor, critic and reference, on as few weights as can be.

With LoRA all three are ONE network: the actor and the critic are adapters on a frozen base (scopes of a PaLM, peft
adapters of a Hugging Face model), and the reference is the base with adapters off. Without LoRA the network itself is
trained, and the reference is a frozen copy made at the beginning; a critic with LoRA then lives on that frozen copy.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from lm_core.adapters import as_causal_lm
from lm_core.checks import check_positive, check_probability, typed
from palm_rlhf.model.palm import PaLM

Role = Literal["actor", "critic", "reference"]

ACTOR, CRITIC, REWARD = "actor", "critic", "reward"


class Roles(nn.Module):
    """Actor, critic and reference of one policy.

    Args:
        policy: a ``PaLM``; a Hugging Face causal language model or a ``PeftModel`` of one, whose active adapter is then
            the actor; or whatever ``lm_core.adapters.as_causal_lm`` takes (without LoRA).
        critic: another network for the critic; by default the policy's own.
        with_critic: False leaves the critic out.
        actor_lora: trains an adapter instead of the network.
        critic_lora: the same for the critic; without it, the critic is a copy that is trained whole.
        actor_lora_r: rank; the PaLM's ``lora_r``, or 8, by default.
        critic_lora_r: the same for the critic.
        actor_lora_scope: name of the adapter. One that exists is trained further.
        critic_lora_scope: the same for the critic.
        actor_dropout: on the adapter's input, or without LoRA everywhere in the network (PaLM).
        critic_dropout: the same for the critic.

    Raises:
        ValueError: LoRA for a network that is neither PaLM nor Hugging Face's, one scope for both, a rank that differs
            from that of the existing scope, or a policy that is not causal.
    """

    @typed
    def __init__(
        self,
        policy: Any,
        *,
        critic: Any = None,
        with_critic: bool = True,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int | None = None,
        critic_lora_r: int | None = None,
        actor_lora_scope: str = ACTOR,
        critic_lora_scope: str = CRITIC,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_probability(actor_dropout, "actor_dropout")
        check_probability(critic_dropout, "critic_dropout")
        for name, r in (("actor_lora_r", actor_lora_r), ("critic_lora_r", critic_lora_r)):
            if r is not None:
                check_positive(r, name)
        if actor_lora and critic_lora and with_critic and actor_lora_scope == critic_lora_scope:
            raise ValueError(f"actor and critic need scopes of different names, got {actor_lora_scope!r} for both")
        actor = _language_model(policy, "palm")
        other = None if critic is None else _language_model(critic, "critic")
        for name, lora, network in (
            ("actor_lora", actor_lora, actor),
            ("critic_lora", critic_lora and with_critic, other or actor),
        ):
            if lora and not isinstance(network, PaLM) and not _is_hugging_face(network):
                raise ValueError(f"{name} needs a PaLM or a Hugging Face model, got {type(network.model).__name__}")
        tokens, known = _tokens(actor), _tokens(other or actor)
        if with_critic and tokens is not None and known is not None and known < tokens:
            raise ValueError(f"critic must know all {tokens} tokens of the policy, got {known}")
        self.actor_scope = actor_lora_scope if actor_lora else None
        self.critic_scope = critic_lora_scope if critic_lora and with_critic else None
        # decided before an adapter is added: what is copied has none of ours yet
        self.reference = None if actor_lora else copy.deepcopy(actor).requires_grad_(False).eval()
        if not with_critic:
            self.critic = None
        elif other is not None:
            self.critic = other
        elif critic_lora:
            self.critic = actor if self.reference is None else self.reference
        else:
            self.critic = copy.deepcopy(actor)
        self.actor = actor
        if actor_lora:
            self.actor_scope = _add_adapter(actor, actor_lora_scope, actor_lora_r, actor_dropout, adopt=True)
        elif actor_dropout:
            _set_dropout(actor, actor_dropout, "actor_dropout")
        if self.critic_scope is not None:
            _add_adapter(self.critic, self.critic_scope, critic_lora_r, critic_dropout, adopt=False)
        elif self.critic is not None and critic_dropout:
            _set_dropout(self.critic, critic_dropout, "critic_dropout")
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        #: whether learning needs the training mode; else old and new probabilities come from the same mode
        self.learns_in_training_mode = actor_dropout > 0 or critic_dropout > 0 or recomputes

    @contextlib.contextmanager
    def playing(self, role: Role) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The language model of a role and the arguments it is to be called with, valid inside the block."""
        network = {"actor": self.actor, "critic": self.critic, "reference": self.reference or self.actor}[role]
        scope = {"actor": self.actor_scope, "critic": self.critic_scope, "reference": None}[role]
        if isinstance(network, PaLM):
            yield network, {"disable_lora": True} if scope is None else {"finetune_scope": scope}
        elif _has_adapters(network):
            with _active_adapter(network.model, scope):
                yield network, {}
        else:
            yield network, {}

    def is_frozen(self, role: Role) -> bool:
        """Whether the network of this role takes no gradient but in its adapter."""
        return role == "reference" or (self.actor_scope if role == "actor" else self.critic_scope) is not None

    def role_parameters(self, role: Literal["actor", "critic"]) -> list[nn.Parameter]:
        """What is trained of a role, in a fixed order."""
        network = self.actor if role == "actor" else self.critic
        scope = self.actor_scope if role == "actor" else self.critic_scope
        if network is None:
            return []
        if isinstance(network, PaLM):
            return network.palm_parameters() if scope is None else list(network.finetune_parameters(scope))
        if scope is None:
            return list(network.parameters())
        return [parameter for name, parameter in network.named_parameters() if f".{scope}." in name]


def _language_model(x: Any, name: str) -> Any:
    if isinstance(x, PaLM):
        if not x.causal:
            raise ValueError(f"{name} must be causal to be trained as a policy, got causal=False")
        return x
    if _is_hugging_face(x) or isinstance(x, nn.Module) or callable(x):
        network = as_causal_lm(x)
        if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
            raise ValueError(f"{name} must have parameters to train, got {type(x).__name__}")
        return network
    raise TypeError(f"{name} must be a PaLM or a causal language model, got {type(x).__name__}")


def _tokens(network: Any) -> int | None:
    """How many ids a network knows, if it tells."""
    size: int | None = network.num_tokens if isinstance(network, PaLM) else getattr(network, "vocab_size", None)
    return size


def _is_hugging_face(network: Any) -> bool:
    inner = getattr(network, "model", None)
    return any(cls.__name__ in ("PreTrainedModel", "PeftModel") for cls in type(inner).__mro__)


def _has_adapters(network: Any) -> bool:
    return hasattr(getattr(network, "model", None), "peft_config")


def _add_adapter(network: Any, scope: str, r: int | None, dropout: float, *, adopt: bool) -> str:
    """Makes sure there is an adapter; its name, which for a ``PeftModel`` given by the user is that of his own."""
    if isinstance(network, PaLM):
        if scope not in network.finetune_modules:
            network.add_finetune_params(scope, r, lora_dropout=dropout)
            return scope
        existing = network.scope_modules(scope).settings.r
        if r is not None and r != existing:
            raise ValueError(f"finetune scope {scope!r} exists with lora_r {existing}, got {r}; choose another scope")
        return scope
    from peft import LoraConfig, get_peft_model

    if _has_adapters(network):
        if adopt and scope not in network.model.peft_config:
            return str(network.model.active_adapter)
        if scope in network.model.peft_config:
            return scope
    config = LoraConfig(r=r or 8, lora_alpha=r or 8, lora_dropout=dropout, target_modules="all-linear")
    if _has_adapters(network):
        active = network.model.active_adapter
        network.model.add_adapter(scope, config)
        network.model.set_adapter(active)
    else:
        training = network.training
        network.model = get_peft_model(network.model, config, adapter_name=scope)
        network.train(training)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    return scope


@contextlib.contextmanager
def _active_adapter(model: Any, scope: str | None) -> Iterator[None]:
    """A peft adapter switched on, or all of them off; afterwards everything is as before."""
    if scope is None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with model.disable_adapter():
                yield
        finally:
            _restore_gradients(trainable)
        return
    before = model.active_adapter
    if scope == before:
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_adapter(scope)
    _restore_gradients(trainable)  # peft freezes every adapter but the active one
    try:
        yield
    finally:
        model.set_adapter(before)
        _restore_gradients(trainable)


def _restore_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _set_dropout(network: Any, dropout: float, name: str) -> None:
    if not isinstance(network, PaLM):
        raise ValueError(f"{name} without LoRA is set in the model's own configuration, unless it is a PaLM")
    network.set_dropout(dropout)
