"""Evaluate a reward run at its end: compare the networks before and after tuning, and write table and images.

Letters: N latents.
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
from eg3d_rlhf.evaluation.run_images import CHANGED, CHOSEN, chosen, surface_change, write_pictures
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, of
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.early_stop import EarlyStop
from eg3d_rlhf.tuning.gan.heldout_metrics import Monitor
from eg3d_rlhf.tuning.gan.settings import control_differs
from training import networks, storage
from training.networks import state_hash
from training.progress import tqdm

MOST_PROCESSES = 4  # of evaluation; each holds both networks in memory


@dataclass
class Evaluation:
    """Inputs of the final evaluation, which exist before the run begins."""

    settings: dict  # as the run's folder records them
    before: Generator  # frozen, before tuning
    reward: Reward
    monitor: Monitor | None = None
    early_stop: EarlyStop | None = None  # selects the snapshot to evaluate; None: the last networks


def reward_shift(comparison: Comparison) -> dict:
    """Compute rewards of held-out latents before and after tuning, and their paired differences."""
    # in the reward's own scale, which has no unit
    before, tuned = (
        comparison.scores(generator, comparison.seeds()).numpy()
        for generator in (comparison.before, comparison.after)
    )  # [N]
    delta = tuned - before
    return {
        "reward_before": {"mean": float(before.mean()), "std": float(before.std())},
        "reward_after": {"mean": float(tuned.mean()), "std": float(tuned.std())},
        "reward_delta_positive": int((delta > 0).sum()),  # number of latents whose reward rose
        "reward_delta_n": len(delta),
        "tuned_delta_mean": float(delta.mean()),
        "reward_deltas": delta.tolist(),  # by seed, in the order of "seeds"
    }


def control_figures(settings: dict, delta: float) -> dict:
    """Return the mean reward delta of the lambda_r = 0 control run, and its source.

    The control is this run itself if its lambda_r is 0, else the run of --control, else the bundled record.
    Where the control's settings differ from this run's, the delta is None and the source names the remedy.
    """
    if settings["lambda_r"] == 0:
        return {"control_delta_mean": delta, "control_source": "this run"}
    path = bundled.CONTROL if settings["control"] is None else Path(settings["control"])
    path = path / "summary.json" if path.is_dir() else path
    record = version_0_1.summary(json.loads(path.read_text()))
    # a run's folder holds its options in a file; the bundled record holds its settings itself
    options = path.parent / "training_options.json"
    known = record.get("settings") or version_0_1.options(json.loads(options.read_text()))
    differ = control_differs(
        settings,
        {"kimg": record["images"] / 1000, "seed": record["seed"], "lambda_r": record["lambda_r"], **known},
    )
    if differ:
        remedy = "Run the same command with --lambda-r=0, and pass its folder as --control."
        return {
            "control_delta_mean": None,
            # four differences are enough for a table cell
            "control_source": f"{path.name} is of another run: {'; '.join(differ[:4])}. {remedy}",
        }
    return {
        # "tuned" in the control's own summary: its network after training without the reward
        "control_delta_mean": record["tuned_delta_mean"],
        "control_source": path.name,
        # a control of other data than heads of people has no such figures
        **({"control_heads": record["heads"]["after"]} if "heads" in record else {}),
    }


def summarise(comparison: Comparison, e: Evaluation) -> dict:
    """Compute all figures of a run, as JSON values, except the time that it took."""
    s = e.settings
    seeds = comparison.seeds()
    record = reward_shift(comparison)
    record |= control_figures(s, record["tuned_delta_mean"])
    if comparison.synthetic:
        # the control's figures of heads become a column of the table of heads
        control = record.pop("control_heads", None)
        record |= against_ground_truth(comparison) | blind_pairs(comparison) | frechet(comparison)
        record["heads"] |= {"control": control} if control else {}
    measures = geometry(comparison)
    shape_figures = shapes(comparison) if comparison.synthetic else {"geometry": []}
    record |= once(comparison, CHANGE, lambda: surface_change(comparison, EVALUATION.take(CHANGED)))
    record |= {
        **measures,
        **shape_figures,
        "geometry": measures["geometry"] + shape_figures["geometry"],
        "reward_test_accuracy": None,  # stays None for a reward that does not state it
    }
    # simulated labels record the annotator's noise-free order, against which accuracy is measured if possible
    clean = e.reward.provenance.get("test_accuracy_clean")
    if (accuracy := clean or e.reward.provenance.get("test_accuracy")) is not None:
        record |= {
            "reward_test_accuracy": accuracy["accuracy"],
            "reward_test_accuracy_ci95": accuracy["interval_95"],
            "reward_test_n": accuracy["n"],
            "reward_test_against": "noise-free order" if clean else "labels",
        }
    return record | {
        "over_optimisation": e.monitor.alarms if e.monitor is not None else [],
        "seed": s["seed"],
        "device": str(comparison.device),
        "versions": versions(),
        "lambda_r": s["lambda_r"],
        "lambda_sigma": s["lambda_sigma"],
        # first and last latents, not training seeds
        "seeds": {
            "reward": [seeds[0], seeds[-1]],
            "evaluation": [EVALUATION.all[0], EVALUATION.all[-1]],
            "psi": comparison.psi,
        },
    }


# The measurements run on as many processes as this one has threads, since a small network keeps only one core
# busy.

CHANGE = "change of the surface"
IMAGES = "images of the run"


def once(comparison: Comparison, task: str, make: Callable[[], Any]) -> Any:
    """Return the result of a task from the comparison's memory; compute it first where it is missing."""
    if task not in comparison.memory:
        comparison.memory[task] = make()
    return comparison.memory[task]


