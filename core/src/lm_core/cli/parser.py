"""Parsers made from typed functions: a table of commands gives flags, help, configuration files and completion.

Flags override the YAML file (``--config``), which overrides defaults, as in jsonargparse. A switch needs no value
(``--fsdp`` means ``--fsdp=true``), a list takes one or several words (``--trackers tensorboard wandb``), and the words
of a flag may be joined by dashes. The error for an unknown flag, key or command suggests the nearest known one.
"""

import argparse
import contextlib
import difflib
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

import lm_core

_UNKNOWN_FLAGS = re.compile(r"unrecognized arguments: (.*)", re.IGNORECASE | re.DOTALL)
_UNKNOWN_KEY = re.compile(r"does not accept (?:option|nested key) '([^']*)'")
_WRONG_VALUE = re.compile(r"Parser key \"([^\"]*)\":.*(?:Got|Given) value: (.*)", re.DOTALL)
_UNKNOWN_COMMAND = re.compile(r"argument COMMAND: invalid choice: '([^']*)'")
_NEAR = 0.6
_SHORT_USAGE = 12
# Help of arguments that many commands share, for those without an entry in their docstring.
_COMMON_HELP = {
    "checkpoint_dir": "folder of the run.",
    "compile": "compiles (torch.compile) the model's blocks in training, the step of a token in generation.",
    "data": "training data: files, folders or globs, or organisation/name on the hub.",
    "device": "auto takes CUDA, then MPS, then the CPU.",
    "field": "column of the text, in formats with columns.",
    "max_new_tokens": "maximum number of new tokens; an end token ends a text earlier.",
    "model": "folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a Hugging Face model, "
    "or organisation/name on the hub.",
    "num_samples": "number of samples.",
    "overwrite": "allows writing to a folder that has content.",
    "precision": "auto is bf16 on a GPU that has it and fp32 elsewhere.",
    "preset": "sizes and the learning rate that fits them; a flag next to it wins.",
    "progress": "shows a progress bar.",
    "prompt": 'text to continue; "-" reads standard input, "@FILE" a file.',
    "resume": "auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.",
    "seed": "random seed.",
    "sequence_length": "tokens per row of training text.",
    "tokenizer": 'tokenizer to use instead of the model\'s: "bytes", a folder, or organisation/name on the hub.',
    "trackers": "names of trackers that accelerate knows, such as tensorboard.",
    "validation_data": "held-out data, from the same kinds of source; null holds out a fraction of the data.",
    "validation_fraction": "fraction of the data held out for validation.",
}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}"}


@dataclass(frozen=True)
class Group:
    """Flags for one parameter of a command: the arguments of a class.

    Args:
        kind: class, or function that makes an object.
        skip: arguments without a flag.
        defaults: defaults that replace those of ``kind``.
        as_dict: passes the arguments as a dictionary instead of the object.
    """

    kind: Callable[..., Any]
    skip: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    as_dict: bool = False

    def build(self, arguments: Mapping[str, Any]) -> Any:
        """The parameter's value, built from the entries of ``arguments`` that belong to it."""
        names = [name for name in inspect.signature(self.kind).parameters if name not in self.skip]
        values = {name: arguments[name] for name in names if name in arguments}
        return values if self.as_dict else self.kind(**values)


@dataclass(frozen=True)
class Command:
    """A command: a typed function whose signature and docstring define flags and their help.

    Args:
        function: function that returns the exit status.
        groups: parameters of the function whose flags are those of a class. A flag of the function or of an earlier
            group is shared with later groups.
        description: description in the help, by default the first line of the function's docstring.
        presets: function from the chosen arguments to defaults that replace the function's; ``--print_config`` includes
            them.
        defaults: constant defaults that replace the function's.
    """

    function: Callable[..., int]
    groups: Mapping[str, Group] = field(default_factory=dict)
    description: str | None = None
    presets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def run(self, arguments: Mapping[str, Any]) -> int:
        """Calls the function; returns the exit status."""
        names = inspect.signature(self.function).parameters
        built = {name: group.build(arguments) for name, group in self.groups.items()}
        return self.function(**{name: arguments[name] for name in names if name not in built}, **built)


