"""Models of open_clip's CoCa family (https://github.com/mlfoundations/open_clip), read and written.

A folder has ``open_clip_config.json`` (or one other JSON file with a model configuration), weights as ``.safetensors``
or ``.bin``, also of a training run (``state_dict`` with the prefix ``module.``), and maybe CLIP's BPE
(``coca.interop.clip_tokenizer``).

Image and text features, logits and captions equal open_clip's to 1e-5 (tests/golden/make_open_clip.py). One
difference: within a text open_clip masks every token that has the padding id (0, "!" inside a word); here only trailing
ones are padding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca.interop.clip_tokenizer import special_ids
from coca.interop.open_clip_weights import convert_state_dict, exported_state_dict
from coca.model.clip_vit import CLIPVisionTransformer
from coca.model.coca import CoCa
from coca.model.preprocessing import ImagePreprocessing
from lm_core.checkpoints.atomic_io import new_directory
from lm_core.checkpoints.manifest import CheckpointError, read_json, write_json
from lm_core.checkpoints.pretrained import download
from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checkpoints.weights import load_weights, read_weights, save_weights
from lm_core.checks import typed
from lm_core.tokenizers import HUB_ID

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHTS = (WEIGHTS_FILE, "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
# Mean and deviation of CLIP's training images, open_clip's default.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Settings of a configuration that this package has, with open_clip's defaults.
_MODEL = {"embed_dim": None, "quick_gelu": False, "init_logit_scale": None, "init_logit_bias": None, "pad_id": 0}
_VISION = {
    "image_size": 224,
    "layers": 12,
    "width": 768,
    "patch_size": 16,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
}
_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "embed_cls": False,
    "correct_cls_mask": False,
    "pad_id": 0,
}
# Settings without influence on a CoCa's results.
_NO_INFLUENCE = {"custom_text", "output_tokens", "patch_dropout", "final_ln_after_pool", "eos_id", "tokenizer_kwargs"}
_NO_INFLUENCE |= {"attn_pooler_heads", "n_queries", "dim_head", "hf_tokenizer_name", "attn_pooler_queries"}
# Values that leave a setting out.
_NEUTRAL = (None, False, "", "argmax", "tok", "linear", "learnable")


@typed
def from_open_clip(
    source: str | Path,
    *,
    config: str | Path | None = None,
    preprocessing: ImagePreprocessing | None = None,
    revision: str | None = None,
) -> CoCa:
    """A ``CoCa`` with the weights of open_clip's, in their dtypes; ``coca.interop.clip_tokenizer`` reads its tokenizer.

    Args:
        source: folder, weight file, or organisation/name on the hub.
        config: JSON file of the model's configuration, if it is not in the folder of the weights.
        preprocessing: preprocessing of the images, if it differs from the configuration's.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder lacks configuration or weights.
        ValueError: the configuration is of another family, or has a setting that this package lacks, by name.
        CheckpointError: a file is damaged, holds more than tensors (nothing of it is run), or does not fit.
        ImportError: ``source`` is a hub name and the extra ``hub`` is not installed.
    """
    folder = open_clip_folder(source, revision)
    weights = folder if folder.is_file() else _weights_of(folder)
    place = _config_of(weights.parent) if config is None else Path(config).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"config must be a JSON file, there is no {place}")
    content = read_json(place)
    arguments, vision = _arguments(content, place)
    stored = read_weights(weights) if weights.suffix == ".safetensors" else load_tensors(weights)
    state = convert_state_dict(_state_of(stored, weights))
    if preprocessing is None:
        preprocessing = _preprocessing(content.get("preprocess_cfg"), vision["image_size"], place)
    bos, eos = special_ids(weights.parent, arguments["num_tokens"])
    arguments["loss"] = "sigmoid" if "logit_bias" in state else "softmax"
    model = CoCa(**arguments, img_encoder=CLIPVisionTransformer(**vision), bos_id=bos, eos_id=eos)
    load_weights(model, state, dtypes="stored", where=str(weights))
    model.preprocessing = preprocessing
    return model


@typed
def to_open_clip(model: CoCa, directory: str | Path, *, tokenizer: Any = None) -> Path:
    """Writes a sequential ``CoCa`` as a folder that open_clip reads (``hf-hub`` or ``local-dir:``).

    Args:
        model: model of ``from_open_clip``, trained further or not.
        directory: folder to write, new or empty.
        tokenizer: tokenizer to store with it.

    Raises:
        ValueError: the model has layers or an image encoder that open_clip lacks.
        FileExistsError: the folder is not empty.
    """
    arguments = model.config["arguments"]
    encoder = None if model.img_encoder is None else model.img_encoder.encoder
    if arguments["block"] != "sequential" or not isinstance(encoder, CLIPVisionTransformer):
        raise ValueError(
            "open_clip has CoCa with block='sequential' and a CLIPVisionTransformer, got "
            f"block={arguments['block']!r} and {type(encoder).__name__}"
        )
    if arguments["pooling"] != "shared" or model.text_to_latents.out_features != model.dim:
        raise ValueError("open_clip needs pooling='shared' and dim_latents = dim")
    config = {"model_cfg": _configuration(model, encoder)}
    if model.preprocessing is not None:
        settings = model.preprocessing
        config["preprocess_cfg"] = {
            "size": settings.image_size,
            "mode": "RGB",
            "mean": list(settings.mean),
            "std": list(settings.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
    target = Path(directory).expanduser()
    with new_directory(target, last=CONFIG_FILE) as folder:
        write_json(folder / CONFIG_FILE, config)
        save_weights(folder / WEIGHTS_FILE, exported_state_dict(model.state_dict()))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return target


def _state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content, without the prefix of DistributedDataParallel."""
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors, got {type(content).__name__}")
    if content and all(str(name).startswith("module.") for name in content):
        content = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _arguments(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``CoCa`` and of ``CLIPVisionTransformer`` from an open_clip configuration.

    Raises:
        ValueError: it is of another family of models, or a setting has no counterpart.
    """
    model = content.get("model_cfg", content) if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not {"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg"} <= set(model):
        keys = sorted(map(str, model)) if isinstance(model, Mapping) else type(model).__name__
        raise ValueError(
            f"{path} must configure a CoCa of open_clip, with embed_dim, vision_cfg, text_cfg and multimodal_cfg, "
            f"got {keys}"
        )
    parts = {name: model[name] for name in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{path}: {name} must be an object, got {type(part).__name__}")
    own = {name: value for name, value in model.items() if name not in parts}
    top = _settings(own, _MODEL, path, "model_cfg")
    vision = _settings(parts["vision_cfg"], _VISION, path, "vision_cfg")
    text = _settings(parts["text_cfg"], _TEXT, path, "text_cfg")
    decoder = _settings(parts["multimodal_cfg"], _TEXT, path, "multimodal_cfg")
    # what both halves of the decoder share here
    if vision["attentional_pool"] is not True or text["embed_cls"] is not True:
        raise ValueError(
            f"{path}: vision_cfg.attentional_pool and text_cfg.embed_cls must be true, as in coca_ViT-B-32, "
            f"got {vision['attentional_pool']!r} and {text['embed_cls']!r}"
        )
    for name in ("width", "heads", "vocab_size", "mlp_ratio"):
        if text[name] != decoder[name]:
            raise ValueError(
                f"{path}: text_cfg and multimodal_cfg must have one {name}, got {text[name]}, {decoder[name]}"
            )
    if top["embed_dim"] != text["width"] or text["width"] % text["heads"] or vision["width"] % vision["head_width"]:
        raise ValueError(
            f"{path}: text_cfg.width must be embed_dim = {top['embed_dim']} and a multiple of heads, and the vision "
            f"width of head_width, got {text['width']}, {text['heads']}, {vision['width']}, {vision['head_width']}"
        )
    for name, part in (("vision_cfg", vision), ("text_cfg", text)):
        if int(part["mlp_ratio"]) != part["mlp_ratio"]:
            raise ValueError(f"{path}: {name}.mlp_ratio must be a whole number, got {part['mlp_ratio']}")
    activation = "quick_gelu" if top["quick_gelu"] else "gelu"
    scale = (
        {}
        if top["init_logit_scale"] is None
        else {"init_logit_scale": float(torch.tensor(top["init_logit_scale"]).exp())}
    )
    arguments = {
        "dim": text["width"],
        "num_tokens": text["vocab_size"],
        "unimodal_depth": text["layers"],
        "multimodal_depth": decoder["layers"],
        "num_img_queries": vision["attn_pooler_queries"] - 1,
        "dim_head": text["width"] // text["heads"],
        "heads": text["heads"],
        "ff_mult": int(text["mlp_ratio"]),
        "pad_id": top["pad_id"] or text["pad_id"],
        "block": "sequential",
        "max_text_length": text["context_length"],
        "pool_heads": vision["attn_pooler_heads"],
        "activation": activation,
        "legacy_cls_mask": not text["correct_cls_mask"],
        # open_clip's fine-tuning weights the captions twice (its README, "Fine tuning CoCa")
        "caption_loss_weight": 2.0,
        **scale,
    }
    return arguments, {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "dim": vision["width"],
        "depth": vision["layers"],
        "heads": vision["width"] // vision["head_width"],
        "dim_head": vision["head_width"],
        "ff_mult": int(vision["mlp_ratio"]),
        "activation": activation,
        "norm_tokens": not vision["no_ln_pre"],
    }


def _settings(part: Mapping[str, Any], known: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Values of the ``known`` settings, with their defaults.

    Raises:
        ValueError: a value has another type, or an unknown setting is in use.
    """
    used = {name: value for name, value in part.items() if name not in known and name not in _NO_INFLUENCE}
    used = {name: value for name, value in used.items() if value not in _NEUTRAL}
    if used:
        named = ", ".join(f"{name} = {value!r}" for name, value in sorted(used.items()))
        raise ValueError(f"{path}: {where} has settings of models that are not read: {named}")
    values = {name: part.get(name, default) for name, default in known.items()}
    for name, value in values.items():
        default = known[name]
        wanted = float if name in ("mlp_ratio", "init_logit_scale", "init_logit_bias") else int
        is_number = isinstance(value, int | wanted) and not isinstance(value, bool)
        flexible = isinstance(default, bool) or value is None
        if flexible and (name != "embed_dim" or value is not None):
            continue
        if not is_number or (wanted is int and name != "pad_id" and not 1 <= value <= 2**20):
            raise ValueError(f"{path}: {where}.{name} must be a number above 0, got {value!r}")
    return values


def _preprocessing(content: Any, image_size: int, path: Path) -> ImagePreprocessing:
    """Preprocessing of the images, CLIP's where the configuration leaves it out.

    Raises:
        ValueError: the configuration asks for another way of resizing.
    """
    settings = dict(content) if isinstance(content, Mapping) else {}
    for name, expected in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("mode", "RGB")):
        if settings.get(name) not in (None, expected):
            raise ValueError(
                f"{path}: preprocess_cfg.{name} must be {expected!r}, got {settings[name]!r}; pass preprocessing= to "
                "replace it"
            )
    try:
        mean, std = (
            tuple(map(float, settings.get(name) or default)) for name, default in (("mean", _MEAN), ("std", _STD))
        )
        return ImagePreprocessing(image_size=image_size, channels=3, mean=mean, std=std)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: preprocess_cfg is no image preprocessing: {error}") from error


