"""The reference model: a frozen copy of what training changes in the policy, or the policy's moving average.

The frozen reference copies the parameters that train and the floating-point buffers, and shares the other parameters
with the policy. For a LoRA policy it costs little more than the adapters and equals the policy at the last promotion
(theta_t); switching adapters off would give the weights before the first iteration.

It is bit-identical from one promotion to the next. An exponential moving average with decay 1 is not: ema-pytorch
copies the policy at its first updates, regardless of the decay.
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
    """A frozen copy of the policy, taken at each call of ``copy_params_from_model``.

    Args:
        policy: causal language model with the protocol of ``lm_core.causal_lm.CausalLM``.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that the policy is not registered as a submodule a second time
        self._policy = (policy,)
        self._names: list[str] = []
        self.copy_params_from_model()

    def copy_params_from_model(self) -> None:
        """Copies the policy's current weights into the reference."""
        self.release()
        for name, tensor in self._copied_tensors().items():
            self._names.append(name)
            self.register_buffer(f"copy_{len(self._names) - 1}", tensor.detach().clone())

    def release(self) -> None:
        """Frees the copy, for a trainer that has all reference log-probabilities on disk."""
        for index in range(len(self._names)):
            delattr(self, f"copy_{index}")
        self._names = []

    @contextmanager
    def model(self) -> Iterator[Any]:
        """Yields the reference as a causal language model in evaluation mode; use it without gradients.

        Raises:
            RuntimeError: the copy was released, or the set of trainable parameters has changed since it was taken.
        """
        policy, tensors, copies = self._policy[0], self._copied_tensors(), self.exported()
        if not copies:
            raise RuntimeError("the reference was released; update_reference_model_with_policy() copies it again")
        if changed := sorted(tensors.keys() ^ copies.keys()):
            raise RuntimeError(f"the policy trains other parameters than when the reference was taken: {changed[:8]}")
        before = {name: tensor.data for name, tensor in tensors.items()}
        try:
            # swapping storages keeps an autograd graph that the policy has already built valid
            for name, tensor in tensors.items():
                tensor.data = copies[name]
            with eval_mode(policy):
                yield policy
        finally:
            for name, tensor in tensors.items():
                tensor.data = before[name]

    @torch.no_grad()
    def forward(self, ids: Int[Tensor, "b n"], **kwargs: Any) -> Float[Tensor, "b n v"]:
        """Logits of the reference."""
        with self.model() as model:
            return model(ids, **kwargs)

    def exported(self) -> dict[str, Tensor]:
        """The copied tensors by parameter name, for a checkpoint."""
        return {name: getattr(self, f"copy_{index}") for index, name in enumerate(self._names)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads the result of ``exported``; None changes nothing."""
        if state is None:
            return
        self.copy_params_from_model()
        if set(state) != set(self._names):
            raise ValueError(f"state must hold the parameters that train, got {sorted(state)[:8]}")
        for name, copy in self.exported().items():
            copy.copy_(state[name])

    def _copied_tensors(self) -> dict[str, Tensor]:
        policy = self._policy[0]
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        return trained | {name: b for name, b in policy.named_buffers() if b.is_floating_point()}


class MovingReference(nn.Module):
    """An exponential moving average of the policy (ema-pytorch), for ``ref_model_ema_decay`` below 1.

    Args:
        model: policy module, without an adapter around it.
        decay: decay of the average.
        settings: further arguments of ``ema_pytorch.EMA``.

    Raises:
        ImportError: ema-pytorch is not installed.
    """

    def __init__(self, model: nn.Module, *, decay: float, settings: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            from ema_pytorch import EMA
        except ImportError as error:
            raise ImportError("ref_model_ema_decay below 1 needs ema-pytorch: pip install ema-pytorch") from error
        self.ema = EMA(model, beta=decay, **{"include_online_model": False, **settings})
        for parameter in self.ema.ema_model.parameters():
            parameter.requires_grad_(False)
        object.__setattr__(self, "_reference", as_causal_lm(self.ema.ema_model))

    def copy_params_from_model(self) -> None:
        """Copies the policy's current weights into the average."""
        self.ema.copy_params_from_model_to_ema()

    def update(self) -> None:
        """Advances the average by one step; call it after each update of the policy."""
        self.ema.update()

    @contextmanager
    def model(self) -> Iterator[Any]:
        """Yields the average as a causal language model in evaluation mode."""
        reference: Any = self._reference
        with eval_mode(reference):
            yield reference

    @torch.no_grad()
    def forward(self, ids: Int[Tensor, "b n"], **kwargs: Any) -> Float[Tensor, "b n v"]:
        """Logits of the average."""
        with self.model() as model:
            return model(ids, **kwargs)

    def exported(self) -> dict[str, Tensor]:
        """The average and its counters, for a checkpoint."""
        return dict(self.ema.state_dict())

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads the result of ``exported``; None changes nothing."""
        if state is not None:
            self.ema.load_state_dict(dict(state))
