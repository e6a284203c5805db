"""Figures of heads of people: made-up shapes with known errors, and a true head whose back is cut away."""

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.statistics import two_way_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.measures.people import DEFECTIVE
from eg3d_rlhf.modes import report_shapes
from training.heads.people_mesh import grid_points, ground_truth_grids

N = 32


def shapes_seen(missing, extra=0.0, fscore=0.5) -> dict:
    """Return measurements of shapes with these errors; their faces are always the same random ones."""
    missing = np.asarray(missing, dtype=float)
    faces = np.random.default_rng(0).normal(0.1, 0.01, (len(missing), 6, 5)).astype(np.float32)
    known = (
        "fscore",
        "fine",
        "completeness",
        "distance",
        "fine_front",
        "completeness_front",
        "distance_front",
        "amplitude",
    )
    return {
        "missing": missing,
        "extra": np.full(len(missing), extra),
        **{name: np.full(len(missing), fscore) for name in known},
        "utility": 1 - missing,
        "depth": faces,
        "relief": faces - faces.mean(axis=(1, 2), keepdims=True),
        "solid": np.zeros((len(missing), 4), np.uint8),
        "volume": np.full(len(missing), 20),
    }


def test_figures_of_made_up_shapes():
    before = shapes_seen([0.6, 0.4, 0.02, 0.03])
    after = shapes_seen([0.1, 0.1, 0.02, 0.05])
    values = heads.compute_metrics(before, after)
    assert (
        heads.find_defective(before).tolist() == [True, True, False, False]
        and before["missing"][2] < DEFECTIVE
    )
    assert (
        values["error_reduction"] == pytest.approx(0.8)
        and values["intact_degraded"] == 0.5
        and values["intact_share"] == 1
    )
    assert values["error_defective"] == pytest.approx(0.1) and values["missing_defective"] == pytest.approx(
        0.1
    )
    assert values["identity_kept"] == 1 and values["face_moved_voxels"] == 0 and values["changed"] == 0
    assert values["error_reduction_ci95"][0] <= 0.8 <= values["error_reduction_ci95"][1]
    assert heads.compute_metrics(before, before)["error_reduction"] == 0


def test_faces_that_move_lose_their_identity_and_variety():
    before = shapes_seen([0.6] * 4)
    after = {**before, "depth": before["depth"] + 0.5 / 64, "relief": before["relief"][::-1].copy()}
    values = heads.compute_metrics(before, after)
    assert values["face_moved_voxels"] == pytest.approx(0.5, abs=1e-4) and values["identity_kept"] == 0
    assert heads.variety({**before, "relief": np.repeat(before["relief"][:1], 4, axis=0)}) == pytest.approx(
        0, abs=1e-6
    )
    without_face = {
        **before,
        "depth": np.full_like(before["depth"], np.nan),
        "relief": np.full_like(before["depth"], np.nan),
    }
    assert (
        heads.compute_metrics(before, without_face)["identity_kept"] == 0
        and heads.compute_metrics(before, without_face)["variety"] is None
    )


def test_without_defective_heads_there_is_no_error_reduction():
    before = shapes_seen([0.01, 0.02])
    assert (
        heads.compute_metrics(before, before)["error_reduction"] is None
        and heads.compute_metrics(before, before)["fscore_defective"] is None
    )
    assert heads.compute_metrics(shapes_seen([0.9]), shapes_seen([0.5]))["intact_degraded"] is None


def test_the_interval_grows_with_the_spread_of_seeds():
    before = shapes_seen(np.linspace(0.3, 0.7, 12))
    alike, apart = (
        np.stack([0.2 + np.full(12, shift) for shift in shifts]) for shifts in ((0, 0, 0), (-0.1, 0, 0.1))
    )
    narrow = heads.error_reduction_interval(before, alike)
    wide = heads.error_reduction_interval(before, apart)
    assert wide[1] - wide[0] > narrow[1] - narrow[0] and narrow[0] < 0.6 < narrow[1]
    values = two_way_interval(lambda rows, columns: float(rows.mean()), 1, 5)
    assert values == (0.0, 0.0)  # a single seed stays as it is


def test_a_cut_back_is_seen_and_no_face():
    intact = ground_truth_grids(torch.from_numpy(np.random.RandomState(1).randn(2, 64)), N)
    cut = np.maximum(intact, (-0.05 - grid_points(N)[..., 2]))  # nothing behind z = -.05
    seen = heads.measure_heads(cut, intact)
    itself = heads.measure_heads(intact, intact)
    assert (
        (heads.back_of_head_error(itself) == 0).all()
        and (itself["fscore"] == 1).all()
        and itself["utility"] == pytest.approx(1)
    )
    assert heads.find_defective(seen).all() and (seen["extra"] == 0).all() and (seen["fscore"] < 0.5).all()
    values = heads.compute_metrics(seen, itself)
    assert (
        values["error_reduction"] == 1 and values["identity_kept"] == 1 and values["face_moved_voxels"] == 0
    )
    assert values["changed"] == pytest.approx(float(seen["missing"].mean()), abs=0.02)


def test_networks_stand_side_by_side(tmp_path):
    done = CliRunner().invoke(
        report_shapes.heads,
        [str(bundled.GENERATOR), "--n=2", "--held-out=validation", f"--out={tmp_path / 'heads.json'}"],
    )
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "heads.json").read_text())["networks"]
    assert list(values) == ["before", "generator"] and values["generator"] == values["before"]
    assert values["generator"]["face_moved_voxels"] == 0 and values["generator"]["intact_degraded"] in (
        0,
        None,
    )
    assert "| generator |" in done.output and "2 latents (validation" in done.output


def test_networks_of_the_same_name_get_distinct_names(tmp_path):
    runs = [tmp_path / arm / "00000-x" for arm in ("one", "two")]
    assert report_shapes.network_names(runs) == ["one/00000-x", "two/00000-x"]
    assert report_shapes.network_names([*runs[:1], tmp_path / "00001-x"]) == ["00000-x", "00001-x"]
    with pytest.raises(click.UsageError, match="twice"):
        report_shapes.network_names([runs[0], runs[0]])
