"""Adapters of peft in checkpoints: the adapter in peft's form, and name and hash of its frozen base."""

import copy
from pathlib import Path
from typing import Any

from lm_core.checkpoints.manifest import write_json
from lm_core.checkpoints.weights import read_weights, save_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"


def write_adapter(folder: Path, model: Any, adapter: str, *, base_hash: str | None) -> None:
    """Writes an adapter of a ``PeftModel`` for ``PeftModel.from_pretrained``, and ``base_model.json``."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    save_weights(folder / ADAPTER_WEIGHTS, state)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    base = str(config.base_model_name_or_path or "")
    if base and Path(base).is_dir():
        config.base_model_name_or_path = base = str(Path(base).resolve())
    config.save_pretrained(folder)
    write_json(folder / BASE_FILE, {"base_model_name_or_path": base, "sha256": base_hash})


def read_adapter(folder: Path, model: Any, adapter: str) -> None:
    """Loads the weights of ``write_adapter`` into an adapter of the same settings."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, read_weights(folder / ADAPTER_WEIGHTS), adapter_name=adapter)
