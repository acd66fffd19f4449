"""The commands ``generate`` and ``describe``, over folders of Hugging Face models."""

import torch

from calm_pytorch.cli.models import Models
from lm_core.generation.sampling import top_p as keep_nucleus


def generate(
    anchor: str,
    prompt: str,
    *,
    composition: Models,
    adapter: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
) -> int:
    """Continues a prompt with a composition and prints it.

    Args:
        anchor: folder of the anchor with its tokenizer.
        prompt: text to continue.
        composition: the composition, as it was trained.
        adapter: folder of the learned part.
        max_new_tokens: largest number of new tokens.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: keeps the most likely tokens up to this probability together.
        seed: seed of the draws.

    Returns:
        The exit status.
    """
    calm, tokenizer = composition.load(adapter)
    device = next(calm.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    if ids.shape[1] == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
    out = calm.generate(
        ids,
        ids.shape[1] + max_new_tokens,
        filter_fn=keep_nucleus,
        filter_kwargs={"p": top_p},
        temperature=temperature,
        eos_id=tokenizer.eos_token_id,
        generator=torch.Generator(device).manual_seed(seed),
    )
    print(prompt + tokenizer.decode(out[0][out[0] != calm.pad_id]))
    return 0


def describe(anchor: str, *, composition: Models, adapter: str | None = None) -> int:
    """Prints the wiring of a composition and the share of added parameters.

    Args:
        anchor: folder of the anchor with its tokenizer.
        composition: the composition.
        adapter: folder of the learned part, checked against the wiring.

    Returns:
        The exit status.
    """
    calm, _ = composition.load(adapter)
    print(calm.describe())
    return 0
