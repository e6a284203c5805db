"""Compute distances between two sets of image features: Fréchet (FID) and kernel (KID).

The formulas take features of any network; features.py loads the networks. FID is the distance of Heusel et
al. 2017, "GANs trained by a two time-scale update rule", eq. 6. KID as published (Bińkowski, Sutherland,
Arbel and Gretton 2018, "Demystifying MMD GANs") averages over random subsets of 1000 images. Subsets keep the
Gram matrices small, and the standard deviation between subsets shows how much the estimate varies.

Shapes: N and M numbers of samples, F feature dimensions, S subset size, r rank of a covariance. All
arithmetic is done by numpy in float64.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

# Tolerance for negative eigenvalues, relative to the largest variance or eigenvalue. A covariance has none,
# so a matrix with a more negative eigenvalue is rejected. Smaller negative values come from rounding.
_PSD_TOLERANCE = 1e-6
SUBSETS = 100  # number of subsets that KID averages over
SUBSET_SIZE = 1000  # images of each set in a subset, as published


class FeatureNetwork(Protocol):
    """Protocol of a network that turns images into features."""

    # Identifies the network in records. Distances of networks with different names are not comparable.
    name: str
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
            "frechet_distance: a mean or a covariance is not finite (NaN or infinity). Check the images and"
            " features for NaN."
        )
    # Symmetrise: sums of products are symmetric only up to rounding, and the solvers read one triangle.
    return mean, (cov + cov.T) / 2


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Compute the squared 2-Wasserstein distance of two Gaussian distributions (Fréchet 1957; Dowson and
    Landau 1982; Heusel et al. 2017, eq. 6).

    d = |m_1 - m_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^1/2), where m_i is the mean and C_i the covariance
    of distribution i. With the Cholesky factorisation C_1 = L L^T, the last trace is the sum of the square
    roots of the eigenvalues of the symmetric matrix L^T C_2 L. Covariances without full rank (fewer samples
    than features) therefore need no multiple of the identity added and give no complex result. The
    computation takes seconds for 2048 features.

    Args:
        mean_1: mean [F] of the first distribution.
        cov_1: covariance [F, F] of the first distribution.
        mean_2: mean [F] of the second distribution.
        cov_2: covariance [F, F] of the second distribution.

    Returns: d >= 0 in squared feature units.
    Raises: ValueError if a moment is not finite or a matrix is not a covariance.
    Deviates: the common implementation of FID takes the matrix square root (sqrtm) of the unsymmetric product
        C_1 C_2. The two results are equal in theory. The eigenvalues of L^T C_2 L are more stable and faster.
    """
    mean_1, cov_1 = _check_moments(mean_1, cov_1)
    mean_2, cov_2 = _check_moments(mean_2, cov_2)
    assert mean_1.shape == mean_2.shape
    # Cholesky factorisation with pivoting, P^T C_1 P = L L^T, which works without full rank.
    packed_factor, pivots, rank, _ = lapack.dpstrf(cov_1, lower=1)
    cholesky_factor = np.empty((len(cov_1), rank))
    # LAPACK counts pivots from 1. The upper triangle and the columns beyond the rank hold no part of L.
    cholesky_factor[pivots - 1] = np.tril(packed_factor)[:, :rank]  # [F, r]
    largest_variance = np.abs(np.diagonal(cov_1)).max(initial=0.0)
    # The factorisation stops at the first negative pivot, so an indefinite matrix leaves a remainder.
    largest_remainder = np.abs(cov_1 - cholesky_factor @ cholesky_factor.T).max(initial=0.0)
    # 1e-12 covers rounding if all variances are 0.
    if largest_remainder > _PSD_TOLERANCE * largest_variance + 1e-12:
        raise ValueError(
            "frechet_distance: cov_1 is not a covariance, because it has a negative eigenvalue: it differs"
            f" from its Cholesky factorisation by {largest_remainder:.3g}. Use the result of"
            " FeatureStatistics.moments()."
        )
    # L^T C_2 L has the eigenvalues of C_1 C_2, and is symmetric.
    symmetric_product = cholesky_factor.T @ cov_2 @ cholesky_factor  # [r, r]
    eigenvalues = np.linalg.eigvalsh((symmetric_product + symmetric_product.T) / 2)
    # eigvalsh sorts in ascending order, so the first eigenvalue is the smallest. There is none at rank 0.
    if eigenvalues.size and eigenvalues[0] < -_PSD_TOLERANCE * np.abs(eigenvalues).max() - 1e-12:
        raise ValueError(
            "frechet_distance: cov_2 is not a covariance, because L^T cov_2 L has the negative eigenvalue"
            f" {eigenvalues[0]:.3g}. Use the result of FeatureStatistics.moments()."
        )
    root_trace = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    # Rounding can make the distance of equal sets slightly negative.
    return max(
        0.0, float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2.0 * root_trace)
    )


