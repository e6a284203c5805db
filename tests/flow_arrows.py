"""Print which folders inside eg3d_rlhf/tuning/flow import one another: `python -m tests.flow_arrows [REPO]`.

An arrow is an ordered pair of folders, counted once however many files it stands for; imports inside
functions and under `if TYPE_CHECKING` count. The subfolders of training are folders of their own, of the rank
of training. Modules that a registry names as text are no imports.
"""

import ast
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FLOW = "eg3d_rlhf.tuning.flow"
RANKS = ("base", "training", "families", "workspace", "toy")  # nobody imports upwards
MOST = 18

Arrows = dict[tuple[str, str], set[str]]  # (folder, another that it imports) -> files of the first


def arrows(repo: Path = REPO) -> Arrows:
    """Return the arrows of a checkout."""
    root = repo / FLOW.replace(".", "/")
    files = sorted(root.rglob("*.py"))
    folder_of = {}
    for path in files:
        relative = path.relative_to(root)
        parts = relative.parent.parts if path.stem == "__init__" else relative.with_suffix("").parts
        folder_of[".".join((FLOW, *parts))] = relative.parent.as_posix()
    found: Arrows = {}
    for path in files:
        here = path.relative_to(root).parent.as_posix()
        for module in _imported(ast.parse(path.read_text()), folder_of.keys()):
            there = folder_of[module]
            if there != here:
                found.setdefault((here, there), set()).add(path.relative_to(root).as_posix())
    return found


def _imported(tree: ast.Module, modules) -> set[str]:
    """Return the modules that a file imports; of `from package import module` the module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules else node.module)
    return names & set(modules)


def rank_of(folder: str) -> int:
    return RANKS.index(folder.split("/")[0])


def upward(found: Arrows) -> list[tuple[str, str]]:
    """Return the arrows that point to a folder of a higher rank."""
    return sorted((here, there) for here, there in found if rank_of(here) < rank_of(there))


def main() -> None:
    found = arrows(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO)
    for (here, there), files in sorted(found.items()):
        print(f"{here:20} -> {there:20} {len(files):3} files, such as {min(files)}")
    print(f"{len(found)} arrows")


if __name__ == "__main__":
    main()
