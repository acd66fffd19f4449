"""Description of the workspace for nox: distributions, bounds, archives, changed files and release tags.

No function has side effects: the sessions of the noxfile act on them, `tests/test_workspace.py` tests them.
Distributions are discovered: `core/` and every folder of `packages/` with a pyproject.toml.
"""

import functools
import re
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nox.project
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

# A change of one of these affects every distribution.
SHARED_FILES = ("core/", "noxfile.py", "pyproject.toml", "tests/constraints.txt", ".ci/", ".github/workflows/")


@dataclass(frozen=True)
class Distribution:
    """One installable folder: `pyproject.toml`, `src/<import name>/`, `tests/`."""

    folder: Path

    @functools.cached_property
    def pyproject(self) -> dict[str, Any]:
        return nox.project.load_toml(self.folder / "pyproject.toml")

    @property
    def project(self) -> dict[str, Any]:
        return dict(self.pyproject["project"])

    @property
    def name(self) -> str:
        return str(self.project["name"])

    @property
    def import_name(self) -> str:
        (package,) = (path.parent.name for path in self.folder.glob("src/*/__init__.py"))
        return package

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.import_name

    @property
    def version(self) -> str:
        """The static `__version__`, read without importing."""
        text = (self.source / "__init__.py").read_text("utf-8")
        found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
        if found is None:
            raise ValueError(f'{self.source}/__init__.py must have a line __version__ = "X.Y.Z"')
        return found[1]

    def group(self, name: str) -> tuple[str, ...]:
        """Requirements of a dependency group; empty if the distribution has no such group."""
        if name not in self.pyproject.get("dependency-groups", {}):
            return ()
        return tuple(nox.project.dependency_groups(self.pyproject, name))

    @property
    def quickstart(self) -> list[str]:
        """Subcommands of its quickstart: ``train``, or those listed in its pyproject.toml."""
        return list(self.pyproject.get("tool", {}).get("quickstart", {}).get("commands", ["train"]))

    @property
    def core_bound(self) -> SpecifierSet:
        """The versions of the core that a package allows."""
        (bound,) = (one.specifier for one in self.requirements(extras=False) if one.name == "lm-core")
        return bound

    def requirements(self, *, extras: bool) -> list[Requirement]:
        """Requirements of the distribution, its siblings included."""
        lines = list(self.project.get("dependencies", []))
        if extras:
            lines += [line for extra in self.project.get("optional-dependencies", {}).values() for line in extra]
        return [Requirement(line) for line in lines]


def find_distributions(root: Path = ROOT) -> dict[str, Distribution]:
    """Every distribution of the workspace by name, the core first."""
    folders = [root / "core", *sorted(path.parent for path in root.glob("packages/*/pyproject.toml"))]
    return {distribution.name: distribution for distribution in map(Distribution, folders)}


DISTRIBUTIONS = find_distributions()
CORE = DISTRIBUTIONS["lm-core"]
PACKAGES = [name for name in DISTRIBUTIONS if name != CORE.name]


def with_core(name: str) -> list[Distribution]:
    """A distribution and the core."""
    return [CORE] if name == CORE.name else [CORE, DISTRIBUTIONS[name]]


def quickstart_order() -> list[str]:
    """Packages with a command, PaLM's quickstart first."""
    with_command = [name for name in PACKAGES if name in DISTRIBUTIONS[name].project.get("scripts", {})]
    return sorted(with_command, key=lambda name: name != "palm-rlhf")


def group_of(distributions: Iterable[Distribution], name: str) -> list[str]:
    """One dependency group of several distributions, each line once."""
    return sorted({line for distribution in distributions for line in distribution.group(name)})


def foreign_requirements(distributions: Iterable[Distribution], *, extras: bool) -> list[Requirement]:
    """Requirements from an index: all but the workspace's own distributions."""
    asked = [wanted for distribution in distributions for wanted in distribution.requirements(extras=extras)]
    return [wanted for wanted in asked if canonicalize_name(wanted.name) not in DISTRIBUTIONS]


