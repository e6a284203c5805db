"""Test the training of the bundled feature network: distances rise with every kind of damage, and a repeated
run gives the same network.
"""

import pytest
import torch

from builders.features import (
    DAMAGES,
    FeatureTraining,
    adequacy,
    damage_batch,
    factors,
    read_images,
    to_float,
    train_features,
)
from eg3d_rlhf.measures.features import (
    DAMAGE_NAMES,
    DEFAULT_ASSET,
    DIM,
    FACTOR_NAMES,
    HeadFactorFeatures,
    HeadFactorNet,
    load_features,
)
from tests.rejections import raising
from training.synthetic_heads import load_truth, resolve_dataset


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Return 256 undamaged heads, uint8 [256, 3, 64, 64], and their factors. No training used their seed."""
    path = resolve_dataset(
        "synthetic:people64@n=256,seed=123", tmp_path_factory.mktemp("heads"), processes=1, progress=False
    )
    return read_images(path), factors(load_truth(path))


@pytest.fixture(scope="module")
def bundled():
    if not DEFAULT_ASSET.is_file():
        pytest.skip(f"bundled feature network not found at {DEFAULT_ASSET}; run python -m builders.features")
    return load_features()


def test_distance_rises_with_every_damage(bundled, heads):
    rows = adequacy(bundled, heads[0])
    assert [row.damage for row in rows] == list(DAMAGES)
    # with 128 images per half the smallest strength drowns in the sampling error; with 2000 every step rises
    for row in rows:
        rising = row.distances[1:]
        assert all(a < b for a, b in zip(rising, rising[1:], strict=False)), row
        assert row.distances[-1] > 2 * row.distances[0], row


def test_features_are_standardised_and_accept_other_sizes(bundled, heads):
    features = bundled(to_float(heads[0]))
    assert features.shape == (256, DIM)
    assert features.mean(0).abs().max() < 0.5 and (features.std(0) - 1).abs().max() < 0.5
    large = torch.nn.functional.interpolate(to_float(heads[0][:8]), scale_factor=2, mode="bilinear")
    assert (bundled(large) - features[:8]).abs().mean() < 0.3


def test_training_repeats_and_survives_saving(heads, tmp_path):
    options = FeatureTraining(epochs=2, batch=32)
    first = train_features(*heads, options)
    second = train_features(*heads, options)
    assert first.name == second.name and first.record == second.record
    first.save(tmp_path / "features.safetensors")
    loaded = HeadFactorFeatures.load(tmp_path / "features.safetensors")
    assert loaded.name == first.name and (tmp_path / "features.json").is_file()
    images = to_float(heads[0][:4])
    assert torch.equal(loaded(images), first(images))


@pytest.mark.parametrize("name", DAMAGES)
def test_no_strength_is_no_change(name, heads):
    images = to_float(heads[0][:4])
    damaged = DAMAGES[name][0](images, torch.zeros(4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(damaged, images, atol=1e-4, rtol=0)


def test_damage_is_reported_with_its_strength(heads):
    images = to_float(heads[0])
    damaged, strengths = damage_batch(images, torch.Generator().manual_seed(0))
    assert strengths.shape == (256, len(DAMAGE_NAMES)) and strengths.abs().max() <= 1
    changed = (damaged - images).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert torch.equal(changed, strengths.abs().sum(1) > 0)


def test_factors_are_what_a_picture_shows(heads):
    assert heads[1].shape == (256, len(FACTOR_NAMES)) and len(set(FACTOR_NAMES)) == len(FACTOR_NAMES)
    skin = heads[1][:, FACTOR_NAMES.index("skin")]
    middle = to_float(heads[0])[:, :, 28:44, 24:40].mean(dim=(1, 2, 3))
    assert torch.corrcoef(torch.stack([skin, middle]))[0, 1] > 0.8


def test_too_few_images_are_refused(heads):
    with raising("130", "10"):
        adequacy(HeadFactorFeatures(HeadFactorNet(), {}), heads[0][:10])
