"""Choice of the crop of a density grid by the generator whose shapes a reward reads.

A crop that suits one generator cuts away the shapes of another one: the heads of the bundled generator stand
at the centre of the cube, but the faces of EG3D FFHQ stand in front of it, at z = 0.2. There are three cases:

    bundled     The generator has the architecture and the rendering options of the bundled generator, which
                holds for every generator that was tuned from it. The crop is that of the bundled rewards.
    ffhq        The generator has the rendering options of EG3D FFHQ. The crop is that of arXiv 2606.27305.
    measured    Every other generator. The crop contains the points at which the densities of eight samples
                cross the surface level, with a margin.

The reward's file states its crop, so that training, tuning and reports read the same grid points.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.spec import SlabSpec

if TYPE_CHECKING:
    import torch

    from eg3d_rlhf.generators import Generator
    from eg3d_rlhf.generators.density_samples import DensitySamples

Crop = tuple[float, float, float, float, float, float]  # shares at the faces, as in SlabSpec.crop

BUNDLED = "bundled"
FFHQ = "ffhq"
MEASURED = "measured"
# Crops of the bundled generator by kind of observation. Both contain the heads of people which it makes,
# from the forehead to the nape, without shoulders. The bundled rewards were trained with them.
BUNDLED_CROPS: dict[str, Crop] = {
    "sigma": (0.22, 0.22, 0.20, 0.12, 0.10, 0.30),
    "points": (0.16, 0.16, 0.26, 0.20, 0.24, 0.25),
}
PAPER_CROP: Crop = SlabSpec.crop
# Share of the surface that may lie outside a measured box at each of its six faces: single floating specks
# must not enlarge the box.
_OUTSIDE = 0.001
_MARGIN = 2 / 63  # margin around the measured box: two of the 64 grid points, as a share of the cube's edge
_STEPS = 64  # a measured share is a multiple of 1 / _STEPS, so that 64 grid points per axis are cut exactly
_LARGEST_CUT = 0.5  # largest total share that is cropped along an axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropChoice:
    """Crop of a density grid, and the reason for its choice."""

    crop: Crop
    origin: str  # 'bundled', 'ffhq' or 'measured'
    # For a measured crop: raw density at the surface that was measured. This is another level than the
    # generator's if no sample has a surface there.
    level: float | None = None

    def line(self) -> str:
        """Return one sentence that states the crop and where it comes from."""
        shares = " ".join(f"{share:g}" for share in self.crop)
        reason = {
            BUNDLED: "the crop of the bundled rewards, because the generator has the form of the bundled one",
            FFHQ: "the crop of arXiv 2606.27305, because the rendering options are those of EG3D FFHQ",
            MEASURED: (
                f"measured on eight samples, whose density crosses the level {self.level or 0:g} inside it"
            ),
        }[self.origin]
        return f"crop of the density grid (x x y y z z): {shares} ({reason})"


def recognised(generator: "Generator") -> str | None:
    """Return 'bundled' or 'ffhq' if the crop of a generator is known, else None.

    EG3D FFHQ is recognised by its rendering options: cameras at a distance of 2.7 that look at the point
    (0, 0, 0.2), and a cube with the edge 1 about the origin.
    """
    options = getattr(generator.module, "rendering_kwargs", None)
    # A generator of another family, or one that was moved (`generators.placed`), fills another part of its
    # cube than the options say.
    if options is None or generator.architecture != "eg3d" or hasattr(generator, "place"):
        return None
    if _signature(generator) == _bundled_signature():
        return BUNDLED
    if not {"avg_camera_pivot", "avg_camera_radius", "box_warp"} <= set(options):
        return None
    cameras = generator.cameras
    expected_values = (0.0, 0.0, 0.2, 2.7, 1.0)
    values = (*cameras.pivot, cameras.radius, generator.bounds.side)
    is_ffhq = all(
        math.isclose(value, expected, abs_tol=1e-6)
        for value, expected in zip(values, expected_values, strict=True)
    )
    return FFHQ if is_ffhq else None


def _signature(generator: "Generator") -> tuple[Any, ...]:
    """Return the shapes of a network's tensors, and the camera and the cube that it was trained with."""
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.module.state_dict().items()}
    # Training adds this buffer, which is no part of the architecture.
    shapes.pop("dataset_label_std", None)
    return shapes, generator.bounds, generator.cameras


