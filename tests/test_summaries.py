"""The quickstarts' table holds what each run wrote about itself."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def write_summary(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "summary.json"
    file.write_text(json.dumps({"results": list(results), "steps": 10, "seconds": 1.5}))
    return file


BITS = {"name": "held-out bits/byte", "before": 8.149, "after": 2.18, "better": "lower"}
ACCURACY = {"name": "zero-shot accuracy", "before": None, "after": 0.9861, "better": "higher"}


def test_only_what_was_written_since_counts(summaries: ModuleType, tmp_path: Path) -> None:
    old, again = write_summary(tmp_path / "old", BITS), write_summary(tmp_path / "again", BITS)
    before = summaries.find_summaries(tmp_path)
    os.utime(again, ns=(1, 1))
    new = write_summary(tmp_path / "deep" / "new", ACCURACY)

    assert set(summaries.changed_since(before, tmp_path)) == {again, new}
    assert old in before


def test_the_table_has_a_row_for_each_result_and_each_failure(summaries: ModuleType, tmp_path: Path) -> None:
    file = write_summary(tmp_path / "runs" / "palm", BITS, ACCURACY)

    table = summaries.summary_table({"palm train": "111 s", "coca train": "failed"}, {"palm train": [file]}, tmp_path)
    lines = [line.split() for line in table.splitlines()]

    assert lines[0] == ["command", "took", "result", "before", "after", "folder"]
    assert lines[2] == ["palm", "train", "111", "s", "held-out", "bits/byte", "↓", "8.149", "2.18", "runs/palm"]
    assert lines[3] == ["zero-shot", "accuracy", "↑", "0.9861", "runs/palm"]
    assert lines[4] == ["coca", "train", "failed"]


@pytest.mark.parametrize("wrong", [{}, {"results": []}, {"results": [{**BITS, "better": "best"}]}, {"results": [{}]}])
def test_a_summary_of_another_form_is_refused(summaries: ModuleType, tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(wrong))

    with pytest.raises(ValueError, match=r"summary\.json"):
        summaries.read_summary(file)
