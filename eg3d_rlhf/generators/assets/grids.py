"""Assets on grids of parameters: voxels, and tri-planes with a decoder per asset.

The CPU test problem for score distillation (eg3d_rlhf/rewards/boxes.py) uses the voxels.

Shapes: A is the number of assets, N of voxels per edge, P of points, C of plane channels, J of hidden units,
and R of texels per edge. X, Y and Z are numbers of grid points along x, y and z.
"""

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.assets.asset import Asset, sparsity
from torch_utils.ops.triplane_decode import sample_planes_channels_first
from training.rendering.renderer import generate_planes

# Raw density per unit of the parameter. With this factor, an optimiser with steps of 0.05 fills or empties a
# voxel in a few dozen steps.
GAIN = 10.0


class Voxels(Asset):
    """Assets of voxels, interpolated trilinearly.

    The parameters are `shape` and `paint`. The raw density is LEVEL + GAIN * shape, and the colour is
    sigmoid(paint). Along an axis, the centre of voxel i is at (i/(N - 1) - 1/2) of the side, so the outermost
    centres lie on the faces of the cube. The initial state is a grey fog of the same density everywhere.

    Args:
        assets: number of assets A.
        resolution: voxels per edge N.
        start: initial value of `shape`. With -1.1, the fog absorbs a tenth of the light of a ray through the
            cube, so gradients reach every voxel.
    """

    kind = "voxels"

    def __init__(self, assets: int, resolution: int = 16, start: float = -1.1):
        super().__init__()
        self.resolution = resolution
        grid_shape = (resolution,) * 3  # axes z, y, x
        self.shape = torch.nn.Parameter(torch.full((assets, *grid_shape), start))  # [A, N, N, N]
        # Logits of the colour, [A, 3, N, N, N]; 0 is grey.
        self.paint = torch.nn.Parameter(torch.zeros(assets, 3, *grid_shape))

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments, see `Asset`. The initial value `start` is not needed again."""
        return {"resolution": self.resolution}

    @property
    def samples(self) -> int:
        """Return the default number of samples along a ray: two per voxel along an axis."""
        return 2 * self.resolution

    @property
    def pitch(self) -> float:
        """Return the distance between the centres of neighbouring voxels, world units."""
        return self.bounds.side / (self.resolution - 1)

    @property
    def raw(self) -> torch.Tensor:
        """Return the raw density of the voxels, [A, N, N, N] with the axes z, y, x."""
        return LEVEL + GAIN * self.shape

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density and colour, see `Asset`. The logits of the colour are interpolated."""
        # Density and colour are interpolated in one call.
        density_and_colour = torch.cat([self.raw.unsqueeze(1), self.paint], dim=1)  # [A, 4, N, N, N]
        # grid_sample expects coordinates in -1..1 on a 3D grid of points: [A, 1, 1, P, 3], components x,
        # y, z.
        grid_positions = (points * (2 / self.bounds.side))[:, None, None]
        # [A, 4, 1, 1, P] -> [A, 4, P]
        interpolated_values = F.grid_sample(
            density_and_colour, grid_positions, mode="bilinear", padding_mode="border", align_corners=True
        )[:, :, 0, 0]
        return interpolated_values[:, 0], torch.sigmoid(interpolated_values[:, 1:]).transpose(1, 2)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density [A, X, Y, Z] on a grid of coordinates, see `ProductField`."""
        # The density is interpolated along one axis at a time, which takes fewer operations than
        # interpolating every point by itself. i, j and k count the coordinates in x, y and z.
        interpolated_along_x = torch.einsum("azyx,ix->azyi", self.raw, self._hats(x))  # [A, N, N, X]
        interpolated_along_xy = torch.einsum(
            "azyi,jy->azij", interpolated_along_x, self._hats(y)
        )  # [A, N, X, Y]
        return torch.einsum("azij,kz->aijk", interpolated_along_xy, self._hats(z))  # [A, X, Y, Z]

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density [A, D, H, W] at grid points, see `Field`."""
        # `density_product` does not set the density outside the cube to EMPTY, so it is used only for grids
        # inside the cube.
        if grid.lattice != "straight" or grid.box_warp > self.bounds.side or any(grid.centre):
            return super().density_grid(grid)
        return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()

    def _hats(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Compute the weights of linear interpolation between the voxels of an axis.

        A coordinate outside the cube gets the weights of the nearest face.

        Args: coordinates: world coordinates [P].
        Returns: weights [P, N].
        """
        last_index = self.resolution - 1
        index_positions = (coordinates.to(self.shape) / self.bounds.side + 0.5) * last_index  # 0..N - 1
        # Hat function: 1 at the voxel's own position, 0 from the neighbouring voxels on.
        index_distances = index_positions.clamp(0, last_index)[:, None] - torch.arange(self.resolution).to(
            self.shape
        )
        return (1 - index_distances.abs()).clamp_min(0)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return penalties by name, each [A], see `Asset`.

        'sparsity' and 'opacity' are described at the function `sparsity`. 'roughness' is the mean squared
        difference of `shape` between neighbouring voxels.
        """
        # One value [A] for each of the axes z, y and x.
        mean_squared_differences = [
            self.shape.diff(dim=dim).square().flatten(1).mean(dim=1) for dim in (1, 2, 3)
        ]
        return {
            **sparsity(self.raw, self.pitch),
            "roughness": torch.stack(mean_squared_differences).mean(dim=0),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters in groups with different learning rates, see `Asset`."""
        return {"grid": [self.shape, self.paint]}


# Raw density that is added at the centre. It decreases linearly to 0 at the radius _REACH. It corresponds to
# the density bias 10 (1 - |p| / 0.5) of text-to-3D methods in a cube of side 2.
_BLOB = 20.0
_REACH = 0.25  # world units
_PROBES = 16  # grid points per edge at which regularisers evaluate the density


class TriPlanes(Asset):
    """Assets of tri-planes, each with its own decoder.

    Let f [C] be the mean over the three planes of their features at the point p. The raw density is w1[0]
    softplus(w0 f + b0) + b1[0] + 1 + 20 (1 - |p| / 0.25). The last term is an initial ball. The colour is
    computed from w1[1:] and b1[1:] as in `training.triplane.OSGDecoder`. The plane layout is "fixed", with
    three different planes.

    Deviates from threestudio, whose assets are hash grids, which need CUDA.

    Args:
        assets: number of assets A.
        resolution: texels per edge of a plane R.
        channels: channels of a plane C.
        hidden: hidden units of the decoder J.
        seed: seed of the initial values.
    """

    kind = "planes"
    plane_axes: torch.Tensor

    def __init__(self, assets: int, resolution: int = 32, channels: int = 8, hidden: int = 16, seed: int = 0):
        super().__init__()
        self.resolution = resolution
        self.channels = channels
        self.hidden = hidden
        self.seed = seed
        # A separate generator, so that the initial values depend on the seed alone.
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> torch.nn.Parameter:
            """Return a parameter [A, *shape] with normally distributed values.

            Args: shape: shape for one asset; scale: standard deviation of the values.
            """
            return torch.nn.Parameter(torch.randn(assets, *shape, generator=rng) * scale)

        # The planes are small, so that the initial density is the ball, see `decode`.
        self.planes = normal(3, channels, resolution, resolution, scale=0.1)
        # Weights of a layer are scaled by 1 / sqrt(number of inputs).
        self.w0 = normal(hidden, channels, scale=channels**-0.5)
        self.b0 = torch.nn.Parameter(torch.zeros(assets, hidden))
        self.w1 = normal(4, hidden, scale=hidden**-0.5)
        self.b1 = torch.nn.Parameter(torch.zeros(assets, 4))
        self.register_buffer("plane_axes", generate_planes("fixed"), persistent=False)

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments other than `assets`, see `Asset`."""
        return {
            "resolution": self.resolution,
            "channels": self.channels,
            "hidden": self.hidden,
            "seed": self.seed,
        }

    @property
    def samples(self) -> int:
        """Return the default number of samples along a ray: one per texel along a plane."""
        return self.resolution

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density and colour, see `Asset`."""
        # Mean over three planes: [A, 3, C, P] -> [A, C, P].
        features = sample_planes_channels_first(self.plane_axes, self.planes, points, self.bounds.side).mean(
            dim=1
        )
        # Each asset has its own decoder, so the layers are batched matrix products. J and 4 are output sizes.
        hidden_activations = F.softplus(torch.baddbmm(self.b0.unsqueeze(2), self.w0, features))  # [A, J, P]
        decoder_outputs = torch.baddbmm(self.b1.unsqueeze(2), self.w1, hidden_activations)  # [A, 4, P]
        # Without this ball, the first renders would be empty.
        initial_ball = _BLOB * (1 - points.norm(dim=2) / _REACH)
        # The sigmoid of OSGDecoder is stretched to the range -0.001 to 1.001.
        colour = (torch.sigmoid(decoder_outputs[:, 1:]) * (1 + 2 * 0.001) - 0.001).clamp(0, 1)
        return 1 + initial_ball + decoder_outputs[:, 0], colour.transpose(1, 2)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return penalties by name, each [A], see `Asset`.

        'sparsity' and 'opacity' are computed on a coarse grid, see the function `sparsity`. 'roughness' is
        the mean squared difference between neighbouring texels of the planes.
        """
        probe_grid = SlabSpec.from_bounds(self.bounds, _PROBES)
        # One value [A] for each of the two axes of the planes [A, 3, C, R, R].
        mean_squared_differences = [
            self.planes.diff(dim=dim).square().flatten(1).mean(dim=1) for dim in (3, 4)
        ]
        return {
            **sparsity(self.density_grid(probe_grid), probe_grid.voxel),
            "roughness": torch.stack(mean_squared_differences).mean(dim=0),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters in groups with different learning rates, see `Asset`."""
        return {"grid": [self.planes], "decoder": [self.w0, self.b0, self.w1, self.b1]}
