"""A parser whose errors help: an unknown flag, key or command is answered with the nearest one that there is.

Defaults < YAML file (``--config``) < flags, as jsonargparse has it. A switch may be given without a value (``--fsdp``
means ``--fsdp=true``), and words of a flag may be joined by dashes.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

_UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.IGNORECASE | re.DOTALL)
_UNKNOWN_KEY = re.compile(r"does not accept (?:option|nested key) '([^']*)'")
_UNKNOWN_COMMAND = re.compile(r"argument command: invalid choice: '([^']*)'")


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Descriptions keep their lines."""


class CommandParser(ArgumentParser):  # type: ignore[misc]
    """``jsonargparse.ArgumentParser`` with short errors that name the nearest known argument.

    Args:
        args: as for ``argparse.ArgumentParser``.
        kwargs: as for ``argparse.ArgumentParser``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, "allow_abbrev": False, **kwargs})
        self.commands: dict[str, CommandParser] = {}
        self._subcommands_action: Any = None

    def add_command(self, name: str, description: str) -> "CommandParser":
        """A parser for ``name``, with ``--config`` and ``--print_config``."""
        if self._subcommands_action is None:
            self._subcommands_action = self.add_subcommands(dest="command", required=True)
        parser = CommandParser(description=description)
        parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these arguments.")
        self._subcommands_action.add_subcommand(name, parser, help=description.split("\n", 1)[0])
        parser.prog = f"{self.prog} {name}"
        self.commands[name] = parser
        return parser

    def add_function(self, function: Callable[..., Any], *, skip: Sequence[str] = ()) -> None:
        """Arguments for the parameters of a typed function; those without a default are positional."""
        self.add_function_arguments(function, as_group=False, as_positional=True, skip=set(skip))

    def add_class(self, kind: type, *, skip: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> None:
        """A group of arguments for the parameters of a class, some of them with other defaults."""
        self.add_class_arguments(kind, skip=set(skip))
        self.set_defaults(dict(defaults or {}))
        for action in self._actions:
            if action.dest in (defaults or {}):
                action.required = False

    def flags(self) -> dict[str, bool]:
        """Every flag, and whether it is a switch."""
        return {
            flag: isinstance(action.default, bool) and action.nargs is None
            for action in self._actions
            for flag in action.option_strings
        }

    def parse(self, argv: Sequence[str]) -> Any:
        """The arguments as a ``jsonargparse.Namespace``; leaves with status 2 and a message if they are wrong."""
        flags = (self.commands.get(argv[0], self) if argv else self).flags()
        words = []
        for number, word in enumerate(argv):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in flags:
                joined = "--" + name[2:].replace("-", "_")
                name = joined if joined in flags else name
            following = argv[number + 1].lower() if number + 1 < len(argv) else ""
            if flags.get(name) and not equals and following not in ("true", "false"):
                equals, value = "=", "true"
            words.append(f"{name}{equals}{value}")
        return self.parse_args(words)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints ``message``, with the nearest known name for an unknown one, and leaves with status 2."""
        print(f"{self.prog}: error: {self._explained(message)}", file=sys.stderr)
        print(f"`{self.prog} --help` lists what there is.", file=sys.stderr)
        raise SystemExit(2)

    def _explained(self, message: str) -> str:
        known = [flag[2:] for parser in (self, *self.commands.values()) for flag in parser.flags() if flag[:2] == "--"]
        if found := _UNKNOWN_FLAGS.search(message):
            words = found[1].split()
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            if not flags:
                return f"unexpected argument {' '.join(words)}"
            return "; ".join(f"unknown argument {flag}{_nearest(flag[2:], known, '--')}" for flag in flags)
        if found := _UNKNOWN_KEY.search(message):
            return f"unknown key {found[1]!r} in the configuration{_nearest(found[1], known, '')}"
        if found := _UNKNOWN_COMMAND.search(message):
            return f"unknown command {found[1]!r}{_nearest(found[1], list(self.commands), '')}"
        return re.sub(rf"\b({'|'.join(self.commands) or '(?!)'})\.", "", message)


def _nearest(name: str, known: Sequence[str], prefix: str) -> str:
    best = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.0)
    return f"; the nearest known one is {prefix}{best[0]}" if best else ""
