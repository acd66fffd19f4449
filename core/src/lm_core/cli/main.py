"""How every command of ours ends: its exit status, what it prints for a wrong input and after Ctrl-C.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | the input's error, one line on standard error |
| 2 | wrong flags (``lm_core.cli.parser``) |
| 130 | Ctrl-C; a run has saved a checkpoint, and the same command goes on from it |
"""

import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lm_core
from lm_core.distributed import barrier, end_process_group, rank

if TYPE_CHECKING:
    from lm_core.cli.parser import CommandParser

INTERRUPTED = 130

S = TypeVar("S")


def run_command(
    parser: "CommandParser",
    argv: Sequence[str] | None,
    commands: Mapping[str, Callable[..., int]],
    *,
    package: str,
) -> int:
    """Runs the command that ``argv`` names; returns its exit status.

    An error is printed as one line where its message says all: it was raised by ``package``, by this one or by the
    system. Any other is a defect and keeps its traceback.

    Args:
        parser: with a command for each of ``commands``.
        argv: words of the command line, without the program's name; by default this process's own.
        commands: called with the parsed arguments, but for ``config``.
        package: import name of the package that the command belongs to.
    """
    chosen = parser.parse(sys.argv[1:] if argv is None else list(argv))
    arguments = {name: value for name, value in chosen[chosen.command].items() if name != "config"}
    try:
        status = commands[chosen.command](**arguments)
        # no process ends while another still works, such as rank 0 at its curves
        barrier()
        return status
    except Exception as error:
        if not _says_all(error, package):
            raise
        print(f"{parser.prog} {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        command = command_line(parser.prog)
        print(f"\nStopped at once. A run goes on from its newest checkpoint:\n  {command}", file=sys.stderr)
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


def say_how_to_go_on(program: str, outcome: str, step: int, max_steps: int) -> int:
    """Says, where a run did not finish, how it goes on; returns the exit status."""
    if outcome == "finished":
        return 0
    say(f"\nStopped ({outcome}) after {step} of {max_steps} updates. To go on:\n  {command_line(program)}")
    return INTERRUPTED if outcome == "interrupted" else 0


def summary_of(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring, which describes its command."""
    return (function.__doc__ or "").split("\n", 1)[0]


def taken_out(arguments: MutableMapping[str, Any], kind: Callable[..., S]) -> S:
    """An object of the dataclass ``kind`` from those ``arguments`` that are its fields, which are taken out."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: arguments.pop(name) for name in names if name in arguments})


def _says_all(error: Exception, package: str) -> bool:
    if isinstance(error, OSError | ImportError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = (sys.modules[package].__file__, lm_core.__file__)
    return any(file is not None and raised_in.is_relative_to(Path(file).parent) for file in ours)
