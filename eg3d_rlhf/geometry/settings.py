"""Settings of the mesh export. This module imports no numpy, so that `--help` is fast."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Settings of the conversion of a density field into a mesh.

    Raises: ValueError for a value outside its range.

    >>> MeshOptions(resolution=64, colors=False).component
    'largest'
    """

    resolution: int = 256  # grid points per axis, 16..1024
    level: float | None = None  # raw density at the surface; None: the level of the field
    border: float = 0.0  # fraction of the cube's edge that is trimmed at each face, 0 <= border < 0.5
    component: str = "largest"  # 'largest': only the part that encloses the largest volume; or 'all'
    faces: int | None = None  # decimate the mesh to about this number of faces, >= 4; None: no decimation
    colors: bool = True  # vertex colours from the radiance field

    def __post_init__(self) -> None:
        if not 16 <= self.resolution <= 1024:
            raise ValueError(
                f"MeshOptions: the resolution must be 16 to 1024 grid points per axis, got {self.resolution}."
                " Use 256."
            )
        if self.level is not None and not math.isfinite(self.level):
            raise ValueError(
                f"MeshOptions: the level must be a finite number, got {self.level}. Use None for the level of"
                " the field."
            )
        if self.component not in ("largest", "all"):
            raise ValueError(
                f"MeshOptions: component must be 'largest' (one part) or 'all' (all parts), got"
                f" {self.component!r}."
            )
        # a tetrahedron, the smallest closed mesh, has four faces
        if self.faces is not None and self.faces < 4:
            raise ValueError(
                f"MeshOptions: the number of faces must be at least 4, got {self.faces}. Use None for no"
                " decimation."
            )
