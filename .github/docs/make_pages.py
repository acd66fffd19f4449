"""Generates pages of the site: Markdown files of the repository with their links adapted, interfaces, and the traps.

Run by mkdocs (gen-files); a link that leads to no file of the repository ends the build.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

from traps import tests_under, traps_of  # noqa: E402
from workspace import CORE, DISTRIBUTIONS, PACKAGES, Distribution  # noqa: E402

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "tests/examples": "together.md"}
for one in DISTRIBUTIONS.values():
    folder = one.folder.relative_to(ROOT).as_posix()
    files = {"README": "index", "BENCHMARKS": "benchmarks", "MIGRATING": "migrating", "CHANGELOG": "changes"}
    for file, page in files.items():
        if (one.folder / f"{file}.md").is_file():
            PAGES[f"{folder}/{file}.md"] = f"{one.name}/{page}.md"


def outside_code(text: str, change: re.Pattern[str], replace: object) -> str:
    """``change.sub`` everywhere but in fenced blocks."""
    parts = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else change.sub(replace, part) for number, part in enumerate(parts))


def turned(text: str, source: str, page: str) -> str:
    """A Markdown file's text with its relative links adapted to the site."""

    def turn(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if "://" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path not in PAGES:
            PAGES[path] = shown_file(path)
        link = posixpath.relpath(PAGES[path], posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{hash_}{anchor}{match[3]}"

    # the highlighter does not know fences with a word after the language ("bash runnable")
    text = re.sub(r"^```(\w+) +\w+[ \t]*$", r"```\1", text, flags=re.MULTILINE)
    return outside_code(text, LINK, turn)


def shown_file(path: str) -> str:
    """Copies a file of the repository to the site; returns its path there."""
    file = ROOT / path
    if not file.is_file():
        raise SystemExit(f"a link leads to {path}, which does not exist")
    if file.suffix in {".png", ".svg"}:
        place = path.removeprefix(".github/docs/")
        if place == path:
            with mkdocs_gen_files.open(place, "wb") as out:
                out.write(file.read_bytes())
        return place
    place = f"files/{path}.md".replace("/.", "/")
    language = {".py": "python", ".toml": "toml", ".yml": "yaml"}.get(file.suffix, "text")
    write(place, f"# `{path}`\n\n````{language}\n{file.read_text('utf-8')}\n````\n")
    return place


def write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as out:
        out.write(text)


def public_modules(distribution: Distribution) -> list[str]:
    """Modules without a leading underscore, and the folders that export names themselves."""
    names = []
    for file in sorted(distribution.source.rglob("*.py")):
        parts = file.relative_to(distribution.source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1] if "__all__" in file.read_text("utf-8") else ()
        if parts and not any(part.startswith("_") for part in parts):
            names.append(".".join((distribution.import_name, *parts)))
    return names


def front_of(distribution: Distribution) -> dict[str, str]:
    """Names that a distribution's `__init__` imports from its own modules, with the module of each."""
    tree = ast.parse((distribution.source / "__init__.py").read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: str(node.module) for node in found for alias in node.names if node.module != "importlib"}


def interface(distribution: Distribution) -> str:
    """Page of a package's public names; for the core, module by module."""
    name = distribution.import_name
    lines = [f"# `{name}`", "", f"Public names of `{name}`. [Purpose and first steps](index.md)", ""]
    if distribution.name == CORE.name:
        offered = [f"[`{offered}`][{origin}.{offered}]" for offered, origin in sorted(front_of(distribution).items())]
        lines += [", ".join(offered) + ".", "", "Each is documented with the module that it comes from:", ""]
    else:
        return "\n".join(
            [*lines, f"::: {name}", "    options:", "      heading_level: 2", "      show_root_toc_entry: false", ""]
        )
    for module in public_modules(distribution):
        lines += [f"::: {module}", "    options:", "      heading_level: 2", "      show_root_full_path: true", ""]
    return "\n".join(lines)


def traps_page() -> str:
    lines = [
        "# Traps of the originals, and the tests that guard them",
        "",
        "Each package keeps the ideas of an earlier implementation and its call forms, and none of what went wrong in",
        "it. Here is every such trap with the tests that fail if it comes back; the tables are those of each package's",
        "page about migrating.",
        "",
    ]
    for name in PAGES_WITH_TRAPS:
        distribution = DISTRIBUTIONS[name]
        known = tests_under(distribution.folder / "tests", CORE.folder / "tests", ROOT / "tests")
        traps = [trap for trap in traps_of((distribution.folder / "MIGRATING.md").read_text("utf-8")) if trap.guards]
        if not traps:
            continue
        lines += [f"## {name}", "", "| the original | here | guarded by |", "|---|---|---|"]
        for trap in traps:
            first, *rest = trap.cells.values()
            guards = "<br>".join(f"`{guard}` ({where(known.get(guard, []))})" for guard in trap.guards)
            if len(rest) > 1:  # a table whose first column names the matter
                first, rest = f"{first}: {rest[0]}", rest[1:]
            lines.append(f"| {first} | {'; '.join(rest)} | {guards} |")
        lines.append("")
    return "\n".join(lines)


def where(files: list[Path]) -> str:
    return ", ".join(file.relative_to(ROOT).as_posix() for file in files) or "nowhere"


def examples_of(folder: Path) -> str:
    """Links to the examples in a folder, each with its first line."""
    lines = []
    for file in sorted(folder.glob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        first = re.search(r'^(?:r|)"""(.+)', file.read_text("utf-8"))
        PAGES.setdefault(path, shown_file(path))
        lines.append(f"- [`{file.name}`](../{PAGES[path]}): {first[1] if first else ''}".replace('"""', ""))
    return "\n".join(lines)


PAGES_WITH_TRAPS = sorted(PACKAGES, key=lambda name: name != "palm-rlhf")

for source, page in [item for item in PAGES.items() if item[0].endswith(".md")]:
    text = turned((ROOT / source).read_text("utf-8"), source, page)
    if page.endswith("/index.md"):
        name = page.partition("/")[0]
        examples = examples_of(DISTRIBUTIONS[name].folder / "examples")
        text += f"\n## Examples\n\n{examples}\n" if examples else ""
        text += "\n[The whole interface](api.md), [changes](changes.md)\n"
    write(page, text)
for distribution in DISTRIBUTIONS.values():
    write(f"{distribution.name}/api.md", interface(distribution))
write("traps.md", traps_page())
together = (ROOT / ".github/docs/together.md").read_text("utf-8")
write("together.md", together + "\n" + examples_of(ROOT / "tests" / "examples").replace("](../", "](") + "\n")