class FeatureStatistics:
    """Running mean and covariance of features that arrive in batches.

    Batches are merged by the formulas of Chan, Golub and LeVeque (1983). These subtract the mean before they
    square, so large means cause no loss of precision.

    Args:
        dim: number of features F of each sample.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean = np.zeros(dim)  # [F]
        self._scatter = np.zeros((dim, dim))  # [F, F] sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor | np.ndarray) -> "FeatureStatistics":
        """Add a batch of features [N, F] and return this object. An empty batch (N = 0) changes nothing.

        Raises: ValueError if the shape is not [N, F].
        """
        batch = np.asarray(
            features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64
        )
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(
                f"FeatureStatistics: features have the shape {list(batch.shape)}, but must have [N,"
                f" {self.dim}]. Compute all batches with the same network."
            )
        if len(batch):
            batch_count = len(batch)
            batch_mean = batch.mean(axis=0)
            total_count = self.count + batch_count
            # Difference between the mean of the batch and the mean of all earlier batches
            mean_shift = batch_mean - self._mean
            self._scatter = (
                self._scatter
                + (batch - batch_mean).T @ (batch - batch_mean)
                + np.outer(mean_shift, mean_shift) * (self.count * batch_count / total_count)
            )
            self._mean = self._mean + mean_shift * (batch_count / total_count)
            self.count = total_count
        return self

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean [F] and the unbiased covariance [F, F] of all samples.

        Raises: ValueError if fewer than two samples were added.
        """
        if self.count < 2:
            raise ValueError(
                f"FeatureStatistics: a covariance needs at least 2 samples, but {self.count} were added. Add"
                " features of more images with update()."
            )
        # A copy, so that callers cannot change the running mean
        return self._mean.copy(), self._scatter / (self.count - 1)

    def distance(self, other_statistics: "FeatureStatistics") -> float:
        """Compute the Fréchet distance between this set of samples and another one."""
        return frechet_distance(*self.moments(), *other_statistics.moments())


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray) -> float:
    """Compute the unbiased squared maximum mean discrepancy of two sets, without subsets (Bińkowski et al.
    2018).

    The kernel is k(x, y) = (x.y / F + 1)^3, where x.y is the inner product of two feature vectors.

    Args:
        features_1: features [N, F] of the first set, N >= 2.
        features_2: features [M, F] of the second set, M >= 2.

    Returns: the distance. Its expected value is 0 for equal distributions, so single values can be negative.
    Raises: ValueError if a set has fewer than 2 items.
    """
    first_features = np.asarray(features_1, dtype=np.float64)
    second_features = np.asarray(features_2, dtype=np.float64)
    if min(len(first_features), len(second_features)) < 2:
        raise ValueError(
            f"kernel_distance: each set needs at least 2 images, but the sets have {len(first_features)} and"
            f" {len(second_features)}. Add images."
        )

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    # Without the diagonal: the kernel of an item with itself would bias the estimate upwards.
    def mean_within(a: np.ndarray) -> float:
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(
        mean_within(first_features)
        + mean_within(second_features)
        - 2.0 * kernel(first_features, second_features).mean()
    )


@torch.no_grad()
def collect(network: FeatureNetwork, batches: Iterable[Tensor]) -> tuple[FeatureStatistics, np.ndarray]:
    """Compute the features of all images in batches with a network.

    Args:
        network: feature network.
        batches: batches of images [N, 3, H, W] in [-1, 1].

    Returns: the mean and covariance of the features, and all features, float32 [total, F], in order. total is
        the number of images of all batches; it is 0 if there is no batch.
    """
    statistics = FeatureStatistics(network.dim)
    all_features = []
    for images in batches:
        features = network(images)
        # FID needs the moments alone, which are summed in float64. KID needs the features, as float32.
        statistics.update(features)
        all_features.append(features.cpu().numpy())
    return statistics, np.concatenate(all_features) if all_features else np.zeros(
        (0, network.dim), dtype=np.float32
    )


def draw_subsets(
    n: int, m: int, subset_count: int = SUBSETS, max_subset_size: int = SUBSET_SIZE, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield random subsets of two sets, as pairs of index arrays ([S], [S]).

    S is the smallest of `max_subset_size`, n and m. No index is repeated inside a subset.

    Args:
        n: number of samples of the first set.
        m: number of samples of the second set.
        subset_count: number of pairs to yield.
        max_subset_size: largest number of samples in a subset.
        seed: random seed; the same seed gives the same subsets.
    """
    # A separate random stream: numpy's global one would make the result depend on earlier calls.
    rng = np.random.RandomState(seed)
    subset_size = min(max_subset_size, n, m)
    for _ in range(subset_count):
        yield rng.choice(n, subset_size, replace=False), rng.choice(m, subset_size, replace=False)


def kernel_inception_distance(
    features_1: np.ndarray,
    features_2: np.ndarray,
    seed: int = 0,
    subset_indices: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[float, float]:
    """Compute KID as published, the mean `kernel_distance` of random subsets. Lower is better.

    Equal arguments give equal values.

    Args:
        features_1: features [N, F] of the first set, N >= 2.
        features_2: features [M, F] of the second set, M >= 2.
        seed: random seed of the subsets; ignored if `subset_indices` is given.
        subset_indices: pairs of index arrays, one pair per subset, for the first and the second set; None
            samples them with `draw_subsets`.

    Returns: the mean over the subsets, and the standard deviation between subsets. The standard deviation is
        not a standard error, because subsets overlap.
    Raises: ValueError if a set has fewer than 2 items.
    """
    index_pairs = list(
        draw_subsets(len(features_1), len(features_2), SUBSETS, SUBSET_SIZE, seed)
        if subset_indices is None
        else subset_indices
    )
    subset_distances = [
        kernel_distance(features_1[indices_1], features_2[indices_2]) for indices_1, indices_2 in index_pairs
    ]
    return float(np.mean(subset_distances)), float(np.std(subset_distances))
