"""Constructor arguments as JSON, modules among them.

``config.json`` must be enough to rebuild a model. Numbers, strings, lists, tuples and dicts are written unchanged or
under a ``$`` tag. A module is written as a specification if it can be rebuilt from one: a model of a package built on
this one, a Hugging Face model, a timm model. Anything else is marked ``$given``: it must be passed again when the model
is loaded.

Checkpoints are untrusted data. A specification can name only classes that installed packages register (entry points),
transformers' causal language models and the vision encoders listed here, and timm's own architectures; of a Hugging
Face configuration only the class's own fields are used, with numbers and plain words as values. It names no path, no
source on a hub and no code, so nothing outside the checkpoint is opened. Any other module is passed again.
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from lm_core.checkpoints.manifest import CheckpointError, json_value, read_json
from lm_core.checkpoints.tensor_files import check_archive

ENTRY_POINTS = "lm_core.models"
# vision encoders of transformers that are built from their own configuration alone
_VISION_ENCODERS = frozenset(
    {
        "BeitModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "ConvNextModel",
        "ConvNextV2Model",
        "DeiTModel",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
        "DINOv3ViTModel",
        "ResNetModel",
        "Siglip2VisionModel",
        "SiglipVisionModel",
        "SwinModel",
        "Swinv2Model",
        "ViTMAEModel",
        "ViTModel",
    }
)
_NOT_READ = re.compile(
    "auto_map|implementation|quantization|path(?!_rate)|pretrained|backbone|checkpoint|timm|url|kwargs|_args"
)
_WORD = re.compile(r"[A-Za-z0-9_ .-]{0,64}")
_TIMM_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,100}")
_DEEPEST, _LONGEST, _LARGEST = 32, 100_000, 2**40
_MOST_LAYERS = 1000
_NAME_SOURCES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "model_args"}
_NAME_SOURCES |= {"architecture", "backbone", "backbone_kwargs", "use_pretrained_backbone"}
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_HEIGHTS = (*_WIDTHS, "vocab_size", "intermediate_size", "n_inner", "ffn_dim", "d_ff")
_COUNTS_LAYERS = re.compile("depth|layer|block|stage")
_registered: "WeakValueDictionary[str, type]" = WeakValueDictionary()


def package_of(cls: type) -> str:
    """Import name of a class's top-level package."""
    return cls.__module__.split(".", 1)[0]


def version_of(package: str) -> str | None:
    """Version of an imported package, or of an installed distribution; None for neither."""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
    return None if version is None else str(version)


def register(cls: type) -> None:
    """Registers a class under its package and name, for specifications."""
    _registered[f"{package_of(cls)}:{cls.__name__}"] = cls


def registered_class(package: str, name: str) -> type:
    """The class named by a specification.

    Imports its package if needed and if the package's distribution declares it: an entry point of the package's name in
    the group ``lm_core.models``.

    Raises:
        CheckpointError: no such class is registered.
    """
    key = f"{package}:{name}"
    if key not in _registered:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=package):
            # ignore an entry point of this name that refers to another package
            if entry.module.split(".", 1)[0] == package:
                getattr(entry.load(), name, None)  # also triggers the package's lazy imports
    if key not in _registered:
        raise CheckpointError(f"the checkpoint needs {name} of {package}; import it, or pass the module again")
    return _registered[key]


