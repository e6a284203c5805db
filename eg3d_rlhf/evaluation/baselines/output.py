"""Files of the baselines' report: JSON, arrays by latent, table, figure and page. All read the JSON alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range
from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.experiments.table import figure_table, write
from training.storage import write_atomic

STEM = "baselines"
LATENTS_FILE = "baselines-latents.safetensors"  # arrays with one entry for each latent
TITLE = "Baselines by cost"
INTERVAL = "95 % percentile bootstrap over latents, 10,000 resamples"
COLUMNS = {  # metric -> (heading, format); a column without any value is left out
    "labels": ("labels", ",.0f"),
    "seconds_once": ("seconds once", ".3g"),
    "seconds_a_sample": ("seconds a sample", ".2g"),
    "reward": ("reward", ".3f"),
    "heldout": ("held-out reward", ".3f"),
    "gain": ("gain", ".3f"),
    "error_reduction": ("error reduction, defective", ".0%"),
    "still_defective": ("still defective", ".0%"),
    "intact_degraded": ("intact degraded", ".0%"),
    "parts": ("parts of the mesh", ".2f"),
    "open_share": ("open edges", ".2%"),
    "loose": ("loose volume", ".2%"),
    "enclosed": ("enclosed cavities", ".2%"),
    "identity_kept": ("identity kept", ".0%"),
    "front_moved_voxels": ("front moved, voxels", ".3f"),
    "variety": ("variety, of before", ".2f"),
    "image_change": ("image change", ".3f"),
    "image_distance_change": ("image distance, change", "+.4f"),
}


def table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a rung's shown point, with its costs, by the keys of COLUMNS.

    Args: row: entry of "rows" in baselines.json.
    """
    # Only one point of each rung enters the table. All points are in the figure and in the JSON file.
    shown = row["points"][row["shown"]]
    return {
        **shown["metrics"],
        "labels": row["labels"],
        "seconds_once": row["seconds_once"],
        "seconds_a_sample": shown["seconds_a_sample"],
        "gain_ci95": shown["gain_ci95"],
        "image_change": row.get("image_change"),
        "image_distance_change": row.get("image_distance_change"),
        "image_distance_change_ci95": row.get("image_distance_change_ci95"),
    }


def row_title(row: Mapping[str, Any]) -> str:
    """Return the name of a rung with the strength that is shown, and a mark if it exceeds the bound."""
    shown = row["points"][row["shown"]]
    strength_text = f", {shown['text']}" if shown["text"] else ""
    # Labels without a direction move no sample, so the strength would be misleading.
    if not row.get("is_found", True):
        strength_text = ", no direction"
    return row["title"] + strength_text + (" *" if shown["exceeds"] else "")


def table_lines(data: Mapping[str, Any]) -> list[str]:
    """Format the table of the shown points as Markdown.

    Args: data: content of baselines.json.
    """
    metrics_by_title = {row_title(row): table_row(row) for row in data["rows"]}
    # A column without any value, such as the open edges of a generator without meshes, is left out.
    columns = {
        name: column
        for name, column in COLUMNS.items()
        if any(metrics.get(name) is not None for metrics in metrics_by_title.values())
    }
    return figure_table(
        "rung, from cheap to dear", metrics_by_title, columns, intervals=("gain", "image_distance_change")
    )


def advice_sentences(data: Mapping[str, Any]) -> list[str]:
    """Formulate the advice in sentences.

    Args: data: content of baselines.json.
    """
    advice = data["advice"]
    # The reward that the rungs maximise must not measure them: its
    # score rises even when the samples get worse (Goodhart's law).
    if advice is None:
        return [
            "No advice: there is neither a ground truth nor a held-out reward, and a reward that rungs use"
            " cannot be their evaluator. Pass --heldout-reward."
        ]
    title_by_key = {row["key"]: row_title(row) for row in data["rows"]}
    latent_count = advice["latents"]
    if advice["best"] is None:
        return [
            f"By the {data['evaluator']}, no rung that keeps the collateral bound can be distinguished from"
            f" doing nothing with {latent_count} {data['unit']}."
        ]
    sentences = []
    gain, low, high = advice["best_gain"]
    if advice["cheapest"] is not None:
        sentences.append(f"The cheapest rung that suffices is: {title_by_key[advice['cheapest']]}.")
    else:
        sentences.append("No rung is shown to suffice.")
    sentences.append(
        f"By the {data['evaluator']}, the largest gain within the collateral bound is {gain:.3f}"
        f" [{low:.3f}, {high:.3f}], of {title_by_key[advice['best']]}. A rung suffices if it certainly loses"
        " less than a tenth of this gain."
    )
    # An interval that includes the limit shows neither that the rung suffices nor that it does not.
    if advice["undecided"]:
        names = "; ".join(title_by_key[key] for key in advice["undecided"])
        sentences.append(
            f"With {latent_count} {data['unit']} it cannot be decided whether these cheaper rungs suffice:"
            f" {names}."
        )
    return sentences


