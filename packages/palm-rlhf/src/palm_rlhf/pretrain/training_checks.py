"""What a pretraining run accepts: checks made before any state is changed."""

from typing import Any

from lm_core.checkpoints.checkpoint import Checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import check_config, check_vocabulary
from lm_core.training.session import check_goes_on
from palm_rlhf.model.palm import PaLM

# Arguments of PaLM that change what its weights mean; dropout, for one, may differ when a run goes on.
ARCHITECTURE = (
    *("dim", "num_tokens", "depth", "dim_head", "heads", "kv_heads", "ff_mult", "causal"),
    *("qk_rmsnorm", "qk_scale", "use_xpos", "rotary_xpos_scale_base"),
)


def check_trainable(model: PaLM, tokenizer: Any) -> None:
    """Raises unless ``model`` can be pretrained on the tokens of ``tokenizer``.

    Raises:
        ValueError: the model is not causal, has LoRA scopes, or fewer tokens than the tokenizer.
        TypeError: the tokenizer lacks a part of ``lm_core.tokenizers.Tokenizer``, or cannot be saved.
    """
    check_vocabulary(tokenizer, model.num_tokens)
    if not model.causal:
        raise ValueError("model must be causal to be trained as a language model, got causal=False")
    if len(model.finetune_modules):
        raise ValueError(f"model must have no finetune scopes to be pretrained, got {list(model.finetune_modules)}")


def check_same_run(checkpoint: Checkpoint, model: PaLM, *, trainer: str, fsdp: bool) -> None:
    """Raises ``CheckpointError`` unless a run of this trainer, with this model, can go on from ``checkpoint``."""
    state, where = checkpoint.trainer_state, checkpoint.path
    check_config(type(model), checkpoint.config, where / "config.json")
    check_goes_on(checkpoint, trainer=trainer, arguments=model.config["arguments"], names=ARCHITECTURE)
    if state["fsdp"] != fsdp:
        raise CheckpointError(f"{where} was written with fsdp={state['fsdp']}, got fsdp={fsdp}")
