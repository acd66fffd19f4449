"""Fixtures of the tests that cross distributions: the workspace's own description, and a clean subprocess."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = ["toy-model"]  # tests of a package that is not installed here


def load_from_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked or os.environ.get("REQUIRE_CUDA") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's folder."""
    return ROOT


def module_fixture(name: str) -> Any:
    """A fixture that is the module ``.ci/<name>.py``."""
    return pytest.fixture(scope="session", name=name)(lambda: load_from_file(name, ROOT / ".ci" / f"{name}.py"))


workspace = module_fixture("workspace")  # the distributions, as nox knows them
summaries = module_fixture("summaries")  # the table of finished runs
structure = module_fixture("structure")  # imports between the rooms of a distribution
traps = module_fixture("traps")  # the tables of traps in MIGRATING.md


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Every file of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """`run_python(*arguments)` runs this interpreter in an empty folder and returns what it printed."""

    def run(*arguments: str, timeout: float = 300.0) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{arguments[:2]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
