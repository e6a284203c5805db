"""Page of an inversion: measures over the weight of the reward with paired intervals, the losses step by
step, and strips of renders.

Letters: N targets, R pixels per edge, T frames.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.evaluation.inversion.inversion_runs import KIND, Inversions, Setup
from eg3d_rlhf.evaluation.inversion.targets import MEASURES, Case, rotated_camera
from eg3d_rlhf.evaluation.paired import compute_means, compute_paired_changes, span
from eg3d_rlhf.evaluation.run_images import Side, render_colours, swing_frames
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import SUPERSAMPLE, Row, look, paint, sheet, shrink, to_uint8
from eg3d_rlhf.experiments.media.video import check_mp4, write_mp4
from eg3d_rlhf.experiments.pages import Facts, Finding, Job
from eg3d_rlhf.experiments.run import STATS
from eg3d_rlhf.generators import Generator, load_generator
from eg3d_rlhf.geometry.mesh_export import export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from training import storage

# Renders of an inversion: a strip of the target and of every weight, in colour and as a shape; an orbit; a
# mesh for every weight.


# pixels per edge of a cell of the strip, and of the orbit's video
CELL = 192
FILM = 128
# rays per edge, and samples per ray and pass, of coloured renders
RAYS = 128
SAMPLES = 40
GRID = 128  # grid points per edge of the cube in which surfaces are searched
# radians to either side of the target's camera; frames per second
SWING = 0.9
FPS = 12
STRIP = "strip.png"
ORBIT = "orbit.mp4"


class Arm(NamedTuple):
    """One column of the strip: a shape with its name."""

    name: str
    generator: Generator
    side: Side


def arms_of(inversions: Inversions, case: Case) -> list[Arm]:
    """Load the arms of a target: the ground truth if it is known, and the generator of every weight."""
    # The untuned generator: only the weights have tuned copies.
    generator = inversions.setup.loaded.generator
    folder = inversions.folder(case)
    arms = []
    if case.truth is not None:
        arms.append(Arm("truth", generator, Side.of(generator, case.truth.ws, GRID)))
    for weight in inversions.setup.weights:
        tuned = load_generator(folder / f"{weight:g}.safetensors", case.target.image.device).generator
        ws = storage.read_tensors(folder / f"{weight:g}-ws.safetensors", KIND)[0]["ws"].to(case.target.image)
        arms.append(Arm(f"weight {weight:g}", tuned, Side.of(tuned, ws, GRID)))
    return arms


def cells(arm: Arm, camera: torch.Tensor, pixels: int, factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Render an arm in colour and as an untextured surface, uint8 [R, R, 3] each."""
    # At most RAYS rays per edge; the colours are enlarged to `pixels`.
    # [3, R, R] in 0..1
    image = render_colours(arm.side.field, arm.generator, camera, min(RAYS, pixels), SAMPLES, pixels)
    shape = paint(look(arm.side.surface, camera, pixels * factor))
    return to_uint8(image.movedim(0, -1).cpu()), to_uint8(
        (shrink(shape, factor) if factor > 1 else shape).cpu()
    )


def strip(case: Case, arms: Sequence[Arm]) -> np.ndarray:
    """Arrange the target and the arms side by side.

    The rows are colour and shape from the target's camera, and the shape rotated by half the swing.
    """
    # [1, 3, R, R] in [-1, 1] -> [3, CELL, CELL] in 0..1
    image = torch.nn.functional.interpolate(
        case.target.image.float() / 2 + 0.5, (CELL, CELL), mode="bicubic", antialias=True
    )[0]
    blank = np.full((CELL, CELL, 3), 255, dtype=np.uint8)  # a white cell
    # The target is an image without a shape, so its cells of shape are blank.
    rows: list[list[np.ndarray]] = [[to_uint8(image.movedim(0, -1).cpu())], [blank], [blank]]
    # a view that the target does not show
    aside = rotated_camera(case.target.camera, SWING / 2, arms[0].generator.cameras.pivot)
    for arm in arms:
        seen = (*cells(arm, case.target.camera, CELL, SUPERSAMPLE), cells(arm, aside, CELL, SUPERSAMPLE)[1])
        for row, cell in zip(rows, seen, strict=True):
            row.append(cell)
    sheet_rows = [Row(cells=row) for row in rows]
    sheet_rows[-1] = replace(sheet_rows[-1], captions=["target", *(arm.name for arm in arms)])
    return sheet("", sheet_rows)


