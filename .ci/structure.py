"""The structure of a distribution: rooms (top-level modules and folders), arrows (imports between rooms), floors.

`python .ci/structure.py` prints one row a distribution; `tests/test_structure.py` asserts the directions.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The drawers of a package from top to bottom; imports point down or stay on one floor.
DRAWERS = (
    ("cli",),
    ("quickstart",),
    ("interop",),
    ("rl",),
    ("pretrain", "reward", "training"),
    ("evaluation",),
    ("data",),
    ("model",),
    ("memory",),
)


@dataclass(frozen=True)
class Structure:
    """What a distribution is made of.

    Attributes:
        rooms: top-level modules and folders, without `__init__` and `__main__`.
        arrows: pairs of rooms, the first of which imports the second.
        imports: for each arrow the modules that make it, as "importer -> imported".
    """

    rooms: frozenset[str]
    arrows: frozenset[tuple[str, str]]
    imports: dict[tuple[str, str], tuple[str, ...]]

    @property
    def circles(self) -> list[str]:
        """Rooms that import themselves through others."""
        return sorted(room for room in self.rooms if room in self._above(room))

    @property
    def floors(self) -> int:
        """Length of the longest chain of imports; rooms of a circle count once."""
        level: dict[str, int] = {}

        def height(room: str, path: tuple[str, ...]) -> int:
            if room in path:
                return 0
            if room not in level or path:
                below = [height(other, (*path, room)) for one, other in self.arrows if one == room]
                level[room] = 1 + max(below, default=0)
            return level[room]

        return max((height(room, ()) for room in self.rooms), default=0)

    def _above(self, room: str) -> set[str]:
        reached: set[str] = set()
        pending = [room]
        while pending:
            current = pending.pop()
            for importer, imported in self.arrows:
                if importer == current and imported not in reached:
                    reached.add(imported)
                    pending.append(imported)
        return reached


def imported_modules(file: Path, package: Path) -> Iterator[str]:
    """The full names of what a file imports, anywhere in it, relative imports resolved."""
    parents = [package.name, *file.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(file.read_text("utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def structure_of(package: Path) -> Structure:
    """The structure of the package in a folder such as `core/src/lm_core`."""
    fronts = {"__init__", "__main__"}
    names = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    rooms = frozenset(names - fronts)
    imports: dict[tuple[str, str], list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        room = file.relative_to(package).with_suffix("").parts[0]
        for imported in imported_modules(file, package):
            parts = imported.split(".")
            if room in rooms and parts[0] == package.name and len(parts) > 1 and parts[1] in rooms - {room}:
                importer = ".".join(file.relative_to(package).with_suffix("").parts)
                imports.setdefault((room, parts[1]), []).append(f"{importer} -> {imported}")
    return Structure(rooms, frozenset(imports), {arrow: tuple(lines) for arrow, lines in imports.items()})


def upward_imports(structure: Structure) -> list[str]:
    """The imports of a package that point from a lower drawer to a higher one."""
    floor = {name: number for number, names in enumerate(DRAWERS) for name in names}
    return sorted(
        line
        for (importer, imported), lines in structure.imports.items()
        if importer in floor and imported in floor and floor[imported] < floor[importer]
        for line in lines
    )


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    print(f"{'distribution':24} modules rooms floors arrows circle")
    for source in [root / "core/src/lm_core", *sorted(root.glob("packages/*/src/*/"))]:
        structure = structure_of(source)
        modules = sum(1 for _ in source.rglob("*.py"))
        counts = f"{modules:7} {len(structure.rooms):5} {structure.floors:6} {len(structure.arrows):6}"
        print(f"{source.name:24} {counts} {', '.join(structure.circles) or 'none'}")
        for line in upward_imports(structure):
            print(f"    upward: {line}")
