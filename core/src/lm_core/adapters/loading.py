"""Causal language models from folders or the hub, and LoRA adapters on them."""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.torch_version import TorchVersion

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import CheckpointError, read_json
from lm_core.checkpoints.module_specs import check_foreign_folder, check_sources, registered_class
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.checks import typed
from lm_core.tokenizers import HUB_ID

ADAPTER_FILE = "adapter_config.json"
DType = Literal["auto", "float32", "bfloat16", "float16"]  # of a command's flag; auto keeps the stored one


def torch_dtype(name: DType) -> torch.dtype | None:
    """The dtype of this name; None for "auto"."""
    return None if name == "auto" else getattr(torch, name)


@typed
def load_causal_lm(
    source: str | Path | nn.Module, *, name: str = "model", dtype: torch.dtype | None = None
) -> nn.Module:
    """A causal language model from a folder or the hub; a module is returned unchanged.

    Args:
        source: folder of a run (its newest checkpoint), of a saved language model of these packages, of a transformers
            model or of a peft adapter of one; or ``organisation/name`` on the hub. Code of a folder or of the hub is
            never run.
        name: argument name in error messages.
        dtype: dtype of the weights; None keeps the stored one.

    Raises:
        CheckpointError: the folder was written by a package that is not installed, is damaged, or would make
            transformers open other files.
        FileNotFoundError: ``source`` is neither a folder with a model nor a hub name.
        ValueError: the folder holds no causal language model.
        ImportError: transformers or peft is needed and not installed.
    """
    if isinstance(source, nn.Module):
        return source if dtype is None else source.to(dtype)
    place = str(source)
    if Path(source).expanduser().is_dir():
        folder = checkpoint_folder(source)
        place = str(folder)
        stored = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        if "class" in stored:
            cls: Any = registered_class(str(stored.get("package")), str(stored["class"]))
            if not hasattr(cls, "init_cache"):
                raise ValueError(f"{name} must be a language model, {source} holds a {stored['class']}")
            model: nn.Module = cls.from_pretrained(folder)
            return model if dtype is None else model.to(dtype)
    elif Path(source).exists() or not HUB_ID.fullmatch(place):
        raise FileNotFoundError(f"{name} must be a folder or organisation/name on the hub, got {place!r}")
    return _from_transformers(place, name, dtype)


def _from_transformers(place: str, name: str, dtype: torch.dtype | None) -> nn.Module:
    try:
        import transformers

        cls: Any = transformers.AutoModelForCausalLM
        if _has_adapter(place):
            from peft import PeftConfig, PeftModelForCausalLM
    except ImportError as error:
        raise ImportError("Hugging Face models need transformers and peft: pip install transformers peft") from error
    arguments = dtype_argument(dtype)
    if not _has_adapter(place):
        return whole_model(cls, place, name=name, **arguments)
    with _loading(name, place):
        adapter = PeftConfig.from_pretrained(place)
        if adapter.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f"it is an adapter for {adapter.task_type}")
    base: Any = whole_model(
        cls,
        str(adapter.base_model_name_or_path),
        name=f"the base of {name} {place!r},",
        revision=adapter.revision,
        **arguments,
    )
    with contextlib.suppress(OSError, ValueError):  # there may be no tokenizer
        tokens = len(transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False))
        if tokens > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(tokens)  # to those that were added for the adapter
    with _loading(name, place), quiet_peft():
        adapted: nn.Module = PeftModelForCausalLM.from_pretrained(base, place, is_trainable=True)
    return adapted


@contextlib.contextmanager
def _loading(name: str, place: str) -> Iterator[None]:
    """Turns all that transformers, its parsers, files and the network raise into a ``ValueError`` that names both."""
    try:
        yield
    except (ImportError, CheckpointError):
        raise
    except Exception as error:
        raise ValueError(f"{name} {place!r} could not be loaded by transformers: {error}") from error


def dtype_argument(dtype: torch.dtype | None) -> dict[str, Any]:
    """The argument of ``from_pretrained`` for a dtype, None for the stored one; transformers 4.56 renamed it."""
    import transformers

    keyword = "dtype" if TorchVersion(transformers.__version__) >= "4.56" else "torch_dtype"
    return {keyword: "auto" if dtype is None else dtype}


def check_foreign(place: str) -> None:
    """Rejects a folder or hub name whose configuration makes transformers open other sources.

    Raises:
        CheckpointError: as for ``check_foreign_folder`` and ``check_sources``.
    """
    if Path(place).is_dir():
        check_foreign_folder(Path(place))
    else:
        from transformers import PretrainedConfig

        check_sources(PretrainedConfig.get_config_dict(place)[0])


