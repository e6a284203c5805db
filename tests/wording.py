"""Count the places in the tests that compare a sentence: python -m tests.wording [--list].

Messages, help texts and pages may be reworded without a test that fails. Of an error a test asserts the exit
code, that it is one line, the name of the flag or file, and that a remedy is there (tests/rejections.py).

What counts as a sentence: a literal (also the constant parts of an f-string, or a regular expression) that
holds two neighbouring words of two or more small letters, as "got nothing" or "expected finite". Where it
counts as compared:

1. `match=` of pytest.raises and pytest.warns, and the pattern of re.search, re.match, re.fullmatch,
   re.findall inside an assert;
2. an operand of `in`, `not in`, `==`, `!=` inside an assert, and arguments of startswith, endswith, count and
   index there;
3. arguments of functions of the tests that check an error (CHECKS below);
4. entries of a parametrization or of a table in capitals whose column reaches 1, 2 or 3 by name.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.source_trees import without_collections

TESTS = Path(__file__).resolve().parent
SENTENCE = re.compile(r"(?<![\w/.\-=<\[{])[a-z]{2,} [a-z]{2,}(?![\w/=\-\]}])")
CHECKS = {"rejected", "raising", "check_message", "refused"}
PATTERNS = {"search", "match", "fullmatch", "findall"}
METHODS = {"startswith", "endswith", "count", "index", "find"}


def text_of(node: ast.AST) -> str:
    """Return the constant text of a string, an f-string or a sum of them, and '' for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "\0".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("escape", "format")
    ):
        return text_of(node.func.value) + "".join(text_of(argument) for argument in node.args)
    return ""


def is_sentence(node: ast.AST) -> bool:
    """Return whether a literal holds two neighbouring words."""
    return bool(SENTENCE.search(text_of(node).replace("\\", " ").replace(".*", " . ")))


def name_of(function: ast.AST) -> str:
    """Return the last part of a called function's name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def literals(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the strings of an expression. The parts of an f-string are not strings of their own."""
    if text_of(node):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from literals(child)


def compared(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions of a function that are compared with output of the code under test."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in ("raises", "warns"):
                yield from (keyword.value for keyword in node.keywords if keyword.arg == "match")
            elif name in CHECKS:
                yield from node.args[1:] if name != "raising" else node.args
        elif isinstance(node, ast.Assert):
            for part in ast.walk(node.test):
                if isinstance(part, ast.Compare):
                    yield from (part.left, *part.comparators)
                elif isinstance(part, ast.Call) and name_of(part.func) in PATTERNS:
                    yield from part.args[:1]
                elif isinstance(part, ast.Call) and name_of(part.func) in METHODS:
                    yield from part.args
                elif isinstance(
                    part, (ast.GeneratorExp, ast.ListComp)
                ):  # all(text in page for text in ("a b", "c d"))
                    yield from (generator.iter for generator in part.generators)


def names_in(nodes: list[ast.AST]) -> set[str]:
    """Return the names of variables in expressions."""
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def columns(rows: ast.AST) -> Iterator[list[ast.AST]]:
    """Yield the rows of a table: the values of a dict or the elements of a list, each as its entries."""
    values = (
        rows.values
        if isinstance(rows, ast.Dict)
        else rows.elts
        if isinstance(rows, (ast.List, ast.Tuple, ast.Set))
        else []
    )
    for value in values:
        if isinstance(value, ast.Call) and name_of(value.func) == "param":
            yield list(value.args)
        else:
            yield list(value.elts) if isinstance(value, ast.Tuple) else [value]


def tabled(tables: dict[str, ast.AST], function: ast.FunctionDef, names: set[str]) -> Iterator[ast.AST]:
    """Yield the entries of parametrizations, loops and tables that a function compares through `names`.

    Args: tables: the values of the module's names in capitals.
    """

    def entries(targets: list[ast.AST], rows: ast.AST) -> Iterator[ast.AST]:
        rows = tables.get(rows.id, rows) if isinstance(rows, ast.Name) else rows
        rows = (
            rows.func.value
            if isinstance(rows, ast.Call) and name_of(rows.func) in ("items", "values")
            else rows
        )
        rows = tables.get(rows.id, rows) if isinstance(rows, ast.Name) else rows
        for row in columns(rows):
            for place, target in enumerate(targets):
                if isinstance(target, ast.Starred) and names_in([target]) & names:
                    yield from row[place:]
                elif names_in([target]) & names:
                    yield from row[place : place + 1] if len(targets) > 1 or len(row) == 1 else row

    for decorator in function.decorator_list:
        if (
            isinstance(decorator, ast.Call)
            and name_of(decorator.func) == "parametrize"
            and len(decorator.args) > 1
        ):
            arguments = [
                name.strip()
                for literal in literals(decorator.args[0])
                for name in text_of(literal).split(",")
            ]
            yield from entries([ast.Name(name) for name in arguments], decorator.args[1])
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.comprehension)):
            targets = list(node.target.elts) if isinstance(node.target, ast.Tuple) else [node.target]
            of_items = isinstance(node.iter, ast.Call) and name_of(node.iter.func) == "items"
            if of_items and len(targets) == 2:
                targets = list(targets[1].elts) if isinstance(targets[1], ast.Tuple) else [targets[1]]
            yield from entries(targets, node.iter)
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and isinstance(node.value.value, ast.Name)
        ):
            target = node.targets[0]
            yield from entries(
                list(target.elts) if isinstance(target, ast.Tuple) else [target], node.value.value
            )


def sentences(text: str) -> list[tuple[int, str]]:
    """Return the places of a test module that compare a sentence, as (line, literal)."""
    tree = ast.parse(text)
    places: dict[tuple[int, int], str] = {}
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    tables = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    for function in functions:
        expressions = list(compared(function))
        expressions += tabled(tables, function, names_in(expressions))
        for literal in (
            literal for node in expressions for literal in literals(node) if is_sentence(literal)
        ):
            places[literal.lineno, literal.col_offset] = text_of(literal).replace("\0", "{}")
    return [(line, text) for (line, _), text in sorted(places.items())]


def count() -> dict[str, list[tuple[int, str]]]:
    """Return the places of every test module that has any, by its path below tests/."""
    modules = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
    with without_collections():
        listed = {name: sentences(path.read_text()) for name, path in modules.items()}
    return {name: places for name, places in listed.items() if places}


if __name__ == "__main__":
    listed = count()
    if "--list" in sys.argv[1:]:
        for name, places in listed.items():
            print("\n".join(f"{name}:{line}: {text!r}" for line, text in places))
    print(sum(len(places) for places in listed.values()), "places compare a sentence")
