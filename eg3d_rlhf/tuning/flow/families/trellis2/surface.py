"""The surface of an asset: a vertex in every voxel, a face about every crossed edge that four voxels share (dual contouring).

Shape letters: W voxels, F triangles.
"""

import torch

from eg3d_rlhf.models.trellis2.voxel_decoder import VoxelAsset


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices [W, 3] in the cube of +-0.5 and triangles [F, 3] of their rows. Not differentiable in: crossed.

    A voxel's edge along an axis is the one at its far corner, which it shares with the next voxels along both other axes. A face is cut
    along the diagonal whose ends have the larger product of `split`. Faces lacking a voxel are left out; they have no common side.
    """
    places = asset.coords.long()
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=places.device)
    codes, found = (places * strides).sum(1), [torch.zeros(0, 3, dtype=torch.int64, device=places.device)]
    known, rows = codes.sort()
    for axis in range(3):
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        wanted = codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), b, b + c, c])  # [faces, 4] round the edge
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        quads = rows[at[(known[at] == wanted).all(1)]]
        first, second, third, fourth = asset.split[quads].unbind(1)
        cut = (first * third >= second * fourth)[:, None]
        halves = [(0, 1, 2), (0, 2, 3)], [(1, 2, 3), (1, 3, 0)]
        found += [torch.where(cut, quads[:, one], quads[:, other]) for one, other in zip(*halves, strict=True)]
    return (places + asset.vertices) / asset.resolution - 0.5, torch.cat(found)
