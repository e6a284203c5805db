"""Test simulated labels of a substitute generator, whose shapes lack parts of the ground-truth heads."""

import json
import types

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds, CameraFamily
from eg3d_rlhf.preferences import synthetic
from eg3d_rlhf.preferences.annotator import ANNOTATOR
from eg3d_rlhf.preferences.labels import load_labels, write_labels
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.preferences.synthetic import annotate, evaluate_seeds, shape_values
from tests.rejections import raising

RADIUS = 0.3


class _Heads:
    """Substitute for a generator. Its shapes are balls that are cut off behind a plane.

    The depth of the plane is the first number of the latent.
    """

    z_dim = 64
    bounds = Bounds()
    cameras = CameraFamily()
    module = torch.nn.Linear(1, 1)

    def mapping(self, z, c, truncation_psi, truncation_cutoff):
        assert c.shape == (len(z), 25)
        return (truncation_psi * z)[:, None]

    def field(self, ws):
        return types.SimpleNamespace(bounds=self.bounds, level=10.0, density_grid=lambda spec: _cut(ws, spec))


def _cut(ws, spec):
    x, y, z = spec.axes()
    z, y, x = torch.meshgrid(z, y, x, indexing="ij")
    distance = (x * x + y * y + z * z).sqrt() - RADIUS
    cut = -RADIUS + 0.1 * ws[:, 0, 0].abs()[:, None, None, None]
    return 10 - 600 * torch.maximum(distance, cut - z)


@pytest.fixture
def generator(monkeypatch):
    def balls(z, n=64):
        steps = (np.arange(n) + 0.5) / n - 0.5
        x, y, z_ = np.meshgrid(steps, steps, steps, indexing="ij")
        return np.repeat((np.sqrt(x * x + y * y + z_ * z_) - RADIUS).astype(np.float32)[None], len(z), axis=0)

    monkeypatch.setattr(synthetic.people_mesh, "ground_truth_grids", balls, raising=False)
    return _Heads()


OPTIONS = AnnotationOptions(pairs=28, resolution=32, batch=3, flip_rate=0.1)


def test_shapes_are_read_at_the_middles_of_voxels_along_x_y_z():
    ws = torch.zeros(1, 1, 64)
    ws[0, 0, 0] = 2.0
    shape_grid = shape_values(_Heads().field(ws), 16)[0]
    middles = (np.arange(16) + 0.5) / 16 - 0.5
    # at the back of the head
    assert shape_grid[8, 8, 0] == pytest.approx(600 * (-0.1 - middles[0]), rel=1e-4)
    assert shape_grid[0, 8, 8] == pytest.approx(600 * (np.linalg.norm(middles[[0, 8, 8]]) - RADIUS), rel=1e-4)


def test_annotation_repeats_whatever_the_batch(generator):
    first = annotate(generator, OPTIONS)
    second = annotate(generator, AnnotationOptions(pairs=28, resolution=32, batch=40, flip_rate=0.1))
    assert first.labels == second.labels and first.temperature == second.temperature
    np.testing.assert_array_equal(first.utilities, second.utilities)


def test_all_pairs_of_a_block_are_labelled_and_clean_means_the_better_one_won(generator):
    annotation = annotate(generator, AnnotationOptions(pairs=12, block=4, first_seed=100, resolution=32))
    assert list(annotation.evaluations) == list(range(100, 108)) and len(annotation.labels) == 12
    for label in annotation.labels:
        assert label.clean == (
            annotation.evaluations[label.winner].total >= annotation.evaluations[label.loser].total
        )


def test_intact_heads_win(generator):
    annotation = annotate(generator, AnnotationOptions(pairs=112, resolution=16, flip_rate=0.0))
    cut = {seed: abs(np.random.RandomState(seed).randn(64)[0]) for seed in annotation.evaluations}
    share = np.mean([cut[label.winner] < cut[label.loser] for label in annotation.labels])
    assert share >= 0.9
    assert np.mean([label.clean for label in annotation.labels]) == pytest.approx(share, abs=0.1)


def test_labels_survive_the_open_format(generator, tmp_path):
    annotation = annotate(generator, OPTIONS)
    labels = load_labels(write_labels(tmp_path / "labels.jsonl", annotation.preferences("abc")))
    assert labels == annotation.preferences("abc") and len(labels) == 28
    assert set(labels[0].to_dict()) == {"winner", "loser", "generator", "psi", "annotator", "clean", "gap"}
    assert labels[0].generator == "abc" and labels[0].annotator == ANNOTATOR and labels[0].psi == 1
    summary = json.loads(json.dumps(annotation.summary()))
    assert summary["flipped"] == sum(label.clean == label.loser for label in labels)
    assert (
        summary["agreement"] == pytest.approx(1 - summary["flipped"] / 28, abs=1e-3) and summary["seeds"] == 8
    )


def test_progress_is_reported(generator):
    seen = []
    annotate(generator, OPTIONS, on_seed=seen.append)
    assert [evaluation.total for evaluation in seen] == annotate(generator, OPTIONS).utilities.tolist()


def test_a_truncated_scan_is_compared_with_the_head_of_the_untruncated_latent(generator):
    untruncated, half = (list(evaluate_seeds(generator, [3], resolution=32, psi=psi)) for psi in (1.0, 0.5))
    assert half[0].defects["missing"] < untruncated[0].defects["missing"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"pairs": 0}, "pairs"), ({"flip_rate": 0.5}, "flip_rate"), ({"block": 1}, "block")],
)
def test_mistakes_are_named(settings, field):
    with raising(field, str(settings[field])):
        AnnotationOptions(**settings)


@pytest.mark.parametrize("changed", [{"z_dim": 8}, {"bounds": Bounds(side=2.0)}])
def test_a_generator_of_other_objects_is_rejected(generator, changed):
    for name, value in changed.items():
        setattr(generator, name, value)
    with raising("--network", "synthetic:people64"):
        annotate(generator, OPTIONS)


def test_pairs_that_are_handed_in_are_labelled_with_a_given_noise(generator):
    pairs = [(7, 300), (12, 40), (7, 6)]
    annotation = annotate(generator, AnnotationOptions(pairs=3, resolution=32), pairs=pairs, temperature=0.0)
    assert [{label.winner, label.loser} for label in annotation.labels] == [set(pair) for pair in pairs]
    assert (
        annotation.temperature == 0.0
        and all(label.clean for label in annotation.labels)
        and len(annotation.evaluations) == 5
    )
