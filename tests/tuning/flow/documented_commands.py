"""The commands of a section of docs/flow-families.md, run as they stand, with folders in place of ROOT and RUN."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from click import Command
from click.testing import CliRunner, Result

import train
from eg3d_rlhf.modes import flow_files as family_commands

PAGE = Path(__file__).resolve().parents[3] / "docs" / "flow-families.md"
FEW = "--steps=2 --batch=2 --lr=0.02 --set=warmup=0 --device=cpu".split()


def documented(section: str) -> list[list[str]]:
    """Words of every command, its program first, without what is said beside it."""
    part = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [shlex.split(re.split(r"\s{2,}", line.strip())[0])[1:] for line in part.splitlines() if line.startswith("    python ")]


def run_section(
    section: str, root: Path | str, folder: Path, tool: Command = family_commands.main, few: Sequence[str] = FEW,
    on_call: Callable[[str, Result], None] = lambda called, done: None,
) -> list[str]:
    """Run them in `folder`, the current one; assets are ranked by seed in between. Returns what was called.

    Args: tool: stands for the other program than train.py; few: flags of the training besides; on_call: hears each command and its result.
    """
    places, called = {"ROOT": str(root)}, []
    for program, *words in documented(section):
        parted = [word.partition("=") for word in words]
        filled = [f"{name}={places.get(value, value)}" if sign else name for name, sign, value in parted]
        more = few if program == "train.py" else ["--each=2"] if filled[0] == "draw" else []
        done = CliRunner().invoke(train.main if program == "train.py" else tool, [*filled, *more])
        assert done.exit_code == 0, (program, filled, done.output, done.exception)
        called.append("train" if program == "train.py" else filled[0])
        on_call(called[-1], done)
        if called[-1] == "draw" and not (folder / "PAIRS").exists():
            path = folder / "ASSETS" / "ranking.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({**row, "rank": 1 + row["seed"]}) + "\n" for row in rows))
        if called[-1] == "train":
            (places["RUN"],) = map(str, (folder / "runs").glob("00000-*"))
    return called
