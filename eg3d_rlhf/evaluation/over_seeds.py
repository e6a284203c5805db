"""The demo with several training seeds, one after another, and their summaries side by side: `make seeds`.

Each figure by seed, its mean, its spread, and its intervals: by seed over latents, as the run's own summary
holds it; over seeds Student's t of the figures.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np

from eg3d_rlhf.core.cli import GroupedCommand, aligned, option
from eg3d_rlhf.core.statistics import t_mean_interval
from eg3d_rlhf.evaluation.flags import shared
from eg3d_rlhf.evaluation.trainings import Part, line_of, make
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from training import storage

DEMO = ("--reward=sigma", "--lambda-r=10")
SUMMARY = "summary.json"

# of a run's summary, with its interval there where it has one, and the words and form of the table
FIGURES = {
    "tuned_delta_mean": (None, "mean change of the reward", "+.3f"),
    "reward_delta_positive": (None, "positive reward deltas", ".0f"),
    "repaired": ("repaired_ci95", "of the error of broken heads gone", ".1%"),
    "repaired_by_filter": (None, "the same, by the best filter", ".1%"),
    "whole_made_worse": (None, "whole heads made worse", ".1%"),
    "identity_kept": (None, "identity of the face kept", ".1%"),
    "face_moved_voxels": (None, "face moved, voxels", ".3f"),
    "variety_before": (None, "variety of faces before, voxels", ".3f"),
    "variety_after": (None, "variety of faces after", ".3f"),
    "win_rate": ("win_rate_ci95", "annotator prefers the tuned shape", ".1%"),
    "utility_before": (None, "utility before", ".3f"),
    "utility_after": (None, "utility after", ".3f"),
    "frechet_ratio": (None, "image Fréchet, after / before", ".3f"),
    "images": (None, "images", ".0f"),
    "seconds": (None, "seconds", ".0f"),
}


def spread(values: Mapping[str, float]) -> dict:
    """A figure by seed with its mean, sample deviation and 95 % interval over seeds."""
    known = np.array(list(values.values()), dtype=np.float64)
    interval = t_mean_interval(known) if len(known) > 1 else None
    return {
        "by_seed": dict(values),
        "mean": float(known.mean()),
        "std": float(known.std(ddof=1)) if interval else 0.0,
        "ci95_over_seeds": [interval.lo, interval.hi] if interval else None,
    }


def over_seeds(records: Mapping[str, dict]) -> dict:
    """What `make seeds` writes: every figure that all summaries hold, and a row of `geometry` for each
    measure that all hold.
    """
    figures: dict = {"seeds": [int(seed) for seed in records]}
    for name, (interval, _, _) in FIGURES.items():
        if all(record.get(name) is not None for record in records.values()):
            figures[name] = spread({seed: float(record[name]) for seed, record in records.items()})
            if interval is not None:
                figures[name]["ci95_by_seed"] = {seed: record[interval] for seed, record in records.items()}
    if all("frechet_verdict" in record for record in records.values()):
        figures["frechet_ratio"]["verdicts"] = {
            seed: record["frechet_verdict"] for seed, record in records.items()
        }
    rows = {seed: {row["name"]: row for row in record["geometry"]} for seed, record in records.items()}
    shared = [name for name in next(iter(rows.values())) if all(name in by_name for by_name in rows.values())]
    figures["geometry"] = [
        measure(name, {seed: by_name[name] for seed, by_name in rows.items()}) for name in shared
    ]
    figures["over_optimisation"] = {
        seed: len(record["over_optimisation"]) for seed, record in records.items()
    }
    return figures


def measure(name: str, rows: Mapping[str, dict]) -> dict:
    """One measure of geometry: before, after and paired change by seed, the verdict of each."""
    change = spread({seed: row["paired"]["mean"] for seed, row in rows.items()})
    change["ci95_by_seed"] = {
        seed: [row["paired"]["mean_lo"], row["paired"]["mean_hi"]] for seed, row in rows.items()
    }
    return {
        "name": name,
        "higher_is_better": next(iter(rows.values()))["higher_is_better"],
        "before": spread({seed: row["before"] for seed, row in rows.items()}),
        "after": spread({seed: row["after"] for seed, row in rows.items()}),
        "change": change,
        "verdicts": {seed: row["verdict"] for seed, row in rows.items()},
    }


def table(figures: dict) -> list[list[str]]:
    """Rows of cells: a figure's words, its value by seed, mean ± deviation over seeds."""
    names = [str(seed) for seed in figures["seeds"]]
    rows = [["what", *(f"seed {name}" for name in names), "mean ± sd"]]
    for name, (_, words, form) in FIGURES.items():
        if name in figures:
            figure = figures[name]
            verdicts = figure.get("verdicts", {})
            cells = [f"{figure['by_seed'][seed]:{form}} {verdicts.get(seed, '')}".strip() for seed in names]
            rows.append([words, *cells, f"{figure['mean']:{form}} ± {figure['std']:{form.lstrip('+')}}"])
    for row in figures["geometry"]:
        change = row["change"]
        words = f"{row['name']}, change" + (" (higher is better)" if row["higher_is_better"] else "")
        cells = [f"{change['by_seed'][seed]:+.3g} {row['verdicts'][seed]}" for seed in names]
        rows.append([words, *cells, f"{change['mean']:+.3g} ± {change['std']:.2g}"])
    alarms = figures["over_optimisation"]
    return [*rows, ["alarms of the watch", *(str(alarms[seed]) for seed in names), ""]]


