"""Conversion of weights of the package memorizing-transformers-pytorch.

The architecture is the same: biased norms, a GELU feed-forward, one T5 bias for plain and one for memorizing layers
times the square root of ``dim_head``, an untied output layer with a bias. The logits of a first segment, without
memory, are equal. Later ones differ because of two errors of the original: its bias is misplaced after XL memories, and
its memory loses results once it overflows.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checks import typed
from lm_core.tokenizers import as_tokenizer
from memorizing_transformer.model.transformer import MemorizingTransformer

_SIMPLE = {
    "token_emb.weight": "token_emb.weight",
    "rel_pos_bias.relative_attention_bias.weight": "layers.position_bias.bias.weight",
    "knn_rel_pos_bias.relative_attention_bias.weight": "layers.knn_position_bias.bias.weight",
    "to_logits.0.weight": "norm.weight",
    "to_logits.0.bias": "norm.bias",
    "to_logits.1.weight": "to_logits.weight",
    "to_logits.1.bias": "to_logits.bias",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_IN_LAYER = {
    "0.fn.to_q.weight": "attentions.0.inner.projections.to_q.weight",
    "0.fn.to_kv.weight": "attentions.0.inner.projections.to_kv.weight",
    "0.fn.to_out.weight": "attentions.0.inner.projections.to_out.weight",
    "0.fn.to_out.bias": "attentions.0.inner.projections.to_out.bias",
    "0.fn.scale": "attentions.0.inner.log_scale",
    "0.norm.weight": "attentions.0.norm.weight",
    "0.norm.bias": "attentions.0.norm.bias",
    "1.fn.net.0.weight": "ff.0.weight",
    "1.fn.net.0.bias": "ff.0.bias",
    "1.fn.net.3.weight": "ff.3.weight",
    "1.fn.net.3.bias": "ff.3.bias",
    "1.norm.weight": "ff_norm.weight",
    "1.norm.bias": "ff_norm.bias",
}


@typed
def from_memorizing_transformers_pytorch(
    state_dict: Mapping[str, Tensor], *, dim_head: int = 64, **settings: Any
) -> MemorizingTransformer:
    """A model with the weights of the original's ``state_dict``.

    Args:
        state_dict: state dict of the original's ``MemorizingTransformer``; all sizes but ``dim_head`` are read from it.
        dim_head: features of a head of the original model, checked against the keys' projection.
        **settings: further constructor arguments, such as ``xl_max_memories``.

    Raises:
        ValueError: keys are missing or unknown, or ``dim_head`` does not fit their shapes.
    """
    unknown = [name for name in state_dict if _renamed(name) is None]
    missing = [name for name in _SIMPLE if name not in state_dict]
    if unknown or missing:
        raise ValueError(
            f"state_dict must be of memorizing-transformers-pytorch, got unknown keys {sorted(unknown)[:5]} and "
            f"missing keys {missing}"
        )
    num_tokens, dim = state_dict["token_emb.weight"].shape
    # sizes of the model
    layers = sorted({int(match[1]) for name in state_dict if (match := _LAYER.fullmatch(name))})
    keys = state_dict["layers.0.0.fn.to_kv.weight"].shape[0]
    if keys != 2 * dim_head:
        raise ValueError(f"dim_head must be {keys // 2}, as the keys' projection has it, got {dim_head}")
    memorizing = [layer + 1 for layer in layers if f"layers.{layer}.0.fn.scale" in state_dict]
    heads = state_dict["rel_pos_bias.relative_attention_bias.weight"].shape[1]
    arguments: dict[str, Any] = {
        "num_tokens": num_tokens,
        "dim": dim,
        "depth": len(layers),
        "dim_head": dim_head,
        "heads": heads,
        "ff_mult": state_dict["layers.0.1.fn.net.0.weight"].shape[0] // dim,
        "memorizing_layers": memorizing,
    }
    if memorizing:
        arguments["knn_attn_heads"] = state_dict[f"layers.{memorizing[0] - 1}.0.fn.scale"].shape[0]
    renamed = {str(_renamed(name)): tensor for name, tensor in state_dict.items()}
    # the initialisation must not advance the caller's random state
    with torch.random.fork_rng(devices=[]):
        model = MemorizingTransformer(**{**arguments, **settings})
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit a model of {arguments}: {error}") from error
    return model


def _renamed(name: str) -> str | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return _SIMPLE.get(name)
    return f"layers.blocks.{match[1]}.{_IN_LAYER[match[2]]}" if match[2] in _IN_LAYER else None


@typed
def convert_checkpoint(
    old: str | Path, directory: str | Path, *, dim_head: int = 64, overwrite: bool = False, tokenizer: Any = None
) -> Path:
    """Converts a file with the original's state dict to a folder for ``MemorizingTransformer.from_pretrained``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another architecture.
        FileExistsError: ``directory`` has content and ``overwrite`` is False.
    """
    state = load_tensors(old)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{old} must hold a state dict")
    model = from_memorizing_transformers_pytorch(state, dim_head=dim_head)
    encoder = None if tokenizer is None else as_tokenizer(tokenizer)
    return model.save_pretrained(directory, overwrite=overwrite, tokenizer=encoder)
