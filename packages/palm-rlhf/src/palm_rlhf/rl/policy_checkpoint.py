"""Checkpoints of a policy that is being trained: the actor's network as a model of its own, the rest beside it.

``PaLM.from_pretrained`` opens the model file, whose scopes hold the actor. Value head, and a critic or a reference
with weights of their own, go into the trainer's state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_core.checkpoints.checkpoint import Checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_weights
from palm_rlhf.rl.config import PolicySettings
from palm_rlhf.rl.policy import ActorCritic

# What gives the stored experience and draws another meaning; learning rates, for one, may change when a run goes on.
_SAME = ("seed", "group_size", "minibatch_size", "advantage_estimator")


def save_policy(
    folder: Path,
    step: int,
    policy: ActorCritic,
    *,
    trainer: str,
    settings: PolicySettings,
    state: Mapping[str, Any],
    tokenizer: Any,
) -> None:
    """Writes a checkpoint.

    Args:
        folder: of all checkpoints.
        step: updates done.
        policy: what is trained.
        trainer: class name of what trains it.
        settings: of the run.
        state: of the trainer.
        tokenizer: travels along, if it can be saved.
    """
    saves = getattr(tokenizer, "save_pretrained", None)
    save_checkpoint(
        folder,
        step,
        model=_network(policy),
        trainer_state={
            "trainer": trainer,
            "settings": settings.as_json(),
            "other": {name: tensor.cpu() for name, tensor in _other_weights(policy).items()},
            **state,
        },
        tokenizer=tokenizer if callable(saves) else None,
        keep=settings.keep_checkpoints,
    )


def restore_policy(policy: ActorCritic, checkpoint: Checkpoint, *, trainer: str, settings: PolicySettings) -> Any:
    """Loads the weights of a checkpoint; returns the trainer's state.

    Raises:
        CheckpointError: it was written by another trainer, or for another policy.
        ValueError: a setting differs that must not.
    """
    state, where = checkpoint.trainer_state, checkpoint.path
    if state.get("trainer") != trainer:
        raise CheckpointError(f"{where} was not written by {trainer}, got {state.get('trainer')!r}")
    stored, own = state["settings"], settings.as_json()
    for name in _SAME:
        if stored[name] != own[name]:
            raise ValueError(f"{name} must be {stored[name]} as in the run being resumed, got {own[name]}")
    differing = set(state["other"]) ^ set(_other_weights(policy))
    if differing:
        raise CheckpointError(f"{where} is of another critic: {sorted(differing)}")
    load_weights(_network(policy), checkpoint.model_state or {}, where=str(where))
    policy.load_state_dict(state["other"], strict=False)
    return state


def _network(policy: ActorCritic) -> nn.Module:
    network: nn.Module = policy.palm
    return network


def _other_weights(policy: ActorCritic) -> dict[str, Tensor]:
    """Weights that are not in the actor's network."""
    own = {id(tensor) for tensor in _network(policy).state_dict(keep_vars=True).values()}
    state = policy.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in own}
