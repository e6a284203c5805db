"""The frontal depth map of each latent, before and after: how much relief a face has, and where tuning moved it.

Letters: N latents, R pixels per edge.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, contains_zero, span
from eg3d_rlhf.generators import FFHQ_FOCAL, LoadedGenerator, camera
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval, paired_summary
from eg3d_rlhf.metrics.views import lift
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job
from training.image_grid import save_grid
from training.rendering.cameras import intrinsics_matrix

SHARE = 0.25  # of the report's latents
SHOWN = 8  # latents in the picture
RESOLUTION, SAMPLES = 64, 32  # pixels per edge; samples per ray in each of two passes
OPACITY = 0.5  # accumulated opacity from which a pixel is valid
FACE = (-0.10, 0.10, -0.16, 0.18)  # x from, x to, y from, y to, in box_warp
NOSE = (-0.05, 0.05, -0.10, 0.0)
CHEEKS = ((-0.09, -0.035, -0.08, -0.025), (0.035, 0.09, -0.08, -0.025))
LEAST_PIXELS = 8  # in a window below which its measure is missing
MEASURES = {
    "valid pixels": "share of the image", "depth range of the face": "world units", "face relief": "world units",
    "nose prominence": "world units",
}
ROLES = ("before", "after", "control")


class DepthMaps(NamedTuple):
    """Frontal maps of N latents."""

    points: np.ndarray  # [N, R, R, 3] world positions along the pixels' rays
    valid: np.ndarray  # [N, R, R] bool


def jobs(c: Comparison) -> list[Job]:
    """The one part."""
    n = max(2, round(SHARE * c.n))
    return [Job(
        key="canonical-depth", title="Frontal depth: relief of the face", compute=partial(canonical_depth, c, n),
        plots={"measures": plot_measures, "mean-change": plot_change}, inputs=c.inputs(*ROLES, n=n, resolution=RESOLUTION, shown=SHOWN),
    )]


def canonical_depth(c: Comparison, n: int, folder: Path) -> Finding:
    """Valid pixels, depth range, relief and nose prominence per latent; the mean change of depth at each pixel; depth images."""
    seeds, box_warp = c.seeds(n), float(c.before.G.rendering_kwargs["box_warp"])
    maps = {role: depth_maps(c, generator, seeds) for role, generator in c.generators().items()}
    values = {role: measures(found, box_warp) for role, found in maps.items()}
    known = {name: np.all([np.isfinite(v[name]) for v in values.values()], axis=0) for name in MEASURES}
    table = {name: _compare(name, values, known[name]) for name in MEASURES}
    rows = [
        {"seed": seed, **{f"{name} {role}": _number(v[name][i]) for name in MEASURES for role, v in values.items()}}
        for i, seed in enumerate(seeds)
    ]
    data = {"measures": table, "change": {role: _change(maps["before"], maps[role]) for role in maps if role != "before"}}
    name = "canonical-depth.png"
    _picture(maps, folder / name)
    shown = min(SHOWN, n)
    caption = (
        f"Frontal depth of seeds {seeds[0]}..{seeds[shown - 1]}, rows {', '.join(maps)}: near is bright, one scale for all, black where "
        "nothing is hit."
    )
    return Finding(
        facts=c.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}"), data=data, rows=rows, says=_says(c, table), pictures={caption: name}
    )


@torch.no_grad()
def depth_maps(c: Comparison, generator: LoadedGenerator, seeds: range) -> DepthMaps:
    """World points behind the pixels of the frontal camera, with constant noise and the same ray jitter in every call."""
    G, points, valid = generator.G, [], []
    kept_resolution, kept_options = G.neural_rendering_resolution, G.rendering_kwargs
    G.rendering_kwargs = {**kept_options, "depth_resolution": SAMPLES, "depth_resolution_importance": SAMPLES}
    try:
        for ws in c.ws(generator, seeds).split(c.batch):
            label = camera(G, n=len(ws))  # [n, 25]
            with torch.random.fork_rng(devices=[c.device] if c.device.type == "cuda" else []):
                torch.manual_seed(c.seed)
                out = G.synthesis(ws, label, neural_rendering_resolution=RESOLUTION, noise_mode="const")
            depth, opacity = out["image_depth"].float(), out["image_opacity"].float()  # [n, 1, R, R]
            solid = (opacity >= OPACITY) & depth.isfinite()
            pose = label[:1, :16].reshape(1, 4, 4)
            lifted = lift(torch.where(solid, depth, 0.0), pose, intrinsics_matrix(FFHQ_FOCAL, depth.device))  # [n, 1, R, R, 3]
            points.append(lifted[:, 0].double().cpu().numpy())
            valid.append(solid[:, 0].cpu().numpy())
    finally:
        G.neural_rendering_resolution, G.rendering_kwargs = kept_resolution, kept_options
    return DepthMaps(np.concatenate(points), np.concatenate(valid))


def measures(maps: DepthMaps, box_warp: float) -> dict[str, np.ndarray]:
    """MEASURES [N] of depth maps; NaN where a window of the face holds too few pixels.

    Depth range: 5th to 95th percentile of z in the window of the face. Relief: RMS of z about its best fit by a quadratic in x and y, which
    takes the roundness of a head out, so that a flat or a balloon-like face has none. Nose prominence: 98th percentile of z in the nose's
    window less the mean of the cheeks' 80th percentiles. Windows are fixed places of the cube where aligned heads have these parts.
    """
    found = {name: np.full(len(maps.valid), np.nan) for name in MEASURES}
    found["valid pixels"] = maps.valid.mean(axis=(1, 2))
    for i, (points, valid) in enumerate(zip(maps.points, maps.valid, strict=True)):
        face = points[valid & _window(points, FACE, box_warp)]
        if len(face) >= LEAST_PIXELS:
            low, high = np.quantile(face[:, 2], [0.05, 0.95])
            found["depth range of the face"][i], found["face relief"][i] = high - low, _relief(face / box_warp) * box_warp
        nose, *cheeks = (points[valid & _window(points, box, box_warp)][:, 2] for box in (NOSE, *CHEEKS))
        if min(len(part) for part in (nose, *cheeks)) >= LEAST_PIXELS:
            found["nose prominence"][i] = np.quantile(nose, 0.98) - np.mean([np.quantile(cheek, 0.8) for cheek in cheeks])
    return found


def _window(points: np.ndarray, box: tuple[float, float, float, float], box_warp: float) -> np.ndarray:
    x, y = points[..., 0] / box_warp, points[..., 1] / box_warp
    return (x >= box[0]) & (x <= box[1]) & (y >= box[2]) & (y <= box[3])


def _relief(face: np.ndarray) -> float:
    """RMS [] of z about its least-squares quadratic in x and y, for points [P, 3]."""
    x, y, z = face.T
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    return float(np.sqrt(np.mean((z - terms @ np.linalg.lstsq(terms, z, rcond=None)[0]) ** 2)))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _compare(name: str, values: Mapping[str, Mapping[str, np.ndarray]], known: np.ndarray) -> dict:
    """Means, paired changes and values of a measure over the latents where all networks have it."""
    found = {role: v[name][known] for role, v in values.items()}
    entry = {"unit": MEASURES[name], "n": int(known.sum()), "values": {role: v.tolist() for role, v in found.items()}}
    if known.sum() < 2:
        return {**entry, "means": {}, "paired": {}}
    means = {role: bootstrap_mean_interval(v)._asdict() for role, v in found.items()}
    return {**entry, "means": means, "paired": {r: paired_summary(found["before"], v).to_dict() for r, v in found.items() if r != "before"}}


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


def _says(c: Comparison, table: Mapping) -> list[str]:
    says = []
    for name, entry in table.items():
        if not entry["paired"]:
            says.append(f"{name}: not measured, since hardly any latent has a surface where a face should be. Are these aligned heads?")
            continue
        change = entry["paired"]["after"]
        none = ", no change is shown" if contains_zero(change["mean_lo"], change["mean_hi"]) else ""
        text = f"{name} ({entry['unit']}, n = {entry['n']}): {entry['means']['before']['mean']:.4g} before, "
        text += f"{entry['means']['after']['mean']:.4g} after, paired {_interval(change)}{none}"
        if "control" in entry["paired"]:
            text += f"; control {_interval(entry['paired']['control'])}"
        says.append(f"{text}.")
    says.append(
        "These are diagnostics without a best value: a flattened face loses relief and nose, an exaggerated one gains them. "
        + ("The programmatic judge also reads how far the nose stands out, so they are no evidence beside it." if c.synthetic else
           "The windows of nose and cheeks suit aligned frontal heads alone.")
    )
    return says if c.control is not None else [*says, NO_CONTROL]


def _interval(change: Mapping) -> str:
    return span(change["mean"], change["mean_lo"], change["mean_hi"], "+.3g")


def plot_measures(data: dict):
    """Values per latent before and after as pairs, with means."""
    drawn, axes = style.figure(columns=len(data["measures"]), size=(9.4, 3.0))
    for axis, (name, entry) in zip(axes, data["measures"].items(), strict=True):
        roles = list(entry["values"])
        for one in zip(*entry["values"].values(), strict=True):
            axis.plot(range(len(roles)), one, color=style.colour("noise"), linewidth=0.4, alpha=0.6)
        for i, role in enumerate(roles):
            if role in entry["means"]:
                mean = entry["means"][role]
                error = [[max(0.0, mean["mean"] - mean["lo"])], [max(0.0, mean["hi"] - mean["mean"])]]
                axis.errorbar([i], [mean["mean"]], yerr=error, fmt="D", markersize=5, capsize=5, color=style.colour(role))
        axis.set_xticks(range(len(roles)), roles)
        axis.set(ylabel=entry["unit"], title=name, xlim=(-0.4, len(roles) - 0.6))
    return drawn


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