def work(comparison: Comparison, folder: Path, processes: int) -> None:
    """Run the slow tasks in worker processes; results go to `c.memory` and to the run's folder.

    Every number is the same in one process and in several: a task measures one network, and what combines
    two networks is computed in this process.
    """
    parts = {f"{part}, {role}": (part, role) for part, role in heldout_evaluators.parts_of(comparison)}
    tasks = [IMAGES, *parts, CHANGE]
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(tasks), desc="before and after", unit="part") as bar,
    ):
        paths = {role: Path(temporary) / f"{role}.safetensors" for role in heldout_evaluators.ROLES}
        for role, generator in comparison.generators().items():
            # workers load the networks from files; EMA weights alone are evaluated
            networks.save(
                paths[role], replace(generator.nets, G=None, D=None, G_ema=generator.G), only_ema=True
            )
        names = ("data", "mirror", "psi", "n", "seed", "batch", "inception", "run")
        sampling = {name: getattr(comparison, name) for name in names}
        # the selection of latents needs the reward, which the workers do not have
        sampling["memory"] = {CHOSEN: chosen(comparison)}

        def done(task: str, result: Any) -> None:
            # the keys under which `heldout_evaluators.seen` and `once` look
            comparison.memory[("evaluators", *parts[task]) if task in parts else task] = result
            bar.update()

        # what a task waits for is measured on the network before tuning
        first = {part: task for task, (part, role) in parts.items() if role == "before"}
        needs = {
            task: [first[heldout_evaluators.NEEDS[part]]] if part in heldout_evaluators.NEEDS else []
            for task, (part, _) in parts.items()
        }
        if "post-processing" in first:
            # the images show the result of the strongest method, which that part selects
            needs[IMAGES] = [first["post-processing"]]
        run_tasks(
            {task: needs.get(task, []) for task in tasks},
            _worker,
            (paths, sampling, folder),
            processes,
            Path(temporary),
            done,
        )


def _worker(paths: dict[str, Path], sampling: dict, folder: Path) -> Callable[[str], Any]:
    """Set up a worker process; return the function that computes a task there."""
    torch.set_num_threads(1)  # one process per core; more threads would compete
    load_plugins()  # the networks' family may come from a plugin
    before, after = (load_generator(paths[role]) for role in heldout_evaluators.ROLES)
    # no task here scores by the reward, so it is not sent to the workers
    c = Comparison(before=before, after=after, reward=cast(Reward, None), **sampling)
    others = {
        CHANGE: lambda: surface_change(c, EVALUATION.take(CHANGED)),
        IMAGES: lambda: write_pictures(c, folder),
    }
    return lambda task: others[task]() if task in others else heldout_evaluators.seen(c, *task.split(", "))