def orbit(case: Case, arms: Sequence[Arm], turns: int) -> Iterator[np.ndarray]:
    """Yield frames of all arms swung from side to side and back, colour above shape; uint8 [H, B, 3]."""

    def frame(yaw: float) -> np.ndarray:
        camera = rotated_camera(case.target.camera, yaw, arms[0].generator.cameras.pivot)
        coloured, shaped = zip(*(cells(arm, camera, FILM) for arm in arms), strict=True)
        return sheet("", [Row(cells=coloured, captions=[arm.name for arm in arms]), Row(cells=shaped)])

    return swing_frames(frame, SWING, turns, f"orbit of {case.name}")


def draw(inversions: Inversions, case: Case, resolution: int, turns: int) -> None:
    """Write strip.png, orbit.mp4 and <weight>.ply of a target whose generators were kept.

    A mesh that cannot be extracted is reported, and the others are written.

    Args:
        resolution: grid points per axis of the meshes; 0 for none.
        turns: number of views of the orbit from side to side; 0 for none.
    """
    folder = inversions.folder(case)
    arms = arms_of(inversions, case)  # columns of strip and orbit
    storage.write_atomic(folder / STRIP, png(strip(case, arms)))
    # The video is optional: it renders every arm once per frame.
    if turns:
        write_mp4(check_mp4(folder / ORBIT), orbit(case, arms, turns), FPS, "2M")
    for arm in arms if resolution else ():
        name = arm.name.removeprefix("weight ")
        try:
            mesh, _ = export_mesh(arm.side.field, MeshOptions(resolution=resolution))
            mesh.save(folder / f"{name}.ply")
        except ValueError as error:  # a shape without a surface
            print(f"{case.name} ({arm.name}) has no mesh: {error}")


TITLE = "Inversion with a reward"
INTERVAL = (  # of all measures on the page
    "95 % percentile bootstrap over targets, 10,000 resamples; paired with weight 0; somewhat too narrow for"
    " few targets"
)
BY_NAME = {measure.name: measure for measure in MEASURES}
KNEE = 0.5  # dB: largest accepted loss of PSNR at the target's camera


def facts(setup: Setup) -> Facts:
    """Return the facts that the page states; an interval needs at least two targets."""
    # A long list of names would fill the page.
    names = ", ".join(case.name for case in setup.cases[:16])  # at most 16
    unit, interval = ("targets", INTERVAL) if len(setup.cases) > 1 else ("target", "")
    return Facts(
        n=len(setup.cases),
        unit=unit,
        seeds=names,
        networks={"generator": setup.loaded.hash},
        interval=interval,
    )


def summarise(records: Sequence[Mapping], weights: Sequence[float]) -> dict:
    """Summarise the records: means of every measure by arm, and paired changes of every weight against the
    base.

    The base is the first weight, which is 0 if 0 is among the weights.
    """
    names = [f"{weight:g}" for weight in weights]
    base = f"{weights[0]:g}"
    arms = list(dict.fromkeys(record["arm"] for record in records))  # in the order of the records
    table: dict[str, dict] = {}  # measure -> means and paired changes
    for name in (measure.name for measure in MEASURES):
        # Not every arm has every measure: the truth, for example, has no PSNR.
        values = {arm: np.array([r[name] for r in records if r["arm"] == arm and name in r]) for arm in arms}
        values = {arm: known for arm, known in values.items() if len(known)}
        if values:
            table[name] = {
                "means": compute_means(values),
                "paired": compute_paired_changes(values, base, names),
            }
    return {
        "base": base,
        "weights": list(weights),
        "measures": table,
        **over_optimisation(table, names, base),
    }


