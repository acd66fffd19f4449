"""Actor, critic and reference policy as adapters on one shared base; their log-probs and values of responses.

With LoRA all three are ONE network: actor and critic are adapters on a frozen base (scopes of a PaLM, peft adapters of
a Hugging Face model). The reference is the policy as it was given: the base with adapters off, or a frozen copy of the
adapter that the policy came with. Without LoRA the network itself is trained and the reference is a frozen copy of the
initial weights; a critic with LoRA then adapts that frozen copy.

Learning switches dropout off unless it was requested (``actor_dropout``, ``critic_dropout``, or the dropout of an
adapter that the policy came with): with dropout, the probability ratio before the first update is not 1. Gradient
checkpointing alone changes nothing.

The critic is token-level: its value at a position is a linear map of its network's state for the tokens up to and
including that position, so it never reads the token whose return it predicts. Pooled values are the mean over the
PROMPT only, one for the whole response.

Legend: b batch, n sequence, m = n - 1, v vocabulary, k bins.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.adapters import as_causal_lm
from lm_core.adapters.loading import lora_config, quiet_peft
from lm_core.causal_lm import Generation, eval_mode
from lm_core.checks import check_positive, check_probability, typed
from lm_core.generation.generate import generate
from lm_core.nn.masking import masked_mean, prompt_mask_from_lengths
from lm_core.training.accelerator import Precision, autocast, pick_precision
from lm_core.training.blocks import enable_gradient_checkpointing
from palm_rlhf.model.lora import LoRA
from palm_rlhf.model.palm import PaLM
from palm_rlhf.rl.log_probs import PolicyOutput, SampledBy, hidden_scores, logit_scores
from palm_rlhf.rl.value_bins import ValueBins

Role = Literal["actor", "critic", "reference"]


class ActorCritic(nn.Module):
    """Actor, critic and reference policy.

    Args:
        palm: a ``PaLM``; a Hugging Face causal language model or a ``PeftModel`` of one, whose active adapter is then
            the actor and continues training; or any model that ``lm_core.adapters.as_causal_lm`` accepts (without
            LoRA). Trained weights become float32.
        critic_palm: separate network of the critic, whose active adapter, if any, continues training; by default the
            policy's.
        pooled_values: predicts one value per response, from its prompt, instead of one per token.
        actor_lora: trains an adapter instead of the whole network.
        critic_lora: trains an adapter for the critic instead of a copy of the network.
        actor_lora_r: rank of the actor's adapter; the PaLM's ``lora_r`` by default, 8 for other models.
        critic_lora_r: rank of the critic's adapter; default as for ``actor_lora_r``.
        actor_lora_scope: name of the actor's adapter; an existing one is trained further.
        critic_lora_scope: name of the critic's adapter.
        lora_targets: names of the layers that get an adapter; by default the attention of a PaLM, and all linear
            layers but the output layer of other models.
        gradient_checkpointing: recomputes blocks in the backward to save memory.
        reference: policy that the KL is measured from: the policy as it was given, or its base without the adapter that
            it came with.
        actor_dropout: dropout on the inputs of the actor's adapter; without LoRA, everywhere in a PaLM.
        critic_dropout: dropout of the critic, likewise.
        value_range: lower and upper bound of a critic that classifies over bins (HL-Gauss); null for regression.
        value_bins: number of bins of ``value_range``.
        with_critic: False for a policy without a critic.
        precision: precision of matrix products, in sampling, scoring and training; see ``lm_core.pick_precision``.
            Weights, log-probabilities, values and losses stay in float32.

    Raises:
        ValueError: LoRA for a network that is neither a PaLM nor Hugging Face's, one scope for both roles, another rank
            than that of the existing scope, an adapter that cannot be trained, several active adapters, adapters on a
            network that trains all its weights, a policy that is not causal, a critic without hidden states, or a
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
        lora_targets: list[str] | None = None,
        gradient_checkpointing: bool = False,
        reference: Literal["given", "base"] = "given",
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
        if gradient_checkpointing:
            for network in filter(None, (actor, other)):
                enable_gradient_checkpointing(network)
        self.reference = None if actor_lora else _frozen_copy(actor)
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
        #: modules whose dropout is on while learning
        self.dropouts: list[nn.Module] = []
        for role, network, with_lora, scope, r, dropout in parts:
            if network is None:
                continue
            if with_lora:
                has_own_network = role == "actor" or (other is not None and not _is_same(network, actor))
                existing = _existing_adapter(network, scope, adopt=has_own_network)
                if existing is None:
                    _add_adapter(network, scope, r, dropout, lora_targets)
                elif r is not None and r != (found := _rank(network, existing)):
                    raise ValueError(f"adapter {existing!r} exists with lora_r {found}, got {r}; choose another scope")
                self.scopes[role] = existing or scope
                if role == "actor" and existing is not None and reference == "given":
                    self.scopes["reference"] = _copied_adapter(network, existing)
                if existing is not None and dropout:
                    _set_adapter_dropout(network, existing, dropout)
                self.dropouts += _adapter_dropouts(network, existing or scope)
            elif isinstance(network, PaLM) and dropout:
                network.set_dropout(dropout)
                self.dropouts += network.modules()
            elif dropout:
                raise ValueError(f"{role}_dropout without LoRA is set in the model's own configuration")
        for role, network, with_lora, *_ in parts:  # also adapters that were loaded for inference
            if network is not None and with_lora:
                _require_gradients(_trained(network, self.scopes[role]))
        self.value_head: nn.Linear | None = None
        if with_critic:
            weight = next(iter(_trained(self.critic, self.scopes["critic"])), None)
            like = self.critic.output_weight if isinstance(self.critic, PaLM) else weight
            features = _state_size(self.critic)
            self.value_head = nn.Linear(features, 1 if self.bins is None else value_bins).to(like)
            nn.init.zeros_(self.value_head.weight)  # initial values are 0
            nn.init.zeros_(self.value_head.bias)
        #: computes states while learning and scoring; a trainer replaces it by a compiled function
        self.states_of = _states

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
    def feature_size(self) -> int:
        """Size of the reference's states.

        Raises:
            ValueError: the network gives no states before its output layer.
        """
        network = self.reference or self.actor
        if not hasattr(network, "hidden") and not hasattr(network, "states"):
            raise ValueError(f"policy must give hidden states for this objective, got {type(network).__name__}")
        return _state_size(network)

    @property
    def max_length(self) -> int | None:
        """Maximum length of a sequence; None if the network has no limit."""
        return getattr(self.actor, "max_length", None)

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Evaluation mode but for gradient checkpointing and the requested dropout; restored on exit."""
        modes = {module: module.training for module in self.modules()}
        # blocks that are recomputed must be in training mode, and some of them apply a dropout of their own
        blocks = [module for module in modes if getattr(module, "gradient_checkpointing", False)]
        rates = [
            (module, name, value)
            for module in blocks
            if not isinstance(module, PaLM)
            for name, value in vars(module).items()
            if "drop" in name and isinstance(value, float)
        ]
        self.eval()
        for module in (*blocks, *self.dropouts):
            module.training = True
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, name, value in rates:
                setattr(module, name, value)

    def network_of(self, role: Role) -> tuple[Any, str | None]:
        """The network of a role and the name of its adapter; None for the network alone."""
        network = {"actor": self.actor, "critic": self.critic, "reference": self.reference or self.actor}[role]
        return network, self.scopes[role]

    @contextlib.contextmanager
    def as_role(self, role: Role, mask: Tensor | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The language model of a role and its keyword arguments, with that role's adapter and precision active."""
        network, scope = self.network_of(role)
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
        repetition_penalty: float = 1.0,
        with_entropy: bool = False,
    ) -> PolicyOutput:
        """Log-probabilities of responses under the actor or the reference."""
        labels = ids[:, 1:][response_mask]
        sampled = None
        if kept is not None or repetition_penalty != 1.0:
            row, position = response_mask.nonzero(as_tuple=True)
            packed = None if kept is None else kept[response_mask]
            sampled = SampledBy(packed, repetition_penalty, ids, row, position)
        with self.as_role(role, mask) as (network, arguments):
            weight = getattr(network, "output_weight", None)
            if isinstance(weight, Tensor) and hasattr(network, "hidden"):
                if role == "reference" or self.scopes[role] is not None:
                    weight = weight.detach()
                # only the positions before response tokens go through the output layer
                rows = self.states_of(network, ids, arguments)[:, :-1][response_mask]
                scores = hidden_scores(rows, weight, labels, sampled, temperature, with_entropy)
            else:
                logits = network(ids, **arguments)[:, :-1][response_mask]
                scores = logit_scores(logits, labels, sampled, temperature, with_entropy)
        blank = scores[0].new_zeros(response_mask.shape)
        log_probs, unfiltered = (blank.masked_scatter(response_mask, t) for t in scores[:2])
        entropy = None if scores[2] is None else blank.masked_scatter(response_mask, scores[2])
        return PolicyOutput(log_probs, unfiltered, entropy)

    def value_logits(
        self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], response_mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b m k"]:
        """Outputs of the value head for positions 0 to n - 2."""
        assert self.value_head is not None
        with self.as_role("critic", mask) as (network, arguments):
            hidden = self.states_of(network, ids, arguments)[:, :-1].to(self.value_head.weight)
        if self.pooled_values:
            positions = torch.arange(hidden.shape[1], device=ids.device)
            # the position before the first response token is the prompt's last
            prompt = positions <= response_mask.int().argmax(dim=1, keepdim=True)
            hidden = masked_mean(hidden, prompt, dim=1, keepdim=True).expand_as(hidden)
        return self.value_head(hidden)

    def prompt_features(self, ids: Int[Tensor, "b n"], prompt_lengths: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Mean state of the reference over each prompt, in float32."""
        mask = prompt_mask_from_lengths(prompt_lengths, ids.shape[1])
        with self.as_role("reference", mask) as (network, arguments):
            return masked_mean(self.states_of(network, ids, arguments).float(), mask, dim=1)

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
        repetition_penalty: float = 1.0,
    ) -> PolicyOutput:
        """Log-probabilities and entropies of the actor, values of the critic.

        Args:
            ids: prompts and responses, right-padded.
            mask: True at real tokens.
            response_mask: True where the next token belongs to the response.
            temperature: sampling temperature of the responses.
            kept: packed kept sets of a filtered draw; see ``palm_rlhf.rl.log_probs.pack_kept``.
            repetition_penalty: penalty of the responses' sampling.
        """
        output = self.score(
            *(ids, mask, response_mask),
            temperature=temperature,
            kept=kept,
            repetition_penalty=repetition_penalty,
            with_entropy=True,
        )
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


def _frozen_copy(network: Any) -> Any:
    """A copy that computes as the network will once its half precision weights are trained as float32."""
    copied = copy.deepcopy(network).requires_grad_(False).eval()
    for parameter in copied.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return copied


def _check_networks(actor: Any, critic: Any, *, actor_lora: bool, critic_lora: bool, with_critic: bool) -> None:
    for name, lora, network in (("actor_lora", actor_lora, actor), ("critic_lora", critic_lora, critic)):
        if lora and not isinstance(network, PaLM) and not _is_hugging_face(network):
            raise ValueError(f"{name} needs a PaLM or a Hugging Face model, got {type(network.model).__name__}")
        if lora or not _has_adapters(network) or (name == "critic_lora" and not with_critic):
            continue
        names = ", ".join(network.model.peft_config)
        raise ValueError(
            f"{name}=False trains all weights, but {'palm' if network is actor else 'critic_palm'} has adapters "
            f"({names}): merge them first (model.merge_and_unload()), or train them with {name}=True"
        )
    if not with_critic:
        return
    actor_size, critic_size = _vocab_size(actor), _vocab_size(critic)
    if actor_size is not None and critic_size is not None and critic_size < actor_size:
        raise ValueError(f"critic must know all {actor_size} tokens of the policy, got {critic_size}")
    if not hasattr(critic, "hidden") and not hasattr(critic, "states"):
        raise ValueError(f"critic needs a network that gives its hidden states, got {type(critic.model).__name__}")


def _vocab_size(network: Any) -> int | None:
    size: int | None = network.num_tokens if isinstance(network, PaLM) else getattr(network, "vocab_size", None)
    return size


def _is_same(network: Any, other: Any) -> bool:
    """True for one network, also in two adapters of ``lm_core``."""
    return getattr(network, "model", network) is getattr(other, "model", other)


def _is_hugging_face(network: Any) -> bool:
    inner = getattr(network, "model", None)
    return any(cls.__name__ in ("PreTrainedModel", "PeftModel") for cls in type(inner).__mro__)


def _has_adapters(network: Any) -> bool:
    model = getattr(network, "model", None)
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _states(network: Any, ids: Tensor, arguments: dict[str, Any]) -> Float[Tensor, "b n d"]:
    """States before the output layer, also where the logits are no bare product of them (soft caps, scales)."""
    compute = network.hidden if hasattr(network, "hidden") else network.states
    states: Tensor = compute(ids, **arguments)
    return states


def _state_size(network: Any) -> int:
    if isinstance(network, PaLM):
        return network.dim
    with torch.no_grad(), eval_mode(network):
        return int(_states(network, torch.zeros(1, 1, dtype=torch.long, device=network.device), {}).shape[-1])


def _trained(network: Any, scope: str | None) -> list[nn.Parameter]:
    """Parameters of the adapter ``scope``, or of the whole network without one."""
    if isinstance(network, PaLM):
        return network.palm_parameters() if scope is None else list(network.finetune_parameters(scope))
    if scope is None:
        return list(network.parameters())
    # the name is not always inside: IA3's vectors and trained tokens end with it
    return [parameter for name, parameter in network.named_parameters() if scope in name.split(".")]


def _existing_adapter(network: Any, scope: str, *, adopt: bool) -> str | None:
    """The adapter ``scope`` if there is one; with ``adopt``, else the active adapter of a ``PeftModel``."""
    if isinstance(network, PaLM):
        return scope if scope in network.finetune_modules else None
    adapters = network.model.peft_config if _has_adapters(network) else {}
    active = list(getattr(network.model, "active_adapters", ())) if adapters else []
    if len(active) > 1:
        raise ValueError(
            f"a policy or critic must have one active adapter, got {', '.join(active)}; choose one "
            "(model.set_adapter(name)) or make one of them (model.add_weighted_adapter)"
        )
    name = scope if scope in adapters else str(network.model.active_adapter) if adapters and adopt else None
    if name is not None:
        if adopt:
            network.model.set_adapter(name)
        if getattr(adapters[name], "bias", "none") != "none":
            raise ValueError(f"adapter {name!r} must not train biases of the base, got bias={adapters[name].bias!r}")
        if not _trained(network, name):
            kind = getattr(adapters[name].peft_type, "value", adapters[name].peft_type)
            raise ValueError(f"adapter {name!r} of type {kind} has no parameters of its own to train")
    return name


def _rank(network: Any, scope: str) -> int | None:
    if isinstance(network, PaLM):
        return network.scope_modules(scope).settings.r
    return getattr(network.model.peft_config[scope], "r", None)


def _add_adapter(network: Any, scope: str, r: int | None, dropout: float, targets: Sequence[str] | None) -> None:
    """Adds a new adapter; those that exist keep training."""
    if isinstance(network, PaLM):
        chosen = {} if targets is None else {"lora_targets": targets}
        network.add_finetune_params(scope, r, lora_dropout=dropout, **chosen)  # type: ignore[arg-type]
        return
    from peft import get_peft_model

    r = 8 if r is None else r
    if not _has_adapters(network):
        if hasattr(network.model, "peft_config"):
            names = sorted(network.model.peft_config)
            raise ValueError(f"palm has peft adapters in its layers ({', '.join(names)}): pass its PeftModel instead")
        training = network.training
        config = lora_config(network.model, r=r, alpha=r, dropout=dropout, targets=targets)
        with quiet_peft():
            network.model = get_peft_model(network.model, config, adapter_name=scope)
        network.train(training)
    else:
        model = network.model
        active = model.active_adapter
        if model.peft_config[active].peft_type == "LORA":
            config = lora_config(model.get_base_model(), r=r, alpha=r, dropout=dropout, targets=targets)
            copies = any(name.endswith(".original_module") for name, _ in model.named_modules())
            if targets is None and copies:  # not the layers that another adapter trains whole
                whole = ["original_module", *(f"modules_to_save.{name}" for name in model.peft_config)]
                config.exclude_modules = [*(config.exclude_modules or ()), *whole]
        else:  # peft takes adapters of one type only
            config = copy.deepcopy(model.peft_config[active])
        with quiet_peft():
            model.add_adapter(scope, config)
        model.set_adapter(active)
        _require_gradients(_trained(network, active))
    _require_gradients(_trained(network, scope))


def _copied_adapter(network: Any, scope: str) -> str | None:
    """Name of a frozen copy of an adapter; None for one that changes nothing yet, as the base is a copy of that."""
    if not any(bool(p.any()) for name, p in network.named_parameters() if _is_output_of(scope, name)):
        return None
    names = network.finetune_modules if isinstance(network, PaLM) else network.model.peft_config
    copied = next(name for name in (f"reference{n or ''}" for n in itertools.count()) if name not in names)
    if isinstance(network, PaLM):
        source = network.scope_modules(scope)
        network.add_scope(copied, source.settings).load_state_dict(source.state_dict())
    else:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model = network.model
        config = copy.deepcopy(model.peft_config[scope])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others, such as PiSSA, change the base
        with torch.random.fork_rng(devices=[]), quiet_peft():  # the initial weights are replaced
            model.add_adapter(copied, config)
        state = get_peft_model_state_dict(model, adapter_name=scope, save_embedding_layers=False)
        set_peft_model_state_dict(model, state, adapter_name=copied)
        model.set_adapter(scope)
    for parameter in _trained(network, copied):
        parameter.requires_grad_(False)
    return copied


def _is_output_of(scope: str, name: str) -> bool:
    """False for the one parameter of a LoRA adapter whose value does not matter while the other is zero."""
    parts = name.split(".")
    return scope in parts and not {"A", "lora_A", "lora_embedding_A"} & set(parts)


def _set_adapter_dropout(network: Any, scope: str, dropout: float) -> None:
    module: Any
    for module in network.scope_modules(scope).modules() if isinstance(network, PaLM) else network.modules():
        if isinstance(module, LoRA):
            module.dropout.p = dropout
        elif scope in getattr(module, "lora_dropout", {}):
            module.lora_dropout[scope] = nn.Dropout(dropout)


def _adapter_dropouts(network: Any, scope: str) -> list[nn.Module]:
    """Dropout modules of an adapter."""
    root = network.scope_modules(scope) if isinstance(network, PaLM) else network
    return [
        module
        for name, module in root.named_modules()
        if isinstance(module, nn.Dropout) and module.p and (root is not network or scope in name.split("."))
    ]


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