def preset_name(chosen: Mapping[str, Any], *own: str, builtin: str = "stdlib") -> str:
    """The preset of a run: the chosen one, or "quickstart" without own data or model, or else "small".

    Args:
        chosen: arguments, as ``Command.presets`` receives them.
        *own: names of the arguments of which none is set in a quickstart.
        builtin: name of the built-in data, which counts as not set.
    """
    if chosen.get("preset") is not None:
        return str(chosen["preset"])
    return "small" if any(chosen.get(name) not in (None, builtin) for name in own) else "quickstart"


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Help with the line breaks of descriptions, types as metavars and texts as sentences."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        actions = list(actions)
        if usage is None and len(actions) > _SHORT_USAGE:
            names = [action.metavar or action.dest for action in actions if not action.option_strings]
            usage = " ".join(["%(prog)s", *names, "[--config FILE] [options]"])
        super().add_usage(usage, actions, groups, prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        strings = action.option_strings
        try:
            action.option_strings = [string for string in strings if not string.endswith("+")]
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = strings

    def _get_help_string(self, action: argparse.Action) -> str:
        text = str(super()._get_help_string(action)).replace("%(type)s", "").replace("``", "")
        text = re.sub(r"\((required, )?type: (, )?", lambda match: f"({match[1] or ''}", text)
        text = text.replace(" ()", "").replace("(required, )", "(required)")
        first = text.split(" ", 1)[0].strip(",;")
        literals = {str(value).lower() for value in typing.get_args(getattr(action, "_typehint", None))}
        if first not in {"null", "true", "false", str(action.default)} | literals:
            text = text[:1].upper() + text[1:]
        return text


class _PrintCompletion(argparse.Action):
    """Prints a completion script for a shell."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("completion needs shtab: pip install shtab")
        for part in (parser, *parser.commands.values()):
            for action in part._actions:
                hint = getattr(action, "_typehint", None)
                if hint is not None and action.choices is None:
                    action.choices = _choices(hint)
                if isinstance(action, ActionConfigFile) or (hint is not None and _is_textual(hint)):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        raise SystemExit(0)


class CommandParser(ArgumentParser):  # type: ignore[misc]
    """``jsonargparse.ArgumentParser`` with short errors that suggest the nearest known argument.

    ``package`` is the import name of the command's package; other arguments are those of ``argparse.ArgumentParser``.
    """

    def __init__(self, *args: Any, package: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, "allow_abbrev": False, **kwargs})
        self.package = package
        self.commands: dict[str, CommandParser] = {}
        self.command: Command | None = None
        self._subcommands_action: Any = None

    def add_command(self, name: str, command: "Command | Callable[..., int]") -> "CommandParser":
        """Adds and returns a parser for the command ``name``, with ``--config`` and ``--print_config``."""
        command = command if isinstance(command, Command) else Command(command)
        description = command.description or (command.function.__doc__ or "").split("\n", 1)[0]
        if self._subcommands_action is None:
            self._subcommands_action = self.add_subcommands(dest="command", required=True, metavar="COMMAND")
        # flags of the function, then those of its groups
        parser = CommandParser(description=description)
        parser.command = command
        parser.add_argument(
            "--config", action=ActionConfigFile, metavar="FILE", help="YAML file with any of these arguments."
        )
        parser.add_function_arguments(
            command.function, as_group=False, as_positional=True, skip=set(command.groups) or None
        )
        parser.set_defaults(dict(command.defaults))
        for group in command.groups.values():
            names = set(inspect.signature(group.kind).parameters)
            skip = {*group.skip, *(names & {action.dest for action in parser._actions})}
            if names - skip:
                add = parser.add_class_arguments if inspect.isclass(group.kind) else parser.add_function_arguments
                add(group.kind, skip=skip)
            parser.set_defaults(dict(group.defaults))
            for action in parser._actions:
                action.required = action.required and action.dest not in group.defaults
        # metavars and help
        for action in parser._actions:
            hint = getattr(action, "_typehint", action.type)
            if action.option_strings and action.nargs is None and (action.metavar is None or _element(hint)):
                action.metavar = _metavar(hint)
            if not action.help and action.dest in _COMMON_HELP:
                action.help = _COMMON_HELP[action.dest]
        self._subcommands_action.add_subcommand(name, parser, help=description.split("\n", 1)[0])
        parser.prog = f"{self.prog} {name}"
        self.commands[name] = parser
        return parser

    def parse(self, argv: Sequence[str]) -> Any:
        """The arguments as a ``jsonargparse.Namespace``; exits with status 2 and a message if they are wrong."""
        chosen = self.commands.get(argv[0]) if argv else None
        if chosen is None:
            return self.parse_args(list(argv))
        words = [argv[0], *chosen._words(argv[1:])]
        command = chosen.command
        if command is not None and command.presets is not None and not {"-h", "--help"} & set(words):
            draft = self.parse_args([word for word in words if not word.startswith("--print_config")])
            chosen.set_defaults(dict(command.presets(draft[argv[0]].as_dict())))
        arguments = self.parse_args(words)
        for action in chosen._actions:
            hint = getattr(action, "_typehint", action.type)
            # jsonargparse accepts null for any type in a configuration file
            if arguments[argv[0]].get(action.dest, "") is None and not {None, Any, type(None)} & set(
                _alternatives(hint)
            ):
                chosen.error(f"{action.dest} must be {_metavar(hint)}, got None")
        return arguments

    def _words(self, argv: Sequence[str]) -> list[str]:
        """``argv`` in argparse's form: values joined to their flags, lists as JSON."""
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        words: list[str] = []
        positional: list[str] = []
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                words, positional, rest = [*words, "--"], [*positional, *rest], []
                continue
            if not name.startswith("--"):
                (words if word in flags else positional).append(word)
                continue
            if name not in flags:
                joined = "--" + name[2:].replace("-", "_")
                name = joined if joined in flags else name
            action = flags.get(name)
            if action is None or equals or action.nargs is not None:
                words.append(f"{name}{equals}{value}")
            elif isinstance(action.default, bool):
                value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
                words.append(f"{name}={value}")
            elif _element(getattr(action, "_typehint", None)) is not None:
                end = next((index for index, part in enumerate(rest) if part.startswith("--")), len(rest))
                words.append(f"{name}={_as_list(rest[:end], action)}")
                rest = rest[end:]
            else:
                words.append(f"{name}={rest.pop(0)}" if rest else name)
        takes = [action for action in self._actions if not action.option_strings]
        if takes and len(positional) >= len(takes) and _element(getattr(takes[-1], "_typehint", None)) is not None:
            first = len(takes) - 1
            positional = [*positional[:first], _as_list(positional[first:], takes[-1])]
        return [*words, *positional]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints ``message``, with the nearest known name for an unknown one, and exits with status 2."""
        print(f"{self.prog}: error: {self._explained(message)}", file=sys.stderr)
        print(f"`{self.prog} --help` lists what there is.", file=sys.stderr)
        raise SystemExit(2)

    def _explained(self, message: str) -> str:
        parsers = (self, *self.commands.values())
        known = {flag[2:] for parser in parsers for action in parser._actions for flag in action.option_strings}
        if match := _UNKNOWN_FLAGS.search(message):
            words = match[1].split()
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            if not flags:
                return f"unexpected argument {' '.join(words)}"
            return "; ".join(f"unknown argument {flag}{_nearest(flag[2:], known, '--')}" for flag in flags)
        if match := _UNKNOWN_KEY.search(message):
            return f"unknown key {match[1]!r} in the configuration{_nearest(match[1], known, '')}"
        if match := _WRONG_VALUE.search(message):
            command, _, name = match[1].rpartition(".")
            actions = {action.dest: action for action in self.commands.get(command, self)._actions}
            if name in actions:
                hint = getattr(actions[name], "_typehint", actions[name].type)
                return f"{name} must be {_metavar(hint)}, got {match[2]}"
        if match := _UNKNOWN_COMMAND.search(message):
            return f"unknown command {match[1]!r}{_nearest(match[1], self.commands, '')}"
        return re.sub(rf"\b({'|'.join(self.commands) or '(?!)'})\.", "", message)


def command_parser(
    prog: str, description: str, commands: "Mapping[str, Command | Callable[..., int]]", *, package: str
) -> CommandParser:
    """The parser of a package's command line, with ``--version`` and ``--print_completion``.

    ``description`` is the first line of the help of ``prog``, ``package`` the import name of the package.
    """
    versions = f"{prog} {importlib.import_module(package).__version__} (lm-core {lm_core.__version__}, "
    parser = CommandParser(prog=prog, package=package, description=description)
    parser.add_argument("--version", action="version", version=f"{versions}torch {torch.__version__})")
    parser.add_argument(
        "--print_completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="Prints a completion script for the shell and exits.",
    )
    for name, command in commands.items():
        parser.add_command(name, command)
    return parser


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _element(hint: Any) -> Any:
    """Element type of a list or sequence type; None for any other type."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) in (list, tuple, Sequence):
            return typing.get_args(kind)[0]
    return None


def _as_list(words: Sequence[str], action: argparse.Action) -> str:
    """Words as a JSON list; a single word that is null or a list itself stays one, of texts if these are expected."""
    textual = _is_textual(_element(action._typehint))  # type: ignore[attr-defined]
    if len(words) == 1 and words[0] == "null":
        return words[0]
    if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
        if not textual:
            return words[0]
        with contextlib.suppress(yaml.YAMLError):
            entries = yaml.load(words[0], yaml.BaseLoader)  # scalars stay as they are written
            words = entries if all(isinstance(entry, str) for entry in entries) else words
    return f"[{','.join(json.dumps(word) if textual else word for word in words)}]"


def _choices(hint: Any) -> list[str] | None:
    """The values a flag accepts; None if they cannot be listed."""
    choices: list[str] = []
    for kind in _alternatives(hint):
        if kind is bool:
            choices += ["true", "false"]
        elif typing.get_origin(kind) is Literal:
            choices += [str(value) for value in typing.get_args(kind)]
        elif kind is not type(None):
            return None
    return choices or None


def _is_textual(hint: Any) -> bool:
    return any(inspect.isclass(kind) and kind.__name__ in ("str", "Path") for kind in _alternatives(hint))


def _metavar(hint: Any) -> str:
    """Metavar of a type: "INT", "{auto,true,false}", "TEXT [TEXT ...]"."""
    if choices := _choices(hint):
        return f"{{{','.join(choices)}}}"
    shown = []
    for kind in _alternatives(hint):
        element = _element(kind)
        if element is not None:
            word = _metavar(element)
            shown.append(f"{word} [{word} ...]")
        elif typing.get_origin(kind) is Literal:
            shown += [str(value) for value in typing.get_args(kind)]
        elif kind is not type(None):
            shown.append(_METAVARS.get(kind, "VALUE"))
    return "|".join(dict.fromkeys(shown))


def _nearest(name: str, known: Any, prefix: str) -> str:
    best = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=_NEAR)
    return f"; the nearest known one is {prefix}{best[0]}" if best else ""
