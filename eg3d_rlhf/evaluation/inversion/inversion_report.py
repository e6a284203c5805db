"""Write the page of an inversion: measures over the weight of the reward, losses over the steps, and renders.

An arm is one result of a target: the ground truth, or the tuned generator of one weight λ of the reward.
Shapes: N targets, R pixels per edge, H x B pixels of a composed image.
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
from eg3d_rlhf.experiments.media.sheet import (
    SUPERSAMPLE,
    Row,
    blank_cell,
    look,
    paint,
    sheet,
    shrink,
    to_uint8,
)
from eg3d_rlhf.experiments.media.video import check_mp4, write_mp4
from eg3d_rlhf.experiments.pages import Facts, Finding, Job
from eg3d_rlhf.experiments.run import STATS
from eg3d_rlhf.generators import Generator, load_generator
from eg3d_rlhf.geometry.mesh_export import export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from training import storage

# Renders of an inversion: a strip with the target and every arm, in colour and as a shape; a video with a
# swinging camera (orbit); and a mesh of every arm.


CELL = 192  # pixels per edge of a render in the strip
FILM = 128  # pixels per edge of a render in the video
RAYS = 128  # rays per edge of colour renders
SAMPLES = 40  # samples per ray in each pass of colour renders
GRID = 128  # grid points per edge of the cube from which surfaces are extracted
SWING = 0.9  # largest yaw of the video, radians to both sides of the target's camera
FPS = 12  # frames per second of the video
STRIP = "strip.png"
ORBIT = "orbit.mp4"


class Arm(NamedTuple):
    """Shape of one arm with its name; a column of strip.png."""

    name: str  # 'truth', or 'weight ' and the weight
    generator: Generator
    side: Side


def load_arms(inversions: Inversions, case: Case) -> list[Arm]:
    """Load the arms of a target: the ground truth if there is one, and every weight's tuned generator.

    Args: case: the target.
    """
    # The ground truth is a sample of the untuned generator.
    generator = inversions.setup.loaded.generator
    folder = inversions.folder(case)
    arms = []
    if case.truth is not None:
        arms.append(Arm("truth", generator, Side.from_ws(generator, case.truth.ws, GRID)))
    for reward_weight in inversions.setup.weights:
        tuned_generator = load_generator(
            folder / f"{reward_weight:g}.safetensors", case.target.image.device
        ).generator
        ws = storage.read_tensors(folder / f"{reward_weight:g}-ws.safetensors", KIND)[0]["ws"].to(
            case.target.image
        )
        arms.append(
            Arm(f"weight {reward_weight:g}", tuned_generator, Side.from_ws(tuned_generator, ws, GRID))
        )
    return arms


def render_cells(
    arm: Arm, camera: torch.Tensor, pixels_per_edge: int, pixel_factor: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Render an arm in colour, and as a shape without colours.

    Args:
        camera: camera of both renders, [1, 25].
        pixels_per_edge: pixels per edge, R.
        pixel_factor: the shape is rendered with `pixel_factor` times the pixels per edge and then reduced, to
            avoid aliasing.

    Returns: two images: the render in colour, uint8 [R, R, 3], and the shape, uint8 [R, R, 3].
    """
    # [3, R, R] in 0..1; rendered with at most RAYS rays per edge and enlarged to `pixels_per_edge`
    image = render_colours(
        arm.side.field, arm.generator, camera, min(RAYS, pixels_per_edge), SAMPLES, pixels_per_edge
    )
    shape_image = paint(
        look(arm.side.surface, camera, pixels_per_edge * pixel_factor)
    )  # rendered with `pixel_factor` times the pixels
    if pixel_factor > 1:
        shape_image = shrink(shape_image, pixel_factor)
    return to_uint8(image.movedim(0, -1).cpu()), to_uint8(shape_image.cpu())


