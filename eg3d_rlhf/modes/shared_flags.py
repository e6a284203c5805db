"""Flags that several jobs share: one name and one meaning each; EG3D's spellings are second names."""

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
    """Print values as indented JSON, as --dry-run and --json do."""
    click.echo(json.dumps(values, indent=1))


def _flag(group: str, metavar: str | None, kind: Any, text: str, default: Any = None, **more: Any) -> dict:
    return {"group": group, "metavar": metavar, "type": kind, "help": text, "default": default, **more}


def _network(text: str, shown: str) -> dict:
    return _flag("What", "FILE|RUN", PATH, text, show_default=shown)


def _reward(text: str) -> dict:
    return _flag("What", "FILE", PATH, text, show_default="the run's own, else bundled")


_FLAGS: dict[str, dict[str, Any]] = {
    "before": _network("Generator before tuning.", "the bundled generator"),
    "after": _network("Tuned generator.", "newest snapshot of --run"),
    "run": _flag(
        "What", "RUN", PATH, "Run folder.", show_default="that of --after, else the newest in runs/"
    ),
    "control": _network("The same run with --lambda-r=0.", "the matching run in runs/"),
    "reward-ckpt": _reward(""),
    "heldout-reward": _reward("Second reward, never used in tuning."),
    "data": _flag("What", "ZIP|DIR|synthetic:people64", None, "", show_default="the run's own"),
    "network": _network("Generator.", "the bundled generator"),
    "latents": _flag("Samples", "LIST", None, "Seeds of latents and ranges of them, such as 0,2-5."),
    "psi": _flag("Samples", "FLOAT", click.FloatRange(0, 2, min_open=True), "Truncation.", Sources.psi),
    "cutoff": _flag("Samples", "INT", click.IntRange(min=0), "ws that truncation reaches.", 14),
    "n": _flag("Samples", "LATENTS", click.IntRange(min=16), "Latents behind a figure.", Sources.n),
    "seed": _flag("Samples", "INT", click.IntRange(min=0), "Other held-out latents per seed.", Sources.seed),
    "images": _flag("Samples", "INT", click.IntRange(min=16), "Images per distance.", Sources.images),
    "out": _flag("Run", "FILE", FILE, "File to write."),
    "outdir": _flag("Run", "FOLDER", FOLDER, "Folder to write into."),
    "batch": _flag("Run", "INT", COUNT, "Samples at once; bounds memory.", Sources.batch),
    "device": _flag("Run", None, click.Choice(["auto", "cpu", "cuda"]), "Where to compute.", "auto"),
    "jobs": _flag(
        "Run",
        "INT",
        COUNT,
        "Trainings side by side.",
        min(2, os.cpu_count() or 1),
        show_default="2, or the cores",
    ),
    "dry-run": _flag("Run", None, None, "Print the resolved settings as JSON and stop.", False, is_flag=True),
}
_SPELLINGS = {  # further ones; the flag's own name stays the parameter's
    "before": ("--network",),
    "latents": ("--seeds",),
    "psi": ("--trunc",),
    "cutoff": ("--trunc-cutoff",),
    "dry-run": ("-n",),
}


def shared(names: str, rare: str = "", **changes: str | dict):
    """The flags of these names, in this order, as a decorator.

    Args: rare: names of further ones, which are rare settings; changes: by flag, its help text or further
        arguments of its option.
    """
    made = []
    for name in (*names.split(), *rare.split()):
        parameter = name.replace("-", "_")
        change = changes.get(parameter, {})
        spellings = (f"--{name}", *_SPELLINGS.get(name, ()), parameter)
        words = {**_FLAGS[name], **({"help": change} if isinstance(change, str) else change)}
        made.append(option(*spellings, rare=name in rare.split(), **words))
    return together(*made)
