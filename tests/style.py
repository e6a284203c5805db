"""Check habits of this code that ruff does not know: python -m tests.style [FILE ...], or all files of git.

A line has at most 110 characters; ruff passes over lines that end in a pragma such as `# noqa`.

One assignment a line: `a, b = x, y` of values that do not depend on the targets before them is written as two
assignments. A swap, a step of a recursion and the unpacking of one value stay. The last line of the output
counts the tuples that are left, per 1,000 lines of eg3d_rlhf.
"""

import ast
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
COLUMNS = 110


def is_pair(node: ast.AST) -> bool:
    """Return whether a statement assigns a written-out tuple to as many targets."""
    return (
        isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and len(node.targets[0].elts) == len(node.value.elts) > 1
        and not any(isinstance(part, ast.Starred) for part in (*node.targets[0].elts, *node.value.elts))
    )


def owner(node: ast.AST) -> str | None:
    """Return the name at the root of `a.b[c].d`, or None if it is not a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def may_depend(later: ast.AST, target: ast.AST) -> bool:
    """Return whether an expression may change its value once `target` is assigned."""
    names = {node.id for node in ast.walk(later) if isinstance(node, ast.Name)}
    if isinstance(target, (ast.Tuple, ast.List)):
        return any(may_depend(later, part) for part in target.elts)
    if isinstance(target, ast.Name):
        return target.id in names
    root = owner(target)
    if root is None or not isinstance(target, ast.Attribute):
        return root is None or root in names
    # An attribute: reading it, calling a method of its owner, or passing the owner on may depend on it.
    # Reading another attribute of the owner does not.
    attributes = [node for node in ast.walk(later) if isinstance(node, ast.Attribute)]
    called = {id(node.func) for node in ast.walk(later) if isinstance(node, ast.Call)}
    read = {id(node.value) for node in attributes if id(node) not in called}
    passed = any(
        isinstance(node, ast.Name) and node.id == root and id(node) not in read for node in ast.walk(later)
    )
    return passed or any(node.attr == target.attr for node in attributes)


def is_independent(node: ast.Assign) -> bool:
    """Return whether a pair means the same as its assignments one after the other."""
    targets = node.targets[0].elts  # type: ignore[attr-defined]
    values = node.value.elts  # type: ignore[attr-defined]
    return not any(
        may_depend(values[later], targets[first]) or may_depend(targets[later], targets[first])
        for first in range(len(targets))
        for later in range(first + 1, len(targets))
    )


def pairs(text: str) -> tuple[list[int], int]:
    """Return the lines of independent pairs in a module's text, and the number of the other pairs."""
    nodes = [node for node in ast.walk(ast.parse(text)) if is_pair(node)]
    independent = [node.lineno for node in nodes if isinstance(node, ast.Assign) and is_independent(node)]
    return sorted(independent), len(nodes) - len(independent)


def files() -> list[Path]:
    """Return the Python files that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    return [REPO / name for name in names if (REPO / name).exists()]


def main(names: list[str]) -> int:
    """Print what is wrong; return 1 if anything is, else 0."""
    wrong = 0
    kept = 0
    lines = 0
    for path in [Path(name).resolve() for name in names] or files():
        text = path.read_text()
        found, others = pairs(text)
        for line in found:
            print(f"{path.relative_to(REPO)}:{line}: two assignments in one line; write one a line")
        for line, content in enumerate(text.splitlines(), 1):
            if len(content) > COLUMNS:
                print(f"{path.relative_to(REPO)}:{line}: {len(content)} characters; write at most {COLUMNS}")
                wrong += 1
        wrong += len(found)
        if path.is_relative_to(REPO / "eg3d_rlhf"):
            kept += len(found) + others
            lines += len(text.splitlines())
    if lines:
        print(f"{kept} pair assignments in {lines} lines of eg3d_rlhf, {1000 * kept / lines:.1f} per 1,000")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
