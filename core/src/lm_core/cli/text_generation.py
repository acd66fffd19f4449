"""Prompts, sampling flags and text generation, for the ``generate`` commands."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import check_above_zero, check_positive, check_temperature, typed
from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of
from lm_core.tokenizers import Tokenizer, continuation_text, end_ids, load_tokenizer, prompt_ids
from lm_core.training.accelerator import pick_device


@typed
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Sampling: temperature, filters and repetition penalty.

    Args:
        temperature: divisor of the logits; 0 always takes the most likely token.
        top_k: number of most likely tokens to sample from; null for no limit.
        top_p: probability mass of the most likely tokens to sample from; null for no limit.
        min_p: minimum probability of a token, as a fraction of the most likely token's; null for no limit.
        repetition_penalty: penalty of tokens already in the text; above 1 makes them less likely.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.filters()  # raises for a value out of range
        check_temperature(self.temperature)
        check_above_zero(self.repetition_penalty, "repetition_penalty")

    def filters(self) -> list[Callable[[Tensor], Tensor]]:
        """The filters of the logits, for ``lm_core.generation.generate``."""
        return filters_of(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@typed
@dataclass(frozen=True, kw_only=True)
class TextGeneration(SamplingFlags):
    """Generation: length, sampling and device.

    Args:
        max_new_tokens: maximum number of new tokens; an end token ends a text earlier.
        num_samples: number of continuations.
        seed: random seed.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.
        compile: compiles (torch.compile) the model's blocks in training, the step of a token in generation.
        progress: shows a progress bar.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float | None = 0.95
    num_samples: int = 1
    seed: int = 0
    tokenizer: str | None = None
    device: str = "auto"
    compile: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.max_new_tokens, "max_new_tokens")
        check_positive(self.num_samples, "num_samples")


@dataclass(frozen=True)
class OpenedPrompt:
    """A model with its tokenizer, and a prompt as text and as ``ids (n,)`` on the model's device."""

    model: Any
    tokenizer: Tokenizer
    text: str
    ids: Tensor


def read_prompt(prompt: str) -> str:
    """The text of a command's prompt: "-" reads standard input, "@FILE" a file in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8.
    """
    if prompt == "-":
        return sys.stdin.read()
    if not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt must be UTF-8 text, got {prompt}: {error}") from error


def open_prompt(
    model: str,
    prompt: str,
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    loader: Callable[[Path], Any] = load_causal_lm,
) -> OpenedPrompt:
    """Loads a model, in evaluation mode, and reads a prompt for it.

    Args:
        model: folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a Hugging Face model,
            or organisation/name on the hub.
        prompt: argument of ``read_prompt``.
        tokenizer: tokenizer to use instead of the one of the model.
        device: device name for ``lm_core.training.accelerator.pick_device``.
        loader: function from the folder to the model, such as ``PaLM.from_pretrained``.

    Raises:
        ValueError: there is no model in the folder, the prompt is empty, or the device is not available.
        OSError: the prompt's file cannot be read.
    """
    folder = checkpoint_folder(model)
    encoder = load_tokenizer(tokenizer or folder)
    text, ids = tokenised_prompt(prompt, encoder)
    target = pick_device(device)
    return OpenedPrompt(loader(folder).to(target).eval(), encoder, text, ids.to(target))


def tokenised_prompt(prompt: str, tokenizer: Tokenizer) -> tuple[str, Tensor]:
    """Text and ids of a command's prompt; errors are those of ``open_prompt``."""
    text = read_prompt(prompt)
    ids = torch.tensor(prompt_ids(tokenizer, text), dtype=torch.long)
    if len(ids) == 0:
        raise ValueError(f"prompt must hold at least one token, got {text!r}")
    return text, ids


def print_texts(opened: OpenedPrompt, settings: TextGeneration, **model_kwargs: Any) -> None:
    """Prints a prompt with each of its continuations.

    Args:
        opened: model and prompt.
        settings: length and sampling; device and tokenizer are those of ``opened``.
        **model_kwargs: arguments of the model.
    """
    result = generate(
        opened.model,
        [opened.ids] * settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        filters=settings.filters(),
        eos_id=end_ids(opened.tokenizer, opened.model),
        repetition_penalty=settings.repetition_penalty,
        generator=torch.Generator(opened.ids.device).manual_seed(settings.seed),
        compile=settings.compile,
        progress=settings.progress,
        **model_kwargs,
    )
    for index, (tokens, length) in enumerate(zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)):
        if settings.num_samples > 1:
            print(f"--- {index + 1} of {settings.num_samples}")
        print(opened.text + continuation_text(opened.tokenizer, opened.ids.tolist(), tokens[:length]))


def print_continuations(
    model: str, prompt: str, settings: TextGeneration, *, loader: Callable[[Path], Any] = load_causal_lm
) -> None:
    """Prints a prompt with each of its continuations; arguments and errors are those of ``open_prompt``."""
    opened = open_prompt(model, prompt, tokenizer=settings.tokenizer, device=settings.device, loader=loader)
    print_texts(opened, settings)
