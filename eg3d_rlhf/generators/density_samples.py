"""Raw density of a few samples of a generator: its range, its surface, and a level at which there is one.

`inspect`, `label`, `study` and `train` look at eight samples when they open a network. A network whose
density never reaches the surface level gives no mesh, which would otherwise be noticed only after hours. The
crop of a reward's density grid is measured on the same samples (`eg3d_rlhf.rewards.slab_crops`).

Shapes: N samples; R grid points per axis; P points at which grid edges cross the surface.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, device_of, shape_count
from eg3d_rlhf.generators.placed import ws_of_placed
from torch_utils.ops.implementations import implementation

SAMPLES = 8  # number of samples
RESOLUTION = 64  # grid points per axis
# Share of the volume above the proposed level. The heads of the bundled generator fill 6 % of their cube at
# its level.
_PROPOSED_SHARE = 0.08
# Distance of the proposed level to the smallest and the largest density of a sample, as a share of the range
# of all densities. Other samples have other ranges, and should have a surface at the proposed level, too.
_PROPOSED_MARGIN = 0.05

# Remedy of commands that describe a network, see `DensityCheck.problem`.
LEVEL_REMEDY = "Pass --set level={level} to label and to all other commands that show or measure shapes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityCheck:
    """Range of the density of a few samples, and its relation to a surface level.

    All values are taken inside the empty border of the generator's bounds, which meshes leave out.
    """

    seeds: tuple[int, ...]  # latent seeds of the samples
    psi: float  # truncation of the samples
    level: float  # raw density at the surface
    lowest: float  # smallest raw density of all samples
    highest: float  # largest raw density of all samples
    share: float  # mean share of the volume that lies above the level, 0..1
    with_surface: int  # number of samples whose density lies on both sides of the level
    # Level at which most samples have a surface: `level` itself if all have one there, None if no level gives
    # a surface.
    proposed_level: float | None
    proposed_share: float  # mean share of the volume that lies above the proposed level, 0..1
    proposed_with_surface: int  # number of samples that have a surface at the proposed level

    def to_dict(self) -> dict:
        """Return the values as JSON values."""
        return dataclasses.asdict(self) | {"seeds": list(self.seeds)}

    def line(self) -> str:
        """Return one line that states the range, and how many samples have a surface."""
        return (
            f"density of {len(self.seeds)} samples: {self.lowest:.4g} to {self.highest:.4g}; at the level"
            f" {self.level:g}, {self.with_surface} of {len(self.seeds)} have a surface, and {self.share:.2%}"
            " of the volume lies above it"
        )

    def problem(self, remedy: str = "Pass --set level={level}") -> str | None:
        """Return one sentence about samples without a surface, with a remedy; None if all have one.

        Args:
            remedy: start of the remedy, in which "{level}" stands for the proposed level.
        """
        sample_count = len(self.seeds)
        if self.with_surface == sample_count:
            return None
        complaint = (
            f"{sample_count - self.with_surface} of {sample_count} samples have no surface at the level"
            f" {self.level:g}: their raw densities are between {self.lowest:.4g} and {self.highest:.4g}."
        )
        if self.proposed_level is None:
            return (
                f"{complaint} No level gives a surface, because the density is constant. Check the network."
            )
        return (
            f"{complaint} {remedy.format(level=f'{self.proposed_level:g}')}: at this level,"
            f" {self.proposed_with_surface} of {sample_count} have a surface, and {self.proposed_share:.1%}"
            " of the volume lies above it."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensitySamples:
    """Raw densities of a few samples of a generator on a grid over its cube."""

    seeds: tuple[int, ...]  # latent seeds of the samples
    psi: float  # truncation of the samples
    spec: SlabSpec  # grid over the cube of the generator
    border: float  # thickness of the border that meshes leave empty, as a fraction of the edge
    cubes: torch.Tensor  # raw densities [N, R, R, R] along z, y, x; float32 on the CPU

    @functools.cached_property
    def _inner(self) -> torch.Tensor:
        """Densities [N, points] inside the border that meshes leave empty."""
        first = int(self.border * self.spec.resolution)
        inside = slice(first, self.spec.resolution - first)
        return self.cubes[:, inside, inside, inside].flatten(1)

    def surface_counts(self, level: float) -> tuple[int, float]:
        """Return how many samples have densities on both sides of a level, and the mean share above it."""
        is_above = self._inner > level
        has_surface = is_above.any(dim=1) & ~is_above.all(dim=1)
        return int(has_surface.sum()), float(is_above.double().mean())

    def check(self, level: float, proposed: float | None = None) -> DensityCheck:
        """Describe the range of the density, and how it relates to a level.

        Args:
            level: raw density at the surface.
            proposed: level to propose if samples have no surface; None: a level for these samples.
        """
        with_surface, share = self.surface_counts(level)
        if with_surface == len(self.seeds):
            proposed = level
        elif proposed is None:
            proposed = self.propose_level()
        proposed_with_surface, proposed_share = (
            (0, 0.0) if proposed is None else self.surface_counts(proposed)
        )
        return DensityCheck(
            seeds=self.seeds,
            psi=self.psi,
            level=level,
            lowest=float(self._inner.min()),
            highest=float(self._inner.max()),
            share=share,
            with_surface=with_surface,
            proposed_level=proposed,
            proposed_share=proposed_share,
            proposed_with_surface=proposed_with_surface,
        )

    def propose_level(self) -> float | None:
        """Return a level at which as many samples as possible have a surface; None if no level gives one.

        Among such levels, a level is preferred that keeps a margin to the smallest and the largest density of
        as many samples as possible, and then the one above which the share of the volume is nearest to 8 %.
        It is rounded to a hundredth of the range of the densities.
        """
        lowest = float(self._inner.min())
        highest = float(self._inner.max())
        if not highest > lowest:
            return None
        lowest_of_samples = self._inner.amin(dim=1)
        highest_of_samples = self._inner.amax(dim=1)
        margin = _PROPOSED_MARGIN * (highest - lowest)
        # torch.quantile accepts at most 2^24 values, so the values are sorted.
        sorted_values = self._inner.flatten().sort().values
        positions = torch.linspace(0, len(sorted_values) - 1, 401).long()
        step = 10.0 ** math.floor(math.log10((highest - lowest) / 100))
        best_level = None
        best_rating = (0, 0, -math.inf)
        for value in sorted_values[positions].tolist():
            level = round(value / step) * step
            # As exact as `surface_counts`, which would pass over all values for each of the levels.
            with_surface = int(((highest_of_samples > level) & ~(lowest_of_samples > level)).sum())
            count_above = len(sorted_values) - int(torch.searchsorted(sorted_values, level, right=True))
            share = count_above / len(sorted_values)
            has_margin = (lowest_of_samples + margin < level) & (level < highest_of_samples - margin)
            rating = (with_surface, int(has_margin.sum()), -abs(share - _PROPOSED_SHARE))
            if rating > best_rating:
                best_level = level
                best_rating = rating
        # `%g` removes the digits that the multiplication with `step` adds, such as -0.30000000000000004.
        return None if best_level is None else float(f"{best_level:.6g}")

    def surface_points(self, level: float) -> torch.Tensor:
        """Return the points [P, 3] at which edges of the grid cross a level, in units of the cube.

        The coordinates x, y and z are 0 and 1 at the faces of the cube. The density changes linearly along an
        edge. The number of crossed edges is proportional to the area of the surface.
        """
        # The features of a tri-plane fade to 0 at the faces of the cube, where they are interpolated with the
        # empty space outside. The outermost grid points may therefore lie on the other side of the level,
        # although there is no surface.
        cubes = self.cubes[:, 1:-1, 1:-1, 1:-1]
        crossings = []
        # Dimensions 3, 2, 1 of the cubes are x, y, z.
        for axis, dim in enumerate((3, 2, 1)):
            length = cubes.shape[dim] - 1
            start = cubes.narrow(dim, 0, length)
            end = cubes.narrow(dim, 1, length)
            crossed = (start >= level) != (end >= level)
            fraction = (level - start[crossed]) / (end[crossed] - start[crossed])
            points = crossed.nonzero()[:, [3, 2, 1]].float()  # indices of x, y, z
            points[:, axis] += fraction
            crossings.append((points + 1) / (self.spec.resolution - 1))
        return torch.cat(crossings)


def default_seeds(generator: Generator, first_seed: int = 0) -> list[int]:
    """Return the seeds of the samples: eight from `first_seed` on, or all that the generator has."""
    limit = shape_count(generator)
    return list(range(first_seed, first_seed + SAMPLES))[
        : None if limit is None else max(limit - first_seed, 0)
    ]


@torch.no_grad()
def sample_density(
    generator: Generator,
    seeds: Sequence[int] | None = None,
    psi: float = 1.0,
    cutoff: int | None = 14,
    *,
    portable: bool = False,
) -> DensitySamples:
    """Evaluate the density of a few samples of a generator. The state of random generators is not changed.

    Args:
        generator: generator of the samples.
        seeds: latent seeds; None: eight, from 0 on.
        psi: truncation of the samples.
        cutoff: number of layers that are truncated.
        portable: True: use the operators of PyTorch, which give the same values on every machine and take
            four times as long. A crop that is measured on the samples needs them.

    Raises: ValueError if a density is not finite, for example because of damaged weights.
    """
    chosen_seeds = tuple(default_seeds(generator) if seeds is None else seeds)
    spec = SlabSpec.from_bounds(generator.bounds, RESOLUTION)
    device = device_of(generator)
    cubes = []
    # Camera labels and the renderer advance torch's global random generators. A run must not depend on
    # whether its density was looked at.
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        implementation("torch" if portable else "auto"),
    ):
        # One sample at a time, because a full-size generator needs gigabytes for eight.
        for seed in chosen_seeds:
            field = generator.field(ws_of_placed(generator, [seed], psi, cutoff))
            cubes.append(field.density_grid(spec).float().cpu())
    density = torch.cat(cubes)
    if not bool(torch.isfinite(density).all()):
        raise ValueError(
            "the density of the samples is not finite: it contains NaN or infinity. Check the weights of the"
            " network with eg3d-rlhf generator inspect."
        )
    return DensitySamples(
        seeds=chosen_seeds, psi=psi, spec=spec, border=generator.bounds.border, cubes=density
    )


def check_density(
    generator: Generator,
    level: float | None = None,
    seeds: Sequence[int] | None = None,
    psi: float = 1.0,
    cutoff: int | None = 14,
) -> DensityCheck:
    """Check whether samples of a generator have a surface.

    The level that is proposed otherwise depends on the generator alone, and not on the seeds and the
    truncation of a command. All commands therefore propose the same level.

    Args:
        generator: generator of the samples.
        level: raw density at the surface; None: the level of the generator.
        seeds: latent seeds of the samples; None: eight, from 0 on.
        psi: truncation of the samples.
        cutoff: number of layers that are truncated.
    """
    level = generator.level if level is None else level
    samples = sample_density(generator, seeds, psi, cutoff)
    with_surface, _ = samples.surface_counts(level)
    is_usual = samples.seeds == tuple(default_seeds(generator)) and psi == 1
    if with_surface == len(samples.seeds) or is_usual:
        return samples.check(level)
    return samples.check(level, sample_density(generator).propose_level())


def require_surface(check: DensityCheck, remedy: str = "Pass --set level={level}") -> str | None:
    """Return a warning if some samples have no surface, else None.

    Args:
        check: relation of samples to a level.
        remedy: start of the remedy, see `DensityCheck.problem`.

    Raises: ValueError if no sample has a surface.
    """
    problem = check.problem(remedy)
    if problem is not None and not check.with_surface:
        raise ValueError(problem)
    return problem
