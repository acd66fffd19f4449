"""The commands ``generate`` and ``describe``."""

import torch

from calm_pytorch.cli.models import Models
from lm_core.cli.text_generation import OpenedPrompt, TextGeneration, print_texts, read_prompt
from lm_core.tokenizers import prompt_ids


def generate(
    anchor: str, prompt: str, *, composition: Models, settings: TextGeneration, adapter: str | None = None
) -> int:
    """Continues a prompt with a composition and prints it.

    Args:
        anchor: folder or hub name of the anchor with its tokenizer; or folder of an adapter or of its run, which knows
            its models.
        prompt: text to continue; "-" reads standard input, "@FILE" a file.
        composition: the composition.
        settings: length and sampling.
        adapter: folder of the learned part, or of its run.

    Returns:
        The exit status.
    """
    loaded = composition.load(adapter, settings.tokenizer)
    calm, text = loaded.calm.eval(), read_prompt(prompt)
    device = next(calm.parameters()).device
    ids = torch.tensor(prompt_ids(loaded.tokenizer, text), dtype=torch.long, device=device)
    if len(ids) == 0:
        raise ValueError(f"prompt must hold at least one token, got {text!r}")
    inputs = {}
    for index, reader in enumerate(loaded.readers):
        read = ids if reader is None else torch.tensor(prompt_ids(reader, text), dtype=torch.long, device=device)
        inputs[f"prompt_{index}"] = read.expand(settings.num_samples, -1)
    print_texts(OpenedPrompt(calm.as_causal_lm(), loaded.tokenizer, text, ids), settings, **inputs)
    return 0


def describe(anchor: str, *, composition: Models, adapter: str | None = None) -> int:
    """Prints the wiring of a composition and the share of added parameters.

    Args:
        anchor: folder or hub name of the anchor with its tokenizer; or folder of an adapter or of its run, which knows
            its models.
        composition: the composition.
        adapter: folder of the learned part, or of its run, checked against the wiring.

    Returns:
        The exit status.
    """
    print(composition.load(adapter).calm.describe())
    return 0
