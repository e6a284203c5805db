"""Intervals of Fréchet and kernel distances by resampling, with the bias that resampling has taken out.

A distance from N fakes and M reals is d = theta + L + Q: the truth, a part linear in the sampling error, and
a quadratic part. Q has a positive mean for the Fréchet distance (FID of finite samples lies above the truth,
Bińkowski et al. 2018, Chong and Forsyth 2020), and drawing with replacement adds about the same again, so
that percentiles of resampled distances can miss the truth altogether. Here:
- bias: mean(d*) - d over resamples, corrected once more by resamples of resamples (Hall 1992, section 1.4),
  is subtracted from d;
- width: the influence function (infinitesimal jackknife, Efron 1982) gives Var(L) + 2 Var(Q), since at the
  sample its slopes hold those of Q too; what it does not explain of the resamples is Q alone, of variance
  Var(Q);
- ends: of a change, z standard deviations to either side, of variance Var(L) + Var(Q). Of a squared distance,
  Var(L) = k theta, so the ends solve |d - theta| = z sqrt(Var(Q) + k theta), as of Wilson's interval. k is
  Var(L) over the corrected distance or, if that is more, the influence function's variance over the distance
  with its bias in it: both hold Q in the same proportion, while near zero the former is unsteady
  (alone it leaves intervals below the truth in up to 12 % of studies);
- variances are enlarged by 1 + (F/N + F/M) / 2 for a Fréchet distance, for the estimated bias, and by
  1 + 3 / sqrt(min(N, M)) for a kernel distance, whose tails are heavy: allowances that simulations bear out
  (tests/measures/test_resampling.py).
Intervals are of theta, the distance that endless samples would have. What is left of the bias falls with
(F / N)^2; see `SAFE_SAMPLES`.
Shape letters: N fakes, M reals, F features, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from eg3d_rlhf.measures.distances import frechet_distance

# samples of each set per feature from which the Fréchet interval was found to cover as stated
SAFE_SAMPLES = 6
METHOD = "bias-corrected bootstrap, width from bootstrap and influence function"
_BLOCK_CELLS = 4_000_000  # entries of a Gram block held at once, 32 MB


class DistanceInterval(NamedTuple):
    """A distance without its resampling bias, and the two-sided interval of the distance of
    endless samples.
    """

    mean: float  # measured - bias; not below 0 for a Fréchet distance
    lo: float
    hi: float
    measured: float  # from all samples as they are: what others report
    bias: float  # what the bootstrap says `measured` lies too high by


def frechet_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Fréchet distance of features [N, F] and [M, F] with its interval.

    Covers as stated with SAFE_SAMPLES samples of each set per feature; with fewer the corrected value stays
    too high. One resample costs four factorisations of F x F: milliseconds at F = 64, seconds at F = 2048.
    Raises: ValueError for values that are not finite, and fewer samples than F + 1.
    """
    found = _interval(_Frechet(*_features("frechet_interval", features_fake, features_real)), resamples, seed)
    mean, lo, hi, measured = (max(0.0, value) for value in found[:4])
    return DistanceInterval(mean, lo, hi, measured, found.bias)


def kernel_interval(
    features_fake: np.ndarray, features_real: np.ndarray, resamples: int = 200, seed: int = 0
) -> DistanceInterval:
    """Unbiased kernel distance (`kernel_distance`) of features [N, F] and [M, F] with its interval.

    An item drawn twice is not compared with itself, so the resampled distances carry no bias either, and
    `bias` is 0.
    Raises: ValueError as `frechet_interval`.
    """
    return _interval(_Kernel(*_features("kernel_interval", features_fake, features_real)), resamples, seed)


