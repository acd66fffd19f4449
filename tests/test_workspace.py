"""The workspace describes itself rightly: sessions, CI's selection, bounds, archives and release tags."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@pytest.fixture(scope="module")
def listing(root: Path) -> list[dict[str, Any]]:
    """What CI builds its matrix from."""
    pytest.importorskip("nox")
    command = [sys.executable, "-m", "nox", "--list", "--json", "-s", "tests", "tests-min", "quickstart"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def copy_of_workspace(workspace: ModuleType, folder: Path, package: str) -> dict[str, Any]:
    """Writes a core and one package as small as they can be, and returns what is found there."""
    for place, name in ((folder / "core", "lm-core"), (folder / "packages" / package, package)):
        source = place / "src" / name.replace("-", "_")
        source.mkdir(parents=True)
        (source / "__init__.py").write_text('__version__ = "1.2.3"\n')
        (place / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return workspace.find_distributions(folder)


def test_a_new_package_is_found_without_an_edit(workspace: ModuleType, tmp_path: Path) -> None:
    found = copy_of_workspace(workspace, tmp_path, "new-model")

    assert [(one.name, one.import_name, one.version) for one in found.values()] == [
        ("lm-core", "lm_core", "1.2.3"),
        ("new-model", "new_model", "1.2.3"),
    ]


def test_every_package_folder_has_test_and_quickstart_sessions(
    workspace: ModuleType, listing: list[dict[str, Any]], root: Path
) -> None:
    folders = {path.name for path in (root / "packages").iterdir() if path.is_dir()}
    sessions = {entry["session"] for entry in listing}

    assert folders == set(workspace.PACKAGES)
    for name in ("lm-core", *folders):
        assert {f"tests({name}, cpu)", f"tests({name}, cuda)", f"tests-min({name})"} <= sessions
    assert {f"quickstart({name})" for name in folders} <= sessions


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["core/src/lm_core/rotary.py"], "all"),
        (["noxfile.py"], "all"),
        (["tests/constraints.txt"], "all"),
        (["packages/palm-rlhf/README.md"], ["palm-rlhf"]),
        (["packages/palm-rlhf-extra/README.md", "README.md", "tests/test_workspace.py"], []),
    ],
)
def test_a_change_selects_the_packages_that_stand_on_it(
    workspace: ModuleType, changed: list[str], expected: str | list[str]
) -> None:
    assert workspace.affected_packages(changed) == (list(workspace.DISTRIBUTIONS) if expected == "all" else expected)


def test_selected_sessions_are_those_of_the_package_and_the_device(
    workspace: ModuleType, listing: list[dict[str, Any]]
) -> None:
    tests = [entry for entry in listing if entry["name"] in {"tests", "tests-min"}]

    assert workspace.select_sessions(tests, ["palm-rlhf"], "cpu") == ["tests(palm-rlhf, cpu)"]
    assert workspace.select_sessions(tests, ["palm-rlhf"], "cuda") == ["tests(palm-rlhf, cuda)"]
    assert workspace.select_sessions(tests, ["palm-rlhf"]) == ["tests-min(palm-rlhf)"]
    assert workspace.select_sessions(tests, []) == []


def test_a_missing_gpu_skips_before_anything_is_installed_and_fails_where_one_is_required(
    root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nox")
    pytest.importorskip("virtualenv")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    command = [sys.executable, "-m", "nox", "--envdir", str(tmp_path), "-s", "tests(lm-core, cuda)"]

    def run(require: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "REQUIRE_CUDA": require}
        return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environ, check=False)

    skipped, failed = run("0"), run("1")
    assert skipped.returncode == 0, skipped.stderr
    assert "skipped: no CUDA device is visible" in skipped.stderr
    assert failed.returncode != 0, failed.stderr
    assert "no CUDA device is visible, and REQUIRE_CUDA=1" in failed.stderr
    assert "-m pip" not in skipped.stderr + failed.stderr


def test_lowest_versions_take_the_highest_of_the_lower_bounds(workspace: ModuleType) -> None:
    asked = map(Requirement, ["torch>=2.5", "Some_Thing>=1.2,<3", "some-thing[extra]~=1.4", "pinned==2.0.1"])

    assert workspace.lowest_versions(asked) == ["pinned==2.0.1", "some-thing==1.4", "torch==2.5"]


def test_the_oldest_core_is_the_lowest_release_within_the_bound(workspace: ModuleType) -> None:
    tags = ["lm-core-v0.0.9", "lm-core-v0.10.0", "lm-core-v0.1.1", "lm-core-v0.1.0", "lm-core-v1.0.0"]

    assert workspace.oldest_release(tags, SpecifierSet(">=0.1,<0.2")) == "lm-core-v0.1.0"
    assert workspace.oldest_release(tags, SpecifierSet(">=0.2,<1")) == "lm-core-v0.10.0"
    assert workspace.oldest_release([], SpecifierSet(">=0.1,<0.2")) is None


def test_every_package_allows_this_core_and_not_the_next_minor(workspace: ModuleType) -> None:
    major, minor, *_ = (int(part) for part in workspace.CORE.version.split("."))
    for name in workspace.PACKAGES:
        bound = workspace.DISTRIBUTIONS[name].core_bound

        assert bound.contains(workspace.CORE.version, prereleases=True), name
        assert not bound.contains(f"{major}.{minor + 1}.0"), name


def test_a_quickstart_is_the_train_command_unless_the_package_says_more(workspace: ModuleType) -> None:
    parts = {name: workspace.DISTRIBUTIONS[name].quickstart for name in workspace.PACKAGES}

    assert all(commands[0] == "train" for commands in parts.values()), parts
    assert parts["coca"] == ["train"]


def test_a_requirement_without_a_lower_bound_is_refused(workspace: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"must have a lower bound, got numpy<3"):
        workspace.lowest_versions([Requirement("numpy<3")])


def test_the_requirements_of_a_wheel_are_those_of_this_machine_without_extras(
    workspace: ModuleType, tmp_path: Path
) -> None:
    lines = ["Name: engine", "Requires-Dist: numpy<2,>=1", 'Requires-Dist: nothing; sys_platform == "amiga"']
    lines += ['Requires-Dist: soxr; extra == "audio"', 'Requires-Dist: torch==2.13.0; python_version >= "3"']
    with zipfile.ZipFile(tmp_path / "engine-1-py3-none-any.whl", "w") as archive:
        archive.writestr("engine-1.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: not-this\n")
    names = [one.name for one in workspace.wheel_requirements(tmp_path / "engine-1-py3-none-any.whl")]
    assert names == ["numpy", "torch"]


def test_every_distribution_declares_the_promised_bounds(workspace: ModuleType) -> None:
    for distribution in workspace.DISTRIBUTIONS.values():
        asked = {wanted.name: wanted.specifier for wanted in distribution.requirements(extras=False)}

        assert distribution.project["requires-python"] == ">=3.10"
        assert asked["torch"] == SpecifierSet(">=2.6")
        if distribution.name != "lm-core":
            assert {one.operator for one in asked["lm-core"]} == {">=", "<"}
            assert asked["lm-core"].contains(workspace.CORE.version, prereleases=True)


def test_every_distribution_names_what_its_tests_need(workspace: ModuleType) -> None:
    for distribution in workspace.DISTRIBUTIONS.values():
        needed = {Requirement(line).name for line in distribution.group("test")}

        assert {"pytest", "pytest-timeout"} <= needed, distribution.name
        assert not needed & set(workspace.DISTRIBUTIONS), f"{distribution.name} would take a sibling from an index"


def test_the_front_page_names_every_distribution(workspace: ModuleType, root: Path) -> None:
    page = (root / "README.md").read_text("utf-8")
    for name, distribution in workspace.DISTRIBUTIONS.items():
        readme = (distribution.folder / "README.md").relative_to(root).as_posix()

        assert f"| [`{name}`]({readme}) | `{distribution.import_name}` |" in page


def test_every_distribution_has_what_a_release_needs(workspace: ModuleType, root: Path) -> None:
    licence = (root / "LICENSE").read_text("utf-8")
    for distribution in workspace.DISTRIBUTIONS.values():
        changelog = (distribution.folder / "CHANGELOG.md").read_text("utf-8")
        newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)

        assert newest is not None, distribution.name
        assert newest[1] == distribution.version, distribution.name
        assert (distribution.folder / "LICENSE").read_text("utf-8") == licence
        assert (distribution.folder / "README.md").stat().st_size > 0
        assert (distribution.source / "py.typed").is_file()


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("palm-rlhf-0.1.0", "tag must be <distribution>-vX.Y.Z"),
        ("stranger-v1.0.0", "tag must be <distribution>-vX.Y.Z"),
        ("palm-rlhf-v99.0.0", "tag must carry the version of palm-rlhf"),
    ],
)
def test_a_wrong_release_tag_is_refused(workspace: ModuleType, tag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workspace.parse_release_tag(tag)


def test_a_release_tag_needs_a_dated_changelog_heading(
    workspace: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = copy_of_workspace(workspace, tmp_path, "new-model")
    monkeypatch.setattr(workspace, "DISTRIBUTIONS", found)
    changelog = tmp_path / "packages" / "new-model" / "CHANGELOG.md"

    changelog.write_text("# Changelog\n\n## 1.2.3 (unreleased)\n")
    with pytest.raises(ValueError, match=r"must have a heading '## 1\.2\.3 \(YYYY-MM-DD\)'"):
        workspace.parse_release_tag("new-model-v1.2.3")
    changelog.write_text("# Changelog\n\n## 1.2.3 (2026-01-31)\n")
    assert workspace.parse_release_tag("new-model-v1.2.3") == found["new-model"]


def test_an_archive_without_licence_or_type_marker_is_told(workspace: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "new_model-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("new_model/__init__.py", "")
        archive.writestr("new_model-1.2.3.dist-info/licenses/LICENSE", "MIT")
    assert workspace.missing_from_archive(wheel, "new_model") == [r"new_model/py\.typed"]

    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("new_model/py.typed", "")
    assert workspace.missing_from_archive(wheel, "new_model") == []
