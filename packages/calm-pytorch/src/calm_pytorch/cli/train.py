"""The command ``train``: a composition of two or more model folders, or the quickstart."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from calm_pytorch.cli.models import Models
from calm_pytorch.quickstart.quickstart import QuickstartResult, QuickstartSettings, run_quickstart
from calm_pytorch.training.data import TextExamples
from calm_pytorch.training.trainer import FineTuner
from lm_core.checkpoints.checkpoint import load_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.cli.main import print_main, report, report_run
from lm_core.training.metrics import read_metrics
from lm_core.training.run_directory import Result, RunDirectory, write_summary
from lm_core.training.session import draw_curves


def train(
    *,
    composition: Models,
    settings: QuickstartSettings,
    data: str | None = None,
    length: int = 64,
    validation_data: str | None = None,
    max_steps: int = 1000,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    max_grad_norm: float | None = 0.5,
    validate_every: int = 100,
    checkpoint_every: int = 100,
    keep_checkpoints: int | None = 2,
    checkpoint_dir: str = "runs/calm-quickstart",
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Composes models and trains the connections.

    Args:
        composition: the models; without an anchor the quickstart runs.
        settings: settings of the quickstart.
        data: texts to train on: files, folders or globs of text, JSON, tables or arrow files.
        length: tokens in a piece of text.
        validation_data: held-out texts, as for data; null for no validation.
        max_steps: updates; 600 by default in the quickstart.
        batch_size: expressions or pieces of text in an update; 128 by default in the quickstart.
        learning_rate: peak learning rate; 2e-3 by default in the quickstart.
        weight_decay: weight decay of matrices, over named models.
        warmup: fraction of the updates over which the learning rate rises, over named models.
        max_grad_norm: bound of the gradients' global norm; null only measures it.
        validate_every: updates between validations, over named models.
        checkpoint_every: updates between checkpoints, over named models.
        keep_checkpoints: newest checkpoints that are kept; null for all.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl and curves.png.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    if composition.anchor is None:
        return _quickstart(settings, checkpoint_dir, resume)
    if data is None:
        raise ValueError("data must name the texts to train on, got none")
    # models and data
    calm, tokenizer = composition.load()
    print_main(calm.describe())
    prompts = composition.mode == "prompt"
    held_out = None
    if validation_data is not None:
        held_out = TextExamples(validation_data, tokenizer, length, prompts=prompts)
    trainer = FineTuner(
        calm,
        max_steps=max_steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        dataset=TextExamples(data, tokenizer, length, prompts=prompts),
        valid_dataset=held_out,
        validate_every=validate_every,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        cache_augment_states=prompts,
        seed=settings.seed,
    )
    run = trainer.train()
    adapter = Path(checkpoint_dir) / "adapter"
    if trainer.is_main:
        calm.save_adapter(adapter, overwrite=True)
    # the report
    name, key = ("training loss", "loss") if held_out is None else ("held-out loss", "validation_loss")
    # a resumed run appends to the same file, so the first row dates from before any update
    rows = [row[key] for row in read_metrics(Path(checkpoint_dir) / "metrics.jsonl") if key in row]
    return report_run(
        "calm-pytorch",
        run,
        checkpoint_dir,
        max_steps=max_steps,
        lines=[("adapter", adapter), (name.replace(" loss", ""), f"loss {rows[-1]:.3f}, {rows[0]:.3f} before")],
        results=[Result(name, rows[-1], before=rows[0])],
    )


def _quickstart(settings: QuickstartSettings, checkpoint_dir: str, resume: bool | Literal["auto"]) -> int:
    print_main("key-value arithmetic: an augment that knows 400 keys, an anchor that computes; no download")
    seconds: float | None = None
    with RunDirectory(checkpoint_dir, resume=resume, seed=settings.seed, settings=asdict(settings)) as run:
        if run.resumes:
            checkpoint = load_checkpoint(run.checkpoints)
            if checkpoint.config.get("settings") != asdict(settings):
                raise CheckpointError(
                    f"{checkpoint.path} has other settings, {checkpoint.config.get('settings')}; "
                    "pass a new --checkpoint_dir to start over"
                )
            result = QuickstartResult(**checkpoint.trainer_state["result"])
            report("", "already complete; pass a new --checkpoint_dir to start over")
        else:
            result = run_quickstart(settings, checkpoint_dir)
            seconds = round(result.seconds, 1)
            draw_curves(run, ("loss", "validation_accuracy", "learning_rate", "grad_norm"))
        report(settings.learner, f" {result.held_out:.1%} right on expressions over keys it never trained on")
        report("anchor", f"{result.anchor_alone:.1%} alone (chance 9.1%)")
        report("numbers", f"{result.numbers_before:.1%} before, {result.numbers_after:.1%} after")
        report("files", f"{checkpoint_dir}: adapter/, attention.png, metrics.jsonl   ({result.seconds:.0f} s)")
        right = Result(
            "right on held-out keys, anchor alone -> composed", result.held_out, result.anchor_alone, "higher"
        )
        kept = Result("right on numbers", result.numbers_after, result.numbers_before, "higher")
        write_summary(checkpoint_dir, [right, kept], steps=settings.max_steps, seconds=seconds)
    return 0
