"""Constructor arguments as JSON, modules among them.

``config.json`` must be enough to rebuild a model. Numbers, strings, lists, tuples and dicts are written unchanged or
under a ``$`` tag. A module is written as a specification if it can be rebuilt from one: a model of a package built on
this one, a Hugging Face model, a timm model. Anything else is marked ``$given``: it must be passed again when the model
is loaded.

Checkpoints are untrusted data, so a specification can name only classes that installed packages register (entry
points), Hugging Face's and timm's; it cannot make any other module be imported.
"""

import contextlib
import importlib
import importlib.metadata
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from lm_core.checkpoints.manifest import CheckpointError, json_value

ENTRY_POINTS = "lm_core.models"
_NAMES_CODE = {"auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_NAMES_CODE |= {"experts_implementation", "_experts_implementation", "quantization_config"}
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
    if isinstance(value, Path):
        return {"$path": str(value)}
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
    if tag == "$path":
        return Path(content)
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
    if package == "transformers" and hasattr(module, "config"):
        settings = _without_code(json_value(module.config.to_dict()))
        return {"kind": "transformers", "class": type(module).__name__, "config": settings}
    if package == "timm" and "timm" in kinds:
        description = getattr(module, "pretrained_cfg", None) or {}
        if "architecture" in description:
            return {
                "kind": "timm",
                "architecture": description["architecture"],
                "num_classes": getattr(module, "num_classes", None),
            }
    return None


def _without_code(settings: Any) -> Any:
    """A Hugging Face configuration without the entries that can refer to downloadable code."""
    if isinstance(settings, dict):
        return {name: _without_code(entry) for name, entry in settings.items() if name not in _NAMES_CODE}
    return [_without_code(entry) for entry in settings] if isinstance(settings, list) else settings


def _build_module(specification: Any) -> nn.Module:
    kind = specification.get("kind") if isinstance(specification, dict) else None
    if kind == "family":
        config = specification["config"]
        cls: Any = registered_class(str(config.get("package")), str(config.get("class")))
        return cls.from_config(config)
    try:
        if kind == "transformers":
            return _build_transformers(str(specification["class"]), dict(specification["config"]))
        if kind == "timm":
            timm: Any = importlib.import_module("timm")
            count = specification["num_classes"]
            return timm.create_model(
                str(specification["architecture"]),
                pretrained=False,
                **({} if count is None else {"num_classes": count}),
            )
    except ImportError as error:
        raise CheckpointError(f"the checkpoint holds a {kind} module: install {kind}, or pass it again") from error
    raise CheckpointError(f"the checkpoint's configuration has a module of unknown kind {kind!r}")


def _build_transformers(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    settings = _without_code(settings)
    cls: Any = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise CheckpointError(f"the checkpoint holds a transformers module {name!r}, which transformers does not have")
    build: Any = cls
    return build(build.config_class.from_dict(settings))
