"""Report of what a reward reads: the box of its density grid in the cube, and the surface inside and outside.

`compute` counts the surface of a few samples in three views and returns JSON values; `plot` reads only these.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator
from eg3d_rlhf.generators.density_samples import RESOLUTION, DensitySamples, sample_density
from eg3d_rlhf.rewards.slab_crops import surface_inside, usable_level
from training.storage import write_atomic

# Views by name: the axes that lie across and up in the image, 0, 1, 2 for x, y, z.
VIEWS = {"front": (0, 1), "side": (2, 1), "top": (0, 2)}


def compute(generator: Generator, spec: SlabSpec, samples: DensitySamples | None = None) -> dict[str, Any]:
    """Count the surface of a few samples inside and outside of a cropped density grid.

    Args:
        generator: generator of the samples.
        spec: cropped grid that a reward reads.
        samples: densities of the samples; None: eight samples without truncation.

    Returns: JSON values.
        crop, resolution, shape: of the grid; the shape is the number of points along z, y and x.
        cube, box: lowest and highest coordinate along x, y and z of the generator's cube and of the grid, in
            world units.
        level: raw density at the surface; None if no sample has a surface at any level.
        seeds, psi: of the samples.
        points: number of points of the surface, which is proportional to its area.
        inside: share of the surface inside the box; None without a surface.
        views: by view, the numbers of points inside and outside in 64 x 64 cells of the cube, row 0 lowest.
    """
    samples = sample_density(generator) if samples is None else samples
    level = usable_level(samples, generator.level)
    points = torch.empty(0, 3) if level is None else samples.surface_points(level)
    is_inside = surface_inside(points, spec)
    half = samples.spec.box_warp / 2
    cube = [[centre - half, centre + half] for centre in samples.spec.centre]
    views = {}
    for view_name, (across, up) in VIEWS.items():
        counts = {}
        for part_name, is_part in (("inside", is_inside), ("outside", ~is_inside)):
            part = points[is_part].numpy()
            histogram, _, _ = np.histogram2d(
                part[:, up], part[:, across], bins=RESOLUTION, range=[[0, 1], [0, 1]]
            )
            counts[part_name] = histogram.astype(int).tolist()
        views[view_name] = counts
    return {
        "crop": list(spec.crop),
        "resolution": spec.resolution,
        "shape": list(spec.shape),
        "cube": cube,
        "box": [
            [
                low + first * (high - low) / (spec.resolution - 1),
                low + (stop - 1) * (high - low) / (spec.resolution - 1),
            ]
            for (low, high), (first, stop) in zip(cube, spec.index_ranges, strict=True)
        ],
        "level": level,
        "seeds": list(samples.seeds),
        "psi": samples.psi,
        "points": len(points),
        "inside": float(is_inside.double().mean()) if len(points) else None,
        "views": views,
    }


_LOW_SHARE = 0.25  # share of the surface below which a crop causes a warning


def summary(report: Mapping[str, Any]) -> str:
    """Return one sentence on the share of the surface that the reward reads."""
    if report["inside"] is None:
        return "No sample has a surface at any level, so nothing can be said about what the reward reads."
    depth, height, width = report["shape"]
    sentence = (
        f"The reward reads {width} x {height} x {depth} grid points along x, y and z, which contain"
        f" {report['inside']:.1%} of the surface of {len(report['seeds'])} samples (level"
        f" {report['level']:g})."
    )
    if report["inside"] >= _LOW_SHARE:
        return sentence
    return (
        f"{sentence} Warning: the reward cannot see most of the surface. Compare crop.png with the part that"
        " people compare, and choose another box with --crop."
    )


def plot(json_path: Path, png_path: Path) -> Path:
    """Draw the box of a reward in three views, with the surface inside (blue) and outside (red).

    Args:
        json_path: file with the result of `compute`.
        png_path: file to write.
    Returns: `png_path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    report = json.loads(json_path.read_text())
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (view_name, (across, up)) in zip(figure.subplots(1, len(VIEWS)), VIEWS.items(), strict=True):
        extent = (*report["cube"][across], *report["cube"][up])
        # The part inside is drawn last, so that points in front of it do not hide it.
        for part_name, colour_map in (("outside", "Reds"), ("inside", "Blues")):
            counts = np.array(report["views"][view_name][part_name])
            # Empty cells stay transparent, and single points are already visible.
            axes.imshow(
                np.ma.masked_equal(np.sqrt(counts), 0),
                origin="lower",
                extent=extent,
                cmap=colour_map,
                vmin=-1,
                vmax=np.sqrt(counts.max()) + 1,
                alpha=0.8,
            )
        left, right = report["box"][across]
        bottom, top = report["box"][up]
        axes.add_patch(
            Rectangle(
                (left, bottom), right - left, top - bottom, fill=False, edgecolor="black", linewidth=1.5
            )
        )
        axes.set(
            title=view_name, xlabel=f"{'xyz'[across]} (world units)", ylabel=f"{'xyz'[up]} (world units)"
        )
    inside = "no surface" if report["inside"] is None else f"{report['inside']:.1%} of the surface inside"
    figure.suptitle(
        f"Box of the reward's density grid (black) in the cube: {inside} (blue), the rest outside (red);"
        f" {len(report['seeds'])} samples, psi {report['psi']:g}",
        fontsize=10,
    )
    figure.savefig(png_path, dpi=120)
    return png_path


def write(report: Mapping[str, Any], folder: Path, plain_name: str = "crop") -> list[Path]:
    """Write a report and its figure into a folder as NAME.json and NAME.png, and return both paths."""
    json_path = folder / f"{plain_name}.json"
    write_atomic(json_path, (json.dumps(report) + "\n").encode())
    return [json_path, plot(json_path, folder / f"{plain_name}.png")]
