"""Specification of the density grid that a reward scores: resolution, crop and value range.

The cropped density grid is the sigma slab of the paper (arXiv 2606.27305). Its specification is stored only
in the reward's checkpoint.

Shapes: D, H and W are the numbers of grid points along z, y and x. World axes: x points right, y points up
(forehead), z points towards the camera (front of the face).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these modules import torch, which `--help` does not need
    import torch

    from eg3d_rlhf.core.field import Bounds

LATTICES = ("straight", "skewed")
# Fields that were added later, so that older descriptions lack them; see `to_dict`.
_LATER = {"lattice", "centre"}


@dataclass(frozen=True, kw_only=True)
class SlabSpec:
    """A box of grid points inside the scene cube.

    The scene cube has the edge length `box_warp` and the centre `centre`. It contains `resolution` points per
    axis, and the outermost points lie on its faces: along an axis, point i lies at (i/(resolution - 1) - 1/2)
    * box_warp from the centre. At each face, int(f * resolution) layers of points are cropped, where f is the
    fraction of that face in `crop`. The default is the slab of arXiv 2606.27305: indices x 64:192, y 64:205,
    z 102:231 of 256, so (D, H, W) = (129, 141, 128).

    `lattice="skewed"` gives the points that the published reward was trained on. The helper function of its
    authors computes indices by division without rounding down. The point with the index (i, j, k) therefore
    lies at the index coordinates (i + j/N + k/N^2, j + k/N, k), with N = resolution. The displacement is less
    than one voxel everywhere, and less than 0.9 voxels in the published slab. A skewed lattice is not a
    product of axes, so a field has to evaluate it point by point.

    Raises: ValueError if a value is outside the range that the comment on its field states, or if the crop
        leaves fewer than 2 points on an axis.
    Deviates: the default lattice is straight; the authors' is skewed.
    """

    resolution: int = 256  # grid points per axis of the uncropped cube, >= 2
    # Fraction of the cube that is cropped at each face: x_lo, x_hi, y_lo, y_hi, z_lo, z_hi, each in [0, 1).
    crop: tuple[float, float, float, float, float, float] = (0.25, 0.25, 0.25, 0.20, 0.40, 0.10)
    box_warp: float = 1.0  # edge length of the scene cube, world units, > 0
    value_max: float = 100.0  # upper end of the scaled densities 0..value_max, see `geometry.slab`; > 0
    lattice: str = "straight"  # 'straight', or 'skewed' as in the published reward's training data
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # centre of the scene cube, world units

    def __post_init__(self) -> None:
        # bool is a subclass of int in Python, so it is excluded explicitly.
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 2:
            raise ValueError(
                f"SlabSpec: expected an integer resolution >= 2, got {self.resolution!r}. Use 256 for the"
                " published slab."
            )
        try:
            crop = tuple(float(fraction) for fraction in self.crop)
        except (TypeError, ValueError):
            # Rejected below, with the same message as a wrong number of values.
            crop = ()
        if len(crop) != 6 or not all(0.0 <= fraction < 1.0 for fraction in crop):
            raise ValueError(
                "SlabSpec: expected crop = (x_lo, x_hi, y_lo, y_hi, z_lo, z_hi), six fractions in [0, 1),"
                f" got {self.crop!r}. Pass the fraction of the cube to crop at each face."
            )
        # A list from JSON becomes a tuple, which is hashable. The dataclass is frozen, so the field is set
        # through `object`.
        object.__setattr__(self, "crop", crop)
        centre = tuple(float(field_value) for field_value in self.centre)
        if len(centre) != 3 or not all(math.isfinite(field_value) for field_value in centre):
            raise ValueError(
                f"SlabSpec: expected centre = (x, y, z) with finite coordinates, got {self.centre!r}. Use"
                " (0, 0, 0) for a cube about the origin."
            )
        object.__setattr__(self, "centre", centre)
        for field_name in ("box_warp", "value_max"):
            field_value = getattr(self, field_name)
            if (
                isinstance(field_value, bool)
                or not isinstance(field_value, (int, float))
                or not math.isfinite(field_value)
                or field_value <= 0
            ):
                raise ValueError(
                    f"SlabSpec: expected a finite number {field_name} > 0, got {field_value!r}. Use"
                    f" {getattr(type(self), field_name)}, the default."
                )
            object.__setattr__(self, field_name, float(field_value))
        if self.lattice not in LATTICES:
            raise ValueError(
                f"SlabSpec: expected lattice to be one of {', '.join(LATTICES)}, got {self.lattice!r}. Use"
                " 'straight', or 'skewed' for the published reward."
            )
        for axis, (start, stop) in zip("xyz", self.index_ranges, strict=True):
            if stop - start < 2:
                raise ValueError(
                    f"SlabSpec: the crop leaves the indices {start}:{stop} along {axis}, but at least 2"
                    f" points are needed. Reduce the crop of {axis}, or increase the resolution."
                )

    @classmethod
    def cube(cls, resolution: int, box_warp: float = 1.0) -> "SlabSpec":
        """Return a grid over the uncropped scene cube. Meshes and the density-consistency term use such
        grids.

        Args: resolution: points per axis, >= 2; box_warp: edge length of the cube, world units.
        """
        return cls(resolution=resolution, crop=(0.0,) * 6, box_warp=box_warp)

    @classmethod
    def from_bounds(cls, bounds: "Bounds", resolution: int, **other_fields: Any) -> "SlabSpec":
        """Return a grid in the bounds of a field or generator.

        Args:
            bounds: cube that becomes the scene cube of the grid.
            resolution: points per axis of the uncropped cube, >= 2.
            other_fields: values of other fields of the spec, such as `crop`. By default nothing is cropped.
        """
        return cls(
            **{
                "resolution": resolution,
                "crop": (0.0,) * 6,
                "box_warp": bounds.side,
                "centre": bounds.centre,
                **other_fields,
            }
        )

    @property
    def index_ranges(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Return the ranges (start, stop) of indices into the uncropped cube for x, y and z. `stop` is
        exclusive.
        """
        # int() rounds down, as the paper's slab does: int(0.20 * 256) = 51 and int(0.10 * 256) = 25.
        x_low, x_high, y_low, y_high, z_low, z_high = (
            int(fraction * self.resolution) for fraction in self.crop
        )
        x_range = (x_low, self.resolution - x_high)
        y_range = (y_low, self.resolution - y_high)
        z_range = (z_low, self.resolution - z_high)
        return x_range, y_range, z_range

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the numbers of grid points (D, H, W) along z, y and x."""
        width, height, depth = (stop - start for start, stop in self.index_ranges)
        return depth, height, width

    @property
    def voxel(self) -> float:
        """Return the distance between neighbouring grid points, in world units."""
        return self.box_warp / (self.resolution - 1)

    def axes(self) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return the world coordinates of a straight lattice along each axis.

        Returns: x [W], y [H] and z [D], float32, in increasing order.
        Raises: ValueError for a skewed lattice, where a coordinate depends on more than one index.
        """
        import torch

        if self.lattice != "straight":
            raise ValueError(
                f"SlabSpec.axes: a {self.lattice!r} lattice has no separate axes. Use SlabSpec.points(), or a"
                " spec with lattice='straight'."
            )
        last_index = self.resolution - 1
        # Computed in float64 and rounded to float32 once.
        x, y, z = (
            (
                (torch.arange(start, stop, dtype=torch.float64) / last_index - 0.5) * self.box_warp
                + centre_coordinate
            ).float()
            for (start, stop), centre_coordinate in zip(self.index_ranges, self.centre, strict=True)
        )
        return x, y, z

    def points(self) -> "torch.Tensor":
        """Return the world coordinates (x, y, z) of every point, [D, H, W, 3] float32, for either lattice.

        Points of the skewed lattice are computed as in the authors' helper function, so that rounding agrees:
        index * voxel - box_warp/2 in float32.
        """
        import torch

        if self.lattice == "straight":
            x, y, z = self.axes()
            # meshgrid returns the coordinates z, y, x; [::-1] reverses them to x, y, z for the last axis.
            return torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)
        n = self.resolution
        # Indices along x, y and z: [W], [H], [D].
        i, j, k = (torch.arange(start, stop, dtype=torch.float64) for start, stop in self.index_ranges)
        k, j, i = torch.meshgrid(k, j, i, indexing="ij")  # [D, H, W] each
        # Index coordinates of the skewed lattice, as in the class docstring: [D, H, W, 3].
        index_coordinates = torch.stack([i + j / n + k / n**2, j + k / n, k], dim=-1).float()
        return index_coordinates * self.voxel - self.box_warp / 2 + torch.tensor(self.centre)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON values by the field's name.

        `lattice` and `centre` are omitted if they have their default values.
        """
        value_by_field = {**asdict(self), "crop": list(self.crop), "centre": list(self.centre)}
        # The two fields were added later. The digest of a spec without them must not change.
        for field_name in _LATER:
            if getattr(self, field_name) == getattr(type(self), field_name):
                del value_by_field[field_name]
        return value_by_field

    @classmethod
    def from_dict(cls, value_by_field: Mapping[str, Any]) -> "SlabSpec":
        """Create the spec from the dict that `to_dict` returned.

        Raises: ValueError if a field is missing, unknown or out of range. A missing field gets no default,
            because the reward would then score another grid than the one that it was trained on. Only
            `lattice` and `centre` may be missing.
        """
        # Older descriptions lack the fields of _LATER, so these may be missing.
        field_names = {spec_field.name for spec_field in fields(cls)}
        if not isinstance(value_by_field, Mapping):
            raise ValueError(
                f"SlabSpec.from_dict: expected a mapping with the fields {sorted(field_names)}, got"
                f" {type(value_by_field).__name__}. Pass the values that SlabSpec.to_dict() returned."
            )
        if set(value_by_field) | _LATER != field_names:
            raise ValueError(
                f"SlabSpec.from_dict: expected the fields {sorted(field_names)}, got"
                f" {sorted(value_by_field)}. Pass the values that SlabSpec.to_dict() returned."
            )
        return cls(**value_by_field)

    def digest(self) -> str:
        """Return the SHA-256 of the spec's canonical JSON (sorted keys, no spaces) in hex.

        Equal specs have equal digests on every machine.
        """
        canonical_json = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical_json.encode()).hexdigest()
