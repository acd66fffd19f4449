"""The command ``train``: a composition of two or more models, or the quickstart."""

from typing import Any, Literal

from calm_pytorch.cli.models import Composition, Models
from calm_pytorch.quickstart.quickstart import QuickstartSettings, run_quickstart
from calm_pytorch.training.data import TextExamples, read_documents
from calm_pytorch.training.settings import FineTunerSettings
from calm_pytorch.training.trainer import FineTuner
from lm_core.checks import check_positive, check_probability
from lm_core.cli.main import print_main, report, report_run
from lm_core.data.epochs import held_out_split
from lm_core.rng import seed_everything
from lm_core.training.metrics import read_metrics
from lm_core.training.run_directory import Result


def train(
    *,
    composition: Models,
    settings: FineTunerSettings,
    quickstart: QuickstartSettings,
    data: str | None = None,
    field: str = "text",
    template_kwargs: dict[str, Any] | None = None,
    sequence_length: int = 256,
    validation_data: str | None = None,
    validation_fraction: float = 0.05,
    checkpoint_dir: str = "runs/calm-quickstart",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Composes models and trains the connections.

    Args:
        composition: the models; without an anchor the quickstart runs.
        settings: settings of the run.
        quickstart: settings of the quickstart.
        data: training data: files, folders or globs of text, JSON, tables or arrow files, or organisation/name on the
            hub. Rows have a text, ``messages`` of a chat, or a prompt and a response, which alone is learned.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        validation_data: held-out data, from the same kinds of source; null holds out a fraction of the data.
        validation_fraction: fraction of the data held out for validation.

    Returns:
        The exit status.
    """
    if composition.anchor is None:
        return _quickstart(quickstart, checkpoint_dir, resume, trackers or [])
    defaults = QuickstartSettings().task
    changed = [name for name, value in quickstart.task.items() if value != defaults[name]]
    if changed:
        raise ValueError(f"{', '.join(changed)} must not be given with an anchor: they are settings of the quickstart")
    if data is None:
        raise ValueError("data must name the texts to train on, got none")
    check_positive(sequence_length, "sequence_length")
    # models and data; the connections are part of what the seed decides
    seed_everything(settings.seed)
    loaded = composition.load(move=not settings.fsdp)
    texts, held_out = _documents(data, validation_data, validation_fraction, field)
    examples = text_examples(texts, loaded, sequence_length, template_kwargs)
    valid_examples = text_examples(held_out, loaded, sequence_length, template_kwargs) if held_out else None
    trainer = FineTuner(
        loaded.calm,
        config=settings,
        dataset=examples,
        valid_dataset=valid_examples,
        collate_fn=examples.collate,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        trackers=trackers or (),
        cache_augment_states=not settings.fsdp and not any(a.shared_sequence for a in loaded.calm.augments),
    )
    # the processes are connected now: one prints
    print_main(_dtypes(loaded.calm))
    print_main(loaded.calm.describe())
    for what, part in (("training", examples), ("validation", valid_examples)):
        if part is not None:
            skipped = f", {part.left_out} left out (too short, or nothing to learn)" if part.left_out else ""
            report(what, f"{part.documents} documents in {len(part)} rows of up to {sequence_length} tokens{skipped}")
    run = trainer.train()
    adapter = trainer.checkpoint_path / "adapter"
    with trainer.session.gathered():
        if trainer.is_main:
            loaded.calm.save_adapter(adapter, overwrite=True, models=loaded.models)
    if not trainer.is_main:
        return report_run("calm-pytorch", run, checkpoint_dir, max_steps=settings.max_steps)
    # the report
    name, key = ("held-out loss", "validation_loss") if held_out else ("training loss", "loss")
    # a resumed run appends to the same file, so the first row dates from before any update
    rows = [row[key] for row in read_metrics(trainer.checkpoint_path / "metrics.jsonl") if key in row]
    return report_run(
        "calm-pytorch",
        run,
        checkpoint_dir,
        max_steps=settings.max_steps,
        lines=[("adapter", adapter), (name.replace(" loss", ""), f"loss {rows[-1]:.3f}, {rows[0]:.3f} before")],
        results=[Result(name, rows[-1], before=rows[0])],
    )


def _documents(data: str, validation_data: str | None, fraction: float, field: str) -> tuple[list[Any], list[Any]]:
    """Documents for training and those held out."""
    check_probability(fraction, "validation_fraction")
    documents = read_documents(data, field=field)
    if validation_data is not None:
        return documents, read_documents(validation_data, field=field)
    return held_out_split(documents, round(fraction * len(documents)), 0, "validation")


def text_examples(
    documents: list[Any], loaded: Composition, length: int, template_kwargs: dict[str, Any] | None
) -> TextExamples:
    """Results of ``read_documents`` as examples of a composition."""
    return TextExamples(
        documents,
        loaded.tokenizer,
        length,
        readers=loaded.readers,
        pad_id=loaded.calm.pad_id,
        template_kwargs=template_kwargs,
    )


def _dtypes(calm: Any) -> str:
    """Stored and trained dtypes of a composition."""

    def names(parameters: Any) -> str:
        return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))

    frozen = [*calm.anchor_llm.parameters(), *calm.augment_llms.parameters()]
    return f"frozen in {names(frozen)}, trained in {names(calm.trainable_parameters())}"


def _quickstart(
    settings: QuickstartSettings, checkpoint_dir: str, resume: bool | Literal["auto"], trackers: list[str]
) -> int:
    print_main("key-value arithmetic: an augment that knows 400 keys, an anchor that computes; no download")
    run = run_quickstart(settings, checkpoint_dir, resume=resume, trackers=trackers)
    results = [
        Result("right on held-out keys, anchor alone -> composed", run.held_out, run.anchor_alone, "higher"),
        Result("right on numbers", run.numbers_after, run.numbers_before, "higher"),
    ]
    lines = [
        (settings.learner, f" {run.held_out:.1%} right on expressions over keys it never trained on"),
        ("anchor", f"{run.anchor_alone:.1%} alone (chance 9.1%)"),
        ("numbers", f"{run.numbers_before:.1%} before, {run.numbers_after:.1%} after"),
        ("files", f"{checkpoint_dir}: adapter/, attention.png"),
    ]
    return report_run("calm-pytorch", run, checkpoint_dir, max_steps=settings.max_steps, lines=lines, results=results)
