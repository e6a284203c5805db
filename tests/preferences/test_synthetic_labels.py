"""Labels from a stand-in generator of known heads: repeatable, disjoint, and mostly in favour of the smoother head."""

import json
import types

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds, CameraFamily
from eg3d_rlhf.preferences.annotator import ANNOTATOR
from eg3d_rlhf.preferences.labels import load_labels, write_labels
from eg3d_rlhf.preferences.synthetic import AnnotationOptions, annotate


class _Heads:
    """Stands in for a generator: a ball with waves whose amplitude is the latent's first number."""

    z_dim, bounds, cameras = 4, Bounds(), CameraFamily()
    module = torch.nn.Linear(1, 1)

    def mapping(self, z, c, truncation_psi, truncation_cutoff):
        assert c.shape == (len(z), 25) and truncation_cutoff == 14
        return (truncation_psi * z)[:, None]

    def field(self, ws):
        return types.SimpleNamespace(density_grid=lambda spec: _grid(ws, spec))


def _grid(ws, spec):
    x, y, z = spec.axes()
    z, y, x = torch.meshgrid(z, y, x, indexing="ij")
    waves = torch.sin(80 * x) * torch.sin(75 * y + 1) * torch.sin(70 * z)
    amplitude = ws[:, 0, 0].abs()[:, None, None, None]
    distance = (x * x + y * y + z * z).sqrt() - 0.3
    return 10 - 600 * (distance + 0.006 * amplitude * waves)


@pytest.fixture
def generator():
    return _Heads()


OPTIONS = AnnotationOptions(pairs=20, resolution=32, batch=7, flip_rate=0.1)


def test_annotation_repeats_whatever_the_batch(generator):
    first, second = annotate(generator, OPTIONS), annotate(generator, AnnotationOptions(pairs=20, resolution=32, batch=40, flip_rate=0.1))
    assert first.labels == second.labels and first.temperature == second.temperature
    np.testing.assert_array_equal(first.utilities, second.utilities)


def test_every_seed_is_used_once_and_clean_means_the_better_one_won(generator):
    annotation = annotate(generator, AnnotationOptions(pairs=20, first_seed=100, resolution=32))
    assert sorted(seed for label in annotation.labels for seed in (label.winner, label.loser)) == list(range(100, 140))
    for label in annotation.labels:
        better = annotation.utilities[label.winner - 100] >= annotation.utilities[label.loser - 100]
        assert label.clean == better


def test_smoother_heads_win(generator):
    annotation = annotate(generator, AnnotationOptions(pairs=20, resolution=32, flip_rate=0.0))
    amplitude = [abs(np.random.RandomState(seed).randn(4)[0]) for seed in range(40)]
    assert np.mean([amplitude[label.winner] < amplitude[label.loser] for label in annotation.labels]) > 0.8


def test_labels_survive_the_open_format(generator, tmp_path):
    annotation = annotate(generator, OPTIONS)
    labels = load_labels(write_labels(tmp_path / "labels.jsonl", annotation.preferences("abc")))
    assert labels == annotation.preferences("abc") and len(labels) == 20
    assert set(labels[0].to_dict()) == {"winner", "loser", "generator", "psi", "annotator", "clean"}
    assert labels[0].generator == "abc" and labels[0].annotator == ANNOTATOR
    summary = json.loads(json.dumps(annotation.summary()))
    assert summary["flipped"] == sum(label.clean == label.loser for label in labels)


def test_calibration_is_recorded_and_progress_reported(generator):
    seen = []
    annotation = annotate(generator, AnnotationOptions(pairs=6, resolution=32, calibrate=8), on_seed=seen.append)
    assert len(seen) == 12 and annotation.calibration.samples == 8


@pytest.mark.parametrize(("settings", "field"), [({"pairs": 0}, "pairs"), ({"flip_rate": 0.5}, "flip_rate"), ({"calibrate": 2}, "4 ")])
def test_mistakes_are_named(settings, field):
    with pytest.raises(ValueError, match=field):
        AnnotationOptions(**settings)


def test_pairs_that_are_handed_in_are_labelled_with_a_given_noise(generator):
    pairs = [(7, 300), (12, 40), (5, 6)]
    options = AnnotationOptions(pairs=3, resolution=32)
    annotation = annotate(generator, options, pairs=pairs, temperature=0.0)
    assert [{label.winner, label.loser} for label in annotation.labels] == [set(pair) for pair in pairs]
    assert annotation.temperature == 0.0 and all(label.clean for label in annotation.labels)
    alone = annotate(generator, AnnotationOptions(pairs=1, first_seed=5, resolution=32), temperature=0.0)
    assert {tuple(sorted(annotation.utilities[4:]))} == {tuple(sorted(alone.utilities))}
