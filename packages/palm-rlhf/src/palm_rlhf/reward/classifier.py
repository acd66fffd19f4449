"""Reward models of Hugging Face: sequence classifiers with one output, trained with LoRA or as a whole.

The folder of a checkpoint opens in transformers and peft, so that other programs can use the reward.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.adapters.loading import ADAPTER_FILE, check_foreign, dtype_argument, lora_config, quiet_peft, whole_model
from lm_core.checkpoints.checkpoint import Checkpoint
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.native_files import read_adapter, write_native_files
from lm_core.checkpoints.pretrained import CONFIG_FILE
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.checkpoints.weights import load_weights
from lm_core.nn.masking import prompt_mask_from_lengths
from lm_core.tokenizers import load_tokenizer
from lm_core.training.blocks import enable_gradient_checkpointing
from lm_core.training.fsdp import whole
from palm_rlhf.reward.rewards import ClassifierReward

_ADAPTER = "default"


class Classifier(nn.Module):
    """A sequence classifier with one output, for ``RewardModelTrainer``.

    Args:
        model: a ``...ForSequenceClassification`` with ``num_labels=1``, or a ``PeftModel`` of one.
        pad_id: padding id, from which the model finds the last token of a row.
    """

    num_binned_output = 0

    def __init__(self, model: Any, *, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self._frozen_hash: str | None = None
        self._stored: dict[str, Tensor] = {}
        model.config.pad_token_id = pad_id

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the adapter and the head, or all."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def logits(
        self, x: Int[Tensor, "b n"], *, lengths: Int[Tensor, " b"], prompt_lengths: Tensor | None = None
    ) -> Float[Tensor, "b 1"]:
        """Output for each right-padded row."""
        mask = prompt_mask_from_lengths(lengths, x.shape[1])
        ids = x.masked_fill(~mask, self.pad_id)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return logits.float()

    def forward(
        self, x: Int[Tensor, "b n"], *, lengths: Int[Tensor, " b"], prompt_lengths: Tensor | None = None
    ) -> Float[Tensor, " b"]:
        """Rewards of right-padded rows."""
        return self.logits(x, lengths=lengths)[:, 0]

    # checkpoints

    def frozen_hash(self) -> str | None:
        """SHA-256 of the weights that are not trained, and so not stored; None if all are trained."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        if frozen and self._frozen_hash is None:
            self._frozen_hash = hash_of(frozen.items())
        return self._frozen_hash

    def session_arguments(self) -> dict[str, Any]:
        """Arguments of ``TrainingSession.register`` for the model's files."""
        return {"save_weights": self._weights, "load_weights": self._load, "assets": self._write_assets}

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def _weights(self) -> dict[str, Tensor]:
        # every process gathers sharded weights here, then the first one writes the assets
        self._stored = {
            name: whole(tensor)
            for name, tensor in self.model.state_dict().items()
            if not self._has_adapter or _ADAPTER in name.split(".")
        }
        return {} if self._has_adapter else self._stored

    def _write_assets(self, folder: Path) -> None:
        write_native_files(folder, self.model, self._stored, adapter=_ADAPTER, base_hash=self.frozen_hash())

    def _load(self, checkpoint: Checkpoint) -> None:
        if self._has_adapter:
            read_adapter(checkpoint.path, self.model, _ADAPTER)
        else:
            load_weights(self.model, checkpoint.model_state or {}, where=str(checkpoint.path))


def new_classifier(
    folder: Path,
    *,
    pad_id: int,
    dtype: torch.dtype | None = None,
    use_lora: bool = True,
    lora_r: int = 8,
    dropout: float = 0.0,
    lora_targets: Sequence[str] | None = None,
    gradient_checkpointing: bool = False,
) -> Classifier:
    """A classifier to train, from a Hugging Face language model or classifier; a new head is drawn at random.

    Raises:
        ValueError: transformers has no classifier of this architecture.
        ImportError: transformers or peft is needed and not installed.
    """
    model = _open(folder, dtype)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if use_lora:
        from peft import get_peft_model

        config = lora_config(model, r=lora_r, alpha=lora_r, dropout=dropout, targets=lora_targets)
        config.task_type = "SEQ_CLS"
        with quiet_peft():
            model = get_peft_model(model, config, adapter_name=_ADAPTER)
    return Classifier(model, pad_id=pad_id)


def is_classifier(folder: Path) -> bool:
    """True for the folder of a Hugging Face sequence classifier, or of a peft adapter of one."""
    if (folder / ADAPTER_FILE).is_file():
        return read_json(folder / ADAPTER_FILE).get("task_type") == "SEQ_CLS"
    stored = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    return any(str(name).endswith("ForSequenceClassification") for name in stored.get("architectures") or ())


def load_classifier(folder: Path) -> ClassifierReward:
    """The reward of a folder of ``is_classifier``, with the tokenizer in it."""
    if (folder / ADAPTER_FILE).is_file():
        import transformers
        from peft import PeftModel

        base = read_json(folder / ADAPTER_FILE)["base_model_name_or_path"]
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # the base lacks the head, which the adapter brings
        try:
            with quiet_peft():
                model = PeftModel.from_pretrained(_open(Path(base), None), str(folder))
        finally:
            transformers.logging.set_verbosity(verbosity)
    else:
        model = _open(folder, None, whole=True)
    tokenizer = load_tokenizer(folder).tokenizer  # type: ignore[union-attr]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return ClassifierReward(model.eval(), tokenizer)


def _open(folder: Path, dtype: torch.dtype | None, *, whole: bool = False) -> Any:
    try:
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise ImportError("Hugging Face models need transformers: pip install transformers peft") from error
    source = str(folder)
    local = {"local_files_only": True} if folder.is_dir() else {}
    settings: dict[str, Any] = {"num_labels": 1, **local, **dtype_argument(dtype)}
    if whole:
        return whole_model(AutoModelForSequenceClassification, source, name="reward", **settings)
    check_foreign(source)
    try:
        return AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=False, **settings)
    except (OSError, ValueError, KeyError, UnpicklingError) as error:
        raise ValueError(f"model {source!r} could not be loaded as a sequence classifier: {error}") from error