def strip(case: Case, arms: Sequence[Arm]) -> np.ndarray:
    """Return an image with a column for the target and for each arm, uint8 [H, B, 3].

    The rows show the colour image and the shape from the target's camera, and the shape rotated by half the
    largest yaw of the video.

    Args:
        case: the target.
        arms: shapes of the target's arms, as `load_arms` returns them.
    """
    # [1, 3, R, R] in [-1, 1] -> [3, CELL, CELL] in 0..1
    target_image = torch.nn.functional.interpolate(
        case.target.image.float() / 2 + 0.5, (CELL, CELL), mode="bicubic", antialias=True
    )[0]
    # The target is an image without a shape. Its cells in the rows of shapes say so.
    no_shape = blank_cell(CELL, "the target is an image and has no shape")
    cell_rows: list[list[np.ndarray]] = [
        [to_uint8(target_image.movedim(0, -1).cpu())],
        [no_shape],
        [no_shape],
    ]
    # a camera from which the target is not seen
    side_camera = rotated_camera(case.target.camera, SWING / 2, arms[0].generator.cameras.pivot)
    for arm in arms:
        # [1]: the shape, without the colour image
        arm_cells = (
            *render_cells(arm, case.target.camera, CELL, SUPERSAMPLE),
            render_cells(arm, side_camera, CELL, SUPERSAMPLE)[1],
        )
        for cell_row, cell_image in zip(cell_rows, arm_cells, strict=True):
            cell_row.append(cell_image)
    sheet_rows = [Row(cells=cell_row) for cell_row in cell_rows]
    # The names are written below the last row.
    sheet_rows[-1] = replace(sheet_rows[-1], captions=["target", *(arm.name for arm in arms)])
    return sheet("", sheet_rows)


def orbit(case: Case, arms: Sequence[Arm], view_count: int) -> Iterator[np.ndarray]:
    """Yield the frames of a video with a camera that swings from side to side and back.

    Each frame shows all arms, the colour image above the shape, uint8 [H, B, 3].
    Args: view_count: number of views from one side to the other.
    """

    def render_frame(yaw: float) -> np.ndarray:
        camera = rotated_camera(case.target.camera, yaw, arms[0].generator.cameras.pivot)
        colour_cells, shape_cells = zip(*(render_cells(arm, camera, FILM) for arm in arms), strict=True)
        return sheet(
            "",
            [
                Row(cells=colour_cells, captions=[arm.name for arm in arms]),
                Row(cells=shape_cells),
            ],
        )

    return swing_frames(render_frame, SWING, view_count, f"orbit of {case.name}")


def draw(inversions: Inversions, case: Case, resolution: int, view_count: int) -> None:
    """Write strip.png, orbit.mp4 and the meshes <weight>.ply of a target whose tuned generators were written.

    If a mesh cannot be extracted, a message is printed, and the other meshes are written.

    Args:
        resolution: grid points per axis of the meshes; 0: no meshes.
        view_count: number of views of the video from one side to the other; 0: no video.
    """
    folder = inversions.folder(case)
    arms = load_arms(inversions, case)  # columns of the strip and the video
    storage.write_atomic(folder / STRIP, png(strip(case, arms)))
    # The video is optional, since it takes long: every arm is rendered for every frame.
    if view_count:
        write_mp4(check_mp4(folder / ORBIT), orbit(case, arms, view_count), FPS, "2M")
    for arm in arms if resolution else ():
        arm_name = arm.name.removeprefix("weight ")
        try:
            mesh, _ = export_mesh(arm.side.field, MeshOptions(resolution=resolution))
            mesh.save(folder / f"{arm_name}.ply")
        except ValueError as error:  # the shape has no surface
            print(f"{case.name} ({arm.name}) has no mesh: {error}")


TITLE = "Inversion with a reward"
INTERVAL = (  # description of the intervals on the page
    "95 % percentile bootstrap over targets, 10,000 resamples; paired with weight 0; somewhat too narrow for"
    " few targets"
)
BY_NAME = {measure.name: measure for measure in MEASURES}
KNEE = 0.5  # largest accepted loss of PSNR at the target's camera, dB


def facts(setup: Setup) -> Facts:
    """Return the facts that the page states: the targets, the generator and the intervals.

    With a single target there are no intervals.
    """
    # At most 16 names, since a long list would fill the page.
    case_names_text = ", ".join(case.name for case in setup.cases[:16])
    unit_name, interval = ("targets", INTERVAL) if len(setup.cases) > 1 else ("target", "")
    return Facts(
        n=len(setup.cases),
        unit=unit_name,
        seeds=case_names_text,
        networks={"generator": setup.loaded.hash},
        interval=interval,
    )


