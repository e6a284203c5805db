"""Strips of images that show the progress of a training: renders of the same few assets at every evaluation.

All strips of a training have the same prompts and noises. An asset is rendered from the front and above, as
points of its surface or as the centres of its Gaussians.
"""

import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import blank_cell
from eg3d_rlhf.geometry.files.ply import read_header, read_splats
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows
from eg3d_rlhf.tuning.flow.base.stage import EmptyStructure, Pipeline
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw_each
from training.storage import write_atomic

SIDE = 128  # edge of an image in pixels
LONGEST_REASON = 90  # letters of the reason that an image states in place of an asset
POINTS = 150_000  # number of points that are sampled on a mesh
_SH = 0.28209479177387814  # value of the constant spherical harmonic, 1 / (2 sqrt(pi))
_LIGHT = np.array(
    [0.3, 0.52, 0.8]
)  # direction of the light: to the viewer's right, up, and towards the viewer


LoadNetwork = Callable[[str], torch.nn.Module]  # function that loads the flow network of a stage


class NetworksOnDemand(Mapping[str, torch.nn.Module]):
    """Networks of all stages, of which only one is in memory: the others are loaded each time they are read.

    Args:
        present_networks: name of a stage -> its network, which is in memory.
        stage_names: names of all stages.
        load: function that loads the network of a stage.
    """

    def __init__(
        self,
        present_networks: Mapping[str, torch.nn.Module],
        stage_names: Sequence[str],
        load: LoadNetwork,
    ):
        self.present_networks = present_networks
        self.stage_names = stage_names
        self.load = load

    def __getitem__(self, stage: str) -> torch.nn.Module:
        if stage not in self.stage_names:
            raise KeyError(stage)
        return self.present_networks[stage] if stage in self.present_networks else self.load(stage)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stage_names)

    def __len__(self) -> int:
        return len(self.stage_names)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Callable that renders one asset of each prompt into an image, side by side (a strip)."""

    pipeline: Pipeline  # generator
    family: FlowFamily  # family of the generator
    prompts: Sequence[str]  # prompts; a strip shows one asset of each
    size: Sequence[int] = ()  # additional arguments of the family's `show`
    # Function that loads the network of a stage; None: the pipeline holds the networks of all stages.
    load: LoadNetwork | None = None

    def __call__(self, stage: str, model: torch.nn.Module, path: Path) -> Path:
        """Render one asset of each prompt, side by side in one image.

        Args:
            stage: name of the stage whose network is replaced.
            model: network to use for this stage.
            path: path of the PNG file to write.
        Returns: `path`.
        """
        assert isinstance(self.family, Shows)
        images = []
        models: Mapping[str, torch.nn.Module] = {stage: model}
        if self.load is not None:
            models = NetworksOnDemand(models, [s.name for s in self.pipeline.stages], self.load)
        with (
            torch.no_grad(),
            tempfile.TemporaryDirectory() as folder,
        ):
            # One asset at a time, because the training occupies most of the memory.
            for asset_or_error in draw_each(self.pipeline, self.prompts, [0] * len(self.prompts), models):
                if isinstance(asset_or_error, EmptyStructure):
                    images.append(blank_cell(SIDE, "no asset: its structure has no voxel"))
                    continue
                try:
                    _, asset = asset_or_error
                    file = self.family.show(asset, Path(folder) / "asset", *self.size)
                    images.append(image_of(file, self.family.up))
                # An asset with NaN cannot be rendered. Its image states the reason, because a strip must not
                # stop the training, which checks its own numbers.
                except ValueError as error:
                    images.append(
                        blank_cell(SIDE, textwrap.shorten(f"not rendered: {error}", LONGEST_REASON))
                    )
        write_atomic(path, png(np.concatenate(images, 1)))  # [SIDE, prompts * SIDE, 3]
        return path


def image_of(file: Path | None, up_axis: str = "y", side: int = SIDE) -> np.ndarray:
    """Render an asset from its file on a white background, [side, side, 3] uint8.

    Args:
        file: path of a .ply or .obj file. The image of None, or of a file of another type, states why it
            shows no asset.
        up_axis: axis of the asset that points up, "y" or "z".
        side: edge of the image in pixels.
    """
    if file is None:
        return blank_cell(side, "no asset was sampled")
    if file.suffix not in (".ply", ".obj"):
        return blank_cell(side, f"files of the type {file.suffix} are not rendered here")
    points, colours = points_of(file)
    if up_axis == "z":
        points = points[
            :, [1, 2, 0]
        ]  # a cyclic permutation of the axes, which is a rotation from z up to y up
    # The centre of the bounding box, because the mean would depend on the density of the points.
    points = points - (points.max(0) + points.min(0)) / 2
    # Rotation by 0.6 rad about the vertical axis, then by 0.4 rad downwards.
    turn_matrix, tilt_matrix = (
        np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) for angle in (0.6, 0.4)
    )
    points[:, [0, 2]] = points[:, [0, 2]] @ turn_matrix.T
    points[:, [1, 2]] = points[:, [1, 2]] @ tilt_matrix.T
    # A margin of 5 % around the asset. 1e-9 avoids a division by zero for a single point.
    half_width = 1.05 * max(float(np.abs(points[:, :2]).max(initial=0)), 1e-9)
    # Columns x and rows y of the points. Rows count downwards, hence the sign.
    x, y = (
        ((sign * points[:, axis] / half_width + 1) / 2 * side).astype(int).clip(0, side - 1)
        for sign, axis in ((1, 0), (-1, 1))
    )
    image = np.full((side, side, 3), 255, np.uint8)
    # far points first, so that near points overwrite them
    depth_order = np.argsort(points[:, 2], kind="stable")
    pixel_colours = (255 * colours[depth_order].clip(0, 1)).astype(np.uint8)
    # Each point also fills the pixels below and to the right, which closes gaps. Its own pixel is drawn last.
    for row_offset, column_offset in ((1, 0), (0, 1), (0, 0)):
        rows = (y[depth_order] + row_offset).clip(0, side - 1)
        columns = (x[depth_order] + column_offset).clip(0, side - 1)
        image[rows, columns] = pixel_colours
    return image


def points_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an asset's file, and return the positions [N, 3] and colours [N, 3] of points of the asset.

    The points of a mesh are random points of its surface, with shaded colours in 0..1. The points of Gaussian
    splats are their centres, with colours that are neither shaded nor limited to 0..1.
    """
    file_bytes = file.read_bytes()
    if file.suffix == ".ply" and "f_dc_0" in read_header(memoryview(file_bytes)).elements[0].properties:
        splats = read_splats(memoryview(file_bytes))
        return splats.centres.astype(float), 0.5 + _SH * splats.colours.astype(float)
    import trimesh  # slow to import, and not needed for Gaussians

    mesh: Any = trimesh.load(file, force="mesh", process=False)
    points, faces = trimesh.sample.sample_surface(mesh, POINTS, seed=0)
    # [POINTS, 1]. The absolute value lights both sides of a face, because the orientation of faces is not
    # known.
    light = 0.4 + 0.6 * np.abs(mesh.face_normals[faces] @ _LIGHT)[:, None]
    colours = (
        mesh.visual.face_colors[faces, :3] / 255
        if mesh.visual.kind in ("vertex", "face")
        else np.array([[0.8, 0.6, 0.4]])
    )
    return np.asarray(points), colours * light
