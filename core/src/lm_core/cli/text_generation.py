"""Text generation with a model from a folder, for the ``generate`` commands."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import check_positive, typed
from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of
from lm_core.tokenizers import Tokenizer, load_tokenizer
from lm_core.training.accelerator import pick_device


@typed
@dataclass(frozen=True, kw_only=True)
class TextGeneration:
    """Generation: length, sampling and device.

    Args:
        max_new_tokens: maximum number of new tokens; the end-of-document token ends a text earlier.
        temperature: divisor of the logits; 0 always takes the most likely token.
        top_k: number of most likely tokens to sample from; null for no limit.
        top_p: probability mass of the most likely tokens to sample from; null for no limit.
        min_p: minimum probability of a token, as a fraction of the most likely token's; null for no limit.
        repetition_penalty: penalty of tokens already in the text; above 1 makes them less likely.
        num_samples: number of continuations.
        seed: random seed of the draws.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.
        progress: shows a progress bar.

    Raises:
        ValueError: ``num_samples`` is below 1.
        TypeError: a value has the wrong type.
    """

    max_new_tokens: int = 200
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = 0.95
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    tokenizer: str | None = None
    device: str = "auto"
    progress: bool = False

    def __post_init__(self) -> None:
        check_positive(self.num_samples, "num_samples")


@dataclass(frozen=True)
class OpenedPrompt:
    """A model with its tokenizer, and a prompt as text and as ``ids (n,)`` on the model's device."""

    model: Any
    tokenizer: Tokenizer
    text: str
    ids: Tensor


def open_prompt(
    model_class: Any, checkpoint: str, prompt: str, *, tokenizer: str | None = None, device: str = "auto"
) -> OpenedPrompt:
    """Loads a model from a checkpoint, in evaluation mode, and reads a prompt for it.

    Args:
        model_class: class with ``from_pretrained``.
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: a text; "-" reads it from standard input, "@FILE" from a file.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        device: device name for ``lm_core.training.accelerator.pick_device``.

    Raises:
        ValueError: there is no model in the folder, the prompt is empty, or the device is not available.
        OSError: the prompt's file cannot be read.
    """
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    if prompt.startswith("@"):
        text = Path(prompt[1:]).read_text(encoding="utf-8")
    ids = torch.tensor(encoder.encode(text), dtype=torch.long)
    if len(ids) == 0:
        raise ValueError(f"prompt must hold at least one token, got {text!r}")
    target = pick_device(device)
    return OpenedPrompt(model_class.from_pretrained(folder).to(target).eval(), encoder, text, ids.to(target))


def print_continuations(model_class: Any, checkpoint: str, prompt: str, settings: TextGeneration) -> None:
    """Prints a prompt with each of its continuations; arguments and errors are those of ``open_prompt``."""
    opened = open_prompt(model_class, checkpoint, prompt, tokenizer=settings.tokenizer, device=settings.device)
    result = generate(
        opened.model,
        [opened.ids] * settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        filters=filters_of(top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p),
        eos_id=opened.tokenizer.eos_id,
        repetition_penalty=settings.repetition_penalty,
        generator=torch.Generator(opened.ids.device).manual_seed(settings.seed),
        progress=settings.progress,
    )
    for index, (tokens, length) in enumerate(zip(result.tokens.cpu(), result.lengths.tolist(), strict=True)):
        if settings.num_samples > 1:
            print(f"--- {index + 1} of {settings.num_samples}")
        print(opened.text + opened.tokenizer.decode(tokens[:length]))
