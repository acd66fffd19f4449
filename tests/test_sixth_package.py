"""A sixth package is a folder: sessions, documentation and the common vocabulary take it without an edit elsewhere.

``tests/toy-model`` is copied into a copy of the checkout.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "toy-model"
LINES = 160

# Enough of mkdocs-gen-files to make the pages in a folder.
GEN_FILES = """
from pathlib import Path
import sys
def open(name, mode):
    file = Path(sys.argv[1], name)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open(mode)
"""
MAKE_PAGES = """
import runpy, sys, types
runpy.run_path({script!r})
hook = runpy.run_path({hook!r})
import json
print(json.dumps(hook["on_config"]({{}})["nav"]))
"""


@pytest.fixture(scope="module")
def copy(root: Path, tracked_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's files, with the toy as its sixth package."""
    target = tmp_path_factory.mktemp("workspace")
    for file in tracked_files:
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    shutil.move(target / "tests" / NAME, target / "packages" / NAME)
    shutil.copyfile(target / "LICENSE", target / "packages" / NAME / "LICENSE")
    return target


def run(copy: Path, *command: str, timeout: float = 300, **environ: str) -> str:
    sources = [str(path) for path in (copy / "core" / "src", *sorted(copy.glob("packages/*/src")))]
    path = os.pathsep.join([*environ.pop("PYTHONPATH", "").split(), *sources])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, **environ},
        check=False,
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    )
    return done.stdout


def test_the_toy_is_small(root: Path) -> None:
    files = [file for file in (root / "tests" / NAME).rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= LINES


def test_nox_lists_its_sessions(copy: Path) -> None:
    pytest.importorskip("nox")
    listed = json.loads(run(copy, "-m", "nox", "--list", "--json", "-s", "tests", "tests-min", "quickstart"))
    sessions = {entry["session"] for entry in listed}
    assert {f"tests({NAME}, cpu)", f"tests-min({NAME})", f"quickstart({NAME})"} <= sessions


def test_its_documentation_is_made(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("nox")
    (tmp_path / "mkdocs_gen_files.py").write_text(GEN_FILES)
    script, hook = (str(copy / ".github" / "docs" / name) for name in ("make_pages.py", "navigation.py"))
    printed = run(
        copy,
        "-c",
        MAKE_PAGES.format(script=script, hook=hook),
        str(tmp_path / "site"),
        PYTHONPATH=str(tmp_path),
    )
    assert "::: toy_model" in (tmp_path / "site" / NAME / "api.md").read_text("utf-8")
    assert f"{NAME}/index.md" in printed
    assert f"{NAME}/api.md" in printed


def test_the_common_vocabulary_and_directions_hold_for_it(copy: Path) -> None:
    files = ("tests/test_vocabulary.py", "tests/test_structure.py")
    printed = run(copy, "-m", "pytest", "-q", *files, "-p", "no:cacheprovider", timeout=600)
    assert "failed" not in printed


@pytest.mark.slow
def test_its_tests_session_passes(copy: Path, workspace: object, tmp_path: Path) -> None:
    """The session makes an environment of its own, in which what is installed here need not be installed again."""
    for module in ("nox", "virtualenv"):
        pytest.importorskip(module)
    ours = {"toy_model"}
    for distribution in workspace.DISTRIBUTIONS.values():  # type: ignore[attr-defined]
        ours.add(distribution.import_name)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for folder in [path for path in sys.path if path.endswith("site-packages")]:
        for entry in Path(folder).iterdir():
            if entry.name.split("-", 1)[0] not in ours and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
    environment = tmp_path / "nox" / "tests-toy-model-cpu"
    subprocess.run([sys.executable, "-m", "virtualenv", "--quiet", str(environment)], check=True, timeout=120)
    (site,) = environment.glob("[Ll]ib*/**/site-packages")
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    command = ("-m", "nox", "--envdir", str(tmp_path / "nox"), "--reuse-venv", "yes", "-s", f"tests({NAME}, cpu)")
    run(copy, *command, timeout=580, CI="")