@functools.cache
def _bundled_signature() -> tuple[Any, ...]:
    """Return the signature of the bundled generator."""
    from eg3d_rlhf.generators import load_generator

    return _signature(load_generator().generator)


def known_crop(origin: str, kind: str = "sigma") -> Crop:
    """Return the crop of a recognised generator.

    Args:
        origin: 'bundled' or 'ffhq'.
        kind: kind of the observation, 'sigma' or 'points'.
    """
    return BUNDLED_CROPS[kind] if origin == BUNDLED else PAPER_CROP


def choose_crop(
    generators: "Sequence[Generator]", kind: str = "sigma", level: float | None = None
) -> CropChoice:
    """Choose the crop of the density grid for the shapes of one or several generators with equal bounds.

    Args:
        generators: generators whose shapes are read; for several ones, the crop contains the shapes of all.
        kind: kind of the observation, 'sigma' or 'points'.
        level: raw density at the surface; None: the level of each generator. A given level is measured at in
            every case.
    """
    from eg3d_rlhf.generators.density_samples import sample_density

    origins = {recognised(generator) for generator in generators} if level is None else {None}
    if len(origins) == 1 and None not in origins:
        (origin,) = origins
        assert origin is not None
        return CropChoice(crop=known_crop(origin, kind), origin=origin)
    crops = []
    levels = []
    for generator in generators:
        samples = sample_density(generator, portable=True)
        surface_level = usable_level(samples, generator.level if level is None else level)
        # Without any surface, nothing may be cropped.
        crops.append((0.0,) * 6 if surface_level is None else measured_crop(samples, surface_level))
        levels.append(surface_level)
    # The smallest share at each face gives the box that contains all boxes.
    crop = tuple(min(shares) for shares in zip(*crops, strict=True))
    return CropChoice(crop=crop, origin=MEASURED, level=levels[0])


def usable_level(samples: "DensitySamples", level: float) -> float | None:
    """Return a level if a sample has a surface there, else the proposed level, or None if there is none."""
    with_surface, _ = samples.surface_counts(level)
    return level if with_surface else samples.propose_level()


def measured_crop(samples: "DensitySamples", level: float) -> Crop:
    """Return the crop of the box that contains at least 99 % of the surface of samples, with a margin.

    The box is symmetric along x, because training mirrors the density grids left to right. At most half of
    the cube's edge is cropped along an axis, so that networks with several poolings can read the grid.

    Args:
        samples: densities of the samples.
        level: raw density at the surface; at least one sample must cross it.
    """
    sorted_points = samples.surface_points(level).sort(dim=0).values  # [P, 3], each axis by itself
    outside_count = int(_OUTSIDE * len(sorted_points))
    shares: list[float] = []
    for axis in range(3):
        low = float(sorted_points[outside_count, axis]) - _MARGIN
        high = 1 - float(sorted_points[-1 - outside_count, axis]) - _MARGIN
        # x is mirrored in training
        if axis == 0:
            low = high = min(low, high)
        low = max(low, 0.0)
        high = max(high, 0.0)
        if low + high > _LARGEST_CUT:
            # The box is enlarged at both faces alike, but not beyond the cube.
            excess = low + high - _LARGEST_CUT
            low_excess = min(max(excess / 2, excess - high), low)
            low -= low_excess
            high -= excess - low_excess
        shares += [math.floor(share * _STEPS + 1e-9) / _STEPS for share in (low, high)]
    return tuple(shares)  # type: ignore[return-value]


def surface_inside(points: "torch.Tensor", spec: SlabSpec) -> "torch.Tensor":
    """Return bool [P]: True for each point of the cube that lies inside the box of a cropped grid.

    Args:
        points: points [P, 3] in units of the cube, see `DensitySamples.surface_points`.
        spec: cropped grid over the same cube.
    """
    lowest = points.new_tensor([first / (spec.resolution - 1) for first, _ in spec.index_ranges])
    highest = points.new_tensor([(stop - 1) / (spec.resolution - 1) for _, stop in spec.index_ranges])
    return ((points >= lowest) & (points <= highest)).all(dim=1)
