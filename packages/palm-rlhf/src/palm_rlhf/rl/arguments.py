"""The flat call form of PaLM-rlhf-pytorch's trainers: one keyword for each option, sorted into their owners.

``RLHFTrainer(palm=palm, actor_lr=1e-4, eps_clip=0.1, critic_lora=False)`` is the call form of the original. Every
option is a field of the objective, of ``RLConfig``, or an argument of ``ActorCritic``, and is described there.
"""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lm_core.checks import either
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.objectives import OBJECTIVES, Objective
from palm_rlhf.rl.policy import ActorCritic

# Names of the original for options that have another name here.
_ALIASES = {"pad_value": "pad_id", "max_norm": "max_grad_norm"}
_POLICY_ALIASES = {"critic": "critic_palm", "critic_pooled_values": "pooled_values"}
_POLICY_OPTIONS = set(inspect.signature(ActorCritic).parameters) - {"palm", "with_critic", "precision"}


@dataclass(frozen=True)
class TrainerArguments:
    """Arguments of a trainer, each with its owner.

    Attributes:
        policy: a network, or an ``ActorCritic``.
        policy_options: arguments of the ``ActorCritic`` to make of a network.
        reward: see ``palm_rlhf.reward.rewards``.
        prompts: see ``palm_rlhf.data.prompts.load_prompts``.
        objective: the objective.
        config: the run's options.
    """

    policy: Any
    policy_options: dict[str, Any]
    reward: Any
    prompts: Any
    objective: Objective
    config: RLConfig


def sort_arguments(
    *,
    policy: Any,
    reward: Any,
    prompts: Any,
    objective: Objective | str | None,
    config: RLConfig | None,
    default: type[Objective],
    options: Mapping[str, Any],
) -> TrainerArguments:
    """Arguments of both call forms; an option changes a field of the objective or configuration it is given with.

    Args:
        policy: as of the trainer.
        reward: as of the trainer.
        prompts: as of the trainer.
        objective: as of the trainer; None takes ``default``.
        config: as of the trainer.
        default: the trainer's own objective.
        options: all other keywords.

    Raises:
        ValueError: an argument is given under two names, or one that must be given is not.
        TypeError: an option is unknown.
    """
    options = dict(options)
    policy = only_one(palm=options.pop("palm", None), policy=policy, actor_critic=options.pop("actor_critic", None))
    reward = only_one(allow_none=True, reward_model=options.pop("reward_model", None), reward=reward)
    prompts = only_one(
        allow_none=True,
        prompts=prompts,
        prompts_path=options.pop("prompts_path", None),
        prompt_token_ids=options.pop("prompt_token_ids", None),
    )
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        default, objective = OBJECTIVES[objective], None
    of_objective = {field.name for field in fields(default if objective is None else objective)}
    of_config = {field.name for field in fields(RLConfig)}
    for alias, name in _ALIASES.items():
        if alias in options:
            usual = getattr(RLConfig, name)
            options[name] = either(usual, **{name: options.get(name, usual), alias: options.pop(alias)})
    for alias, name in _POLICY_ALIASES.items():
        if alias in options:
            options[name] = options.pop(alias)
    known = of_config | of_objective | _POLICY_OPTIONS
    for name in options:
        if name not in known:
            owner = default.__name__ if objective is None else type(objective).__name__
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name!r} is no option of {owner}, RLConfig or ActorCritic{hint}")
    own, config_options, policy_options = (
        {name: value for name, value in options.items() if name in names}
        for names in (of_objective, of_config, _POLICY_OPTIONS)
    )
    if policy_options and isinstance(policy, ActorCritic):
        raise ValueError(f"{sorted(policy_options)} are arguments of ActorCritic, and policy is one already")
    return TrainerArguments(
        policy=policy,
        policy_options=policy_options,
        reward=reward,
        prompts=prompts,
        objective=default(**own) if objective is None else replace(objective, **own),
        config=replace(config or RLConfig(), **config_options),
    )


def only_one(*, allow_none: bool = False, **arguments: Any) -> Any:
    """The one argument that is not None.

    Raises:
        ValueError: several are, or none where one must be.
    """
    present = [name for name, value in arguments.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"give one of {', '.join(arguments)}, got {' and '.join(present)}")
    if not present and not allow_none:
        raise ValueError(f"give one of {', '.join(arguments)}, got none")
    return arguments[present[0]] if present else None
