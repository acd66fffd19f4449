"""Checks of a trainer's arguments, made before any state changes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lm_core.adapters import as_causal_lm
from lm_core.checks import check_ids
from lm_core.training.accelerator import pick_device
from spin_trainer.data.sft_data import SFTDataset
from spin_trainer.model.reference import MovingReference
from spin_trainer.model.spin import SPIN
from spin_trainer.training.config import SelfPlaySettings


def make_spin(
    model: Any,
    settings: SelfPlaySettings,
    spin_kwargs: Mapping[str, Any] | None,
    pad_id: int | None,
    eos_ids: Sequence[int],
) -> SPIN:
    """The ``SPIN`` of a trainer: ``model`` if it is one, else a new one from the settings.

    Raises:
        ValueError: ``model`` is a SPIN and the settings differ from its own.
    """
    shared = {name: getattr(settings, name) for name in ("lambda_", "loss", "reduction", "ref_model_ema_decay")}
    if isinstance(model, SPIN):
        if spin_kwargs:
            raise ValueError(f"spin_kwargs must be None if model is a SPIN already, got {dict(spin_kwargs)}")
        matches = {
            "ref_model_ema_decay": (settings.ref_model_ema_decay < 1) == isinstance(model.ref_model, MovingReference)
        }
        for name in ("lambda_", "loss", "reduction"):  # a setting at its default was not passed
            matches[name] = shared[name] in (getattr(SelfPlaySettings, name), getattr(model, name))
        for name, value in shared.items():
            if not matches[name]:
                raise ValueError(f"{name} must match the SPIN that is passed as model, got {value!r}")
        return model
    arguments: dict[str, Any] = {**shared, "pad_id": pad_id, "eos_id": tuple(eos_ids), **(spin_kwargs or {})}
    if arguments["ref_model_ema_decay"] != settings.ref_model_ema_decay:
        raise ValueError(f"ref_model_ema_decay is an argument of the trainer, got it in spin_kwargs {spin_kwargs}")
    return SPIN(model, **arguments)


def check_datasets(
    policy: Any, max_seq_len: int, datasets: Mapping[str, SFTDataset | None], eos_ids: Sequence[int]
) -> None:
    """Checks that ids are in the vocabulary and that ``max_seq_len`` suits model and data.

    Raises:
        ValueError: they do not; the message names dataset and row.
    """
    # limits of the model
    vocabulary = getattr(policy, "vocab_size", None)
    weight = getattr(policy, "output_weight", None)
    if vocabulary is None and isinstance(weight, torch.Tensor):
        vocabulary = weight.shape[0]
    limit = getattr(policy, "max_length", None)
    if limit is not None and max_seq_len > limit:
        raise ValueError(f"max_seq_len must be at most the model's {limit}, got {max_seq_len}")
    # every row, then EOS
    for name, dataset in datasets.items():
        for row, example in enumerate(dataset or ()):
            if len(example.prompt) + max(map(len, example.all_answers)) > max_seq_len:
                raise ValueError(f"{name}[{row}] must fit into max_seq_len {max_seq_len}")
            if vocabulary is not None:
                ids = torch.tensor([*example.prompt, *itertools.chain(*example.all_answers)])
                check_ids(ids, vocabulary, f"{name}[{row}]")
    if any(eos < 0 or (vocabulary is not None and eos >= vocabulary) for eos in eos_ids):
        raise ValueError(f"eos_id must be in [0, {vocabulary}), got {list(eos_ids)}")


def check_accelerator(accelerator: Any, accelerate_kwargs: Mapping[str, Any] | None, device: str) -> Any:
    """The accelerator to use, None for the default; one that would silently change losses or precision is refused.

    Raises:
        ValueError: the accelerator accumulates gradients, has mixed precision, or shards.
    """
    if accelerator is not None and accelerate_kwargs:
        raise ValueError(
            f"accelerate_kwargs must be None where an accelerator is passed, got {dict(accelerate_kwargs)}"
        )
    if accelerator is None and not accelerate_kwargs:
        return None
    arguments = dict(accelerate_kwargs or {})
    steps = arguments.get("gradient_accumulation_steps", getattr(accelerator, "gradient_accumulation_steps", 1))
    if steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is gradient_accumulation here and must be 1 in accelerate, got {steps}"
        )
    mixed = arguments.get("mixed_precision", getattr(accelerator, "mixed_precision", None))
    if mixed not in ("no", None):
        raise ValueError(f"mixed_precision is precision= here, got {mixed!r} in accelerate")
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator(**{"cpu": pick_device(device).type == "cpu", **arguments})
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{kind} in accelerate is refused: start with torchrun, with fsdp=True to shard the weights")
    return accelerator


def check_policy(model: Any, name: str) -> Any:
    """``model`` as a ``CausalLM``; ``name`` is that of the argument.

    Raises:
        TypeError: it is not a module.
        ValueError: it is the policy, "model", and none of its parameters trains.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name} must be a module, got {type(model).__name__}")
    if name == "model" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{name} must have trainable parameters, got a {type(model).__name__} with none")
    return as_causal_lm(model)
