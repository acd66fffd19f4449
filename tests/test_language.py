"""Sources and pages keep to the words of the field, and docstrings state what a thing is or does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = re.compile(
    r"\b(?:behind|(?:go|goes|going|went) on|anew|beside|judg(?:e|es|ed|ing|ements?)|said|whatever|ever|at hand|"
    r"at the door|of ours|for want of|spread over|to be had|foresees?|a little kind|tells?|says?)\b",
    re.IGNORECASE,
)
QUESTION = re.compile(r"(?:What|How|Whether|Where|Which|Who|Why|When)\b")
MOST_WORDS, MOST_QUESTIONS, MOST_FRAGMENTS = 20, 5, 5


@pytest.fixture(scope="module")
def texts(tracked_files: list[Path], root: Path) -> dict[str, str]:
    """Sources, the noxfile and every page, by name."""
    chosen = [
        file for file in tracked_files if file.suffix == ".md" or (file.suffix == ".py" and "tests" not in file.parts)
    ]
    return {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in chosen}


def docstrings(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """File and text of every docstring."""
    for name, text in texts.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield name, ast.get_docstring(node) or ""


def test_texts_use_the_words_of_the_field(texts: dict[str, str]) -> None:
    matches = [
        f"{name}:{number}: {match[0]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for match in WORDS.finditer(line)
    ]
    assert len(matches) <= MOST_WORDS, "\n".join(matches)


def test_a_docstring_begins_with_what_a_thing_is_or_does(texts: dict[str, str]) -> None:
    questions = [f"{name}: {text.splitlines()[0]}" for name, text in docstrings(texts) if QUESTION.match(text)]
    assert len(questions) <= MOST_QUESTIONS, "\n".join(questions)


def test_an_argument_is_described_by_a_phrase_that_stands_alone(texts: dict[str, str]) -> None:
    fragments = [
        f"{name}: {match[0].strip()}"
        for name, text in docstrings(texts)
        for match in re.finditer(r"^\s*\w+: of .*$", text, re.MULTILINE)
    ]
    assert len(fragments) <= MOST_FRAGMENTS, "\n".join(fragments)