def finish(e: Evaluation, loop, started: float) -> dict:
    """Evaluate the finished loop; write summary.json, images and meshes into its folder; print the table."""
    print(
        "Comparing before and after on held-out latents, and rendering them (about a minute on 2 cores).",
        flush=True,
    )
    folder = loop.files.folder
    nets = loop.subject.nets
    early = e.early_stop
    # the early stop may have kept an earlier snapshot than the last networks
    nets = nets if early is None else early.networks(nets)
    before, after = (
        LoadedGenerator(g, state_hash(g.module), folder, nets) for g in (e.before, of(nets.G_ema))
    )
    c = Comparison(
        before=before,
        after=after,
        reward=e.reward,
        run=folder,
        data=e.settings["data"],
        mirror=e.settings["mirror"],
        device=next(nets.G_ema.parameters()).device,
    )
    # on a GPU, or with one thread, `once` and `seen` compute everything in this process
    if c.device.type == "cpu" and torch.get_num_threads() > 1:
        work(c, folder, min(torch.get_num_threads(), MOST_PROCESSES))
    record = {
        **summarise(c, e),
        "images": loop.cur_nimg,
        "early_stop": None if early is None else early.record(),
    }
    # the run and its evaluation, without the images if one process renders them
    record["seconds"] = time.time() - started
    # written before the images, which are rendered only now if there was one process: an error there costs
    # no figures
    storage.write_atomic(folder / "summary.json", json.dumps(record, indent=2, sort_keys=True).encode())
    written = once(c, IMAGES, lambda: write_pictures(c, folder))
    if table := table_of_heads(record):
        print("\n".join(["", aligned(table), *notes(record)]))
    print(f"\n{aligned([('what', 'figure', 'goal'), *rows(record)])}")
    print(f"\nWritten to {folder}: {', '.join(['summary.json', *written])}")
    return record


