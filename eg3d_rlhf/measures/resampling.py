"""Compute intervals of Fréchet and kernel distances by resampling, corrected for the bias of resampling.

Fakes are features of generated images, reals are features of images of a dataset. A distance d from N fakes
and M reals is d = theta + L + Q. Here theta is the true distance, which infinitely many samples would have, L
is the part of the error that is linear in the sampling error, and Q is the quadratic part. Q has a positive
mean for the Fréchet distance (the FID of finite samples is too large, Bińkowski et al. 2018, Chong and
Forsyth 2020). Sampling with replacement adds about the same amount again, so the percentiles of resampled
distances may not include theta at all. This module computes a 95 % interval of theta in these steps:
- Bias: the estimate mean(d*) - d over resampled distances d* is subtracted from d. This estimate is itself
  corrected once by resamples of resamples (Hall 1992, section 1.4).
- Width: the influence function (infinitesimal jackknife, Efron 1982) gives Var(L) + 2 Var(Q), since its
  slopes at the sample include the slopes of Q. The variance of the resamples that the influence function does
  not explain is Var(Q).
- Ends of the interval of a change (a difference of two distances): z standard deviations to either side of
  the corrected d, where z is the normal quantile (1.96) and the variance is Var(L) + Var(Q).
- Ends of the interval of a squared distance: here Var(L) = k theta with a constant k, so the ends solve
  |d - theta| = z sqrt(Var(Q) + k theta), as in Wilson's interval of a proportion. k is the larger one of two
  estimates. The first estimate is Var(L) over the corrected distance. It is unstable near zero: alone, it
  would leave intervals below the true value in up to 12 % of studies. The second estimate is the influence
  function's variance over the distance with its bias, which include Q in the same proportion.
- Variances are multiplied by 1 + (F/N + F/M) / 2 for a Fréchet distance, because the bias is estimated, and
  by 1 + 3 / sqrt(min(N, M)) for a kernel distance, because its distribution has heavy tails. Simulations
  confirm both factors (tests/measures/test_resampling.py).
The bias that remains after the correction falls as (F / N)^2; see `SAFE_SAMPLES`.

Shapes: N fakes, M reals, F features, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from eg3d_rlhf.measures.distances import frechet_distance

# Smallest number of samples of each set per feature for which 95 % of
# simulated Fréchet intervals included the true distance
SAFE_SAMPLES = 6
METHOD = "bias-corrected bootstrap, width from bootstrap and influence function"
_BLOCK_CELLS = 4_000_000  # largest number of Gram matrix entries in memory at once, 32 MB


class DistanceInterval(NamedTuple):
    """A bias-corrected distance, and the 95 % interval of the distance of infinitely many samples."""

    mean: float  # corrected distance, measured - bias; at least 0 for a Fréchet distance
    lo: float  # lower end of the interval
    hi: float  # upper end of the interval
    measured: float  # distance of all samples without a correction, the value that is usually reported
    bias: float  # bootstrap estimate of the difference between `measured` and the true distance


def frechet_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Compute the Fréchet distance of two sets of features with its 95 % interval.

    The interval includes the true distance in 95 % of cases if each set has at least SAFE_SAMPLES samples per
    feature. With fewer samples the corrected distance is still too large. One resample takes four
    factorisations of F x F matrices, which is milliseconds at F = 64 and seconds at F = 2048.

    Args:
        features_fake: features [N, F] of generated images.
        features_real: features [M, F] of real images.
        resamples: number of resamples B, >= 50.
        seed: random seed of the resamples.

    Raises: ValueError if a feature is not finite, or a set has fewer than F + 1 samples.
    """
    features = _features("frechet_interval", features_fake, features_real)
    distance_interval = _interval(_Frechet(*features), resamples, seed)
    # A Fréchet distance is not negative, but its estimates can be: raise them to 0. The bias stays as it is.
    corrected_distance, lo, hi, measured_distance = (
        max(0.0, distance_value) for distance_value in distance_interval[:4]
    )
    return DistanceInterval(corrected_distance, lo, hi, measured_distance, distance_interval.bias)


