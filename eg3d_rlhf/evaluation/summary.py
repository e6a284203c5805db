"""The end of a reward run: the comparison of before and after that says whether it worked, its table and
pictures.

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
from eg3d_rlhf.evaluation import heldout_evaluators as judges
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

MOST_PROCESSES = 4  # each holds both networks


@dataclass
class Evaluation:
    """What is known before a run of its end."""

    settings: dict  # as its folder records them
    before: Generator  # frozen, before tuning
    reward: Reward
    monitor: Monitor | None = None
    early_stop: EarlyStop | None = None  # chose what is evaluated; None: the last networks are


def reward_shift(c: Comparison) -> dict:
    before, tuned = (c.scores(generator, c.seeds()).numpy() for generator in (c.before, c.after))
    delta = tuned - before
    return {
        "reward_before": {"mean": float(before.mean()), "std": float(before.std())},
        "reward_after": {"mean": float(tuned.mean()), "std": float(tuned.std())},
        "reward_delta_positive": int((delta > 0).sum()),
        "reward_delta_n": len(delta),
        "tuned_delta_mean": float(delta.mean()),
        "reward_deltas": delta.tolist(),
    }


def control_figures(settings: dict, delta: float) -> dict:
    """Mean reward delta of the lambda_r = 0 run: this run's own where it is the control, else that of
    --control, else the recorded one.

    None, and what to do about it, where that run's settings are not those of this one.
    """
    if settings["lambda_r"] == 0:
        return {"control_delta_mean": delta, "control_source": "this run"}
    path = bundled.CONTROL if settings["control"] is None else Path(settings["control"])
    path = path / "summary.json" if path.is_dir() else path
    record = version_0_1.summary(json.loads(path.read_text()))
    options = path.parent / "training_options.json"  # a run's; the bundled record holds its own settings
    known = record.get("settings") or version_0_1.options(json.loads(options.read_text()))
    differ = control_differs(
        settings,
        {"kimg": record["images"] / 1000, "seed": record["seed"], "lambda_r": record["lambda_r"], **known},
    )
    if differ:
        remedy = "Run the same command with --lambda-r=0, and pass its folder as --control."
        return {
            "control_delta_mean": None,
            "control_source": f"{path.name} is of another run: {'; '.join(differ[:4])}. {remedy}",
        }
    return {
        "control_delta_mean": record["tuned_delta_mean"],
        "control_source": path.name,
        **({"control_heads": record["heads"]["after"]} if "heads" in record else {}),
    }


def summarise(c: Comparison, e: Evaluation) -> dict:
    """All figures of a run, as JSON values, but the time that it took."""
    s = e.settings
    seeds = c.seeds()
    record = reward_shift(c)
    record |= control_figures(s, record["tuned_delta_mean"])
    if c.synthetic:
        control = record.pop("control_heads", None)
        record |= against_ground_truth(c) | blind_pairs(c) | frechet(c)
        record["heads"] |= {"control": control} if control else {}
    measures = geometry(c)
    judged = shapes(c) if c.synthetic else {"geometry": []}
    record |= once(c, CHANGE, lambda: surface_change(c, EVALUATION.take(CHANGED)))
    record |= {
        **measures,
        **judged,
        "geometry": measures["geometry"] + judged["geometry"],
        "reward_test_accuracy": None,
    }
    # against the noise-free order, where the labels held one
    clean = e.reward.provenance.get("test_accuracy_clean")
    if (found := clean or e.reward.provenance.get("test_accuracy")) is not None:
        record |= {
            "reward_test_accuracy": found["accuracy"],
            "reward_test_accuracy_ci95": found["interval_95"],
            "reward_test_n": found["n"],
            "reward_test_against": "noise-free order" if clean else "labels",
        }
    return record | {
        "over_optimisation": e.monitor.alarms if e.monitor is not None else [],
        "seed": s["seed"],
        "device": str(c.device),
        "versions": versions(),
        "lambda_r": s["lambda_r"],
        "lambda_sigma": s["lambda_sigma"],
        "seeds": {
            "reward": [seeds[0], seeds[-1]],
            "evaluation": [EVALUATION.all[0], EVALUATION.all[-1]],
            "psi": c.psi,
        },
    }


# The work of it, on as many processes as this one has threads: a small network keeps one core busy, and no
# more.

CHANGE = "change of the surface"
PICTURES = "pictures"


def once(c: Comparison, task: str, make: Callable[[], Any]) -> Any:
    """What a task came to; it is done now where it was not."""
    if task not in c.memory:
        c.memory[task] = make()
    return c.memory[task]


def work(c: Comparison, folder: Path, processes: int) -> None:
    """Do all that takes time, so that the figures and pictures find it in `c.memory` and in the run's folder.

    Every number is the same in one process and in several: a part is one network's, and what joins them is
    computed here.
    """
    parts = {f"{part}, {role}": (part, role) for part, role in judges.parts_of(c)}
    tasks = [PICTURES, *parts, CHANGE]
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(tasks), desc="before and after", unit="part") as bar,
    ):
        paths = {role: Path(temporary) / f"{role}.safetensors" for role in judges.ROLES}
        for role, generator in c.generators().items():
            networks.save(
                paths[role], replace(generator.nets, G=None, D=None, G_ema=generator.G), only_ema=True
            )
        names = ("data", "mirror", "psi", "n", "seed", "batch", "inception", "run")
        sampling = {name: getattr(c, name) for name in names}
        sampling["memory"] = {CHOSEN: chosen(c)}  # by the reward, which the workers do not have

        def done(task: str, result: Any) -> None:
            c.memory[("judges", *parts[task]) if task in parts else task] = result
            bar.update()

        first = {part: task for task, (part, role) in parts.items() if role == "before"}
        needs = {
            task: [first[judges.NEEDS[part]]] if part in judges.NEEDS else []
            for task, (part, _) in parts.items()
        }
        if "post-processing" in first:  # of which the pictures show the strongest
            needs[PICTURES] = [first["post-processing"]]
        run_tasks(
            {task: needs.get(task, []) for task in tasks},
            _worker,
            (paths, sampling, folder),
            processes,
            Path(temporary),
            done,
        )


def _worker(paths: dict[str, Path], sampling: dict, folder: Path) -> Callable[[str], Any]:
    """A process that judges: what it does of a task."""
    torch.set_num_threads(1)
    load_plugins()  # a family may be one's
    before, after = (load_generator(paths[role]) for role in judges.ROLES)
    c = Comparison(before=before, after=after, reward=cast(Reward, None), **sampling)
    others = {
        CHANGE: lambda: surface_change(c, EVALUATION.take(CHANGED)),
        PICTURES: lambda: write_pictures(c, folder),
    }
    return lambda task: others[task]() if task in others else judges.seen(c, *task.split(", "))


def finish(e: Evaluation, loop, started: float) -> dict:
    """Evaluate the finished loop and write summary.json, pictures and meshes into its folder; prints the
    table.
    """
    print(
        "Comparing before and after on held-out latents, and drawing them (about a minute on 2 cores).",
        flush=True,
    )
    folder = loop.files.folder
    nets = loop.subject.nets
    early = e.early_stop
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
    if c.device.type == "cpu" and torch.get_num_threads() > 1:
        work(c, folder, min(torch.get_num_threads(), MOST_PROCESSES))
    record = {
        **summarise(c, e),
        "images": loop.cur_nimg,
        "early_stop": None if early is None else early.record(),
    }
    record["seconds"] = time.time() - started
    storage.write_atomic(folder / "summary.json", json.dumps(record, indent=2, sort_keys=True).encode())
    written = once(c, PICTURES, lambda: write_pictures(c, folder))
    if table := table_of_heads(record):
        print("\n".join(["", aligned(table), *notes(record)]))
    print(f"\n{aligned([('what', 'figure', 'goal'), *rows(record)])}")
    print(f"\nWritten to {folder}: {', '.join(['summary.json', *written])}")
    return record


def rows(record: dict) -> list[tuple[str, str, str]]:
    """(what, figure, goal) lines of the table."""
    spreads = [
        f"{found['mean']:.3f} ± {found['std']:.3f}"
        for found in (record["reward_before"], record["reward_after"])
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
        share = abs(record["control_delta_mean"]) / max(abs(record["tuned_delta_mean"]), 1e-12)
        text = (
            f"{record['control_delta_mean']:+.3f} ({share:.1%} of the tuned shift;"
            f" {record['control_source']})"
        )
        out.append(("mean delta of the lambda_r = 0 control", text, "<= 10 %"))
    elif record.get("control_source"):
        out.append(("mean delta of the lambda_r = 0 control", f"none: {record['control_source']}", "<= 10 %"))
    if "win_rate" in record:
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
    out.append(("time", f"{record['seconds']:.0f} s on {record['device']}", "<= 420 s"))
    return out


COLUMNS = {
    "before": "before",
    "after": "after",
    "control": "control",
    "post_processing": "best post-processing",
}
# of heads of people: words, form, the value of the ground-truth head; a star: the measure is used by neither
# the simulated annotator nor the reward nor the early stop
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
    """(what, before, after, control, best post-processing, ground truth) lines of the table of heads of
    people; [] where the run had none.
    """
    if "heads" not in record:
        return []
    columns = {column: words for column, words in COLUMNS.items() if column in record["heads"]}
    lines: list[tuple[str, ...]] = [("what", *columns.values(), "ground truth")]
    for key, (words, form, target) in MEASURES.items():
        values = [*(record["heads"][column].get(key) for column in columns), target]
        lines.append((words, *("" if value is None else f"{value:{form}}" for value in values)))
    return lines


def notes(record: dict) -> list[str]:
    """What must be known of that table."""
    if "heads" not in record:
        return []
    strongest = record["heads"]["strongest_post_processing"]
    spent = [strongest["error_reduction"], strongest["intact_degraded"]]
    reduction, degraded = ("none" if value is None else f"{value:.0%}" for value in spent)
    chosen = record["post_processing_methods"]["post_processing"]
    any_method = record["post_processing_methods"]["strongest_post_processing"]
    return [
        (
            f"{record['heads_n']} held-out latents at psi 1, {record['defective_n']} of them defective before"
            " tuning. Backs are damaged on purpose in the training scans, as real scans are."
        ),
        (
            f"Best label-free post-processing: {chosen}, of those that leave intact heads alone, chosen on"
            f" {record['post_processing_chosen_on']} others. The strongest of all, {any_method}, reduces"
            f" the error by {reduction} and degrades {degraded} of the intact heads."
        ),
        "*: used by neither the simulated annotator nor the reward nor the early stop.",
    ]