def over_optimisation(table: Mapping[str, Mapping], names: Sequence[str], base: str) -> dict:
    """Check if the reward rises with the weight, find the knee, and find where the evaluator's value falls.

    The knee is the last weight up to which the mean loss of PSNR at the target's camera stays under KNEE. A
    weight over-optimises if the evaluator's mean is below the base's, and 'clearly' if the whole interval is.
    """
    means = [table["reward"]["means"][name]["mean"] for name in names] if "reward" in table else []
    evaluated = table["evaluator"]["paired"] if "evaluator" in table else {}
    # In the order of the weights; the first one that loses too much ends the search.
    knee = base
    for name in names[1:]:
        if table["psnr"]["paired"][name]["mean"] <= -KNEE:
            break
        knee = name
    return {
        # all() of no pairs is True, so a missing reward needs the check before it.
        "reward_rises": bool(means) and all(a < b for a, b in zip(means, means[1:], strict=False)),
        "knee": knee,
        "over_optimised": [name for name in names[1:] if name in evaluated and evaluated[name]["mean"] < 0],
        "clearly_over_optimised": [
            name for name in names[1:] if name in evaluated and evaluated[name]["mean_hi"] < 0
        ],
    }


def summary_sentences(summary: Mapping, evaluator: str, features: str) -> list[str]:
    """Describe the changes at the largest weight, the knee, and over-optimisation."""
    # One weight has nothing to be compared with.
    sentences = [f"Perceptual features: {features}. Evaluator: {evaluator}."]
    table = summary["measures"]
    if len(summary["weights"]) == 1:
        return sentences
    last = f"{summary['weights'][-1]:g}"  # the largest weight
    for name in ("psnr", "psnr_side", "depth_side", "reward", "evaluator"):
        if name in table:
            sentences.append(
                f"{name} at λ {last}: {changed(table[name]['paired'][last])} against λ {summary['base']}."
            )
    sentences.append(f"Knee: up to λ {summary['knee']} the target's own view loses less than {KNEE} dB.")
    if "reward" in table:
        sentences.append(
            f"The mean reward {'rises' if summary['reward_rises'] else 'does not rise'} from every weight to"
            " the next."
        )
    for name in summary["over_optimised"]:
        sure = "" if name in summary["clearly_over_optimised"] else ", though the interval includes 0"
        sentences.append(
            f"Over-optimised at λ {name}: the evaluator's mean is below that of λ {summary['base']}{sure}."
        )
    return sentences


def measure_sentences(summary: Mapping) -> list[str]:
    """Describe every measure's mean and its changes."""
    sentences = []
    base = summary["base"]  # the arm that changes refer to
    for name, entry in summary["measures"].items():
        ends = ", ".join(f"λ {arm}: {changed(row)}" for arm, row in entry["paired"].items())
        sentences.append(
            f"{name} ({BY_NAME[name].unit}): {entry['means'][base]['mean']:.4g} at λ {base}; change at"
            f" {ends or 'no other'}."
        )
    return [
        *sentences,
        (
            "In the figures: dashed is the ground truth, dotted the latent before the second stage; a cross"
            " marks over-optimised weights."
        ),
    ]


def changed(row: Mapping) -> str:
    """Format a paired change with its interval; a single target has no interval."""
    return (
        f"{row['mean']:+.3g}" if row["n"] == 1 else span(row["mean"], row["mean_lo"], row["mean_hi"], "+.3g")
    )


def curves(folder: Path) -> dict:
    """Average what each step measured over targets, by stage.

    Returns: {'w': {...}, 'pivot 0.1': {'mse': [[step, mean], ...], ...}}.
    """
    sums: dict[str, dict[str, dict[int, list[float]]]] = {}
    for line in (folder / STATS).read_text().splitlines():
        record = json.loads(line)
        stage = record["stage"] if record["weight"] is None else f"{record['stage']} {record['weight']:g}"
        # The reward and the change of density are measured in some steps only.
        for name in ("loss", "mse", "perceptual", "reward", "moved"):
            if name in record:
                sums.setdefault(stage, {}).setdefault(name, {}).setdefault(record["step"], []).append(
                    record[name]
                )
    return {
        stage: {
            name: [[step, float(np.mean(values))] for step, values in sorted(steps.items())]
            for name, steps in measured.items()
        }
        for stage, measured in sums.items()
    }


