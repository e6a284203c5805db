"""Draw the method as one figure of four panels from real data: labels, reward, tuning, report."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments import style, version_0_1
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.rewards.reward import load_reward

METHOD_POOL = EVALUATION.take(40)  # latents among which the best and the worst shape are searched
METHOD_PSI = 1.0


def _shaded(field: Field, points: int = 128) -> np.ndarray:
    """Shade the only shape of a field from the back and slightly from the side, [R, R] in 0..1."""
    grid = SlabSpec.of(field.bounds, points)
    # Half a turn less 0.4 rad. The slice crops the empty margin of the 260-pixel render.
    return shade(field.density_grid(grid), math.pi - 0.4, 260, field.level)[0, 0, 25:-5, 35:-35].numpy()


def _method_lines(summary: dict) -> list[tuple[str, str]]:
    """Return the lines of the last panel: a label and the figure of the run."""
    lines = [("win rate by the oracle,\nheld-out latents", f"{summary['win_rate']:.0%}")]
    # The error reduction exists for generators with ground-truth heads only.
    if summary.get("error_reduction") is not None:
        lines = [
            ("error reduction of\ndefective heads", f"{summary['error_reduction']:.0%}"),
            (
                "by the best label-free\npost-processing",
                f"{summary['error_reduction_by_post_processing']:.0%}",
            ),
            ("of intact heads\ndegraded", f"{summary['intact_degraded']:.0%}"),
        ]
    return lines


def _write(axes, x: float, y: float, text: str, **look) -> None:
    """Write a text at a position given in shares of the axes."""
    axes.text(x, y, text, transform=axes.transAxes, **look)


@torch.no_grad()
def draw_method(run: Path, out: Path) -> None:
    """Draw the figure with the bundled generator and reward and a finished run of train.py --reward=sigma.

    Raises: ValueError, FileNotFoundError naming --run.
    """
    with naming("--run"):
        summary = version_0_1.summary(json.loads((run / "summary.json").read_text()))
        before = load_generator().generator
        after = load_generator(run).generator
    reward = load_reward(bundled.REWARD)
    ws = ws_of_seeds(before, list(METHOD_POOL), METHOD_PSI)
    scores = reward.score(before.field(ws))  # [40]
    worst = int(scores.argmin())
    # The worst and the best shape before tuning by the reward; the tuned generator gets the worst one's
    # latent.
    best = int(scores.argmax())
    worst_field, best_field = (before.field(ws[i : i + 1]) for i in (worst, best))
    tuned = after.field(ws_of_seeds(after, [METHOD_POOL[worst]], METHOD_PSI))
    with style.theme():
        figure, axes = style.figure(4, 1, (11, 4.6))
        titles = (
            "1 Labels\npairs: which shape is better?",
            "2 Reward\nlearns it from the density",
            "3 Tuning\none more phase of the training",
            "4 Report\nwhat changed",
        )
        # Panels without ticks: they show images and text.
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="center", fontsize=10)
            ax.set_box_aspect(1.5)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        for ax in axes[:-1]:
            # 1.08 lies in the gap to the right of each panel.
            _write(ax, 1.08, 0.5, "→", ha="center", va="center", size=16)
        axes[0].imshow(
            np.vstack([_shaded(best_field), _shaded(worst_field)]),
            cmap="gray",
            vmin=0,
            vmax=1,
            aspect="equal",
        )
        _write(axes[0], 0.98, 0.52, "✓", ha="right", size=20, color=style.colour("control"))
        _write(axes[0], 0.98, 0.03, "✗", ha="right", size=20, color=style.colour("after"))
        for half, field, index in ((0, best_field, best), (1, worst_field, worst)):
            # [D, H, W] of the slab that the reward reads; its middle column is a sagittal slice.
            seen = reward.observation.observe(field)[0, 0]
            part = axes[1].inset_axes((0, 0.5 - 0.5 * half, 1, 0.5))
            # Transposed and flipped, so that y points up and z to the right.
            part.imshow(seen[:, :, seen.shape[2] // 2].T.flip(0), cmap="magma", aspect="auto")
            part.set(xticks=[], yticks=[])
            _write(part, 0.97, 0.06, f"{float(scores[index]):+.1f}", ha="right", size=12, color="white")
        axes[2].imshow(np.vstack([_shaded(worst_field), _shaded(tuned)]), cmap="gray", vmin=0, vmax=1)
        for height, role in ((0.52, "before"), (0.03, "after")):
            _write(axes[2], 0.98, height, role, ha="right", color=style.colour(role))
        axes[3].axis("off")
        for place, (words, value) in enumerate(_method_lines(summary)):
            _write(axes[3], 0.5, 0.92 - 0.3 * place, value, ha="center", va="top", size=17)
            _write(axes[3], 0.5, 0.8 - 0.3 * place, words, ha="center", va="top", size=8)
        style.save(figure, out)
