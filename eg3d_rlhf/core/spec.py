"""Grid of points at which a reward reads a density: resolution, crop and value range.

The cropped density grid is the paper's sigma slab. Its specification is stored in the reward's checkpoint and
nowhere else.

Letters: D, H, W = grid points along z, y, x. World axes: x points right, y points up (forehead), z points
towards the camera (front of the face).
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
_LATER = {"lattice", "centre"}  # fields that descriptions of the first version lack; see `to_dict`


@dataclass(frozen=True, kw_only=True)
class SlabSpec:
    """A box of grid points inside the scene cube.

    The cube has side `box_warp` and centre `centre`. It carries `resolution` corner-aligned points per axis:
    point i lies at (i/(resolution - 1) - 1/2) * box_warp from the centre. `int(fraction * resolution)` points
    are trimmed from each face. The default is the slab of arXiv 2606.27305: x 64:192, y 64:205, z 102:231 of
    256, so (D, H, W) = (129, 141, 128).

    `lattice="skewed"` gives the points that the published reward was trained on. The helper function of its
    authors divides indices without rounding down. Index (i, j, k) therefore lies at (i + j/N + k/N^2, j +
    k/N, k), with N = resolution. The displacement is less than one voxel everywhere, and less than 0.9 in the
    published slab. A skewed lattice is not a product of axes, so it is decoded point by point.

    Raises: ValueError for a value outside its range, or for a crop that leaves fewer than 2 points on an
    axis.
    Deviates: the default lattice is straight; the authors' is skewed.
    """

    resolution: int = 256  # grid points per axis of the uncropped cube, >= 2
    # fraction trimmed at each face: x_lo, x_hi, y_lo, y_hi, z_lo, z_hi, each in [0, 1)
    crop: tuple[float, float, float, float, float, float] = (0.25, 0.25, 0.25, 0.20, 0.40, 0.10)
    box_warp: float = 1.0  # side of the scene cube, world units, > 0
    value_max: float = 100.0  # densities are scaled to 0..value_max, see `geometry.slab`; > 0
    lattice: str = "straight"  # 'straight'; or 'skewed', as in the published reward's training data
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # centre of the scene cube, world units

    def __post_init__(self) -> None:
        # In Python a bool is an int.
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 2:
            raise ValueError(
                f"SlabSpec: expected an integer resolution >= 2, got {self.resolution!r}. Use 256 for the"
                " published slab."
            )
        try:
            crop = tuple(float(fraction) for fraction in self.crop)
        except (TypeError, ValueError):
            # Rejected below, with the same message as a wrong length
            crop = ()
        if len(crop) != 6 or not all(0.0 <= fraction < 1.0 for fraction in crop):
            raise ValueError(
                "SlabSpec: expected crop = (x_lo, x_hi, y_lo, y_hi, z_lo, z_hi), six fractions in [0, 1),"
                f" got {self.crop!r}. Give the fraction to trim from each face."
            )
        # A list from JSON becomes a tuple, which is hashable
        object.__setattr__(self, "crop", crop)
        centre = tuple(float(value) for value in self.centre)
        if len(centre) != 3 or not all(math.isfinite(value) for value in centre):
            raise ValueError(
                f"SlabSpec: expected centre = (x, y, z), finite, got {self.centre!r}. Use (0, 0, 0)."
            )
        # the dataclass is frozen; this is the usual way to normalise a field
        object.__setattr__(self, "centre", centre)
        for name in ("box_warp", "value_max"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                raise ValueError(
                    f"SlabSpec: expected {name} > 0, got {value!r}. Use a positive, finite number."
                )
            object.__setattr__(self, name, float(value))
        if self.lattice not in LATTICES:
            raise ValueError(
                f"SlabSpec: expected lattice to be one of {', '.join(LATTICES)}, got {self.lattice!r}. Use"
                " 'straight'."
            )
        for axis, (start, stop) in zip("xyz", self.index_ranges, strict=True):
            if stop - start < 2:
                raise ValueError(
                    f"SlabSpec: expected at least 2 points along {axis}, got indices {start}:{stop}. Reduce"
                    f" the crop of {axis}."
                )

    @classmethod
    def cube(cls, resolution: int, box_warp: float = 1.0) -> "SlabSpec":
        """Return a grid of the uncropped scene cube, as meshes and the density-consistency term use it."""
        return cls(resolution=resolution, crop=(0.0,) * 6, box_warp=box_warp)

    @classmethod
    def of(cls, bounds: "Bounds", resolution: int, **place: Any) -> "SlabSpec":
        """Return a grid in the bounds of a field or generator.

        Args: place: other fields of the spec, such as `crop`; without them the grid covers the bounds.
        """
        return cls(
            **{
                "resolution": resolution,
                "crop": (0.0,) * 6,
                "box_warp": bounds.side,
                "centre": bounds.centre,
                **place,
            }
        )

    @property
    def index_ranges(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(start, stop) indices into the uncropped cube for x, y and z; stop is exclusive."""
        # int() rounds down, as the paper's slab does: int(0.20 * 256) = 51 and int(0.10 * 256) = 25.
        trimmed = [int(fraction * self.resolution) for fraction in self.crop]
        x, y, z = (
            (low, self.resolution - high) for low, high in zip(trimmed[::2], trimmed[1::2], strict=True)
        )
        return x, y, z

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W): points along z, y, x."""
        x, y, z = (stop - start for start, stop in self.index_ranges)
        return z, y, x

    @property
    def voxel(self) -> float:
        """Distance between neighbouring grid points, world units."""
        return self.box_warp / (self.resolution - 1)

    def axes(self) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return world coordinates of a straight lattice's points: x [W], y [H], z [D], float32, increasing.

        Raises: ValueError for a skewed lattice, where a coordinate depends on more than one index.
        """
        import torch

        if self.lattice != "straight":
            raise ValueError(
                f"SlabSpec.axes: expected a straight lattice, got {self.lattice!r}. Use points(), or"
                " lattice='straight'."
            )
        last = self.resolution - 1
        # Computed in float64 and rounded to float32 once.
        x, y, z = (
            ((torch.arange(start, stop, dtype=torch.float64) / last - 0.5) * self.box_warp + middle).float()
            for (start, stop), middle in zip(self.index_ranges, self.centre, strict=True)
        )
        return x, y, z

    def points(self) -> "torch.Tensor":
        """Return world coordinates [D, H, W, 3] float32 of every point, components x, y, z, for either
        lattice.

        Skewed points are rounded as the authors' helper function rounds them: index * voxel - box_warp/2 in
        float32.
        """
        import torch

        if self.lattice == "straight":
            x, y, z = self.axes()
            # meshgrid returns z, y, x; the last axis has to be x, y, z
            return torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)
        n = self.resolution
        i, j, k = (torch.arange(start, stop, dtype=torch.float64) for start, stop in self.index_ranges)
        k, j, i = torch.meshgrid(k, j, i, indexing="ij")  # [D, H, W] each
        # the displacement of the class docstring, [D, H, W, 3]
        index = torch.stack([i + j / n + k / n**2, j + k / n, k], dim=-1).float()
        return index * self.voxel - self.box_warp / 2 + torch.tensor(self.centre)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, one per field. `lattice` and `centre` are left out if they have their
        defaults.
        """
        values = {**asdict(self), "crop": list(self.crop), "centre": list(self.centre)}
        # Descriptions and digests of specs that predate the two fields must not change.
        for name in _LATER:
            if getattr(self, name) == getattr(type(self), name):
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SlabSpec":
        """Read what `to_dict` wrote.

        Raises: ValueError if a field is missing, unknown or out of range. A grid that differs slightly from
        the one that the reward was trained on would otherwise be scored without an error.
        """
        # Descriptions of the first version lack the fields of _LATER, so these may be missing.
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) | _LATER != names:
            got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(
                f"SlabSpec.from_dict: expected the fields {sorted(names)}, got {got}. Pass the values that"
                " SlabSpec.to_dict() returned."
            )
        return cls(**values)

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the canonical JSON. Equal specs give equal digests on every
        machine.
        """
        # Canonical: sorted keys, no spaces.
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
