"""Draw the method as one figure of four panels from real data: labels, reward, tuning, report."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments import style, version_0_1
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.network_before import network_before
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.rewards.reward import load_reward

METHOD_POOL = EVALUATION.take(40)  # latents of which the best and the worst shape are shown
METHOD_PSI = 1.0  # truncation


def _shaded(field: Field, edge_points: int = 128) -> np.ndarray:
    """Render the only shape of a field, shaded, from the back and slightly from the side.

    Args: edge_points: grid points per edge from which the surface is found.
    Returns: a cropped image in 0..1, [230, 190].
    """
    grid_spec = SlabSpec.from_bounds(field.bounds, edge_points)  # over the whole cube
    # The yaw is half a turn less 0.4 rad. The slices crop the empty margin of the 260-pixel render.
    return shade(field.density_grid(grid_spec), math.pi - 0.4, 260, field.level)[0, 0, 25:-5, 35:-35].numpy()


def _last_panel_texts(run_summary: dict) -> list[tuple[str, str]]:
    """Return the texts of the last panel as (label, value).

    Args: run_summary: content of the run's summary.json.
    """
    labels_with_values = [("win rate by the oracle,\nheld-out latents", f"{run_summary['win_rate']:.0%}")]
    # Only generators of synthetic heads have an error reduction.
    if run_summary.get("error_reduction") is not None:
        labels_with_values = [
            ("error reduction of\ndefective heads", f"{run_summary['error_reduction']:.0%}"),
            (
                "by the best label-free\npost-processing",
                f"{run_summary['error_reduction_by_post_processing']:.0%}",
            ),
            ("of intact heads\ndegraded", f"{run_summary['intact_degraded']:.0%}"),
        ]
    return labels_with_values


def _write(axes, x: float, y: float, panel_text: str, **text_settings) -> None:
    """Write a text into the axes.

    Args: x, y: position of the text, as shares of the axes' width and height.
    """
    axes.text(x, y, panel_text, transform=axes.transAxes, **text_settings)


@torch.no_grad()
def draw_method(run_folder: Path, image_path: Path) -> None:
    """Draw the figure with the bundled generator, the bundled reward and a finished run.

    Args:
        run_folder: folder of a finished run of train.py --reward=sigma.
        image_path: image file to write.

    Raises: ValueError or FileNotFoundError, with --run in the message, if the run cannot be read.
    """
    with prefix_errors("--run"):
        run_summary = version_0_1.summary(json.loads((run_folder / "summary.json").read_text()))
        before_path = network_before([run_folder], "--run")
        # The figure also shows the bundled reward, which reads shapes of the bundled generator.
        if before_path != bundled.GENERATOR:
            raise ValueError(
                f"the figure shows the bundled generator and reward, but {run_folder} began from"
                f" {before_path}. Name a run of the bundled generator."
            )
        generator_before = load_generator().generator
        generator_after = load_generator(run_folder).generator
    reward = load_reward(bundled.REWARD)
    ws = ws_of_seeds(generator_before, list(METHOD_POOL), METHOD_PSI)  # [40, L, W]
    scores = reward.score(generator_before.field(ws))  # [40]
    worst_index = int(scores.argmin())
    # The figure shows the worst and the best shape before tuning by the reward, and the tuned generator's
    # shape of the worst one's latent.
    best_index = int(scores.argmax())
    worst_field, best_field = (
        generator_before.field(ws[latent_index : latent_index + 1])
        for latent_index in (worst_index, best_index)
    )
    tuned_field = generator_after.field(ws_of_seeds(generator_after, [METHOD_POOL[worst_index]], METHOD_PSI))
    with style.theme():
        figure, axes = style.figure(4, 1, (11, 4.6))
        titles = (
            "1 Labels\npairs: which shape is better?",
            "2 Reward\nlearns it from the density",
            "3 Tuning\none more phase of the training",
            "4 Report\nwhat changed",
        )
        # Panels have no ticks, since they show images and text.
        for panel_axes, panel_title in zip(axes, titles, strict=True):
            panel_axes.set_title(panel_title, loc="center", fontsize=10)
            panel_axes.set_box_aspect(1.5)
            panel_axes.set(xticks=[], yticks=[])
            panel_axes.grid(False)
        for panel_axes in axes[:-1]:
            # The arrow's position 1.08 is in the gap to the right of each panel.
            _write(panel_axes, 1.08, 0.5, "→", ha="center", va="center", size=16)
        axes[0].imshow(
            np.vstack([_shaded(best_field), _shaded(worst_field)]),
            cmap="gray",
            vmin=0,
            vmax=1,
            aspect="equal",
        )
        _write(axes[0], 0.98, 0.52, "✓", ha="right", size=20, color=style.colour("control"))
        _write(axes[0], 0.98, 0.03, "✗", ha="right", size=20, color=style.colour("after"))
        for row_index, field, shown_index in ((0, best_field, best_index), (1, worst_field, worst_index)):
            # [D, H, W], the slab that the reward reads. Its middle column along W is a sagittal slice.
            slab = reward.observation.observe(field)[0, 0]
            inset = axes[1].inset_axes((0, 0.5 - 0.5 * row_index, 1, 0.5))
            # The slice is transposed and flipped, so that y points up and z to the right.
            inset.imshow(slab[:, :, slab.shape[2] // 2].T.flip(0), cmap="magma", aspect="auto")
            inset.set(xticks=[], yticks=[])
            _write(
                inset, 0.97, 0.06, f"{float(scores[shown_index]):+.1f}", ha="right", size=12, color="white"
            )
        axes[2].imshow(np.vstack([_shaded(worst_field), _shaded(tuned_field)]), cmap="gray", vmin=0, vmax=1)
        for y_position, role in ((0.52, "before"), (0.03, "after")):
            _write(axes[2], 0.98, y_position, role, ha="right", color=style.colour(role))
        # The last panel shows only text.
        axes[3].axis("off")
        for line_index, (metric_label, metric_text) in enumerate(_last_panel_texts(run_summary)):
            _write(axes[3], 0.5, 0.92 - 0.3 * line_index, metric_text, ha="center", va="top", size=17)
            _write(axes[3], 0.5, 0.8 - 0.3 * line_index, metric_label, ha="center", va="top", size=8)
        style.save(figure, image_path)
