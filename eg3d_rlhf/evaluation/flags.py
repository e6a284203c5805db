"""Flags that the commands of evidence share; each function returns a decorator as `eg3d_rlhf.cli.option` does."""

from pathlib import Path

import click

from eg3d_rlhf.cli import option, together
from eg3d_rlhf.evaluation.comparison import Sources

DEFAULTS = Sources()
PATH = click.Path(path_type=Path)
OWN = "the run's own, else bundled"


def before(help: str = "Generator before tuning."):
    """--before."""
    return option("--before", group="What", metavar="FILE|RUN", type=PATH, default=None, show_default="the bundled generator", help=help)


def after(found: str = "newest snapshot of --run"):
    """--after; `found` says what is taken where it is not given."""
    return option("--after", group="What", metavar="FILE|RUN", type=PATH, default=None, show_default=found, help="Tuned generator.")


def run(help: str):
    """--run."""
    shown = "that of --after, else the newest in runs/"
    return option("--run", group="What", metavar="RUN", type=PATH, default=None, show_default=shown, help=help)


def control(help: str = "The same run with --lambda-r=0."):
    """--control."""
    shown = "the matching run in runs/"
    return option("--control", group="What", metavar="FILE|RUN", type=PATH, default=None, show_default=shown, help=help)


def reward(help: str, name: str = "--reward-ckpt", found: str = OWN):
    """--reward-ckpt, or a second reward of another `name`."""
    return option(name, group="What", metavar="FILE", type=PATH, default=None, show_default=found, help=help)


def data(help: str, found: str = "the run's own"):
    """--data."""
    return option("--data", group="What", metavar="ZIP|DIR|synthetic:heads64", default=None, show_default=found, help=help)


def samples(
    n: int = DEFAULTS.n, least: int = 16, n_help: str = "Latents behind a figure.", seed_help: str = "Other held-out latents per seed."
):
    """--psi, --n and --seed."""
    positive = click.FloatRange(0, 2, min_open=True)
    return together(
        option("--psi", group="Samples", metavar="FLOAT", type=positive, default=DEFAULTS.psi, help="Truncation."),
        option("--n", group="Samples", metavar="LATENTS", type=click.IntRange(min=least), default=n, help=n_help),
        option("--seed", group="Samples", metavar="INT", type=click.IntRange(min=0), default=0, help=seed_help),
    )


def images(default: int = DEFAULTS.images):
    """--images."""
    return option("--images", group="Samples", metavar="INT", type=click.IntRange(min=16), default=default, help="Images per distance.")


def running(
    folder: str, batch: int = DEFAULTS.batch, fresh: str = "Compute everything again.", printed: str = "the resolved settings",
    out: str = "Folder to write.", at_once: str = "Samples at once; bounds memory.",
):
    """--out, --fresh, --batch, --device and --dry-run."""
    path = click.Path(path_type=Path, file_okay=False)
    return together(
        option("--out", group="Run", metavar="FOLDER", type=path, default=Path("runs/reports") / folder, help=out),
        option("--fresh", group="Run", is_flag=True, help=fresh),
        option("--batch", group="Run", metavar="INT", type=click.IntRange(min=1), default=batch, help=at_once),
        option("--device", group="Run", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute."),
        option("-n", "--dry-run", group="Run", is_flag=True, help=f"Print {printed} as JSON and stop."),
    )
