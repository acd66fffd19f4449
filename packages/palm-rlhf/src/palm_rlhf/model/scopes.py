"""Fine-tuning scopes: several LoRA adapters, each under a name, around one frozen base.

Actor, critic and reward model of reinforcement learning are scopes of one model, and the reference policy is the model
with its scopes off, so that the base is held once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.checks import typed
from lm_core.nn.parallel_block import ParallelBlock
from palm_rlhf.model.lora import ATTENTION_TARGETS, LoRAScope, LoRASettings, lora_settings


@dataclass(frozen=True)
class MergedScope:
    """A scope whose weights are inside the base: what ``unmerge_finetune_params`` needs to take it out again."""

    scope: str
    modules: LoRAScope


class FinetuneScopes(nn.Module):
    """The part of ``PaLM`` that manages scopes; a subclass makes ``layers``, ``token_emb`` and ``lora_r``."""

    layers: nn.ModuleList
    token_emb: nn.Embedding
    finetune_modules: nn.ModuleDict
    lora_r: int

    @typed
    def add_finetune_params(
        self,
        scope: str,
        lora_r: int | None = None,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_rank_stabilized: bool = False,
        lora_targets: Sequence[str] = ATTENTION_TARGETS,
    ) -> None:
        """Adds a LoRA scope, which at first changes nothing.

        Args:
            scope: its name.
            lora_r: rank, by default the model's ``lora_r``.
            lora_alpha: numerator of the scale; the rank by default.
            lora_dropout: on the adapters' inputs, in training mode.
            lora_rank_stabilized: scale ``alpha / sqrt(r)`` instead of ``alpha / r``.
            lora_targets: out of ``q k v o ff_in ff_out``.

        Raises:
            ValueError: the scope exists, or a setting is out of range.
        """
        settings = lora_settings(
            r=self.lora_r if lora_r is None else lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            rank_stabilized=lora_rank_stabilized,
            targets=lora_targets,
        )
        self._add_scope(scope, settings)

    def remove_finetune_params(self, scope: str) -> LoRAScope:
        """Takes a scope away and returns its modules.

        Raises:
            ValueError: there is no such scope.
        """
        removed = self.scope_modules(scope)
        del self.finetune_modules[scope]
        return removed

    def merge_finetune_params(self, scope: str) -> MergedScope:
        """Adds a scope's weights to the base and removes the scope.

        Returns:
            What ``unmerge_finetune_params`` takes to undo it, up to rounding.

        Raises:
            ValueError: there is no such scope.
        """
        modules = self.remove_finetune_params(scope)
        self._add_deltas(modules, 1.0)
        return MergedScope(scope, modules)

    def unmerge_finetune_params(self, merged: MergedScope) -> None:
        """Takes a merged scope out of the base and makes it a scope again.

        Raises:
            ValueError: a scope of this name has been added since.
        """
        if merged.scope in self.finetune_modules:
            raise ValueError(f"finetune scope {merged.scope!r} exists already; remove it before unmerging")
        self._add_deltas(merged.modules, -1.0)
        self.finetune_modules[merged.scope] = merged.modules.train(self.training)

    def palm_parameters(self) -> list[nn.Parameter]:
        """The base's parameters, without any scope's, in a fixed order."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("finetune_modules.")]

    def finetune_parameters(self, scope: str = "default") -> Iterator[nn.Parameter]:
        """A scope's parameters.

        Raises:
            ValueError: there is no such scope.
        """
        return self.scope_modules(scope).parameters()

    def scope_modules(self, scope: str) -> LoRAScope:
        """The adapters of a scope.

        Raises:
            ValueError: there is no such scope.
        """
        if scope not in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r} not found; there are {self._scope_names()}")
        modules: LoRAScope = self.finetune_modules[scope]  # type: ignore[assignment]
        return modules

    def config_state(self) -> dict[str, Any]:
        """The scopes and their settings, for checkpoints; their weights are in the state dict."""
        settings = {scope: asdict(self.scope_modules(scope).settings) for scope in self._scope_names()}
        entries = [{"scope": scope, **entry, "targets": list(entry["targets"])} for scope, entry in settings.items()]
        return {"finetune_scopes": entries}

    def apply_config_state(self, state: dict[str, Any]) -> None:
        """Makes the scopes those that ``config_state`` told, with weights still to be loaded."""
        if "finetune_scopes" not in state:
            return
        for scope in self._scope_names():
            self.remove_finetune_params(scope)
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
            for entry in state["finetune_scopes"]:
                settings = dict(entry)
                self._add_scope(settings.pop("scope"), lora_settings(**settings))

    def _scope_names(self) -> list[str]:
        return list(self.finetune_modules)

    def _add_scope(self, scope: str, settings: LoRASettings) -> None:
        if scope in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r} exists already; there are {self._scope_names()}")
        # torch keeps submodules and methods of a module under one namespace
        if not scope or "." in scope or hasattr(self.finetune_modules, scope):
            raise ValueError(f"scope must be a non-empty name without dots and no attribute of modules, got {scope!r}")
        first = next(self.blocks())
        modules = LoRAScope(depth=len(self.layers), dims=target_dims(first), settings=settings)
        self.finetune_modules[scope] = modules.to(self.token_emb.weight).train(self.training)

    def blocks(self) -> Iterator[ParallelBlock]:
        """The model's blocks in order."""
        return iter(self.layers)  # type: ignore[arg-type]

    @torch.no_grad()
    def _add_deltas(self, modules: LoRAScope, sign: float) -> None:
        for block, adapters in zip(self.blocks(), modules.blocks(), strict=True):
            weights = target_weights(block)
            for target, adapter in adapters.by_target().items():
                weights[target] += sign * adapter.delta()


def target_dims(block: ParallelBlock) -> dict[str, tuple[int, int]]:
    """Input and output features of every LoRA target of a block."""
    dim, (qk_dim, kv_dim, ff_in_dim) = block.norm.gamma.shape[0], block.in_dims
    return {
        "q": (dim, block.attn_dim),
        "k": (dim, qk_dim - block.attn_dim),
        "v": (dim, kv_dim),
        "o": (block.attn_dim, dim),
        "ff_in": (dim, ff_in_dim),
        "ff_out": (block.ff_dim, dim),
    }


def target_weights(block: ParallelBlock) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every LoRA target of a block, as views of its two fused matrices."""
    qk_dim, kv_dim, ff_in_dim = block.in_dims
    sizes = (block.attn_dim, qk_dim - block.attn_dim, kv_dim, ff_in_dim)
    weights = dict(zip(("q", "k", "v", "ff_in"), block.proj_in.weight.detach().split(sizes), strict=True))
    weights["o"], weights["ff_out"] = block.proj_out.weight.detach().split((block.attn_dim, block.ff_dim), dim=1)
    return weights
