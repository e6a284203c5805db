"""Syntax trees of the source files, each parsed and walked once in a process.

The tests of structure and wording look at 900 files from several sides. Parsing them takes 2 s. Each garbage
collection meanwhile visits the 1.5 million nodes made so far, which took three times as long; it is put off.
"""

import ast
import contextlib
import functools
import gc
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Put off garbage collections. A syntax tree has no cycles, so none is needed to free one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file. Callers must not change it."""
    with without_collections():
        return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file in the order of ast.walk."""
    with without_collections():
        return tuple(ast.walk(tree(path)))
