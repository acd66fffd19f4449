"""Imports point down the drawers and never in a circle, and the core names none of its users."""

import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "core/src/lm_core", *sorted(path.parent for path in ROOT.glob("packages/*/src/*/__init__.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_drawer_imports_a_higher_one(structure: ModuleType, source: Path) -> None:
    assert structure.upward_imports(structure.structure_of(source)) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_drawer_imports_itself_through_others(structure: ModuleType, source: Path) -> None:
    assert structure.structure_of(source).circles == []


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda source: source.name)
def test_every_command_line_has_the_same_modules(source: Path) -> None:
    modules = {file.stem for file in (source / "cli").glob("*.py")}
    assert modules == {"__init__"} or modules >= {"__init__", "train", "commands"}


def test_the_core_names_no_package(workspace: ModuleType) -> None:
    users = [workspace.DISTRIBUTIONS[name] for name in workspace.PACKAGES]
    names = "|".join(re.escape(name) for user in users for name in (user.name, user.import_name))
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in sorted((ROOT / "core/src").rglob("*.py"))
        for match in re.finditer(rf"\b({names})\b", file.read_text("utf-8"))
    ]
    assert found == []


def test_an_upward_import_and_a_circle_are_found(structure: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "small"
    for name, text in {
        "model/net.py": "from small.training.trainer import Trainer\n",
        "training/trainer.py": "def train():\n    from small.data import rows\n",
        "data/rows.py": "from ..model import net\n",
        "__init__.py": "from small.training.trainer import Trainer\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
        (package / name).with_name("__init__.py").touch()
    found = structure.structure_of(package)

    assert structure.upward_imports(found) == ["model.net -> small.training.trainer.Trainer"]
    assert found.circles == ["data", "model", "training"]
