"""The blocks of every page run as written, each alone, and so does every example."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("core/*.md")), *sorted(ROOT.glob("packages/*/*.md"))]
EXAMPLES = sorted(
    [*ROOT.glob("packages/*/examples/*.py"), *ROOT.glob("core/examples/*.py"), *ROOT.glob("tests/examples/*.py")]
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_runs_alone(page: Path, run_python: Callable[..., str]) -> None:
    printed = run_python(str(ROOT / "tests" / "readme_blocks.py"), str(page), timeout=580)
    if page.name == "README.md":
        assert f"{page}: 0 blocks" not in printed, f"{page} must show the package at work in a ```python block"


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_runs(example: Path, run_python: Callable[..., str]) -> None:
    run_python(str(example), timeout=580)


def test_a_block_that_needs_another_fails_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n```python no\ny\n```\n```python\nprint(x)\n```\n")
    command = [sys.executable, str(ROOT / "tests" / "readme_blocks.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'page.md", line 10, in <module>' in done.stderr
    assert "name 'x' is not defined" in done.stderr


def test_the_install_lines_of_a_page_name_its_extras(workspace: ModuleType) -> None:
    lines = 'pip install ./core "./packages/new-model[plot,hf]"'
    assert workspace.page_extras(f"# A\n\n## Install\n\n```bash\n{lines}\n```\n\n## Next\n", "new-model") == "plot,hf"
    assert workspace.page_extras("# A\n\n## Install\n\n```bash\npip install ./core\n```\n", "new-model") == ""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name == "README.md"], ids=name_of)
def test_a_page_installs_pytorchs_cpu_build_by_its_full_address(page: Path) -> None:
    (install,) = (part for part in page.read_text("utf-8").split("\n## ") if part.startswith("Install\n"))
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu\n" in install
    assert "pip install ./core" in install
