"""Proves, in the environment that runs it, which of our distributions are installed, and that they are ours.

`python -I tests/installed_alone.py --present lm-core=lm_core=0.1.0 --absent coca calm_pytorch`. A name of ours may
belong to a stranger on the public index, so it is not enough that an import works: the module must lie in this
environment's site-packages, have our version, and come from a wheel file.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sysconfig
from pathlib import Path


def check_present(name: str, import_name: str, version: str) -> None:
    module = importlib.import_module(import_name)
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    location = Path(module.__file__ or "").resolve()
    if not location.is_relative_to(site_packages):
        raise SystemExit(f"{import_name} must come from {site_packages}, got {location}")
    distribution = importlib.metadata.distribution(name)
    if not distribution.version == module.__version__ == version:
        raise SystemExit(f"{name} must be {version}, got {distribution.version} and {module.__version__}")
    origin = json.loads(distribution.read_text("direct_url.json") or '{"url": "an index"}')["url"]
    if not (origin.startswith("file:") and origin.endswith(".whl")):
        raise SystemExit(f"{name} must be installed from a wheel file, got {origin}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--present", nargs="+", default=[], metavar="DISTRIBUTION=IMPORT=VERSION")
    parser.add_argument("--absent", nargs="*", default=[], metavar="IMPORT")
    arguments = parser.parse_args()
    for entry in arguments.present:
        check_present(*entry.split("="))
    found = [import_name for import_name in arguments.absent if importlib.util.find_spec(import_name)]
    if found:
        raise SystemExit(f"only {arguments.present} may be importable, found {found} too")
    print(f"Installed from wheel files, and no other of ours: {', '.join(arguments.present)}")


if __name__ == "__main__":
    main()
