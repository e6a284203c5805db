"""Regions and Integrated Gradients of single voxels on the surface: colours of a mesh's vertices, pictures, and a page to turn.

Letters: V vertices, F faces, P points, D, H, W = grid points of the slab along z, y, x, R regions.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution.regions import Partition
from eg3d_rlhf.evaluation.attribution.study import Study
from eg3d_rlhf.experiments.jobs import Finding
from eg3d_rlhf.experiments.page import ColouredMesh, Layer, mesh_page
from eg3d_rlhf.geometry.mesh import extract_mesh
from training.storage import write_atomic

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
SHOWN = 3  # latents on the page and in pictures
YAWS = (0.0, 0.6, 1.57)  # radians, of the views in a picture
PAGE = "surface-attribution.html"
_SCALE = 0.99  # quantile of |attribution| on a surface that takes the full colour


def region_colour(index: int) -> Colour:
    """Colour of a region; they repeat after twelve."""
    return REGION_COLOURS[index % len(REGION_COLOURS)]


def slab_index(vertices: np.ndarray, spec: SlabSpec) -> np.ndarray:
    """Fractional slab indices [V, 3] (z, y, x) of world positions; of a skewed lattice those of the straight one, under a voxel off."""
    first = np.array([start for start, _ in spec.index_ranges], dtype=np.float64)
    xyz = ((vertices - np.array(spec.centre, dtype=vertices.dtype)) / spec.box_warp + 0.5) * (spec.resolution - 1) - first
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


def surface(study: Study, folder: Path) -> Finding:
    """Attribution per vertex of the first latents' meshes: a page to turn (<folder>/surface-attribution.html) and a picture."""
    meshes, drawn, rows, missing = [], [], [], []
    half = study.cube_spec.box_warp / 2
    for i, seed in enumerate(study.seeds[:SHOWN]):
        for role in ("before", "after"):
            try:
                vertices, faces = extract_mesh(study.cube(role, seed)[0], study.cube_spec, study.level)
            except ValueError:  # no surface to colour
                missing.append(f"seed {seed} {role}")
                continue
            values = voxels_at(vertices, study.integrated[i].voxels, study.spec)
            scale = float(np.quantile(np.abs(values), _SCALE))
            layers = _layers(study, i, vertices, values, scale)
            meshes.append(ColouredMesh(name=f"seed {seed}, {role}", vertices=vertices, faces=faces, layers=layers))
            ends = {"highest": vertices[values.argmax()], "lowest": vertices[values.argmin()]}
            places = {f"{name} {axis}": round(float(v), 4) for name, vertex in ends.items() for axis, v in zip("xyz", vertex, strict=True)}
            rows.append({"seed": seed, "mesh": role, "vertices": len(vertices), "full_colour": scale, **places})
            if role == "after":
                drawn.append([picture(vertices, faces, layers[0].colours, yaw, half=half) for yaw in YAWS])
    says = [
        "Orange raises the reward, blue lowers it: the sum of Integrated Gradients over the 3 x 3 x 3 voxels about a vertex. Each mesh has "
        "its own scale (full colour in the table), so colours compare places of a head, not heads.",
        "Voxels away from the surface are not seen here; the table of regions counts them all.",
    ]
    says += [f"Without a surface, so not shown: {', '.join(missing)}."] if missing else []
    pictures = {}
    if drawn:
        write_pictures(folder / "surface-attribution.png", drawn)
        pictures = {f"Attribution on the tuned surface of seeds {study.seeds[0]}..: front, half turned, side.": "surface-attribution.png"}
    page = mesh_page(meshes, "Attribution on the surface", half) if meshes else ""
    write_atomic(folder / PAGE, page.encode())
    facts = study.c.facts(study.seeds[:SHOWN], ("before", "after", "reward"))
    return Finding(facts=facts, data={"page": PAGE if meshes else None}, rows=rows, says=says, pictures=pictures)


def _layers(study: Study, i: int, vertices: np.ndarray, values: np.ndarray, scale: float) -> list[Layer]:
    labels = labels_at(vertices, study.partitions[i], study.spec)
    ends = ((f"raises the reward (+{_short(scale)})", RAISES), ("no influence", NEUTRAL), (f"lowers it (-{_short(scale)})", LOWERS))
    names = [(name, region_colour(k)) for k, name in enumerate(study.names) if (labels == k).any()]
    names += [("outside the slab", GREY)] if (labels < 0).any() else []
    return [
        Layer(name="attribution", colours=diverging(values, scale), legend=ends),
        Layer(name="regions", colours=by_region(labels), legend=names),
        Layer(name="shape alone", colours=np.full((len(vertices), 3), 225, dtype=np.uint8), legend=()),
    ]


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"
