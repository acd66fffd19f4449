"""Names of open_clip's CoCa weights: to this package's, and back.

| open_clip | here |
|---|---|
| ``visual.*`` before the pooling | ``CLIPVisionTransformer`` |
| ``visual.attn_pool`` with its first query for the contrastive loss, ``visual.ln_post`` | ``pooling`` (shared) |
| ``visual.proj``, ``text.text_projection`` | ``image_to_latents``, ``text_to_latents``, transposed |
| ``text.*`` | the unimodal layers |
| ``text_decoder.resblocks`` and ``cross_attn`` | the multimodal layers |
| ``text_decoder.text_projection`` | ``output_layer``, transposed |
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Names within a block of self-attention and of cross-attention.
_SELF = {"ln_1": "norm", "attn.out_proj": "to_out"}
_CROSS = {
    "ln_1": "cross_attention.norm",
    "ln_1_kv": "cross_attention.context_norm",
    "attn.out_proj": "cross_attention.proj_out",
}
_FEED_FORWARD = {"ln_2": "feed_forward.0", "mlp.c_fc": "feed_forward.1", "mlp.c_proj": "feed_forward.3"}
_RENAMED = {
    "visual.conv1.weight": "img_encoder.encoder.to_tokens.weight",
    "visual.class_embedding": "img_encoder.encoder.class_token",
    "visual.positional_embedding": "img_encoder.encoder.positions",
    "visual.ln_pre.weight": "img_encoder.encoder.norm.weight",
    "visual.ln_pre.bias": "img_encoder.encoder.norm.bias",
    "visual.attn_pool.query": "pooling.caption.queries",
    "text.token_embedding.weight": "token_emb.weight",
    "text.positional_embedding": "position_emb.weight",
    "text.cls_emb": "text_cls",
    "logit_scale": "log_logit_scale",
    "logit_bias": "logit_bias",
}
for _old, _new in {
    "visual.attn_pool.ln_q": "pooling.caption.attention.norm",
    "visual.attn_pool.ln_k": "pooling.caption.attention.context_norm",
    "visual.attn_pool.attn.out_proj": "pooling.caption.attention.proj_out",
    "visual.ln_post": "pooling.caption.norm",
    "text.ln_final": "text_cls_norm",
    "text_decoder.ln_final": "norm",
}.items():
    _RENAMED |= {f"{_old}.{kind}": f"{_new}.{kind}" for kind in ("weight", "bias")}
_TRANSPOSED = {
    "visual.proj": "image_to_latents.weight",
    "text.text_projection": "text_to_latents.weight",
    "text_decoder.text_projection": "output_layer.weight",
}
_BUFFERS = ("text.attn_mask", "text_decoder.attn_mask")
_PREFIXES = {
    "visual.transformer.resblocks.": "img_encoder.encoder.layers.{}",
    "text.transformer.resblocks.": "unimodal_layers.{}",
    "text_decoder.resblocks.": "multimodal_layers.{}.block",
    "text_decoder.cross_attn.": "multimodal_layers.{}",
}


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under this package's names.

    Raises:
        ValueError: the weights are of another model, by their names.
    """
    missing = [name for name in ("text.cls_emb", "visual.attn_pool.query", "logit_scale") if name not in state]
    if missing:
        raise ValueError(f"weights must be of open_clip's CoCa, got {len(state)} tensors without {', '.join(missing)}")
    result: dict[str, Tensor] = {}
    for old, tensor in state.items():
        if old in _BUFFERS:
            continue
        if old in _TRANSPOSED:
            result[_TRANSPOSED[old]] = tensor.t().contiguous()
        elif old in _RENAMED:
            result[_RENAMED[old]] = tensor.reshape(()) if old in ("logit_scale", "logit_bias") else tensor
        elif old.startswith("visual.attn_pool.attn."):
            continue  # below, since keys and values may be apart
        else:
            result |= _block_entry(old, tensor)
    name = "visual.attn_pool.attn."
    dim = state["visual.attn_pool.query"].shape[1]
    if f"{name}in_proj_weight" in state:
        query, both = state[f"{name}in_proj_weight"].split([dim, 2 * dim])
    else:
        parts = [state.get(f"{name}{part}_proj_weight") for part in "qkv"]
        if any(part is None for part in parts):
            raise ValueError(f"weights must have {name}in_proj_weight, or one each for q, k and v")
        query, both = parts[0], torch.cat(parts[1:])  # type: ignore[arg-type]
    bias, both_bias = state[f"{name}in_proj_bias"].split([dim, 2 * dim])
    attention = "pooling.caption.attention"
    result |= {f"{attention}.proj_in.weight": query, f"{attention}.proj_in.bias": bias}
    result |= {f"{attention}.to_kv.weight": both, f"{attention}.to_kv.bias": both_bias}
    for kind in ("weight", "bias"):
        result[f"{attention}.proj_out.{kind}"] = state[f"{name}out_proj.{kind}"]
    return result


