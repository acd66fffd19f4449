"""The commands ``generate``, ``eval`` and ``describe``."""

from typing import Any

import torch

from calm_pytorch.cli.models import Models
from calm_pytorch.cli.train import text_examples
from calm_pytorch.training.data import read_documents
from calm_pytorch.training.evaluation import evaluate
from lm_core.checks import check_positive
from lm_core.cli.main import print_main
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


def evaluate_composition(
    anchor: str,
    data: str,
    *,
    composition: Models,
    adapter: str | None = None,
    field: str = "text",
    template_kwargs: dict[str, Any] | None = None,
    sequence_length: int = 256,
    batch_size: int = 8,
) -> int:
    """Prints the loss of a composition on held-out data, and that of its anchor alone.

    Args:
        anchor: folder or hub name of the anchor with its tokenizer; or folder of an adapter or of its run, which knows
            its models.
        data: held-out data, from the same kinds of source as for training.
        composition: the composition.
        adapter: folder of the learned part, or of its run.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        batch_size: rows in a batch.

    Returns:
        The exit status.
    """
    check_positive(sequence_length, "sequence_length")
    loaded = composition.load(adapter)
    examples = text_examples(read_documents(data, field=field), loaded, sequence_length, template_kwargs)
    scores = evaluate(loaded.calm, examples, collate_fn=examples.collate, batch_size=batch_size)
    print_main(f"{scores.loss:.4f} nats/token over {scores.tokens:,} tokens")
    print_main(f"{scores.anchor_loss:.4f} nats/token of the anchor alone")
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
