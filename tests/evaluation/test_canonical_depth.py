"""Depth diagnostics on faces that are known: a plane, a quadratic, and one with a nose."""

import numpy as np
import pytest

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.evaluation import geometry
from eg3d_rlhf.evaluation.geometry import DepthMaps, measures
from eg3d_rlhf.experiments import pages


def face(nose=0.0, bend=0.0, tilt=0.0, valid=None, side=80):
    """Maps of one face z(x, y) on a regular grid of the cube's front."""
    y, x = np.meshgrid(np.linspace(0.5, -0.5, side), np.linspace(-0.5, 0.5, side), indexing="ij")
    z = 0.1 + tilt * x - bend * (x**2 + y**2) + nose * np.exp(-((x / 0.015) ** 2) - ((y + 0.04) / 0.03) ** 2)
    return DepthMaps(np.stack([x, y, z], -1)[None], np.ones((1, side, side), bool) if valid is None else valid[None])


def test_a_plane_has_no_relief_and_no_nose():
    found = measures(face(tilt=0.3), Bounds())
    assert found["face relief"][0] == pytest.approx(0, abs=1e-12) and found["valid pixels"][0] == 1
    assert found["depth range of the face"][0] == pytest.approx(0.9 * 0.3 * 0.2, rel=0.1)


def test_a_round_head_without_features_has_no_relief():
    assert measures(face(bend=0.8), Bounds())["face relief"][0] == pytest.approx(0, abs=1e-12)


def test_a_nose_stands_out_by_its_length():
    small, large = (measures(face(nose=length), Bounds()) for length in (0.02, 0.04))
    assert large["nose prominence"][0] == pytest.approx(2 * small["nose prominence"][0], rel=1e-6)
    assert 0.03 < large["nose prominence"][0] <= 0.04
    assert large["face relief"][0] == pytest.approx(2 * small["face relief"][0], rel=1e-6) and small["face relief"][0] > 0


def test_measures_scale_with_the_cube():
    maps = face(nose=0.03, bend=0.5)
    double = measures(DepthMaps(maps.points * 2, maps.valid), Bounds(2.0))
    for name, values in measures(maps, Bounds()).items():
        assert double[name][0] == pytest.approx(values[0] * (1 if name == "valid pixels" else 2))


def test_a_missing_face_is_missing():
    found = measures(face(valid=np.zeros((80, 80), bool)), Bounds())
    assert found["valid pixels"][0] == 0 and all(np.isnan(found[name][0]) for name in list(found)[1:])


def test_change_leaves_pixels_out_that_few_latents_hit():
    before, after = face(), face(nose=0.03)
    valid = np.ones((1, 80, 80), bool)
    valid[0, :40] = False
    mean = np.array(geometry._change(before, DepthMaps(after.points, valid))["mean"], dtype=float)
    assert np.isnan(mean[:40]).all() and np.nanmax(mean) == pytest.approx((after.points - before.points)[0, 40:, :, 2].max(), abs=1e-6)


def test_a_generator_against_itself(unchanged, tmp_path):
    (job,) = geometry.depth_jobs(unchanged)
    finding = pages.run([job], tmp_path, quiet=True)["canonical-depth"]
    change = finding.data["measures"]["valid pixels"]["paired"]["after"]
    assert change["mean"] == 0 and any("--control" in line for line in finding.says)
    assert all(v in (None, 0.0) for row in finding.data["change"]["after"]["mean"] for v in row)
    assert (tmp_path / "data" / "canonical-depth.png").is_file() and finding.facts.n == len(finding.rows)


def test_without_any_face_the_part_says_so(unchanged, monkeypatch, tmp_path):
    def empty(c, generator, seeds):
        return DepthMaps(np.zeros((len(seeds), 16, 16, 3)), np.zeros((len(seeds), 16, 16), bool))

    monkeypatch.setattr(geometry, "depth_maps", empty)
    (job,) = geometry.depth_jobs(unchanged)
    finding = pages.run([job], tmp_path, quiet=True)["canonical-depth"]
    assert "Are these aligned heads?" in "\n".join(finding.says) and finding.data["measures"]["nose prominence"]["n"] == 0


def test_windows_follow_the_cube():
    maps = face(nose=0.03, bend=0.5)
    moved = measures(DepthMaps(maps.points + np.array([0.5, -1.0, 2.0]), maps.valid), Bounds(1.0, (0.5, -1.0, 2.0)))
    for name, values in measures(maps, Bounds()).items():
        assert moved[name][0] == pytest.approx(values[0])
