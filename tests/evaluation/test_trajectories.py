"""Trajectories: planted slopes, and what is said of a control that drifts."""

import numpy as np
import pytest

from eg3d_rlhf.evaluation import trajectories
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.reports import jobs
from tests.evaluation import comparisons

TIMES = np.array([0.0, 0.06, 0.12, 0.24])


def values(slope, scatter, noise=0.0, n=100, seed=0):
    """Rewards [N, T]: every latent rises with its own slope."""
    rng = np.random.default_rng(seed)
    own = slope + scatter * rng.normal(size=n)
    return rng.normal(size=n)[:, None] + own[:, None] * TIMES + noise * rng.normal(size=(n, len(TIMES)))


def test_planted_slopes():
    found = trajectories.slope_summary(TIMES, values(30, 2))
    assert abs(found["mean"] - 30) < 0.6 and found["mean_lo"] < found["mean"] < found["mean_hi"]
    np.testing.assert_allclose([found["spread_lo"], found["spread_hi"]], np.quantile(found["slopes"], [0.025, 0.975]))
    assert found["spread_lo"] > 0


def test_no_slope_has_zero_in_both_intervals():
    found = trajectories.slope_summary(TIMES, values(0, 0.3, 0.05))
    assert found["spread_lo"] < 0 < found["spread_hi"] and found["mean_lo"] < 0 < found["mean_hi"]


def test_mean_interval_covers_a_small_drift():
    inside = [trajectories.slope_summary(TIMES, values(-0.17, 0.2, seed=s)) for s in range(60)]
    assert 0.87 <= np.mean([f["mean_lo"] <= -0.17 <= f["mean_hi"] for f in inside])


def _roles(control):
    return {"after": trajectories.slope_summary(TIMES, values(30, 2)), "control": trajectories.slope_summary(TIMES, control)}


def test_a_drifting_control_is_called_so():
    says = " ".join(trajectories._says(_roles(values(-0.17, 0.2))))
    assert "contains zero" in says and "the control does drift" in says and "No drift" not in says
    says = " ".join(trajectories._says(_roles(values(0, 0.2))))
    assert "No drift of the control is shown" in says and "does drift" not in says


def test_run_with_snapshots(tiny_comparison, tmp_path):
    (part,) = trajectories.jobs(tiny_comparison)
    data = jobs.run([part], tmp_path, quiet=True)["trajectories"].data["roles"]
    assert data["after"]["kimg"] == data["control"]["kimg"] == [0, 0.064, 0.128, 0.192]
    c, seeds = tiny_comparison, tiny_comparison.seeds()
    np.testing.assert_allclose(np.array(data["after"]["values"])[:, [0, -1]].T, [c.scores(c.before, seeds), c.scores(c.after, seeds)])
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2


def test_no_control_is_said(tiny_comparison, tmp_path):
    c = Comparison(**{**vars(tiny_comparison), "control": None, "control_run": None})
    (part,) = trajectories.jobs(c)
    found = jobs.run([part], tmp_path, quiet=True)["trajectories"]
    assert list(found.data["roles"]) == ["after"] and any("--snap=1" in text for text in found.says)


@pytest.mark.parametrize("amounts", [{}, {64: 0.1}])
def test_too_few_snapshots(unchanged, tmp_path, amounts):
    run = comparisons.write_run(tmp_path / "run", amounts, 10.0) if amounts else None
    (part,) = trajectories.jobs(Comparison(**{**vars(unchanged), "run": run}))
    (text,) = part.compute(tmp_path).says
    assert f"{len(amounts)} found" in text and "--snap=1" in text and not part.plots