def frechet_change_interval(
    features_before: np.ndarray,
    features_after: np.ndarray,
    features_real: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
) -> DistanceInterval:
    """Fréchet distance after minus before, against the same reals [M, F]; item i of both fakes [N, F] has the
    same latent and camera.

    Latents are drawn in pairs, so what both have in common cancels: narrower than the difference of two
    intervals.
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
    """Kernel distance after minus before; see `frechet_change_interval` and `kernel_interval`."""
    before, after = (
        _Kernel(*_features("kernel_change_interval", x, features_real))
        for x in (features_before, features_after)
    )
    return _interval(_Change(before, after), resamples, seed)


def _features(who: str, fake: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fake = np.asarray(fake, dtype=np.float64)
    real = np.asarray(real, dtype=np.float64)
    if min(len(fake), len(real)) < 4:
        raise ValueError(
            f"{who}: expected 4 images or more in each set, got {len(fake)} and {len(real)}. Add images."
        )
    if not (np.isfinite(fake).all() and np.isfinite(real).all()):
        raise ValueError(f"{who}: expected finite features, got NaN or infinity. Look for NaN images.")
    return fake, real


def _interval(statistic: "_Frechet | _Kernel | _Change", resamples: int, seed: int) -> DistanceInterval:
    """See the module. The linear part of every resample has mean 0, so the bias is taken without it, and
    without its noise.
    """
    assert resamples >= 50
    rng = np.random.default_rng(seed)
    sizes = statistic.sizes
    slopes = statistic.influence()
    measured = float(statistic.resampled(*(np.ones((1, size)) for size in sizes))[0])
    # [B, N] and [B, M] counts
    draws = [rng.multinomial(size, np.full(size, 1 / size), resamples) for size in sizes]
    values = statistic.resampled(*draws)  # [B]
    once = values - _linear(draws, slopes) - measured
    bias = noise = 0.0
    if statistic.biased:
        again = [rng.multinomial(size, counts / size) for size, counts in zip(sizes, draws, strict=True)]
        twice = statistic.resampled(*again) - _linear(again, slopes) - measured
        estimates = 3 * once - twice  # [B]: once - ((twice - once) - once)
        bias = float(estimates.mean())
        noise = float(estimates.var(ddof=1)) / resamples
    influence = sum(float((slope**2).sum()) / (len(slope) * (len(slope) - 1)) for slope in slopes)
    quadratic = min(float(once.var(ddof=1)), influence / 2)
    linear, constant = ((1 + statistic.allowance) * part for part in (influence - 2 * quadratic, quadratic))
    z = float(ndtri(0.975))
    centre = measured - bias
    if statistic.with_bias is None:
        half = z * math.sqrt(linear + constant + noise)
        return DistanceInterval(centre, centre - half, centre + half, measured, bias)
    steady = (1 + statistic.allowance) * influence / max(statistic.with_bias(), 1e-300)
    # below one deviation the share of `linear` is not known
    own = linear / max(centre, math.sqrt(linear + constant), 1e-300)
    # ends theta of |centre - theta| = z sqrt(constant + noise + slope theta)
    middle = centre + z**2 * max(steady, own) / 2
    half = math.sqrt(max(middle**2 - centre**2 + z**2 * (constant + noise), 0.0))
    return DistanceInterval(centre, min(middle - half, centre), middle + half, measured, bias)


def _linear(draws: Sequence[np.ndarray], slopes: Sequence[np.ndarray]) -> np.ndarray:
    """[B] first-order change of the statistic under draws [B, N] and [B, M]."""
    return sum(counts @ slope / len(slope) for counts, slope in zip(draws, slopes, strict=True))


class _Frechet:
    """Fréchet distance of weighted samples; the other statistics have the same parts."""

    biased = True  # whether finite samples give too much on average

    def __init__(self, fake: np.ndarray, real: np.ndarray) -> None:
        if min(len(fake), len(real)) <= fake.shape[1]:
            raise ValueError(
                f"frechet interval: expected more samples than the {fake.shape[1]} features, got {len(fake)}"
                f" and {len(real)}. Add images, or report the kernel distance, which needs no covariance."
            )
        self.fake = fake
        self.real = real
        self.sizes = (len(fake), len(real))
        # share by which variances are enlarged
        self.allowance = (fake.shape[1] / len(fake) + fake.shape[1] / len(real)) / 2

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Values [B] for how often each item counts, [B, N] and [B, M]; one after the other."""
        return np.array(
            [
                frechet_distance(*_moments(self.fake, w), *_moments(self.real, v))
                for w, v in zip(fake, real, strict=True)
            ]
        )

    def with_bias(self) -> float:
        """The distance between the samples as they are, once each:
        0 for equal samples and no less for any.
        """
        return float(self.resampled(*(np.ones((1, size)) for size in self.sizes))[0])

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives with respect to the share of each item, [N] and [M], of mean 0.

        With T = C_1^-1/2 (C_1^1/2 C_2 C_1^1/2)^1/2 C_1^-1/2, the map that carries one Gaussian to the other:
        the derivative of d in C_1 is I - T, in the mean 2 (m_1 - m_2); for the other set T^-1 and the other
        sign.
        """
        fake, real = (_moments(part, np.ones(len(part))) for part in (self.fake, self.real))
        return _gaussian_influence(self.fake, *fake, *real), _gaussian_influence(self.real, *real, *fake)


def _gaussian_influence(
    x: np.ndarray, m_1: np.ndarray, c_1: np.ndarray, m_2: np.ndarray, c_2: np.ndarray
) -> np.ndarray:
    root, inverse = _powers(c_1)
    transport = inverse @ _powers(root @ c_2 @ root)[0] @ inverse
    offset = x - m_1
    values = 2 * offset @ (m_1 - m_2) + np.einsum(
        "nf,fg,ng->n", offset, np.eye(len(m_1)) - transport, offset, optimize=True
    )
    return values - values.mean()


def _powers(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square root, and its inverse where the matrix has rank."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    roots = np.sqrt(np.maximum(values, 0.0))
    kept = roots > 1e-7 * max(roots.max(initial=0.0), 1e-300)
    inverse = np.where(kept, 1.0 / np.where(kept, roots, 1.0), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def _moments(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and covariance [F, F] of x [N, F], item i counted weights[i] times; the counts sum to N."""
    drawn = weights > 0
    x = x[drawn]
    weights = weights[drawn, None]
    total = weights.sum()
    mean = (weights * x).sum(axis=0) / total
    offset = x - mean
    return mean, (weights * offset).T @ offset / (total - 1)