def summarise(measure_records: Sequence[Mapping], reward_weights: Sequence[float]) -> dict:
    """Compute the mean of every measure for each arm, and the paired changes from the base to every weight.

    The base is the first weight, which is 0 if the weights contain 0.
    Args: measure_records: records that `Inversions.records` returned.
    """
    weight_names = [f"{reward_weight:g}" for reward_weight in reward_weights]
    base_name = f"{reward_weights[0]:g}"
    # in the order of the records
    arm_names = list(dict.fromkeys(measure_record["arm"] for measure_record in measure_records))
    statistics_by_measure: dict[str, dict] = {}  # measure -> means and paired changes
    for measure_name in (measure.name for measure in MEASURES):
        # Not every arm has every measure. The ground truth, for example, has no PSNR.
        values_by_arm = {
            arm_name: np.array(
                [
                    measure_record[measure_name]
                    for measure_record in measure_records
                    if measure_record["arm"] == arm_name and measure_name in measure_record
                ]
            )
            for arm_name in arm_names
        }
        values_by_arm = {
            arm_name: arm_values for arm_name, arm_values in values_by_arm.items() if len(arm_values)
        }
        if values_by_arm:
            statistics_by_measure[measure_name] = {
                "means": compute_means(values_by_arm),
                "paired": compute_paired_changes(values_by_arm, base_name, weight_names),
            }
    return {
        "base": base_name,
        "weights": list(reward_weights),
        "measures": statistics_by_measure,
        **over_optimisation(statistics_by_measure, weight_names, base_name),
    }


def over_optimisation(
    statistics_by_measure: Mapping[str, Mapping], weight_names: Sequence[str], base_name: str
) -> dict:
    """Find the weights at which the image is still reproduced well, and those that over-optimise the reward.

    The knee is the largest weight up to which the mean loss of PSNR at the target's camera is below KNEE. A
    weight over-optimises the reward if the evaluator's mean is below that of the base, and clearly so if the
    whole interval of the change is below 0.

    Args:
        statistics_by_measure: means and paired changes of each measure.
        weight_names: names of the weights, in ascending order.
        base_name: name of the base.

    Returns: dict with "reward_rises" (True if the mean reward rises from each weight to the next), "knee"
        (name of the weight), and the lists "over_optimised" and "clearly_over_optimised" of names of weights.
    """
    mean_rewards = (
        [statistics_by_measure["reward"]["means"][weight_name]["mean"] for weight_name in weight_names]
        if "reward" in statistics_by_measure
        else []
    )
    # change of the evaluator's value by weight
    evaluator_changes = (
        statistics_by_measure["evaluator"]["paired"] if "evaluator" in statistics_by_measure else {}
    )
    # weight_names[0] is the base itself. The search ends at the first weight whose loss of PSNR is too large.
    knee_name = base_name
    for weight_name in weight_names[1:]:
        if statistics_by_measure["psnr"]["paired"][weight_name]["mean"] <= -KNEE:
            break
        knee_name = weight_name
    return {
        # all() is True for an empty list, so a missing reward is checked separately.
        "reward_rises": bool(mean_rewards)
        and all(
            lower_mean < higher_mean
            for lower_mean, higher_mean in zip(mean_rewards, mean_rewards[1:], strict=False)
        ),
        "knee": knee_name,
        "over_optimised": [
            weight_name
            for weight_name in weight_names[1:]
            if weight_name in evaluator_changes and evaluator_changes[weight_name]["mean"] < 0
        ],
        "clearly_over_optimised": [
            weight_name
            for weight_name in weight_names[1:]
            if weight_name in evaluator_changes and evaluator_changes[weight_name]["mean_hi"] < 0
        ],
    }


def summary_sentences(inversion_summary: Mapping, evaluator_name: str, network_name: str) -> list[str]:
    """Describe the changes at the largest weight, the knee, and over-optimisation, in sentences.

    Args:
        inversion_summary: result of `summarise`.
        evaluator_name: name of the evaluator.
        network_name: name of the perceptual network.
    """
    sentences = [f"Perceptual features: {network_name}. Evaluator: {evaluator_name}."]
    statistics_by_measure = inversion_summary["measures"]
    # A single weight has nothing to be compared with.
    if len(inversion_summary["weights"]) == 1:
        return sentences
    largest_weight = f"{inversion_summary['weights'][-1]:g}"
    for measure_name in ("psnr", "psnr_side", "depth_side", "reward", "evaluator"):
        if measure_name in statistics_by_measure:
            sentences.append(
                f"{measure_name} at λ {largest_weight}:"
                f" {format_change(statistics_by_measure[measure_name]['paired'][largest_weight])}"
                f" against λ {inversion_summary['base']}."
            )
    sentences.append(
        f"Knee: up to λ {inversion_summary['knee']} the target's own view loses less than {KNEE} dB."
    )
    if "reward" in statistics_by_measure:
        sentences.append(
            f"The mean reward {'rises' if inversion_summary['reward_rises'] else 'does not rise'} from every"
            " weight to the next."
        )
    for weight_name in inversion_summary["over_optimised"]:
        uncertainty_text = (
            ""
            if weight_name in inversion_summary["clearly_over_optimised"]
            else ", though the interval includes 0"
        )
        sentences.append(
            f"Over-optimised at λ {weight_name}: the evaluator's mean is below that of λ"
            f" {inversion_summary['base']}{uncertainty_text}."
        )
    return sentences


