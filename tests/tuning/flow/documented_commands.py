"""The commands of a section of a page on flow generators, run as they stand, with folders in place of ROOT
and RUN.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from click.testing import CliRunner, Result

import train
from eg3d_rlhf.modes.flow_export import export_command
from eg3d_rlhf.modes.flow_new import new
from eg3d_rlhf.modes.flow_sample import sample
from eg3d_rlhf.modes.flow_tune import tune_command

PAGES = Path(__file__).resolve().parents[3] / "docs"
FEW = "--steps=2 --batch=2 --lr=0.02 --set=warmup=0 --device=cpu".split()
COMMANDS = {
    "python train.py ": train.main,
    "eg3d-rlhf flow new ": new,
    "eg3d-rlhf flow sample ": sample,
    "eg3d-rlhf flow tune ": tune_command,
    "eg3d-rlhf flow export ": export_command,
}
NAMES = {train.main: "train", new: "new", sample: "sample", tune_command: "pairs", export_command: "export"}


def section_of(page: str, section: str) -> list[str]:
    """Lines of commands, without what is said beside them."""
    part = (PAGES / page).read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    indented = [line.strip() for line in part.splitlines() if line.startswith("    ")]
    return [re.split(r"\s{2,}", line)[0] for line in indented if line.startswith((*COMMANDS, "export "))]


def run_section(
    section: str,
    root: Path | str,
    folder: Path,
    few: Sequence[str] = FEW,
    on_call: Callable[[str, Result], None] = lambda called, done: None,
    page: str = "reference/families.md",
    each: int = 2,
) -> list[str]:
    """Run them in `folder`, the current one; assets are ranked by seed in between. Returns what was called.

    Args: few: flags of the training besides; on_call: hears each command and its result; each: assets drawn
        per condition.
    """
    places = {"ROOT": str(root)}
    called = []
    for line in section_of(page, section):
        start = next((start for start in COMMANDS if line.startswith(start)), None)
        if start is None:
            continue
        filled = [
            "=".join(places.get(part, part) for part in word.split("="))
            for word in shlex.split(line.removeprefix(start))
        ]
        command = COMMANDS[start]
        more = {train.main: few, new: [f"--each={each}"]}.get(command, [])
        done = CliRunner().invoke(command, [*filled, *more])
        assert done.exit_code == 0, (start, filled, done.output, done.exception)
        called.append(NAMES[command])
        on_call(called[-1], done)
        if called[-1] == "sample":
            path = folder / "WORK" / "drawn" / "base" / "ranking.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({**row, "rank": 1 + row["seed"]}) + "\n" for row in rows))
        if called[-1] == "train":
            runs = sorted(map(str, (folder / "runs").glob("0*-*")))
            places |= {f"RUN{number if number > 1 else ''}": run for number, run in enumerate(runs, 1)}
    return called