def kernel_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Compute the unbiased kernel distance of two sets of features with its 95 % interval.

    The distance is that of `distances.kernel_distance`.

    A resample never compares an item with a copy of itself. Resampled distances are therefore unbiased, too,
    and the field `bias` of the result is 0.

    Args:
        features_fake: features [N, F] of generated images, N >= 4.
        features_real: features [M, F] of real images, M >= 4.
        resamples: number of resamples B, >= 50.
        seed: random seed of the resamples.

    Raises: ValueError if a feature is not finite, or a set has fewer than 4 samples.
    """
    return _interval(_Kernel(*_features("kernel_interval", features_fake, features_real)), resamples, seed)


def frechet_change_interval(
    features_before: np.ndarray,
    features_after: np.ndarray,
    features_real: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
) -> DistanceInterval:
    """Compute the increase of the Fréchet distance to the reals by a change of the generator.

    The result is the distance after the change minus the distance before it, with its 95 % interval. The two
    sets of fakes are resampled with the same latents. Errors that the two distances share cancel, so the
    interval is narrower than the difference of two separate intervals.

    Args:
        features_before: features [N, F] of fakes before the change.
        features_after: features [N, F] of fakes after the change; item i has the latent and the camera of
            item i of `features_before`.
        features_real: features [M, F] of real images.
        resamples: number of resamples B, >= 50.
        seed: random seed of the resamples.

    Raises: ValueError if a feature is not finite, or a set has fewer than F + 1 samples.
    """
    statistic_before, statistic_after = (
        _Frechet(*_features("frechet_change_interval", features_fake, features_real))
        for features_fake in (features_before, features_after)
    )
    return _interval(_Change(statistic_before, statistic_after), resamples, seed)


def kernel_change_interval(
    features_before: np.ndarray,
    features_after: np.ndarray,
    features_real: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
) -> DistanceInterval:
    """Compute the increase of the kernel distance to the reals by a change of the generator.

    The result is the distance after the change minus the distance before it, with its 95 % interval.

    Args:
        features_before: features [N, F] of fakes before the change, N >= 4.
        features_after: features [N, F] of fakes after the change; item i has the latent and the camera of
            item i of `features_before`.
        features_real: features [M, F] of real images, M >= 4.
        resamples: number of resamples B, >= 50.
        seed: random seed of the resamples.

    Raises: ValueError if a feature is not finite, or a set has fewer than 4 samples.
    """
    statistic_before, statistic_after = (
        _Kernel(*_features("kernel_change_interval", features_fake, features_real))
        for features_fake in (features_before, features_after)
    )
    return _interval(_Change(statistic_before, statistic_after), resamples, seed)


def _features(
    caller: str, fake_features: np.ndarray, real_features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Convert the features of two sets to float64.

    Args:
        caller: name of the public function, with which the error message begins.
        fake_features: features [N, F] of generated images.
        real_features: features [M, F] of real images.

    Raises: ValueError if a set has fewer than 4 items or a feature is not finite.
    """
    fake_features = np.asarray(fake_features, dtype=np.float64)
    real_features = np.asarray(real_features, dtype=np.float64)
    if min(len(fake_features), len(real_features)) < 4:
        raise ValueError(
            f"{caller}: each set needs at least 4 images, but the sets have {len(fake_features)} fakes and"
            f" {len(real_features)} reals. Add images."
        )
    if not (np.isfinite(fake_features).all() and np.isfinite(real_features).all()):
        raise ValueError(f"{caller}: a feature is NaN or infinite. Check the images for NaN.")
    return fake_features, real_features


