"""Assets on grids of parameters: voxels (the test problem), and tri-planes with a decoder per asset.

Letters: A assets, N voxels per edge, P points, X, Y, Z = grid points along x, y, z; C plane channels, J
hidden units, R texels per edge.
"""

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.assets.asset import Asset, sparsity
from torch_utils.ops.triplane_decode import sample_planes_channels_first
from training.rendering.renderer import generate_planes

# Raw density per unit of the parameter. Optimiser steps of 0.05 then fill or empty a voxel in a few dozen
# steps.
GAIN = 10.0


class Voxels(Asset):
    """Voxels: raw density = LEVEL + GAIN shape, colour = sigmoid(paint), interpolated trilinearly.

    Points are corner-aligned: voxel i of an axis is at (i/(N - 1) - 1/2) of the side. The initial state is a
    grey fog of `start`. At -1.1 a ray through the cube loses a tenth of its light, so gradients reach every
    voxel.
    """

    kind = "voxels"

    def __init__(self, assets: int, resolution: int = 16, start: float = -1.1):
        super().__init__()
        self.resolution = resolution
        # axes z, y, x
        cube = (resolution,) * 3
        self.shape = torch.nn.Parameter(torch.full((assets, *cube), start))  # [A, N, N, N], z, y, x
        self.paint = torch.nn.Parameter(torch.zeros(assets, 3, *cube))  # [A, 3, N, N, N], logits; 0 is grey

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments, see `Asset`."""
        return {"resolution": self.resolution}

    @property
    def samples(self) -> int:
        """Return the samples along a ray: two per voxel along an axis."""
        return 2 * self.resolution

    @property
    def pitch(self) -> float:
        """Return the distance between neighbouring voxels, world units."""
        return self.bounds.side / (self.resolution - 1)

    @property
    def raw(self) -> torch.Tensor:
        """Return the raw density [A, N, N, N] of the voxels, axes z, y, x."""
        return LEVEL + GAIN * self.shape

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return density and colour, see `Asset`. The colour is interpolated before its sigmoid."""
        # Density and colour are interpolated in one call.
        values = torch.cat([self.raw.unsqueeze(1), self.paint], dim=1)  # [A, 4, N, N, N]
        places = (points * (2 / self.bounds.side))[:, None, None]  # [A, 1, 1, P, 3], components x, y, z
        # [A, 4, P]
        sampled = F.grid_sample(values, places, mode="bilinear", padding_mode="border", align_corners=True)[
            :, :, 0, 0
        ]
        return sampled[:, 0], torch.sigmoid(sampled[:, 1:]).transpose(1, 2)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density on a product of coordinates, see `ProductField`: interpolated axis by
        axis.
        """
        # One axis at a time, which takes fewer operations than interpolating every point by itself.
        partial = torch.einsum("azyx,ix->azyi", self.raw, self._hats(x))  # [A, Z, Y, i]
        partial = torch.einsum("azyi,jy->azij", partial, self._hats(y))  # [A, Z, i, j]
        return torch.einsum("azij,kz->aijk", partial, self._hats(z))  # [A, i, j, k]

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density at grid points, see `Field`."""
        # The product form repeats the value of the border outside the cube, so it serves only for grids
        # inside.
        if grid.lattice != "straight" or grid.box_warp > self.bounds.side or any(grid.centre):
            return super().density_grid(grid)
        return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()

    def _hats(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Compute the interpolation weights [P, N] of the voxels along an axis at world coordinates [P].

        Beyond the border they give the border's value.
        """
        # Position in voxels, 0..N - 1, of corner-aligned points.
        last = self.resolution - 1
        place = (coordinates.to(self.shape) / self.bounds.side + 0.5) * last
        return (
            1 - (place.clamp(0, last)[:, None] - torch.arange(self.resolution).to(self.shape)).abs()
        ).clamp_min(0)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return the penalties [A].

        'sparsity' and 'opacity', see `sparsity`; 'roughness', the mean squared difference of `shape` between
        neighbours.
        """
        # Differences along z, y and x.
        steps = [self.shape.diff(dim=dim).square().flatten(1).mean(dim=1) for dim in (1, 2, 3)]
        return {**sparsity(self.raw, self.pitch), "roughness": torch.stack(steps).mean(dim=0)}

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters by learning rate, see `Asset`."""
        return {"grid": [self.shape, self.paint]}


# Raw density added at the centre, decreasing to 0 at _REACH. It corresponds to the density bias
# 10 (1 - |p| / 0.5) of text-to-3D in a cube of side 2.
_BLOB = 20.0
_REACH = 0.25  # world units
_PROBES = 16  # grid points per edge at which regularisers evaluate the density


class TriPlanes(Asset):
    """Tri-planes with a decoder per asset.

    raw = w1[0] softplus(w0 f + b0) + b1[0] + 1 + 20 (1 - |p| / 0.25); colours from w1[1:] as in
    `training.triplane.OSGDecoder`. f [C] is the mean over three planes of their features at p (the layout
    with three different planes).

    Deviates from the usual field of text-to-3D: planes and a decoder for each asset, where threestudio has a
    hash grid, which needs CUDA.
    """

    kind = "planes"
    plane_axes: torch.Tensor

    def __init__(self, assets: int, resolution: int = 32, channels: int = 8, hidden: int = 16, seed: int = 0):
        super().__init__()
        self.resolution = resolution
        self.channels = channels
        self.hidden = hidden
        self.seed = seed
        # A generator of its own: assets do not depend on other random numbers.
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> torch.nn.Parameter:
            """Return a normally distributed parameter [A, ...]."""
            return torch.nn.Parameter(torch.randn(assets, *shape, generator=rng) * scale)

        # Small planes: the initial density is the blob below.
        self.planes = normal(3, channels, resolution, resolution, scale=0.1)
        # Scaled by 1 / sqrt(fan-in).
        self.w0 = normal(hidden, channels, scale=channels**-0.5)
        self.b0 = torch.nn.Parameter(torch.zeros(assets, hidden))
        self.w1 = normal(4, hidden, scale=hidden**-0.5)
        self.b1 = torch.nn.Parameter(torch.zeros(assets, 4))
        self.register_buffer("plane_axes", generate_planes("fixed"), persistent=False)

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments, see `Asset`."""
        return {
            "resolution": self.resolution,
            "channels": self.channels,
            "hidden": self.hidden,
            "seed": self.seed,
        }

    @property
    def samples(self) -> int:
        """Return the samples along a ray: as many as texels along a plane."""
        return self.resolution

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return density and colour, see `Asset`."""
        # [A, C, P]
        features = sample_planes_channels_first(self.plane_axes, self.planes, points, self.bounds.side).mean(
            dim=1
        )
        # One decoder per asset, so batched matrix products take the place of linear layers.
        hidden = F.softplus(torch.baddbmm(self.b0.unsqueeze(2), self.w0, features))  # [A, J, P]
        out = torch.baddbmm(self.b1.unsqueeze(2), self.w1, hidden)  # [A, 4, P]
        # The bias keeps the first renders from being empty.
        blob = _BLOB * (1 - points.norm(dim=2) / _REACH)
        # OSGDecoder's sigmoid reaches from -0.001 to 1.001
        return 1 + blob + out[:, 0], (torch.sigmoid(out[:, 1:]) * (1 + 2 * 0.001) - 0.001).clamp(
            0, 1
        ).transpose(1, 2)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return the penalties [A].

        'sparsity' and 'opacity' on a coarse grid, see `sparsity`; 'roughness', the mean squared difference
        between neighbouring texels.
        """
        probes = SlabSpec.of(self.bounds, _PROBES)
        steps = [self.planes.diff(dim=dim).square().flatten(1).mean(dim=1) for dim in (3, 4)]
        return {
            **sparsity(self.density_grid(probes), probes.voxel),
            "roughness": torch.stack(steps).mean(dim=0),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters by learning rate, see `Asset`."""
        return {"grid": [self.planes], "decoder": [self.w0, self.b0, self.w1, self.b1]}
