"""The same shapes as another network might make them: scaled, moved, mirrored in x, their density on another
scale. Truth is known.
"""

import torch

from eg3d_rlhf.core.field import Bounds, Rendering


class ForeignField:
    """A world point p is the point F (p - shift) / scale of the field inside, F = diag(-1, 1, 1) where
    mirrored.
    """

    def __init__(self, inner, generator):
        self._inner = inner
        self._generator = generator
        self.bounds = generator.bounds
        self.level = generator.level

    def __len__(self):
        return len(self._inner)

    def density(self, points):
        g = self._generator
        inside = (points - points.new_tensor(g.shift)) / g.scale
        return g.gain * self._inner.density(inside * inside.new_tensor([-1.0 if g.mirrored else 1.0, 1, 1]))

    def density_grid(self, grid):
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def render(self, cameras, options) -> Rendering:
        raise NotImplementedError


class Foreign:
    """`Generator` around another one; gain: factor on raw density."""

    architecture = "foreign"

    def __init__(self, inner, scale=1.0, shift=(0.0, 0.0, 0.0), mirrored=False, gain=1.0):
        self._inner = inner
        self.scale = scale
        self.shift = shift
        self.mirrored = mirrored
        self.gain = gain
        self.bounds = Bounds(inner.bounds.side * scale, tuple(shift))
        self.level = inner.level * gain

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> ForeignField:
        return ForeignField(self._inner.field(ws, noise_mode), self)
