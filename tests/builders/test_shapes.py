"""Test the training of the shape features: it repeats exactly, and its distances order true, blurred and
damaged heads.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from builders import shapes
from builders.shapes import (
    ShapeTraining,
    frechet_distances,
    mirrored,
    train_shape_features,
    true_grids,
    true_maps,
)
from eg3d_rlhf.generators import latents
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, FEATURES, ShapeFeatures, normal_maps
from tests.measures.test_shape_features import heads
from tests.rejections import raising
from training.heads.people_mesh import grid_points

__all__ = ["heads"]


def test_mirrored_maps_are_those_of_the_mirror_image(heads):
    values = torch.from_numpy(heads[1][:1])
    torch.testing.assert_close(
        mirrored(normal_maps(values, (0.0,))), normal_maps(values.flip(1), (0.0,)), atol=1e-4, rtol=0
    )


QUICK = ShapeTraining(heads=5, reference=40, held_out=5, grid=16, epochs=1, batch=20)


def eggs(z, grid, on_shape=None):
    """Compute approximate signed distances of egg-like shapes, which are faster to make than heads."""
    return np.stack(
        [np.linalg.norm(grid_points(grid) * (1 + 0.1 * row[:3]), axis=-1) - 0.2 for row in z]
    ).astype(np.float32)


@pytest.fixture(scope="module")
def features(heads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "true_grids", eggs)
        return train_shape_features(heads[0], QUICK)


def test_training_repeats(features, heads, monkeypatch):
    monkeypatch.setattr(shapes, "true_grids", eggs)
    again = train_shape_features(heads[0], QUICK)
    assert torch.equal(features.true, again.true) and again.record == features.record
    assert features.true.shape == (40, FEATURES) and features.true.std(dim=0).allclose(
        torch.ones(FEATURES), atol=1e-3
    )


def test_the_file_holds_all_and_stays_small(features, heads, tmp_path):
    path = tmp_path / "shapes.safetensors"
    features.save(path)
    loaded = ShapeFeatures.load(path)
    maps = true_maps(heads[1][:3])
    assert torch.equal(loaded(maps), features(maps)) and loaded.frechet(maps) == features.frechet(maps)
    assert (
        loaded.record == json.loads(path.with_suffix(".json").read_text()) and path.stat().st_size < 400_000
    )
    path.write_bytes(path.read_bytes()[:-4])
    with raising(str(path)):
        ShapeFeatures.load(path)


@pytest.mark.long
def test_the_bundled_features_rank_true_blurred_and_broken_heads():
    z = latents(range(100), 64).numpy()
    figures = frechet_distances(ShapeFeatures.load(), z, true_grids(z, 64))
    true, *blurred, scans = figures.values()
    assert true < blurred[1] < blurred[2] < blurred[3] and blurred[1] > 1.1 * true and scans > 2 * true
    assert ShapeFeatures.load(DEFAULT_ASSET).record["frechet"].keys() == figures.keys()


def test_mistakes_leave_nothing(tmp_path):
    result = CliRunner().invoke(shapes.shapes, ["--heads=1", f"--out={tmp_path / 'x' / 'c.safetensors'}"])
    assert result.exit_code == 2 and "--heads" in result.stderr and not (tmp_path / "x").exists()
