"""Flags that several jobs share: one name and one meaning each; EG3D's spellings are second names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.core.cli import option, together
from eg3d_rlhf.evaluation.sources import Sources

PATH = click.Path(path_type=Path)
_WHAT, _SAMPLES, _RUN = ({"group": group, "default": None} for group in ("What", "Samples", "Run"))
_NETWORK = {**_WHAT, "metavar": "FILE|RUN", "type": PATH}
_REWARD = {**_WHAT, "metavar": "FILE", "type": PATH}
_SEED = {
    "metavar": "INT",
    "type": click.IntRange(min=0),
    "default": Sources.seed,
    "help": "Other held-out latents per seed.",
}
_FLAGS: dict[str, dict[str, Any]] = {
    "before": {**_NETWORK, "show_default": "the bundled generator", "help": "Generator before tuning."},
    "after": {**_NETWORK, "show_default": "newest snapshot of --run", "help": "Tuned generator."},
    "run": {
        **_WHAT,
        "metavar": "RUN",
        "type": PATH,
        "show_default": "that of --after, else the newest in runs/",
        "help": "Run folder.",
    },
    "control": {
        **_NETWORK,
        "show_default": "the matching run in runs/",
        "help": "The same run with --lambda-r=0.",
    },
    "reward-ckpt": {**_REWARD, "show_default": "the run's own, else bundled"},
    "reward-watch": {
        **_REWARD,
        "show_default": "the run's own, else bundled",
        "help": "Second reward, never used in tuning.",
    },
    "data": {**_WHAT, "metavar": "ZIP|DIR|synthetic:people64", "show_default": "the run's own"},
    "network": {
        **_WHAT,
        "metavar": "FILE|RUN",
        "type": PATH,
        "show_default": "the bundled generator",
        "help": "Generator.",
    },
    "latents": {**_SAMPLES, "metavar": "LIST", "help": "Seeds of latents and ranges of them, such as 0,2-5."},
    "psi": {
        **_SAMPLES,
        "metavar": "FLOAT",
        "type": click.FloatRange(0, 2, min_open=True),
        "default": Sources.psi,
        "help": "Truncation.",
    },
    "cutoff": {
        **_SAMPLES,
        "metavar": "INT",
        "type": click.IntRange(min=0),
        "default": 14,
        "help": "ws that truncation reaches.",
    },
    "n": {
        **_SAMPLES,
        "metavar": "LATENTS",
        "type": click.IntRange(min=16),
        "default": Sources.n,
        "help": "Latents behind a figure.",
    },
    "seed": {**_SAMPLES, **_SEED},
    "images": {
        **_SAMPLES,
        "metavar": "INT",
        "type": click.IntRange(min=16),
        "default": Sources.images,
        "help": "Images per distance.",
    },
    "out": {
        **_RUN,
        "metavar": "FOLDER",
        "type": click.Path(path_type=Path, file_okay=False),
        "help": "Folder to write.",
    },
    "outdir": {
        **_RUN,
        "metavar": "FOLDER",
        "type": click.Path(path_type=Path, file_okay=False),
        "help": "Folder to write into.",
    },
    "batch": {
        **_RUN,
        "metavar": "INT",
        "type": click.IntRange(min=1),
        "default": Sources.batch,
        "help": "Samples at once; bounds memory.",
    },
    "device": {
        **_RUN,
        "type": click.Choice(["auto", "cpu", "cuda"]),
        "default": "auto",
        "help": "Where to compute.",
    },
    "dry-run": {
        **_RUN,
        "is_flag": True,
        "default": False,
        "help": "Print the resolved settings as JSON and stop.",
    },
}
_SPELLINGS = {  # further ones; the flag's own name stays the parameter's
    "before": ("--network",),
    "latents": ("--seeds",),
    "psi": ("--trunc",),
    "cutoff": ("--trunc-cutoff",),
    "dry-run": ("-n",),
}


def some_of(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated list, in the order of those that are known.

    Raises: ValueError for others, and for none.
    """
    known = list(known)
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    if not wanted or wanted - set(known):
        raise ValueError(f"{flag}: expected some of {', '.join(known)}, got {text!r}. Correct the list.")
    return [name for name in known if name in wanted]


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
