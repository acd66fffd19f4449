"""Single weight files of this package or of the original: loaded into a model, or converted to a checkpoint folder.

Files are read with ``weights_only=True``: a file with more than tensors is refused before any code in it runs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_state_file, read_state_file
from lm_core.checks import typed
from palm_rlhf.interop.original import (
    NormGain,
    cleaned,
    from_palm_rlhf_pytorch,
    is_original,
    palm_state_from_original,
    shapes_of,
)
from palm_rlhf.interop.original_rlhf import is_original_reward_model, reward_model_from_palm_rlhf_pytorch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.reward.model import RewardModel


@typed
def load_weights_file(palm: PaLM, path: str | Path, *, norm_gain: NormGain = "auto") -> None:
    """Loads a state dict file into ``palm``, cast to its dtype; after an error ``palm`` is as it was.

    Args:
        palm: model with the file's sizes and LoRA scopes.
        path: file in ``.safetensors`` or ``torch.save`` format, of this package or of the original.
        norm_gain: see ``from_palm_rlhf_pytorch``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or holds more than tensors, or does not fit, naming the keys.
        ValueError: ``norm_gain`` must be given.
    """
    load_state_file(palm, path, convert=partial(palm_layout, norm_gain=norm_gain))


def palm_layout(palm: PaLM, state: dict[str, Tensor], *, norm_gain: NormGain = "auto") -> dict[str, Tensor]:
    """A state dict of the original package, or of this one, in the layout of ``palm``.

    Raises:
        CheckpointError: the original has other numbers of heads, naming them.
        ValueError: ``norm_gain`` must be given.
    """
    if not is_original(state):
        return cleaned(state)
    scale = next(palm.blocks()).attention.scale
    original = palm_state_from_original(state, norm_gain=norm_gain, qk_scale=8.0 if scale is None else scale)
    if shapes_of(original.state) == shapes_of(palm.state_dict()):
        # other numbers of heads can have the same shapes
        wrong = [
            f"{name} {original.arguments[name]} (model {getattr(palm, name)})"
            for name in ("heads", "kv_heads", "dim_head")
            if original.arguments[name] != getattr(palm, name)
        ]
        if wrong:
            raise CheckpointError(f"the file is of a PaLM with {', '.join(wrong)}")
    return original.state


@typed
def convert_checkpoint(
    old: str | Path,
    directory: str | Path,
    *,
    norm_gain: NormGain = "auto",
    prefix: str | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    **constructor_overrides: Any,
) -> Path:
    """Converts a file of the original package to a folder that ``PaLM.from_pretrained`` opens.

    A reward model becomes a folder for ``RewardModel.from_pretrained``, unless ``prefix`` asks for its PaLM.

    Other arguments and errors are those of ``from_palm_rlhf_pytorch`` and ``PaLM.save_pretrained``.

    Args:
        old: file with a state dict of ``PaLM``, ``RewardModel`` or ``ActorCritic``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds more than tensors, or is not of the original.
    """
    state = read_state_file(old)
    model: PaLM | RewardModel
    if prefix is None and is_original_reward_model(state):
        model = reward_model_from_palm_rlhf_pytorch(state, norm_gain, **constructor_overrides)
    else:
        model = from_palm_rlhf_pytorch(state, norm_gain, prefix=prefix, **constructor_overrides)
    return model.save_pretrained(directory, overwrite=overwrite, tokenizer=tokenizer)
