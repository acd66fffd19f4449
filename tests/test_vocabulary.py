"""One vocabulary: the same thing has the same name in every package, on the command line and in Python.

The flags and signatures are walked, not listed: a new command or class is held to the same words.
"""

import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# What an original (or habit) calls otherwise -> the one name. In Python the former may stand beside the latter.
ALIASES = {
    "checkpoint_folder": "checkpoint_dir",
    "checkpoint_path": "checkpoint_dir",
    "output_dir": "checkpoint_dir",
    "eos_token": "eos_id",
    "eos_token_id": "eos_id",
    "pad_value": "pad_id",
    "pad_token_id": "pad_id",
    "num_train_steps": "max_steps",
    "train_steps": "max_steps",
    "steps": "max_steps",
    "valid_every": "validate_every",
    "grad_accum_steps": "gradient_accumulation",
    "grad_accum_every": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "train_batch_size": "batch_size",
    "peak_learning_rate": "learning_rate",
    "start_learning_rate": "learning_rate",
    "lr": "learning_rate",
    "wd": "weight_decay",
    "warmup_steps": "warmup",
    "num_warmup_steps": "warmup",
    "max_norm": "max_grad_norm",
    "random_seed": "seed",
    "held_out": "validation_data",
    "folder": "directory",
}
# Where a name means something else: the steps a result tells were done, a schedule's warmup in updates, the norm that
# torch.nn.utils.clip_grad_norm_ calls so.
OTHER_MEANING = {
    "SPINResult": {"steps"},
    "LearningRateSchedule": {"warmup_steps"},
    "learning_rate_scale": {"warmup_steps"},
    "clip_global_norm": {"max_norm"},
}
# Flags of every `train`, and the defaults that every command gives them.
EVERY_TRAIN = {
    "--batch_size",
    "--checkpoint_dir",
    "--checkpoint_every",
    "--config",
    "--device",
    "--keep_checkpoints",
    "--learning_rate",
    "--max_grad_norm",
    "--resume",
    "--seed",
    "--validate_every",
    "--weight_decay",
}
SAME_DEFAULT = {"--device": "auto", "--resume": "auto", "--seed": 0, "--keep_checkpoints": 2, "--compile": False}


@pytest.fixture(scope="module")
def parsers(workspace: ModuleType) -> dict[str, Any]:
    """The parser of every command, as "<command> <subcommand>"."""
    found = {}
    for name in workspace.PACKAGES:
        parser = importlib.import_module(f"{workspace.DISTRIBUTIONS[name].import_name}.cli").build_parser()
        found |= {f"{name} {subcommand}": part for subcommand, part in parser.commands.items()}
    return found


def actions_of(parser: Any) -> dict[str, Any]:
    """Every flag and positional of a parser."""
    actions = [action for action in parser._actions if action.dest not in {"help", "config", "print_config"}]
    return {(action.option_strings or [action.dest])[0]: action for action in actions}


def test_no_flag_has_another_name_than_the_common_one(parsers: dict[str, Any]) -> None:
    found = {
        f"{command} {flag}": f"--{ALIASES[flag[2:]]}"
        for command, parser in parsers.items()
        for flag in actions_of(parser)
        if flag[2:] in ALIASES
    }
    assert found == {}


def test_every_train_command_has_the_common_flags(parsers: dict[str, Any]) -> None:
    missing = {
        command: sorted(EVERY_TRAIN - set(actions_of(parser)) - {"--config"})
        for command, parser in parsers.items()
        if command.endswith(" train")
    }
    assert {command: flags for command, flags in missing.items() if flags} == {}


def test_a_flag_is_of_one_type_in_every_command(parsers: dict[str, Any]) -> None:
    types = defaultdict(lambda: defaultdict(list))
    for command, parser in parsers.items():
        for flag, action in actions_of(parser).items():
            kind = str(getattr(action, "_typehint", action.type)).replace(" | None", "").replace("typing.", "")
            kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
            kind = "a choice" if kind.startswith("Literal[") else kind  # each has its own
            types[flag][kind.replace("<class '", "").replace("'>", "")].append(command)
    ambiguous = {flag: dict(kinds) for flag, kinds in types.items() if len(kinds) > 1}
    assert ambiguous == {}


def test_common_flags_have_common_defaults(parsers: dict[str, Any]) -> None:
    other = {
        f"{command} {flag}": action.default
        for command, parser in parsers.items()
        for flag, action in actions_of(parser).items()
        if flag in SAME_DEFAULT and action.default != SAME_DEFAULT[flag]
    }
    assert other == {}


def test_a_flag_is_explained_in_the_same_words(parsers: dict[str, Any]) -> None:
    words = defaultdict(set)
    for parser in parsers.values():
        for flag, action in actions_of(parser).items():
            if flag in {"--device", "--resume", "--precision", "--trackers", "--keep_checkpoints", "--max_grad_norm"}:
                words[flag].add(" ".join(str(action.help).split()))
    assert {flag: texts for flag, texts in words.items() if len(texts) > 1} == {}


def test_what_commands_take_first_has_one_name(parsers: dict[str, Any]) -> None:
    for command, parser in parsers.items():
        positional = [name for name in actions_of(parser) if not name.startswith("--")]
        kind = command.split()[1]
        if kind in {"eval", "inspect", "caption", "embed", "zero-shot", "retrieve", "sample"}:
            assert positional[:1] == ["checkpoint"], command
        if kind == "convert":
            assert positional == ["old", "directory"], command


def public_callables(workspace: ModuleType) -> Iterator[tuple[str, str, inspect.Signature]]:
    """Package, name and signature of everything that the fronts offer, methods included."""
    for distribution in workspace.DISTRIBUTIONS.values():
        module = importlib.import_module(distribution.import_name)
        for name in module.__all__:
            offered = getattr(module, name)
            methods = {
                f"{name}.{method}": function
                for method, function in (vars(offered).items() if inspect.isclass(offered) else ())
                if inspect.isfunction(function) and not method.startswith("_")
            }
            for label, function in {name: offered, **methods}.items():
                if callable(function):
                    try:
                        yield distribution.import_name, label, inspect.signature(function)
                    except ValueError:  # an exception's, written in C
                        continue


def test_an_original_name_in_python_stands_only_beside_the_common_one(workspace: ModuleType) -> None:
    found = []
    for package, label, signature in public_callables(workspace):
        names = set(signature.parameters)
        for alias in (names & set(ALIASES)) - OTHER_MEANING.get(label.split(".")[0], set()):
            if ALIASES[alias] not in names:
                found.append(f"{package}.{label}: {alias} without {ALIASES[alias]}")
    assert found == []


def test_randomness_takes_a_generator_or_a_seed(workspace: ModuleType) -> None:
    names = {"generator", "seed", "kwargs", "settings"}
    missing = [
        f"{package}.{label}"
        for package, label, signature in public_callables(workspace)
        if label.split(".")[-1] in {"generate", "sample", "gumbel_sample", "beam_search"}
        if not names & set(signature.parameters) and "temperature" in signature.parameters
    ]
    assert missing == []


def test_the_walk_reaches_every_package(workspace: ModuleType, parsers: dict[str, Any]) -> None:
    assert {package for package, _, _ in public_callables(workspace)} == {
        distribution.import_name for distribution in workspace.DISTRIBUTIONS.values()
    }
    assert {command.split()[0] for command in parsers} == set(workspace.PACKAGES)
    assert Path(__file__).name == "test_vocabulary.py"
