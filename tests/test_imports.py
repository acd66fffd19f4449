"""Importing one of ours costs little more than importing torch, and imports only ever point down."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Each costs between 0.3 s and 3 s to import, so each is imported where it is used.
HEAVY = {
    *("accelerate", "datasets", "einx", "faiss", "huggingface_hub", "jsonargparse", "matplotlib", "pandas", "peft"),
    *("pyarrow", "scipy", "timm", "tokenizers", "torchvision", "transformers", "x_transformers"),
}
ROOT = Path(__file__).resolve().parents[1]
FRONTS = [*ROOT.glob("core/src/*/__init__.py"), *sorted(ROOT.glob("packages/*/src/*/__init__.py"))]
IMPORT_NAMES = [front.parent.name for front in FRONTS]

MEASURE = """
import json, sys, time
started = time.process_time()
import {module}
print(json.dumps([time.process_time() - started, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


@pytest.mark.parametrize("import_name", IMPORT_NAMES)
def test_importing_loads_no_heavy_library_that_torch_does_not(
    import_name: str, run_python: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    seconds: dict[str, list[float]] = {"torch": [], import_name: []}
    loaded: dict[str, set[str]] = {}
    for _ in range(3):  # alternating, and the least of each, since the machine may be busy
        for module, times in seconds.items():
            spent, modules = json.loads(run_python("-c", MEASURE.format(module=module)))
            times.append(spent)
            loaded[module] = set(modules)
    torch_alone, ours = min(seconds["torch"]), min(seconds[import_name])
    with capsys.disabled():
        print(
            f"\nimport {import_name}: {ours:.2f} s of CPU, torch alone {torch_alone:.2f} s ({ours - torch_alone:+.2f})"
        )

    # A timing is no assertion; what decides it is which libraries come along.
    assert import_name in loaded[import_name]
    assert loaded[import_name] & HEAVY <= loaded["torch"]


def test_no_package_imports_another_and_the_core_imports_none(workspace: ModuleType, structure: ModuleType) -> None:
    ours = {one.import_name for one in workspace.DISTRIBUTIONS.values()}
    for distribution in workspace.DISTRIBUTIONS.values():
        allowed = {"lm_core", distribution.import_name}
        for file in distribution.source.rglob("*.py"):
            siblings = {name.split(".")[0] for name in structure.imported_modules(file, distribution.source)} & ours
            assert siblings <= allowed, f"{file} imports {sorted(siblings - allowed)}"


def test_an_upward_or_sideways_import_would_be_seen(tmp_path: Path, structure: ModuleType) -> None:
    package = tmp_path / "palm"
    (package / "inner").mkdir(parents=True)
    file = package / "inner" / "model.py"
    file.write_text(
        "import coca\nfrom ..trainer import Trainer\nfrom . import layers\ndef f():\n    from .. import cli\n"
    )

    assert set(structure.imported_modules(file, package)) == {
        "coca",
        "palm.trainer.Trainer",
        "palm.inner.layers",
        "palm.cli",
    }
