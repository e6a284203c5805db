"""Distances of images, precision and recall, diversity: a generator against itself, against a collapsed one, and what is missing."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation import distances
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.reports import jobs


class Means:
    """A feature network with few features, so that few images carry a covariance."""

    name, dim = "means", 3

    def __call__(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture()
def few_features(monkeypatch):
    monkeypatch.setattr(distances, "load_features", lambda *_: Means())


def test_a_generator_against_itself(unchanged, few_features, tmp_path):
    found = distances.distances(unchanged, tmp_path)
    by = {(row["distance"], row["role"]): row for row in found.data["distances"]}
    assert set(by) == {(d, r) for d in ("Fréchet", "kernel") for r in ("before", "after")}
    assert by["Fréchet", "before"]["measured"] == by["Fréchet", "after"]["measured"] > 0
    for change in found.data["changes"]:
        assert change["measured"] == 0 and change["lo"] <= 0 <= change["hi"]
    assert "neither shown nearer" in " ".join(found.says)


def test_images_moved_away_are_told(unchanged, few_features, tmp_path):
    G = copy.deepcopy(unchanged.after.G)
    synthesis = G.synthesis
    G.synthesis = lambda *a, **k: {**(out := synthesis(*a, **k)), "image": out["image"] + 3.0}
    c = Comparison(**{**vars(unchanged), "after": dataclasses.replace(unchanged.after, G=G, hash="moved")})
    found = distances.distances(c, tmp_path)
    assert all(change["lo"] > 0 for change in found.data["changes"]) and "farther from" in " ".join(found.says)
    shown = {(row["measure"], row["role"]): row["value"] for row in found.data["precision_recall"]}
    assert shown["precision", "after"] == shown["recall", "after"] == 0


def test_too_few_images_leave_the_frechet_distance_out(tiny_comparison, tmp_path):
    first, second = distances.jobs(tiny_comparison)
    found = jobs.run([first, second], tmp_path, quiet=True)
    assert {row["distance"] for row in found["image-distances"].data["distances"]} == {"kernel"}
    assert any("No Fréchet distance" in text and "--images" in text for text in found["image-distances"].says)
    assert {row["role"] for row in found["diversity"].rows} == {"before", "after", "control"}
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "image-distances-distances.png", "image-distances-precision-recall.png", "diversity-pairwise.png",
    }


def test_without_data_the_part_says_so(unchanged, tmp_path):
    first = distances.jobs(Comparison(**{**vars(unchanged), "data": ""}))[0]
    assert "--data" in first.compute(tmp_path).says[0] and not first.plots


def test_other_resolution_is_refused(unchanged, tmp_path):
    G = copy.copy(unchanged.before.G)
    G.img_resolution = 64
    c = Comparison(**{**vars(unchanged), "before": dataclasses.replace(unchanged.before, G=G)})
    with pytest.raises(ValueError, match="--data: expected images of 64"):
        distances.real_features(c, Means())


def test_collapse_shows(unchanged, tmp_path):
    G = copy.deepcopy(unchanged.after.G)
    mapping = G.mapping
    G.mapping = lambda z, c, **k: mapping(torch.zeros_like(z), c, **k)
    c = Comparison(**{**vars(unchanged), "after": dataclasses.replace(unchanged.after, G=G, hash="collapsed")})
    found = distances.spread(c, tmp_path)
    # ray jitter, which differs within a batch, keeps equal shapes' images apart
    ratios = {row["of"]: row["ratio"] for row in found.rows if row["role"] == "after"}
    assert ratios["σ slabs"] < 0.01 and ratios["image features"] < 0.5 and " less diverse" in " ".join(found.says)
    same = [row for row in distances.spread(unchanged, tmp_path).rows if row["role"] == "after"]
    np.testing.assert_allclose([[row["ratio"], row["ratio_lo"], row["ratio_hi"]] for row in same], 1.0, rtol=1e-6)


def test_large_slabs_are_averaged():
    cells = distances._cells(torch.arange(64.0).reshape(1, 1, 1, 1, 64))
    np.testing.assert_allclose(cells, [np.arange(64).reshape(32, 2).mean(axis=1)])