def lowest_versions(requirements: Iterable[Requirement]) -> list[str]:
    """Lowest version that the bounds allow of each requirement, as lines of a constraints file.

    Raises:
        ValueError: a requirement without a lower bound.
    """
    lowest: dict[str, Version] = {}
    for wanted in requirements:
        bounds = [Version(one.version) for one in wanted.specifier if one.operator in {">=", "==", "~="}]
        if not bounds:
            raise ValueError(f"every requirement must have a lower bound, got {wanted}")
        name = canonicalize_name(wanted.name)
        lowest[name] = max([*bounds, lowest.get(name, bounds[0])])
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


def oldest_release(tags: Iterable[str], bound: SpecifierSet) -> str | None:
    """Oldest of the core's release tags that a bound allows, or None."""
    versions = {tag: Version(tag.removeprefix(f"{CORE.name}-v")) for tag in tags}
    allowed = [tag for tag, version in versions.items() if bound.contains(version, prereleases=True)]
    return min(allowed, key=lambda tag: versions[tag], default=None)


def page_extras(page: str, name: str) -> str:
    """Extras (joined by commas) with which the install lines of a README install a distribution."""
    install = page.partition("\n## Install\n")[2].partition("\n## ")[0]
    folder = "core" if name == CORE.name else f"packages/{name}"
    match = re.search(rf"\./{re.escape(folder)}\[([\w,-]+)\]", install)
    return match[1] if match else ""


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """Requirements of a wheel on this machine, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = archive.read(name).decode("utf-8").partition("\n\n")[0].splitlines()
    listed = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    return [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]


def missing_from_archive(archive: Path, import_name: str) -> list[str]:
    """Patterns of the files that every sdist or wheel must contain and this one lacks."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
        wanted = [r"[^/]+\.dist-info/licenses/LICENSE", rf"{import_name}/py\.typed"]
    else:
        with tarfile.open(archive) as sdist:
            names = sdist.getnames()
        wanted = [r"[^/]+/LICENSE", r"[^/]+/CHANGELOG\.md", rf"[^/]+/src/{import_name}/py\.typed"]
    return [pattern for pattern in wanted if not any(re.fullmatch(pattern, name) for name in names)]


def affected_packages(changed_files: Iterable[str]) -> list[str]:
    """Distributions affected by a change of these files (paths relative to the root, with /)."""
    files = list(changed_files)
    if any(file.startswith(SHARED_FILES) for file in files):
        return list(DISTRIBUTIONS)
    folders = {name: DISTRIBUTIONS[name].folder.relative_to(ROOT).as_posix() + "/" for name in PACKAGES}
    return [name for name, folder in folders.items() if any(file.startswith(folder) for file in files)]


def select_sessions(listing: Iterable[dict[str, Any]], packages: Iterable[str], device: str | None = None) -> list[str]:
    """Sessions of these packages in the output of `nox --list --json`: of one device, or without a device."""
    wanted = set(packages)
    return [
        str(entry["session"])
        for entry in listing
        if entry["call_spec"].get("package") in wanted and entry["call_spec"].get("device") == device
    ]


def parse_release_tag(tag: str) -> Distribution:
    """The distribution that a tag `<distribution>-vX.Y.Z` releases.

    Raises:
        ValueError: an unknown distribution, another version than its source has, or no dated changelog heading.
    """
    name, separator, version = tag.rpartition("-v")
    if not separator or name not in DISTRIBUTIONS:
        raise ValueError(f"tag must be <distribution>-vX.Y.Z with one of {list(DISTRIBUTIONS)}, got {tag!r}")
    distribution = DISTRIBUTIONS[name]
    if version != distribution.version:
        raise ValueError(f"tag must carry the version of {name}, which is {distribution.version}, got {tag!r}")
    changelog = (distribution.folder / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        raise ValueError(f"the changelog of {name} must have a heading '## {version} (YYYY-MM-DD)' before its release")
    return distribution