def _configuration(model: CoCa, encoder: CLIPVisionTransformer) -> dict[str, Any]:
    """The open_clip configuration of a model."""
    arguments, vision = model.config["arguments"], encoder.config["arguments"]
    ratio = float(arguments["ff_mult"])
    text = {
        "context_length": arguments["max_text_length"],
        "vocab_size": arguments["num_tokens"],
        "width": arguments["dim"],
        "heads": arguments["heads"],
        "mlp_ratio": ratio,
    }
    cls = {"embed_cls": True, "output_tokens": True, "pad_id": arguments["pad_id"]}
    if not arguments["legacy_cls_mask"]:
        cls["correct_cls_mask"] = True
    return {
        "embed_dim": arguments["dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["depth"],
            "width": vision["dim"],
            "head_width": vision["dim_head"],
            "patch_size": vision["patch_size"],
            "mlp_ratio": float(vision["ff_mult"]),
            "no_ln_pre": not vision["norm_tokens"],
            "attentional_pool": True,
            "attn_pooler_queries": arguments["num_img_queries"] + 1,
            "attn_pooler_heads": arguments["pool_heads"] or arguments["heads"],
            "output_tokens": True,
        },
        "text_cfg": {**text, "layers": arguments["unimodal_depth"], **cls},
        "multimodal_cfg": {**text, "layers": arguments["multimodal_depth"]},
        "quick_gelu": arguments["activation"] == "quick_gelu",
        "custom_text": True,
        **({} if model.logit_bias is None else {"init_logit_bias": float(arguments["init_logit_bias"])}),
    }


def open_clip_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder or file of a source; a hub name is downloaded.

    Raises:
        FileNotFoundError, ImportError: as ``from_open_clip``.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return download(source, revision, also=("open_clip_pytorch_model.bin",))
    raise FileNotFoundError(f"source must be a folder, a weight file or organisation/name on the hub, got {source!r}")


def _config_of(folder: Path) -> Path:
    candidates = [folder / CONFIG_FILE, *sorted(folder.glob("coca*.json")), *sorted(folder.glob("*_cfg.json"))]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} must have {CONFIG_FILE}; pass config= with the configuration of the model")
    return found


def _weights_of(folder: Path) -> Path:
    named = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    others = sorted(path for suffix in ("safetensors", "bin", "pt") for path in folder.glob(f"*.{suffix}"))
    if not named and len(others) != 1:
        raise FileNotFoundError(
            f"{folder} must have {WEIGHTS_FILE} or one file of weights, got {[path.name for path in others] or 'none'}"
        )
    return (named or others)[0]
