"""The models that the commands take: stored ones of this package, and transformers models, which get a memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.tokenizers import load_tokenizer
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.transformer import MemorizingTransformer

# A flag of ``train`` -> the argument of ``MemoryAugmentedLM``.
AUGMENTED = {
    "memorizing_layers": "layers",
    "max_knn_memories": "max_memories",
    "num_retrieved_memories": "num_retrieved",
    "segment_length": "segment_length",
    "xl_max_memories": "window",
    "knn_storage": "storage",
    "knn_backend": "backend",
    "knn_index": "index",
    "knn_memories_directory": "memories_directory",
}


def stored_class(folder: Path) -> str | None:
    """Name of the class whose model a folder holds; None for a transformers model."""
    try:
        name = read_json(folder / CONFIG_FILE).get("class")
    except ValueError:
        return MemorizingTransformer.__name__  # whose loader reports what is wrong
    return None if name is None else str(name)


def stored_arguments(folder: Path) -> dict[str, Any]:
    """Constructor arguments of a stored model, under the names of the flags; none if they cannot be read."""
    try:
        arguments = dict(read_json(folder / CONFIG_FILE)["arguments"])
    except (ValueError, KeyError, TypeError):
        return {}
    values = {name: value.get("$tuple") if isinstance(value, dict) else value for name, value in arguments.items()}
    if stored_class(folder) == MemoryAugmentedLM.__name__:
        values = {flag: values[name] for flag, name in AUGMENTED.items() if name in values}
    return values


def augmented_arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``MemoryAugmentedLM`` from the flags of ``train``."""
    chosen = {AUGMENTED[flag]: value for flag, value in architecture.items() if flag in AUGMENTED}
    return {**chosen, "gate": "tanh" if architecture.get("gate_output") else "sigmoid"}


def open_model(folder: Path, **flags: Any) -> MemorizingTransformer | MemoryAugmentedLM:
    """The model of a folder; a transformers model gets a memory whose gates are not trained yet.

    Args:
        folder: a folder of ``checkpoint_folder``.
        **flags: constructor arguments to replace, named as the flags of ``train``.
    """
    kind = stored_class(folder)
    renamed = {AUGMENTED.get(name, name): value for name, value in flags.items()}
    if kind is None:
        end = load_tokenizer(folder).eos_id
        return MemoryAugmentedLM(load_causal_lm(folder), clear_memories_on_eos_token_id=end, **renamed)
    if kind == MemoryAugmentedLM.__name__:
        return MemoryAugmentedLM.from_pretrained(folder, **renamed)
    return MemorizingTransformer.from_pretrained(folder, **flags)