def jobs(inversions: Inversions) -> list[Job]:
    """Return the page's parts."""
    setup = inversions.setup
    records = inversions.records()  # of all targets and arms
    shown = setup.cases[: setup.shown]  # targets with renders
    strips = {case.name: inversions.folder(case) / STRIP for case in shown}
    inputs = {"records": records}

    def measured(_folder: Path) -> Finding:
        summary = summarise(records, setup.weights)
        return Finding(facts=facts(setup), data=summary, rows=records, says=measure_sentences(summary))

    def stepped(_folder: Path) -> Finding:
        stage_curves = curves(inversions.run.folder)
        rows = [
            {"stage": stage, "measure": name, "step": step, "mean": value}
            for stage, by_measure in stage_curves.items()
            for name, points in by_measure.items()
            for step, value in points
        ]
        return Finding(facts=facts(setup), data={"curves": stage_curves}, rows=rows)

    def drawn(folder: Path) -> Finding:
        for name, path in strips.items():
            shutil.copyfile(path, folder / f"strip-{name}.png")
        return Finding(
            facts=facts(setup),
            data={},
            images={
                f"{name}: the target, then {'the ground truth and ' if case.truth else ''}every weight;"
                " below, the same as shapes": f"strip-{name}.png"
                for name, case in zip(strips, shown, strict=True)
            },
        )

    strip_jobs = [Job(key="strips", title="Renders", compute=drawn, inputs=inputs)] if shown else []
    return [
        *strip_jobs,
        Job(
            key="weights",
            title="Measures over the weight of the reward",
            compute=measured,
            inputs=inputs,
            plots={"means": plot_means, **({"changes": plot_changes} if len(setup.weights) > 1 else {})},
        ),
        Job(
            key="steps",
            title="Step by step",
            compute=stepped,
            inputs=inputs,
            plots={name: partial(plot_steps, name) for name in ("mse", "perceptual")},
        ),
    ]


def plot_means(data: dict):
    """Plot every measure over the weight, with intervals; dashed: the ground truth, dotted: before the second
    stage.
    """
    names = [f"{weight:g}" for weight in data["weights"]]
    figure, axes = style.grid(len(data["measures"]), 2.7)
    for axis, (measure, entry) in zip(axes, data["measures"].items(), strict=True):
        means = entry["means"]
        style.band(axis, range(len(names)), [means[name] for name in names], style.colour("after"), "weights")
        for arm, line in (("truth", "--"), ("w", ":")):
            if arm in means:
                axis.axhline(means[arm]["mean"], linestyle=line, color=style.colour("noise"))
        # Only the evaluator's panel marks over-optimised weights.
        for name in data["over_optimised"] if measure == "evaluator" else ():
            axis.plot(
                [names.index(name)], [means[name]["mean"]], "x", color=style.colour("before"), markersize=9
            )
        axis.set_xticks(range(len(names)), names)
        axis.set(title=f"{measure} ({BY_NAME[measure].better} is better)", xlabel="weight of the reward")
    return figure


def plot_changes(data: dict):
    """Plot paired changes against weight 0, with intervals."""
    entries = {name: entry["paired"] for name, entry in data["measures"].items() if entry["paired"]}
    figure, axes = style.grid(len(entries), 2.7)
    for axis, (measure, paired) in zip(axes, entries.items(), strict=True):
        for i, row in enumerate(paired.values()):
            error = style.errors(row, lo="mean_lo", hi="mean_hi")
            axis.errorbar([i], [row["mean"]], yerr=error, fmt="o", capsize=4, color=style.colour("after"))
        axis.axhline(0, color=style.colour("noise"), linewidth=1)
        axis.set_xticks(range(len(paired)), list(paired))
        axis.set(title=f"change of {measure}", xlabel="weight of the reward")
    return figure


def plot_steps(measure: str, data: dict):
    """Plot means over targets at every step: the latent's stage, then every weight's second stage."""
    figure, axes = style.figure(columns=2)
    for stage, by_measure in data["curves"].items():
        points = by_measure.get(measure, [])
        axis, name = (
            (axes[1], stage.removeprefix("pivot ")) if stage.startswith("pivot") else (axes[0], stage)
        )
        axis.plot(
            [p[0] for p in points],
            # The axis is logarithmic; a loss of exactly 0 needs a positive value.
            [max(p[1], 1e-12) for p in points],
            label=f"λ {name}" if axis is axes[1] else name,
            linewidth=1,
        )
    for axis, title in zip(axes, ("the latent", "the generator"), strict=True):
        axis.set(title=f"{measure}: {title}", xlabel="step", yscale="log")
        axis.legend(fontsize="small")
    return figure
