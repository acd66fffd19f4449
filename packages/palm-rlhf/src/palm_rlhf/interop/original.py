"""State dicts of PaLM-rlhf-pytorch, read into ``PaLM`` so that logits agree to float32 rounding.

Two conventions share one key: releases up to 0.2.3 store a norm's gain, later ones the gain minus one. Only the values
distinguish them, which start at one and at zero and move little in training.

With ``qk_rmsnorm`` the original never used its ``qk_scale`` (releases from 0.1.0 on): the scores' scale was
``dim_head ** -0.5``, which conversion folds into ``q_scale``. Releases up to 0.2.0 skipped the final norm before the
output layer. ``PaLM`` cannot express that: their language models, whose final gain is still exactly one, are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import load_weights
from lm_core.checks import typed
from palm_rlhf.model.palm import PaLM

NormGain = Literal["auto", "plain", "offset"]

# LoRA targets in the order of the original's list.
_LORA_ORDER = ("q", "k", "v", "o")
_ANCHOR = "token_emb.weight"
# Prefixes of reward models and critics, whose features always passed the final norm.
_FEATURES_ONLY = ("palm.", "critic_palm.", "critic.")
_SHOWN = 8
# Less than half the distance of the two starting values: a mean gain near the middle is refused as ambiguous.
_GAIN_TOLERANCE = 0.35


@dataclass(frozen=True)
class OriginalPaLM:
    """One PaLM found in an original's state dict.

    Attributes:
        arguments: constructor arguments, inferred from the shapes.
        scopes: rank of each LoRA scope.
        state: weights under the keys of ``PaLM``.
        rest: tensors outside the PaLM under the original's keys: reward and value heads, prompt embeddings.
    """

    arguments: dict[str, Any]
    scopes: dict[str, int]
    state: dict[str, Tensor]
    rest: dict[str, Tensor]

    def base(self) -> dict[str, Tensor]:
        """The weights without those of the scopes."""
        return {name: value for name, value in self.state.items() if not name.startswith("finetune_modules.")}

    def build(self, overrides: dict[str, Any], other: "OriginalPaLM | None" = None) -> PaLM:
        """The network with its scopes, and with the scopes of ``other``, whose base is equal."""
        palm = build_palm(self.arguments, overrides)
        with torch.random.fork_rng(devices=[]):
            for scope, rank in {**self.scopes, **(other.scopes if other else {})}.items():
                palm.add_finetune_params(scope, lora_r=rank)
        load_weights(palm, {**(other.state if other else {}), **self.state}, dtypes="stored", where="state_dict")
        return palm


@typed
def from_palm_rlhf_pytorch(
    state_dict: Mapping[str, Any],
    norm_gain: NormGain = "auto",
    *,
    prefix: str | None = None,
    **constructor_overrides: Any,
) -> PaLM:
    """A ``PaLM`` with the weights and LoRA scopes of an original's state dict.

    Args:
        state_dict: state dict of the original's ``PaLM``, ``RewardModel`` or ``ActorCritic``.
        norm_gain: "plain" for releases up to 0.2.3, "offset" for later ones, "auto" to decide by the mean gain.
        prefix: key prefix of the PaLM to convert, where there are several, such as ``"actor_palm"``.
        **constructor_overrides: arguments that a state dict does not contain: ``causal=False`` for an encoder,
            ``rotary_xpos_scale_base``, dropouts, ``cross_entropy_ignore_index`` (0 in the original, -100 here).

    Raises:
        CheckpointError: the state dict is not of the original, or ``PaLM`` cannot express its model.
        ValueError: ``norm_gain`` or ``prefix`` must be given, or an override contradicts the shapes.
    """
    qk_scale = constructor_overrides.get("qk_scale", 8.0)
    original = palm_state_from_original(state_dict, prefix=prefix, norm_gain=norm_gain, qk_scale=qk_scale)
    more_scopes = constructor_overrides.pop("finetune_scopes", ())
    palm = original.build(constructor_overrides)
    for scope in more_scopes:
        palm.add_finetune_params(scope)
    return palm


@typed
def palm_state_from_original(
    state_dict: Mapping[str, Any], *, prefix: str | None = None, norm_gain: NormGain = "auto", qk_scale: float = 8.0
) -> OriginalPaLM:
    """The weights of one PaLM in an original's state dict, LoRA scopes included, under the keys of ``PaLM``.

    Arguments and errors are those of ``from_palm_rlhf_pytorch``; ``qk_scale`` is the scale of the ``PaLM`` that loads
    the weights.
    """
    # select one PaLM, infer its sizes and check that PaLM can express it
    tensors = cleaned(state_dict)
    prefix = _chosen_prefix(tensors, prefix)
    part = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    arguments = _sizes(part)
    scopes = _scope_ranks(part)
    check_keys(part, _expected_shapes(part, arguments, scopes), "state_dict")
    _check_equivalent(part)
    offset = 1.0 if _is_offset(part, norm_gain) else 0.0
    if not offset and prefix not in _FEATURES_ONLY:
        _check_final_norm_was_used(part)

    # rename block by block: the two output matrices become one, LoRA factors are transposed
    state = {_ANCHOR: part[_ANCHOR], "norm.gamma": part["norm.gamma"] + offset}
    for layer in range(arguments["depth"]):
        old, new = f"layers.{layer}.fn.", f"layers.{layer}."
        state[f"{new}norm.gamma"] = part[f"{old}norm.gamma"] + offset
        state[f"{new}proj_in.weight"] = part[f"{old}fused_attn_ff_proj.weight"]
        outputs = (part[f"{old}attn_out.weight"], part[f"{old}ff_out.2.weight"])
        state[f"{new}proj_out.weight"] = torch.cat(outputs, dim=1)
        if arguments["qk_rmsnorm"]:
            state[f"{new}q_scale"] = part[f"{old}q_scale"] * (arguments["dim_head"] ** -0.5 / qk_scale)
            state[f"{new}k_scale"] = part[f"{old}k_scale"]
        for scope in scopes:
            for index, target in enumerate(_LORA_ORDER):
                for factor in ("A", "B"):
                    value = part[f"finetune_modules.{scope}.{layer}.{index}.{factor}"]
                    state[f"finetune_modules.{scope}.{layer}.{target}.{factor}"] = value.t().contiguous()
    return OriginalPaLM(arguments, scopes, state, rest)


def is_original(state_dict: Mapping[str, Any]) -> bool:
    """True for a state dict in the original's layout."""
    return any(str(name).endswith("fn.fused_attn_ff_proj.weight") for name in state_dict)


