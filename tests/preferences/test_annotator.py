"""The annotator on heads of known shape: every defect lowers the utility, and labels flip as often as asked."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.preferences.annotator import (
    DEFAULT_CALIBRATION,
    FEATURES,
    Calibration,
    calibrate,
    disjoint_pairs,
    height_map,
    label_pairs,
    sigma_features,
    solve_temperature,
    utility,
)
from training.heads.family import SHAPE_COUNT, draw_parameters
from training.heads.sdf import head_sdf


def _grid(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axis = np.linspace(-0.5, 0.5, n)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return x, y, z


def _distance(n: int = 64, shape: np.ndarray | None = None) -> np.ndarray:
    x, y, z = _grid(n)
    points = torch.from_numpy(np.stack([x, y, z], axis=-1).reshape(1, -1, 3)).float()
    parameters = torch.zeros(1, SHAPE_COUNT) if shape is None else torch.from_numpy(shape)[None]
    return head_sdf(points, parameters).reshape(n, n, n).numpy().astype(np.float64)


def _sigma(distance: np.ndarray) -> np.ndarray:
    return np.clip(10 - 600 * distance, -100, 300)


def _ball(n: int, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    x, y, z = _grid(n)
    return np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) - radius


@pytest.fixture(scope="module", params=[48, 64])
def head(request):
    return _distance(request.param)


def _floaters(d):
    return np.minimum(d, np.minimum(_ball(len(d), (0.3, 0.3, 0.2), 0.06), _ball(len(d), (-0.35, 0.2, 0.3), 0.05)))


def _rough(d):
    x, y, z = _grid(len(d))
    return d + 0.006 * np.sin(75 * x) * np.sin(80 * y + 1) * np.sin(70 * z + 2)


def _tunnel(d):
    x, y, _ = _grid(len(d))
    return np.maximum(d, 0.035 - np.hypot(x - 0.04, y - 0.14))


def _dent(d):
    return np.maximum(d, -_ball(len(d), (0.045, 0.12, 0.15), 0.035))


def _lopsided(d):
    return np.minimum(d, _ball(len(d), (0.09, -0.05, 0.1), 0.07))


def _noseless(d):
    x, y, z = _grid(len(d))
    return np.maximum(d, z - 0.155)


def _hollow(d):
    return np.maximum(d, -(d + 0.035))


DEFECTS = {
    _floaters: ("floater_volume", "floater_count"),
    _rough: ("roughness_front", "roughness_side"),
    _tunnel: ("holes",),
    _dent: ("dents",),
    _lopsided: ("asymmetry_depth", "asymmetry_occupancy"),
    _noseless: ("depth_order", "face"),
    _hollow: ("hollowness",),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__[1:])
def test_every_defect_lowers_the_utility_through_its_own_parts(head, defect):
    clean, damaged = utility(_sigma(head)), utility(_sigma(defect(head)))
    assert damaged.total < clean.total - 0.01
    for name in DEFECTS[defect]:
        assert damaged.parts[name] < clean.parts[name] - 0.05, name


def test_utility_falls_with_the_strength_of_the_defect(head):
    x, y, z = _grid(len(head))
    wave = np.sin(75 * x) * np.sin(80 * y + 1) * np.sin(70 * z + 2)
    totals = [utility(_sigma(head + amplitude * wave)).total for amplitude in (0.0, 0.002, 0.004, 0.008)]
    assert totals == sorted(totals, reverse=True)


def test_a_missing_face_costs_more_than_a_rough_cheek(head):
    x, y, z = _grid(len(head))
    faceless = np.minimum(np.maximum(head, z - 0.12), _ball(len(head), (0.0, -0.03, 0.0), 0.15))
    cheek = 0.004 * np.sin(75 * x) * np.sin(80 * y + 1) * (_ball(len(head), (0.07, -0.05, 0.1), 0.06) < 0)
    clean, rough, without = (utility(_sigma(d)) for d in (head, head + cheek, faceless))
    assert without.features["face"] > 0.4 and rough.features["face"] < 0.15
    assert without.total < rough.total - 0.1 < clean.total - 0.1


def test_heads_of_the_true_family_score_high():
    rng = np.random.default_rng(0)
    for _ in range(6):
        result = utility(_sigma(_distance(64, draw_parameters(rng)[0])))
        assert result.total > 0.8
        assert all(0 < part <= 1 for part in result.parts.values())


@pytest.mark.parametrize("value", [-50.0, 0.0, float("nan"), float("-inf")])
def test_no_surface_is_the_worst_and_never_nan(value, head):
    empty = utility(np.full((48, 48, 48), value))
    assert empty.total == 0.0 and set(empty.parts) == set(FEATURES)
    noise = np.random.RandomState(0).randn(48, 48, 48) * 20
    for other in (_sigma(head), noise, np.full((48, 48, 48), 99.0), np.pad([[[99.0]]], 20, constant_values=-9)):
        result = utility(other)
        assert np.isfinite(result.total) and result.total > empty.total
        assert np.isfinite(list(result.features.values())).all()


def test_only_the_level_set_matters_not_the_steepness(head):
    soft, hard = utility(np.clip(10 - 300 * head, -1e3, 1e3)), utility(np.clip(10 - 1200 * head, -1e3, 1e3))
    assert soft.total == pytest.approx(hard.total, abs=0.01)


def test_mirroring_changes_nothing(head):
    damaged = _sigma(_lopsided(head))
    assert utility(damaged[:, :, ::-1]).total == pytest.approx(utility(damaged).total, abs=1e-9)


def test_height_map_finds_a_sphere_below_the_voxel():
    n = 64
    d = _ball(n, (0.0, 0.0, 0.0), 0.3)
    x, y, _ = _grid(n)
    view = height_map(_sigma(d), d <= 0, np.linspace(-0.5, 0.5, n))
    inner = np.hypot(x[0], y[0]) < 0.2
    truth = np.sqrt(np.maximum(0.09 - x[0] ** 2 - y[0] ** 2, 0))
    assert np.abs(view.height - truth)[inner].max() < 0.001  # a voxel is 0.016
    assert np.abs(view.thickness - 2 * truth)[inner].max() < 0.04


def test_a_sphere_is_smooth_and_symmetric():
    features = sigma_features(_sigma(_ball(64, (0.0, 0.0, 0.0), 0.3)))
    assert features["roughness_front"] < 0.5
    for name in ("floater_volume", "holes", "dents", "asymmetry_depth", "asymmetry_occupancy", "hollowness"):
        assert features[name] == pytest.approx(0.0, abs=1e-6), name


def test_calibration_centres_the_parts_and_survives_json(head):
    rng = np.random.default_rng(1)
    cubes = [_sigma(_rough(_distance(48, draw_parameters(rng)[0]))) for _ in range(9)] + [np.zeros((48, 48, 48))]
    calibration = calibrate(cubes)
    assert calibration.samples == 9
    parts = [utility(cube, calibration=calibration).parts["roughness_front"] for cube in cubes[:-1]]
    assert np.median(parts) == pytest.approx(0.5)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert all(np.isfinite(value) and value > 0 for value in calibration.scale.values())


@pytest.mark.parametrize("rate", [0.02, 0.10, 0.25])
def test_labels_flip_as_often_as_asked(rate):
    rng = np.random.default_rng(2)
    utilities = rng.normal(0.5, 0.1, 20_000)
    pairs = disjoint_pairs(10_000, rng)
    temperature = solve_temperature(utilities, pairs, rate)
    labels = label_pairs(utilities, pairs, temperature, np.random.default_rng(3))
    assert np.mean([not label.clean for label in labels]) == pytest.approx(rate, abs=4 * np.sqrt(rate / 10_000))
    for label, pair in zip(labels[:200], pairs[:200], strict=True):
        assert {label.winner, label.loser} == set(pair.tolist())
        assert label.clean == (utilities[label.winner] >= utilities[label.loser])


def test_no_noise_at_temperature_zero_and_same_labels_from_the_same_seed():
    utilities, pairs = np.arange(40.0), disjoint_pairs(20, np.random.default_rng(0))
    assert solve_temperature(utilities, pairs, 0.0) == 0.0
    assert all(label.clean and label.winner > label.loser for label in label_pairs(utilities, pairs, 0.0, np.random.default_rng(1)))
    first, second = (label_pairs(utilities, pairs, 9.0, np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="only ties"):
        solve_temperature([1.0, 1.0], [(0, 1)])
    with pytest.raises(ValueError, match="at least 4 cubes"):
        calibrate([np.zeros((48, 48, 48))])
    with pytest.raises(ValueError, match="Calibrate again"):
        Calibration.from_dict({**DEFAULT_CALIBRATION.to_dict(), "median": {}})
