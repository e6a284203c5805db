"""Run the demo with several training seeds, one after another, and compare their summaries: `make seeds`.

The result holds each metric by seed, its mean and standard deviation over seeds, and two kinds of interval:
each seed's interval over latents, from the summary of that run, and Student's t interval over seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.evaluation.trainings import Part, make_in_terminal
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.table import summarise_over_seeds
from training import storage

DEMO = ("--reward=sigma", "--lambda-r=10")  # flags of train.py
SUMMARY = "summary.json"  # name of each run's summary, and of the summary of all seeds in the parent folder

# key of a metric in a run's summary: (key of its interval in that summary or None, text of the table, format)
TABLE_METRICS = {
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


def gather(summary_by_seed: Mapping[str, dict]) -> dict:
    """Combine the summaries of the runs with different seeds.

    The result holds only the metrics, and the measures of "geometry", that every summary has.
    Args: summary_by_seed: content of summary.json of each run, by seed.
    Returns: dict that `table` formats: the statistics of each metric by its name, and "seeds", "geometry" and
        "over_optimisation".
    """
    combined_metrics: dict = {"seeds": [int(seed) for seed in summary_by_seed]}
    for metric_name, (interval_key, _, _) in TABLE_METRICS.items():
        # A metric that one run lacks has no mean over all seeds. A run without defective heads, for example,
        # has no error reduction.
        if all(summary.get(metric_name) is not None for summary in summary_by_seed.values()):
            combined_metrics[metric_name] = summarise_over_seeds(
                {seed: float(summary[metric_name]) for seed, summary in summary_by_seed.items()}
            )
            if interval_key is not None:
                combined_metrics[metric_name]["ci95_by_seed"] = {
                    seed: summary[interval_key] for seed, summary in summary_by_seed.items()
                }
    # The outcome exists only if there are more images than features.
    if all("frechet_outcome" in summary for summary in summary_by_seed.values()):
        combined_metrics["frechet_ratio"]["outcomes"] = {
            seed: summary["frechet_outcome"] for seed, summary in summary_by_seed.items()
        }
    measures_by_seed = {
        seed: {measure_row["name"]: measure_row for measure_row in summary["geometry"]}
        for seed, summary in summary_by_seed.items()
    }
    # measures that every summary has, in the order of the first summary
    shared_names = [
        metric_name
        for metric_name in next(iter(measures_by_seed.values()))
        if all(metric_name in measure_rows for measure_rows in measures_by_seed.values())
    ]
    combined_metrics["geometry"] = [
        measure(
            metric_name, {seed: measure_rows[metric_name] for seed, measure_rows in measures_by_seed.items()}
        )
        for metric_name in shared_names
    ]
    # number of alarms of the over-optimisation monitor, by seed
    combined_metrics["over_optimisation"] = {
        seed: len(summary["over_optimisation"]) for seed, summary in summary_by_seed.items()
    }
    return combined_metrics


def measure(measure_name: str, row_by_seed: Mapping[str, dict]) -> dict:
    """Combine a geometry measure over seeds: means before and after, paired change, and each seed's outcome.

    Args:
        measure_name: name of the measure.
        row_by_seed: the measure's row in the summary of each run, by seed.
    """
    # the mean paired change of each seed is one observation of the interval over seeds
    combined_change = summarise_over_seeds(
        {seed: measure_row["paired"]["mean"] for seed, measure_row in row_by_seed.items()}
    )
    combined_change["ci95_by_seed"] = {
        seed: [measure_row["paired"]["mean_lo"], measure_row["paired"]["mean_hi"]]
        for seed, measure_row in row_by_seed.items()
    }
    return {
        "name": measure_name,
        "higher_is_better": next(iter(row_by_seed.values()))["higher_is_better"],
        "before": summarise_over_seeds(
            {seed: measure_row["before"] for seed, measure_row in row_by_seed.items()}
        ),
        "after": summarise_over_seeds(
            {seed: measure_row["after"] for seed, measure_row in row_by_seed.items()}
        ),
        "change": combined_change,
        "outcomes": {seed: measure_row["outcome"] for seed, measure_row in row_by_seed.items()},
    }


def table(metrics: dict) -> list[list[str]]:
    """Format the table: for each metric its text, its value by seed, and the mean ± standard deviation.

    Args: metrics: result of `gather`.
    """
    seed_texts = [str(seed) for seed in metrics["seeds"]]
    table_rows = [["what", *(f"seed {seed_text}" for seed_text in seed_texts), "mean ± sd"]]
    for metric_name, (_, row_text, number_format) in TABLE_METRICS.items():
        if metric_name in metrics:
            metric_statistics = metrics[metric_name]
            outcomes = metric_statistics.get("outcomes", {})  # only the Fréchet ratio has any
            cell_texts = [
                f"{metric_statistics['by_seed'][seed]:{number_format}} {outcomes.get(seed, '')}".strip()
                for seed in seed_texts
            ]
            # A standard deviation is never negative, so its format has no sign.
            table_rows.append(
                [
                    row_text,
                    *cell_texts,
                    f"{metric_statistics['mean']:{number_format}} ±"
                    f" {metric_statistics['std']:{number_format.lstrip('+')}}",
                ]
            )
    for measure_row in metrics["geometry"]:
        combined_change = measure_row["change"]
        row_text = f"{measure_row['name']}, change" + (
            " (higher is better)" if measure_row["higher_is_better"] else ""
        )
        cell_texts = [
            f"{combined_change['by_seed'][seed]:+.3g} {measure_row['outcomes'][seed]}" for seed in seed_texts
        ]
        table_rows.append(
            [row_text, *cell_texts, f"{combined_change['mean']:+.3g} ± {combined_change['std']:.2g}"]
        )
    alarm_count_by_seed = metrics["over_optimisation"]
    return [
        *table_rows,
        ["alarms of the monitor", *(str(alarm_count_by_seed[seed]) for seed in seed_texts), ""],
    ]


def list_runs(parent_folder: Path, seeds_text: str, more_flags: tuple[str, ...]) -> dict[str, Part]:
    """Return for each training seed the run of the demo with that seed.

    Args:
        parent_folder: parent of the runs' folders.
        seeds_text: training seeds, comma-separated or as a range.
        more_flags: further flags of train.py.

    Raises: ValueError if `more_flags` contains a flag that this command sets itself.
    """
    reserved_flags = [
        flag
        for flag in more_flags
        if flag.split("=")[0] in ("--seed", "--outdir", "--resume", "--no-summary", "-n", "--dry-run")
    ]
    if reserved_flags:
        raise ValueError(
            f"seeds: {reserved_flags[0]} cannot be among the flags for train.py, since this command controls"
            " the seed, the folder, the resumption and the summary of each run. Remove this flag. Pass the"
            " training seeds with --seeds of this command, and the folder with --outdir."
        )
    training_seeds = dict.fromkeys(parse_seeds(seeds_text))  # a seed that is named twice is run once
    return {
        str(seed): Part.keyed(f"seed{seed}", parent_folder, [*DEMO, *more_flags, f"--seed={seed}"], SUMMARY)
        for seed in training_seeds
    }


def work(parent_folder: Path, training_by_seed: Mapping[str, Part], flags: Sequence[str]) -> dict:
    """Run the demo with the seeds that are not finished, and write summary.json into `parent_folder`.

    Args:
        parent_folder: parent of the runs' folders.
        training_by_seed: the run of each seed, as `list_runs` returns them.
        flags: flags of the command, which the summary records.

    Returns: the content of this summary.json.
    """
    for seed, training in training_by_seed.items():
        make_in_terminal(f"seed {seed}", training)
    run_folder_by_seed = {
        seed: str(training.run.relative_to(parent_folder))
        for seed, training in training_by_seed.items()
        if training.run is not None
    }
    # Runs that version 0.1 finished are not repeated. Their summaries get the keys of this version.
    summary_by_seed = {
        seed: version_0_1.summary(json.loads((parent_folder / run_folder / SUMMARY).read_text()))
        for seed, run_folder in run_folder_by_seed.items()
    }
    summary_of_seeds = {**gather(summary_by_seed), "runs": run_folder_by_seed, "flags": list(flags)}
    storage.write_atomic(
        parent_folder / SUMMARY, (json.dumps(summary_of_seeds, indent=1, sort_keys=True) + "\n").encode()
    )
    return summary_of_seeds
