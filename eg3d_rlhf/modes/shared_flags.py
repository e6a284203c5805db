"""Options that several jobs share. Each has one name and one meaning; EG3D's spellings are second names."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.core.cli import option, together
from eg3d_rlhf.evaluation.comparison_sources import Sources

PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(min=1)
rare_option = functools.partial(option, rare=True)
count_option = functools.partial(option, metavar="INT", type=COUNT)
whole_option = functools.partial(option, metavar="INT", type=click.IntRange(min=0))
file_option = functools.partial(option, metavar="FILE", type=FILE)
name_option = functools.partial(option, metavar="NAME")


def print_json(values: Any) -> None:
    """Print values as indented JSON, for --dry-run and --json."""
    click.echo(json.dumps(values, indent=1))


def _flag(group: str, metavar: str | None, kind: Any, text: str, default: Any = None, **more: Any) -> dict:
    """Return the keyword arguments of one option."""
    return {"group": group, "metavar": metavar, "type": kind, "help": text, "default": default, **more}


def _network(text: str, shown: str) -> dict:
    """Return the option of a generator file; `shown` describes its default."""
    return _flag("What", "FILE|RUN", PATH, text, show_default=shown)


def _reward(text: str) -> dict:
    """Return the option of a reward file."""
    return _flag("What", "FILE", PATH, text, show_default="the run's own, else bundled")


# By name: the option's arguments. Jobs that leave a help text empty here pass their own to `shared`.
_FLAGS: dict[str, dict[str, Any]] = {
    "before": _network("Generator before tuning: a network file or a run folder.", "the bundled generator"),
    "after": _network("Tuned generator: a network file or a run folder.", "newest snapshot of --run"),
    "run": _flag(
        "What",
        "RUN",
        PATH,
        "Folder of the tuning run.",
        show_default="that of --after, else the newest in runs/",
    ),
    "control": _network("Control: the same run with --lambda-r=0.", "the matching run in runs/"),
    "reward-ckpt": _reward("Reward of the run."),
    "heldout-reward": _reward("Held-out reward, which was not used in tuning."),
    "data": _flag("What", "ZIP|DIR|synthetic:people64", None, "", show_default="the run's own"),
    "network": _network("Generator: a network file or a run folder.", "the bundled generator"),
    "latents": _flag("Samples", "LIST", None, "Seeds of the latents, as a list with ranges: 0,2-5."),
    "psi": _flag("Samples", "FLOAT", click.FloatRange(0, 2, min_open=True), "Truncation psi.", Sources.psi),
    "cutoff": _flag(
        "Samples",
        "INT",
        click.IntRange(min=0),
        "Number of ws, counted from the first, that are truncated.",
        14,
    ),
    "n": _flag(
        "Samples", "LATENTS", click.IntRange(min=16), "Number of latents per reported value.", Sources.n
    ),
    "seed": _flag(
        "Samples", "INT", click.IntRange(min=0), "Random seed of the held-out latents.", Sources.seed
    ),
    "images": _flag(
        "Samples",
        "INT",
        click.IntRange(min=16),
        "Number of images per image distance (FID, KID).",
        Sources.images,
    ),
    "out": _flag("Run", "FILE", FILE, "File to write."),
    "outdir": _flag("Run", "FOLDER", FOLDER, "Folder to write into."),
    "batch": _flag("Run", "INT", COUNT, "Samples per batch; less needs less memory.", Sources.batch),
    "device": _flag(
        "Run",
        None,
        click.Choice(["auto", "cpu", "cuda"]),
        "Device to compute on; auto is CUDA where available.",
        "auto",
    ),
    "jobs": _flag(
        "Run",
        "INT",
        COUNT,
        "Number of trainings that run in parallel.",
        min(2, os.cpu_count() or 1),
        show_default="2, or the cores",
    ),
    "dry-run": _flag("Run", None, None, "Print the resolved settings as JSON and stop.", False, is_flag=True),
}
_SPELLINGS = {  # second spellings, for EG3D's users; the parameter keeps the first name
    "before": ("--network",),
    "latents": ("--seeds",),
    "psi": ("--trunc",),
    "cutoff": ("--trunc-cutoff",),
    "dry-run": ("-n",),
}


def shared(names: str, rare: str = "", **changes: str | dict):
    """Return a decorator that adds the options of these names, in this order.

    Args:
        names: names of options, separated by spaces.
        rare: names of further options, which become rare settings (--set NAME=VALUE).
        changes: by option, its help text or other arguments of its option for this job.
    """
    # one decorator per option
    made = []
    for name in (*names.split(), *rare.split()):
        parameter = name.replace("-", "_")
        change = changes.get(parameter, {})
        spellings = (f"--{name}", *_SPELLINGS.get(name, ()), parameter)
        words = {**_FLAGS[name], **({"help": change} if isinstance(change, str) else change)}
        # a string changes the help text alone; a dictionary changes any argument of the option
        made.append(option(*spellings, rare=name in rare.split(), **words))
    return together(*made)
