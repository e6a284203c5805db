"""Rows: the density of full heads on grids. A tri-grid is read from its slices; the reference decodes every point, density alone.

Letters: N batch, C channels, D slices, J hidden units, P points.
"""

import functools

import torch
from torch.nn import functional

from benchmarks.rows import Case, Outcome, Row, Target
from benchmarks.rows_field import CUBE, SLAB, TINY, PlaneField, PlaneSize
from eg3d_rlhf.geometry.slab import DecoderWeights
from eg3d_rlhf.geometry.tri_grid import tri_grid_density
from training.rendering.head_samplers import sample_tri_grid

SLICES = 3
_POINTS_AT_ONCE = 1 << 16  # as the families read points


class TriGrid(PlaneField):
    """Leaves (slices N(0, 1) and the decoder's density row), and the two paths from them to sigma_raw [1, D, H, W]."""

    def __init__(self, size: PlaneSize, device: str):
        super().__init__(size, "panohead", device)
        rng = torch.Generator().manual_seed(1)
        shape = (1, 3, size.channels, SLICES, size.plane, size.plane)
        self.planes = torch.randn(shape, generator=rng).to(device).requires_grad_()
        self.orders = [tuple(int(i) for i in rows.argmax(dim=1)) for rows in self.axes]

    @property
    def weights(self) -> DecoderWeights:
        """The density row."""
        return DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])

    def separable(self) -> torch.Tensor:
        """From slices."""
        axes = [axis * 2 for axis in self.spec.axes()]
        return tri_grid_density(self.planes, self.orders, self.weights, axes).permute(0, 3, 2, 1)

    def pointwise(self) -> torch.Tensor:
        """Three trilinear reads, their mean, the hidden layer and the density row at every point."""
        points = self.spec.points().to(self.planes).reshape(1, -1, 3)
        return torch.cat([self._density(part) for part in points.split(_POINTS_AT_ONCE, dim=1)], dim=1).view(1, *self.spec.shape)

    def _density(self, points: torch.Tensor) -> torch.Tensor:
        features = sample_tri_grid(self.axes, self.planes, points, 1.0).mean(dim=1)
        weights = self.weights
        hidden = functional.softplus(functional.linear(features, weights.w0, weights.b0))
        return hidden @ weights.w_sigma + weights.b_sigma


def tri_grid(device: str, tiny: bool, size: str, cube: bool, train: bool) -> Case:
    """Density on a grid from slices that are already there, the same for both paths."""
    field = TriGrid(TINY if tiny else (CUBE if cube else SLAB)[size], device)

    def run(path) -> Outcome:
        with torch.set_grad_enabled(train):
            sigma = path()
        return Outcome({"sigma": sigma.detach()}, field.gradients(sigma) if train else {})

    return Case(fast=lambda: run(field.separable), reference=lambda: run(field.pointwise))


def _row(name: str, size: str, seconds: float, target: Target | None, **what) -> Row:
    return Row(name=name, size=size, make=functools.partial(tri_grid, size=size, **what), seconds=seconds, target=target)


_SLAB = Target(at_least=5, aim=10)
ROWS = [
    _row("slab of a tri-grid, from slices", "full", 8, _SLAB, cube=False, train=False),
    _row("slab of a tri-grid, from slices", "bundled", 0.1, None, cube=False, train=False),
    _row("slab of a tri-grid, forward + backward", "bundled", 0.3, None, cube=False, train=True),
    _row("cube 64^3 of a tri-grid, from slices", "bundled", 0.5, None, cube=True, train=False),
]
