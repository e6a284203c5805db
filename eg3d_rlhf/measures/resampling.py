"""Compute intervals of Fréchet and kernel distances by resampling, corrected for the bias of resampling.

A distance from N fakes and M reals is d = theta + L + Q: the true distance, a part that is linear in the
sampling error, and a quadratic part. Q has a positive mean for the Fréchet distance (the FID of finite
samples is too large, Bińkowski et al. 2018, Chong and Forsyth 2020). Sampling with replacement adds about the
same amount again, so that percentiles of resampled distances may not include the truth at all. This module
computes:
- Bias: mean(d*) - d over resamples is subtracted from d, after it was itself corrected once by resamples of
  resamples (Hall 1992, section 1.4).
- Width: the influence function (infinitesimal jackknife, Efron 1982) gives Var(L) + 2 Var(Q), since its
  slopes at the sample include those of Q. The variance of the resamples that it does not explain comes from Q
  alone and is Var(Q).
- Ends: for a change, z standard deviations to either side, where the variance is Var(L) + Var(Q). For a
  squared distance, Var(L) = k theta, so the ends solve |d - theta| = z sqrt(Var(Q) + k theta), as in Wilson's
  interval. k is the larger of two estimates: Var(L) over the corrected distance, and the influence function's
  variance over the distance with its bias. Both numerator and denominator of the second include Q in the same
  proportion. The first is unstable near zero: alone it leaves intervals below the truth in up to 12 % of
  studies.
- Variances are enlarged by 1 + (F/N + F/M) / 2 for a Fréchet distance, because the bias is estimated, and by
  1 + 3 / sqrt(min(N, M)) for a kernel distance, whose tails are heavy. Simulations confirm both factors
  (tests/measures/test_resampling.py).
Intervals are of theta, the distance that infinitely many samples would have. The bias that remains falls as
(F / N)^2; see `SAFE_SAMPLES`.
Shape letters: N fakes, M reals, F features, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from eg3d_rlhf.measures.distances import frechet_distance

# Samples of each set per feature from which on the Fréchet interval covered the truth at its nominal rate
SAFE_SAMPLES = 6
METHOD = "bias-corrected bootstrap, width from bootstrap and influence function"
_BLOCK_CELLS = 4_000_000  # entries of a Gram block that are in memory at once, 32 MB


class DistanceInterval(NamedTuple):
    """A bias-corrected distance, and the 95 % interval of the distance of infinitely many samples."""

    mean: float  # measured - bias; at least 0 for a Fréchet distance
    lo: float
    hi: float
    measured: float  # from all samples once each, the value that is usually reported
    bias: float  # bootstrap estimate of measured - theta


def frechet_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Compute the Fréchet distance of features [N, F] and [M, F] with its interval.

    The interval covers at its nominal rate with SAFE_SAMPLES samples of each set per feature. With fewer
    samples the corrected value is still too large. One resample takes four factorisations of F x F matrices:
    milliseconds at F = 64, seconds at F = 2048.
    Raises: ValueError if a feature is not finite, or a set has fewer than F + 1 samples.
    """
    features = _features("frechet_interval", features_fake, features_real)
    interval = _interval(_Frechet(*features), resamples, seed)
    # The distance is not negative, so neither are the ends of its interval.
    mean, lo, hi, measured = (max(0.0, value) for value in interval[:4])
    return DistanceInterval(mean, lo, hi, measured, interval.bias)


