"""Settings of the measures of a mesh; imports no numpy."""

from dataclasses import dataclass

TOLERANCE = 1e-5  # of the longest edge: nearer corners are one
MOST_TOLERANCE = 1e-4  # beyond, welding joins what only lies near and makes edges of three faces
UPS = ("y", "z")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How a mesh is measured."""

    samples: int = 4000  # points on the surface; shares have a standard error of .8 % at most
    rays: int = 64  # directions from each point
    thin: float = 0.01  # of the longest edge: a wall below is thin
    # of the longest edge: hollows behind holes that a ball of this radius does not pass are inner ones
    leak: float = 0.05
    hull_mass: bool = False  # whether a body stands is told by its hull's centre of mass, as DSO does
    seed: int = 0

    def __post_init__(self):
        if self.samples < 100 or self.rays < 1 or not 0 < self.thin < 1 or self.leak < 0:
            raise ValueError(
                "measures of meshes: expected samples >= 100, rays >= 1, 0 < thin < 1, leak >= 0, got"
                f" {self}. Correct them."
            )
