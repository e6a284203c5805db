"""Evaluate a run of train.py with a reward at its end.

The networks before and after tuning are compared on held-out latents. The results are printed as a table and
written to summary.json; images and meshes of some latents are written as well.
Shapes: N latents.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import aligned, versions
from eg3d_rlhf.core.registry import load_plugins
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.statistics import decimals_apart
from eg3d_rlhf.evaluation import heldout_evaluators
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.heldout_evaluators import (
    against_ground_truth,
    blind_pairs,
    frechet,
    geometry,
    shapes,
)
from eg3d_rlhf.evaluation.paired import span
from eg3d_rlhf.evaluation.run_images import CHANGED, CHOSEN, choose_latents, surface_change, write_images
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.generators import Generator, LoadedGenerator, as_generator, load_generator
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.early_stop import EarlyStop
from eg3d_rlhf.tuning.gan.heldout_metrics import Monitor
from eg3d_rlhf.tuning.gan.settings import control_differs
from training import networks, rehearsal, storage
from training.networks import state_hash
from training.progress import tqdm, working

MAX_PROCESSES = 4  # largest number of worker processes; each of them holds both networks in memory


@dataclass
class Evaluation:
    """Inputs of the final evaluation, which exist before the run begins."""

    settings: dict  # settings of the run, as its folder records them
    before: Generator  # frozen generator before tuning
    reward: Reward
    monitor: Monitor | None = None
    early_stop: EarlyStop | None = None  # selects the snapshot to evaluate; None: the last networks


def reward_shift(comparison: Comparison) -> dict:
    """Compute the rewards of held-out latents before and after tuning, and their paired differences.

    Values are in the reward's own scale, which has no unit.

    Returns: entries of summary.json: means and standard deviations before and after, and the differences.
    """
    # [N]
    scores_before, scores_after = (
        comparison.scores(generator, comparison.seeds()).numpy()
        for generator in (comparison.before, comparison.after)
    )
    reward_changes = scores_after - scores_before  # paired changes, [N]
    return {
        "reward_before": {"mean": float(scores_before.mean()), "std": float(scores_before.std())},
        "reward_after": {"mean": float(scores_after.mean()), "std": float(scores_after.std())},
        "reward_delta_positive": int((reward_changes > 0).sum()),  # number of latents whose reward rose
        "reward_delta_n": len(reward_changes),
        "tuned_delta_mean": float(reward_changes.mean()),
        "reward_deltas": reward_changes.tolist(),  # by seed, in the order of "seeds"
    }


def control_delta(run_settings: dict, tuned_delta_mean: float) -> dict:
    """Return the mean change of the reward in the control run, and the source of this value.

    A control run is trained without the reward (lambda_r = 0). The control is this run itself if its lambda_r
    is 0, else the run of --control, else the bundled record of a control of the demo.

    Args:
        run_settings: settings of this run.
        tuned_delta_mean: mean change of the reward in this run.
    Returns: dict with "control_delta_mean" (a number) and "control_source" (a text). If the control's
        settings differ from those of this run, "control_delta_mean" is None, and "control_source" explains
        how to make a control. If the control's summary has metrics of heads, "control_heads" holds them.
    """
    if run_settings["lambda_r"] == 0:
        return {"control_delta_mean": tuned_delta_mean, "control_source": "this run"}
    summary_path = bundled.CONTROL if run_settings["control"] is None else Path(run_settings["control"])
    summary_path = summary_path / "summary.json" if summary_path.is_dir() else summary_path
    control_summary = version_0_1.summary(json.loads(summary_path.read_text()))
    # The folder of a run holds its settings in another file; the bundled record includes its settings.
    options_path = summary_path.parent / "training_options.json"
    recorded_settings = control_summary.get("settings") or version_0_1.options(
        json.loads(options_path.read_text())
    )
    difference_texts = control_differs(
        run_settings,
        {
            "kimg": control_summary["images"] / 1000,
            "seed": control_summary["seed"],
            "lambda_r": control_summary["lambda_r"],
            **recorded_settings,
        },
    )
    if difference_texts:
        remedy_text = "Run the same command with --lambda-r=0, and pass its folder as --control."
        return {
            "control_delta_mean": None,
            # four differences are enough to see why
            "control_source": (
                f"{summary_path.name} records a run with other settings: {'; '.join(difference_texts[:4])}."
                f" {remedy_text}"
            ),
        }
    return {
        # In the control's own summary, "tuned" is its network after training without the reward.
        "control_delta_mean": control_summary["tuned_delta_mean"],
        "control_source": summary_path.name,
        # The summary of a control has "heads" only if the data are synthetic heads.
        **({"control_heads": control_summary["heads"]["after"]} if "heads" in control_summary else {}),
    }


def summarise(comparison: Comparison, evaluation: Evaluation) -> dict:
    """Compute all metrics of a run as JSON values, except the time that the run took.

    Args: evaluation: inputs that were collected before the run.
    """
    run_settings = evaluation.settings
    seeds = comparison.seeds()  # N held-out latents
    summary = reward_shift(comparison)
    summary |= control_delta(run_settings, summary["tuned_delta_mean"])
    if comparison.synthetic:
        # The control's metrics of heads become a column of the table of heads.
        control_heads = summary.pop("control_heads", None)
        summary |= against_ground_truth(comparison) | blind_pairs(comparison) | frechet(comparison)
        summary["heads"] |= {"control": control_heads} if control_heads else {}
    view_metrics = geometry(comparison)
    shape_metrics = shapes(comparison) if comparison.synthetic else {"geometry": []}
    summary |= once(comparison, CHANGE, lambda: surface_change(comparison, EVALUATION.take(CHANGED)))
    summary |= {
        **view_metrics,
        **shape_metrics,
        "geometry": view_metrics["geometry"] + shape_metrics["geometry"],
        "reward_test_accuracy": None,  # stays None for a reward that does not state it
    }
    # Simulated labels also record the annotator's noise-free order. The accuracy against this order is
    # preferred, since it does not contain the noise of the labels.
    clean_accuracy = evaluation.reward.provenance.get("test_accuracy_clean")
    if (test_accuracy := clean_accuracy or evaluation.reward.provenance.get("test_accuracy")) is not None:
        summary |= {
            "reward_test_accuracy": test_accuracy["accuracy"],
            "reward_test_accuracy_ci95": test_accuracy["interval_95"],
            "reward_test_n": test_accuracy["n"],
            "reward_test_against": "noise-free order" if clean_accuracy else "labels",
        }
    return summary | {
        "over_optimisation": evaluation.monitor.alarms if evaluation.monitor is not None else [],
        "seed": run_settings["seed"],
        "device": str(comparison.device),
        "versions": versions(),
        "lambda_r": run_settings["lambda_r"],
        "lambda_sigma": run_settings["lambda_sigma"],
        # first and last seed of the latents; these are not training seeds
        "seeds": {
            "reward": [seeds[0], seeds[-1]],
            "evaluation": [EVALUATION.seeds[0], EVALUATION.seeds[-1]],
            "psi": comparison.psi,
        },
    }


# The measurements run in as many processes as this process has threads, since a small network uses only one
# core.

CHANGE = "change of the surface"
IMAGES = "images of the run"


def once(comparison: Comparison, task: str, compute: Callable[[], Any]) -> Any:
    """Return the result of a task from the comparison's memory. If it is missing, compute and store it.

    Args:
        task: name of the task, the key in the memory.
        compute: function without arguments that computes the result.
    """
    if task not in comparison.memory:
        comparison.memory[task] = compute()
    return comparison.memory[task]


def work(comparison: Comparison, folder: Path, process_count: int) -> None:
    """Run the slow measurements and the rendering of a run's summary in worker processes.

    Results are stored in `comparison.memory`, and images in `folder`. Every number is the same with one
    process and with several, since each task measures one network, and statistics of two networks are
    computed in this process.

    Args: process_count: largest number of worker processes.
    """
    part_of_task = {
        f"{part_name}, {role}": (part_name, role)
        for part_name, role in heldout_evaluators.list_parts(comparison)
    }
    tasks = [IMAGES, *part_of_task, CHANGE]
    with (
        tempfile.TemporaryDirectory() as temporary_folder,
        tqdm(total=len(tasks), desc="before and after", unit="part") as bar,
    ):
        path_by_role = {
            role: Path(temporary_folder) / f"{role}.safetensors" for role in heldout_evaluators.ROLES
        }
        for role, generator in comparison.generators().items():
            # Workers load the networks from files. Only the weights of G_ema are evaluated, so G and D are
            # not written.
            networks.save(
                path_by_role[role], replace(generator.nets, G=None, D=None, G_ema=generator.G), only_ema=True
            )
        field_names = ("data", "mirror", "psi", "n", "seed", "batch", "inception", "run")
        comparison_fields = {field_name: getattr(comparison, field_name) for field_name in field_names}
        # The latents of the images are selected here, since this needs the reward, which workers do not load.
        comparison_fields["memory"] = {CHOSEN: choose_latents(comparison)}

        def store_result(task: str, task_result: Any) -> None:
            # These are the keys that `heldout_evaluators.measure_part` and `once` read.
            comparison.memory[("evaluators", *part_of_task[task]) if task in part_of_task else task] = (
                task_result
            )
            bar.update()

        # All tasks that others wait for measure the network before tuning.
        task_before = {
            part_name: task for task, (part_name, role) in part_of_task.items() if role == "before"
        }
        needed_tasks = {
            task: [task_before[heldout_evaluators.NEEDS[part_name]]]
            if part_name in heldout_evaluators.NEEDS
            else []
            for task, (part_name, _) in part_of_task.items()
        }
        if "post-processing" in task_before:
            # The images show the result of the strongest post-processing, which this part selects.
            needed_tasks[IMAGES] = [task_before["post-processing"]]
        run_tasks(
            {task: needed_tasks.get(task, []) for task in tasks},
            _worker,
            (path_by_role, comparison_fields, folder),
            process_count,
            Path(temporary_folder),
            store_result,
        )


def _worker(path_by_role: dict[str, Path], comparison_fields: dict, folder: Path) -> Callable[[str], Any]:
    """Prepare a worker process, and return the function that computes a task in it.

    Args:
        path_by_role: network file of each role.
        comparison_fields: fields of the comparison, except the networks and the reward.
        folder: folder for the images.
    """
    torch.set_num_threads(1)  # there is one process per core; more threads would compete
    load_plugins()  # the networks' family may come from a plugin
    generator_before, generator_after = (
        load_generator(path_by_role[role]) for role in heldout_evaluators.ROLES
    )
    # No task of a worker scores by the reward, so the reward is not sent to the workers.
    comparison = Comparison(
        before=generator_before, after=generator_after, reward=cast(Reward, None), **comparison_fields
    )
    other_tasks = {
        CHANGE: lambda: surface_change(comparison, EVALUATION.take(CHANGED)),
        IMAGES: lambda: write_images(comparison, folder),
    }
    # The other names are "PART, ROLE", the arguments of `measure_part`.
    return lambda task: (
        other_tasks[task]()
        if task in other_tasks
        else heldout_evaluators.measure_part(comparison, *task.split(", "))
    )


def work_alone(comparison: Comparison) -> None:
    """Run the slow measurements of a run's summary in this process, with a progress bar.

    Results are stored in `comparison.memory`, as by `work`. The images are rendered later, after the summary
    is written.
    """
    parts = heldout_evaluators.list_parts(comparison)
    # two further steps: the rewards, and the change of the surface
    with tqdm(total=len(parts) + 2, desc="before and after", unit="part") as bar:
        reward_shift(comparison)
        bar.update()
        for part_name, role in parts:
            heldout_evaluators.measure_part(comparison, part_name, role)
            bar.update()
        once(comparison, CHANGE, lambda: surface_change(comparison, EVALUATION.take(CHANGED)))
        bar.update()


def summary_processes(comparison: Comparison) -> int:
    """Return the number of processes that measure the networks. On a GPU it is 1."""
    return min(torch.get_num_threads(), MAX_PROCESSES) if comparison.device.type == "cpu" else 1


def rehearse(evaluation: Evaluation, training_loop) -> None:
    """Compute all parts of the summary on their first latents, so that a rehearsal measures their time.

    No result is stored on the disk or printed.

    Args:
        evaluation: inputs that were collected before the run.
        training_loop: the training loop after its first tick.
    """
    comparison = comparison_of(evaluation, training_loop)
    folder = training_loop.files.folder
    process_count = summary_processes(comparison)
    parts = heldout_evaluators.list_parts(comparison)
    thread_count = torch.get_num_threads()
    with tqdm(total=len(parts) + 3, desc="first latents of the summary", unit="part") as bar:
        with rehearsal.timed(rehearsal.SUMMARY, "rewards"):
            for generator in (comparison.before, comparison.after):
                comparison.scores(generator, rehearsal.first(comparison.seeds(), rehearsal.LATENTS))
            choose_latents(comparison)
        bar.update()
        # As in `work`, several processes divide the parts, and each of them has one thread.
        torch.set_num_threads(1 if process_count > 1 else thread_count)
        try:
            with rehearsal.section(times=1 / process_count):
                for part_name, role in parts:
                    with rehearsal.timed(rehearsal.SUMMARY, part_name):
                        heldout_evaluators.measure_part(comparison, part_name, role)
                    bar.update()
                with rehearsal.timed(rehearsal.SUMMARY, CHANGE):
                    surface_change(comparison, rehearsal.first(EVALUATION.take(CHANGED), rehearsal.LATENTS))
                bar.update()
                write_images(comparison, folder)  # measures its parts
                bar.update()
        finally:
            torch.set_num_threads(thread_count)


def comparison_of(evaluation: Evaluation, training_loop) -> Comparison:
    """Return the comparison of the networks before and after the training of a loop.

    Args:
        evaluation: inputs that were collected before the run.
        training_loop: the training loop after its end.
    """
    folder = training_loop.files.folder
    tuned_nets = training_loop.trained_object.nets
    early_stop = evaluation.early_stop
    # An early stop selects a snapshot, which may be older than the last networks.
    tuned_nets = tuned_nets if early_stop is None else early_stop.networks(tuned_nets)
    generator_before, generator_after = (
        LoadedGenerator(generator, state_hash(generator.module), folder, tuned_nets)
        for generator in (evaluation.before, as_generator(tuned_nets.G_ema))
    )
    return Comparison(
        before=generator_before,
        after=generator_after,
        reward=evaluation.reward,
        run=folder,
        data=evaluation.settings["data"],
        mirror=evaluation.settings["mirror"],
        device=next(tuned_nets.G_ema.parameters()).device,
    )


def finish(evaluation: Evaluation, training_loop, start_time: float) -> dict:
    """Evaluate a finished training loop, and return the content of summary.json.

    Writes summary.json, images and meshes into the run's folder, and prints the table.

    Args:
        evaluation: inputs that were collected before the run.
        training_loop: the finished training loop.
        start_time: time.time() at the start of the run.
    """
    print(
        "Comparing before and after on held-out latents, and rendering them (about a minute on 2 cores for"
        " the bundled generator).",
        flush=True,
    )
    folder = training_loop.files.folder
    comparison = comparison_of(evaluation, training_loop)
    early_stop = evaluation.early_stop
    process_count = summary_processes(comparison)
    if process_count > 1:
        work(comparison, folder, process_count)
    else:
        work_alone(comparison)
    with working("statistics of the summary"):
        summary = {
            **summarise(comparison, evaluation),
            "images": training_loop.cur_nimg,
            "early_stop": None if early_stop is None else early_stop.record(),
        }
    # The time covers the run and its evaluation. If there is one process, the images are rendered below, so
    # their time is not included.
    summary["seconds"] = time.time() - start_time
    # summary.json is written first: an error while rendering the images must not lose the metrics.
    storage.write_atomic(folder / "summary.json", json.dumps(summary, indent=2, sort_keys=True).encode())
    # Nothing is written here if worker processes have rendered the images already.
    with working(IMAGES):
        written_names = once(comparison, IMAGES, lambda: write_images(comparison, folder))
    if head_table := table_of_heads(summary):
        print("\n".join(["", aligned(head_table), *notes(summary)]))
    table_rows = [("what", "figure", "goal"), *rows(summary)]
    # Without goals, the table has no such column.
    column_count = 3 if any(goal for _, _, goal in table_rows[1:]) else 2
    print(f"\n{aligned([table_row[:column_count] for table_row in table_rows])}")
    if summary.get("control_delta_mean") is None and summary.get("control_source"):
        print(f"No control: {summary['control_source']}")
    print(f"\nWritten to {folder}: {', '.join(['summary.json', *written_names])}")
    return summary


def rows(summary: dict) -> list[tuple[str, str, str]]:
    """Format the rows of the printed table: (name of the metric, its value, the demo's goal).

    The goals are "" for data other than synthetic heads, since they are goals of the demo.

    Args: summary: the content of summary.json.
    """
    reward_texts = [
        f"{reward_summary['mean']:.3f} ± {reward_summary['std']:.3f}"
        for reward_summary in (summary["reward_before"], summary["reward_after"])
    ]
    positive_text = (
        f"{summary['reward_delta_positive']}/{summary['reward_delta_n']}, mean"
        f" {summary['tuned_delta_mean']:+.3f}"
    )
    table_rows = [
        ("reward before / after (mean ± std)", " -> ".join(reward_texts), ""),
        ("positive reward deltas", positive_text, ""),
    ]
    if summary.get("control_delta_mean") is not None:
        # 1e-12 avoids a division by zero for a run whose mean change is exactly zero.
        relative_delta = abs(summary["control_delta_mean"]) / max(abs(summary["tuned_delta_mean"]), 1e-12)
        figure_text = (
            f"{summary['control_delta_mean']:+.3f} ({relative_delta:.1%} of the tuned shift;"
            f" {summary['control_source']})"
        )
        table_rows.append(("mean delta of the lambda_r = 0 control", figure_text, "<= 10 %"))
    elif summary.get("control_source"):
        # There is a control, but its settings differ. `finish` prints below the table how, and what to do.
        table_rows.append(("mean delta of the lambda_r = 0 control", "none, see below", "<= 10 %"))
    # A row is printed only if the run has its metric.
    if "win_rate" in summary:
        # Only synthetic data have a simulated annotator.
        interval_low, interval_high = summary["win_rate_ci95"]
        figure_text = (
            f"{summary['win_rate']:.1%} of {summary['win_rate_n']} [{interval_low:.1%}, {interval_high:.1%}]"
        )
        table_rows.append(
            ("simulated annotator without noise prefers the tuned shape (95 % interval)", figure_text, "")
        )
        figure_text = f"{summary['frechet_before']:.3f} -> {summary['frechet_after']:.3f}"
        # an outcome beside a ratio of "1.000" would not be understood
        digits = decimals_apart([summary["frechet_ratio"]], 1, 3)
        figure_text += f" (x{summary['frechet_ratio']:.{digits}f}"
        figure_text += f", {summary['frechet_outcome']})" if "frechet_outcome" in summary else ")"
        table_rows.append(("Fréchet distance of images before -> after *", figure_text, "<= x1.03"))
    for metric_entry in summary["geometry"]:
        change_text = span(
            metric_entry["paired"]["mean"],
            metric_entry["paired"]["mean_lo"],
            metric_entry["paired"]["mean_hi"],
            "+.2g",
        )
        direction_text = ", higher is better" if metric_entry["higher_is_better"] else ""
        table_rows.append(
            (
                f"{metric_entry['name']}{direction_text} *",
                f"{metric_entry['before']:.4g} -> {metric_entry['after']:.4g} ({metric_entry['outcome']}:"
                f" {change_text})",
                "better",
            )
        )
    if "shapes_missing" in summary:
        table_rows.append(("shape Fréchet", f"not measured: {summary['shapes_missing']}", ""))
    # "n" is the number of latents whose shapes have a surface in both networks.
    if (surface_change := summary.get("surface_change_voxels")) and surface_change["n"]:
        figure_text = (
            f"{surface_change['median']:.2f} voxels of 64^3 [{surface_change['quartiles'][0]:.2f},"
            f" {surface_change['quartiles'][1]:.2f}] of {surface_change['n']} latents"
        )
        table_rows.append(("median change of the surface in the head (quartiles)", figure_text, ""))
    if summary.get("reward_test_accuracy") is not None:
        interval_low, interval_high = summary["reward_test_accuracy_ci95"]
        figure_text = (
            f"{summary['reward_test_accuracy']:.3f} [{interval_low:.3f}, {interval_high:.3f}] of"
            f" {summary['reward_test_n']}"
        )
        table_rows.append(
            (f"reward's test accuracy against the {summary['reward_test_against']}", figure_text, ">= 0.85")
        )
    # An alarm lists the held-out metrics that fell while the tuned reward rose.
    fallen_metrics = sorted(
        {metric_name for alarm in summary["over_optimisation"] for metric_name in alarm["fallen"]}
    )
    table_rows.append(
        (
            "over-optimisation monitor",
            f"ALARM: {', '.join(fallen_metrics)} fell while the reward rose" if fallen_metrics else "quiet",
            "quiet",
        )
    )
    if (early_stop := summary.get("early_stop")) is not None:
        figure_text = (
            f"after {early_stop['images']} of {early_stop['of']} images: held-out reward"
            f" {early_stop['heldout']:+.3f}, distance {early_stop['distance']:.3f}"
        )
        table_rows.append(("early stop kept the snapshot", figure_text, ""))
    # 420 s is the time limit of the demo.
    table_rows.append(("time", f"{summary['seconds']:.0f} s on {summary['device']}", "<= 420 s"))
    is_demo = "heads" in summary  # only synthetic heads have these metrics
    return [(what, figure_text, goal if is_demo else "") for what, figure_text, goal in table_rows]


COLUMNS = {
    "before": "before",
    "after": "after",
    "control": "control",
    "post_processing": "best post-processing",
}
# Metrics of synthetic heads: (text of the table, format, value of a ground-truth head or None). A star marks
# a metric that neither the simulated annotator nor the reward nor the early stop uses.
MEASURES = {
    "error_defective": ("back-of-head volume error, defective heads", ".3f", 0.0),
    "error_intact": ("back-of-head volume error, intact heads", ".3f", 0.0),
    "error_reduction": ("  error reduction, defective heads", ".0%", 1.0),
    "intact_degraded": ("  intact heads degraded by .01 or more", ".0%", None),
    "missing_defective": ("  missing, defective heads", ".3f", 0.0),
    "extra_defective": ("  extra, defective heads", ".3f", 0.0),
    "fscore_defective": ("back-of-head F-score at one voxel, defective heads *", ".3f", 1.0),
    "fscore_intact": ("back-of-head F-score at one voxel, intact heads *", ".3f", 1.0),
    "fine_defective": ("back-of-head F-score at a quarter voxel, defective heads *", ".3f", 1.0),
    "completeness_defective": ("back-of-head completeness at a quarter voxel, defective heads *", ".3f", 1.0),
    "distance_defective": (
        "back-of-head distance to the ground truth, voxels, defective heads *",
        ".2f",
        0.0,
    ),
    "fine_front": ("F-score in front at a quarter voxel *", ".3f", 1.0),
    "distance_front": ("distance to the ground truth in front, voxels *", ".3f", 0.0),
    "amplitude": ("relief of the face over the ground truth's *", ".3f", 1.0),
    "intact_share": ("intact heads", ".0%", 1.0),
    "face_moved_voxels": ("face moved, median voxels *", ".3f", None),
    "identity_kept": ("identity of the face kept *", ".0%", None),
    "variety": ("variety of faces, voxels *", ".3f", None),
    "utility": ("simulated annotator's utility without noise", ".3f", 1.0),
}


def table_of_heads(summary: dict) -> list[tuple[str, ...]]:
    """Format the table of the metrics of synthetic heads. It is empty if the run had other data.

    The columns are: name of the metric, before, after, control, best post-processing, ground truth.

    Args: summary: content of summary.json.
    """
    if "heads" not in summary:
        return []
    # A run without a control has one column less.
    heading_by_column = {
        column: row_text for column, row_text in COLUMNS.items() if column in summary["heads"]
    }
    table_rows: list[tuple[str, ...]] = [("what", *heading_by_column.values(), "ground truth")]
    for metric_key, (row_text, number_format, ground_truth_value) in MEASURES.items():
        cell_values = [
            *(summary["heads"][column].get(metric_key) for column in heading_by_column),
            ground_truth_value,
        ]
        table_rows.append(
            (
                row_text,
                *(
                    "" if cell_value is None else f"{cell_value:{number_format}}"
                    for cell_value in cell_values
                ),
            )
        )
    return table_rows


def notes(summary: dict) -> list[str]:
    """Return the notes below the table of heads: the sample, the post-processing methods, and the star.

    The list is empty if the run had other data than synthetic heads.

    Args: summary: content of summary.json.
    """
    if "heads" not in summary:
        return []
    strongest_metrics = summary["heads"]["strongest_post_processing"]
    # A ratio is None if no head was defective, or if no head was intact.
    ratios = [strongest_metrics["error_reduction"], strongest_metrics["intact_degraded"]]
    reduction_text, degraded_text = ("none" if ratio is None else f"{ratio:.0%}" for ratio in ratios)
    chosen_method = summary["post_processing_methods"]["post_processing"]
    strongest_method = summary["post_processing_methods"]["strongest_post_processing"]
    return [
        (
            f"{summary['heads_n']} held-out latents at psi 1, {summary['defective_n']} of them defective"
            " before tuning. We damaged the backs of the training scans deliberately, to imitate real scans."
        ),
        (
            f"Best label-free post-processing that leaves intact heads alone: {chosen_method}, chosen on"
            f" {summary['post_processing_chosen_on']} other latents. The strongest of all,"
            f" {strongest_method}, reduces the error by {reduction_text} and degrades {degraded_text} of the"
            " intact heads."
        ),
        "*: not used by the simulated annotator, the reward or the early stop.",
    ]