def kernel_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Compute the unbiased kernel distance (`kernel_distance`) of features [N, F] and [M, F] with its
    interval.

    A resample never compares an item with a copy of itself. Resampled distances are therefore unbiased too,
    and `bias` is 0.
    Raises: ValueError as `frechet_interval`, without the lower limit of F + 1 samples.
    """
    return _interval(_Kernel(*_features("kernel_interval", features_fake, features_real)), resamples, seed)


def frechet_change_interval(
    features_before: np.ndarray,
    features_after: np.ndarray,
    features_real: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
) -> DistanceInterval:
    """Compute the Fréchet distance after a change minus the one before, against the same reals [M, F].

    Args: features_before, features_after: fakes [N, F]; item i of both has the same latent and camera.
    Both sets are resampled with the same latents. What they have in common cancels, so the interval is
    narrower than the difference of two separate intervals.
    """
    before, after = (
        _Frechet(*_features("frechet_change_interval", x, features_real))
        for x in (features_before, features_after)
    )
    return _interval(_Change(before, after), resamples, seed)


def kernel_change_interval(
    features_before: np.ndarray,
    features_after: np.ndarray,
    features_real: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
) -> DistanceInterval:
    """Compute the kernel distance after minus before; see `frechet_change_interval` and `kernel_interval`."""
    before, after = (
        _Kernel(*_features("kernel_change_interval", x, features_real))
        for x in (features_before, features_after)
    )
    return _interval(_Change(before, after), resamples, seed)


def _features(caller: str, fake: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert both sets to float64 and check that they are finite and have at least 4 items."""
    fake = np.asarray(fake, dtype=np.float64)
    real = np.asarray(real, dtype=np.float64)
    if min(len(fake), len(real)) < 4:
        raise ValueError(
            f"{caller}: expected at least 4 images in each set, got {len(fake)} and {len(real)}. Add images."
        )
    if not (np.isfinite(fake).all() and np.isfinite(real).all()):
        raise ValueError(
            f"{caller}: expected finite features, got NaN or infinity. Check the images for NaN."
        )
    return fake, real


def _interval(statistic: "_Frechet | _Kernel | _Change", resamples: int, seed: int) -> DistanceInterval:
    """Compute the interval of a statistic as the module's docstring describes.

    The linear part of a resample has mean 0. It is subtracted before the bias is estimated, because it would
    only add noise to that estimate.
    """
    assert resamples >= 50
    rng = np.random.default_rng(seed)
    sizes = statistic.sizes
    slopes = statistic.influence()
    measured = float(statistic.resampled(*(np.ones((1, size)) for size in sizes))[0])
    # A resample is given by how often each item occurs in it: counts [B, N] and [B, M].
    draws = [rng.multinomial(size, np.full(size, 1 / size), resamples) for size in sizes]
    values = statistic.resampled(*draws)  # [B]
    first_order = values - _linear(draws, slopes) - measured
    # An unbiased statistic needs no correction, which would only add noise.
    bias = noise = 0.0
    if statistic.biased:
        # Second level: each resample is resampled with its own counts as weights.
        redraws = [rng.multinomial(size, counts / size) for size, counts in zip(sizes, draws, strict=True)]
        second_order = statistic.resampled(*redraws) - _linear(redraws, slopes) - measured
        estimates = 3 * first_order - second_order  # [B]: first - ((second - first) - first)
        bias = float(estimates.mean())
        noise = float(estimates.var(ddof=1)) / resamples  # variance of the estimated bias itself
    # Var(L) + 2 Var(Q), see "Width" in the module's docstring.
    influence = sum(float((slope**2).sum()) / (len(slope) * (len(slope) - 1)) for slope in slopes)
    # Var(Q) cannot exceed half of the influence variance, or the linear part would have a negative variance.
    quadratic = min(float(first_order.var(ddof=1)), influence / 2)
    linear, constant = ((1 + statistic.allowance) * part for part in (influence - 2 * quadratic, quadratic))
    z = float(ndtri(0.975))  # two-sided 95 %
    centre = measured - bias
    # A change is not a squared distance: its variance does not depend on theta, and its interval is
    # symmetric.
    if statistic.with_bias is None:
        half = z * math.sqrt(linear + constant + noise)
        return DistanceInterval(centre, centre - half, centre + half, measured, bias)
    # Two estimates of k in Var(L) = k theta, see "Ends" in the module's docstring. 1e-300 avoids a division
    # by 0.
    k_with_bias = (1 + statistic.allowance) * influence / max(statistic.with_bias(), 1e-300)
    # Below one standard deviation the denominator would be mostly noise, so it is bounded from below.
    k_corrected = linear / max(centre, math.sqrt(linear + constant), 1e-300)
    # The ends solve |centre - theta| = z sqrt(constant + noise + k theta), a quadratic equation in theta.
    middle = centre + z**2 * max(k_with_bias, k_corrected) / 2
    half = math.sqrt(max(middle**2 - centre**2 + z**2 * (constant + noise), 0.0))
    return DistanceInterval(centre, min(middle - half, centre), middle + half, measured, bias)


