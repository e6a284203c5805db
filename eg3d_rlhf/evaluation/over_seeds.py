"""Run the demo with several training seeds, one after another, and compare their summaries: `make seeds`.

The result holds each figure by seed, its mean and standard deviation over seeds, and two kinds of interval:
each seed's interval over latents, from the summary of that run, and Student's t interval over seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.evaluation.trainings import Part, make_in_terminal
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.table import over_seeds
from training import storage

DEMO = ("--reward=sigma", "--lambda-r=10")  # flags of train.py
SUMMARY = "summary.json"  # of each run, and of all seeds together in the parent folder

# key in a run's summary: (key of its interval there or None, words of the table, format)
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
    """Combine the summaries of the seeds.

    The result holds the figures, and the measures of `geometry`, that no summary lacks.
    Args: records: summary.json of each run, by seed.
    """
    figures: dict = {"seeds": [int(seed) for seed in records]}
    for name, (interval, _, _) in FIGURES.items():
        # a figure that one run lacks (say, no defective heads) has no mean over all seeds
        if all(record.get(name) is not None for record in records.values()):
            figures[name] = over_seeds({seed: float(record[name]) for seed, record in records.items()})
            if interval is not None:
                figures[name]["ci95_by_seed"] = {seed: record[interval] for seed, record in records.items()}
    if all("frechet_outcome" in record for record in records.values()):
        figures["frechet_ratio"]["outcomes"] = {
            seed: record["frechet_outcome"] for seed, record in records.items()
        }
    rows = {seed: {row["name"]: row for row in record["geometry"]} for seed, record in records.items()}
    # in the order of the first summary
    shared = [name for name in next(iter(rows.values())) if all(name in by_name for by_name in rows.values())]
    figures["geometry"] = [
        measure(name, {seed: by_name[name] for seed, by_name in rows.items()}) for name in shared
    ]
    # number of alarms of the monitor
    figures["over_optimisation"] = {
        seed: len(record["over_optimisation"]) for seed, record in records.items()
    }
    return figures


def measure(name: str, rows: Mapping[str, dict]) -> dict:
    """Combine a geometry measure over seeds: before, after, paired change, and the outcome of each seed."""
    # the mean paired change of each seed is one observation of the interval over seeds
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
    """Format rows of cells: words of a figure, its value by seed, mean ± standard deviation over seeds."""
    names = [str(seed) for seed in figures["seeds"]]
    rows = [["what", *(f"seed {name}" for name in names), "mean ± sd"]]
    for name, (_, words, form) in FIGURES.items():
        if name in figures:
            figure = figures[name]
            outcomes = figure.get("outcomes", {})  # only the Fréchet ratio has any
            cells = [f"{figure['by_seed'][seed]:{form}} {outcomes.get(seed, '')}".strip() for seed in names]
            # a standard deviation is never negative, so it gets no sign
            rows.append([words, *cells, f"{figure['mean']:{form}} ± {figure['std']:{form.lstrip('+')}}"])
    for row in figures["geometry"]:
        change = row["change"]
        words = f"{row['name']}, change" + (" (higher is better)" if row["higher_is_better"] else "")
        cells = [f"{change['by_seed'][seed]:+.3g} {row['outcomes'][seed]}" for seed in names]
        rows.append([words, *cells, f"{change['mean']:+.3g} ± {change['std']:.2g}"])
    alarms = figures["over_optimisation"]
    return [*rows, ["alarms of the monitor", *(str(alarms[seed]) for seed in names), ""]]


def trainings(out: Path, seeds: str, more: tuple[str, ...]) -> dict[str, Part]:
    """Make a part for each seed: the demo with that seed.

    Args: out: parent of their folders; seeds: list of training seeds; more: further flags of train.py.
    Raises: ValueError if `more` sets a flag that this command sets itself.
    """
    taken = [
        flag
        for flag in more
        if flag.split("=")[0] in ("--seed", "--outdir", "--resume", "--no-summary", "-n", "--dry-run")
    ]
    if taken:
        raise ValueError(
            f"seeds: {taken[0]} cannot be passed on, since this command sets it for each seed. Use --seeds"
            " and --outdir."
        )
    numbers = dict.fromkeys(parse_seeds(seeds))  # a seed that is named twice is run once
    return {
        str(seed): Part.keyed(f"seed{seed}", out, [*DEMO, *more, f"--seed={seed}"], SUMMARY)
        for seed in numbers
    }


def work(out: Path, parts: Mapping[str, Part], flags: Sequence[str]) -> dict:
    """Run the seeds that are not finished, and write <out>/summary.json; return its content."""
    for seed, part in parts.items():
        make_in_terminal(f"seed {seed}", part)
    runs = {seed: str(part.run.relative_to(out)) for seed, part in parts.items() if part.run is not None}
    # runs that version 0.1 finished are not repeated; their summaries are translated
    records = {
        seed: version_0_1.summary(json.loads((out / run / SUMMARY).read_text())) for seed, run in runs.items()
    }
    figures = {**gather(records), "runs": runs, "flags": list(flags)}
    storage.write_atomic(out / SUMMARY, (json.dumps(figures, indent=1, sort_keys=True) + "\n").encode())
    return figures
