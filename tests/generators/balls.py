"""A generator family of two balls in closed form: it defines density and colour, and gets renders, sheets,
meshes and label pages.

Load it as a plugin: EG3D_RLHF_PLUGINS=tests/generators/balls.py. Letters: N shapes, P points.
"""

import torch

from eg3d_rlhf.core.field import LEVEL, Bounds, CameraFamily, Field
from eg3d_rlhf.generators import Family, register
from training import networks

SLOPE = 200.0  # raw density per world unit


class BallsNetwork(torch.nn.Module):
    """Two balls beside each other whose radii the latent says; what a network file holds are where they lie
    and their colours.
    """

    def __init__(self, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)):
        super().__init__()
        self.centre = tuple(centre)
        # [2, 3]
        self.middles = torch.nn.Parameter(
            torch.tensor(centre) + torch.tensor([[-0.2, 0.0, 0.0], [0.2, 0.0, 0.0]])
        )
        self.colours = torch.nn.Parameter(torch.tensor([[1.0, 0.25, 0.25], [0.25, 0.25, 1.0]]))  # [2, 3]


class BallsField(Field):
    """Balls of radii ws [N, 1, 2]: the raw density falls linearly through the level at their surfaces."""

    level = LEVEL

    def __init__(self, module: BallsNetwork, ws: torch.Tensor):
        # [N, 1, 2]
        self._module = module
        self._radii = ws[:, :1]

    @property
    def bounds(self) -> Bounds:
        """A unit cube."""
        return Bounds(1.0, self._module.centre, border=0.0)

    def __len__(self) -> int:
        return len(self._radii)

    def _heights(self, points: torch.Tensor) -> torch.Tensor:
        """Return the depth of points [P, 3] or [N, P, 3] below the surface of either ball, [N, P, 2]."""
        return self._radii - (points.unsqueeze(-2) - self._module.middles).norm(dim=-1)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        return LEVEL + SLOPE * self._heights(points).amax(dim=-1)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`: the nearer ball's."""
        return self._module.colours[self._heights(points).argmax(dim=-1)]


class Balls:
    """`Generator` around the network."""

    architecture = "balls"
    conditioned = False
    level = LEVEL
    cameras = CameraFamily()
    z_dim = 2
    w_dim = 2
    num_ws = 1
    img_resolution = 64

    def __init__(self, module: BallsNetwork):
        self.module = module
        self.bounds = Bounds(1.0, module.centre, border=0.0)
        self.cameras = CameraFamily(pivot=module.centre)

    def mapping(
        self, z, c, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> torch.Tensor:
        """Radii ws [N, 1, 2] between .1 and .19."""
        return (0.145 + 0.045 * torch.tanh(truncation_psi * z)).unsqueeze(1)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> BallsField:
        """See `Generator`."""
        return BallsField(self.module, ws)


def save(path, **stated) -> None:
    """Write the network file of a pair of balls."""
    networks.save(
        path,
        networks.Networks(
            None, None, BallsNetwork(**stated), stated, None, {"name": "balls"}, architecture="balls"
        ),
    )


register(Family("balls", BallsNetwork, None, Balls))
