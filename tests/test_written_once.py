"""What two distributions need is written once, in the core; and errors are worded alike everywhere."""

import ast
import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Statements (nested ones counted) from which on two equal bodies are a thing written twice, not a habit.
SMALLEST = 4
# How others begin or decorate an error; ours name the argument, what it must be and what it was.
UNWANTED = re.compile(r"\b(?:invalid|illegal|please|should|sorry|wrong value|bad value|oops)\b|[.!]$", re.IGNORECASE)


def parsed(workspace: ModuleType) -> Iterator[tuple[str, Path, ast.Module]]:
    """Distribution, file and syntax tree of every module of ours."""
    for name, distribution in workspace.DISTRIBUTIONS.items():
        for file in sorted(distribution.source.rglob("*.py")):
            yield name, file, ast.parse(file.read_text("utf-8"), filename=str(file))


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    has = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if has else body


class Renamed(ast.NodeTransformer):
    """Local names by the order in which they come, so that a copy with other names is still a copy."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.setdefault(node.id, f"name{len(self.names)}"), node.ctx)


def bodies(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and content of each function that is long enough to count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = without_docstring(node.body)
            count = sum(isinstance(inner, ast.stmt) for statement in body for inner in ast.walk(statement))
            if count >= SMALLEST:
                renamed = Renamed()
                yield node.name, "\n".join(ast.dump(renamed.visit(copy.deepcopy(part))) for part in body)


def test_no_function_stands_in_two_distributions(workspace: ModuleType) -> None:
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for distribution, file, tree in parsed(workspace):
        for name, body in bodies(tree):
            places[body].setdefault(distribution, f"{file.name}: {name}")
    twice = [sorted(f"{package} {place}" for package, place in where.items()) for where in places.values()]
    assert [where for where in twice if len(where) > 1] == []


def test_a_copy_with_other_names_would_be_seen() -> None:
    one = "def f(a):\n    b = a + 1\n    if b:\n        b += 2\n    return b\n"
    other = one.replace("a", "x").replace("b", "y").replace("def f", "def g")
    assert [body for _, body in bodies(ast.parse(one))] == [body for _, body in bodies(ast.parse(other))]


def literal(node: ast.expr) -> str | None:
    """A message as it stands, with {} for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def test_errors_are_worded_alike(workspace: ModuleType) -> None:
    odd, names_value, count = [], 0, 0
    for _, file, tree in parsed(workspace):
        for node in ast.walk(tree):
            raises = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
            if raises and getattr(node.exc.func, "id", "") in {"ValueError", "TypeError"}:
                message = literal(node.exc.args[0])
                if message is not None:
                    count += 1
                    names_value += "got" in message
                    if UNWANTED.search(message):
                        odd.append(f"{file.name}: {message}")
    assert odd == []
    assert names_value > 0.7 * count  # the others are about a state, not a value
