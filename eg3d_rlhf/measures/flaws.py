"""Volume errors of synthetic heads of the fourth edition by the kind of flaw, each in its own region.

The flaws are a flat back and a swelling at the nape. Their regions are analytic functions of the latent and
of the ground-truth head (`training.heads.people_flaws`), and exist for every latent, with and without the
flaw. In the region of the flat back, which lies inside the ground-truth head, the error is the missing
volume. In that of the swelling, which lies outside, it is the extra volume. All errors are shares of the
volume that the ground-truth head has above the shoulders.

Shapes: N latents, n grid points per edge.
"""

import numpy as np
import torch

from training.heads.people import normalise_latents
from training.heads.people_flaws import FLAWS, flaw_amounts, flaw_regions
from training.heads.people_mesh import BASE, grid_points

HARM = 0.01  # an error outside a region that grows by more than this share counts as harm


def amounts_of_latents(z: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the amounts [N] in 0..1 that the scans of latents [N, 64] have of each flaw, by its name."""
    amounts = flaw_amounts(torch.from_numpy(normalise_latents(z)))
    return {name: amounts[:, i].numpy() for i, name in enumerate(FLAWS)}


def errors_by_flaw(
    shape_values: np.ndarray, head_values: np.ndarray, z: torch.Tensor
) -> dict[str, np.ndarray]:
    """Compute the volume errors of shapes in the region of each flaw and outside of it.

    Args:
        shape_values: grids [N, n, n, n] of shapes, negative inside.
        head_values: grids [N, n, n, n] of the ground-truth heads of the same latents, negative inside.
        z: latents [N, 64].

    Returns: arrays [N] by name. 'flat' and 'swelling' are the errors in the regions of these flaws,
        'outside_flat' and 'outside_swelling' the missing and the extra volume elsewhere above the shoulders.
    """
    assert len(shape_values) == len(head_values) == len(z)
    points = grid_points(shape_values.shape[1])
    flat_points = torch.from_numpy(points.reshape(1, -1, 3))
    is_above_shoulders = points[..., 1] > BASE  # y points up
    unit_latents = torch.from_numpy(normalise_latents(z))
    errors: dict[str, list[float]] = {
        name: [] for name in (*FLAWS, *(f"outside_{flaw_name}" for flaw_name in FLAWS))
    }
    # One head after the other, because the regions of all heads take much memory.
    for shape, head, latent in zip(shape_values, head_values, unit_latents, strict=True):
        distance = torch.from_numpy(head.reshape(1, -1)).double()
        regions = flaw_regions(flat_points, distance, latent[None])
        head_volume = ((head < 0) & is_above_shoulders).sum()  # in grid points
        # Missing and extra volume in one mask: in the region of a flaw, only one of both is possible.
        is_wrong = ((shape < 0) != (head < 0)) & is_above_shoulders
        for name, region in regions.items():
            region_mask = region.reshape(head.shape).numpy()
            errors[name].append(float((is_wrong & region_mask).sum() / head_volume))
            errors[f"outside_{name}"].append(float((is_wrong & ~region_mask).sum() / head_volume))
    return {name: np.array(values) for name, values in errors.items()}


def is_harmed(errors_before: np.ndarray, errors_after: np.ndarray) -> np.ndarray:
    """Return a mask [N] of the latents whose error outside a region grew by more than HARM.

    Args: errors_before, errors_after: results 'outside_flat' or 'outside_swelling' of `errors_by_flaw`.
    """
    return errors_after > errors_before + HARM
