"""What the commands do: from local folders of models to a composition, and back to text."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from calm_pytorch.model.augment import AugmentParams
from calm_pytorch.model.calm import CALM
from calm_pytorch.quickstart.quickstart import QuickstartResult, QuickstartSettings, run_quickstart
from calm_pytorch.training.trainer import FineTuner
from lm_core.checkpoints.checkpoint import load_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.cli.main import print_resume_hint
from lm_core.data.documents import read_texts
from lm_core.generation.sampling import top_p as keep_nucleus
from lm_core.training.accelerator import pick_device
from lm_core.training.metrics import read_metrics
from lm_core.training.run_directory import Result, RunDirectory, write_summary
from lm_core.training.session import draw_curves


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
    validation_data: str | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    max_grad_norm: float | None = 0.5,
    validate_every: int = 100,
    checkpoint_every: int = 100,
    keep_checkpoints: int | None = 2,
    checkpoint_dir: str = "runs/calm-quickstart",
    resume: bool | Literal["auto"] = "auto",
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
        validation_data: texts held out, as for data; null for no validation.
        max_steps: updates; null is 600 of the quickstart, 1000 over named models.
        batch_size: expressions or pieces of text an update; null is 128 of the quickstart, 8 over named models.
        learning_rate: at its peak; null is 2e-3 of the quickstart, 1e-3 over named models.
        weight_decay: of matrices, over named models.
        warmup: part of the updates over which the learning rate rises, over named models.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        validate_every: updates between validations, over named models.
        checkpoint_every: updates between checkpoints, over named models.
        keep_checkpoints: how many stay; null for all.
        checkpoint_dir: folder of the run.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    if anchor is None:
        return _quickstart(settings, checkpoint_dir, resume)
    if data is None:
        raise ValueError("data must name the texts to train on, got none")
    calm, tokenizer = load_composition(anchor, augments or [], mode, connect_every, None, device)
    print(calm.describe())
    examples = TextExamples(_texts(data, "data"), tokenizer, length, mode)
    held_out = None
    if validation_data is not None:
        held_out = TextExamples(_texts(validation_data, "validation_data"), tokenizer, length, mode)
    steps = 1000 if max_steps is None else max_steps
    trainer = FineTuner(
        calm,
        max_steps=steps,
        learning_rate=1e-3 if learning_rate is None else learning_rate,
        weight_decay=weight_decay,
        batch_size=8 if batch_size is None else batch_size,
        dataset=examples,
        valid_dataset=held_out,
        validate_every=validate_every,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        cache_augment_states=mode == "prompt",
        seed=settings.seed,
    )
    started = time.monotonic()
    trainer()
    calm.save_adapter(Path(checkpoint_dir) / "adapter", overwrite=True)
    if trainer.started_at == steps:
        print("            finished before; another --checkpoint_dir trains anew")
    print(f"adapter     {Path(checkpoint_dir) / 'adapter'}")
    if trainer.interrupted:
        return print_resume_hint("calm-pytorch", "interrupted", trainer.step, steps)
    if trainer.is_main:
        name, numbers = ("held-out loss", "validation_loss") if held_out else ("training loss", "loss")
        # a resumed run goes on in the file of the first one, so its first row is of before any update
        rows = [row[numbers] for row in read_metrics(Path(checkpoint_dir) / "metrics.jsonl") if numbers in row]
        seconds = None if trainer.started_at == steps else round(time.monotonic() - started, 1)
        write_summary(checkpoint_dir, [Result(name, rows[-1], before=rows[0])], steps=steps, seconds=seconds)
    return 0


def _texts(path: str, name: str) -> list[str]:
    texts: list[str] = []
    for document in read_texts(path):
        if not isinstance(document, str):
            raise TypeError(f"{name} must hold texts, got {type(document).__name__} in {path}")
        texts.append(document)
    return texts


def _quickstart(settings: QuickstartSettings, checkpoint_dir: str, resume: bool | Literal["auto"]) -> int:
    print("key-value arithmetic: an augment that knows 400 keys, an anchor that computes; no download")
    run = RunDirectory(checkpoint_dir, resume=resume, seed=settings.seed, settings=asdict(settings))
    seconds: float | None = None
    with run:
        if run.resumes:
            checkpoint = load_checkpoint(run.checkpoints)
            if checkpoint.config.get("settings") != asdict(settings):
                raise CheckpointError(
                    f"{checkpoint.path} is of other settings, {checkpoint.config.get('settings')}; "
                    "another --checkpoint_dir trains anew"
                )
            result = QuickstartResult(**checkpoint.trainer_state["result"])
            print("            finished before; another --checkpoint_dir trains anew")
        else:
            result = run_quickstart(settings, checkpoint_dir)
            seconds = round(result.seconds, 1)
            draw_curves(run, ("loss", "validation_accuracy", "learning_rate", "grad_norm"))
        print(f"{settings.learner:<13} {result.held_out:.1%} right on expressions over keys it never trained on")
        print(f"anchor alone  {result.anchor_alone:.1%} (chance 9.1%)")
        print(f"numbers       {result.numbers_before:.1%} before, {result.numbers_after:.1%} after")
        print(f"files         {checkpoint_dir}: adapter/, attention.png, metrics.jsonl   ({result.seconds:.0f} s)")
        right = Result(
            "right on held-out keys, anchor alone -> composed", result.held_out, result.anchor_alone, "higher"
        )
        kept = Result("right on numbers", result.numbers_after, result.numbers_before, "higher")
        write_summary(checkpoint_dir, [right, kept], steps=settings.max_steps, seconds=seconds)
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
