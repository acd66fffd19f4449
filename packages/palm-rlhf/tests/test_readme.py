"""Every test that the pages name exists."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]


def test_every_test_named_in_the_pages_exists():
    core = PACKAGE.parents[1] / "core" / "tests"
    if not (PACKAGE / "README.md").is_file() or not core.is_dir():
        pytest.skip("not in the repository")
    named = {name for page in PACKAGE.glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}
    files = [*(PACKAGE / "tests").glob("test_*.py"), *core.glob("test_*.py")]
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)}

    assert len(named) > 20
    assert named - written == set()
