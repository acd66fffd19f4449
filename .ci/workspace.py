"""What the noxfile knows about the workspace: its distributions, their bounds, archives, changes and release tags.

Only facts and decisions, no side effects: the sessions of the noxfile act on them, `tests/test_workspace.py` tests
them. A distribution is found by looking: `core/` and every folder of `packages/` with a pyproject.toml.
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

# A change of one of these concerns every distribution, since all stand on it.
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
        """The requirements of one dependency group; none where the distribution has no such group."""
        if name not in self.pyproject.get("dependency-groups", {}):
            return ()
        return tuple(nox.project.dependency_groups(self.pyproject, name))

    @property
    def quickstart(self) -> list[str]:
        """The subcommands that make up its quickstart: ``train``, unless its pyproject.toml says more."""
        return list(self.pyproject.get("tool", {}).get("quickstart", {}).get("commands", ["train"]))

    @property
    def core_bound(self) -> SpecifierSet:
        """The versions of the core that a package allows."""
        (bound,) = (one.specifier for one in self.requirements(extras=False) if one.name == "lm-core")
        return bound

    def requirements(self, *, extras: bool) -> list[Requirement]:
        """What the distribution asks for, its own siblings included."""
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
    """A distribution and the core it stands on."""
    return [CORE] if name == CORE.name else [CORE, DISTRIBUTIONS[name]]


def quickstart_order() -> list[str]:
    """The packages with a command of their own; PaLM's quickstart is the one to see first."""
    with_command = [name for name in PACKAGES if name in DISTRIBUTIONS[name].project.get("scripts", {})]
    return sorted(with_command, key=lambda name: name != "palm-rlhf")


def group_of(distributions: Iterable[Distribution], name: str) -> list[str]:
    """One dependency group of several distributions, each line once."""
    return sorted({line for distribution in distributions for line in distribution.group(name)})


def foreign_requirements(distributions: Iterable[Distribution], *, extras: bool) -> list[Requirement]:
    """What these distributions ask for from an index: everything but one another."""
    asked = [wanted for distribution in distributions for wanted in distribution.requirements(extras=extras)]
    return [wanted for wanted in asked if canonicalize_name(wanted.name) not in DISTRIBUTIONS]


def lowest_versions(requirements: Iterable[Requirement]) -> list[str]:
    """The lowest version that the bounds allow of each, as lines of a constraints file.

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
    """Of the core's release tags, the oldest that a bound allows; None where there is none."""
    versions = {tag: Version(tag.removeprefix(f"{CORE.name}-v")) for tag in tags}
    allowed = [tag for tag, version in versions.items() if bound.contains(version, prereleases=True)]
    return min(allowed, key=lambda tag: versions[tag], default=None)


def missing_from_archive(archive: Path, import_name: str) -> list[str]:
    """The files (as patterns) that every sdist or wheel of ours must carry and this one does not."""
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
    """The distributions that a change of these files (relative to the root, with /) concerns."""
    files = list(changed_files)
    if any(file.startswith(SHARED_FILES) for file in files):
        return list(DISTRIBUTIONS)
    folders = {name: DISTRIBUTIONS[name].folder.relative_to(ROOT).as_posix() + "/" for name in PACKAGES}
    return [name for name, folder in folders.items() if any(file.startswith(folder) for file in files)]


def select_sessions(listing: Iterable[dict[str, Any]], packages: Iterable[str], device: str | None = None) -> list[str]:
    """From what `nox --list --json` prints, the sessions of these packages: those of one device, or without any."""
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