def _linear(draws: Sequence[np.ndarray], slopes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the first-order change [B] of the statistic for counts [B, N] and [B, M]."""
    return sum(counts @ slope / len(slope) for counts, slope in zip(draws, slopes, strict=True))


class _Frechet:
    """Fréchet distance of weighted samples. `_Kernel` and `_Change` have the same methods."""

    biased = True  # whether finite samples give too large a distance on average

    def __init__(self, fake: np.ndarray, real: np.ndarray) -> None:
        if min(len(fake), len(real)) <= fake.shape[1]:
            raise ValueError(
                f"frechet interval: expected more samples than the {fake.shape[1]} features, got {len(fake)}"
                f" and {len(real)}. Add images, or report the kernel distance, which needs no covariance."
            )
        self.fake = fake
        self.real = real
        self.sizes = (len(fake), len(real))
        # Share by which variances are enlarged, since the bias is only estimated
        self.allowance = (fake.shape[1] / len(fake) + fake.shape[1] / len(real)) / 2

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Compute the distances [B] of resamples that are given by counts [B, N] and [B, M]."""
        return np.array(
            [
                frechet_distance(*_moments(self.fake, w), *_moments(self.real, v))
                for w, v in zip(fake, real, strict=True)
            ]
        )

    def with_bias(self) -> float:
        """Compute the distance between the samples with their bias.

        It is 0 for equal samples and never negative.
        """
        return float(self.resampled(*(np.ones((1, size)) for size in self.sizes))[0])

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the derivatives with respect to the share of each item, [N] and [M], with mean 0.

        T = C_1^-1/2 (C_1^1/2 C_2 C_1^1/2)^1/2 C_1^-1/2 is the linear map that transports one Gaussian to the
        other. The derivative of d is I - T with respect to C_1, and 2 (m_1 - m_2) with respect to m_1. For
        the other set, T is replaced by its inverse, and the sign of the means changes.
        """
        fake, real = (_moments(part, np.ones(len(part))) for part in (self.fake, self.real))
        return _gaussian_influence(self.fake, *fake, *real), _gaussian_influence(self.real, *real, *fake)


def _gaussian_influence(
    x: np.ndarray, m_1: np.ndarray, c_1: np.ndarray, m_2: np.ndarray, c_2: np.ndarray
) -> np.ndarray:
    """Compute the derivative of the Fréchet distance with respect to the share of each item of x [N, F];
    [N].
    """
    root, inverse = _powers(c_1)
    transport = inverse @ _powers(root @ c_2 @ root)[0] @ inverse
    offset = x - m_1  # [N, F]
    # 2 (x - m_1).(m_1 - m_2) + (x - m_1)^T (I - T) (x - m_1)
    values = 2 * offset @ (m_1 - m_2) + np.einsum(
        "nf,fg,ng->n", offset, np.eye(len(m_1)) - transport, offset, optimize=True
    )
    # Shares sum to 1, so only derivatives up to a common constant are defined.
    return values - values.mean()


def _powers(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the symmetric square root of a matrix, and its pseudo-inverse."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    roots = np.sqrt(np.maximum(values, 0.0))
    # Smaller roots are rounding of zeros, whose inverse would be huge.
    kept = roots > 1e-7 * max(roots.max(initial=0.0), 1e-300)
    inverse = np.where(kept, 1.0 / np.where(kept, roots, 1.0), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def _moments(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean [F] and covariance [F, F] of x [N, F], with item i counted weights[i] times.

    The counts sum to N.
    """
    # A resample leaves out about 37 % of the items. They need no arithmetic.
    drawn = weights > 0
    x = x[drawn]
    weights = weights[drawn, None]
    total = weights.sum()
    mean = (weights * x).sum(axis=0) / total
    offset = x - mean
    # Unbiased for counts: the divisor is the sum of counts minus 1, not the number of different items.
    return mean, (weights * offset).T @ offset / (total - 1)


class _Kernel:
    """Unbiased kernel distance of weighted samples under k(x, y) = (x.y / F + 1)^3.

    Pairs of an item with itself never count, also if a resample contains the item several times.
    """

    biased = False  # see `_Frechet`

    def __init__(self, fake: np.ndarray, real: np.ndarray) -> None:
        self.fake = fake
        self.real = real
        self.sizes = (len(fake), len(real))
        self.allowance = 3 / math.sqrt(min(self.sizes))  # for heavy tails; confirmed by simulation

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Compute the distances [B] of resamples. The Gram matrices are computed once, in blocks of rows."""
        # The number of pairs without self-pairs is (sum w)^2 - sum w^2.
        within = [
            _weighted_sum(part, part, w, w, self_pairs=False) / (w.sum(axis=1) ** 2 - (w**2).sum(axis=1))
            for part, w in ((self.fake, fake), (self.real, real))
        ]
        across = _weighted_sum(self.fake, self.real, fake, real) / (fake.sum(axis=1) * real.sum(axis=1))
        return within[0] + within[1] - 2 * across

    def with_bias(self) -> float:
        """Compute the squared distance of mean embeddings, including pairs of an item with itself."""

        def mean(a: np.ndarray, b: np.ndarray) -> float:
            return float(_weighted_sum(a, b, np.ones((1, len(a))), np.ones((1, len(b))))[0]) / (
                len(a) * len(b)
            )

        return mean(self.fake, self.fake) + mean(self.real, self.real) - 2 * mean(self.fake, self.real)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the derivatives with respect to the share of each item, [N] and [M], with mean 0.

        The derivative is twice the mean kernel with the other items of the item's set, minus twice the mean
        kernel with the other set.
        """
        return _kernel_influence(self.fake, self.real), _kernel_influence(self.real, self.fake)


def _gram_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield row ranges of the Gram matrix k(a, b) and its values there, [rows, B]."""
    step = max(1, _BLOCK_CELLS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        yield rows, (a[rows] @ b.T / a.shape[1] + 1.0) ** 3


def _weighted_sum(
    a: np.ndarray, b: np.ndarray, w: np.ndarray, v: np.ndarray, self_pairs: bool = True
) -> np.ndarray:
    """Compute the sums [B] of w_i v_j k(a_i, b_j), without i = j if `self_pairs` is false."""
    total = np.zeros(len(w))
    for rows, gram in _gram_blocks(a, b):
        # With self_pairs = False, a and b are the same set, so the diagonal of the block starts at
        # rows.start.
        if not self_pairs:
            gram[np.arange(len(gram)), np.arange(rows.start, rows.stop)] = 0.0
        total += ((w[:, rows] @ gram) * v).sum(axis=1)
    return total


def _kernel_influence(items: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compute the derivative with respect to the share of each item [N], given the other set [M]; mean 0."""
    # Mean kernel of each item with the other items of its set: the diagonal is taken off.
    within = np.concatenate(
        [
            (gram.sum(axis=1) - gram[np.arange(len(gram)), np.arange(rows.start, rows.stop)])
            / (len(items) - 1)
            for rows, gram in _gram_blocks(items, items)
        ]
    )
    values = 2 * (within - np.concatenate([gram.mean(axis=1) for _, gram in _gram_blocks(items, other)]))
    return values - values.mean()


class _Change:
    """Second statistic minus the first, for fakes that are paired item by item and the same reals."""

    with_bias = None  # a difference is not a squared distance

    def __init__(self, before: _Frechet | _Kernel, after: _Frechet | _Kernel) -> None:
        assert before.sizes == after.sizes
        self.before = before
        self.after = after
        self.sizes = before.sizes
        self.biased = before.biased
        # Only the Fréchet allowance applies to a change.
        self.allowance = before.allowance if before.biased else 0.0

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Compute the differences [B] with the same resample for both statistics."""
        return self.after.resampled(fake, real) - self.before.resampled(fake, real)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the differences of the derivatives."""
        before = self.before.influence()
        after = self.after.influence()
        return after[0] - before[0], after[1] - before[1]
