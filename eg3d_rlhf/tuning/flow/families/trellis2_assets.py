"""Assets of TRELLIS.2: their surface (dual contouring), dual grids of assets and meshes, and the user's
meshes.

An asset has a vertex in every voxel, and a face around every crossed edge that four voxels share.

Shape letters: W voxels and F faces of an asset.
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
    """Find the faces around crossed edges: rows [F, 4] of the four voxels, along axis 1, axis 2 and axis 3.

    A voxel's edge along an axis is the one at its far corner, which it shares with the next voxels along both
    other axes. Faces with a missing voxel are left out. The order of faces is the original's. Their winding
    follows the axis, not the inside.
    """
    places = asset.coords.long()
    # One integer per voxel; the extra cell keeps neighbours beyond the border from coding as other voxels.
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=places.device)
    codes = (places * strides).sum(1)  # [W], one integer per voxel
    quads = list[torch.Tensor]()
    known, rows = codes.sort()
    for axis in range(3):
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        # The four voxels in a circle around the edge: [crossed edges, 4].
        corners = codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), c, b + c, b])
        at = torch.searchsorted(known, corners).clamp(max=len(known) - 1)
        # Only edges all of whose voxels exist.
        quads.append(rows[at[(known[at] == corners).all(1)]])
    return quads


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract vertices [W, 3] in the cube of +-0.5 and triangles [2 F, 3] of their rows, z up.

    A face is cut along the diagonal whose ends have the larger product of `split`. Not differentiable in:
    crossed.
    """
    quads = torch.cat(faces_of(asset))
    first, second, third, fourth = asset.split[quads].unbind(1)  # weights of the four corners, [F] each
    cut = (first * third > second * fourth)[:, None]
    # The two triangles of either diagonal.
    halves = [(0, 1, 2), (0, 2, 3)], [(0, 1, 3), (3, 1, 2)]
    triangles = [
        torch.where(cut, quads[:, early], quads[:, late]) for early, late in zip(*halves, strict=True)
    ]
    # Both triangles of a face are neighbours: [F, 2, 3] -> [2 F, 3].
    return asset.means, torch.stack(triangles, 1).flatten(0, 1)


def dual_grid_of(asset: VoxelAsset) -> tuple[DualGrid, torch.Tensor | None]:
    """Return the voxels of an asset that belong to a face, sorted, and the materials on them.

    Of an asset without faces, all voxels are returned.
    """
    quads = faces_of(asset)
    crossed = torch.zeros_like(asset.crossed)
    # The first voxel of a face is the one at whose far corner the edge is.
    for axis, faces in enumerate(quads):
        crossed[faces[:, 0], axis] = True
    kept = torch.unique(torch.cat(quads))
    if not len(kept):
        # Assets of untrained networks may have no face.
        kept = torch.arange(len(asset.coords), device=asset.coords.device)
        crossed = asset.crossed
    places = asset.coords[kept].long()
    kept = kept[((places[:, 0] << 42) + (places[:, 1] << 21) + places[:, 2]).argsort()]
    grid = DualGrid(asset.coords[kept].cpu(), asset.vertices[kept].clamp(0, 1).cpu(), crossed[kept].cpu())
    return grid, None if asset.materials is None else asset.materials[kept]


def dual_grid_at(asset: VoxelAsset, resolution: int) -> DualGrid:
    """Compute the dual grid of an asset's surface at another resolution.

    An asset whose surface crosses no grid line, as of an untrained network, gives its voxels alone.
    """
    vertices, faces = surface_of(asset)
    try:
        return dual_grid(vertices, faces, resolution)
    except ValueError:
        # Vertices in the middle of their voxels and no crossed edges.
        coords = torch.unique(asset.coords.cpu().long() * resolution // asset.resolution, dim=0).int()
        return DualGrid(coords, torch.full(coords.shape, 0.5), torch.zeros(coords.shape, dtype=torch.bool))


def encoded_shape(coords: torch.Tensor, vertices: torch.Tensor, crossed: torch.Tensor) -> SparseBatch:
    """Build the input of the shape's encoder, features [W, 6] on voxels, in -0.5..0.5."""
    return SparseBatch.join(
        [SparseSample(coords, torch.cat([vertices - 0.5, crossed.to(vertices) - 0.5], 1))]
    )


LONGEST = 0.99999  # longest side of a mesh before it is encoded, as in the original


def centred(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Move and scale a mesh to fit within +-0.5; returns vertices and faces.

    Raises: ValueError for a mesh that is a single point.
    """
    vertices = mesh.vertices.double()
    low = vertices.amin(0)
    high = vertices.amax(0)
    if not float((high - low).max()) > 0:
        raise ValueError("the mesh has no extent, only a point. Export the surface as triangles.")
    # The longest side fills the cube; proportions are kept.
    return (vertices - (low + high) / 2) * (LONGEST / (high - low).max()), mesh.faces


def read_asset(path: Path) -> Mesh:
    """Read a triangle mesh of the user's, z up. A mesh in a glTF file, where y is up, is rotated."""
    mesh = read_mesh(path)
    if path.suffix.lower() not in (".glb", ".gltf"):
        return mesh
    # (x, y, z) -> (x, -z, y): y up becomes z up, by a rotation about x.
    x, y, z = mesh.vertices.unbind(1)
    return Mesh(torch.stack([x, -z, y], 1), mesh.faces)


def show(asset: VoxelAsset, path: Path) -> Path:
    """Write the surface with its base colours as .ply."""
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.colours).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)
