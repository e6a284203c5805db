"""Settings of the export of meshes; imports no numpy."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How a field becomes a mesh.

    >>> MeshOptions(resolution=64, colors=False).component
    'largest'
    """

    resolution: int = 256  # grid points per axis, 16..1024
    level: float | None = None  # raw density of the surface; None is the field's own
    border: float = 0.0  # share of the cube's edge trimmed from each face, 0 <= border < 0.5
    component: str = "largest"  # 'largest' by enclosed volume, or 'all'
    faces: int | None = None  # decimate to about so many faces, >= 4; None keeps all
    colors: bool = True  # vertex colours from the radiance field

    def __post_init__(self) -> None:
        if not 16 <= self.resolution <= 1024:
            raise ValueError(
                f"MeshOptions: expected a resolution of 16 to 1024, got {self.resolution}. Use 256."
            )
        if self.level is not None and not math.isfinite(self.level):
            raise ValueError(
                f"MeshOptions: expected a finite level, got {self.level}. Leave it out for the field's own."
            )
        if self.component not in ("largest", "all"):
            raise ValueError(
                f"MeshOptions: expected a component of 'largest' or 'all', got {self.component!r}."
            )
        if self.faces is not None and self.faces < 4:
            raise ValueError(
                f"MeshOptions: expected at least 4 faces, got {self.faces}. Leave it out to keep all."
            )
