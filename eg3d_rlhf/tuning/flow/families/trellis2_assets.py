"""Surfaces and dual grids of the assets of TRELLIS.2, and meshes of the user.

An asset is a surface as in dual contouring (Ju et al. 2002). It has one vertex in every voxel. Where the
surface crosses an edge of the voxel grid, a face connects the vertices of the four voxels that share this
edge.

Shapes: W number of voxels and vertices of an asset, F number of its faces with four corners.
"""

from pathlib import Path

import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.geometry.dual_grid import DualGrid, dual_grid
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.models.trellis2 import VoxelAsset
from eg3d_rlhf.tuning.flow.families.folder import read_mesh


def faces_of(asset: VoxelAsset) -> list[torch.Tensor]:
    """Find the faces around crossed edges of the voxel grid.

    Each voxel owns one edge per axis: the edge at its far corner. It shares this edge with the next voxels
    along the other two axes. Faces with a missing voxel are left out. Faces have the order of the original's
    code. The orientation of a face follows the axis of its edge, not the inside of the surface.

    Returns: for the edges along each of the three axes, indices [F, 4] of the four voxels of a face.
    """
    coords = asset.coords.long()
    # Each voxel is identified by one integer. With R + 1 instead of R per axis, a neighbour beyond the border
    # cannot have the integer of another voxel.
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=coords.device)
    voxel_codes = (coords * strides).sum(1)  # [W]
    quads = list[torch.Tensor]()
    sorted_codes, voxel_index = voxel_codes.sort()
    for axis in range(3):
        # Strides b and c of the next voxels along the other two axes.
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        # The four voxels in a circle around the edge: [crossed edges, 4].
        corners = voxel_codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), c, b + c, b])
        # Codes beyond the last one get the index W, hence the clamp; they differ in the comparison.
        code_position = torch.searchsorted(sorted_codes, corners).clamp(max=len(sorted_codes) - 1)
        # Only edges around which all four voxels exist.
        quads.append(voxel_index[code_position[(sorted_codes[code_position] == corners).all(1)]])
    return quads


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract the triangle mesh of an asset, z up.

    A face is divided along the diagonal whose two vertices have the larger product of `split`, the weights
    that the decoder predicts. Not differentiable in `crossed`.

    Returns: vertices [W, 3] in the cube of +-0.5, and triangles [2 F, 3] of indices of vertices.
    """
    quads = torch.cat(faces_of(asset))
    w0, w1, w2, w3 = asset.split[quads].unbind(1)  # weights of the four corners, [F] each
    connects_02 = (w0 * w2 > w1 * w3)[:, None]  # whether the diagonal connects corners 0 and 2, or 1 and 3
    # Corners of the two triangles, for the diagonal 0-2 and for the diagonal 1-3.
    triangles = [
        torch.where(connects_02, quads[:, (0, 1, 2)], quads[:, (0, 1, 3)]),
        torch.where(connects_02, quads[:, (0, 2, 3)], quads[:, (3, 1, 2)]),
    ]
    # The two triangles of a face follow each other: [F, 2, 3] -> [2 F, 3].
    return asset.means, torch.stack(triangles, 1).flatten(0, 1)


def dual_grid_of(asset: VoxelAsset) -> tuple[DualGrid, torch.Tensor | None]:
    """Return the dual grid of the voxels that belong to a face, sorted, and the materials of these voxels.

    All voxels are returned if the asset has no face. The materials are None if the asset has none.
    """
    quads = faces_of(asset)
    crosses_edge = torch.zeros_like(asset.crossed)
    # The first voxel of a face owns the edge; see `faces_of`. Edges without a face are removed.
    for axis, axis_quads in enumerate(quads):
        crosses_edge[axis_quads[:, 0], axis] = True
    voxel_index = torch.unique(torch.cat(quads))
    if not len(voxel_index):
        # Assets of untrained networks may have no face.
        voxel_index = torch.arange(len(asset.coords), device=asset.coords.device)
        crosses_edge = asset.crossed
    coords = asset.coords[voxel_index].long()
    # Sorted by x, then y, then z: 21 bits for each coordinate in one 64-bit integer.
    voxel_index = voxel_index[((coords[:, 0] << 42) + (coords[:, 1] << 21) + coords[:, 2]).argsort()]
    grid = DualGrid(
        asset.coords[voxel_index].cpu(),
        asset.vertices[voxel_index].clamp(0, 1).cpu(),
        crosses_edge[voxel_index].cpu(),
    )
    return grid, None if asset.materials is None else asset.materials[voxel_index]


def dual_grid_at(asset: VoxelAsset, resolution: int) -> DualGrid:
    """Compute the dual grid of an asset's surface at another resolution.

    If the surface crosses no edge of the new grid, as for an untrained network, the result has the asset's
    voxels without crossed edges.

    Args:
        asset: asset at its own resolution.
        resolution: voxels per axis of the new grid.
    """
    vertices, faces = surface_of(asset)
    try:
        return dual_grid(vertices, faces, resolution)
    except ValueError:
        # Vertices in the middle of their voxels and no crossed edges.
        coords = torch.unique(asset.coords.cpu().long() * resolution // asset.resolution, dim=0).int()
        return DualGrid(coords, torch.full(coords.shape, 0.5), torch.zeros(coords.shape, dtype=torch.bool))


def encoded_shape(coords: torch.Tensor, vertices: torch.Tensor, crosses_edge: torch.Tensor) -> SparseBatch:
    """Build the input of the shape's encoder: a batch of one sample with features [W, 6] of -0.5..0.5.

    Args:
        coords: voxels [W, 3] int32.
        vertices: positions of the vertices in their voxels, [W, 3] of 0..1.
        crosses_edge: whether the surface crosses the voxel's edge along each axis, [W, 3] bool.
    """
    return SparseBatch.join(
        [SparseSample(coords, torch.cat([vertices - 0.5, crosses_edge.to(vertices) - 0.5], 1))]
    )


LONGEST_SIDE = 0.99999  # longest side of a mesh before it is encoded, as in the original


def centred(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Move and scale a mesh so that its bounding box is centred and its longest side is 0.99999.

    Returns: vertices [vertices, 3] float64 within +-0.5, and faces [faces, 3].
    Raises: ValueError if all vertices are the same point.
    """
    vertices = mesh.vertices.double()
    box_min = vertices.amin(0)
    box_max = vertices.amax(0)
    if not float((box_max - box_min).max()) > 0:
        raise ValueError("all vertices of the mesh are the same point. Export the surface as triangles.")
    # One scale for all axes, so that proportions stay the same.
    return (vertices - (box_min + box_max) / 2) * (LONGEST_SIDE / (box_max - box_min).max()), mesh.faces


def read_asset(path: Path) -> Mesh:
    """Read a triangle mesh of the user, with z up. Meshes in glTF files, where y is up, are rotated."""
    mesh = read_mesh(path)
    if path.suffix.lower() not in (".glb", ".gltf"):
        return mesh
    # (x, y, z) -> (x, -z, y): y up becomes z up, by a rotation about x.
    x, y, z = mesh.vertices.unbind(1)
    return Mesh(torch.stack([x, -z, y], 1), mesh.faces)


def show(asset: VoxelAsset, path: Path) -> Path:
    """Write the surface of an asset to <path>.ply, with its base colours if it has materials.

    Returns: path of the file.
    """
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.colours).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)
