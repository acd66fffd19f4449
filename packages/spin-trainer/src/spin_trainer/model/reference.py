"""The opponent's weights: a frozen copy of what trains, or a moving average of it.

The frozen reference copies only the parameters that train; frozen ones are shared with the policy. So next to a LoRA
policy it costs the size of the adapters, and it is the policy's weights at the last promotion (theta_t), where
switching adapters off would give the weights before the first iteration.

It is bit-identical from one promotion to the next. An exponential moving average with decay 1 is not: ema-pytorch
copies the policy at its first updates whatever the decay.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import eval_mode


class FrozenReference(nn.Module):
    """The policy as it was when ``copy_params_from_model`` was last called.

    Args:
        policy: a causal language model in the protocol of ``lm_core.causal_lm.CausalLM``.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that the policy is no submodule: its parameters are registered elsewhere
        self._policy = (policy,)
        self._names: list[str] = []
        self.copy_params_from_model()

    @torch.no_grad()
    def copy_params_from_model(self) -> None:
        """Makes the policy's present weights the reference."""
        self.release()
        for name, tensor in self._own().items():
            self._names.append(name)
            self.register_buffer(f"copy_{len(self._names) - 1}", tensor.detach().clone())

    def release(self) -> None:
        """Frees the copy, for a trainer that has all reference log-probabilities on disk."""
        for number in range(len(self._names)):
            delattr(self, f"copy_{number}")
        self._names = []

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The reference as a causal language model, in evaluation mode; use it without gradients.

        Raises:
            RuntimeError: the copy was released, or the policy's trainable parameters are others than they were.
        """
        policy, own, copies = self._policy[0], self._own(), self.exported()
        if not copies:
            raise RuntimeError("the reference was released; update_reference_model_with_policy() copies it again")
        if changed := sorted(own.keys() ^ copies.keys()):
            raise RuntimeError(f"the policy trains other parameters than when the reference was taken: {changed[:8]}")
        before = {name: tensor.data for name, tensor in own.items()}
        try:
            # exchanging storages leaves a graph that the policy has built before valid
            for name, tensor in own.items():
                tensor.data = copies[name]
            with eval_mode(policy):
                yield policy
        finally:
            for name, tensor in own.items():
                tensor.data = before[name]

    @torch.no_grad()
    def forward(self, ids: Int[Tensor, "b n"], **kwargs: Any) -> Float[Tensor, "b n v"]:
        """The reference's logits."""
        with self.model() as model:
            return model(ids, **kwargs)

    def exported(self) -> dict[str, Tensor]:
        """The copy by name of parameter, for a checkpoint."""
        return {name: getattr(self, f"copy_{number}") for number, name in enumerate(self._names)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Takes what ``exported`` gave; nothing for None."""
        if state is None:
            return
        self.copy_params_from_model()
        if set(state) != set(self._names):
            raise ValueError(f"state must hold the parameters that train, got {sorted(state)[:8]}")
        for name, copy in self.exported().items():
            copy.copy_(state[name])

    def _own(self) -> dict[str, Tensor]:
        policy = self._policy[0]
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        return trained | {name: b for name, b in policy.named_buffers() if b.is_floating_point()}


class MovingReference(nn.Module):
    """An exponential moving average of the policy (ema-pytorch), for ``ref_model_ema_decay`` below 1.

    Args:
        model: the policy as the caller gave it.
        decay: of the average.
        settings: further arguments of ``ema_pytorch.EMA``.

    Raises:
        ImportError: ema-pytorch is not installed.
    """

    def __init__(self, model: nn.Module, *, decay: float, settings: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            from ema_pytorch import EMA
        except ImportError as error:
            raise ImportError('ref_model_ema_decay below 1 needs the extra "ema": pip install ema-pytorch') from error
        self.ema = EMA(model, beta=decay, **{"include_online_model": False, **settings})
        for parameter in self.ema.ema_model.parameters():
            parameter.requires_grad_(False)
        object.__setattr__(self, "_reference", as_causal_lm(self.ema.ema_model))

    def copy_params_from_model(self) -> None:
        """Makes the policy's present weights the average."""
        self.ema.copy_params_from_model_to_ema()

    def update(self) -> None:
        """One step of the average; after each update of the policy."""
        self.ema.update()

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The average as a causal language model, in evaluation mode."""
        reference: Any = self._reference
        with eval_mode(reference):
            yield reference

    @torch.no_grad()
    def forward(self, ids: Int[Tensor, "b n"], **kwargs: Any) -> Float[Tensor, "b n v"]:
        """The average's logits."""
        with self.model() as model:
            return model(ids, **kwargs)

    def exported(self) -> dict[str, Tensor]:
        """The average and its counters, for a checkpoint."""
        return dict(self.ema.state_dict())

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Takes what ``exported`` gave; nothing for None."""
        if state is not None:
            self.ema.load_state_dict(dict(state))
