"""What a README shows runs as written.

Every fenced block that opens with exactly ```python is run, those of one file in order, in one process and an empty
folder; every block that opens with ```bash runnable is run by bash, likewise in an empty folder. Other blocks (output,
commands that download or take long) open with another word.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "core" / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
EXAMPLES = sorted(
    [*ROOT.glob("packages/*/examples/*.py"), *ROOT.glob("core/examples/*.py"), *ROOT.glob("tests/examples/*.py")]
)


def blocks_of(text: str, opening: str) -> list[tuple[int, str]]:
    """The fenced blocks that open with ```<opening>, each with the number of the line before its first."""
    found = re.finditer(rf"^```{re.escape(opening)}[ \t]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run(command: list[str], folder: Path) -> None:
    scripts = str(Path(sys.executable).parent)
    environ = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ, timeout=540, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_python_blocks_run_as_written(readme: Path, tmp_path: Path) -> None:
    blocks = blocks_of(readme.read_text("utf-8"), "python")
    # Each block keeps its line numbers, so that a traceback points into the README.
    script = tmp_path / "blocks.py"
    pieces = [f"exec(compile({chr(10) * start + code!r}, {str(readme)!r}, 'exec'))" for start, code in blocks]
    script.write_text("\n".join(pieces), encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()

    assert blocks or readme.parent == ROOT, f"{readme} must show the package at work in a ```python block"
    run([sys.executable, str(script)], folder)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_runnable_commands_run_as_written(readme: Path, tmp_path: Path) -> None:
    blocks = blocks_of(readme.read_text("utf-8"), "bash runnable")
    bash = shutil.which("bash")
    if not blocks or bash is None or os.name == "nt":
        pytest.skip("no runnable commands here, or no bash to run them")

    run([bash, "-euo", "pipefail", "-c", "\n".join(code for _, code in blocks)], tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    run([sys.executable, str(example)], tmp_path)


def test_blocks_are_found_with_their_lines() -> None:
    text = "# Title\n\n```python\nx = 1\n```\ntext\n```bash runnable\nls\n```\n```python no\ny\n```\n"

    assert blocks_of(text, "python") == [(3, "x = 1\n")]
    assert blocks_of(text, "bash runnable") == [(7, "ls\n")]
