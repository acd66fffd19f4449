"""Command-line flags of a composition, and how it is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calm_pytorch.model.augment import AugmentParams
from calm_pytorch.model.calm import CALM
from lm_core.checks import typed
from lm_core.training.accelerator import pick_device


@typed
@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a composition.

    Args:
        anchor: folder of a Hugging Face causal language model with its tokenizer.
        augments: folders of the models it reads.
        mode: "shared": augments read the anchor's own text (same tokenizer); "prompt": the piece of text before it.
        connect_every: layers between connections.
        device: auto takes CUDA, then MPS, then the CPU.
    """

    anchor: str | None = None
    augments: list[str] | None = None
    mode: Literal["prompt", "shared"] = "shared"
    connect_every: int = 4
    device: str = "auto"

    def load(self, adapter: str | None = None) -> tuple[CALM, Any]:
        """The composition, with the learned part of ``adapter``, and the anchor's tokenizer.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: there is no augment, or the models do not fit.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        for name, folder in (("anchor", self.anchor or ""), *(("augments", path) for path in self.augments or ())):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"{name} must be a folder with a Hugging Face model, got {folder}")
        if not self.augments:
            raise ValueError("augments must name at least one folder, got none")
        shared = self.mode == "shared"
        kind = AutoModelForCausalLM if shared else AutoModel
        params = [
            AugmentParams(
                kind.from_pretrained(folder), shared_sequence=shared, connect_every_num_layers=self.connect_every
            )
            for folder in self.augments
        ]
        calm = CALM(AutoModelForCausalLM.from_pretrained(self.anchor), params).to(pick_device(self.device))
        if adapter is not None:
            calm.load_adapter(adapter)
        return calm, AutoTokenizer.from_pretrained(self.anchor)
