"""Strips of images of the same few assets, rendered at every evaluation of a training to show its progress.

Prompts and noises are fixed. An asset is rendered in its family's format, as points of its surface or as the
centres of its Gaussians, from the front and above.
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

SIDE = 128  # pixels per side of an image
POINTS = 150_000  # points sampled on a mesh
_SH = 0.28209479177387814  # value of the constant spherical harmonic, 1 / (2 sqrt(pi))
_LIGHT = np.array([0.3, 0.52, 0.8])  # direction of the light: the viewer's right, up, towards the viewer


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Renderer of a strip, called with a stage's name, its network and the file to write."""

    pipeline: Pipeline
    family: FlowFamily
    conditions: Sequence[str]  # prompts, with one asset each
    size: Sequence[int] = ()  # further arguments of the family's `show`

    def __call__(self, stage: str, model: torch.nn.Module, path: Path) -> Path:
        """Render one image per prompt, side by side, and return the file."""
        assert isinstance(self.family, Shows)
        images = []
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
                    images.append(image_of(file, self.family.up))
                # numbers that are not finite: a strip must not stop a training, which checks its own numbers
                except ValueError:
                    images.append(image_of(None))
        write_atomic(path, png(np.concatenate(images, 1)))  # [SIDE, prompts * SIDE, 3]
        return path


def image_of(file: Path | None, up: str = "y", side: int = SIDE) -> np.ndarray:
    """Render an asset's file: uint8 [side, side, 3], white where there is no surface."""
    if file is None or file.suffix not in (".ply", ".obj"):
        return np.full((side, side, 3), 255, np.uint8)
    points, colours = points_of(file)
    if up == "z":
        points = points[:, [1, 2, 0]]  # z up to y up, by a rotation of the axes
    # centred by the bounding box: the mean would depend on the density of points
    points = points - (points.max(0) + points.min(0)) / 2
    # rotations by 0.6 rad about the vertical axis and 0.4 rad downwards
    across, tilt = (np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.6, 0.4))
    points[:, [0, 2]] = points[:, [0, 2]] @ across.T
    points[:, [1, 2]] = points[:, [1, 2]] @ tilt.T
    # the largest coordinate gets a margin of 5 %; the guard is for a single point
    reach = 1.05 * max(float(np.abs(points[:, :2]).max(initial=0)), 1e-9)
    x, y = (
        ((sign * points[:, axis] / reach + 1) / 2 * side).astype(int).clip(0, side - 1)
        for sign, axis in ((1, 0), (-1, 1))
    )
    image = np.full((side, side, 3), 255, np.uint8)
    order = np.argsort(points[:, 2], kind="stable")  # far points first, so that near ones overwrite them
    # a point's neighbours first, so that no gap between points stays white
    for down, right in ((1, 0), (0, 1), (0, 0)):
        image[(y[order] + down).clip(0, side - 1), (x[order] + right).clip(0, side - 1)] = (
            255 * colours[order].clip(0, 1)
        ).astype(np.uint8)
    return image


def points_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read positions and colours of an asset, [N, 3] each.

    Colours are in 0..1 for meshes, which are shaded. The colours of Gaussians are not clipped or shaded.
    """
    data = file.read_bytes()
    if file.suffix == ".ply" and "f_dc_0" in read_header(memoryview(data)).elements[0].properties:
        splats = read_splats(memoryview(data))
        return splats.centres.astype(float), 0.5 + _SH * splats.colours.astype(float)
    import trimesh  # slow to import, and not needed for Gaussians

    mesh: Any = trimesh.load(file, force="mesh", process=False)
    points, faces = trimesh.sample.sample_surface(mesh, POINTS, seed=0)
    # absolute value: both sides of a face are lit, since meshes may be oriented either way; [POINTS, 1]
    light = 0.4 + 0.6 * np.abs(mesh.face_normals[faces] @ _LIGHT)[:, None]
    colours = (
        mesh.visual.face_colors[faces, :3] / 255
        if mesh.visual.kind in ("vertex", "face")
        else np.array([[0.8, 0.6, 0.4]])
    )
    return np.asarray(points), colours * light
