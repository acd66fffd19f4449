"""The quickstart: supervised training of a small decoder that sorts digits, self-play, and a comparison.

It ends with a table on rows that no choice was made on: the supervised start, each iteration of self-play, and
supervised training continued for as many updates at self-play's learning rate.

The start is trained at a constant learning rate and stopped early, so that something is left to learn; most of the gain
of iteration 0 is its noise averaged out at the smaller learning rate. Self-play's gradient is half that of supervised
training, with the noise of the opponent's answers, and 0 for pairs of equal answers: hence a small learning rate and
many prompts. More supervised training wins on this toy; the table shows that self-play learns from the same data.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_core.checkpoints.checkpoint import on_main_process
from lm_core.cli.main import report
from lm_core.rng import seed_everything
from lm_core.training.accelerator import pick_device
from spin_trainer.data.sft_data import SFTDataset
from spin_trainer.quickstart import sorting_task
from spin_trainer.quickstart.small_decoder import SmallDecoder
from spin_trainer.quickstart.supervised import fine_tune
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.evaluation import Evaluation, evaluate, win_rate_over
from spin_trainer.training.pair_trainer import SPINResult
from spin_trainer.training.trainer import SPINTrainer

MODEL = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16}
# Defaults of the command's quickstart; flags and a YAML file override them.
DEFAULTS: dict[str, Any] = {
    "max_seq_len": sorting_task.MAX_SEQ_LEN,
    "iterations": 3,
    "epochs": 1,
    "batch_size": 64,
    "gradient_accumulation": 1,
    "generation_batch_size": 1000,
    "lambda_": 1.0,
    "mix_previous": False,
    "learning_rate": 3e-5,
    "end_learning_rate": 3e-6,
    "temperature": 1.0,
    "top_p": None,
}
SUPERVISED_UPDATES, SUPERVISED_RATE = 400, 3e-3
ROWS, HELD_OUT, COMPARED = 12000, 500, 2000  # for training, for validation and for the table


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    evaluation: Evaluation
    win_rate: float | None


def quickstart_data() -> tuple[SFTDataset, SFTDataset, SFTDataset]:
    """Rows for training, for validation and for the table; no prompt is in two of them."""
    train = sorting_task.sorting_examples(ROWS, seed=1)
    valid = sorting_task.sorting_examples(HELD_OUT, seed=2, without=train)
    seen = SFTDataset([*train, *valid])
    return train, valid, sorting_task.sorting_examples(COMPARED, seed=3, without=seen)


def quickstart(
    settings: SelfPlaySettings, folder: Path, *, compare: bool = True, **trainer_arguments: Any
) -> tuple[SPINResult, list[Row]]:
    """Runs the quickstart; the supervised start is stored in ``folder/start``, from which a resumed run continues.

    Args:
        settings: settings of self-play.
        folder: folder of the run.
        compare: whether to continue supervised training too and make the table.
        trainer_arguments: further arguments of ``SPINTrainer``.
    """
    # the supervised start
    train, valid, compared = quickstart_data()
    if not (folder / "start").is_dir():
        report("supervised", f"{SUPERVISED_UPDATES} updates on {ROWS} rows: sort {sorting_task.DIGITS} digits")
        seed_everything(settings.seed)
        model = SmallDecoder(num_tokens=sorting_task.VOCABULARY, **MODEL).to(pick_device(settings.device))
        constant: dict[str, Any] = {"learning_rate": SUPERVISED_RATE, "final_learning_rate": 1.0}
        fine_tune(model, train, updates=SUPERVISED_UPDATES, seed=settings.seed, **constant)
        on_main_process(lambda: model.save_pretrained(folder / "start"))
    start = SmallDecoder.from_pretrained(folder / "start")
    # self-play
    policy = copy.deepcopy(start)
    trainer = SPINTrainer(
        policy,
        train_sft_dataset=train,
        valid_sft_dataset=valid,
        eos_id=sorting_task.EOS,
        checkpoint_dir=folder,
        config=settings,
        **trainer_arguments,
    )
    report("self-play", f"{settings.iterations} iterations on {trainer.device}, into {folder}")
    result = trainer.train()
    if result.outcome == "interrupted" or not compare:
        return result, []
    # supervised training continued, for comparison
    report("supervised", f"{result.step} updates more, for comparison")
    more = copy.deepcopy(start).to(trainer.device)
    fine_tune(
        more,
        train,
        updates=max(1, result.step),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        final_learning_rate=0.1,
        seed=settings.seed + 1,
    )
    if not trainer.is_main:
        return result, []
    # the table
    sampling = replace(trainer.sampling, seed=1)

    def scored_row(name: str, model: SmallDecoder, opponent: SmallDecoder | None) -> Row:
        model.to(trainer.device)
        evaluation = evaluate(
            model, compared, max_seq_len=settings.max_seq_len, eos_id=sorting_task.EOS, batch_size=500
        )
        return Row(name, evaluation, None if opponent is None else win_rate_over(model, opponent, compared, sampling))

    table = [scored_row("supervised start", start, None)]
    for count in range(1, result.iterations + 1):
        trained = SmallDecoder.from_pretrained(result.iterations_folder / f"iteration-{count}")
        table.append(scored_row(f"self-play iteration {count - 1}", trained, start))
    table.append(scored_row("supervised, continued", more, start))
    return result, table


def table_lines(table: list[Row]) -> list[str]:
    """Formats the table as lines of Markdown."""
    lines = ["| held out | NLL/sequence | exact match | win rate over the start |", "|---|---|---|---|"]
    for row in table:
        rate = "" if row.win_rate is None else f"{row.win_rate:.3f}"
        match = "" if row.evaluation.exact_match is None else f"{row.evaluation.exact_match:.3f}"
        lines.append(f"| {row.name} | {row.evaluation.nll_per_sequence:.4f} | {match} | {rate} |")
    return lines
