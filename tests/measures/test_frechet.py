"""Fréchet and kernel distances against closed forms, scipy's matrix root, and direct sums."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from eg3d_rlhf.measures.distances import FeatureStatistics, frechet_distance, kernel_distance


def _moments(seed: int, dim: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(seed)
    x = rng.randn(samples, dim) @ rng.randn(dim, dim) + rng.randn(dim)
    return x.mean(axis=0), np.cov(x.T)


@pytest.mark.parametrize("dim", [2, 8, 40])
def test_matches_the_matrix_square_root(dim):
    (mean_1, cov_1), (mean_2, cov_2) = _moments(0, dim, 400), _moments(1, dim, 400)
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-8)


def test_closed_form_of_diagonal_gaussians():
    std_1, std_2, shift = np.array([1.0, 2, 3]), np.array([2.0, 2, 0]), np.array([0.5, 0, -1])
    value = frechet_distance(np.zeros(3), np.diag(std_1**2), shift, np.diag(std_2**2))
    assert value == pytest.approx((shift**2).sum() + ((std_1 - std_2) ** 2).sum(), abs=1e-12)


def test_is_zero_on_itself_and_symmetric_even_without_full_rank():
    (mean_1, cov_1), (mean_2, cov_2) = _moments(2, 30, 10), _moments(3, 30, 12)
    assert frechet_distance(mean_1, cov_1, mean_1, cov_1) == pytest.approx(0.0, abs=1e-5 * np.trace(cov_1))
    forward, backward = frechet_distance(mean_1, cov_1, mean_2, cov_2), frechet_distance(mean_2, cov_2, mean_1, cov_1)
    assert forward == pytest.approx(backward, rel=1e-6)


def test_refuses_what_is_no_covariance():
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))
    with pytest.raises(ValueError, match="one size"):
        frechet_distance(np.zeros(1), np.eye(1), np.zeros(2), np.eye(2))


def test_streaming_equals_whole_set_at_any_split():
    x = np.random.RandomState(4).randn(57, 6) * 3 + 100
    whole = FeatureStatistics(6).update(x)
    parts = FeatureStatistics(6).update(x[:1]).update(torch.from_numpy(x[1:20])).update(x[:0]).update(x[20:])
    for statistics in (whole, parts):
        mean, cov = statistics.moments()
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-9, atol=1e-12)
    assert parts.count == 57
    assert whole.distance(parts) == pytest.approx(0.0, abs=1e-6)


def test_statistics_need_two_samples():
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStatistics(3).update(np.zeros((1, 3))).moments()


def test_kernel_distance_matches_direct_sums_and_is_centred():
    rng = np.random.RandomState(5)
    a, b = rng.randn(7, 3), rng.randn(5, 3) + 1
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    aa = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    bb = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    ab = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(aa + bb - 2 * ab)
    null = [kernel_distance(rng.randn(40, 4), rng.randn(40, 4)) for _ in range(200)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(200)
