"""A strip of pictures of the same few assets at every evaluation of a training: what updates do to them.

Conditions and noises are fixed. An asset is drawn as its family shows it, as points of its surface or as its
Gaussians' centres, from the front and above.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.geometry.files.ply import read_header, read_splats
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows
from eg3d_rlhf.tuning.flow.base.stage import EmptyStructure, Pipeline
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw_or_empty
from training.storage import write_atomic

# pixels of a picture, points of a mesh
SIDE = 128
POINTS = 150_000
_SH = 0.28209479177387814  # of the constant spherical harmonic
_LIGHT = np.array([0.3, 0.52, 0.8])  # the viewer's right, up, and towards the viewer


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Called with a stage's network and a file to write; returns the file."""

    pipeline: Pipeline
    family: FlowFamily
    conditions: Sequence[str]  # one asset of each
    size: Sequence[int] = ()  # what the family's `show` takes besides

    def __call__(self, stage: str, model: torch.nn.Module, path: Path) -> Path:
        assert isinstance(self.family, Shows)
        pictures = []
        with (
            torch.no_grad(),
            tempfile.TemporaryDirectory() as folder,
        ):
            for name in self.conditions:  # one by one: memory is training's
                (shown,) = draw_or_empty(self.pipeline, [name], [0], {stage: model})
                try:
                    file = (
                        None
                        if isinstance(shown, EmptyStructure)
                        else self.family.show(shown[1], Path(folder) / "asset", *self.size)
                    )
                    pictures.append(picture(file, self.family.up))
                # numbers that are not finite: training goes on, and stops where its own are not
                except ValueError:
                    pictures.append(picture(None))
        write_atomic(path, png(np.concatenate(pictures, 1)))
        return path


def picture(file: Path | None, up: str = "y", side: int = SIDE) -> np.ndarray:
    """An asset's file as uint8 [side, side, 3]; white where there is nothing, as for what has no surface."""
    if file is None or file.suffix not in (".ply", ".obj"):
        return np.full((side, side, 3), 255, np.uint8)
    points, colours = points_of(file)
    if up == "z":
        points = points[:, [1, 2, 0]]
    points = points - (points.max(0) + points.min(0)) / 2
    across, tilt = (np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.6, 0.4))
    points[:, [0, 2]] = points[:, [0, 2]] @ across.T
    points[:, [1, 2]] = points[:, [1, 2]] @ tilt.T
    reach = 1.05 * max(float(np.abs(points[:, :2]).max(initial=0)), 1e-9)
    x, y = (
        ((sign * points[:, axis] / reach + 1) / 2 * side).astype(int).clip(0, side - 1)
        for sign, axis in ((1, 0), (-1, 1))
    )
    seen = np.full((side, side, 3), 255, np.uint8)
    order = np.argsort(points[:, 2], kind="stable")  # far ones first
    # a point's neighbours first, so that no gap between points stays white
    for down, right in ((1, 0), (0, 1), (0, 0)):
        seen[(y[order] + down).clip(0, side - 1), (x[order] + right).clip(0, side - 1)] = (
            255 * colours[order].clip(0, 1)
        ).astype(np.uint8)
    return seen


def points_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """[N, 3] each: places, and colours in 0..1, shaded where there is a surface."""
    data = file.read_bytes()
    if file.suffix == ".ply" and "f_dc_0" in read_header(memoryview(data)).elements[0].properties:
        splats = read_splats(memoryview(data))
        return splats.centres.astype(float), 0.5 + _SH * splats.colours.astype(float)
    import trimesh  # heavy

    mesh: Any = trimesh.load(file, force="mesh", process=False)
    points, faces = trimesh.sample.sample_surface(mesh, POINTS, seed=0)
    light = 0.4 + 0.6 * np.abs(mesh.face_normals[faces] @ _LIGHT)[:, None]
    colours = (
        mesh.visual.face_colors[faces, :3] / 255
        if mesh.visual.kind in ("vertex", "face")
        else np.array([[0.8, 0.6, 0.4]])
    )
    return np.asarray(points), colours * light
