"""The front page's lines for pip, uv and poetry pin a package by commit, tried against a local git remote."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pip._internal.models.index import PyPI  # pip's default; poetry and uv must be told the same index


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """No line for every request."""


@pytest.fixture(scope="module")
def remote(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL of a git remote with this checkout's last commit, and the commit."""
    folder = tmp_path_factory.mktemp("remote")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if head.returncode != 0:
        pytest.skip("not a git checkout")
    subprocess.run(["git", "clone", "--quiet", "--bare", str(root), str(folder / "remote.git")], check=True)
    # a plain HTTP server suffices for git once this index is written
    subprocess.run(["git", "update-server-info"], cwd=folder / "remote.git", check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/remote.git", head.stdout.strip()
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """`run(*words)` runs a command in an empty folder, against the index that pip is configured for."""
    pip = [sys.executable, "-m", "pip"]
    chosen = subprocess.run([*pip, "config", "get", "global.index-url"], capture_output=True, text=True, check=False)
    index = chosen.stdout.strip() or PyPI.simple_url
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "UV_DEFAULT_INDEX": index}

    def execute(*words: str) -> None:
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"

    (tmp_path / "index").write_text(index)
    return execute


@pytest.fixture
def line_of(root: Path, remote: tuple[str, str]) -> Callable[[str], list[str]]:
    """`line_of("uv")` is the words of that tool's line on the front page, for the local remote."""
    page = (root / "README.md").read_text("utf-8")
    block = page.split("## Pin a version", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    for placeholder, value in zip(("REPOSITORY", "COMMIT"), remote, strict=True):
        block = block.replace(placeholder, value)
    commands = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", block, flags=re.MULTILINE)).splitlines()
    return lambda tool: next(words for words in map(shlex.split, commands) if words[0] == tool)


def test_the_line_for_pip_installs_the_pinned_commit(
    line_of: Callable[[str], list[str]], run: Callable[..., None], remote: tuple[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", *line_of("pip")]
    # the two lines resolve together, without a look at the index for either
    run(*words, "--dry-run", "--ignore-installed", "--report", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    pinned = {entry["metadata"]["name"]: entry["download_info"] for entry in report["install"]}
    assert {name: pinned[name]["vcs_info"]["commit_id"] for name in ("lm-core", "palm-rlhf")} == {
        "lm-core": remote[1],
        "palm-rlhf": remote[1],
    }
    run(*words, "--target", "installed", "--no-deps")
    for name in ("lm_core", "palm_rlhf"):
        (origin,) = (tmp_path / "installed").glob(f"{name}-*.dist-info/direct_url.json")
        assert json.loads(origin.read_text())["vcs_info"]["commit_id"] == remote[1]
        assert (tmp_path / "installed" / name / "py.typed").is_file()


def test_the_line_for_uv_locks_the_pinned_commit(
    line_of: Callable[[str], list[str]], run: Callable[..., None], remote: tuple[str, str], tmp_path: Path
) -> None:
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "init", "--bare", "--name", "project", "--python", sys.executable, ".")
    run(*uv, *line_of("uv")[1:], "--no-sync")
    lock = (tmp_path / "uv.lock").read_text()
    for name, folder in (("lm-core", "core"), ("palm-rlhf", "packages/palm-rlhf")):
        (source,) = re.findall(rf'name = "{name}"\nversion = ".*"\nsource = {{ git = "(.*)" }}', lock)
        assert source.endswith(f"#{remote[1]}")
        assert f"subdirectory={folder}" in source.replace("%2F", "/")


def test_the_line_for_poetry_locks_the_pinned_commit(
    line_of: Callable[[str], list[str]], run: Callable[..., None], remote: tuple[str, str], tmp_path: Path
) -> None:
    poetry = [sys.executable, "-m", "uv", "tool", "run", "--python", sys.executable, "poetry"]
    major, minor = sys.version_info[:2]
    run(*poetry, "init", "-n", "--name", "project", "--python", f">={major}.{minor},<{major}.{minor + 1}")
    # poetry ignores pip's index
    run(*poetry, "source", "add", "index", (tmp_path / "index").read_text())
    run(*poetry, *line_of("poetry")[1:], "--lock", "-n")
    lock = (tmp_path / "poetry.lock").read_text()
    for name, folder in (("lm-core", "core"), ("palm-rlhf", "packages/palm-rlhf")):
        (entry,) = (part for part in lock.split("[[package]]") if f'\nname = "{name}"\n' in part)
        assert f'resolved_reference = "{remote[1]}"' in entry
        assert f'subdirectory = "{folder}"' in entry
