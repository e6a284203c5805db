"""Shapes beside pictures and films: one file per latent, in the format that the user names."""

from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.generators import of
from eg3d_rlhf.sigma.chunked_mesh import Progress
from eg3d_rlhf.sigma.field_grid import FieldGrid
from eg3d_rlhf.sigma.mesh_export import MeshOptions, export_mesh
from eg3d_rlhf.sigma.mesh_files import MESH_SUFFIXES, write_mrc

SHAPE_SUFFIXES = (*MESH_SUFFIXES, ".mrc")
BORDER = 30 / 256  # share of the cube that EG3D's tools clear along each face


def shape_suffix(name: str) -> str:
    """'.ply', '.obj', '.glb' or '.mrc' from a format's name, with or without the dot.

    Raises: ValueError for another one.
    """
    suffix = "." + name.lower().removeprefix(".")
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(f"expected a shape format of {', '.join(SHAPE_SUFFIXES)}, got {name!r}. Choose one of them.")
    return suffix


def save_shape(
    path: str | Path, G: Any, ws: torch.Tensor, options: MeshOptions, noise_mode: str = "const", progress: Progress | None = None
) -> Path:
    """Write the shape of ws [1, L, W]: the density cube (.mrc), or its surface as a mesh (.ply, .obj, .glb).

    Of the options an .mrc has use for the resolution and the border only.
    Raises: ValueError for another suffix, or a level that the density does not cross.
    """
    path = Path(path)
    suffix = shape_suffix(path.suffix)
    field = of(G).field(ws, noise_mode)
    if suffix == ".mrc":
        grid = FieldGrid(field, options.resolution, options.border)
        return write_mrc(path, grid, options.resolution, field.bounds.side / (options.resolution - 1), progress)
    mesh, _ = export_mesh(field, options, progress)
    return mesh.save(path)
