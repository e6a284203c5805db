"""Finished assets as a generator family: the file that a run writes for an arm; seeds 0, 1, 2, ... name its assets in order.

Labelling, the blind study, meshes, pictures and rewards then take it as any generator. It cannot be tuned: a shape per seed is all it has.

Letters: N samples, A assets, Z z_dim.
"""

import torch

from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.generators import Family, Generator, latents, register

# the kinds of field register when they are imported
from eg3d_rlhf.generators.assets import latents as latent_field  # noqa: F401
from eg3d_rlhf.generators.assets.asset import ARCHITECTURE, RESOLUTION, Asset, AssetNetwork


class AssetGenerator:
    """`FiniteGenerator` around A assets."""

    architecture, conditioned = ARCHITECTURE, False
    z_dim, w_dim, num_ws = 8, 1, 1
    img_resolution = RESOLUTION
    cameras = CameraFamily(radius=6.0)  # the whole cube, also from its corners, with the lens of portraits

    def __init__(self, module: AssetNetwork):
        self.module, self.count = module, len(module.asset)
        self.bounds, self.level = module.asset.bounds, module.asset.level

    def mapping(self, z: torch.Tensor, c: torch.Tensor, truncation_psi: float = 1.0, truncation_cutoff: int | None = None) -> torch.Tensor:
        """ws [N, 1, 1], the numbers of the assets whose seeds have the latents z [N, Z]. Camera and truncation change nothing.

        Raises: ValueError for the latent of no asset.
        """
        del c, truncation_psi, truncation_cutoff
        own = latents(range(self.count), self.z_dim).to(z)  # [A, Z]
        same = (z[:, None] == own).all(dim=2)  # [N, A]
        if not bool(same.any(dim=1).all()):
            raise ValueError(f"assets: expected latents of seeds 0 to {self.count - 1}, got others. This file has {self.count} shapes.")
        return same.float().argmax(dim=1).view(-1, 1, 1).to(z)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Asset:
        """The assets of numbers ws [N, 1, 1]. Raises: ValueError for what is between them: there is nothing."""
        del noise_mode
        numbers = ws.flatten().tolist()
        if ws.shape[1:] != (1, 1) or not all(number in range(self.count) for number in numbers):
            got = f"{list(ws.shape)} with {numbers[:4]}"
            wanted = f"ws [N, 1, 1] of whole numbers below {self.count}"
            raise ValueError(f"assets: expected {wanted}, got {got}. There is nothing between two assets.")
        return self.module.asset.pick([int(number) for number in numbers])


def wrap(module: AssetNetwork) -> Generator:
    """What the registry calls."""
    return AssetGenerator(module)


register(Family(ARCHITECTURE, AssetNetwork, None, wrap))