class _Kernel:
    """Unbiased kernel distance of weighted samples under k(x, y) = (x.y / F + 1)^3; pairs of an item with
    itself never count.
    """

    biased = False

    def __init__(self, fake: np.ndarray, real: np.ndarray) -> None:
        self.fake = fake
        self.real = real
        self.sizes = (len(fake), len(real))
        self.allowance = 3 / math.sqrt(min(self.sizes))

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """[B]; the Gram matrices are passed once, in blocks of rows."""
        within = [
            _weighted_sum(part, part, w, w, self_pairs=False) / (w.sum(axis=1) ** 2 - (w**2).sum(axis=1))
            for part, w in ((self.fake, fake), (self.real, real))
        ]
        across = _weighted_sum(self.fake, self.real, fake, real) / (fake.sum(axis=1) * real.sum(axis=1))
        return within[0] + within[1] - 2 * across

    def with_bias(self) -> float:
        """With every item compared with itself, too: the squared distance of mean embeddings."""

        def mean(a: np.ndarray, b: np.ndarray) -> float:
            return float(_weighted_sum(a, b, np.ones((1, len(a))), np.ones((1, len(b))))[0]) / (
                len(a) * len(b)
            )

        return mean(self.fake, self.fake) + mean(self.real, self.real) - 2 * mean(self.fake, self.real)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Twice the mean kernel with the own set without itself, less the mean kernel with the other;
        centred.
        """
        return _kernel_influence(self.fake, self.real), _kernel_influence(self.real, self.fake)


def _gram_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, _BLOCK_CELLS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        yield rows, (a[rows] @ b.T / a.shape[1] + 1.0) ** 3


def _weighted_sum(
    a: np.ndarray, b: np.ndarray, w: np.ndarray, v: np.ndarray, self_pairs: bool = True
) -> np.ndarray:
    """Sums [B] of w_i v_j k(a_i, b_j); without i = j where `self_pairs` is false."""
    total = np.zeros(len(w))
    for rows, gram in _gram_blocks(a, b):
        if not self_pairs:
            gram[np.arange(len(gram)), np.arange(rows.start, rows.stop)] = 0.0
        total += ((w[:, rows] @ gram) * v).sum(axis=1)
    return total


def _kernel_influence(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    within = np.concatenate(
        [
            (gram.sum(axis=1) - gram[np.arange(len(gram)), np.arange(rows.start, rows.stop)]) / (len(own) - 1)
            for rows, gram in _gram_blocks(own, own)
        ]
    )
    values = 2 * (within - np.concatenate([gram.mean(axis=1) for _, gram in _gram_blocks(own, other)]))
    return values - values.mean()


class _Change:
    """The second statistic minus the first, of fakes that are paired item by item and the same reals."""

    with_bias = None  # it is no squared distance

    def __init__(self, before: _Frechet | _Kernel, after: _Frechet | _Kernel) -> None:
        assert before.sizes == after.sizes
        self.before = before
        self.after = after
        self.sizes = before.sizes
        self.biased = before.biased
        self.allowance = before.allowance if before.biased else 0.0

    def resampled(self, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
        """[B] under one draw for both."""
        return self.after.resampled(fake, real) - self.before.resampled(fake, real)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Differences, since derivatives add."""
        before = self.before.influence()
        after = self.after.influence()
        return after[0] - before[0], after[1] - before[1]
