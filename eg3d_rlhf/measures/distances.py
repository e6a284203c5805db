"""Compute distances between two sets of image features: Fréchet (FID) and kernel (KID).

The formulas take features of any network; features.py loads the networks. KID as published (Bińkowski,
Sutherland, Arbel and Gretton 2018) averages over random subsets of 1000 images. That keeps the Gram matrices
small and gives the spread of the estimate.
Shape letters: N, M = samples, F = feature dimensions, S = subset size, r = rank of a covariance. All
arithmetic is done by numpy in float64.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

# Relative to the largest variance or eigenvalue. A matrix with an eigenvalue that is more negative than this
# is rejected, because it cannot be a covariance; smaller negative values come from rounding.
_PSD_TOLERANCE = 1e-6
SUBSETS = 100  # number of subsets that KID averages over
SUBSET_SIZE = 1000  # images of each set in a subset, as published


class FeatureNetwork(Protocol):
    """Protocol of a network that turns images into features."""

    name: (
        str  # identifies the network in records; figures of networks with different names are not comparable
    )
    dim: int  # F

    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [N, F] of images float [N, 3, H, W] in [-1, 1], without a gradient."""


def _check_moments(mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert mean [F] and covariance [F, F] to float64, and raise ValueError if a value is not finite."""
    # Float64 throughout: the distance is a difference of large traces, so float32 loses its small values.
    mean = np.asarray(mean, dtype=np.float64)
    cov = np.asarray(cov, dtype=np.float64)
    assert cov.shape == (mean.size, mean.size)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(
            "frechet_distance: expected finite moments, got NaN or infinity. Check the images for NaN."
        )
    # Symmetrise: sums of products are symmetric only up to rounding, and the solvers read one triangle.
    return mean, (cov + cov.T) / 2


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Compute the squared 2-Wasserstein distance of two Gaussians (Fréchet 1957; Dowson and Landau 1982;
    Heusel et al. 2017, eq. 6).

    d = |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^1/2). With C_1 = L L^T, the last trace is the sum
    of the square roots of the eigenvalues of the symmetric matrix L^T C_2 L. Covariances without full rank
    (fewer samples than features) therefore need no ridge and give no complex part. 2048 features take
    seconds.

    Args: means [F], covariances [F, F].
    Returns: d >= 0 in squared feature units.
    Raises: ValueError if a moment is not finite or a matrix is not a covariance.
    Deviates: the common implementation takes sqrtm of the unsymmetric product C_1 C_2. Both are equal in
        theory; this one is more stable and faster.
    """
    mean_1, cov_1 = _check_moments(mean_1, cov_1)
    mean_2, cov_2 = _check_moments(mean_2, cov_2)
    assert mean_1.shape == mean_2.shape
    # Cholesky factorisation with pivoting, P^T C_1 P = L L^T, which works without full rank.
    packed, pivots, rank, _ = lapack.dpstrf(cov_1, lower=1)
    factor = np.empty((len(cov_1), rank))
    # LAPACK counts pivots from 1. The upper triangle and the columns beyond the rank hold no part of L.
    factor[pivots - 1] = np.tril(packed)[:, :rank]  # [F, r]
    scale = np.abs(np.diagonal(cov_1)).max(initial=0.0)
    # The factorisation stops at the first negative pivot, so an indefinite matrix leaves a remainder.
    rest = np.abs(cov_1 - factor @ factor.T).max(initial=0.0)
    if rest > _PSD_TOLERANCE * scale + 1e-12:
        raise ValueError(
            "frechet_distance: expected a covariance, which has no negative eigenvalue. The first matrix"
            f" differs from its Cholesky factorisation by {rest:.3g}. Check the moments."
        )
    # L^T C_2 L has the eigenvalues of C_1 C_2, and is symmetric.
    product = factor.T @ cov_2 @ factor  # [r, r]
    values = np.linalg.eigvalsh((product + product.T) / 2)
    if values.size and values[0] < -_PSD_TOLERANCE * np.abs(values).max() - 1e-12:
        raise ValueError(
            f"frechet_distance: expected a covariance (no negative eigenvalue), got {values[0]:.3g}. Check"
            " the second set."
        )
    cross = np.sqrt(np.maximum(values, 0.0)).sum()
    # Rounding can make the distance of equal sets slightly negative.
    return max(0.0, float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross))


