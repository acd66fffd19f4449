"""What the commands do: from local folders of models to a composition, and back to text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from calm_pytorch.augment import AugmentParams
from calm_pytorch.calm import CALM
from calm_pytorch.finetuner import FineTuner
from calm_pytorch.quickstart import QuickstartSettings, run_quickstart
from lm_core.command_line import INTERRUPTED
from lm_core.documents import read_texts
from lm_core.sampling import top_p as keep_nucleus
from lm_core.training import pick_device


def load_composition(
    anchor: str, augments: list[str], mode: str, connect_every: int, adapter: str | None, device: str
) -> tuple[CALM, Any]:
    """A composition of Hugging Face folders, and the anchor's tokenizer."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    for name, folder in (("anchor", anchor), *(("augments", one) for one in augments)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{name} must be a folder with a Hugging Face model, got {folder}")
    if not augments:
        raise ValueError("augments must name at least one folder, got none")
    shared = mode == "shared"
    params = [
        AugmentParams(
            (AutoModelForCausalLM if shared else AutoModel).from_pretrained(folder),
            shared_sequence=shared,
            connect_every_num_layers=connect_every,
        )
        for folder in augments
    ]
    calm = CALM(AutoModelForCausalLM.from_pretrained(anchor), params).to(pick_device(device))
    if adapter is not None:
        calm.load_adapter(adapter)
    return calm, AutoTokenizer.from_pretrained(anchor)


class TextExamples:
    """Pieces of texts in the anchor's ids; with static prompts each augment reads the piece before."""

    def __init__(self, texts: list[str], tokenizer: Any, length: int, mode: str) -> None:
        self.mode, self.pieces = mode, []
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            needed = length if mode == "shared" else 2 * length
            self.pieces += [ids[i : i + needed] for i in range(0, len(ids) - needed + 1, length)]
        self.length = length

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = torch.tensor(self.pieces[index])
        if self.mode == "shared":
            return {"seq": piece}
        return {"prompt": piece[: self.length], "seq": piece[self.length :]}


def train(
    *,
    settings: QuickstartSettings,
    anchor: str | None = None,
    augments: list[str] | None = None,
    data: str | None = None,
    mode: Literal["prompt", "shared"] = "shared",
    connect_every: int = 4,
    length: int = 64,
    train_steps: int = 1000,
    train_batch_size: int = 8,
    peak_learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_steps: int = 50,
    checkpoint_every: int = 100,
    checkpoint_dir: str = "runs/calm-quickstart",
    device: str = "auto",
) -> int:
    """Composes models and trains the connections.

    Args:
        settings: of the quickstart, which runs when no anchor is given.
        anchor: folder of a Hugging Face causal language model with its tokenizer.
        augments: folders of the models it reads.
        data: a .txt, .jsonl or .jsonl.gz file, or a folder of texts.
        mode: shared lets augments read the anchor's own text (same tokenizer), prompt the piece of text before it.
        connect_every: layers between connections.
        length: tokens of a piece of text.
        train_steps: optimizer updates.
        train_batch_size: pieces an update.
        peak_learning_rate: after the warmup.
        weight_decay: of matrices.
        warmup_steps: updates over which the learning rate rises.
        checkpoint_every: updates between checkpoints.
        checkpoint_dir: folder of the run.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    if anchor is None:
        print("key-value arithmetic: an augment that knows 400 keys, an anchor that computes; no download")
        result = run_quickstart(settings, checkpoint_dir)
        print(f"{settings.learner:<13} {result.held_out:.1%} right on expressions over keys it never trained on")
        print(f"anchor alone  {result.anchor_alone:.1%} (chance 9.1%)")
        print(f"numbers       {result.numbers_before:.1%} before, {result.numbers_after:.1%} after")
        print(f"files         {checkpoint_dir}: adapter/, attention.png, metrics.jsonl   ({result.seconds:.0f} s)")
        return 0
    if data is None:
        raise ValueError("data must name the texts to train on, got none")
    calm, tokenizer = load_composition(anchor, augments or [], mode, connect_every, None, device)
    print(calm.describe())
    texts: list[str] = []
    for document in read_texts(data):
        if not isinstance(document, str):
            raise TypeError(f"data must hold texts, got {type(document).__name__} in {data}")
        texts.append(document)
    examples = TextExamples(texts, tokenizer, length, mode)
    trainer = FineTuner(
        calm,
        num_train_steps=train_steps,
        learning_rate=peak_learning_rate,
        weight_decay=weight_decay,
        batch_size=train_batch_size,
        dataset=examples,
        warmup_steps=warmup_steps,
        checkpoint_every=checkpoint_every,
        checkpoint_path=checkpoint_dir,
        cache_augment_states=mode == "prompt",
        seed=settings.seed,
    )
    trainer()
    calm.save_adapter(Path(checkpoint_dir) / "adapter", overwrite=True)
    print(f"adapter       {Path(checkpoint_dir) / 'adapter'}")
    if trainer.interrupted:
        print(f"Stopped after {trainer.step} of {train_steps} updates. The same command goes on from there.")
        return INTERRUPTED
    return 0


def generate(
    anchor: str,
    prompt: str,
    *,
    augments: list[str],
    adapter: str | None = None,
    mode: Literal["prompt", "shared"] = "shared",
    connect_every: int = 4,
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Continues a prompt with a composition and prints it.

    Args:
        anchor: folder of the anchor with its tokenizer.
        prompt: the text to continue.
        augments: folders of the models it reads.
        adapter: folder of what was learned.
        mode: as it was trained.
        connect_every: as it was trained.
        max_new_tokens: at most.
        temperature: 0 takes the most likely token each time.
        top_p: keeps the most likely tokens up to this probability together.
        seed: of the draws.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    calm, tokenizer = load_composition(anchor, augments, mode, connect_every, adapter, device)
    place = next(calm.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=place)
    if ids.shape[1] == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
    out = calm.generate(
        ids,
        ids.shape[1] + max_new_tokens,
        filter_fn=keep_nucleus,
        filter_kwargs={"p": top_p},
        temperature=temperature,
        eos_id=tokenizer.eos_token_id,
        generator=torch.Generator(place).manual_seed(seed),
    )
    print(prompt + tokenizer.decode(out[0][out[0] != calm.pad_id]))
    return 0


def describe(
    anchor: str,
    *,
    augments: list[str],
    adapter: str | None = None,
    mode: Literal["prompt", "shared"] = "shared",
    connect_every: int = 4,
    device: str = "auto",
) -> int:
    """Prints the wiring of a composition and the share of added parameters.

    Args:
        anchor: folder of the anchor with its tokenizer.
        augments: folders of the models it reads.
        adapter: folder of what was learned, checked against the wiring.
        mode: shared or prompt.
        connect_every: layers between connections.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    calm, _ = load_composition(anchor, augments, mode, connect_every, adapter, device)
    print(calm.describe())
    return 0


def settings_names() -> list[str]:
    """Names of the quickstart's settings."""
    return list(asdict(QuickstartSettings()))
