"""Regions and voxel attributions on the surface: colours of a mesh's vertices, and pictures of coloured meshes.

Letters: V vertices, F faces, P points, D, H, W = grid points of the slab along z, y, x, R regions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.attribution.regions import Partition
from eg3d_rlhf.sigma.spec import SlabSpec

Colour = tuple[int, int, int]
# Twelve colours that differ in hue and lightness, Okabe and Ito's first.
REGION_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167), (136, 34, 85),
    (153, 221, 255), (170, 170, 0), (119, 170, 221), (190, 190, 190),
)
GREY: Colour = (160, 160, 160)
LOWERS, NEUTRAL, RAISES = (0, 114, 178), (235, 235, 235), (213, 94, 0)
_SPLATS = 64  # points per face of a picture
_LIGHT = np.array([0.35, 0.5, 0.8]) / np.linalg.norm([0.35, 0.5, 0.8])


def region_colour(index: int) -> Colour:
    """Colour of a region; they repeat after twelve."""
    return REGION_COLOURS[index % len(REGION_COLOURS)]


def slab_index(vertices: np.ndarray, spec: SlabSpec) -> np.ndarray:
    """Fractional slab indices [V, 3] (z, y, x) of world positions; of a skewed lattice those of the straight one, under a voxel off."""
    first = np.array([start for start, _ in spec.index_ranges], dtype=np.float64)
    xyz = (vertices / spec.box_warp + 0.5) * (spec.resolution - 1) - first
    return xyz[:, ::-1]


def labels_at(vertices: np.ndarray, partition: Partition, spec: SlabSpec) -> np.ndarray:
    """Region of the voxel nearest to each vertex, [V]; -1 outside the slab."""
    index = np.round(slab_index(vertices, spec)).astype(np.int64)
    inside = ((index >= 0) & (index < spec.shape)).all(axis=1)
    z, y, x = np.clip(index, 0, np.array(spec.shape) - 1).T
    return np.where(inside, partition.labels.numpy()[z, y, x], -1)


def voxels_at(vertices: np.ndarray, voxels: torch.Tensor, spec: SlabSpec, reach: int = 1) -> np.ndarray:
    """Attribution of the voxels about each vertex, [V]: the sum over (2 reach + 1)^3 voxels, trilinear in between; 0 outside the slab.

    A surface moves through the voxels on both of its sides, so one voxel's share alone would flicker.
    """
    size = 2 * reach + 1
    sums = F.avg_pool3d(voxels.double()[None, None], size, stride=1, padding=reach, count_include_pad=True) * size**3
    index = torch.from_numpy(slab_index(vertices, spec).copy())
    limits = torch.tensor([n - 1 for n in spec.shape], dtype=torch.float64)
    grid = (2 * index / limits - 1).flip(-1)[None, None, None]  # (x, y, z)
    return F.grid_sample(sums, grid, align_corners=True, padding_mode="zeros").flatten().numpy()


def diverging(values: np.ndarray, scale: float) -> np.ndarray:
    """Colours [V, 3] uint8: blue at -scale, light at 0, orange at +scale."""
    share = np.clip(values / max(scale, 1e-12), -1, 1)[:, None]
    towards = np.where(share < 0, np.array(LOWERS), np.array(RAISES))
    return np.round(NEUTRAL + (towards - NEUTRAL) * np.abs(share)).astype(np.uint8)


def by_region(labels: np.ndarray) -> np.ndarray:
    """Colours [V, 3] uint8 of region labels [V]; grey for -1."""
    table = np.array([region_colour(i) for i in range(max(labels.max(initial=0) + 1, 1))] + [GREY], dtype=np.uint8)
    return table[labels]


def picture(
    vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, yaw: float = 0.0, resolution: int = 320, half: float = 0.5, seed: int = 0
) -> np.ndarray:
    """A coloured mesh seen from the front, turned by `yaw` radians: [resolution, resolution, 3] uint8 on white.

    Orthographic: points drawn over every face, those nearest to the camera kept, lit from above.
    """
    corners = vertices[faces].astype(np.float64)  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), size=_SPLATS)  # [P, 3]
    points = np.einsum("pk,fkc->fpc", shares, corners).reshape(-1, 3)
    tones = np.einsum("pk,fkc->fpc", shares, colours[faces].astype(np.float64)).reshape(-1, 3)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    points, normals = points @ turn.T, np.repeat(normals @ turn.T, _SPLATS, axis=0)
    column = np.floor((points[:, 0] / half + 1) / 2 * resolution).astype(np.int64)
    row = np.floor((1 - points[:, 1] / half) / 2 * resolution).astype(np.int64)
    shown = (column >= 0) & (column < resolution) & (row >= 0) & (row < resolution) & (normals[:, 2] > 0)
    order = np.flatnonzero(shown)[np.argsort(points[shown, 2])]  # the nearest to the camera is written last
    light = 0.4 + 0.6 * np.clip(normals[order] @ _LIGHT, 0, 1)
    out = np.full((resolution, resolution, 3), 255, dtype=np.uint8)
    out[row[order], column[order]] = np.clip(tones[order] * light[:, None], 0, 255).astype(np.uint8)
    return out


def write_pictures(path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """A PNG of pictures of one size, in rows."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(path)
