"""Command-line flags of a composition, and how it is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from calm_pytorch.model.adapter_files import ADAPTER_FILE, read_adapter
from calm_pytorch.model.augment import AugmentParams
from calm_pytorch.model.calm import CALM
from lm_core.adapters.loading import dtype_argument, load_causal_lm, whole_model
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.checks import typed
from lm_core.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from lm_core.training.accelerator import pick_device

_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Composition:
    """A loaded composition.

    Attributes:
        calm: the composition.
        tokenizer: tokenizer of the anchor.
        readers: for each augment that reads a prompt its tokenizer, or None if it takes the anchor's ids; empty in
            mode shared.
        models: names of anchor and augments, as ``CALM.save_adapter`` stores them.
    """

    calm: CALM
    tokenizer: Tokenizer
    readers: list[Tokenizer | None]
    models: dict[str, Any] = field(default_factory=dict)


@typed
@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a composition.

    Args:
        anchor: folder or hub name of a causal language model with its tokenizer; or folder of a trained adapter or of
            its run, which knows its models.
        augments: folders or hub names of the models it reads; null takes those of the adapter.
        mode: "shared": augments read the anchor's own text (same tokenizer); "prompt": the piece of text before it, or
            the prompt; null takes that of the adapter, or else shared.
        connect_every: layers between connections; null takes the connections of the adapter, or else 4.
        num_connections: number of connections of each augment, instead of the layers between them.
        norm_context: normalises the states that are read, as pretrained models need it; null takes the choice of the
            adapter, or else true.
        device: auto takes CUDA, then MPS, then the CPU.
        augment_device: device of the augments; null is that of the anchor.
    """

    anchor: str | None = None
    augments: list[str] | None = None
    mode: Literal["prompt", "shared"] | None = None
    connect_every: int | None = None
    num_connections: int | None = None
    norm_context: bool | None = None
    device: str = "auto"
    augment_device: str | None = None

    def load(self, adapter: str | None = None, tokenizer: str | None = None, *, move: bool = True) -> Composition:
        """The composition, with the learned part of ``adapter`` if there is one.

        Args:
            adapter: folder of the learned part, or of its run.
            tokenizer: tokenizer to use instead of the anchor's.
            move: moves the models to their devices.

        Raises:
            FileNotFoundError: a folder is missing.
            CheckpointError: the adapter is damaged or does not fit the models.
            ValueError: there is no augment, the models do not fit, or in mode shared their tokenizers differ.
        """
        if self.connect_every is not None and self.num_connections is not None:
            raise ValueError(
                f"give connect_every or num_connections, not both: {self.connect_every} and {self.num_connections}"
            )
        trained = _adapter_folder(adapter) if adapter is not None else None
        if adapter is not None and trained is None:
            raise FileNotFoundError(f"adapter must be a folder with {ADAPTER_FILE}, got {adapter}")
        names: dict[str, Any] = {"anchor": self.anchor, "augments": self.augments}
        if trained is None and self.anchor is not None and (trained := _adapter_folder(self.anchor)) is not None:
            names["anchor"] = None
        stored: dict[str, Any] = {} if trained is None else read_adapter(trained)
        names = {name: value or stored.get("models", {}).get(name) for name, value in names.items()}
        for name, value in names.items():
            if not value:
                where = "" if trained is None else f", and {trained} does not name any"
                raise ValueError(f"{name} must be given, got none{where}")
        # the wiring: chosen, or as it was trained
        source = _source(names["anchor"], "anchor")
        places = [_source(name, "augments") for name in names["augments"]]
        fits = len(stored.get("connections", ())) == len(places)  # or loading the adapter names the difference
        shared = [self.mode != "prompt"] * len(places)
        if self.mode is None and fits:
            shared = stored["shared_sequence"]
        plans = self.connect_every is not None or self.num_connections is not None
        connections = stored["connections"] if fits and not plans else [None] * len(places)
        params = [
            AugmentParams(
                load_causal_lm(place, name="augments") if reads_along else _load_reader(place),
                shared_sequence=reads_along,
                connections=pairs,
                connect_every_num_layers=4 if self.connect_every is None else self.connect_every,
                num_connections=self.num_connections,
            )
            for place, reads_along, pairs in zip(places, shared, connections, strict=True)
        ]
        # the models
        encoder = load_tokenizer(tokenizer or source)
        readers: list[Tokenizer | None] = []
        for place, reads_along in zip(places, shared, strict=True):
            own = _tokenizer_of(place)
            differs = own is not None and not _same_ids(encoder, own)
            if reads_along and differs:
                raise ValueError(
                    f"augment {place} must have the anchor's tokenizer in mode shared, got another one; use mode prompt"
                )
            readers += [] if reads_along else [own if differs else None]
        options = dict(stored.get("attn_kwargs", {"norm_context": True}))
        if self.norm_context is not None:
            options["norm_context"] = self.norm_context
        calm = CALM(load_causal_lm(source, name="anchor"), params, attn_kwargs=options)
        if move:
            calm.to(pick_device(self.device))
            if self.augment_device is not None:
                calm.augment_llms.to(pick_device(self.augment_device))
        if trained is not None:
            calm.load_adapter(trained)
        models = {"anchor": _kept(names["anchor"]), "augments": [_kept(name) for name in names["augments"]]}
        return Composition(calm, encoder, readers, models)


def _source(name: str, argument: str) -> Path:
    """The folder of a model, downloaded if ``name`` is one on the hub."""
    try:
        return checkpoint_folder(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("model must", f"{argument} must", 1)) from error


def _kept(name: str) -> str:
    """A name that is valid in any working directory."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _adapter_folder(path: str) -> Path | None:
    folder = Path(path).expanduser()
    return next((place for place in (folder, folder / "adapter") if (place / ADAPTER_FILE).is_file()), None)


def _load_reader(folder: Path) -> nn.Module:
    """A model that reads prompts: a causal language model, or any other transformers model without its head."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    architectures = config.get("architectures") or []
    if "model_type" not in config or any(str(name).endswith(_CAUSAL) for name in architectures):
        return load_causal_lm(folder, name="augments")
    if "vocab_size" not in config:
        raise ValueError(f"augments must be models of text, got {str(folder)!r} of type {config['model_type']!r}")
    from transformers import AutoModel

    options = {"local_files_only": True, **dtype_argument(None)}
    return whole_model(AutoModel, str(folder), name="augments", optional="pooler", **options)


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except ValueError:
        return None


def _same_ids(anchor: Any, augment: Any) -> bool:
    """True if every token of the anchor has the same id in the augment."""
    if anchor.fingerprint == augment.fingerprint:
        return True
    if not all(isinstance(tokenizer, HuggingFaceTokenizer) for tokenizer in (anchor, augment)):
        return False
    vocabulary, other = anchor.tokenizer.get_vocab(), augment.tokenizer.get_vocab()
    return all(other.get(token) == id_ for token, id_ in vocabulary.items())
