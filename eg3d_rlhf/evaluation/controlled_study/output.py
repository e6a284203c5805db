"""Table and figure of the controlled study."""

from collections.abc import Mapping

import numpy as np

from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.settings import ARMS, LABELS, POST_PROCESSING
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.table import figure_table

TABLE_METRICS = {  # metric -> (heading of the table, format)
    "error_defective": ("back-of-head volume error", ".3f"),
    "shape_frechet": ("shape Fréchet", ".2f"),
    "error_reduction": ("error reduction", ".0%"),
    "intact_degraded": ("intact degraded", ".0%"),
    "intact_share": ("intact after", ".0%"),
    "fscore_defective": ("F-score", ".3f"),
    "missing_defective": ("missing", ".3f"),
    "extra_defective": ("extra", ".3f"),
    "variety": ("variety", ".3f"),
    "identity_kept": ("identity", ".0%"),
    "face_moved_voxels": ("face moved", ".2f"),
    "changed": ("changed", ".3f"),
}


def markdown(study_data: Mapping) -> str:
    """Format controlled-study.md: the result of the criterion, the table, and the meaning of its metrics.

    Args: study_data: content of controlled-study.json.
    """
    format_by_metric = {
        metric_name: (
            heading + (" (primary)" if metric_name in study_data["primary_endpoints"] else ""),
            number_format,
        )
        for metric_name, (heading, number_format) in TABLE_METRICS.items()
        if metric_name in study_data["before"]
    }
    metrics_by_label = {"before tuning": study_data["before"]}
    for arm_name, metrics in study_data["arms"].items():
        psi = ", ".join(f"{psi:g}" for psi in sorted(set(study_data["psi"].values())))
        arm_notes = {"truncation": f" (ψ {psi})", POST_PROCESSING: f" ({study_data['post_processing']})"}
        if arm_name in study_data.get("shares", {}):
            share = study_data["shares"][arm_name]
            arm_notes[arm_name] = " (never applied)" if share is None else f" (above share {share:g})"
        metrics_by_label[ARMS[arm_name] + arm_notes.get(arm_name, "")] = metrics
    table_lines = figure_table("arm", metrics_by_label, format_by_metric)
    criterion_result = study_data["criterion"]
    unbeaten_arms = [
        ARMS[arm_name]
        for arm_name, comparison_result in criterion_result["against"].items()
        if not comparison_result["beaten"]
    ]
    sentences = (
        "The pre-registered criterion is met: labels beat every other arm of it in each primary endpoint with"
        " every training seed, and degrade no more intact heads."
        if criterion_result["labels_win"]
        else (
            "The pre-registered criterion is not met. Labels do not beat these arms in each primary endpoint"
            " with every training seed, or they degrade more intact heads:"
            f" {', '.join(unbeaten_arms) or 'there was no other arm'}."
        )
    )
    explanation = (
        f"{study_data['latents']} held-out latents, ψ 1, {study_data['defective']} of them defective before"
        f" tuning; training seeds {', '.join(map(str, study_data['seeds']))}, {study_data['rewards']}"
        f" reward(s) for each of {study_data['label_sets']} set(s) of labels. Figures are means over"
        " training seeds; brackets hold the smallest and the largest. Volume error, missing and extra are"
        " shares of the ground-truth head's back-of-head volume, of defective heads. The F-score is"
        " measured at the back at one voxel, of defective heads. An intact head is degraded if its volume"
        f" error grows by more than {heads.WORSE}. Lengths are in voxels of 64³. Changed: share of the"
        " back-of-head volume that became solid or empty."
    )
    return "\n".join(
        ["# Controlled study of the bundled heads", "", sentences, "", *table_lines, "", explanation, ""]
    )


def plot(study_data: Mapping):
    """Plot each primary endpoint of every arm, one point for each training seed.

    Args: study_data: content of controlled-study.json.
    """
    arm_names = list(study_data["arms"])
    figure, axes = style.figure(
        column_count=len(study_data["primary_endpoints"]),
        size=(9.4, 1.4 + 0.3 * len(arm_names)),  # inches
    )
    # With a single endpoint `axes` is not an array; atleast_1d makes one.
    for axis, endpoint in zip(np.atleast_1d(axes), study_data["primary_endpoints"], strict=True):
        for arm_position, arm_name in enumerate(arm_names):
            seed_values = study_data["arms"][arm_name][endpoint]
            axis.plot(
                seed_values,
                [arm_position] * len(seed_values),
                "o",
                markersize=4,
                color=style.colour("after" if arm_name == LABELS else "control"),
            )
        axis.axvline(study_data["before"][endpoint], color=style.colour("before"), linewidth=1)
        axis.set_yticks(range(len(arm_names)), [ARMS[arm_name] for arm_name in arm_names], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"{TABLE_METRICS[endpoint][0]}, lower is better; line: before", fontsize=8)
    return figure