def rows(record: dict) -> list[tuple[str, str, str]]:
    """Format the printed table as lines of (what, figure, goal)."""
    spreads = [
        f"{reward['mean']:.3f} ± {reward['std']:.3f}"
        for reward in (record["reward_before"], record["reward_after"])
    ]
    positive = (
        f"{record['reward_delta_positive']}/{record['reward_delta_n']}, mean"
        f" {record['tuned_delta_mean']:+.3f}"
    )
    out = [
        ("reward before / after (mean ± std)", " -> ".join(spreads), ""),
        ("positive reward deltas", positive, ""),
    ]
    if record.get("control_delta_mean") is not None:
        # the guard is for a run whose mean delta is exactly zero
        share = abs(record["control_delta_mean"]) / max(abs(record["tuned_delta_mean"]), 1e-12)
        text = (
            f"{record['control_delta_mean']:+.3f} ({share:.1%} of the tuned shift;"
            f" {record['control_source']})"
        )
        out.append(("mean delta of the lambda_r = 0 control", text, "<= 10 %"))
    elif record.get("control_source"):
        # there is a control, but its settings differ: the source says how, and what to do
        out.append(("mean delta of the lambda_r = 0 control", f"none: {record['control_source']}", "<= 10 %"))
    if "win_rate" in record:
        # synthetic data alone have a simulated annotator
        low, high = record["win_rate_ci95"]
        text = f"{record['win_rate']:.1%} of {record['win_rate_n']} [{low:.1%}, {high:.1%}]"
        out.append(("simulated annotator without noise prefers the tuned shape (95 % interval)", text, ""))
        text = (
            f"{record['frechet_before']:.3f} -> {record['frechet_after']:.3f} (x{record['frechet_ratio']:.3f}"
        )
        text += f", {record['frechet_outcome']})" if "frechet_outcome" in record else ")"
        out.append(("Fréchet distance of images before -> after *", text, "<= x1.03"))
    for row in record["geometry"]:
        change = span(row["paired"]["mean"], row["paired"]["mean_lo"], row["paired"]["mean_hi"], "+.2g")
        upwards = ", higher is better" if row["higher_is_better"] else ""
        out.append(
            (
                f"{row['name']}{upwards} *",
                f"{row['before']:.4g} -> {row['after']:.4g} ({row['outcome']}: {change})",
                "better",
            )
        )
    if "shapes_missing" in record:
        out.append(("shape Fréchet", f"not measured: {record['shapes_missing']}", ""))
    # n counts the latents whose shapes have a surface in both networks
    if (moved := record.get("surface_change_voxels")) and moved["n"]:
        text = (
            f"{moved['median']:.2f} voxels of 64^3 [{moved['quartiles'][0]:.2f}, {moved['quartiles'][1]:.2f}]"
            f" of {moved['n']} latents"
        )
        out.append(("median change of the surface in the head (quartiles)", text, ""))
    if record.get("reward_test_accuracy") is not None:
        low, high = record["reward_test_accuracy_ci95"]
        text = f"{record['reward_test_accuracy']:.3f} [{low:.3f}, {high:.3f}] of {record['reward_test_n']}"
        out.append((f"reward's test accuracy against the {record['reward_test_against']}", text, ">= 0.85"))
    # an alarm lists the held-out metrics that fell while the tuned reward rose
    fallen = sorted({name for alarm in record["over_optimisation"] for name in alarm["fallen"]})
    out.append(
        (
            "over-optimisation monitor",
            f"ALARM: {', '.join(fallen)} fell while the reward rose" if fallen else "quiet",
            "quiet",
        )
    )
    if (kept := record.get("early_stop")) is not None:
        text = (
            f"after {kept['images']} of {kept['of']} images: held-out reward {kept['heldout']:+.3f}, distance"
            f" {kept['distance']:.3f}"
        )
        out.append(("early stop kept the snapshot", text, ""))
    # the goals in the last column are those of the demo
    out.append(("time", f"{record['seconds']:.0f} s on {record['device']}", "<= 420 s"))
    return out


COLUMNS = {
    "before": "before",
    "after": "after",
    "control": "control",
    "post_processing": "best post-processing",
}
# figures of heads of people: (words, format, value of the ground-truth head); a star marks a measure that
# neither the simulated annotator nor the reward nor the early stop uses
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


def table_of_heads(record: dict) -> list[tuple[str, ...]]:
    """Format the table of heads of people; [] where the run had none.

    A line holds (what, before, after, control, best post-processing, ground truth).
    """
    if "heads" not in record:
        return []
    # a run without a control has one column less
    columns = {column: words for column, words in COLUMNS.items() if column in record["heads"]}
    lines: list[tuple[str, ...]] = [("what", *columns.values(), "ground truth")]
    for key, (words, form, target) in MEASURES.items():
        values = [*(record["heads"][column].get(key) for column in columns), target]
        lines.append((words, *("" if value is None else f"{value:{form}}" for value in values)))
    return lines


def notes(record: dict) -> list[str]:
    """Return the notes below the table of heads: sample, post-processing methods, meaning of the star."""
    if "heads" not in record:
        return []
    strongest = record["heads"]["strongest_post_processing"]
    # None where no head was defective, or none intact
    spent = [strongest["error_reduction"], strongest["intact_degraded"]]
    reduction, degraded = ("none" if value is None else f"{value:.0%}" for value in spent)
    chosen = record["post_processing_methods"]["post_processing"]
    any_method = record["post_processing_methods"]["strongest_post_processing"]
    return [
        (
            f"{record['heads_n']} held-out latents at psi 1, {record['defective_n']} of them defective before"
            " tuning. We damaged the backs of the training scans deliberately, to imitate real scans."
        ),
        (
            f"Best label-free post-processing that leaves intact heads alone: {chosen}, chosen on"
            f" {record['post_processing_chosen_on']} other latents. The strongest of all, {any_method},"
            f" reduces the error by {reduction} and degrades {degraded} of the intact heads."
        ),
        "*: not used by the simulated annotator, the reward or the early stop.",
    ]