def trainings(out: Path, seeds: str, more: tuple[str, ...]) -> dict[str, Part]:
    """A run of the demo for each seed. Raises: ValueError where `more` sets what this command sets."""
    taken = [
        flag
        for flag in more
        if flag.split("=")[0] in ("--seed", "--outdir", "--resume", "--no-summary", "-n", "--dry-run")
    ]
    if taken:
        raise ValueError(
            f"seeds: expected flags that all seeds share, got {taken[0]}. Use --seeds and --out."
        )
    numbers = dict.fromkeys(parse_seeds(seeds))
    return {
        str(seed): Part.keyed(f"seed{seed}", out, [*DEMO, *more, f"--seed={seed}"], SUMMARY)
        for seed in numbers
    }


@click.command(cls=GroupedCommand)
@option("--seeds", metavar="LIST", default="0,1,2", help="Training seeds.")
@shared("out dry-run", out={"default": "runs/seeds"}, dry_run="Print the commands as JSON and stop.")
@click.argument("more", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def main(seeds: str, out: Path, dry_run: bool, more: tuple[str, ...]) -> None:
    """Repeat the demo with several training seeds and put their summaries side by side: `make seeds`.

    Each seed has a folder below --out. Finished runs are not repeated, interrupted ones go on: the same
    command continues. Flags after -- go to train.py.

    \b
    Example:
        eg3d-rlhf report seeds --seeds=0,1,2 --dry-run
    """
    parts = trainings(out, seeds, more)
    if dry_run:
        click.echo(
            json.dumps(
                {seed: "finished" if part.finished() else part.continued() for seed, part in parts.items()},
                indent=1,
            )
        )
        return
    for seed, part in parts.items():
        if not part.finished():
            click.echo(f"\n== seed {seed}: {line_of(part)}", err=True)
            make([[part]], quiet=False)
    runs = {seed: str(part.run.relative_to(out)) for seed, part in parts.items() if part.run is not None}
    figures = {
        **over_seeds({seed: json.loads((out / run / SUMMARY).read_text()) for seed, run in runs.items()}),
        "runs": runs,
        "flags": [*DEMO, *more],
    }
    storage.write_atomic(out / SUMMARY, (json.dumps(figures, indent=1, sort_keys=True) + "\n").encode())
    click.echo(f"\n{aligned(table(figures))}\n\nWritten to {out / SUMMARY}")
