"""Assets of TRELLIS.2: the surface of an asset on voxels (dual contouring), dual grids of assets and meshes,
and meshes of the user's own.

An asset has a vertex in every voxel, and a face about every crossed edge that four voxels share.

Shape letters: W voxels and F triangles of an asset.
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
    """The rows [F, 4] of the voxels about each crossed edge, in the original's order, along axis 1, along 2
    and along 3.

    A voxel's edge along an axis is the one at its far corner, which it shares with the next voxels along both
    other axes. Faces lacking a voxel are left out. Their winding follows the axis, not the inside.
    """
    places = asset.coords.long()
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=places.device)
    codes = (places * strides).sum(1)
    quads = list[torch.Tensor]()
    known, rows = codes.sort()
    for axis in range(3):
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        # [faces, 4] round the edge
        wanted = codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), c, b + c, b])
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        quads.append(rows[at[(known[at] == wanted).all(1)]])
    return quads


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices [W, 3] in the cube of +-0.5 and triangles [F, 3] of their rows, z up. Not differentiable in:
    crossed.

    A face is cut along the diagonal whose ends have the larger product of `split`.
    """
    quads = torch.cat(faces_of(asset))
    first, second, third, fourth = asset.split[quads].unbind(1)
    cut = (first * third > second * fourth)[:, None]
    halves = [(0, 1, 2), (0, 2, 3)], [(0, 1, 3), (3, 1, 2)]
    triangles = [
        torch.where(cut, quads[:, early], quads[:, late]) for early, late in zip(*halves, strict=True)
    ]
    return asset.means, torch.stack(triangles, 1).flatten(0, 1)


def dual_grid_of(asset: VoxelAsset) -> tuple[DualGrid, torch.Tensor | None]:
    """The voxels of an asset that lie about its faces, sorted, and the materials on them; of one without a
    face all.
    """
    quads = faces_of(asset)
    crossed = torch.zeros_like(asset.crossed)
    for axis, about in enumerate(quads):
        crossed[about[:, 0], axis] = True
    kept = torch.unique(torch.cat(quads))
    if not len(kept):
        kept = torch.arange(len(asset.coords), device=asset.coords.device)
        crossed = asset.crossed
    places = asset.coords[kept].long()
    kept = kept[((places[:, 0] << 42) + (places[:, 1] << 21) + places[:, 2]).argsort()]
    grid = DualGrid(asset.coords[kept].cpu(), asset.vertices[kept].clamp(0, 1).cpu(), crossed[kept].cpu())
    return grid, None if asset.materials is None else asset.materials[kept]


def dual_grid_at(asset: VoxelAsset, resolution: int) -> DualGrid:
    """By way of the asset's surface; of one that crosses no line, such as an untrained network makes, the
    voxels alone.
    """
    vertices, faces = surface_of(asset)
    try:
        return dual_grid(vertices, faces, resolution)
    except ValueError:
        coords = torch.unique(asset.coords.cpu().long() * resolution // asset.resolution, dim=0).int()
        return DualGrid(coords, torch.full(coords.shape, 0.5), torch.zeros(coords.shape, dtype=torch.bool))


def encoded_shape(coords: torch.Tensor, vertices: torch.Tensor, crossed: torch.Tensor) -> SparseBatch:
    """What the shape's encoder reads, [W, 6]."""
    return SparseBatch.join(
        [SparseSample(coords, torch.cat([vertices - 0.5, crossed.to(vertices) - 0.5], 1))]
    )


LONGEST = 0.99999  # side of a mesh that is encoded


def centred(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices and faces of a mesh within +-0.5."""
    vertices = mesh.vertices.double()
    low = vertices.amin(0)
    high = vertices.amax(0)
    if not float((high - low).max()) > 0:
        raise ValueError("expected a mesh with a size, got a point. Export the surface as triangles.")
    return (vertices - (low + high) / 2) * (LONGEST / (high - low).max()), mesh.faces


def read_asset(path: Path) -> Mesh:
    """A triangle mesh of one's own, z up; of glTF, which has y up, it is turned."""
    mesh = read_mesh(path)
    if path.suffix.lower() not in (".glb", ".gltf"):
        return mesh
    x, y, z = mesh.vertices.unbind(1)
    return Mesh(torch.stack([x, -z, y], 1), mesh.faces)


def show(asset: VoxelAsset, path: Path) -> Path:
    """Write the surface with its base colours, .ply."""
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.colours).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)
