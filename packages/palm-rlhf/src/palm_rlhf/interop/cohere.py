"""Hugging Face's ``CohereForCausalLM`` as a twin of ``PaLM``: the same function, so the same weights serve both.

Cohere's block is PaLM's: one bias-free norm, attention and SwiGLU side by side, tied output. What differs is layout:
rotary pairs are neighbours there and halves here, and its three projections are one matrix here. So everything that
reads Cohere folders (transformers, vLLM, converters to GGUF) reads an exported PaLM. xPos, normalised queries and keys,
and bidirectional attention have no counterpart; a Cohere logit scale is folded into the final norm's gain.

Feed-forward dropout, which acts only in training, does not exist in Cohere's configuration and is dropped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lm_core.checkpoints.atomic_io import new_directory
from lm_core.checkpoints.manifest import CheckpointError, read_json
from lm_core.checkpoints.weights import load_weights, read_weights
from lm_core.checks import check_positive, typed
from palm_rlhf.interop.original import build_palm, check_keys, shapes_of
from palm_rlhf.model.lora import target_weights
from palm_rlhf.model.palm import PaLM

# Cohere's module of each LoRA target; "ff_in" is two modules, (up, gate), in the order of PaLM's fused rows.
COHERE_MODULES = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "ff_in": ("mlp.up_proj", "mlp.gate_proj"),
    "ff_out": ("mlp.down_proj",),
}
_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"


@typed
def to_cohere(
    palm: PaLM, *, finetune_scope: str | None = None, tokenizer: Any = None, max_position_embeddings: int = 8192
) -> Any:
    """A ``CohereForCausalLM`` with copies of the weights; its logits are those of ``palm``.

    Args:
        palm: causal model with ``use_xpos=False`` and without ``qk_rmsnorm``.
        finetune_scope: LoRA scope to add to the copied weights; ``palm`` stays as it is.
        tokenizer: tokenizer whose BOS, EOS and padding ids go into the configuration.
        max_position_embeddings: longest sequence for programs that read the configuration.

    Raises:
        ValueError: ``palm`` has no counterpart, naming the argument, or there is no such scope.
        ImportError: ``transformers`` is not installed.
    """
    _check_expressible(palm)
    check_positive(max_position_embeddings, "max_position_embeddings")
    state = _cohere_state(palm, finetune_scope)
    try:
        from transformers import CohereConfig, CohereForCausalLM
    except ImportError as error:
        raise ImportError("to_cohere needs transformers: pip install transformers") from error
    block = next(palm.blocks())
    config = CohereConfig(
        vocab_size=palm.num_tokens,
        hidden_size=palm.dim,
        intermediate_size=block.ff_dim,
        num_hidden_layers=palm.depth,
        num_attention_heads=palm.heads,
        num_key_value_heads=palm.kv_heads,
        head_dim=palm.dim_head,
        layer_norm_eps=block.norm.eps,
        rope_theta=palm.rotary.theta,
        max_position_embeddings=max_position_embeddings,
        attention_dropout=block.attention.dropout,
        logit_scale=1.0,
        use_qk_norm=False,
        tie_word_embeddings=True,
        **_special_ids(tokenizer, palm.num_tokens),
    )
    with torch.random.fork_rng(devices=[]):
        model = CohereForCausalLM(config)
    # assigning keeps PaLM's dtype and leaves the rotary buffers, which casting the model would round, in float32
    model.load_state_dict({**state, _OUTPUT: state[_EMBEDDING]}, assign=True)
    model.tie_weights()
    return model.to(palm.device).train(palm.training)


@typed
def export_cohere(palm: PaLM, directory: str | Path, tokenizer: Any = None, **arguments: Any) -> Path:
    """Writes the folder of ``to_cohere``, which ``AutoModelForCausalLM.from_pretrained`` opens.

    Args:
        palm: see ``to_cohere``.
        directory: a new or empty folder; written atomically.
        tokenizer: object with ``save_pretrained``, stored with the weights as transformers expects.
        **arguments: further arguments of ``to_cohere``, whose errors are raised here too.

    Raises:
        FileExistsError: the folder has content, or is a file.
        TypeError: the tokenizer cannot be saved.
    """
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(f"tokenizer must have save_pretrained(directory), got {type(tokenizer).__name__}")
    target = free_directory(directory)
    model = to_cohere(palm, tokenizer=tokenizer, **arguments)
    with new_directory(target) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return target


@typed
def from_cohere(source: Any, **constructor_overrides: Any) -> PaLM:
    """A ``PaLM`` equal to a Cohere model, in its dtypes.

    Args:
        source: a ``CohereForCausalLM``, or a folder with its ``config.json`` and safetensors files.
        **constructor_overrides: arguments that do not change the function, such as ``ff_dropout``.

    Raises:
        FileNotFoundError: ``source`` is no folder.
        CheckpointError: the folder is damaged or of another architecture.
        ValueError: the model has no counterpart, naming the setting, or an override contradicts it.
    """
    if isinstance(source, str | Path):
        config, state = _read_folder(Path(source))
    elif hasattr(source, "config") and hasattr(source, "state_dict"):
        config, state = source.config.to_dict(), {name: t.detach() for name, t in source.state_dict().items()}
    else:
        raise TypeError(f"source must be a CohereForCausalLM or a folder, got {type(source).__name__}")
    arguments = _palm_arguments(config)
    palm = build_palm(arguments, constructor_overrides)
    load_weights(palm, _palm_state(state, arguments, config["logit_scale"]), dtypes="stored", where="source")
    return palm


def free_directory(directory: str | Path) -> Path:
    """The path, if it is new or an empty folder.

    Raises:
        FileExistsError: it is a file, or a folder with content.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"directory must be a new or empty folder, got {target}")
    return target


