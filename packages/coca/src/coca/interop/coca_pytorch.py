"""Conversion of weights of the original ``CoCa-pytorch`` 0.1.0.

| original | here |
|---|---|
| ``fused_attn_ff_proj``; ``attn_out`` and ``ff_out.1`` | ``proj_in``; concatenated in ``proj_out`` |
| ``to_q`` and ``ff.0``; ``to_out`` and ``ff.2`` | concatenated in ``proj_in``; concatenated in ``proj_out`` |
| ``img_queries``, ``img_attn_pool``, ``img_attn_pool_norm`` | ``pooling.caption`` (``pooling="shared"``) |
| ``temperature``, of shape (1,) | ``log_logit_scale``: both are the logarithm |
| ``img_encoder.*`` | ``img_encoder.encoder.*`` |
| ``beta``, ``inv_freq`` buffers, ``to_logits.1.weight`` | dropped: zero, recomputed, tied |

Logits of texts without padding and the captioning loss then equal the original's, as do the text embeddings of texts
without padding; with padding the original put CLS elsewhere.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coca.model.coca import CoCa
from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import typed

_ORIGINAL_KEYS = ("token_emb.weight", "text_cls_token", "img_queries", "temperature", "unimodal_layers.0.fn.norm.gamma")


@typed
def from_coca_pytorch(
    state_dict: Mapping[str, Tensor],
    *,
    img_encoder: nn.Module | None = None,
    **arguments: Any,
) -> CoCa:
    """A ``CoCa`` with an original model's weights, in the dtype of its embedding; sizes are read from the shapes.

    Args:
        state_dict: state dict of the original model.
        img_encoder: module of the original encoder's class; receives the weights under ``img_encoder.``.
        **arguments: further arguments of ``CoCa`` that the weights do not determine, such as ``pad_id`` and ``eos_id``.
            A size that contradicts the weights is refused.

    Raises:
        ValueError: the state dict is not the original's, or only one of state dict and arguments has an image encoder.
    """
    missing = [key for key in _ORIGINAL_KEYS if key not in state_dict]
    if missing:
        raise ValueError(f"state_dict must be of CoCa-pytorch's CoCa, got one without {', '.join(missing)}")
    encoder_state = {key: value for key, value in state_dict.items() if key.startswith("img_encoder.")}
    if encoder_state and img_encoder is None:
        raise ValueError(f"state_dict has {len(encoder_state)} weights of an image encoder: pass img_encoder=")
    if img_encoder is not None and not encoder_state:
        raise ValueError("img_encoder was given, but state_dict has no weights of an image encoder")
    model = CoCa(**{**_sizes(state_dict), "img_encoder": img_encoder, "pooling": "shared", **arguments})
    load_weights(model, convert_state_dict(state_dict), dtypes="stored", where="state_dict")
    return model.to(state_dict["token_emb.weight"].dtype)


@typed
def load_coca_pytorch(path: str | Path, *, img_encoder: nn.Module | None = None, **arguments: Any) -> CoCa:
    """As ``from_coca_pytorch``, from a ``.pt`` file; nothing in the file is executed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file contains no state dict; see also ``from_coca_pytorch``.
    """
    content = load_tensors(path)
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, got {type(content).__name__}")
    return from_coca_pytorch(content, img_encoder=img_encoder, **arguments)


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors under this package's names."""
    result: dict[str, Tensor] = {
        "token_emb.weight": state_dict["token_emb.weight"],
        "text_cls": state_dict["text_cls_token"],
        "text_cls_norm.gamma": state_dict["text_cls_norm.gamma"],
        "norm.gamma": state_dict["to_logits.0.gamma"],
        "text_to_latents.weight": state_dict["text_to_latents.to_latents.weight"],
        "image_to_latents.weight": state_dict["img_to_latents.to_latents.weight"],
        "log_logit_scale": state_dict["temperature"].reshape(()),
        "pooling.caption.queries": state_dict["img_queries"],
        "pooling.caption.norm.gamma": state_dict["img_attn_pool_norm.gamma"],
        **_cross_attention(state_dict, "img_attn_pool", "pooling.caption.attention"),
    }
    for layer in range(_depth(state_dict, "unimodal_layers")):
        result |= _block(state_dict, f"unimodal_layers.{layer}.fn", f"unimodal_layers.{layer}")
    for layer in range(_depth(state_dict, "multimodal_layers")):
        name = f"multimodal_layers.{layer}"
        result |= _block(state_dict, f"{name}.0.fn", f"{name}.block")
        result |= _cross_attention(state_dict, f"{name}.1.fn", f"{name}.cross_attention")
    for key, value in state_dict.items():
        if key.startswith("img_encoder."):
            result["img_encoder.encoder." + key.removeprefix("img_encoder.")] = value
    return result


def _block(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {
        f"{new}.norm.gamma": state[f"{old}.norm.gamma"],
        f"{new}.proj_in.weight": state[f"{old}.fused_attn_ff_proj.weight"],
        f"{new}.proj_out.weight": torch.cat((state[f"{old}.attn_out.weight"], state[f"{old}.ff_out.1.weight"]), dim=1),
    }


def _cross_attention(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    queries, out = state[f"{old}.to_q.weight"], state[f"{old}.to_out.weight"]
    if f"{old}.ff.0.weight" in state:
        queries = torch.cat((queries, state[f"{old}.ff.0.weight"]), dim=0)
        out = torch.cat((out, state[f"{old}.ff.2.weight"]), dim=1)
    result = {
        f"{new}.norm.gamma": state[f"{old}.norm.gamma"],
        f"{new}.proj_in.weight": queries,
        f"{new}.to_kv.weight": state[f"{old}.to_kv.weight"],
        f"{new}.proj_out.weight": out,
    }
    if f"{old}.context_norm.gamma" in state:
        result[f"{new}.context_norm.gamma"] = state[f"{old}.context_norm.gamma"]
    return result


def _depth(state: Mapping[str, Tensor], name: str) -> int:
    return len({match[0] for key in state if (match := re.match(rf"{name}\.\d+\.", key))})


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    num_tokens, dim = state["token_emb.weight"].shape
    dim_head = state["img_attn_pool.to_kv.weight"].shape[0] // 2
    return {
        "dim": dim,
        "num_tokens": num_tokens,
        "unimodal_depth": _depth(state, "unimodal_layers"),
        "multimodal_depth": _depth(state, "multimodal_layers"),
        "dim_latents": state["text_to_latents.to_latents.weight"].shape[0],
        "image_dim": state["img_attn_pool.to_kv.weight"].shape[1],
        "num_img_queries": state["img_queries"].shape[0] - 1,
        "dim_head": dim_head,
        "heads": state["img_attn_pool.to_q.weight"].shape[0] // dim_head,
        "ff_mult": state["unimodal_layers.0.fn.ff_out.1.weight"].shape[1] // dim,
    }
