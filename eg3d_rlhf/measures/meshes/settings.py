"""Settings of the measures of a mesh. This module does not import numpy, so that --help stays fast."""

from dataclasses import dataclass

TOLERANCE = 1e-5  # welding tolerance, as a share of the longest edge of the bounding box
# Largest welding tolerance. Larger ones weld corners of different parts and create edges with three faces.
MAX_TOLERANCE = 1e-4
UPS = ("y", "z")  # axes that can point up in a file


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Numbers of samples and thresholds of `measure_mesh`.

    Lengths are shares of the longest edge of the mesh's bounding box.
    """

    # Number of points on the surface, >= 100. With 4000, the standard error of a share is at most 0.8 %.
    samples: int = 4000
    rays: int = 64  # number of ray directions from each point, >= 1
    thin: float = 0.01  # walls that are thinner than this length count as thin, 0..1
    leak: float = 0.05  # a hollow counts as an inner one if a ball of this radius cannot enter it, >= 0
    hull_mass: bool = False  # True: static stability uses the centre of mass of the convex hull, as DSO does
    seed: int = 0  # random seed of the points and the ray directions

    def __post_init__(self):
        if self.samples < 100:
            raise ValueError(f"measures of meshes: samples must be >= 100, got {self.samples}.")
        if self.rays < 1:
            raise ValueError(f"measures of meshes: rays must be >= 1, got {self.rays}.")
        if not 0 < self.thin < 1:
            raise ValueError(f"measures of meshes: thin must be between 0 and 1, got {self.thin}.")
        if self.leak < 0:
            raise ValueError(f"measures of meshes: leak must be >= 0, got {self.leak}.")
