"""The quickstart: a small decoder learns to sort digits, plays against itself, and is compared with more of the same.

One table at the end, every number on rows that nothing was chosen by: the supervised start, each iteration of
self-play, and supervised training for as many updates again at self-play's learning rate.

The start was trained at a constant rate and is stopped while it still falls, so it has something left to learn. Its
noise matters too: at a hundredth of that rate any training along the data settles it, and most of what iteration 0
gains is that. Self-play's gradient is half that of supervised training with the noise of the opponent's answers on top,
and only pairs whose answers differ have any; hence a small rate and many prompts. On a toy like this more supervised
training wins; what is shown is that self-play learns from nothing but the same data.
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
from spin_trainer.training.trainer import SPINResult, SPINTrainer

MODEL = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16}
# What the command's quickstart plays by; flags and a YAML file win.
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
}
SUPERVISED_UPDATES, SUPERVISED_RATE = 400, 3e-3
ROWS, HELD_OUT, COMPARED = 12000, 500, 2000


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    evaluation: Evaluation
    win_rate: float | None


def quickstart_data() -> tuple[SFTDataset, SFTDataset, SFTDataset]:
    """Rows to train on, to validate on, and for the table; no prompt is in two of them."""
    train = sorting_task.sorting_examples(ROWS, seed=1)
    valid = sorting_task.sorting_examples(HELD_OUT, seed=2, without=train)
    seen = SFTDataset([*train, *valid])
    return train, valid, sorting_task.sorting_examples(COMPARED, seed=3, without=seen)


def quickstart(
    settings: SelfPlaySettings,
    folder: Path,
    *,
    compare: bool = True,
    **trainer_arguments: Any,
) -> tuple[SPINResult, list[Row]]:
    """Runs it all; the supervised start is kept in ``folder/start``, so a run goes on from it.

    Args:
        settings: settings of self-play.
        folder: folder of the run.
        compare: whether supervised training is continued too, and the table made.
        trainer_arguments: further arguments of ``SPINTrainer``; its opponent samples without a filter by default.
    """
    train, valid, compared = quickstart_data()
    if not (folder / "start").is_dir():
        report("supervised", f"{SUPERVISED_UPDATES} updates on {ROWS} rows: sort {sorting_task.DIGITS} digits")
        seed_everything(settings.seed)
        model = SmallDecoder(num_tokens=sorting_task.VOCABULARY, **MODEL).to(pick_device(settings.device))
        constant: dict[str, Any] = {"learning_rate": SUPERVISED_RATE, "final_learning_rate": 1.0}
        fine_tune(model, train, updates=SUPERVISED_UPDATES, seed=settings.seed, **constant)
        on_main_process(lambda: model.save_pretrained(folder / "start"))
    start = SmallDecoder.from_pretrained(folder / "start")
    policy = copy.deepcopy(start)
    trainer = SPINTrainer(
        policy,
        train_sft_dataset=train,
        valid_sft_dataset=valid,
        eos_id=sorting_task.EOS,
        checkpoint_dir=folder,
        config=settings,
        **{"filter_fn": None, **trainer_arguments},
    )
    report("self-play", f"{settings.iterations} iterations on {trainer.device}, into {folder}")
    result = trainer.train()
    if result.outcome == "interrupted" or not compare:
        return result, []
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
    sampling = replace(trainer.sampling, seed=1)

    def scored(name: str, model: SmallDecoder, opponent: SmallDecoder | None) -> Row:
        model.to(trainer.device)
        eos_id = sorting_task.EOS
        evaluation = evaluate(model, compared, max_seq_len=settings.max_seq_len, eos_id=eos_id, batch_size=500)
        return Row(name, evaluation, None if opponent is None else win_rate_over(model, opponent, compared, sampling))

    table = [scored("supervised start", start, None)]
    for number in range(1, result.iterations + 1):
        played = SmallDecoder.from_pretrained(result.iterations_folder / f"iteration-{number}")
        table.append(scored(f"self-play iteration {number - 1}", played, start))
    table.append(scored("supervised, continued", more, start))
    return result, table


def table_lines(table: list[Row]) -> list[str]:
    """The table as Markdown."""
    lines = ["| held out | NLL/sequence | exact match | win rate over the start |", "|---|---|---|---|"]
    for row in table:
        rate = "" if row.win_rate is None else f"{row.win_rate:.3f}"
        match = "" if row.evaluation.exact_match is None else f"{row.evaluation.exact_match:.3f}"
        lines.append(f"| {row.name} | {row.evaluation.nll_per_sequence:.4f} | {match} | {rate} |")
    return lines
