"""Directions of latents that need no labels, for moves of samples along them.

The principal directions of style vectors are those of GANSpace (Härkönen et al. 2020, arXiv 2004.02546). The
direction that changes the back of a head most for what it changes in front is a generalised eigenvector of
the sums of squared Jacobians J_b^T J_b and J_f^T J_f of the density at the back and in front. SeFa (Shen and
Zhou 2021, arXiv 2007.06600) has the idea for a single matrix of weights.

Shapes: M samples, Z z_dim, W w_dim, P points.
"""

import numpy as np
import torch
from scipy.linalg import eigh

from eg3d_rlhf.evaluation.heads import CUTOFF
from eg3d_rlhf.generators import Generator, camera
from eg3d_rlhf.measures.people import back_of_head, in_front
from training.heads.people_mesh import grid_points
from training.steering import SPACES, Steering

PRINCIPAL_COUNT = 10  # number of principal directions
STYLE_SAMPLES = 600  # M, samples whose principal directions are computed
JACOBIAN_SAMPLES = 8  # latents at which Jacobians are computed
JACOBIAN_STEP = 0.5  # step of the finite differences, in standard deviations of z
JACOBIAN_POINTS = 24  # grid points per edge of the cube
DENSITY_RANGE = (-10.0, 40.0)  # raw density is clipped, since the surface lies between these values
BACK_COUNT = 3  # number of directions that change backs most
FRONT_FLOOR = 1e-3  # regularises directions that change nothing in front


@torch.no_grad()
def principal_moves(
    generator: Generator, psi: float, device: torch.device, seed: int, count: int = PRINCIPAL_COUNT
) -> list[Steering]:
    """Compute moves along the principal directions of style vectors, with either sign.

    Args:
        generator: the generator.
        psi: truncation of the samples.
        device: device of the generator.
        seed: seed of the random latents.
        count: number of directions.
    Returns: twice as many moves, or fewer if the style vectors have fewer dimensions.
    """
    # The random numbers come from the CPU, so that equal seeds give equal latents on every device. z: [M, Z].
    z = torch.randn(STYLE_SAMPLES, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    ws = generator.mapping(
        z.to(device), camera(generator, n=len(z)), truncation_psi=psi, truncation_cutoff=CUTOFF
    )
    # All layers of the broadcast mapping hold the same w, apart from truncation, which ends at layer
    # CUTOFF. The first layer therefore stands for all of them.
    styles = ws[:, 0].double().cpu()  # w of the first layer, [M, W]
    mean = styles.mean(dim=0)
    # The right singular vectors of the centred styles are the eigenvectors of their covariance, without
    # forming the [W, W] matrix, whose condition number would be squared. right_vectors: [min(M, W), W].
    _, singular_values, right_vectors = torch.linalg.svd(styles - mean, full_matrices=False)
    # A singular value s of M centred rows belongs to the variance s^2 / (M - 1).
    standard_deviations = singular_values / np.sqrt(len(styles) - 1)
    return [
        # The sign of a singular vector is arbitrary, so both
        # signs are candidates. The reward then chooses one.
        Steering("w", styles.shape[1]).set_direction(sign * vector, mean.float(), float(standard_deviation))
        for vector, standard_deviation in zip(right_vectors[:count], standard_deviations[:count], strict=True)
        for sign in (1, -1)
        if standard_deviation > 0
    ]


@torch.no_grad()
def back_moves(generator: Generator, device: torch.device, seed: int) -> list[Steering]:
    """Compute moves along the directions of z that change backs most for what they change in front.

    Args:
        generator: generator of heads.
        device: device of the generator.
        seed: seed of the random latents.
    Returns: moves along the BACK_COUNT vectors with the largest eigenvalues, with either sign.
    """
    # [n, n, n, 3] in the unit cube. A mask of a region reduces it to [P, 3], with another P for each region.
    points = grid_points(JACOBIAN_POINTS)
    coordinates = [
        torch.from_numpy(points[region(points)]).float().to(device) for region in (in_front, back_of_head)
    ]
    z_dim = generator.z_dim
    latents = torch.randn(JACOBIAN_SAMPLES, z_dim, generator=torch.Generator().manual_seed(seed))
    # The mapping normalises z, so only the direction of z matters. At the
    # length sqrt(Z), a step of JACOBIAN_STEP is in standard deviations.
    latents = latents * (z_dim**0.5 / latents.norm(dim=1, keepdim=True))
    # sums of J^T J over latents, in front and at the back, [Z, Z] each
    squares = [np.zeros((z_dim, z_dim)) for _ in coordinates]
    for latent in latents:
        # Row 0 is the latent itself, and row 1 + i is the latent with coordinate i increased: [1 + Z, Z].
        neighbours = torch.cat([latent[None], latent + JACOBIAN_STEP * torch.eye(z_dim)]).to(device)
        densities: list[list[torch.Tensor]] = [[] for _ in coordinates]
        # In batches of 16, because the fields of all neighbours together would not fit into memory.
        for z in neighbours.split(16):
            field = generator.field(
                # No truncation here. It would shrink the differences
                # of all layers below CUTOFF by the same factor.
                generator.mapping(
                    z, camera(generator, n=len(z)), truncation_psi=1.0, truncation_cutoff=CUTOFF
                )
            )
            for region_densities, region_points in zip(densities, coordinates, strict=True):
                # Clipping sets the Jacobian to 0 far from the surface. There
                # the density changes strongly with z, but no change is visible.
                region_densities.append(field.density(region_points).clamp(*DENSITY_RANGE).cpu())
        for square, region_densities in zip(squares, densities, strict=True):
            values = torch.cat(region_densities).double().numpy()  # [1 + Z, P]
            jacobian = (values[1:] - values[0]) / JACOBIAN_STEP  # [Z, P]
            # The row i of the jacobian is the derivative with respect to coordinate i, so this is J^T J in
            # the usual notation, in which J has the shape [P, Z].
            square += jacobian @ jacobian.T
    # Dividing by the trace removes the different numbers of points and the different slopes of both
    # regions. FRONT_FLOOR is then relative to a trace of 1.
    front, back = (square / np.trace(square) for square in squares)
    # The eigenvalues are in ascending order; the last vectors have the largest ratios of back to front.
    _, vectors = eigh(back, front + FRONT_FLOOR * np.eye(z_dim))
    return [
        Steering("z", z_dim).set_direction(sign * torch.from_numpy(vectors[:, -number]))
        for number in range(1, BACK_COUNT + 1)
        for sign in (1, -1)
    ]


def to_arrays(steering: Steering, seconds: float) -> dict[str, np.ndarray]:
    """Convert a move to arrays for a store, with the seconds in which it was found."""
    return {
        # A store holds numeric arrays only, so the space is stored as its index.
        "space": np.array(SPACES.index(steering.space)),
        "direction": steering.direction.cpu().numpy(),
        "mean": steering.mean.cpu().numpy(),
        "standard_deviation": steering.std.cpu().numpy(),
        "seconds_once": np.array(seconds),
    }


def from_arrays(arrays: dict[str, np.ndarray], strength: float) -> Steering:
    """Make a move of a strength from the arrays of `to_arrays`."""
    direction = torch.from_numpy(arrays["direction"])
    return Steering(SPACES[arrays["space"].item()], len(direction), strength).set_direction(
        direction, torch.from_numpy(arrays["mean"]), arrays["standard_deviation"].item()
    )
