"""The command ``train``: self-play fine-tuning of a model on a dataset, or the quickstart."""

from pathlib import Path
from typing import Any, Literal

from lm_core.adapters.loading import load_causal_lm, lora
from lm_core.checkpoints.atomic_io import write_file
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.main import print_main, report, report_run
from lm_core.distributed import world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device, start_accelerator
from lm_core.training.run_directory import Result
from spin_trainer.cli.commands import Dtype, dtype_of
from spin_trainer.quickstart.quickstart import quickstart, table_lines
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.pair_trainer import SPINResult
from spin_trainer.training.trainer import SPINTrainer


def train(
    *,
    settings: SelfPlaySettings,
    model: str | None = None,
    data: str | None = None,
    validation_data: str | None = None,
    tokenizer: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    dtype: Dtype | None = None,
    lora_r: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    lora_targets: list[str] | None = None,
    overlong: Literal["error", "drop"] = "error",
    checkpoint_dir: str = "runs/spin",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
) -> int:
    """Fine-tunes a model by self-play.

    Args:
        settings: settings of self-play.
        model: model to fine-tune: a folder, or organisation/name on the hub; null runs the quickstart.
        data: rows with prompt and response, or with messages: a file, folder, glob or data set on the hub.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        dtype: dtype of the loaded weights; null keeps the stored one. Trained weights are float32 in any case.
        lora_r: rank of LoRA adapters; null trains all weights.
        lora_alpha: scale of the adapters times their rank; null is twice the rank.
        lora_dropout: dropout probability before the adapters; above 0 the loss no longer begins at exactly ln 2.
        lora_targets: names of the linear layers that get an adapter; null is all but the output layer.
        overlong: handling of prompts that leave no room for an answer: error, or drop the row.
        checkpoint_dir: folder of the run, for answers, checkpoints, exported policies, metrics.jsonl and curves.png.
    """
    if model is None and (data is not None or validation_data is not None):
        raise ValueError(f"model must be given together with data, got data {data!r} and no model")
    if model is not None and data is None:
        raise ValueError(f"data must be given together with a model, got model {model!r} and no data")
    needs_model = {
        "tokenizer": tokenizer,
        "template_kwargs": template_kwargs,
        "dtype": dtype,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout or None,
        "lora_targets": lora_targets,
    }
    if model is None and (chosen := [name for name, value in needs_model.items() if value is not None]):
        raise ValueError(f"{' and '.join(chosen)} need a model, got none: the quickstart has its own")
    checkpoint_dir = str(Path(checkpoint_dir).expanduser())  # a shell expands no ~ of a YAML file
    start_accelerator(pick_device(settings.device), folder=checkpoint_dir)  # sets rank and world size
    run: dict[str, Any] = {"resume": resume, "trackers": trackers or ()}
    # without a model: the quickstart
    if model is None:
        report("downloads", "nothing; about two minutes on two CPU cores")
        result, table = quickstart(settings, Path(checkpoint_dir), **run)
        if table:
            lines = "\n".join(table_lines(table)) + "\n"
            print_main(f"\n{lines}")
            write_file(Path(checkpoint_dir) / "table.md", lines)
            print_main("On a toy this small more supervised training wins; self-play learns from the same data.")
        return _report(result, checkpoint_dir)
    # tokenizer, model and trainer
    seed_everything(settings.seed)
    encoder = load_tokenizer(tokenizer or checkpoint_folder(model))
    policy = load_causal_lm(model, dtype=dtype_of(dtype))
    if lora_r is not None:
        policy = lora(policy, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets)
    trainer = SPINTrainer(
        policy,
        train_sft_dataset=data,
        valid_sft_dataset=validation_data,
        tokenizer=encoder,
        template_kwargs=template_kwargs,
        overlong=overlong,
        checkpoint_dir=checkpoint_dir,
        config=settings,
        **run,
    )
    # a summary in front of the run
    weights = trainer.session.precisions
    stored = (
        f"{weights.total / 1e6:.2f} million parameters stored in {str(weights.stored_dtype).removeprefix('torch.')}"
    )
    report("model", f"{model}, {stored}, of which {weights.trained / 1e6:.2f} train in float32")
    rows = trainer.train_dataset
    report("data", f"{data}: {len(rows)} rows, {rows.dropped} left out")
    length = f"{settings.iterations} iteration(s), {trainer.planned_updates} updates"
    report("run", f"{checkpoint_dir}, {length}, {trainer.device}, {world_size()} process(es)")
    return _report(trainer.train(), checkpoint_dir, trainer.planned_updates)


def _report(result: SPINResult, folder: str, max_steps: int | None = None) -> int:
    lines: list[tuple[str, object]] = [
        (
            "held out",
            f"{metrics['nll']:8.3f} nats/answer, win rate {metrics['win_rate']:.3f} "
            f"({f'iteration {index - 1}' if index else 'before'})",
        )
        for index, metrics in enumerate(result.history)
    ]
    if result.best_iteration is not None:
        lines.append(("best", f"after {result.best_iteration} iterations, by held-out likelihood"))
    lines.append(("policies", f"{result.iterations_folder} ({result.outcome} after {result.iterations} iterations)"))
    nll = [metrics["nll"] for metrics in result.history]
    results = [Result("held-out NLL/answer, nats", nll[-1], before=nll[0])] if nll else []
    return report_run("spin-trainer", result, folder, max_steps=max_steps, lines=lines, results=results)
