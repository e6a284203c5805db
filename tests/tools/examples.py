"""The runnable example that a command's --help shows."""

import contextlib
import re
import shlex
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from eg3d_rlhf.modes.jobs import JOBS, command_of

REPO = Path(__file__).resolve().parents[2]


def example_of(command: click.Command) -> str:
    """The one command line under 'Example:' in the help text, as a user would copy it."""
    text = CliRunner().invoke(command, ["--help"]).stdout
    blocks = re.findall(r"Example:\n((?:[ ]+.*\S.*\n)+)", text)
    assert len(blocks) == 1, text
    lines = [line.strip() for line in blocks[0].splitlines()]
    assert len(lines) == 1 and re.match(r"python (tools/|train\.py |-m builders\.)|eg3d-rlhf ", lines[0]), (
        lines
    )
    return lines[0]


def arguments_of(words: list[str]) -> list[str]:
    """Return what starts a command line of ours from any folder:
    `python SCRIPT ...` or `eg3d-rlhf NOUN VERB ...`.
    """
    if words[:2] == ["python", "-m"]:
        return [sys.executable, *words[1:]]
    start = [str(REPO / words[1]), *words[2:]] if words[0] == "python" else ["-m", "eg3d_rlhf", *words[1:]]
    return [sys.executable, *start]


def flags_of(command: click.Command) -> list[str]:
    """Return the arguments in the example of a command's help. The example must name that command."""
    words = shlex.split(example_of(command))
    if words[0] == "python":
        return words[3:] if words[1] == "-m" else words[2:]
    count = 2 if " ".join(words[1:3]) in JOBS else 1
    assert command_of(" ".join(words[1 : 1 + count])) is command
    return words[1 + count :]


def run_example(command: click.Command, folder: Path, *more: str) -> str:
    """Run the example of a command's help in `folder`, with a cache there instead of the user's; returns what
    it printed.
    """
    runner = CliRunner(env={"EG3D_RLHF_CACHE": str(folder / "cache")})
    with contextlib.chdir(folder):
        done = runner.invoke(command, [*flags_of(command), *more])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout
