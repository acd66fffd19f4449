"""The flat call form of PaLM-rlhf-pytorch's trainers: one keyword per option, assigned to its owner.

``RLHFTrainer(palm=palm, actor_lr=1e-4, eps_clip=0.1, critic_lora=False)`` is the call form of the original. Every
option is a field of the objective or of ``RLConfig``, or an argument of ``ActorCritic``, and is documented there.
"""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lm_core.checks import either
from palm_rlhf.data.prompts import PromptFiles
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.objectives import OBJECTIVES, Objective
from palm_rlhf.rl.policy import ActorCritic

# The original's names of options that are named differently here.
_ALIASES = {"pad_value": "pad_id", "max_norm": "max_grad_norm"}
_POLICY_ALIASES = {"critic": "critic_palm", "critic_pooled_values": "pooled_values"}
_POLICY_OPTIONS = set(inspect.signature(ActorCritic).parameters) - {"palm", "with_critic", "precision"}


def sort_arguments(
    policy: Any,
    reward: Any,
    prompts: Any,
    objective: Objective | type[Objective] | str,
    config: RLConfig,
    options: Mapping[str, Any],
) -> tuple[Any, dict[str, Any], Any, Any, Objective, RLConfig]:
    """Arguments of both call forms; options override fields of the objective and of the configuration.

    Returns:
        Policy, arguments of ``ActorCritic`` to construct from it, reward, prompts, objective and config.

    Raises:
        ValueError: an argument is given under two names, or a required one is missing.
        TypeError: an option is unknown.
    """
    # arguments that have aliases
    options = dict(options)
    policy = only_one(palm=options.pop("palm", None), policy=policy, actor_critic=options.pop("actor_critic", None))
    reward = only_one(allow_none=True, reward_model=options.pop("reward_model", None), reward=reward)
    prompts = only_one(
        allow_none=True,
        prompts=prompts,
        prompts_path=_prompt_files(options.pop("prompts_path", None)),
        prompt_token_ids=options.pop("prompt_token_ids", None),
    )
    # the objective: a name, a class or an instance
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        objective = OBJECTIVES[objective]
    for alias, name in _ALIASES.items():
        if alias in options:
            usual = getattr(RLConfig, name)
            options[name] = either(usual, **{name: options.get(name, usual), alias: options.pop(alias)})
    for alias, name in _POLICY_ALIASES.items():
        if alias in options:
            options[name] = options.pop(alias)
    # each option goes to its owner
    kind = objective if isinstance(objective, type) else type(objective)
    owners = ({field.name for field in fields(kind)}, {field.name for field in fields(RLConfig)}, _POLICY_OPTIONS)
    for name in options:
        if not any(name in owner for owner in owners):
            near = difflib.get_close_matches(name, set().union(*owners), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name!r} is no option of {kind.__name__}, RLConfig or ActorCritic{hint}")
    of_objective, of_config, of_policy = (
        {name: value for name, value in options.items() if name in owner} for owner in owners
    )
    if of_policy and isinstance(policy, ActorCritic):
        raise ValueError(f"{sorted(of_policy)} are arguments of ActorCritic, and policy is one already")
    chosen = replace(objective, **of_objective) if isinstance(objective, Objective) else objective(**of_objective)
    return policy, of_policy, reward, prompts, chosen, replace(config, **of_config)


def only_one(*, allow_none: bool = False, **arguments: Any) -> Any:
    """The one argument that is not None.

    Raises:
        ValueError: several are given, or none without ``allow_none``.
    """
    present = [name for name, value in arguments.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"give one of {', '.join(arguments)}, got {' and '.join(present)}")
    if not present and not allow_none:
        raise ValueError(f"give one of {', '.join(arguments)}, got none")
    return arguments[present[0]] if present else None


def _prompt_files(path: Any) -> PromptFiles | None:
    """Prompts of one path or of several."""
    paths = path if isinstance(path, list | tuple) else (path,)
    if path is not None and not all(isinstance(part, str | Path) for part in paths):
        raise TypeError(f"prompts_path must be a path or several, got {path!r}"[:200])
    return None if path is None else PromptFiles(tuple(paths))
