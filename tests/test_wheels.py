"""Each wheel brings its own module and nothing else of ours, with licence, type marker and a bounded core.

That a wheel works alone is what every `tests(<distribution>, cpu)` session proves; here is what the files say.
"""

import email
import importlib
import importlib.metadata
import os
import re
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def wheels(workspace: ModuleType) -> dict[str, zipfile.ZipFile]:
    """The wheel files that this environment was made from, by distribution."""
    folder = os.environ.get("WORKSPACE_WHEELS")
    if folder is None:
        pytest.skip("no wheels were built; nox -s integration builds them")
    found = {path.name.split("-")[0]: path for path in sorted(Path(folder).glob("*.whl"))}
    return {name: zipfile.ZipFile(found[name.replace("-", "_")]) for name in workspace.DISTRIBUTIONS}


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
    return email.message_from_string(wheel.read(name).decode("utf-8"))


def test_a_wheel_holds_its_own_module_and_nothing_else(
    workspace: ModuleType, wheels: dict[str, zipfile.ZipFile]
) -> None:
    for name, wheel in wheels.items():
        top = {entry.split("/")[0] for entry in wheel.namelist() if ".dist-info/" not in entry}
        assert top == {workspace.DISTRIBUTIONS[name].import_name}


def test_a_wheel_carries_licence_and_type_marker(workspace: ModuleType, wheels: dict[str, zipfile.ZipFile]) -> None:
    for name, wheel in wheels.items():
        import_name = workspace.DISTRIBUTIONS[name].import_name
        assert workspace.missing_from_archive(Path(str(wheel.filename)), import_name) == []


def test_a_wheel_asks_for_no_sibling_but_the_core_within_bounds(
    workspace: ModuleType, wheels: dict[str, zipfile.ZipFile]
) -> None:
    for name, wheel in wheels.items():
        asked = [Requirement(line) for line in metadata_of(wheel).get_all("Requires-Dist", [])]
        siblings = {one.name: one.specifier for one in asked if one.name in workspace.DISTRIBUTIONS}

        assert set(siblings) == (set() if name == "lm-core" else {"lm-core"})
        for bound in siblings.values():
            assert bound.contains(workspace.CORE.version, prereleases=True)
            assert not bound.contains("99.0")


def test_what_is_installed_is_ours(workspace: ModuleType, wheels: dict[str, zipfile.ZipFile]) -> None:
    for name, distribution in workspace.DISTRIBUTIONS.items():
        module = importlib.import_module(distribution.import_name)
        location = Path(str(module.__file__)).resolve()

        assert metadata_of(wheels[name])["Version"] == importlib.metadata.version(name) == module.__version__
        assert distribution.folder not in location.parents