def _check_expressible(palm: PaLM) -> None:
    refused = {
        "causal=False": not palm.causal,
        "use_xpos=True": palm.rotary.use_xpos,
        "qk_rmsnorm=True": next(palm.blocks()).q_scale is not None,
    }
    wrong = [name for name, is_so in refused.items() if is_so]
    if wrong:
        raise ValueError(f"CohereForCausalLM cannot express a PaLM with {', '.join(wrong)}")


@torch.no_grad()
def _cohere_state(palm: PaLM, scope: str | None) -> dict[str, Tensor]:
    adapters = None if scope is None else [block.by_target() for block in palm.scope_modules(scope).blocks()]
    state = {_EMBEDDING: palm.token_emb.weight.clone(), "model.norm.weight": palm.norm.gamma.clone()}
    for layer, block in enumerate(palm.blocks()):
        prefix = f"model.layers.{layer}."
        state[f"{prefix}input_layernorm.weight"] = block.norm.gamma.clone()
        for target, base in target_weights(block).items():
            weight = base
            if adapters is not None and target in adapters[layer]:
                weight = weight + adapters[layer][target].delta()
            for name, value in split_rows(target, weight, palm.dim_head).items():
                # not `contiguous`, which returns a contiguous tensor itself: memory would be shared
                state[f"{prefix}{name}.weight"] = value.clone(memory_format=torch.contiguous_format)
    return state


