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
# Names that are no flags: in Python a corpus, pairs or prompts may be called what they are.
FLAG_ALIASES = {
    **ALIASES,
    "checkpoint": "model",
    "start_from": "model",
    "corpus": "data",
    "pairs": "data",
    "prompts": "data",
    "validation_pairs": "validation_data",
    "validation_prompts": "validation_data",
    "length": "sequence_length",
    "num_episodes": "max_steps",
    "filter_thres": "top_k",
    "nucleus": "top_p",
}
# Flags of every command that trains.
EVERY_RUN = {
    "--checkpoint_dir",
    "--checkpoint_every",
    "--compile",
    "--data",
    "--device",
    "--keep_checkpoints",
    "--max_grad_norm",
    "--max_seconds",
    "--max_steps",
    "--model",
    "--precision",
    "--resume",
    "--seed",
    "--tokenizer",
    "--trackers",
    "--validation_data",
}
# Flags of every `train`.
EVERY_TRAIN = EVERY_RUN | {"--batch_size", "--learning_rate", "--validate_every", "--weight_decay"}
# Flags of every command that samples.
EVERY_SAMPLER = {"--min_p", "--repetition_penalty", "--seed", "--temperature", "--top_k", "--top_p"}
# A composition's models have roles, and each brings its own tokenizer.
OTHER_FLAGS = {"calm-pytorch train": {"--model", "--tokenizer"}}
# Flags whose help depends on the command.
OTHER_WORDS = {"--checkpoint_dir", "--data", "--model", "--seed", "--tokenizer", "--validation_data"}
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
        f"{command} {flag}": f"--{FLAG_ALIASES[flag[2:]]}"
        for command, parser in parsers.items()
        for flag in actions_of(parser)
        if flag[2:] in FLAG_ALIASES
    }
    assert found == {}


def test_commands_of_a_kind_have_the_common_flags(parsers: dict[str, Any]) -> None:
    missing = {}
    for command, parser in parsers.items():
        flags = set(actions_of(parser))
        common = set()
        if "--resume" in flags:
            common |= EVERY_TRAIN if command.endswith(" train") else EVERY_RUN
        if "--temperature" in flags:
            common |= EVERY_SAMPLER
        missing[command] = sorted(common - flags - OTHER_FLAGS.get(command, set()))
    assert {command: flags for command, flags in missing.items() if flags} == {}
    assert sum("--resume" in actions_of(parser) for parser in parsers.values()) >= 9
    assert sum("--temperature" in actions_of(parser) for parser in parsers.values()) >= 11


def test_the_defaults_of_a_command_are_those_of_its_classes(parsers: dict[str, Any]) -> None:
    other = {}
    for name, parser in parsers.items():
        for group in parser.command.groups.values():
            parameters = inspect.signature(group.kind).parameters
            other |= {
                f"{name} --{argument}": default
                for argument, default in group.defaults.items()
                if parameters[argument].default is not inspect.Parameter.empty
            }
        other |= {f"{name} --{key}": value for key, value in parser.command.defaults.items() if key != "checkpoint_dir"}
    assert other == {}


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
            if flag in (EVERY_RUN | EVERY_SAMPLER) - OTHER_WORDS:
                words[flag].add(" ".join(str(action.help).split()))
    assert {flag: texts for flag, texts in words.items() if len(texts) > 1} == {}


def test_what_commands_take_first_has_one_name(parsers: dict[str, Any]) -> None:
    for command, parser in parsers.items():
        positional = [name for name in actions_of(parser) if not name.startswith("--")]
        kind = command.split()[1]
        if kind in {"generate", "eval", "inspect", "caption", "embed", "zero-shot", "retrieve", "sample"}:
            assert positional[:1] == (["anchor"] if command.startswith("calm") else ["model"]), command
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
