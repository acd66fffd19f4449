"""Files with which a model's own library opens a checkpoint: adapters in peft's form, configurations of transformers.

An adapter's frozen base is not copied: the adapter names it, and ``base_model.json`` has its hash.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_core.checkpoints.manifest import read_json, write_json
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.checkpoints.weights import read_weights, save_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"


def write_native_files(
    folder: Path, model: Any, state: Mapping[str, Tensor], *, adapter: str | None = None, base_hash: str | None = None
) -> None:
    """Writes the files that open the checkpoint in ``folder`` with peft or transformers; none for other models.

    Args:
        folder: folder of the checkpoint; its weights, but for those of adapters, are written by the caller.
        model: a peft model or a transformers model.
        state: the model's state dict, or that of its trained parameters; gathered, if the model is sharded.
        adapter: name of the adapter to write; None writes all, each but "default" in a folder of its name.
        base_hash: hash of the frozen base.
    """
    if hasattr(model, "peft_config"):
        for name in model.peft_config if adapter is None else [adapter]:
            target = folder if name in (adapter, "default") else folder / name
            target.mkdir(exist_ok=True)
            _write_adapter(target, model, state, name, base_hash)
    elif callable(getattr(getattr(model, "config", None), "save_pretrained", None)):
        model.config.save_pretrained(str(folder))
        write_dtype(folder / CONFIG_FILE, state)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(folder))


def _write_adapter(folder: Path, model: Any, state: Mapping[str, Tensor], adapter: str, base_hash: str | None) -> None:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
    )
    save_weights(folder / ADAPTER_WEIGHTS, weights)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    base = str(config.base_model_name_or_path or "")
    if base and Path(base).is_dir():
        config.base_model_name_or_path = base = str(Path(base).resolve())
    config.save_pretrained(str(folder))
    write_json(folder / BASE_FILE, {"base_model_name_or_path": base, "sha256": base_hash})


def read_adapter(folder: Path, model: Any, adapter: str) -> None:
    """Loads the weights of an adapter that ``write_native_files`` wrote into one of the same settings."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, read_weights(folder / ADAPTER_WEIGHTS), adapter_name=adapter)


def write_dtype(config: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the dtype of most weights into a transformers model's ``config.json``, which names that of its masters."""
    content = read_json(config)
    sizes: dict[str, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.numel()
    for key in {"dtype", "torch_dtype"} & set(content):
        content[key] = max(sizes, key=lambda name: sizes[name], default=content[key])
    write_json(config, content)