def split_rows(target: str, rows: Tensor, dim_head: int) -> dict[str, Tensor]:
    """Output rows of a LoRA target, by Cohere's module and in its order."""
    if target in ("q", "k"):  # rotary pairs are halves of a head here, neighbours there
        rows = rearrange(rows, "(h two i) c -> (h i two) c", two=2, i=dim_head // 2)
    names = COHERE_MODULES[target]
    return dict(zip(names, rows.chunk(len(names), dim=0), strict=True))


def joined_rows(target: str, modules: Mapping[str, Tensor], dim_head: int) -> Tensor:
    """Inverse of ``split_rows``: rows of a LoRA target from those of Cohere's modules."""
    rows = torch.cat([modules[name] for name in COHERE_MODULES[target]], dim=0)
    return rearrange(rows, "(h i two) c -> (h two i) c", two=2, i=dim_head // 2) if target in ("q", "k") else rows


def _special_ids(tokenizer: Any, num_tokens: int) -> dict[str, int | None]:
    """Ids of the tokenizer, or None, in place of Cohere's defaults, which belong to another vocabulary."""
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        value = getattr(tokenizer, f"{name}_id", None)
        value = getattr(tokenizer, f"{name}_token_id", None) if value is None else value
        if value is not None and not 0 <= value < num_tokens:
            raise ValueError(f"tokenizer has {name} id {value}, but the model has num_tokens = {num_tokens}")
        ids[f"{name}_token_id"] = value
    return ids


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"source must be the folder of a Cohere model, got {str(folder)!r}")
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no model*.safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_weights(file)
    return config, state


def _palm_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments; raises for settings without a counterpart in ``PaLM``, naming them."""
    if config.get("model_type") != "cohere":
        raise CheckpointError(f"source must be of model_type 'cohere', got {config.get('model_type')!r}")
    needed = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [name for name in (*needed, "logit_scale") if config.get(name) is None]
    if missing:
        raise CheckpointError(f"the configuration has no {', '.join(missing)}")
    rope = config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", (config.get("rope_scaling") or {}).get("rope_type", "default"))
    expected = {
        "use_qk_norm": (config.get("use_qk_norm") or False, False),
        "attention_bias": (config.get("attention_bias") or False, False),
        "tie_word_embeddings": (config.get("tie_word_embeddings", True), True),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "layer_norm_eps": (config.get("layer_norm_eps", 1e-5), 1e-5),
        "rope_theta": (rope.get("rope_theta", config.get("rope_theta")), 10000.0),
        "rope_type": (rope_type, "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    wrong = [f"{name} = {value!r} (PaLM: {fixed!r})" for name, (value, fixed) in expected.items() if value != fixed]
    if wrong:
        raise ValueError(f"PaLM cannot express this Cohere model: {', '.join(wrong)}")
    dim, heads, ff_dim = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    if ff_dim % dim:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size = {dim}, got {ff_dim}")
    return {
        "dim": dim,
        "num_tokens": config["vocab_size"],
        "depth": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "dim_head": config.get("head_dim") or dim // heads,
        "ff_mult": ff_dim // dim,
        "attn_dropout": float(config.get("attention_dropout") or 0.0),
        "use_xpos": False,
        "causal": True,
        "qk_rmsnorm": False,
    }


def _palm_state(state: dict[str, Tensor], arguments: dict[str, Any], logit_scale: float) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = shapes_of(_cohere_state(PaLM(**arguments), None))
    check_keys({name: t for name, t in state.items() if name != _OUTPUT}, expected, "source")
    if _OUTPUT in state and not torch.equal(state[_OUTPUT], state[_EMBEDDING]):
        raise CheckpointError(f"{_OUTPUT} differs from {_EMBEDDING}, but PaLM's output layer is tied to it")
    # logits are linear in the final gain, so their scale can be folded into it
    result = {"token_emb.weight": state[_EMBEDDING], "norm.gamma": state["model.norm.weight"] * logit_scale}
    dim_head = arguments["dim_head"]
    for layer in range(arguments["depth"]):
        prefix = f"model.layers.{layer}."
        modules = {name: state[f"{prefix}{name}.weight"] for group in COHERE_MODULES.values() for name in group}
        parts = {target: joined_rows(target, modules, dim_head) for target in COHERE_MODULES}
        result[f"layers.{layer}.norm.gamma"] = state[f"{prefix}input_layernorm.weight"]
        result[f"layers.{layer}.proj_in.weight"] = torch.cat([parts[name] for name in ("q", "k", "v", "ff_in")])
        result[f"layers.{layer}.proj_out.weight"] = torch.cat([parts["o"], parts["ff_out"]], dim=1)
    return result