def encode_argument(value: Any) -> Any:
    """``value`` in JSON; ``{"$given": type}`` if it cannot be rebuilt from JSON."""
    if value is None or (isinstance(value, bool | int | str) and type(value) in (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return encode_argument(value.item())
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if type(value) in (list, tuple):
        entries = [encode_argument(entry) for entry in value]
        if any(is_given(entry) for entry in entries):
            return {"$given": type(value).__name__}
        return entries if type(value) is list else {"$tuple": entries}
    if type(value) is dict:
        pairs = [[encode_argument(key), encode_argument(entry)] for key, entry in value.items()]
        simple = all(type(key) is str and not key.startswith("$") for key in value)
        if any(is_given(entry) for pair in pairs for entry in pair):
            return {"$given": "dict"}
        return dict(pairs) if simple else {"$dict": pairs}
    if isinstance(value, nn.Module):
        specification = _module_specification(value)
        if specification is not None:
            return {"$module": specification}
    return {"$given": type(value).__name__}


def is_given(encoded: Any) -> bool:
    """True if an encoded argument could not be stored and must be passed again."""
    return isinstance(encoded, Mapping) and "$given" in encoded


def decode_argument(encoded: Any) -> Any:
    """The inverse of ``encode_argument``; modules are rebuilt without their weights.

    Raises:
        CheckpointError: an unknown tag, or a module that cannot be built here.
    """
    if isinstance(encoded, list):
        return [decode_argument(entry) for entry in encoded]
    if not isinstance(encoded, dict):
        return encoded
    tag = next(iter(encoded)) if len(encoded) == 1 else ""
    if not tag.startswith("$"):
        return {key: decode_argument(entry) for key, entry in encoded.items()}
    content = encoded[tag]
    if tag == "$float":
        return float(content)
    if tag == "$dtype":
        dtype = getattr(torch, str(content), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"the checkpoint names the dtype {content!r}, which torch does not have")
        return dtype
    if tag == "$path":  # of earlier formats
        raise CheckpointError(f"the checkpoint names the path {content!r}; paths are not read from it, pass it again")
    if tag == "$tuple":
        return tuple(decode_argument(entry) for entry in content)
    if tag == "$dict":
        return {decode_argument(key): decode_argument(entry) for key, entry in content}
    if tag == "$module":
        return _build_module(content)
    raise CheckpointError(f"the checkpoint's configuration has the unknown tag {tag!r}")


def _module_specification(module: Any) -> dict[str, Any] | None:
    if hasattr(module, "pretrained_config"):
        config = module.pretrained_config()
        rebuildable = not any(is_given(entry) for entry in config["arguments"].values())
        return {"kind": "family", "config": config} if rebuildable else None
    kinds = {base.__module__.split(".", 1)[0] for base in type(module).__mro__}
    package = package_of(type(module))
    if package == "transformers" and _is_rebuilt(type(module).__name__):
        settings = _fields_of(type(module.config), json_value(module.config.to_dict()))
        return {"kind": "transformers", "class": type(module).__name__, "config": settings}
    if package == "timm" and "timm" in kinds:
        description = getattr(module, "pretrained_cfg", None) or {}
        if _TIMM_ARCHITECTURE.fullmatch(str(description.get("architecture"))):
            return {
                "kind": "timm",
                "architecture": description["architecture"],
                "num_classes": getattr(module, "num_classes", None),
            }
    return None


def check_values(values: Any, where: str, depth: int = 0) -> None:
    """Rejects values of a configuration that could only exhaust memory or time: deep, long or huge ones.

    Raises:
        CheckpointError: the message names the field.
    """
    if depth > _DEEPEST:
        raise CheckpointError(f"{where} is nested too deeply")
    if isinstance(values, int | float) and abs(values) > _LARGEST:
        raise CheckpointError(f"{where} must be at most {_LARGEST}, got {values}")
    if isinstance(values, str | list | dict) and len(values) > _LONGEST:
        raise CheckpointError(f"{where} must have at most {_LONGEST} entries, got {len(values)}")
    if isinstance(values, dict | list):
        for key, entry in values.items() if isinstance(values, dict) else enumerate(values):
            for count in entry if isinstance(entry, list) else [entry]:
                if _COUNTS_LAYERS.search(str(key)) and type(count) is int and count > _MOST_LAYERS:
                    raise CheckpointError(f"{key} must be at most {_MOST_LAYERS}, got {count}")
            check_values(entry, f"{where}[{key!r}]", depth + 1)


def _is_rebuilt(name: Any) -> bool:
    """True for a class of transformers that a file may name."""
    if name in _VISION_ENCODERS:
        return True
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return name in causal and not str(name).endswith("ForConditionalGeneration")  # with encoders of other libraries


def check_foreign_folder(folder: Path) -> None:
    """Rejects a Hugging Face folder whose config.json would make transformers open other files or exhaust memory.

    Raises:
        CheckpointError: the file names a checkpoint of timm or a source on a hub, or describes far more weights than
            the folder holds; the message has file and field. Or the weights are files of ``torch.save`` that are not
            safe to read.
    """
    if not any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("*.bin")):
            check_archive(file)
    config = folder / "config.json"
    if not config.is_file():
        return
    content = read_json(config)
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        check_sources(content)
        check_values(content, "config")
        _check_sizes(content, 8 * stored + 2**24)
    except CheckpointError as error:
        raise CheckpointError(f"{config}: {error}") from None


def check_sources(config: Any) -> None:
    """Rejects a Hugging Face configuration that makes transformers build a model from another place than its own.

    transformers passes such entries to timm, which reads pickles (``checkpoint_path``), other folders and the hub.

    Raises:
        CheckpointError: the message names the entry.
    """
    for entry in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        check_sources(entry)
    if isinstance(config, str) and config.lower().startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise CheckpointError(f"{config!r} names another source of weights, which is not opened")
    if isinstance(config, dict):
        for name in sorted(_NAME_SOURCES & set(config)):
            if config[name] and not (name == "architecture" and re.fullmatch(r"[\w.]*", str(config[name]))):
                raise CheckpointError(f"{name} {config[name]!r} names another source of weights, which is not opened")


def _check_sizes(content: Any, largest: int) -> None:
    for entry in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_sizes(entry, largest)
    if isinstance(content, dict):
        width = max((int(content[name]) for name in _WIDTHS if type(content.get(name)) is int), default=1)
        for name in _HEIGHTS:
            if type(content.get(name)) is int and content[name] * width > largest:
                raise CheckpointError(f"{name} {content[name]} times {width} is more than the weights in the folder")


def _fields_of(config_class: Any, settings: Any) -> dict[str, Any]:
    """The entries of a Hugging Face configuration that are fields of its class and hold numbers or plain words."""
    names = {
        name
        for base in config_class.__mro__
        if base.__module__.startswith("transformers.models.")
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    names |= {"num_labels"}
    return {name: entry for name, entry in settings.items() if name in names and _is_plain({name: entry})}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, dict):
        return all(not _NOT_READ.search(str(key)) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, bool | int | float)


def _build_module(specification: Any) -> nn.Module:
    kind = specification.get("kind") if isinstance(specification, dict) else None
    if kind == "family":
        config = specification.get("config")
        if not isinstance(config, dict):
            raise CheckpointError("the checkpoint holds a module without a configuration")
        cls: Any = registered_class(str(config.get("package")), str(config.get("class")))
        return cls.from_config(config)
    try:
        if kind == "transformers":
            return _build_transformers(specification.get("class"), specification.get("config"))
        if kind == "timm":
            return _build_timm(specification.get("architecture"), specification.get("num_classes"))
    except ImportError as error:
        raise CheckpointError(f"the checkpoint holds a {kind} module: install {kind}, or pass it again") from error
    raise CheckpointError(f"the checkpoint's configuration has a module of unknown kind {kind!r}")


def _build_transformers(name: Any, settings: Any) -> nn.Module:
    if not _is_rebuilt(name) or not isinstance(settings, dict):
        raise CheckpointError(
            f"the checkpoint holds a transformers module {name!r}, which is not built from a file; pass it again"
        )
    import transformers

    cls: Any = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(f"the checkpoint holds a {name}, which transformers {transformers.__version__} lacks")
    check_values(settings, "config")
    return cls(cls.config_class(**_fields_of(cls.config_class, settings)))


def _build_timm(architecture: Any, num_classes: Any) -> nn.Module:
    if not isinstance(architecture, str) or not _TIMM_ARCHITECTURE.fullmatch(architecture):
        raise CheckpointError(
            f"the checkpoint names the timm model {architecture!r}; a file may only name one of timm's architectures"
        )
    if not (num_classes is None or (type(num_classes) is int and 0 <= num_classes <= _LONGEST)):
        raise CheckpointError(f"the checkpoint has num_classes {num_classes!r} for the timm model {architecture}")
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"the checkpoint holds the timm model {architecture}, which timm {timm.__version__} lacks"
        )
    sizes = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(architecture, pretrained=False, **sizes)
