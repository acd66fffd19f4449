"""Every test that MIGRATING.md names as the guard against a trap exists, and its tables are parsed correctly."""

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(ROOT.glob("packages/*"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_named_guard_exists(package: Path, traps: ModuleType) -> None:
    page = (package / "MIGRATING.md").read_text("utf-8")
    known = traps.tests_under(package / "tests", ROOT / "core" / "tests", ROOT / "tests")

    named = {guard for trap in traps.traps_of(page) for guard in trap.guards}
    assert sorted(named - set(known)) == []
    assert named, f"{package.name}/MIGRATING.md must name the tests that guard it against the original's traps"


def test_a_table_of_traps_is_read_cell_by_cell(traps: ModuleType) -> None:
    readme = "| original | here | guarded by |\n|---|---|---|\n| `a | b` | c | `test_one`, `test_two` |\n| d | e | |\n"

    assert traps.traps_of(readme + "\n| x | y |\n|---|---|\n| z | `test_three` |\n") == [
        traps.Trap({"original": "`a | b`", "here": "c"}, ("test_one", "test_two")),
        traps.Trap({"original": "d", "here": "e"}, ()),
    ]
