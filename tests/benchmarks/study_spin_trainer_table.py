"""Sorting six digits, several seeds: the supervised start, self-play iterations 0 to 2, continued supervised training.

    nox -s studies -- spin_trainer_table --folder runs/spin-table

A seed is the quickstart of `spin-trainer train` with that seed: its start, its data (the same for all seeds) and its
settings, which were chosen on seeds 10 to 12 and other held-out rows than these. "continued" trains at self-play's
learning rate for as many further updates; "continued, annealed" decays the start's own rate to 0, the usual choice
without self-play. All are scored on 2,000 separate rows; the standard error is over these rows,
of the difference to the start. A win rate is over the start's answers.

Written to the folder: ``seed-N.json`` as soon as it is done, ``results.json``, ``table.md`` and ``curves.png``.
Finished seeds are not run again, and an interrupted seed resumes. About three minutes a seed on one core.
"""

import copy
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import arguments, machine, table

from lm_core.causal_lm import eval_mode
from spin_trainer import SelfPlaySettings
from spin_trainer.data.opponent_answers import Sampling, opponent_log_probs
from spin_trainer.quickstart import sorting_task
from spin_trainer.quickstart.quickstart import DEFAULTS, SUPERVISED_RATE, quickstart, quickstart_data
from spin_trainer.quickstart.small_decoder import SmallDecoder
from spin_trainer.quickstart.supervised import fine_tune
from spin_trainer.training.evaluation import evaluate, win_rate_over


def likelihoods(model: SmallDecoder, dataset: Any) -> torch.Tensor:
    """Negative log-likelihood of each human answer."""
    rows = list(dataset)
    with eval_mode(model):
        scores = opponent_log_probs(model, [e.prompt for e in rows], [e.response for e in rows], "fp32")
    return -torch.tensor(scores, dtype=torch.float64)


def of_one_seed(seed: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of one seed: trained, or read."""
    done = folder / f"seed-{seed}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    run = folder / f"seed-{seed}"
    settings = SelfPlaySettings(**{**DEFAULTS, "seed": seed, "device": "cpu"})
    result, _ = quickstart(settings, run, compare=False)
    if result.outcome != "finished":
        raise SystemExit(f"seed {seed} was interrupted; the same command resumes it")
    train, _, compared = quickstart_data()
    start = SmallDecoder.from_pretrained(run / "start")
    models = {"supervised start": start}
    for number in range(1, result.iterations + 1):
        folder_of = result.iterations_folder / f"iteration-{number}"
        models[f"self-play iteration {number - 1}"] = SmallDecoder.from_pretrained(folder_of)
    rates = {"continued": settings.learning_rate, "continued, annealed": SUPERVISED_RATE}
    for name, rate in rates.items():
        models[f"supervised, {name}"] = more = copy.deepcopy(start)
        last = 0.1 if name == "continued" else 0.0
        arguments_of = {"updates": result.step, "learning_rate": rate, "final_learning_rate": last, "seed": seed + 1}
        fine_tune(more, train, batch_size=settings.batch_size, **arguments_of)
    sampling = Sampling(
        max_seq_len=sorting_task.MAX_SEQ_LEN,
        temperature=settings.temperature,
        top_p=None,
        eos_id=sorting_task.EOS,
        batch_size=500,
        seed=1,
    )
    before = likelihoods(start, compared)
    rows = []
    for name, model in models.items():
        difference = likelihoods(model, compared) - before
        found = evaluate(model, compared, max_seq_len=sorting_task.MAX_SEQ_LEN, eos_id=sorting_task.EOS, batch_size=500)
        rows.append(
            {
                "model": name,
                "nll": found.nll_per_sequence,
                "difference": float(difference.mean()),
                "standard error": float(difference.std() / math.sqrt(len(difference))),
                "exact match": found.exact_match,
                "win rate": None if model is start else win_rate_over(model, start, compared, sampling),
            }
        )
    done.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def table_rows(results: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a model, with a column a seed."""
    rows = []
    for entries in zip(*results.values(), strict=True):
        row: dict[str, Any] = {"model": entries[0]["model"]}
        for seed, entry in zip(results, entries, strict=True):
            row[f"NLL/sequence, seed {seed}"] = f"{entry['nll']:.4f}"
        row["mean"] = f"{mean(entry['nll'] for entry in entries):.4f}"
        row["largest standard error"] = f"{max(entry['standard error'] for entry in entries):.4f}"
        row["exact match"] = " ".join(f"{entry['exact match']:.3f}" for entry in entries)
        if entries[0]["win rate"] is not None:
            row["win rate over the start"] = " ".join(f"{entry['win rate']:.3f}" for entry in entries)
        rows.append(row)
    return rows


def draw(results: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """NLL and exact match of each seed, in the order of the table."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, key, label in zip(axes, ("nll", "exact match"), ("NLL/sequence, nats", "exact match"), strict=True):
        for seed, rows in results.items():
            played = [row for row in rows if "continued" not in row["model"]]
            (line,) = axis.plot([row[key] for row in played], marker="o", label=f"self-play, seed {seed}")
            for name, marker in (("supervised, continued", "s"), ("supervised, continued, annealed", "^")):
                (value,) = (row[key] for row in rows if row["model"] == name)
                axis.plot([len(played) - 1 + 0.15], [value], marker, color=line.get_color(), mfc="none")
        axis.plot([], [], "ks", mfc="none", label="supervised, continued")
        axis.plot([], [], "k^", mfc="none", label="the same, annealed")
        axis.set_xticks(range(len(played)), ["start", *(f"iteration {n}" for n in range(len(played) - 1))])
        axis.set_ylabel(f"held out: {label}")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2], "help": "one run each"},
        folder={"type": Path, "default": Path("runs/spin-table"), "help": "what is made goes here, and is kept"},
    )
    torch.set_num_threads(options.threads[0])
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {seed: of_one_seed(seed, options.folder) for seed in options.seeds}
    rows = table_rows(results)
    text = table(rows)
    print(f"\n## Sorting six digits: self-play and more supervised training, 2,000 held-out rows\n\n{text}")
    lower = [seed for seed, entries in results.items() if entries[3]["nll"] < entries[0]["nll"]]
    print(f"\nafter iteration 2, held-out NLL is lower than at the start on seeds {lower} of {options.seeds}")
    (options.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    content = json.dumps({"machine": machine(), "seeds": results}, indent=1)
    (options.folder / "results.json").write_text(content, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(content, encoding="utf-8")
    draw(results, options.folder / "curves.png")


if __name__ == "__main__":
    main()
