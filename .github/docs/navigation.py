"""The site's navigation, with a page and an interface for every distribution that there is. Run by mkdocs (hooks)."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".ci"))

from workspace import DISTRIBUTIONS


def on_config(config: Any) -> Any:
    """Adds ``nav`` to the configuration."""
    config["nav"] = [
        "index.md",
        "design.md",
        "traps.md",
        {"Packages": [{name: f"{name}/index.md"} for name in DISTRIBUTIONS]},
        {"Interfaces": [{one.import_name: f"{name}/api.md"} for name, one in DISTRIBUTIONS.items()]},
        {"Working together": "together.md"},
        "contributing.md",
    ]
    return config
