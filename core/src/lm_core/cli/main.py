"""Running a command: exit status, error messages, and reports after Ctrl-C and at the end of a run.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | wrong input, explained in one line on standard error |
| 2 | wrong flags (``lm_core.cli.parser``) |
| 128 + N | stopped by signal N (Ctrl-C is 2); a run has saved a checkpoint, from which the same command resumes |
"""

import importlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_core
from lm_core.checkpoints.checkpoint import list_checkpoints
from lm_core.distributed import barrier, end_process_group, rank
from lm_core.training.run_directory import Result, write_summary
from lm_core.training.session import TrainingResult

if TYPE_CHECKING:
    from lm_core.cli.parser import CommandParser

INTERRUPTED = 128 + signal.SIGINT


def run_command(parser: "CommandParser", argv: Sequence[str] | None = None) -> int:
    """Runs the command in ``argv``; returns its exit status.

    An error raised by the parser's package, the core or the system is printed as one line. Any other error is a defect
    and keeps its traceback.

    Args:
        parser: parser of ``lm_core.cli.parser.command_parser``.
        argv: words of the command line, without the program's name; by default those of this process.
    """
    chosen = parser.parse(sys.argv[1:] if argv is None else list(argv))
    command = parser.commands[chosen.command].command
    assert command is not None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            status = command.run(dict(vars(chosen[chosen.command])))
        # no process ends while another still works, such as rank 0 drawing curves
        barrier()
        return status
    except Exception as error:
        if not _is_self_explanatory(error, parser.package):
            raise
        print(f"{parser.prog} {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        folder = chosen[chosen.command].get("checkpoint_dir")
        if folder is None:
            advice = "To start again:"
        elif list_checkpoints(Path(folder).expanduser() / "checkpoints"):
            advice = "The run resumes from its newest checkpoint:"
        else:
            advice = "There is no checkpoint yet, so the same command starts over:"
        print(f"\nStopped at once. {advice}\n  {command_line(parser.prog)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        end_process_group()


def command_line(program: str) -> str:
    """The shell command that starts this run again, with torchrun if that started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([program, *sys.argv[1:]])
    local, total = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = ["--nnodes", str(total // local)] if total > local else []
    # of ``python -m package`` the first word is a file in the package
    start = Path(sys.argv[0])
    script = ["-m", start.parent.name] if start.name == "__main__.py" else [sys.argv[0]]
    return shlex.join(["torchrun", *nodes, "--nproc_per_node", str(local), *script, *sys.argv[1:]])


def print_main(*words: object) -> None:
    """Prints on the main process only."""
    if rank() == 0:
        print(*words, flush=True)


def report(label: str, text: object) -> None:
    """Prints a labelled line of a report on the main process."""
    print_main(f"{label:<12}{text}")


def report_run(
    program: str,
    run: TrainingResult,
    checkpoint_dir: str | Path,
    *,
    max_steps: int | None = None,
    lines: Sequence[tuple[str, object]] = (),
    results: Sequence[Result] = (),
) -> int:
    """Prints the outcome of a run and the paths of its files, and writes ``summary.json`` of a finished run.

    Args:
        program: name of the program, for the command that resumes.
        run: result of the trainer.
        checkpoint_dir: folder of the run.
        max_steps: requested updates; None if their number is not known beforehand.
        lines: label and text of each measurement to print first.
        results: key numbers of the summary, the most important first; without any, no summary is written.

    Returns:
        The exit status.
    """
    complete = run.outcome in ("finished", "stopped early")
    trained = not complete or run.first_step < (run.step if max_steps is None else max_steps)
    if not trained:
        report("", "already complete; pass a new --checkpoint_dir to start over")
    for label, text in lines:
        report(label, text)
    folder = Path(checkpoint_dir).expanduser()
    report("checkpoint", folder / "checkpoints" / f"step-{run.step}")
    report("metrics", folder / "metrics.jsonl")
    report("curves", run.curves or _why_not_drawn())
    if complete and results and rank() == 0:
        write_summary(folder, list(results), steps=run.step, seconds=run.seconds if trained else None)
    if not complete:
        asked = "" if max_steps is None else f" of {max_steps}"
        print_main(f"\nStopped ({run.outcome}) after {run.step}{asked} updates. To resume:\n  {command_line(program)}")
    return 128 + (run.signal or signal.SIGINT) if run.outcome == "interrupted" else 0


def _why_not_drawn() -> str:
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return "not drawn: pip install matplotlib, then run the same command again"
    return "not drawn: they need two rows of metrics"


def _print_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _is_self_explanatory(error: Exception, package: str | None) -> bool:
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False  # such as a NameError: never raised on purpose
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    packages = (lm_core.__file__, None if package is None else sys.modules[package].__file__)
    return any(file is not None and raised_in.is_relative_to(Path(file).parent) for file in packages)
