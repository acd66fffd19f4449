"""Key-value arithmetic (arXiv 2401.02412, section 4.1) over several seeds, beside its baselines.

    nox -s studies -- arithmetic --seeds 0 1 2 --json arithmetic.json

An augment knows 400 keys, an anchor adds and subtracts numbers modulo 11 (chance: 9.1 %), and 100 of the keys are held
out of training on expressions. Learned on the same expressions: the composition with the augment reading along or
reading the expression first, the same composition with an augment that knows nothing, and LoRA on the anchor with as
many parameters. Each accuracy is over 2,000 expressions. About two minutes a seed and row on one thread.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import arguments, report

from calm_pytorch.quickstart.quickstart import QuickstartSettings, run_quickstart

VARIANTS: dict[str, dict[str, Any]] = {
    "composed, reading along": {},
    "composed, reading first": {"reads": "prompt"},
    "composed, 2 connections": {"connections": 2},
    "composed, two Hugging Face models": {"models": "hugging-face"},
    "composed, x-transformers reading Hugging Face": {"models": "mixed"},
    "random augment": {"learner": "random-augment"},
    "LoRA on the anchor": {"learner": "low-rank"},
}


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2], "help": "one run of each variant for each"},
        steps={"type": int, "default": QuickstartSettings().max_steps, "help": "updates on expressions"},
        variants={"nargs": "+", "choices": list(VARIANTS), "default": list(VARIANTS), "help": "what to learn"},
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads[0])
    rows: list[dict[str, Any]] = []
    for name in options.variants:
        results = []
        for seed in options.seeds:
            settings = dataclasses.replace(QuickstartSettings(max_steps=options.steps, seed=seed), **VARIANTS[name])
            with tempfile.TemporaryDirectory() as folder:
                results.append(run_quickstart(settings, Path(folder) / "run"))
            print(name, seed, results[-1], flush=True)
        row: dict[str, Any] = {"learned": name, "parameters": results[0].learned}
        row |= {f"seed {seed}, %": 100 * one.held_out for seed, one in zip(options.seeds, results, strict=True)}
        row["mean, %"] = 100 * mean(one.held_out for one in results)
        row["trained keys, %"] = 100 * mean(one.trained_keys for one in results)
        row["anchor alone, %"] = " ".join(f"{100 * one.anchor_alone:.1f}" for one in results)
        row["numbers before, %"] = 100 * mean(one.numbers_before for one in results)
        row["numbers after, worst, %"] = 100 * min(one.numbers_after for one in results)
        row["s"] = mean(one.seconds for one in results)
        rows.append(row)
    report("Key-value arithmetic on held-out keys", rows, options.json)


if __name__ == "__main__":
    main()
