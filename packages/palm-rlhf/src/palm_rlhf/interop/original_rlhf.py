"""Conversion of PaLM-rlhf-pytorch's reward models and actor-critics.

Rewards and token-level values stay equal. A reward of the original is pooled over prompt AND response
(``pooling="sequence"``); from a distribution over bins it drew a reward, where the expectation is taken here. The
original's critic was a copy of the policy; where both bases are still equal, as always with LoRA, they share one base
here. The original's pooled value is not converted: it read the response that it should predict.

The original had no reference policy: with LoRA the reference is the base, without LoRA a copy of the converted actor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checks import typed
from palm_rlhf.interop.original import NormGain, OriginalPaLM, check_keys, cleaned, palm_state_from_original
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.rl.policy import ActorCritic

_ACTOR = "actor_palm"
_CRITICS = ("critic_palm", "critic")  # up to 0.2.3, and later


def is_original_reward_model(state_dict: Mapping[str, Any]) -> bool:
    """True for a state dict in the layout of the original's ``RewardModel``."""
    names = {str(name).rpartition(".")[2] for name in state_dict if "finetune_modules" not in str(name)}
    return {"prompt_embed", "response_embed"} <= names


@typed
def reward_model_from_palm_rlhf_pytorch(
    state_dict: Mapping[str, Any], norm_gain: NormGain = "auto", *, dropout: float = 0.1, **palm_overrides: Any
) -> RewardModel:
    """A ``RewardModel`` that gives the rewards of an original's, to float32 rounding.

    Other arguments and errors are those of ``from_palm_rlhf_pytorch``; several LoRA scopes are refused too.

    Args:
        state_dict: state dict of the original's ``RewardModel``.
        dropout: see ``RewardModel``.
    """
    original = palm_state_from_original(state_dict, norm_gain=norm_gain, qk_scale=palm_overrides.get("qk_scale", 8.0))
    dim, rest = original.arguments["dim"], dict(original.rest)
    head = "to_pred.0" if "to_pred.0.weight" in rest else "to_pred"
    bins = 0 if head == "to_pred.0" else int(rest.get("to_pred.weight", torch.empty(2, 0)).shape[0])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("prompt_embed", "response_embed"), (1, 1, dim))
    shapes |= {f"{head}.weight": (bins or 1, dim)} | ({f"{head}.bias": (bins,)} if bins else {})
    check_keys(rest, shapes, "state_dict")
    scope = _only_scope(original, "a reward model")
    with torch.random.fork_rng(devices=[]):
        model = RewardModel(
            original.build(palm_overrides),
            dropout,
            bins,
            use_lora=scope is not None,
            reward_lora_scope=scope or "reward",
            pooling="sequence",
        )
    state = {name: rest[name][0, 0] for name in ("prompt_embed", "response_embed")}
    state |= {name.replace(head, "head"): rest[name] for name in rest if name.startswith(head)}
    model.load_state_dict(state, strict=False)
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

    Other arguments and errors are those of ``from_palm_rlhf_pytorch``; several LoRA scopes in one network, and a critic
    that is an implicit process reward model, are refused too.

    Args:
        state_dict: state dict of the original's ``ActorCritic``.
        value_range: lower edge of the first and upper edge of the last bin of a binned critic; the default fits the
            original's default bins, whose CENTRES were 0, 1 and so on.
    """
    tensors = cleaned(state_dict)
    critics = [name for name in _CRITICS if f"{name}.token_emb.weight" in tensors]
    if not critics or f"{_ACTOR}.token_emb.weight" not in tensors:
        raise CheckpointError(
            f"state_dict must hold the PaLMs {_ACTOR} and {' or '.join(_CRITICS)} of an original's ActorCritic, got "
            f"keys that begin {', '.join(list(tensors)[:4])}"
        )
    # the two networks and the value head
    scale = palm_overrides.get("qk_scale", 8.0)
    actor, critic = (
        palm_state_from_original(tensors, prefix=prefix, norm_gain=norm_gain, qk_scale=scale)
        for prefix in (_ACTOR, critics[0])
    )
    head = "value_head.0" if "value_head.0.weight" in tensors else "value_head"
    rest = {name: value for name, value in tensors.items() if not name.startswith((f"{_ACTOR}.", f"{critics[0]}."))}
    outputs = 1 if head == "value_head.0" else int(rest.get("value_head.weight", torch.empty(2, 0)).shape[0])
    dim = critic.arguments["dim"]
    check_keys(rest, {f"{head}.weight": (outputs, dim), f"{head}.bias": (outputs,)}, "state_dict")
    actor_scope, critic_scope = _only_scope(actor, "an actor"), _only_scope(critic, "a critic")
    if head == "value_head" and value_range is None:
        value_range = (-0.5, outputs - 0.5)
    # one network for both where their bases are equal
    shares = actor_scope is not None and critic_scope not in (None, actor_scope) and _equal(actor.base(), critic.base())
    policy = actor.build(palm_overrides, critic if shares else None)
    with torch.random.fork_rng(devices=[]):
        actor_critic = ActorCritic(
            policy,
            None if shares else critic.build(palm_overrides),
            actor_lora=actor_scope is not None,
            critic_lora=critic_scope is not None,
            actor_lora_scope=actor_scope or "actor",
            critic_lora_scope=critic_scope or "critic",
            reference="base",  # as in the original
            value_range=value_range,
            value_bins=outputs if value_range is not None else 51,
        )
    actor_critic.load_state_dict(
        {name.replace(head, "value_head"): value for name, value in rest.items()}, strict=False
    )
    return actor_critic


def _only_scope(original: OriginalPaLM, what: str) -> str | None:
    if len(original.scopes) > 1:
        raise ValueError(f"{what} must have at most one LoRA scope, got {sorted(original.scopes)}")
    return next(iter(original.scopes), None)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
