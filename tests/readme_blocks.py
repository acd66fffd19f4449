"""Runs the blocks of Markdown pages as written, each alone in an empty folder: `python tests/readme_blocks.py PAGE...`.

A ```python block runs in a namespace of its own, a ```bash runnable block in a shell of its own. Other blocks (output,
commands that download or take long) open with another word and do not run. Only the standard library is used, so that
the environment can be the one that the page's own install lines make.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LONGEST = 540  # seconds of a page's blocks of one kind

RUN_ALONE = """
import os, sys
for place, (start, code) in enumerate({blocks!r}):
    folder = os.path.join({folder!r}, str(place))
    os.mkdir(folder)
    os.chdir(folder)
    # lines keep their numbers, so that a traceback points into the page
    exec(compile("\\n" * start + code, {page!r}, "exec"), {{"__name__": "__main__"}})
"""


def blocks_of(text: str, opening: str) -> list[tuple[int, str]]:
    """Fenced blocks that open with ```<opening>, each with the number of the line before its first."""
    fences = re.finditer(rf"^```{re.escape(opening)}[ \t]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in fences]


def run(command: list[str], folder: str) -> None:
    """Runs a command in a folder, with this interpreter's commands first on the path; exits if it fails."""
    scripts = str(Path(sys.executable).parent)
    environ = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environ, timeout=LONGEST, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def run_page(page: Path) -> int:
    """Runs a page's blocks; returns how many."""
    text = page.read_text("utf-8")
    blocks = blocks_of(text, "python")
    if blocks:
        with tempfile.TemporaryDirectory() as folder:
            run([sys.executable, "-c", RUN_ALONE.format(blocks=blocks, folder=folder, page=str(page))], folder)
    bash = shutil.which("bash") if os.name != "nt" else None
    commands = blocks_of(text, "bash runnable") if bash else []
    for _, code in commands:
        with tempfile.TemporaryDirectory() as folder:
            run([str(bash), "-euo", "pipefail", "-c", code], folder)
    return len(blocks) + len(commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    for page in parser.parse_args().pages:
        print(f"{page}: {run_page(page)} blocks ran, each alone")


if __name__ == "__main__":
    main()
