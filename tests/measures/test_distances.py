"""Compare Fréchet and kernel distances with closed forms, direct sums, and torchmetrics on the same
features.
"""

import numpy as np
import pytest
import torch
from torch import nn

from eg3d_rlhf.measures.distances import (
    FeatureStatistics,
    collect,
    draw_subsets,
    frechet_distance,
    kernel_distance,
    kernel_inception_distance,
)
from tests.rejections import raising

MISSING = "torchmetrics is not installed: pip install 'eg3d-rlhf[dev]'"


def test_a_matrix_that_is_not_a_covariance_is_rejected():
    for covariances in ((np.diag([1.0, -1.0]), np.eye(2)), (np.eye(2), np.diag([1.0, -1.0]))):
        with raising("covariance", "1"):
            frechet_distance(np.zeros(2), covariances[0], np.zeros(2), covariances[1])
    with raising("finite", "NaN"):
        frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))
    with raising("2", "1"):
        FeatureStatistics(3).update(np.zeros((1, 3))).moments()


def test_streaming_equals_the_complete_set_at_any_split():
    x = np.random.RandomState(4).randn(57, 6) * 3 + 100
    complete = FeatureStatistics(6).update(x)
    parts = FeatureStatistics(6).update(x[:1]).update(torch.from_numpy(x[1:20])).update(x[:0]).update(x[20:])
    for statistics in (complete, parts):
        mean, cov = statistics.moments()
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-9, atol=1e-12)
    assert parts.count == 57
    assert complete.distance(parts) == pytest.approx(0.0, abs=1e-6)


def test_kernel_distance_matches_direct_sums_and_is_centred():
    rng = np.random.RandomState(5)
    a = rng.randn(7, 3)
    b = rng.randn(5, 3) + 1
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    aa = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    bb = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    ab = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(aa + bb - 2 * ab)
    null = [kernel_distance(rng.randn(40, 4), rng.randn(40, 4)) for _ in range(200)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(200)


RELATIVE = 1e-4  # tolerance relative to the value of torchmetrics


class Detector(nn.Module):
    """A small random feature module with the interface of torchmetrics: uint8 images in, features out."""

    def __init__(self, dim: int = 24):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(dim, 3 * 8 * 8, generator=generator) / 14)
        self.name = "detector"
        self.dim = dim
        self.num_features = dim

    def forward(self, images):
        pixels = nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1)
        return torch.relu(pixels @ self.weight.T) + 0.1 * (pixels @ self.weight.T)


def images(n, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 200 + shift
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear").round().clamp(0, 255).to(torch.uint8)


def features(detector, pixels):
    """Compute features and their statistics with `collect`."""
    return collect(detector, pixels.split(50))


@pytest.mark.parametrize("dim", [24, pytest.param(2048, marks=pytest.mark.long)])
def test_fid_equals_torchmetrics_with_the_same_module(dim):
    image = pytest.importorskip("torchmetrics.image.fid", reason=MISSING)
    detector = Detector(dim)
    real = images(300, 1)
    fake = images(260, 2, 30)
    metric = image.FrechetInceptionDistance(feature=detector, normalize=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = features(detector, fake)[0].distance(features(detector, real)[0])
    assert ours == pytest.approx(float(metric.compute()), rel=RELATIVE)


def test_kid_equals_torchmetrics_on_the_same_subsets():
    image = pytest.importorskip("torchmetrics.image.kid", reason=MISSING)
    detector = Detector()
    real = images(300, 1)
    fake = images(260, 2, 30)
    metric = image.KernelInceptionDistance(feature=detector, subsets=7, subset_size=50, normalize=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    torch.manual_seed(5)
    mean, std = (float(value) for value in metric.compute())
    torch.manual_seed(5)
    draws = [(torch.randperm(300)[:50].numpy(), torch.randperm(260)[:50].numpy()) for _ in range(7)]
    ours = kernel_inception_distance(
        features(detector, real)[1], features(detector, fake)[1], subset_indices=draws
    )
    assert ours == (pytest.approx(mean, rel=RELATIVE), pytest.approx(std, rel=1e-2))


def moments(seed, dim, samples):
    """Return moments of features whose variance falls off as that of a network's features does."""
    random = np.random.RandomState(seed)
    scale = 1 / np.sqrt(1 + np.arange(dim))
    rows = np.maximum(random.randn(samples, dim) * scale + 0.2 * random.randn(dim) * scale, -0.5)
    return FeatureStatistics(dim).update(rows).moments()


def reference(mean_1, cov_1, mean_2, cov_2):
    """Compute Heusel et al.'s formula with the eigenvalues of the unsymmetric product."""
    cross = np.sqrt(np.linalg.eigvals(cov_1 @ cov_2).astype(complex)).real.sum()
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross


@pytest.mark.parametrize("samples", [60, 400])
def test_frechet_distance_with_and_without_full_rank(samples):
    first = moments(0, 100, samples)
    second = moments(1, 100, samples)
    assert frechet_distance(*first, *second) == pytest.approx(reference(*first, *second), rel=1e-6)
    assert frechet_distance(*second, *first) == pytest.approx(frechet_distance(*first, *second), rel=1e-6)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-5 * np.trace(first[1]))


def test_subsets_have_no_repeated_items_and_depend_on_the_seed():
    draws = list(draw_subsets(9, 7, subset_count=5, max_subset_size=20, seed=3))
    assert len(draws) == 5
    for first, second in draws:
        # size of the smaller set
        assert len(set(first)) == len(first) == len(second) == len(set(second)) == 7
        assert first.max() < 9 and second.max() < 7
    again = list(draw_subsets(9, 7, subset_count=5, max_subset_size=20, seed=3))
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(draws, again, strict=True))
    assert any(set(a[0]) != set(b[0]) for a, b in zip(draws, draw_subsets(9, 7, 5, 20, seed=4), strict=True))
