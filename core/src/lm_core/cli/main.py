"""Running a command: its exit status, what it prints for a wrong input, after Ctrl-C and at the end of a run.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | the input's error, one line on standard error |
| 2 | wrong flags (``lm_core.cli.parser``) |
| 130 | Ctrl-C; a run has saved a checkpoint, and the same command resumes from it |
"""

import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_core
from lm_core.distributed import barrier, end_process_group, rank
from lm_core.training.run_directory import Result, write_summary
from lm_core.training.session import TrainingResult

if TYPE_CHECKING:
    from lm_core.cli.parser import CommandParser

INTERRUPTED = 130


def run_command(parser: "CommandParser", argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` names; returns its exit status.

    An error is printed as one line where its message says all: it was raised by the parser's package, by the core or
    by the system. Any other is a defect and keeps its traceback.

    Args:
        parser: as ``lm_core.cli.parser.command_parser`` makes it.
        argv: words of the command line, without the program's name; by default this process's own.
    """
    chosen = parser.parse(sys.argv[1:] if argv is None else list(argv))
    command = parser.commands[chosen.command].command
    assert command is not None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            status = command.run(dict(vars(chosen[chosen.command])))
        # no process ends while another still works, such as rank 0 at its curves
        barrier()
        return status
    except Exception as error:
        if not _is_self_explanatory(error, parser.package):
            raise
        print(f"{parser.prog} {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = command_line(parser.prog)
        print(f"\nStopped at once. A run resumes from its newest checkpoint:\n  {words}", file=sys.stderr)
        return INTERRUPTED
    finally:
        end_process_group()


def command_line(program: str) -> str:
    """The words that start this run again, as a shell takes them."""
    return shlex.join([program, *sys.argv[1:]])


def say(*words: object) -> None:
    """Prints on the main process only."""
    if rank() == 0:
        print(*words, flush=True)


def report(label: str, text: object) -> None:
    """Prints a labelled line of a report on the main process."""
    say(f"{label:<12}{text}")


def report_run(
    program: str,
    run: TrainingResult,
    checkpoint_dir: str | Path,
    *,
    max_steps: int | None = None,
    lines: Sequence[tuple[str, object]] = (),
    results: Sequence[Result] = (),
) -> int:
    """Prints how a run ended and where its files are, and writes ``summary.json`` once it has finished.

    Args:
        program: name of the program, for the command that resumes.
        run: what the trainer returned.
        checkpoint_dir: folder of the run.
        max_steps: updates that were asked for; None if their number is not known beforehand.
        lines: label and text of each measurement to print first.
        results: key numbers of the summary, the most important first; without any, none is written.

    Returns:
        The exit status.
    """
    complete = run.outcome in ("finished", "stopped early")
    trained = not complete or run.first_step < (run.step if max_steps is None else max_steps)
    if not trained:
        report("", "already complete; pass a new --checkpoint_dir to start over")
    for label, text in lines:
        report(label, text)
    folder = Path(checkpoint_dir)
    report("checkpoint", folder / "checkpoints" / f"step-{run.step}")
    report("metrics", folder / "metrics.jsonl")
    report("curves", run.curves or "not drawn: pip install matplotlib, then run the same command again")
    if complete and results and rank() == 0:
        write_summary(folder, list(results), steps=run.step, seconds=run.seconds if trained else None)
    return print_resume_hint(program, run.outcome, run.step, max_steps)


def print_resume_hint(program: str, outcome: str, step: int, max_steps: int | None = None) -> int:
    """Prints how to resume a run that did not finish; returns the exit status."""
    if outcome in ("finished", "stopped early"):
        return 0
    asked = "" if max_steps is None else f" of {max_steps}"
    say(f"\nStopped ({outcome}) after {step}{asked} updates. To resume:\n  {command_line(program)}")
    return INTERRUPTED if outcome == "interrupted" else 0


def _print_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _is_self_explanatory(error: Exception, package: str | None) -> bool:
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False  # such as a NameError: never raised on purpose
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = (lm_core.__file__, None if package is None else sys.modules[package].__file__)
    return any(file is not None and raised_in.is_relative_to(Path(file).parent) for file in ours)