def explanation(data: Mapping[str, Any]) -> str:
    """Describe what the table measured.

    Args: data: content of baselines.json.
    """
    bound = data["bound"]
    variety_text = (
        f"the variety is at least {bound['variety']:g} of that before,"
        f" and at most {bound['harm']:.0%} (or one) of the"
    )
    costs_text = (
        "Seconds were measured on this machine, with one thread for generators with latents; those of a run"
        f" are its own. Brackets: 95 % intervals over {data['unit']}."
    )
    if data["unit"] == "assets":
        return (
            f"{len(data['seeds'])} assets of {data['prompts']} test prompts, from the same noises for all"
            " rungs. Guidance and steps are chosen by the latent reward on other prompts. A rung keeps the"
            f" collateral bound if {variety_text} good assets lose more than a quarter of a standard"
            " deviation of the evaluator's score; * marks a rung that exceeds it. Good assets are those of"
            " the base above the median. Gain: increase of the evaluator's score. Filters change finished"
            f" meshes, which the evaluator does not read. {costs_text}"
        )
    defective_text = "" if data["defective"] is None else f", {data['defective']} of them defective before"
    if data["without_surface"]:
        defective_text += f", {data['without_surface']} of them without a surface in front"
    return (
        f"{len(data['seeds'])} held-out latents from seed {data['seeds'][0]}, ψ"
        f" {data['inputs']['psi']:g}{defective_text}. A rung with a strength is shown at the largest strength"
        f" at which at least {bound['identity']:.0%} keep their identity, fronts move at most"
        f" {bound['front']:g} voxel in the median, {variety_text} intact samples are degraded; * marks a rung"
        " that exceeds this bound at its weakest. The strength of a filter, and the directions without"
        " labels, are chosen by the reward on validation latents. Gain: reduction of the error at the back of"
        " the head if there is a ground truth, else increase of the held-out reward. Image change: 1 minus"
        " structural similarity to the reference of the same latents; image distance: kernel distance to the"
        " data, minus that of the reference. The reference is the untuned network, for tuned networks the λ_r"
        " = 0 control if it is given. Best of n shows other samples, so identity and front are not defined,"
        f" and an intact sample is degraded if its replacement is defective. {costs_text}"
    )


def markdown(data: Mapping[str, Any]) -> str:
    """Format baselines.md.

    Args: data: content of baselines.json.
    """
    missing_lines = [f"- {name}: `{command}`" for name, command in data["missing"].items()]
    return "\n".join(
        [
            f"# {TITLE}",
            "",
            " ".join(advice_sentences(data)),
            "",
            *table_lines(data),
            "",
            *(
                ["Not measured, because it was not given. These commands make it:", "", *missing_lines, ""]
                if missing_lines
                else []
            ),
            explanation(data),
            "",
        ]
    )


def plot_frontiers(data: Mapping[str, Any]):
    """Plot the gain of every point over its collateral change: front moved, and loss of variety.

    Lines join the points of a rung from weak to strong; a ring marks the shown point.

    Args: data: content of baselines.json.
    """
    y_metric = "gain" if data["evaluator"] else "reward"
    y_label = f"gain by the {data['evaluator']}" if data["evaluator"] else "reward (which the rungs use)"
    # Both metrics measure collateral change: the first what must not move, the second mode collapse.
    panels = {
        "front_moved_voxels": ("front moved (voxels, median)", data["bound"]["front"]),
        "variety": ("variety, relative to before", data["bound"]["variety"]),
    }
    figure, axes = style.figure(column_count=2, size=(9.4, 5.4))
    for axis, (metric, (label, bound)) in zip(axes, panels.items(), strict=True):
        for index, row in enumerate(data["rows"]):
            positions = [
                (point["metrics"].get(metric), point["metrics"].get(y_metric)) for point in row["points"]
            ]
            colour = style.CYCLE[index % len(style.CYCLE)]
            marker = "osD^v"[index // len(style.CYCLE) % 5]
            # [points, 2] -> two arrays [points]. NaN leaves a gap in the line.
            x, y = np.array(
                [[math.nan if value is None else value for value in position] for position in positions]
            ).T
            # A lone point stays visible by its marker, although it has no line.
            axis.plot(
                x,
                y,
                f"{marker}-",
                color=colour,
                markersize=3,
                linewidth=0.9,
                label=row["title"],
            )
            axis.plot(
                x[row["shown"]], y[row["shown"]], "o", markersize=8, markerfacecolor="none", color=colour
            )
        axis.axvline(bound, color=style.colour("noise"), linestyle="--", linewidth=1)
        axis.set(xlabel=f"{label}; dashed: bound", ylabel=y_label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=6)
    return figure


def write_report(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path) -> list[Path]:
    """Write the files of a report, and return their paths.

    Args:
        data: content of baselines.json.
        arrays: arrays [N] of the shown points, which are written as a safetensors file.
        folder: folder of the report.
    """
    paths = write(data, folder, STEM, markdown, plot_frontiers)
    # safetensors writes the memory of an array as it is, so a view with strides would be written wrongly.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(folder / LATENTS_FILE, safetensors.numpy.save(contiguous))
    rows = [
        {"rung": row_title(row)}
        | {
            heading: table_row(row).get(name)
            for name, (heading, _) in COLUMNS.items()
            if any(table_row(other).get(name) is not None for other in data["rows"])
        }
        for row in data["rows"]
    ]
    missing_sentences = [
        f"Not measured: {name}. Command: {command}" for name, command in data["missing"].items()
    ]
    finding = Finding(
        facts=Facts(
            n=len(data["seeds"]),
            unit=data["unit"],
            seeds=seed_range(data["seeds"]),
            psi=data["inputs"].get("psi"),
            networks={
                role: data["inputs"][role] for role in ("generator", "reward") if data["inputs"].get(role)
            },
            interval=INTERVAL,
        ),
        data=dict(data),
        rows=rows,
        says=[*advice_sentences(data), *missing_sentences],
    )
    job = Job(
        key=STEM,
        title="Gain over collateral change",
        # The page computes nothing. It receives the finished result under the hash of the data.
        compute=lambda _folder: finding,
        plots={"frontiers": plot_frontiers},
        inputs={"data": json_hash(data)},
    )
    findings = pages.run([job], folder, quiet=True)
    page = pages.write_page(
        folder / "index.html", TITLE, explanation(data), [job], findings, advice_sentences(data)
    )
    return [*paths, folder / LATENTS_FILE, page]
