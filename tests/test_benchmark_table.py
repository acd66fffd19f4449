"""The rows of all scripts beside peers become one table, in three forms."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent / "benchmarks" / "one_table.py"
FAST = "times as fast"
MACHINE = {"processor": "a processor", "cores": 2, "python": "3.12", "torch": "2.13"}


def row(what: str, size: int, **more: Any) -> dict[str, Any]:
    series = {"axis": "new tokens", "size": size, "cost": size / 10, "peer cost": size / 5, "unit": "s"}
    return {
        "what": what,
        "threads": 1,
        "somebody's": "5 tokens/s",
        "ours": "10 tokens/s",
        "times as fast": 2.0,
        **series,
    } | more


def run(folder: Path, **files: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"A title": {"machine": MACHINE, "rows": rows}}))
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rows_of_several_scripts_are_one_table_with_their_package_and_their_growth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("decoding 16", 16), row("decoding 64", 64, **{"share of limit": 0.5, "recall": 0.99})]
    memory = {name: value for name, value in row("kept", 8, **{"times as small": 31.0}).items() if name != FAST}
    done = run(tmp_path, peers_palm_rlhf=rows, peers_hugging_face=[row("decoding", 8)], peers_coca_original=[memory])

    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [entry["package"] for entry in written["rows"]] == ["coca", "hugging face", "palm-rlhf", "palm-rlhf"]
    assert written["machines"] == [MACHINE]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| palm-rlhf | decoding 64 | 1 | somebody's | 5 tokens/s | 10 tokens/s | 2 |  | 0.5 | recall 0.99 |" in text
    assert "| coca | kept | 1 | somebody's | 5 tokens/s | 10 tokens/s |  | 31 |" in text
    assert "How cost grows: palm-rlhf, new tokens (s)" in text
    assert "hugging face, new tokens" not in text  # one size is no growth
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lacking", ["ours", "times as fast", "somebody's"])
def test_a_row_that_lacks_something_is_told(tmp_path: Path, lacking: str) -> None:
    wrong = {name: value for name, value in row("decoding", 8).items() if name != lacking}

    done = run(tmp_path, peers_coca_original=[wrong])
    assert done.returncode != 0
    assert "coca, 'A title': a row must have" in done.stderr


def test_no_rows_are_no_table(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode != 0
    assert "holds no rows" in done.stderr
