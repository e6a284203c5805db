"""Where a foreign generator's shapes lie, and on what scale its density is, against the generator that a reward knows.

Letters: K samples, P points, Q quantiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator
from eg3d_rlhf.generators.placed import Similarity, ws_of
from eg3d_rlhf.geometry.mesh import extract_mesh, largest_part

QUANTILES = 64  # of the density above the level, and as many below
KEPT = 0.8  # share of nearest neighbours that a fit goes by
_POINTS, _ROUNDS, _STILL = 6000, 100, 1e-7  # of a surface, at most; of the fit, at most; the largest change that ends it


@torch.no_grad()
def fields_of(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, batch: int = 8):
    """The fields of seeds, a few at a time."""
    for start in range(0, len(seeds), batch):
        yield generator.field(ws_of(generator, seeds[start : start + batch], psi, cutoff))


def mean_surface(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, resolution: int) -> np.ndarray:
    """Points [P, 3] of the front half of the typical shape: where half of the samples have density above the level.

    The pointwise median asks for no scale of the density. Caps at the cube's faces are left out.
    Raises: ValueError where the median shape has no surface.
    """
    spec = SlabSpec.of(generator.bounds, resolution)
    cubes = torch.cat([field.density_grid(spec).cpu() for field in fields_of(generator, seeds, psi, cutoff)])
    vertices, _, _ = largest_part(*extract_mesh(cubes.quantile(0.5, dim=0), spec, generator.level))
    inside = np.abs(vertices - np.array(spec.centre)).max(axis=1) < spec.box_warp / 2 - 1.5 * spec.voxel
    points = vertices[inside & (vertices[:, 2] > vertices[inside, 2].mean())].astype(np.float64)
    return points[np.linspace(0, len(points) - 1, min(len(points), _POINTS)).astype(int)]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a foreign surface lies on the reference's."""

    similarity: Similarity  # from the reference's world to the foreign one
    residual: float  # root mean square distance of the kept neighbours, the reference's units


def align(foreign: np.ndarray, reference: np.ndarray) -> Alignment:
    """Scale and shift that lay points [P, 3] of the reference on those of a foreign surface; no rotation.

    Iterated nearest neighbours, both ways, the farthest fifth left out: parts that one surface lacks do not count.
    """
    centre, middle = foreign.mean(axis=0), reference.mean(axis=0)
    scale = float(np.sqrt(((foreign - centre) ** 2).sum(1).mean() / ((reference - middle) ** 2).sum(1).mean()))
    shift, tree = centre - scale * middle, cKDTree(reference)
    residual = np.inf
    for _ in range(_ROUNDS):
        laid = (foreign - shift) / scale
        there, near = tree.query(laid)
        back, far = cKDTree(laid).query(reference)
        one, other = there <= np.quantile(there, KEPT), back <= np.quantile(back, KEPT)
        p, q = np.concatenate([foreign[one], foreign[far[other]]]), np.concatenate([reference[near[one]], reference[other]])
        residual = float(np.sqrt(np.square(np.concatenate([there[one], back[other]])).mean()))
        p_mean, q_mean = p.mean(axis=0), q.mean(axis=0)
        before = np.append(shift, scale)
        scale = float(((p - p_mean) * (q - q_mean)).sum() / ((q - q_mean) ** 2).sum())
        shift = p_mean - scale * q_mean
        if np.abs(np.append(shift, scale) - before).max() < _STILL:
            break
    return Alignment(similarity=Similarity(scale, (float(shift[0]), float(shift[1]), float(shift[2]))), residual=residual)


@dataclass(frozen=True, eq=False)
class DensityMap:
    """A rising, piecewise linear map of raw density, carried on with its outermost slopes."""

    knots: torch.Tensor  # [Q] of the foreign density, rising
    values: torch.Tensor  # [Q] of the reference's, rising

    def __call__(self, sigma: torch.Tensor) -> torch.Tensor:
        """Differentiable in sigma."""
        knots, values = self.knots.to(sigma), self.values.to(sigma)
        place = torch.searchsorted(knots, sigma.detach().contiguous()).clamp(1, len(knots) - 1)
        low, high = knots[place - 1], knots[place]
        return values[place - 1] + (sigma - low) / (high - low) * (values[place] - values[place - 1])


def calibrate_density(foreign: np.ndarray, reference: np.ndarray, level: float, reference_level: float) -> DensityMap:
    """The map under which pooled values of foreign density have the quantiles of the reference's, above the level and below it.

    Below it, too: a self-normalised slab reads how empty the emptiest place is. The level becomes the level.
    Raises: ValueError where one of them has no values on one side of its level.
    """
    sides = []
    for above in (False, True):
        both = ((foreign, level), (reference, reference_level))
        own = [values[(values > least) if above else (values < least)] for values, least in both]
        if min(map(len, own)) < QUANTILES:
            where = "above" if above else "below"
            raise ValueError(
                f"calibration: expected {QUANTILES} densities {where} the level where the reward looks, got {min(map(len, own))}. "
                "The shapes lie elsewhere: leave the network out."
            )
        sides.append([np.quantile(values, np.linspace(0, 1, QUANTILES)) for values in own])
    knots = np.concatenate([sides[0][0], [level], sides[1][0]])
    values = np.concatenate([sides[0][1], [reference_level], sides[1][1]])
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(knots)) > 1e-6 * max(abs(level), 1.0)])
    return DensityMap(torch.from_numpy(knots[rising]).float(), torch.from_numpy(values[rising]).float())


def pooled(generator: Generator, seeds: Sequence[int], spec: SlabSpec, psi: float, cutoff: int | None) -> np.ndarray:
    """Densities of seeds at all points of a grid, in one row."""
    grids = [field.density_grid(spec).flatten().cpu() for field in fields_of(generator, seeds, psi, cutoff)]
    return torch.cat(grids).double().numpy()