def _interval(statistic: "_Frechet | _Kernel | _Change", resamples: int, seed: int) -> DistanceInterval:
    """Compute the 95 % interval of a statistic as the module's docstring describes.

    The linear part of a resample has mean 0. It is subtracted before the bias is estimated, because it would
    only add noise to that estimate.

    Args:
        statistic: distance, or difference of two distances.
        resamples: number of resamples B, >= 50.
        seed: random seed of the resamples.
    """
    assert resamples >= 50
    rng = np.random.default_rng(seed)
    set_sizes = statistic.sizes
    slopes = statistic.influence()
    # Counts of 1 give the statistic of the original samples.
    measured_distance = float(statistic.resampled(*(np.ones((1, set_size)) for set_size in set_sizes))[0])
    # A resample is given by how often each item occurs in it: counts [B, N] and [B, M].
    count_sets = [
        rng.multinomial(set_size, np.full(set_size, 1 / set_size), resamples) for set_size in set_sizes
    ]
    resampled_distances = statistic.resampled(*count_sets)  # [B]
    # what the linear part does not explain, [B]
    first_remainders = resampled_distances - _linear(count_sets, slopes) - measured_distance
    # An unbiased statistic needs no correction, which would only add noise.
    bias = bias_variance = 0.0
    if statistic.biased:
        # Second level: each resample is resampled with its own counts as weights.
        second_count_sets = [
            rng.multinomial(set_size, resample_counts / set_size)
            for set_size, resample_counts in zip(set_sizes, count_sets, strict=True)
        ]
        second_remainders = (
            statistic.resampled(*second_count_sets) - _linear(second_count_sets, slopes) - measured_distance
        )
        # Bias estimate minus the bias of that estimate: first - ((second - first) - first), [B]
        bias_estimates = 3 * first_remainders - second_remainders
        bias = float(bias_estimates.mean())
        bias_variance = float(bias_estimates.var(ddof=1)) / resamples  # variance of the estimated bias itself
    # Var(L) + 2 Var(Q), see "Width" in the module's docstring.
    influence_variance = sum(float((slope**2).sum()) / (len(slope) * (len(slope) - 1)) for slope in slopes)
    # Var(Q) cannot exceed half of the influence variance, or the linear part would have a negative variance.
    quadratic_variance = min(float(first_remainders.var(ddof=1)), influence_variance / 2)
    # Var(L) and Var(Q), enlarged by the factor of the module's docstring
    linear_variance, constant_variance = (
        (1 + statistic.allowance) * variance
        for variance in (influence_variance - 2 * quadratic_variance, quadratic_variance)
    )
    z = float(ndtri(0.975))  # two-sided 95 %
    corrected_distance = measured_distance - bias
    # A change is not a squared distance: its variance does not
    # depend on theta, and its interval is symmetric.
    if statistic.with_bias is None:
        half_width = z * math.sqrt(linear_variance + constant_variance + bias_variance)
        return DistanceInterval(
            corrected_distance,
            corrected_distance - half_width,
            corrected_distance + half_width,
            measured_distance,
            bias,
        )
    # Two estimates of k in Var(L) = k theta, see "Ends" in the
    # module's docstring. 1e-300 avoids a division by 0.
    k_with_bias = (1 + statistic.allowance) * influence_variance / max(statistic.with_bias(), 1e-300)
    # Below one standard deviation the denominator would be mostly noise, so it is bounded from below.
    k_corrected = linear_variance / max(
        corrected_distance, math.sqrt(linear_variance + constant_variance), 1e-300
    )
    # The ends solve |corrected_distance - theta| = z sqrt(Var(Q) + bias_variance + k theta), a quadratic
    # equation in theta. Its two solutions lie at the same distance from interval_centre.
    interval_centre = corrected_distance + z**2 * max(k_with_bias, k_corrected) / 2
    half_width = math.sqrt(
        max(interval_centre**2 - corrected_distance**2 + z**2 * (constant_variance + bias_variance), 0.0)
    )
    return DistanceInterval(
        corrected_distance,
        min(interval_centre - half_width, corrected_distance),
        interval_centre + half_width,
        measured_distance,
        bias,
    )


