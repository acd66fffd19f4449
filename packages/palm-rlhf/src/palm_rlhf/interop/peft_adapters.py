"""LoRA scopes in peft's layout: adapters of the Cohere twin (``palm_rlhf.interop.cohere``).

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Rows of query and key adapters are permuted
like the weights' rows, and an adapter of both feed-forward halves becomes one of ``up_proj`` and one of ``gate_proj``
with equal first factors. An adapter of any ``PaLM`` can be stored like this; with xPos or normalised queries and keys
there is no twin to load it into.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.checkpoints.atomic_io import new_directory
from lm_core.checkpoints.manifest import CheckpointError, read_json, write_json
from lm_core.checkpoints.weights import read_weights, save_weights
from lm_core.checks import typed
from palm_rlhf.interop.cohere import COHERE_MODULES, free_directory, joined_rows, split_rows
from palm_rlhf.interop.original import check_keys, shapes_of
from palm_rlhf.model.lora import LoRAScope, LoRASettings, lora_settings
from palm_rlhf.model.palm import PaLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Settings of peft whose forward or base model differs from plain LoRA, `W + scale * B A`.
_OTHER_METHODS = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


@typed
def export_lora(palm: PaLM, scope: str, directory: str | Path, *, base_model: str | None = None) -> Path:
    """Writes a scope as a peft adapter, which ``PeftModel.from_pretrained`` puts on the Cohere twin.

    Args:
        palm: model with the scope.
        scope: name of the scope to write.
        directory: a new or empty folder.
        base_model: folder or name of the twin, stored for peft.

    Raises:
        ValueError: there is no such scope.
        FileExistsError: the folder has content, or is a file.
    """
    modules = palm.scope_modules(scope)
    target = free_directory(directory)
    with new_directory(target) as temporary:
        save_weights(temporary / WEIGHTS_FILE, _adapter_state(modules, palm.dim_head))
        write_json(temporary / CONFIG_FILE, _config(modules.settings, base_model))
    return target


@typed
def import_lora(palm: PaLM, scope: str, directory: str | Path) -> None:
    """Adds a scope to ``palm`` from a peft adapter of its Cohere twin; after an error ``palm`` is as it was.

    Args:
        palm: model that gets the scope.
        scope: name of the new scope.
        directory: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: the folder is damaged, or the adapter is of another architecture.
        ValueError: the scope exists, or the adapter is not plain LoRA, naming the setting.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"directory must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got {str(directory)!r}")
    config = read_json(folder / CONFIG_FILE)
    state = read_weights(folder / WEIGHTS_FILE)
    settings = _settings(config, state)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        modules = palm.add_scope(scope, settings)
    try:
        check_keys(state, shapes_of(_adapter_state(modules, palm.dim_head)), str(folder))
        _load_factors(modules, state, palm.dim_head)
    except BaseException:
        palm.remove_finetune_params(scope)
        raise


def _adapter_state(modules: LoRAScope, dim_head: int) -> dict[str, Tensor]:
    """Copies of a scope's weights, under peft's names."""
    state: dict[str, Tensor] = {}
    for layer, adapters in enumerate(modules.blocks()):
        for target, adapter in adapters.by_target().items():
            for name, rows in split_rows(target, adapter.B.detach(), dim_head).items():
                prefix = _prefix(layer, name)
                state[f"{prefix}lora_A.weight"] = adapter.A.detach().clone()
                state[f"{prefix}lora_B.weight"] = rows.clone(memory_format=torch.contiguous_format)
    return state


def _prefix(layer: int, module: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}."


def _config(settings: LoRASettings, base_model: str | None) -> dict[str, Any]:
    modules = [name.rsplit(".", 1)[1] for target in settings.targets for name in COHERE_MODULES[target]]
    alpha = settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _settings(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LoRASettings:
    """Settings of the new scope; targets come from the keys, since peft may name them by patterns."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{CONFIG_FILE} must be of peft_type 'LORA', got {config.get('peft_type')!r}")
    wrong = [f"{name} = {config[name]!r}" for name in _OTHER_METHODS if config.get(name)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias = {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _INITS_THAT_KEEP_THE_BASE:
        wrong.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if wrong:
        raise ValueError(f"a scope is plain LoRA and cannot express an adapter with {', '.join(wrong)}")
    adapted = {name.split(".layers.", 1)[-1].split(".", 1)[-1].rsplit(".lora_", 1)[0] for name in state}
    targets = [target for target, modules in COHERE_MODULES.items() if adapted & set(modules)]
    half = [module for target in targets for module in COHERE_MODULES[target] if module not in adapted]
    if half:
        raise ValueError(f"our feed-forward halves are one matrix: the adapter must target {', '.join(half)} too")
    if not targets:
        raise CheckpointError(f"{WEIGHTS_FILE} is no adapter of a Cohere model; its keys are {sorted(state)[:4]}")
    try:
        return lora_settings(
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=bool(config.get("use_rslora", False)),
            targets=targets,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} is damaged: {error!r}") from error


@torch.no_grad()
def _load_factors(modules: LoRAScope, state: Mapping[str, Tensor], dim_head: int) -> None:
    for layer, adapters in enumerate(modules.blocks()):
        for target, adapter in adapters.by_target().items():
            names = COHERE_MODULES[target]
            first, *others = (state[f"{_prefix(layer, name)}lora_A.weight"] for name in names)
            if not all(torch.equal(first, other) for other in others):
                raise ValueError(
                    f"our feed-forward halves are one matrix with one adapter: lora_A of {' and '.join(names)} must "
                    f"be equal, got different ones in layer {layer}; merge this adapter into its base instead"
                )
            rows = {name: state[f"{_prefix(layer, name)}lora_B.weight"] for name in names}
            adapter.A.copy_(first)
            adapter.B.copy_(joined_rows(target, rows, dim_head))