class FeatureStatistics:
    """Running mean and covariance of features that arrive in batches.

    Batches are merged by the formulas of Chan, Golub and LeVeque (1983), which do not cancel for large means.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean = np.zeros(dim)  # [F]
        self._scatter = np.zeros((dim, dim))  # [F, F] sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor | np.ndarray) -> "FeatureStatistics":
        """Add a batch [N, F], and return the statistics. An empty batch changes nothing."""
        batch = np.asarray(
            features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64
        )
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(
                f"FeatureStatistics: expected features [N, {self.dim}], got {list(batch.shape)}. Use the"
                " same network for all batches."
            )
        if len(batch):
            count = len(batch)
            mean = batch.mean(axis=0)
            total = self.count + count
            # Between the mean so far and that of the batch
            delta = mean - self._mean
            self._scatter = (
                self._scatter
                + (batch - mean).T @ (batch - mean)
                + np.outer(delta, delta) * (self.count * count / total)
            )
            self._mean = self._mean + delta * (count / total)
            self.count = total
        return self

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean [F] and unbiased covariance [F, F]. Raises: ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(
                f"FeatureStatistics: expected at least 2 samples, got {self.count}. Add images first."
            )
        return self._mean.copy(), self._scatter / (self.count - 1)

    def distance(self, other: "FeatureStatistics") -> float:
        """Compute the Fréchet distance to another set."""
        return frechet_distance(*self.moments(), *other.moments())


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """Compute the unbiased squared maximum mean discrepancy of two complete sets (Bińkowski et al. 2018).

    The kernel is k(x, y) = (x.y / F + 1)^3.
    Args: features_1, features_2: [N, F] and [M, F], with N, M >= 2.
    Returns: a value that is 0 on average for equal distributions, so it can be negative.
    Raises: ValueError if a set has fewer than 2 items.
    """
    first = np.asarray(features_1, dtype=np.float64)
    second = np.asarray(features_2, dtype=np.float64)
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"kernel_distance: expected 2 images or more in each set, got {len(first)} and {len(second)}. Add"
            " images."
        )

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    # Without the diagonal: the kernel of an item with itself would bias the estimate upwards.
    def within(a: np.ndarray) -> float:
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(within(first) + within(second) - 2.0 * kernel(first, second).mean())


@torch.no_grad()
def collect(network: FeatureNetwork, batches: Iterable[Tensor]) -> tuple[FeatureStatistics, np.ndarray]:
    """Compute a network's features of batches of images [N, 3, H, W] in [-1, 1].

    Returns: their statistics, and all features, float32 [total, F].
    """
    statistics = FeatureStatistics(network.dim)
    all_features = []
    for images in batches:
        features = network(images)
        # The statistics are exact in float64; the features are kept in the network's float32 for KID.
        statistics.update(features)
        all_features.append(features.cpu().numpy())
    return statistics, np.concatenate(all_features) if all_features else np.zeros(
        (0, network.dim), dtype=np.float32
    )


def draw_subsets(
    n: int, m: int, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield random subsets of two sets of n and m samples, as pairs of index arrays ([S], [S]).

    S = min(size, n, m). No index is repeated inside a subset.
    """
    # A stream of its own, so that the estimate is the same for the same seed.
    random = np.random.RandomState(seed)
    subset_size = min(size, n, m)
    for _ in range(subsets):
        yield random.choice(n, subset_size, replace=False), random.choice(m, subset_size, replace=False)


def kernel_inception_distance(
    features_1: np.ndarray,
    features_2: np.ndarray,
    seed: int = 0,
    draws: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[float, float]:
    """Compute the published estimate of KID from features [N, F] and [M, F]. Lower is better.

    Args: draws: subsets in place of random ones.
    Returns: the mean over subsets, and the standard deviation between subsets. The latter is not a standard
        error, because subsets overlap. Equal arguments give equal values.
    """
    chosen = list(
        draw_subsets(len(features_1), len(features_2), SUBSETS, SUBSET_SIZE, seed) if draws is None else draws
    )
    values = [kernel_distance(features_1[first], features_2[second]) for first, second in chosen]
    return float(np.mean(values)), float(np.std(values))