def cleaned(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without what ``DistributedDataParallel`` and ``torch.compile`` add to names.

    Raises:
        CheckpointError: it holds anything but named tensors.
    """
    wrong = [f"{name} ({type(value).__name__})" for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if wrong or not state_dict:
        content = ", ".join(wrong[:_SHOWN]) if wrong else "nothing"
        raise CheckpointError(f"a state dict holds tensors by name, got {content}")
    return {_clean_name(str(name)): value.detach() for name, value in state_dict.items()}


def build_palm(arguments: dict[str, Any], overrides: dict[str, Any]) -> PaLM:
    """A new ``PaLM`` whose weights are loaded next; keeps the random state.

    Raises:
        ValueError: an override contradicts an argument.
    """
    for name, value in overrides.items():
        if name in arguments and arguments[name] != value:
            raise ValueError(f"{name} is {arguments[name]} in the stored weights, got {value}")
    with torch.random.fork_rng(devices=[]):
        return PaLM(**{**arguments, **overrides})


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ``CheckpointError`` unless ``state`` has exactly the expected names and shapes."""
    problems = {
        "missing keys": [name for name in expected if name not in state],
        "unexpected keys": [name for name in state if name not in expected],
        "shapes that differ": [
            f"{name} (stored {tuple(state[name].shape)}, expected {shape})"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    listed = [f"{title}: {', '.join(names[:_SHOWN])}" for title, names in problems.items() if names]
    if listed:
        raise CheckpointError(f"{where} is of another architecture; {'; '.join(listed)}")


def _clean_name(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _chosen_prefix(tensors: dict[str, Tensor], prefix: str | None) -> str:
    if not is_original(tensors):
        raise CheckpointError(f"no PaLM of the original package found; the keys begin {', '.join(list(tensors)[:4])}")
    prefixes = [name[: -len(_ANCHOR)] for name in tensors if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    shown = [entry.rstrip(".") for entry in prefixes]
    if prefix is None:
        if len(prefixes) != 1:
            raise ValueError(f"prefix must name one of the {len(prefixes)} PaLMs in the state dict: {shown}")
        return prefixes[0]
    if prefix.rstrip(".") not in shown:
        raise ValueError(f"prefix must be one of {shown}, got {prefix!r}")
    return prefixes[shown.index(prefix.rstrip("."))]


def _sizes(part: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments; the head size follows from the fused projection's rows."""
    first = "layers.0.fn."
    needed = (_ANCHOR, f"{first}fused_attn_ff_proj.weight", f"{first}attn_out.weight", f"{first}ff_out.2.weight")
    missing = [name for name in needed if name not in part or part[name].ndim != 2]
    if missing:
        raise CheckpointError(f"state_dict is of another architecture; missing matrices: {', '.join(missing)}")
    num_tokens, dim = part[_ANCHOR].shape
    rows, attn_dim, ff_dim = part[needed[1]].shape[0], part[needed[2]].shape[1], part[needed[3]].shape[1]
    dim_head, odd = divmod(rows - attn_dim - 2 * ff_dim, 2)
    if odd or dim_head < 1 or attn_dim % dim_head or ff_dim % dim:
        raise CheckpointError(
            f"state_dict is of another architecture: {rows} fused rows do not make heads out of {attn_dim} "
            f"and feed-forward halves out of {ff_dim} features at dim {dim}"
        )
    layers = {int(match[1]) for match in (re.match(r"layers\.(\d+)\.fn\.", name) for name in part) if match}
    return {
        "dim": dim,
        "num_tokens": num_tokens,
        "depth": max(layers) + 1,
        "dim_head": dim_head,
        "heads": attn_dim // dim_head,
        "kv_heads": 1,
        "ff_mult": ff_dim // dim,
        "qk_rmsnorm": f"{first}q_scale" in part,
    }


def _scope_ranks(part: dict[str, Tensor]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for name, value in part.items():
        match = re.fullmatch(r"finetune_modules\.([^.]+)\.0\.0\.A", name)
        if match:
            ranks[match[1]] = value.shape[-1]
    return ranks


def _expected_shapes(
    part: dict[str, Tensor], arguments: dict[str, Any], scopes: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    dim, dim_head, attn_dim = arguments["dim"], arguments["dim_head"], arguments["heads"] * arguments["dim_head"]
    ff_dim = dim * arguments["ff_mult"]
    shapes: dict[str, tuple[int, ...]] = {_ANCHOR: (arguments["num_tokens"], dim), "norm.gamma": (dim,)}
    optional: dict[str, tuple[int, ...]] = {"to_logits.weight": shapes[_ANCHOR], "norm.beta": (dim,)}
    for layer in range(arguments["depth"]):
        block = f"layers.{layer}.fn."
        shapes[f"{block}norm.gamma"] = (dim,)
        shapes[f"{block}fused_attn_ff_proj.weight"] = (attn_dim + 2 * dim_head + 2 * ff_dim, dim)
        shapes[f"{block}attn_out.weight"] = (dim, attn_dim)
        shapes[f"{block}ff_out.2.weight"] = (dim, ff_dim)
        if arguments["qk_rmsnorm"]:
            shapes |= {f"{block}{name}": (dim_head,) for name in ("q_scale", "k_scale")}
        optional[f"{block}norm.beta"] = (dim,)
        optional |= {f"{block}rotary_emb.{name}": (dim_head // 2,) for name in ("inv_freq", "scale")}
        for scope, rank in scopes.items():
            sizes = ((dim, attn_dim), (dim, dim_head), (dim, dim_head), (attn_dim, dim))
            for index, (size_in, size_out) in enumerate(sizes):
                lora = f"finetune_modules.{scope}.{layer}.{index}."
                shapes |= {f"{lora}A": (size_in, rank), f"{lora}B": (rank, size_out)}
    return shapes | {name: shape for name, shape in optional.items() if name in part}


def _check_equivalent(part: dict[str, Tensor]) -> None:
    """Raises ``CheckpointError`` for values that ``PaLM`` cannot hold."""
    if "to_logits.weight" in part and not torch.equal(part["to_logits.weight"], part[_ANCHOR]):
        raise CheckpointError("to_logits.weight differs from token_emb.weight, but PaLM's output layer is tied to it")
    biased = [name for name, value in part.items() if name.endswith("norm.beta") and value.any()]
    if biased:
        raise CheckpointError(f"PaLM's norms have no bias, got values in {', '.join(biased[:_SHOWN])}")


def _is_offset(part: dict[str, Tensor], norm_gain: NormGain) -> bool:
    if norm_gain != "auto":
        return norm_gain == "offset"
    gains = torch.cat([value.double() for name, value in part.items() if name.endswith("norm.gamma")])
    mean = gains.mean().item()
    if abs(mean) <= _GAIN_TOLERANCE:
        return True
    if abs(mean - 1.0) <= _GAIN_TOLERANCE:
        return False
    raise ValueError(
        f"norm_gain must be given: the mean stored gain is {mean:.2f}, neither near 1 (plain, releases up to 0.2.3) "
        "nor near 0 (offset, later releases)"
    )


def _check_final_norm_was_used(part: dict[str, Tensor]) -> None:
    blocks = [value for name, value in part.items() if name.endswith("fn.norm.gamma")]
    if bool((part["norm.gamma"] == 1).all()) and any(bool((value != 1).any()) for value in blocks):
        raise CheckpointError(
            "the final norm's gain is exactly 1 while the blocks' gains were trained: releases up to 0.2.0 left that "
            "norm out of the logits, which PaLM cannot express"
        )
