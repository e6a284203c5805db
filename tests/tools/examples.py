"""The runnable example that a tool's --help shows."""

import os
import re
from pathlib import Path

import click
from click.testing import CliRunner


def example_of(command: click.Command) -> str:
    """The one command line under 'Example:' in the help text, as a user would copy it."""
    text = CliRunner().invoke(command, ["--help"]).stdout
    found = re.findall(r"Example:\n((?:[ ]+.*\S.*\n)+)", text)
    assert len(found) == 1, text
    lines = [line.strip() for line in found[0].splitlines()]
    assert len(lines) == 1 and lines[0].startswith(("python tools/", "python train.py ")), lines
    return lines[0]


def own_cache(folder: Path) -> dict[str, str]:
    """Environment in which synthetic sets are rendered below `folder`, not in the user's cache."""
    return {**os.environ, "EG3D_RLHF_CACHE": str(folder / "cache")}
