"""Files of shapes: meshes as .ply, .obj or .glb, density volumes as .mrc.

Letters: V vertices, F faces, N grid points per axis.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.sigma.chunked_mesh import Progress, block_planes
from training.storage import write_atomic

MESH_SUFFIXES = (".ply", ".obj", ".glb")


def check_mesh_suffix(path: str | Path, who: str = "save_mesh") -> Path:
    """The path, where its suffix names a mesh format; ValueError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(f"{who}: expected a file ending in {', '.join(MESH_SUFFIXES)}, got {path.name!r}. Change the suffix.")
    return path


def save_mesh(
    path: str | Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray | None = None, normals: np.ndarray | None = None
) -> Path:
    """Write the mesh as .ply (binary), .obj or .glb, by the suffix, atomically; folders are made as needed.

    Args: vertices [V, 3] world coordinates; faces [F, 3]; colors [V, 3] uint8; normals [V, 3] of unit length, pointing outwards.
    Returns: the path written.
    Raises: ValueError for another suffix.
    """
    import trimesh

    path = check_mesh_suffix(path)
    mesh = trimesh.Trimesh(vertices=vertices, faces=faces, vertex_colors=colors, vertex_normals=normals, process=False)
    kind = path.suffix.lower()[1:]
    options = {"ply": {"vertex_normal": normals is not None}, "obj": {"include_normals": normals is not None}}
    data = mesh.export(file_type=kind, **options.get(kind, {"include_normals": normals is not None}))
    write_atomic(path, data.encode() if isinstance(data, str) else data)
    return path


def write_mrc(
    path: str | Path, sample: Callable[[slice], torch.Tensor], resolution: int, step: float, progress: Progress | None = None
) -> Path:
    """Write a density cube as an MRC volume of mode 2 (float32), block by block, with EG3D's order of axes.

    Section i, row j, column k hold the point with x index N - 1 - i, y index j and z index k: EG3D flips x and stores z fastest. One cell
    is one unit of length, as in EG3D's files; a label in the header names the world step.

    Args: sample as for `extract_mesh_blockwise`; resolution N; step: world units between grid points; progress: ("density", done, N).
    Returns: the path written, atomically.
    """
    import mrcfile

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mrcfile.new_mmap(temporary, shape=(resolution,) * 3, mrc_mode=2, overwrite=True) as file:
            for start in range(0, resolution, block_planes(resolution**2)):
                stop = min(start + block_planes(resolution**2), resolution)
                block = sample(slice(start, stop)).numpy()
                file.data[resolution - stop : resolution - start] = block[::-1]
                file.flush()
                if progress is not None:
                    progress("density", stop, resolution)
            file.voxel_size = 1.0
            file.add_label(f"raw density, step {step:.9g} world units, axes: -x, y, z")
            file.update_header_stats()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