def measure_sentences(inversion_summary: Mapping) -> list[str]:
    """Describe the mean and the changes of every measure in sentences.

    Args: inversion_summary: result of `summarise`.
    """
    sentences = []
    base_name = inversion_summary["base"]  # arm from which changes are measured
    for measure_name, measure_data in inversion_summary["measures"].items():
        change_texts = ", ".join(
            f"λ {weight_name}: {format_change(paired_change)}"
            for weight_name, paired_change in measure_data["paired"].items()
        )
        sentences.append(
            f"{measure_name} ({BY_NAME[measure_name].unit}): {measure_data['means'][base_name]['mean']:.4g}"
            f" at λ {base_name}; change at {change_texts or 'no other'}."
        )
    return [
        *sentences,
        (
            "In the plots, a dashed line is the ground truth, a dotted line is the latent before the second"
            " stage, and a cross marks a weight at which the reward is over-optimised."
        ),
    ]


def format_change(paired_change: Mapping) -> str:
    """Format a paired change with its interval, or without it if there is a single target."""
    return (
        f"{paired_change['mean']:+.3g}"
        if paired_change["n"] == 1
        else span(paired_change["mean"], paired_change["mean_lo"], paired_change["mean_hi"], "+.3g")
    )


def curves(folder: Path) -> dict:
    """Return the means over targets of the values that were logged at each step.

    Args: folder: folder of the run.
    Returns: by stage and measure, for example {'w': {...}, 'pivot 0.1': {'mse': [[step, mean], ...], ...}}.
    """
    values_by_step: dict[str, dict[str, dict[int, list[float]]]] = {}
    for log_line in (folder / STATS).read_text().splitlines():
        step_record = json.loads(log_line)
        stage_name = (
            step_record["stage"]
            if step_record["weight"] is None
            else f"{step_record['stage']} {step_record['weight']:g}"
        )
        # The reward and the change of density are logged only in some steps.
        for measure_name in ("loss", "mse", "perceptual", "reward", "moved"):
            if measure_name in step_record:
                values_by_step.setdefault(stage_name, {}).setdefault(measure_name, {}).setdefault(
                    step_record["step"], []
                ).append(step_record[measure_name])
    return {
        stage_name: {
            measure_name: [
                [step, float(np.mean(target_values))]
                for step, target_values in sorted(values_of_steps.items())
            ]
            for measure_name, values_of_steps in values_by_measure.items()
        }
        for stage_name, values_by_measure in values_by_step.items()
    }


def jobs(inversions: Inversions) -> list[Job]:
    """Return the jobs of the page: renders, measures over the weight, and values over the steps."""
    setup = inversions.setup
    measure_records = inversions.records()  # a record for each target and arm
    shown_cases = setup.cases[: setup.shown]  # targets with renders
    strip_by_name = {case.name: inversions.folder(case) / STRIP for case in shown_cases}
    job_inputs = {"records": measure_records}

    def measures_finding(_folder: Path) -> Finding:
        inversion_summary = summarise(measure_records, setup.weights)
        return Finding(
            facts=facts(setup),
            data=inversion_summary,
            rows=measure_records,
            says=measure_sentences(inversion_summary),
        )

    def curves_finding(_folder: Path) -> Finding:
        stage_curves = curves(inversions.run.folder)  # means over targets, by stage and measure
        curve_rows = [
            {"stage": stage_name, "measure": measure_name, "step": step, "mean": mean_value}
            for stage_name, points_by_measure in stage_curves.items()
            for measure_name, curve_points in points_by_measure.items()
            for step, mean_value in curve_points
        ]
        return Finding(facts=facts(setup), data={"curves": stage_curves}, rows=curve_rows)

    def strips_finding(folder: Path) -> Finding:
        for case_name, strip_path in strip_by_name.items():
            shutil.copyfile(strip_path, folder / f"strip-{case_name}.png")
        return Finding(
            facts=facts(setup),
            data={},
            images={
                f"{case_name}: the target, then {'the ground truth and ' if case.truth else ''}every weight;"
                " below, the same as shapes": f"strip-{case_name}.png"
                for case_name, case in zip(strip_by_name, shown_cases, strict=True)
            },
        )

    strip_jobs = (
        [Job(key="strips", title="Renders", compute=strips_finding, inputs=job_inputs)] if shown_cases else []
    )
    return [
        *strip_jobs,
        Job(
            key="weights",
            title="Measures over the weight of the reward",
            compute=measures_finding,
            inputs=job_inputs,
            plots={"means": plot_means, **({"changes": plot_changes} if len(setup.weights) > 1 else {})},
        ),
        Job(
            key="steps",
            title="Step by step",
            compute=curves_finding,
            inputs=job_inputs,
            plots={measure_name: partial(plot_steps, measure_name) for measure_name in ("mse", "perceptual")},
        ),
    ]