def exported_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``convert_state_dict``."""
    old_names = {new: old for old, new in _RENAMED.items()}
    transposed = {new: old for old, new in _TRANSPOSED.items()}
    result: dict[str, Tensor] = {}
    for new, tensor in state.items():
        if new in transposed:
            result[transposed[new]] = tensor.t().contiguous()
        elif new in old_names:
            result[old_names[new]] = tensor
        elif "proj_in." in new or ".to_kv." in new:
            continue
        else:
            result[_old_block_name(new)] = tensor
    # queries, keys and values of cross-attention are one tensor, but for a pooling of another width
    for new, query in state.items():
        if ".proj_in." not in new:
            continue
        both = state[new.replace("proj_in", "to_kv")]
        kind = new.rpartition(".")[2]
        if new.startswith("pooling."):
            prefix = "visual.attn_pool.attn."
        else:
            prefix = f"text_decoder.cross_attn.{new.split('.')[1]}.attn."
        if kind == "weight" and both.shape[1] != query.shape[1]:
            keys, values = both.chunk(2)
            parts = zip("qkv", (query, keys, values), strict=True)
            result |= {f"{prefix}{part}_proj_weight": tensor.contiguous() for part, tensor in parts}
        else:
            result[f"{prefix}in_proj_{kind}"] = torch.cat((query, both))
    return result


def _block_entry(old: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of a block under its new name or names.

    Raises:
        ValueError: no block of open_clip's CoCa has it.
    """
    cross = old.startswith("text_decoder.cross_attn.")
    for prefix, new in _PREFIXES.items():
        if old.startswith(prefix):
            number, _, rest = old.removeprefix(prefix).partition(".")
            base = new.format(number)
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.rpartition("_")[2]
                if not cross:
                    return {f"{base}.to_qkv.{kind}": tensor}
                query, both = tensor.split([len(tensor) // 3, len(tensor) - len(tensor) // 3])
                return {f"{base}.cross_attention.proj_in.{kind}": query, f"{base}.cross_attention.to_kv.{kind}": both}
            part, _, kind = rest.rpartition(".")
            names = {**(_CROSS if cross else _SELF), **_FEED_FORWARD}
            if part in names and kind in ("weight", "bias"):
                return {f"{base}.{names[part]}.{kind}": tensor}
    raise ValueError(f"weights must be of open_clip's CoCa, got the tensor {old}")


def _old_block_name(new: str) -> str:
    """The name of a block's tensor in open_clip."""
    base, _, kind = new.rpartition(".")
    if base == "pooling.caption.attention.proj_out":
        return f"visual.attn_pool.attn.out_proj.{kind}"
    parts = base.split(".")
    depth = parts.index(next(part for part in parts if part.isdigit()))
    number, rest = parts[depth], ".".join(parts[depth + 1 :])
    start = ".".join(parts[:depth])
    if start == "multimodal_layers" and rest.startswith("block."):
        prefix, names, rest = "text_decoder.resblocks", _SELF, rest.removeprefix("block.")
    elif start == "multimodal_layers":
        prefix, names = "text_decoder.cross_attn", _CROSS
    else:
        prefix = "text.transformer.resblocks" if start == "unimodal_layers" else "visual.transformer.resblocks"
        names = _SELF
    if rest == "to_qkv":
        return f"{prefix}.{number}.attn.in_proj_{kind}"
    old = next(old for old, renamed in {**names, **_FEED_FORWARD}.items() if renamed == rest)
    return f"{prefix}.{number}.{old}.{kind}"
