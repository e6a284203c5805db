"""Settings of the measures of a mesh. This module does not import numpy, so that --help stays fast."""

from dataclasses import dataclass

TOLERANCE = 1e-5  # as a share of the longest edge; closer corners are welded
MOST_TOLERANCE = 1e-4  # larger ones weld corners of different parts and create edges with three faces
UPS = ("y", "z")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Sampling density and thresholds of `measure_mesh`."""

    samples: int = 4000  # points on the surface, >= 100; shares have a standard error of at most .8 %
    rays: int = 64  # directions from each point, >= 1
    thin: float = 0.01  # as a share of the longest edge; a wall that is thinner counts as thin
    # As a share of the longest edge: a hollow counts as an inner one if a ball of this radius cannot enter
    # it.
    leak: float = 0.05
    hull_mass: bool = False  # use the convex hull's centre of mass for static stability, as DSO does
    seed: int = 0

    def __post_init__(self):
        if self.samples < 100 or self.rays < 1 or not 0 < self.thin < 1 or self.leak < 0:
            raise ValueError(
                "measures of meshes: expected samples >= 100, rays >= 1, 0 < thin < 1 and leak >= 0, got"
                f" {self}. Change the values that are outside these ranges."
            )
