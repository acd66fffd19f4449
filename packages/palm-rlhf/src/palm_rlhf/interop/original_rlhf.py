"""Reward models and actor-critics of PaLM-rlhf-pytorch, read into ours.

What they compute stays: a reward of the original is pooled over prompt AND response (``pooling="sequence"``), and a
bin's prediction is a distribution, which the original sampled from and we take the mean of. The original's critic was
a copy of the policy; where the copy's base still equals the policy's, which is always so with LoRA, one base serves
both here. What cannot be kept is the original's pooled value, which read the response it should predict.

The original had no reference policy: with LoRA ours is the base, without LoRA the actor as it was converted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import typed
from palm_rlhf.interop.original import (
    NormGain,
    OriginalPaLM,
    build_palm,
    check_keys,
    cleaned,
    palm_state_from_original,
)
from palm_rlhf.model.palm import PaLM
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.rl.policy import ActorCritic

_ACTOR = "actor_palm"
_CRITICS = ("critic_palm", "critic")  # up to 0.2.3, and later


def is_original_reward_model(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the layout of the original's ``RewardModel``."""
    names = {str(name).rpartition(".")[2] for name in state_dict if "finetune_modules" not in str(name)}
    return {"prompt_embed", "response_embed"} <= names


@typed
def reward_model_from_palm_rlhf_pytorch(
    state_dict: Mapping[str, Any], norm_gain: NormGain = "auto", *, dropout: float = 0.1, **palm_overrides: Any
) -> RewardModel:
    """A ``RewardModel`` that gives the rewards of an original's, to float32 rounding.

    Args:
        state_dict: of the original's ``RewardModel``.
        norm_gain: see ``from_palm_rlhf_pytorch``.
        dropout: see ``RewardModel``.
        **palm_overrides: see ``from_palm_rlhf_pytorch``.

    Raises:
        CheckpointError: the state dict is of something else.
        ValueError: see ``from_palm_rlhf_pytorch``; also several LoRA scopes.
    """
    original = palm_state_from_original(state_dict, norm_gain=norm_gain, qk_scale=palm_overrides.get("qk_scale", 8.0))
    dim, rest = original.arguments["dim"], dict(original.rest)
    head = "to_pred.0" if "to_pred.0.weight" in rest else "to_pred"
    bins = 0 if head == "to_pred.0" else int(rest.get("to_pred.weight", torch.empty(2, 0)).shape[0])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("prompt_embed", "response_embed"), (1, 1, dim))
    shapes |= {f"{head}.weight": (bins or 1, dim)} | ({f"{head}.bias": (bins,)} if bins else {})
    check_keys(rest, shapes, "state_dict")
    palm = _palm(original, palm_overrides)
    scope = _only_scope(original, "a reward model")
    with torch.random.fork_rng(devices=[]):
        model = RewardModel(
            palm,
            dropout,
            bins,
            use_lora=scope is not None,
            reward_lora_scope=scope or "reward",
            pooling="sequence",
        )
    with torch.no_grad():
        model.prompt_embed.copy_(rest["prompt_embed"][0, 0])
        model.response_embed.copy_(rest["response_embed"][0, 0])
        model.head.weight.copy_(rest[f"{head}.weight"])
        if bins:
            model.head.bias.copy_(rest[f"{head}.bias"])
    return model


@typed
def actor_critic_from_palm_rlhf_pytorch(
    state_dict: Mapping[str, Any],
    norm_gain: NormGain = "auto",
    *,
    value_range: tuple[float, float] | None = None,
    **palm_overrides: Any,
) -> ActorCritic:
    """An ``ActorCritic`` whose actor and token-level values are those of an original's, to float32 rounding.

    Args:
        state_dict: of the original's ``ActorCritic``.
        norm_gain: see ``from_palm_rlhf_pytorch``.
        value_range: of a critic with bins, from the first bin's lower to the last bin's upper edge; by default that of
            the original's own default, whose bin CENTRES were 0, 1 and so on.
        **palm_overrides: see ``from_palm_rlhf_pytorch``.

    Raises:
        CheckpointError: the state dict is of something else, or of a critic that is an implicit process reward model.
        ValueError: see ``from_palm_rlhf_pytorch``; also several LoRA scopes in one network.
    """
    tensors = cleaned(state_dict)
    found = [name for name in _CRITICS if f"{name}.token_emb.weight" in tensors]
    if not found or f"{_ACTOR}.token_emb.weight" not in tensors:
        raise CheckpointError(
            f"state_dict must hold the PaLMs {_ACTOR} and {' or '.join(_CRITICS)} of an original's ActorCritic, got "
            f"keys that begin {', '.join(list(tensors)[:4])}"
        )
    scale = palm_overrides.get("qk_scale", 8.0)
    actor, critic = (
        palm_state_from_original(tensors, prefix=prefix, norm_gain=norm_gain, qk_scale=scale)
        for prefix in (_ACTOR, found[0])
    )
    head = "value_head.0" if "value_head.0.weight" in tensors else "value_head"
    rest = {name: value for name, value in tensors.items() if not name.startswith((f"{_ACTOR}.", f"{found[0]}."))}
    outputs = 1 if head == "value_head.0" else int(rest.get("value_head.weight", torch.empty(2, 0)).shape[0])
    dim = critic.arguments["dim"]
    check_keys(rest, {f"{head}.weight": (outputs, dim), f"{head}.bias": (outputs,)}, "state_dict")
    actor_scope, critic_scope = _only_scope(actor, "an actor"), _only_scope(critic, "a critic")
    if head == "value_head" and value_range is None:
        value_range = (-0.5, outputs - 0.5)
    shares = actor_scope is not None and critic_scope not in (None, actor_scope) and _same_base(actor, critic)
    policy = _palm(actor, palm_overrides, also=critic if shares else None)
    with torch.random.fork_rng(devices=[]):
        made = ActorCritic(
            policy,
            None if shares else _palm(critic, palm_overrides),
            actor_lora=actor_scope is not None,
            critic_lora=critic_scope is not None,
            actor_lora_scope=actor_scope or "actor",
            critic_lora_scope=critic_scope or "critic",
            value_range=value_range,
            value_bins=outputs if value_range is not None else 51,
        )
    assert made.value_head is not None
    with torch.no_grad():
        made.value_head.weight.copy_(rest[f"{head}.weight"])
        made.value_head.bias.copy_(rest[f"{head}.bias"])
    return made


def _palm(original: OriginalPaLM, overrides: dict[str, Any], also: OriginalPaLM | None = None) -> PaLM:
    """The network with its scopes, and with those of another on an equal base."""
    palm = build_palm(original.arguments, overrides)
    state, scopes = dict(original.state), dict(original.scopes)
    if also is not None:
        scopes |= also.scopes
        state |= {name: value for name, value in also.state.items() if name.startswith("finetune_modules.")}
    with torch.random.fork_rng(devices=[]):
        for scope, rank in scopes.items():
            palm.add_finetune_params(scope, lora_r=rank)
    load_weights(palm, state, dtypes="stored", where="state_dict")
    return palm


def _only_scope(original: OriginalPaLM, what: str) -> str | None:
    if len(original.scopes) > 1:
        raise ValueError(f"{what} must have at most one LoRA scope, got {sorted(original.scopes)}")
    return next(iter(original.scopes), None)


def _same_base(one: OriginalPaLM, other: OriginalPaLM) -> bool:
    bases: list[dict[str, Tensor]] = [
        {name: value for name, value in palm.state.items() if not name.startswith("finetune_modules.")}
        for palm in (one, other)
    ]
    return bases[0].keys() == bases[1].keys() and all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