def plot_means(finding_data: dict):
    """Plot every measure over the weight of the reward, with intervals.

    A dashed line is the ground truth, a dotted line is the latent before the second stage.

    Args: finding_data: result of `summarise`.
    """
    weight_names = [f"{reward_weight:g}" for reward_weight in finding_data["weights"]]
    figure, axes = style.grid(len(finding_data["measures"]), 2.7)
    for axis, (measure_name, measure_data) in zip(axes, finding_data["measures"].items(), strict=True):
        mean_by_arm = measure_data["means"]
        style.band(
            axis,
            range(len(weight_names)),
            [mean_by_arm[weight_name] for weight_name in weight_names],
            style.colour("after"),
            "weights",
        )
        for arm_name, line_style in (("truth", "--"), ("w", ":")):
            if arm_name in mean_by_arm:
                axis.axhline(mean_by_arm[arm_name]["mean"], linestyle=line_style, color=style.colour("noise"))
        # Only the panel of the evaluator has crosses at weights that over-optimise the reward.
        for weight_name in finding_data["over_optimised"] if measure_name == "evaluator" else ():
            axis.plot(
                [weight_names.index(weight_name)],
                [mean_by_arm[weight_name]["mean"]],
                "x",
                color=style.colour("before"),
                markersize=9,
            )
        axis.set_xticks(range(len(weight_names)), weight_names)
        axis.set(
            title=f"{measure_name} ({BY_NAME[measure_name].better} is better)", xlabel="weight of the reward"
        )
    return figure


def plot_changes(finding_data: dict):
    """Plot the paired changes from the base weight, with intervals.

    Args: finding_data: result of `summarise`.
    """
    changes_by_measure = {
        measure_name: measure_data["paired"]
        for measure_name, measure_data in finding_data["measures"].items()
        if measure_data["paired"]
    }
    figure, axes = style.grid(len(changes_by_measure), 2.7)
    for axis, (measure_name, change_by_weight) in zip(axes, changes_by_measure.items(), strict=True):
        for weight_index, paired_change in enumerate(change_by_weight.values()):
            error_bar = style.errors(paired_change, lo_key="mean_lo", hi_key="mean_hi")
            axis.errorbar(
                [weight_index],
                [paired_change["mean"]],
                yerr=error_bar,
                fmt="o",
                capsize=4,
                color=style.colour("after"),
            )
        axis.axhline(0, color=style.colour("noise"), linewidth=1)
        axis.set_xticks(range(len(change_by_weight)), list(change_by_weight))
        axis.set(title=f"change of {measure_name}", xlabel="weight of the reward")
    return figure


def plot_steps(measure_name: str, finding_data: dict):
    """Plot a measure at every step, averaged over targets: the first stage, and each weight's second stage.

    Args:
        finding_data: dict whose entry "curves" is the result of `curves`.
        measure_name: name of the measure.
    """
    figure, axes = style.figure(column_count=2)
    for stage_name, points_by_measure in finding_data["curves"].items():
        curve_points = points_by_measure.get(measure_name, [])  # [] if this stage did not log the measure
        axis, line_name = (
            (axes[1], stage_name.removeprefix("pivot "))
            if stage_name.startswith("pivot")
            else (axes[0], stage_name)
        )
        axis.plot(
            [curve_point[0] for curve_point in curve_points],
            # The axis is logarithmic, so a value of exactly 0 is replaced by 1e-12.
            [max(curve_point[1], 1e-12) for curve_point in curve_points],
            label=f"λ {line_name}" if axis is axes[1] else line_name,
            linewidth=1,
        )
    for axis, axis_title in zip(axes, ("the latent", "the generator"), strict=True):
        axis.set(title=f"{measure_name}: {axis_title}", xlabel="step", yscale="log")
        axis.legend(fontsize="small")
    return figure
