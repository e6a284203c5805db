"""The runnable example that a command's --help shows."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner

REPO = Path(__file__).resolve().parents[2]


def example_of(command: click.Command) -> str:
    """The one command line under 'Example:' in the help text, as a user would copy it."""
    text = CliRunner().invoke(command, ["--help"]).stdout
    blocks = re.findall(r"Example:\n((?:[ ]+.*\S.*\n)+)", text)
    assert len(blocks) == 1, text
    lines = [line.strip() for line in blocks[0].splitlines()]
    assert len(lines) == 1 and lines[0].startswith(("python tools/", "python train.py ", "eg3d-rlhf ")), lines
    return lines[0]


def arguments_of(words: list[str]) -> list[str]:
    """What starts a command line of ours from any folder:
    `python SCRIPT ...` or `eg3d-rlhf NOUN VERB ...`.
    """
    start = [str(REPO / words[1]), *words[2:]] if words[0] == "python" else ["-m", "eg3d_rlhf", *words[1:]]
    return [sys.executable, *start]


def own_cache(folder: Path) -> dict[str, str]:
    """Environment in which synthetic sets are rendered below `folder`, not in the user's cache."""
    return {**os.environ, "EG3D_RLHF_CACHE": str(folder / "cache")}


def run_example(command: click.Command, folder: Path, *more: str) -> str:
    """Run the example of a command's help in `folder`; returns what it printed."""
    line = [*arguments_of(shlex.split(example_of(command))), *more]
    done = subprocess.run(
        line, cwd=folder, env=own_cache(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
