"""Summaries of finished runs (`summary.json` in a run's folder), and the quickstarts' table of them.

A summary holds `results` (the key one first), each with `name`, `before` (or null), `after` and `better` (lower or
higher), and `steps` and `seconds` (or null).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKS = {"lower": "↓", "higher": "↑"}


def find_summaries(folder: Path) -> dict[Path, int]:
    """Every summary under a folder, with the time it was written (ns)."""
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("summary.json"))}


def changed_since(before: Mapping[Path, int], folder: Path) -> list[Path]:
    """The summaries under a folder that were written since ``before`` was found."""
    return [file for file, written in find_summaries(folder).items() if before.get(file) != written]


def read_summary(file: Path) -> dict[str, Any]:
    """A summary in the form of this module's docstring.

    Raises:
        ValueError: the file has another form.
    """
    summary = json.loads(file.read_text("utf-8"))
    if not isinstance(summary, dict) or not summary.get("results"):
        raise ValueError(f"{file} must hold results")
    for result in summary["results"]:
        if not {"name", "before", "after", "better"} <= set(result) or result["better"] not in MARKS:
            raise ValueError(
                f"{file}: a result must have name, before, after and better (lower or higher), got {result}"
            )
    return summary


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def summary_table(outcomes: Mapping[str, str], summaries: Mapping[str, Sequence[Path]], root: Path) -> str:
    """Table of each command's outcome and results.

    Args:
        outcomes: each command's time, or "failed".
        summaries: files written by each command.
        root: folder that printed paths are relative to.
    """
    rows = [("command", "took", "result", "before", "after", "folder")]
    for command, outcome in outcomes.items():
        lines = [
            (f"{result['name']} {MARKS[result['better']]}", number(result["before"]), number(result["after"]), folder)
            for file in summaries.get(command, ())
            for folder in [file.parent.relative_to(root).as_posix()]
            for result in read_summary(file)["results"]
        ]
        for place, line in enumerate(lines or [("", "", "", "")]):
            rows.append((command, outcome, *line) if place == 0 else ("", "", *line))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
