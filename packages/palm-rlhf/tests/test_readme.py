"""What the README promises is guarded: every test it names exists."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]


def test_every_test_named_in_the_readme_exists():
    readme = PACKAGE / "README.md"
    core = PACKAGE.parents[1] / "core" / "tests"
    if not readme.is_file() or not core.is_dir():
        pytest.skip("not in the repository")
    named = set(re.findall(r"`(test_\w+)`", readme.read_text("utf-8")))
    files = [*(PACKAGE / "tests").glob("test_*.py"), *core.glob("test_*.py")]
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)}

    assert len(named) > 20
    assert named - written == set()