def _linear(count_sets: Sequence[np.ndarray], slopes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the first-order change [B] of the statistic in resamples.

    Args:
        count_sets: counts [B, N] and [B, M] of the items in each resample.
        slopes: derivatives [N] and [M] with respect to the share of each item.
    """
    return sum(
        resample_counts @ slope / len(slope)
        for resample_counts, slope in zip(count_sets, slopes, strict=True)
    )


class _Frechet:
    """Fréchet distance between two sets in which each sample may count several times or not at all.

    `_Kernel` and `_Change` have the same interface.
    """

    biased = True  # True: finite samples give too large a distance on average

    def __init__(self, fake_features: np.ndarray, real_features: np.ndarray) -> None:
        if min(len(fake_features), len(real_features)) <= fake_features.shape[1]:
            raise ValueError(
                f"The Fréchet interval needs more samples than features ({fake_features.shape[1]}), but the"
                f" sets have {len(fake_features)} and {len(real_features)} samples. Add images, or use the"
                " kernel distance."
            )
        self.fake = fake_features
        self.real = real_features
        self.sizes = (len(fake_features), len(real_features))
        # Share by which `_interval` enlarges variances, because the bias is only estimated
        self.allowance = (
            fake_features.shape[1] / len(fake_features) + fake_features.shape[1] / len(real_features)
        ) / 2

    def resampled(self, fake_counts: np.ndarray, real_counts: np.ndarray) -> np.ndarray:
        """Compute the distances [B] of resamples.

        Args:
            fake_counts: counts [B, N] of the fakes in each resample.
            real_counts: counts [B, M] of the reals in each resample.
        """
        return np.array(
            [
                frechet_distance(*_moments(self.fake, fake_weights), *_moments(self.real, real_weights))
                for fake_weights, real_weights in zip(fake_counts, real_counts, strict=True)
            ]
        )

    def with_bias(self) -> float:
        """Compute the distance of the samples without a correction of its bias.

        The distance is 0 for equal samples and never negative.
        """
        return float(self.resampled(*(np.ones((1, set_size)) for set_size in self.sizes))[0])

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the derivatives of the distance with respect to the share of each fake [N] and real [M].

        The derivatives of each set have the mean 0. m_1 and C_1 are the mean and covariance of one set, m_2
        and C_2 those of the other set. T = C_1^-1/2 (C_1^1/2 C_2 C_1^1/2)^1/2 C_1^-1/2 is the linear map that
        transports the first Gaussian to the second. The derivative of d is I - T with respect to C_1, and
        2 (m_1 - m_2) with respect to m_1. For the other set, the indices 1 and 2 are exchanged.
        """
        fake_moments, real_moments = (
            _moments(set_features, np.ones(len(set_features))) for set_features in (self.fake, self.real)
        )
        return (
            _gaussian_influence(self.fake, *fake_moments, *real_moments),
            _gaussian_influence(self.real, *real_moments, *fake_moments),
        )


def _gaussian_influence(
    x: np.ndarray, m_1: np.ndarray, c_1: np.ndarray, m_2: np.ndarray, c_2: np.ndarray
) -> np.ndarray:
    """Compute the derivatives [N] of the Fréchet distance with respect to the share of each item of a set.

    Args:
        x: features [N, F] of the set.
        m_1: mean [F] of the set.
        c_1: covariance [F, F] of the set.
        m_2: mean [F] of the other set.
        c_2: covariance [F, F] of the other set.
    """
    c_1_root, c_1_inverse_root = _powers(c_1)  # c_1^1/2 and c_1^-1/2
    transport_map = c_1_inverse_root @ _powers(c_1_root @ c_2 @ c_1_root)[0] @ c_1_inverse_root
    offsets = x - m_1  # [N, F]
    # 2 (x - m_1).(m_1 - m_2) + (x - m_1)^T (I - T) (x - m_1)
    influences = 2 * offsets @ (m_1 - m_2) + np.einsum(
        "nf,fg,ng->n", offsets, np.eye(len(m_1)) - transport_map, offsets, optimize=True
    )
    # Shares sum to 1, so only derivatives up to a common constant are defined.
    return influences - influences.mean()


def _powers(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the symmetric square root of a covariance, and the pseudo-inverse of this square root.

    Args:
        covariance: covariance [F, F].

    Returns: the square root [F, F], and the pseudo-inverse [F, F] of the square root.
    """
    eigenvalues, eigenvectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root_eigenvalues = np.sqrt(np.maximum(eigenvalues, 0.0))
    # Smaller roots are zeros up to rounding, and their inverse would be huge. 1e-300 covers the zero matrix.
    is_nonzero = root_eigenvalues > 1e-7 * max(root_eigenvalues.max(initial=0.0), 1e-300)
    inverse_roots = np.where(is_nonzero, 1.0 / np.where(is_nonzero, root_eigenvalues, 1.0), 0.0)
    return (eigenvectors * root_eigenvalues) @ eigenvectors.T, (eigenvectors * inverse_roots) @ eigenvectors.T


def _moments(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean [F] and covariance [F, F] of items that count several times or not at all.

    Args:
        x: features [N, F] of the items.
        weights: number of times [N] that each item counts, with the sum N.
    """
    # A resample leaves out about 37 % of the items, and items that count 0 times need no arithmetic.
    is_present = weights > 0
    x = x[is_present]
    weights = weights[is_present, None]
    weight_sum = weights.sum()
    mean = (weights * x).sum(axis=0) / weight_sum
    centred_features = x - mean
    # Unbiased for counts: the divisor is the sum of counts minus 1, not the number of different items.
    return mean, (weights * centred_features).T @ centred_features / (weight_sum - 1)


class _Kernel:
    """Unbiased kernel distance between two sets in which each sample may count several times or not at all.

    The kernel is k(x, y) = (x.y / F + 1)^3.

    Pairs of an item with itself never count, even if a resample contains the item several times.
    """

    biased = False  # False: the distance of finite samples is correct on average

    def __init__(self, fake_features: np.ndarray, real_features: np.ndarray) -> None:
        self.fake = fake_features
        self.real = real_features
        self.sizes = (len(fake_features), len(real_features))
        # Share by which `_interval` enlarges variances, because the distance has heavy tails. The factor 3
        # was confirmed by simulation.
        self.allowance = 3 / math.sqrt(min(self.sizes))

    def resampled(self, fake_counts: np.ndarray, real_counts: np.ndarray) -> np.ndarray:
        """Compute the distances [B] of resamples.

        The Gram matrices are computed once for all resamples, in blocks of rows.

        Args:
            fake_counts: counts [B, N] of the fakes in each resample.
            real_counts: counts [B, M] of the reals in each resample.
        """
        # Mean kernel within each set. With counts w, (sum w)^2 - sum
        # w^2 pairs are no pair of an item with itself.
        within_means = [
            _weighted_sum(set_features, set_features, w, w, self_pairs=False)
            / (w.sum(axis=1) ** 2 - (w**2).sum(axis=1))
            for set_features, w in ((self.fake, fake_counts), (self.real, real_counts))
        ]
        across_means = _weighted_sum(self.fake, self.real, fake_counts, real_counts) / (
            fake_counts.sum(axis=1) * real_counts.sum(axis=1)
        )
        return within_means[0] + within_means[1] - 2 * across_means

    def with_bias(self) -> float:
        """Compute the biased kernel distance, which includes pairs of an item with itself.

        It is the squared distance between the mean embeddings of both sets, so it is never negative.
        """

        def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
            return float(_weighted_sum(a, b, np.ones((1, len(a))), np.ones((1, len(b))))[0]) / (
                len(a) * len(b)
            )

        return (
            mean_kernel(self.fake, self.fake)
            + mean_kernel(self.real, self.real)
            - 2 * mean_kernel(self.fake, self.real)
        )

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the derivatives of the distance with respect to the share of each fake [N] and real [M].

        The derivatives of each set have the mean 0. Up to a constant, an item's derivative is twice its mean
        kernel with the other items of its set, minus twice its mean kernel with the items of the other set.
        """
        return _kernel_influence(self.fake, self.real), _kernel_influence(self.real, self.fake)


def _gram_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the Gram matrix k(a, b) in blocks of rows, as pairs of the row range and the values.

    Args:
        a: features [N, F], one row of the matrix each.
        b: features [M, F], one column of the matrix each.
    """
    block_size = max(1, _BLOCK_CELLS // len(b))
    for block_start in range(0, len(a), block_size):
        block_rows = slice(block_start, min(block_start + block_size, len(a)))
        yield block_rows, (a[block_rows] @ b.T / a.shape[1] + 1.0) ** 3


def _weighted_sum(
    a: np.ndarray, b: np.ndarray, w: np.ndarray, v: np.ndarray, self_pairs: bool = True
) -> np.ndarray:
    """Compute the sums [B] of w_i v_j k(a_i, b_j) over all pairs (i, j).

    Args:
        a: features [N, F] of the first set.
        b: features [M, F] of the second set.
        w: counts [B, N] of the items of the first set.
        v: counts [B, M] of the items of the second set.
        self_pairs: False leaves out pairs with i = j; both sets must then be the same.
    """
    kernel_sums = np.zeros(len(w))
    for block_rows, gram in _gram_blocks(a, b):
        if not self_pairs:
            # The diagonal of the complete matrix starts at column rows.start in this block.
            gram[np.arange(len(gram)), np.arange(block_rows.start, block_rows.stop)] = 0.0
        kernel_sums += ((w[:, block_rows] @ gram) * v).sum(axis=1)
    return kernel_sums


def _kernel_influence(set_features: np.ndarray, other_features: np.ndarray) -> np.ndarray:
    """Compute the derivatives [N] of the kernel distance with respect to the share of each item of a set.

    Args:
        set_features: features [N, F] of the set.
        other_features: features [M, F] of the other set.
    """
    # Mean kernel of each item with the other items of its set: the diagonal of the Gram matrix is subtracted.
    within_means = np.concatenate(
        [
            (gram.sum(axis=1) - gram[np.arange(len(gram)), np.arange(block_rows.start, block_rows.stop)])
            / (len(set_features) - 1)
            for block_rows, gram in _gram_blocks(set_features, set_features)
        ]
    )
    influences = 2 * (
        within_means
        - np.concatenate([gram.mean(axis=1) for _, gram in _gram_blocks(set_features, other_features)])
    )
    # Shares sum to 1, so only derivatives up to a common constant are defined.
    return influences - influences.mean()


class _Change:
    """Difference of two distances, after a change minus before it, against the same reals.

    Args:
        statistic_before: distance before the change.
        statistic_after: distance after the change; its fake i has the latent of fake i before the change.
    """

    with_bias = None  # None: a difference is not a squared distance, see `_interval`

    def __init__(self, statistic_before: _Frechet | _Kernel, statistic_after: _Frechet | _Kernel) -> None:
        assert statistic_before.sizes == statistic_after.sizes
        self.before = statistic_before
        self.after = statistic_after
        self.sizes = statistic_before.sizes
        self.biased = statistic_before.biased
        # Only the Fréchet allowance applies to a change.
        self.allowance = statistic_before.allowance if statistic_before.biased else 0.0

    def resampled(self, fake_counts: np.ndarray, real_counts: np.ndarray) -> np.ndarray:
        """Compute the differences [B], with the same resamples for both statistics.

        Args:
            fake_counts: counts [B, N] of the fakes in each resample.
            real_counts: counts [B, M] of the reals in each resample.
        """
        return self.after.resampled(fake_counts, real_counts) - self.before.resampled(
            fake_counts, real_counts
        )

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives of the difference with respect to the shares of all items.

        Returns: the derivatives [N] for the fakes, and the derivatives [M] for the reals.
        """
        influence_before = self.before.influence()
        influence_after = self.after.influence()
        return influence_after[0] - influence_before[0], influence_after[1] - influence_before[1]
