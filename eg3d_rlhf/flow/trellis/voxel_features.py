"""What the encoder of the second stage reads: per voxel, DINOv2's features averaged over views of the asset.

Shape letters: v voxels, E entries of a feature, R voxels per axis.
"""

import torch
import torch.nn.functional as F

from eg3d_rlhf.flow.trellis.assets import SplatAsset
from eg3d_rlhf.flow.trellis.encoders import IMAGE_SIZE, ImageEncoder
from eg3d_rlhf.flow.trellis.render import render, views_around


@torch.no_grad()
def voxel_features(asset: SplatAsset, voxels: torch.Tensor, encoder: ImageEncoder, resolution: int = 64, views: int = 150) -> torch.Tensor:
    """[v, E] float32: features of the patches that a voxel's centre falls on, interpolated, mean over views, hidden or not."""
    centres = (voxels.float() + 0.5) / resolution - 0.5  # [v, 3]
    total: torch.Tensor | None = None
    for view in views_around(views):
        patches = encoder.patches(render(asset, view, IMAGE_SIZE)[None])  # [1, E, 37, 37]
        places = (2 * view.project(centres) - 1).to(patches)[None, :, None]  # [1, v, 1, 2]
        seen = F.grid_sample(patches, places, mode="bilinear", align_corners=False)[0, :, :, 0].T
        total = seen if total is None else total + seen
    return total / views
