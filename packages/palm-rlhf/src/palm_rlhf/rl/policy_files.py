"""Checkpoint files of a policy: what its library opens, next to the trainer's state.

| policy | files |
|---|---|
| PaLM | the model with all its scopes (``PaLM.from_pretrained`` opens it, with the actor as a LoRA scope) |
| Hugging Face, LoRA | the actor in peft's form, which names its base; ``base_model.json`` has the base's hash |
| Hugging Face, all weights | a transformers folder |

Critic, value head and a copied reference adapter are in the trainer's state. Frozen weights of a Hugging Face model are
never stored, but hashed: a run resumes on the same ones only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_core.checkpoints.checkpoint import Checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.native_files import ADAPTER_WEIGHTS, read_adapter, write_native_files
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.checkpoints.weights import load_weights
from palm_rlhf.rl.policy import ActorCritic


class PolicyFiles:
    """Files of a policy, and its weights outside of them as a state object (critic, value head, reference)."""

    def __init__(self, policy: ActorCritic) -> None:
        self.policy = policy
        self.model: Any = getattr(policy.actor, "model", None)
        self.scope = policy.scopes["actor"]
        self.is_foreign = hasattr(self.model, "save_pretrained")
        tensors = policy.state_dict(keep_vars=True)
        # the actor's own file, the trainer's state, and frozen weights of foreign models
        network = {id(tensor): name for name, tensor in policy.actor.state_dict(keep_vars=True).items()}
        with_scope = self.is_foreign and self.scope is not None
        in_file = {key for key, name in network.items() if not with_scope or self.scope in name.split(".")}
        copied = policy.scopes["reference"]
        rest = {name: tensor for name, tensor in tensors.items() if id(tensor) not in in_file}
        self._names = [
            name
            for name, tensor in rest.items()
            if not self.is_foreign or tensor.requires_grad or (copied is not None and copied in name.split("."))
        ]
        kept = set(self._names)
        self._frozen = [name for name in rest if name not in kept]
        self._hash: str | None = None

    def session_arguments(self) -> dict[str, Any]:
        """Arguments of ``TrainingSession.register`` for the actor's files; none for a PaLM."""
        if not self.is_foreign:
            return {}
        return {"save_weights": self._weights, "load_weights": self._load, "assets": self._write_assets}

    def frozen_hash(self) -> str | None:
        """SHA-256 of the frozen weights that are not stored; None if there are none."""
        if not self._frozen or self._hash is not None:
            return self._hash
        tensors = self.policy.state_dict()
        self._hash = hash_of((name, tensors[name]) for name in self._frozen)
        return self._hash

    # the trainer's state

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights outside the actor's file, on the CPU."""
        tensors = self.policy.state_dict()
        return {name: tensors[name].detach().cpu() for name in self._names}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ``CheckpointError`` if the weights are of another critic."""
        differing = set(self._names) - set(state) | (set(state) - set(self.policy.state_dict()))
        if differing:
            raise CheckpointError(f"the checkpoint is of another critic: {sorted(differing)}")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the weights."""
        self.policy.load_state_dict(dict(state), strict=False)

    # the actor's files

    def _weights(self) -> dict[str, Tensor]:
        return {} if self.scope is not None else self.model.state_dict()

    def _write_assets(self, folder: Path) -> None:
        state = self.model.state_dict()
        write_native_files(folder, self.model, state, adapter=self.scope, base_hash=self.frozen_hash())

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.model_state or {}
        if self.scope is None and not any(name.startswith("model.model.") for name in state):
            load_weights(self.model, state, where=str(checkpoint.path))
        elif (checkpoint.path / ADAPTER_WEIGHTS).is_file():
            assert self.scope is not None
            read_adapter(checkpoint.path, self.model, self.scope)
        else:  # a checkpoint of an earlier version, with the whole network
            load_weights(self.policy.actor, state, where=str(checkpoint.path))
