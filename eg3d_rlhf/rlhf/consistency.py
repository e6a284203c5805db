"""What holds the tuned generator to its pretrained self: anchors on the density field.

Letters: N batch, D, H, W grid points along z, y, x.
"""

import torch


def density_l1(sigma: torch.Tensor, sigma_ref: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of raw densities (sigma-reward.md, section 4). sigma, sigma_ref [N, D, H, W] -> [N]."""
    return (sigma - sigma_ref).abs().mean(dim=[1, 2, 3])


def front_growth(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float = 10.0) -> torch.Tensor:
    """Mean positive growth of density in front of the reference surface.

    A voxel is in front where neither it nor any voxel between it and the camera side (+z) reaches `level` in the reference.

    Args:
        sigma, sigma_ref: [N, D, H, W] raw; level: isosurface level.
    Returns: [N]. Differentiable in sigma.
    """
    reached = (sigma_ref >= level).flip(1).cummax(dim=1).values.flip(1)
    front = ~reached
    growth = torch.relu(sigma - sigma_ref) * front
    return growth.sum(dim=[1, 2, 3]) / front.sum(dim=[1, 2, 3]).clamp_min(1)