def whole_model(cls: Any, place: str, *, name: str, optional: str = "(?!)", **arguments: Any) -> nn.Module:
    """``cls.from_pretrained`` of a folder that has all weights and names no others (``check_foreign``).

    transformers fills missing weights with random numbers.

    Args:
        cls: a class of transformers.
        place: folder or name on the hub.
        name: argument name in error messages.
        optional: pattern of weights that may be missing, because nothing reads them.
        **arguments: arguments of ``from_pretrained``.

    Raises:
        CheckpointError: the configuration leads elsewhere; the message names the entry.
        ValueError: weights are missing, or transformers cannot load the folder.
    """
    if Path(place).is_dir():
        arguments["local_files_only"] = True
    with _loading(name, place):
        check_foreign(place)
        _check_described(cls, place)
        model, loading = cls.from_pretrained(place, trust_remote_code=False, output_loading_info=True, **arguments)
    if missing := sorted(key for key in loading["missing_keys"] if not re.search(optional, key)):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{name} {place!r} holds no whole {type(model).__name__}, it lacks {', '.join(missing[:5])}{more}"
        )
    whole: nn.Module = model
    return whole


def _check_described(cls: Any, place: str) -> None:
    """Compares the model of a folder's configuration with the weights in the folder, before that takes memory.

    Raises:
        CheckpointError: the configuration describes more than eight times the numbers in the files (which may hold
            eight of them in one, quantised).
    """
    files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    if not files:
        return
    import transformers
    from safetensors import safe_open

    config_class = getattr(cls, "config_class", None) or transformers.AutoConfig
    try:
        config = config_class.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except (OverflowError, RuntimeError) as error:
        if "overflow" in str(error):
            raise CheckpointError(f"{place} describes a model beyond any memory: {error}") from error
        return  # a constructor that reads values of tensors
    except Exception:  # from_pretrained raises it again
        return
    stored = 0
    for file in files:
        with safe_open(file, framework="pt") as content:
            stored += sum(math.prod(content.get_slice(key).get_shape()) for key in content.keys())  # noqa: SIM118
    described = sum(tensor.numel() for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    if described > 8 * stored + 2**24:
        raise CheckpointError(
            f"{place} describes a {type(skeleton).__name__} of {described:,} weights and holds {stored:,}"
        )


def _has_adapter(place: str) -> bool:
    """True for a folder or hub repository of a peft adapter."""
    if Path(place).is_dir():
        return (Path(place) / ADAPTER_FILE).is_file()
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(place) is not None


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides peft's use of an attribute that transformers 5 renamed, which is no concern of the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
) -> nn.Module:
    """Freezes a transformers model and adds LoRA adapters (arXiv 2106.09685) with peft.

    Args:
        model: a transformers causal language model without adapters.
        r, alpha, dropout, targets: as in ``lora_config``.

    Raises:
        ValueError: the rank is below 1, or the model has adapters already.
        TypeError: the model is not a transformers model.
        ImportError: peft is not installed.
    """
    if hasattr(model, "peft_config"):
        names = sorted(model.peft_config)  # type: ignore[arg-type]
        raise ValueError(
            f"model must have no adapters, got {names}; train these without lora_r, or merge them first "
            "(model.merge_and_unload())"
        )
    config = lora_config(model, r=r, alpha=alpha, dropout=dropout, targets=targets)
    from peft import get_peft_model

    with quiet_peft():
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def lora_config(
    model: nn.Module,
    *,
    r: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
) -> Any:
    """The ``peft.LoraConfig`` of adapters for a transformers model, which may have others already.

    Args:
        model: a transformers causal language model, also in peft.
        r: rank of the adapters.
        alpha: scale times rank; adapters are scaled by alpha / r. Twice the rank by default.
        dropout: dropout probability before the adapters.
        targets: names of the linear layers that get an adapter; by default all but the output layer and the output
            projections of state space layers, whose kernels read the weight without the adapter.

    Raises:
        ValueError: the rank is below 1.
        TypeError: the model is not a transformers model.
        ImportError: peft is not installed.
    """
    if r < 1:
        raise ValueError(f"lora_r must be at least 1, got {r}")
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"LoRA adapters need a transformers model, got {type(model).__name__}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    settings: dict[str, Any] = {"r": r, "lora_alpha": alpha or 2 * r, "lora_dropout": dropout}
    # GPT-2 stores its weights transposed
    settings["fan_in_fan_out"] = any(type(module).__name__ == "Conv1D" for module in model.modules())
    if targets is None:
        settings.update(target_modules="all-linear", exclude_modules=_refused(model) or None)
    else:
        settings["target_modules"] = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def _refused(model: nn.Module) -> list[str]:
    """Names of layers that peft refuses: the output projection of layers with a short convolution (Mamba)."""
    return ["out_proj", "conv1d"] if any(hasattr(module, "conv1d") for module in model.modules()) else []
