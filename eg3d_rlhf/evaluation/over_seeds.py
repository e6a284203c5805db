"""The demo with several training seeds, one after another, and their summaries side by side: `make seeds`.

Each figure by seed, its mean, its spread, and its intervals: by seed over latents, as the run's own summary
holds it; over seeds Student's t of the figures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.evaluation.trainings import Part, make_in_terminal
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.table import over_seeds
from training import storage

DEMO = ("--reward=sigma", "--lambda-r=10")
SUMMARY = "summary.json"

# of a run's summary, with its interval there where it has one, and the words and form of the table
FIGURES = {
    "tuned_delta_mean": (None, "mean change of the reward", "+.3f"),
    "reward_delta_positive": (None, "positive reward deltas", ".0f"),
    "error_reduction": ("error_reduction_ci95", "error reduction, defective heads", ".1%"),
    "error_reduction_by_post_processing": (None, "the same, by the best post-processing", ".1%"),
    "intact_degraded": (None, "intact heads degraded", ".1%"),
    "identity_kept": (None, "identity of the face kept", ".1%"),
    "face_moved_voxels": (None, "face moved, voxels", ".3f"),
    "variety_before": (None, "variety of faces before, voxels", ".3f"),
    "variety_after": (None, "variety of faces after", ".3f"),
    "win_rate": ("win_rate_ci95", "simulated annotator prefers the tuned shape", ".1%"),
    "utility_before": (None, "utility before", ".3f"),
    "utility_after": (None, "utility after", ".3f"),
    "frechet_ratio": (None, "image Fréchet, after / before", ".3f"),
    "images": (None, "images", ".0f"),
    "seconds": (None, "seconds", ".0f"),
}


def gather(records: Mapping[str, dict]) -> dict:
    """What `make seeds` writes: every figure that all summaries hold, and a row of `geometry` for each
    measure that all hold.
    """
    figures: dict = {"seeds": [int(seed) for seed in records]}
    for name, (interval, _, _) in FIGURES.items():
        if all(record.get(name) is not None for record in records.values()):
            figures[name] = over_seeds({seed: float(record[name]) for seed, record in records.items()})
            if interval is not None:
                figures[name]["ci95_by_seed"] = {seed: record[interval] for seed, record in records.items()}
    if all("frechet_outcome" in record for record in records.values()):
        figures["frechet_ratio"]["outcomes"] = {
            seed: record["frechet_outcome"] for seed, record in records.items()
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
    change = over_seeds({seed: row["paired"]["mean"] for seed, row in rows.items()})
    change["ci95_by_seed"] = {
        seed: [row["paired"]["mean_lo"], row["paired"]["mean_hi"]] for seed, row in rows.items()
    }
    return {
        "name": name,
        "higher_is_better": next(iter(rows.values()))["higher_is_better"],
        "before": over_seeds({seed: row["before"] for seed, row in rows.items()}),
        "after": over_seeds({seed: row["after"] for seed, row in rows.items()}),
        "change": change,
        "outcomes": {seed: row["outcome"] for seed, row in rows.items()},
    }


def table(figures: dict) -> list[list[str]]:
    """Rows of cells: a figure's words, its value by seed, mean ± standard deviation over seeds."""
    names = [str(seed) for seed in figures["seeds"]]
    rows = [["what", *(f"seed {name}" for name in names), "mean ± sd"]]
    for name, (_, words, form) in FIGURES.items():
        if name in figures:
            figure = figures[name]
            outcomes = figure.get("outcomes", {})
            cells = [f"{figure['by_seed'][seed]:{form}} {outcomes.get(seed, '')}".strip() for seed in names]
            rows.append([words, *cells, f"{figure['mean']:{form}} ± {figure['std']:{form.lstrip('+')}}"])
    for row in figures["geometry"]:
        change = row["change"]
        words = f"{row['name']}, change" + (" (higher is better)" if row["higher_is_better"] else "")
        cells = [f"{change['by_seed'][seed]:+.3g} {row['outcomes'][seed]}" for seed in names]
        rows.append([words, *cells, f"{change['mean']:+.3g} ± {change['std']:.2g}"])
    alarms = figures["over_optimisation"]
    return [*rows, ["alarms of the monitor", *(str(alarms[seed]) for seed in names), ""]]


def trainings(out: Path, seeds: str, more: tuple[str, ...]) -> dict[str, Part]:
    """A run of the demo for each seed. Raises: ValueError where `more` sets what this command sets."""
    taken = [
        flag
        for flag in more
        if flag.split("=")[0] in ("--seed", "--outdir", "--resume", "--no-summary", "-n", "--dry-run")
    ]
    if taken:
        raise ValueError(
            f"seeds: expected flags that all seeds share, got {taken[0]}. Use --seeds and --outdir."
        )
    numbers = dict.fromkeys(parse_seeds(seeds))
    return {
        str(seed): Part.keyed(f"seed{seed}", out, [*DEMO, *more, f"--seed={seed}"], SUMMARY)
        for seed in numbers
    }


def work(out: Path, parts: Mapping[str, Part], flags: Sequence[str]) -> dict:
    """Make the runs that are missing, and write <out>/summary.json; returns its figures."""
    for seed, part in parts.items():
        make_in_terminal(f"seed {seed}", part)
    runs = {seed: str(part.run.relative_to(out)) for seed, part in parts.items() if part.run is not None}
    records = {
        seed: version_0_1.summary(json.loads((out / run / SUMMARY).read_text())) for seed, run in runs.items()
    }
    figures = {**gather(records), "runs": runs, "flags": list(flags)}
    storage.write_atomic(out / SUMMARY, (json.dumps(figures, indent=1, sort_keys=True) + "\n").encode())
    return figures
