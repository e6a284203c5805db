"""A generator family from outside the package: EG3D's network in another world, scaled, moved and mirrored in
x.

Load it as a plugin: EG3D_RLHF_PLUGINS=tests/generators/mirrored.py. A world point p of this family is the
point F (p - centre) / scale of the network inside, F = diag(-1, 1, 1).
"""

import dataclasses
from typing import Any

import torch

from eg3d_rlhf.core.field import DEFAULT_OPTIONS, Bounds, CameraFamily, Field, Rendering, RenderOptions
from eg3d_rlhf.generators import Family, Generator, as_generator, register
from training.rendering.cameras import mirror_label
from training.triplane import TriPlaneGenerator


class MirroredNetwork(torch.nn.Module):
    """Content of a network file: arguments of the inner network, and the position of its world in ours."""

    def __init__(self, inner: dict[str, Any], scale: float, centre: tuple[float, float, float]):
        super().__init__()
        self.inner = TriPlaneGenerator(**inner)
        self.scale = scale
        self.centre = tuple(centre)

    def points(self, points: torch.Tensor) -> torch.Tensor:
        """World points [..., 3] of this family as those of the network inside. An affine map."""
        return (points - points.new_tensor(self.centre)) / self.scale * points.new_tensor([-1.0, 1.0, 1.0])

    def labels(self, c: torch.Tensor) -> torch.Tensor:
        """Return cameras [N, 25] of the inner world whose mirrored image shows ours."""
        moved = c.clone()
        moved[:, [3, 7, 11]] = (c[:, [3, 7, 11]] - c.new_tensor(self.centre)) / self.scale
        return mirror_label(moved)


class MirroredField:
    """The fields of the network inside, as this world has them."""

    def __init__(self, inner: Field, network: MirroredNetwork, bounds: Bounds):
        self._inner = inner
        self._network = network
        self.bounds = bounds
        self.level = inner.level

    def __len__(self) -> int:
        return len(self._inner)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        return self._inner.density(self._network.points(points))

    def density_grid(self, grid) -> torch.Tensor:
        """See `Field`."""
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        return self._inner.colour(self._network.points(points))

    def render(self, cameras: torch.Tensor, options: RenderOptions = DEFAULT_OPTIONS) -> Rendering:
        """See `Field`."""
        image, raw, depth, opacity = (
            part.flip(-1) for part in self._inner.render(self._network.labels(cameras), options)
        )
        return Rendering(image, raw, depth * self._network.scale, opacity)


class Mirrored:
    """`Generator` around the network."""

    architecture = "mirrored"

    def __init__(self, module: MirroredNetwork):
        self.module = module
        self._inner = as_generator(module.inner)
        self.z_dim = self._inner.z_dim
        self.w_dim = self._inner.w_dim
        self.num_ws = self._inner.num_ws
        self.img_resolution = self._inner.img_resolution
        self.level = self._inner.level
        self.conditioned = self._inner.conditioned
        self.bounds = Bounds(self._inner.bounds.side * module.scale, module.centre)

    @property
    def cameras(self) -> CameraFamily:
        """They stand as far away as the scale asks for, and look at the same part of the shape."""
        inner = self._inner.cameras
        x, y, z = self.module.centre
        pivot = (
            x - inner.pivot[0] * self.module.scale,
            y + inner.pivot[1] * self.module.scale,
            z + inner.pivot[2] * self.module.scale,
        )
        return dataclasses.replace(inner, radius=inner.radius * self.module.scale, pivot=pivot)

    def mapping(
        self, z, c, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> torch.Tensor:
        """See `Generator`."""
        return self._inner.mapping(z, self.module.labels(c), truncation_psi, truncation_cutoff)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> MirroredField:
        """See `Generator`."""
        return MirroredField(self._inner.field(ws, noise_mode), self.module, self.bounds)


def wrap(module: MirroredNetwork) -> Generator:
    """Wrap a network as a generator, for the registry."""
    return Mirrored(module)


register(Family("mirrored", MirroredNetwork, None, wrap))
