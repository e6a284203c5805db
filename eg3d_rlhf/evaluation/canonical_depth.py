"""The frontal depth map of each latent, before and after: how much relief a face has, and where tuning moved it.

Letters: N latents, R pixels per edge.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES, compare, plot_values
from eg3d_rlhf.field import Bounds, RenderOptions, render_each
from eg3d_rlhf.generators import LoadedGenerator, camera
from eg3d_rlhf.metrics.views import lift
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job
from training.gan import save_grid

SHARE = 0.25  # of the report's latents
SHOWN = 8  # latents in the picture
LOOK = RenderOptions(resolution=64, samples=32)  # pixels per edge; samples per ray in each of two passes
OPACITY = 0.5  # accumulated opacity from which a pixel is valid
FACE = (-0.10, 0.10, -0.16, 0.18)  # x from, x to, y from, y to, as shares of the cube, from its centre
NOSE = (-0.05, 0.05, -0.10, 0.0)
CHEEKS = ((-0.09, -0.035, -0.08, -0.025), (0.035, 0.09, -0.08, -0.025))
LEAST_PIXELS = 8  # in a window below which its measure is missing
MEASURES = {
    "valid pixels": "share of the image", "depth range of the face": "world units", "face relief": "world units",
    "nose prominence": "world units",
}


class DepthMaps(NamedTuple):
    """Frontal maps of N latents."""

    points: np.ndarray  # [N, R, R, 3] world positions along the pixels' rays
    valid: np.ndarray  # [N, R, R] bool


def jobs(c: Comparison) -> list[Job]:
    """The one part."""
    plots = {"measures": plot_values, "mean-change": plot_change}
    n = max(2, round(SHARE * c.n))
    return [c.job("canonical-depth", "Frontal depth: relief of the face", canonical_depth, plots, ROLES, version=2, n=n,
                  resolution=LOOK.resolution, shown=SHOWN)]


def canonical_depth(c: Comparison, folder: Path) -> Finding:
    """Valid pixels, depth range, relief and nose prominence per latent; the mean change of depth at each pixel; depth images."""
    seeds, bounds = c.seeds(max(2, round(SHARE * c.n))), c.before.generator.bounds
    maps = {role: depth_maps(c, generator, seeds) for role, generator in c.generators().items()}
    values = {role: measures(found, bounds) for role, found in maps.items()}
    change = {role: _change(maps["before"], maps[role]) for role in maps if role != "before"}
    finding = compare(c, seeds, values, MEASURES, change=change)
    name = "canonical-depth.png"
    _picture(maps, folder / name)
    caption = (
        f"Frontal depth of seeds {seeds[0]}..{seeds[min(SHOWN, len(seeds)) - 1]}, rows {', '.join(maps)}: near is bright, one scale for "
        "all, black where nothing is hit."
    )
    missing = [name for name, entry in finding.data["measures"].items() if not entry["paired"]]
    notes = [f"Hardly any latent has {', '.join(missing)}. Are these aligned heads?"] if missing else []
    notes.append(
        "These are diagnostics without a best value: a flattened face loses relief and nose, an exaggerated one gains them. "
        + ("The programmatic judge also reads how far the nose stands out, so they are no evidence beside it." if c.synthetic else
           "The windows of nose and cheeks suit aligned frontal heads alone.")
    )
    notes += [] if c.control is not None else [NO_CONTROL]
    return replace(finding, says=[*finding.says, *notes], pictures={caption: name})


@torch.no_grad()
def depth_maps(c: Comparison, generator: LoadedGenerator, seeds: range) -> DepthMaps:
    """World points behind the pixels of the frontal camera, with constant noise and the same ray jitter in every call."""
    points, valid = [], []
    label = camera(generator.generator)  # [1, 25]
    pose, intrinsics = label[:, :16].reshape(1, 4, 4), label[0, 16:].reshape(3, 3)
    for field in c.fields(generator, seeds):
        (seen,) = render_each(field, [label], LOOK, c.seed)
        depth, opacity = seen.depth.float(), seen.opacity.float()  # [n, 1, R, R]
        solid = (opacity >= OPACITY) & depth.isfinite()
        lifted = lift(torch.where(solid, depth, 0.0), pose, intrinsics)  # [n, 1, R, R, 3]
        points.append(lifted[:, 0].double().cpu().numpy())
        valid.append(solid[:, 0].cpu().numpy())
    return DepthMaps(np.concatenate(points), np.concatenate(valid))


def measures(maps: DepthMaps, bounds: Bounds) -> dict[str, np.ndarray]:
    """MEASURES [N] of depth maps; NaN where a window of the face holds too few pixels.

    Depth range: 5th to 95th percentile of z in the window of the face. Relief: RMS of z about its best fit by a quadratic in x and y, which
    takes the roundness of a head out, so that a flat or a balloon-like face has none. Nose prominence: 98th percentile of z in the nose's
    window less the mean of the cheeks' 80th percentiles. Windows are fixed places of the cube where aligned heads have these parts.
    """
    found = {name: np.full(len(maps.valid), np.nan) for name in MEASURES}
    found["valid pixels"] = maps.valid.mean(axis=(1, 2))
    for i, (points, valid) in enumerate(zip(maps.points, maps.valid, strict=True)):
        face = points[valid & _window(points, FACE, bounds)]
        if len(face) >= LEAST_PIXELS:
            low, high = np.quantile(face[:, 2], [0.05, 0.95])
            found["depth range of the face"][i], found["face relief"][i] = high - low, _relief(face / bounds.side) * bounds.side
        nose, *cheeks = (points[valid & _window(points, box, bounds)][:, 2] for box in (NOSE, *CHEEKS))
        if min(len(part) for part in (nose, *cheeks)) >= LEAST_PIXELS:
            found["nose prominence"][i] = np.quantile(nose, 0.98) - np.mean([np.quantile(cheek, 0.8) for cheek in cheeks])
    return found


def _window(points: np.ndarray, box: tuple[float, float, float, float], bounds: Bounds) -> np.ndarray:
    x, y = ((points[..., i] - bounds.centre[i]) / bounds.side for i in (0, 1))
    return (x >= box[0]) & (x <= box[1]) & (y >= box[2]) & (y <= box[3])


def _relief(face: np.ndarray) -> float:
    """RMS [] of z about its least-squares quadratic in x and y, for points [P, 3]."""
    x, y, z = face.T
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    return float(np.sqrt(np.mean((z - terms @ np.linalg.lstsq(terms, z, rcond=None)[0]) ** 2)))


def _change(before: DepthMaps, after: DepthMaps) -> dict:
    """Mean change of z [R, R] over the latents that are valid in both, in world units; None where fewer than half are."""
    both = before.valid & after.valid
    count = both.sum(axis=0)
    total = np.where(both, after.points[..., 2] - before.points[..., 2], 0.0).sum(axis=0)
    seen = count >= max(1, len(both) / 2)
    mean = np.where(seen, total / np.maximum(count, 1), np.nan)
    return {"mean": [[None if not np.isfinite(v) else round(float(v), 6) for v in row] for row in mean]}


def _picture(maps: Mapping[str, DepthMaps], path: Path) -> None:
    """One row of depth images per network; near is bright."""
    z = np.concatenate([found.points[:SHOWN, :, :, 2] for found in maps.values()])
    valid = np.concatenate([found.valid[:SHOWN] for found in maps.values()])
    low, high = np.quantile(z[valid], [0.02, 0.998]) if valid.any() else (0.0, 1.0)
    shade = np.where(valid, 0.15 + 0.85 * np.clip((z - low) / max(high - low, 1e-9), 0, 1), 0.0)
    bigger = shade[:, None].repeat(2, axis=2).repeat(2, axis=3)
    save_grid(bigger, (0, 1), len(next(iter(maps.values())).valid[:SHOWN]), path)


def plot_change(data: dict):
    """Where, on average, the surface came nearer (red) or went back (blue)."""
    roles = list(data["change"])
    drawn, axes = style.figure(columns=len(roles), size=(4.4 * len(roles), 3.4))
    fields = [np.array([[np.nan if v is None else v for v in row] for row in data["change"][role]["mean"]]) for role in roles]
    top = max([float(np.nanmax(np.abs(f))) for f in fields if np.isfinite(f).any()], default=0.0) or 1e-6
    for axis, role, values in zip(np.atleast_1d(axes), roles, fields, strict=True):
        shown = axis.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"{role}: mean change of depth")
        axis.grid(False)
        drawn.colorbar(shown, ax=axis, label="towards the camera, world units")
    return drawn
