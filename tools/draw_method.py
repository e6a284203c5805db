"""Draw the method as one picture, from real data: labels, field, observation, reward, tuning, report.

Takes the bundled generator and reward and a finished run of `train.py --reward=sigma`.

\b
Example:
    python tools/draw_method.py --run=runs/00000-heads64-synthetic-heads64-batch8-gamma0.3-sigma-lambda10 --out=out/method.png
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click
import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, naming, option
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.shape_view import shade
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import load_reward

POOL = range(210_000, 210_040)  # latents among which the shown ones are looked for
PSI = 0.7


def picture(field: Field, points: int = 128) -> np.ndarray:
    """The one shape of a field, shaded, [R, R]."""
    grid = SlabSpec.of(field.bounds, points)
    return shade(field.density_grid(grid), 0.5, 260, field.level)[0, 0, 25:-5, 35:-35].numpy()


@click.command(cls=GroupedCommand, help=__doc__)
@option("--run", metavar="RUN", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="A finished run.")
@option("--out", metavar="FILE", type=click.Path(path_type=Path), required=True, help="Picture to write (.png or .svg).")
@torch.no_grad()
def main(run: Path, out: Path):
    with naming("--run"):
        summary = json.loads((run / "summary.json").read_text())
        before, after = load_generator().generator, load_generator(run).generator
    reward = load_reward(bundled.REWARD)
    ws = ws_of_seeds(before, list(POOL), PSI)
    scores = reward.score(before.field(ws))
    worst, best = int(scores.argmin()), int(scores.argmax())
    low, high = (before.field(ws[i : i + 1]) for i in (worst, best))
    tuned = after.field(ws_of_seeds(after, [POOL[worst]], PSI))
    with style.theme():
        drawn, axes = style.figure(6, 1, (13, 4.4))
        titles = (
            "1 Labels\nwhich shape is better?", "2 Field\ndensity, seen from the side", "3 Observation\nwhat the reward reads",
            "4 Reward\nlearnt from the labels", "5 Tuning\none latent, before, after", "6 Report\ndid it get better?",
        )
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="center", fontsize=10)
            ax.set_box_aspect(1.5)
        for ax in axes[:-1]:
            ax.text(1.08, 0.5, "→", transform=ax.transAxes, ha="center", va="center", size=16)
        for ax in (axes[0], axes[1], axes[2], axes[4]):
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        axes[0].imshow(np.vstack([picture(high), picture(low)]), cmap="gray", vmin=0, vmax=1, aspect="equal")
        axes[0].text(0.98, 0.52, "✓", transform=axes[0].transAxes, ha="right", size=20, color=style.colour("control"))
        axes[0].text(0.98, 0.03, "✗", transform=axes[0].transAxes, ha="right", size=20, color=style.colour("after"))
        assert isinstance(reward.observation, SigmaSlab)  # the bundled reward's
        side, slab = low.bounds.side / 2, reward.observation.spec
        cube = low.density_grid(SlabSpec.of(low.bounds, 160))[0]  # [D, H, W]
        axes[1].imshow(cube[:, :, 80].T.flip(0).clamp(-10, 60), extent=(-side, side, -side, side), cmap="magma")  # side view: z right, y up
        _, y, z = slab.axes()
        axes[1].plot([z[0], z[-1], z[-1], z[0], z[0]], [y[0], y[0], y[-1], y[-1], y[0]], color="white", lw=1)
        observed = reward.observation.observe(low)[0, 0]
        axes[2].imshow(observed[:, :, observed.shape[2] // 2].T.flip(0), cmap="magma")
        axes[2].set_xlabel(f"slab {' x '.join(map(str, observed.shape))}")
        axes[3].hist(scores, bins=12, color=style.colour("before"), alpha=0.4)
        for index, role in ((worst, "after"), (best, "control")):
            axes[3].axvline(float(scores[index]), color=style.colour(role), lw=2)
        axes[3].set(xlabel=f"reward of {len(POOL)} latents")
        axes[4].imshow(np.vstack([picture(low), picture(tuned)]), cmap="gray", vmin=0, vmax=1)
        for height, text, role in ((0.52, "before", "before"), (0.03, "after", "after")):
            axes[4].text(0.98, height, text, transform=axes[4].transAxes, ha="right", color=style.colour(role))
        axes[5].hist(summary["reward_deltas"], bins=16, color=style.colour("after"))
        axes[5].axvline(0, color=style.colour("noise"), lw=1)
        axes[5].set(xlabel=f"change of reward,\n{len(summary['reward_deltas'])} held-out latents")
        style.save(drawn, out)
    click.echo(f"{out}")


if __name__ == "__main__":
    main()
