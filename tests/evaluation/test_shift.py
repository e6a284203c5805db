"""Reward shift, truncation and ranks on scores that are known."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation import shift
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.reports import jobs

RNG = np.random.default_rng(0)


def planted(c, scores, psi=0.7):
    """The comparison with these scores per role, as if they had been computed."""
    memory = {
        (c.reward_hash, c.generators()[role].hash, tuple(c.seeds()), psi): torch.tensor(values) for role, values in scores.items()
    }
    return Comparison(**{**vars(c), "memory": {**c.memory, **memory}})


def test_planted_shift_is_found(tiny_comparison):
    before = RNG.normal(size=16)
    after = 2 + 0.5 * before
    after[:3] = before[:3] - 1
    c = planted(tiny_comparison, {"before": before, "after": after, "control": before + 1e-3 * RNG.normal(size=16)})
    found = shift.shift(c, None)
    p = found.data["paired"]["after"]
    assert (p["positive"], p["n"]) == ((after > before).sum(), 16)
    np.testing.assert_allclose(p["mean"], (after - before).mean())
    assert p["mean_lo"] < p["mean"] < p["mean_hi"] and found.data["paired"]["control"]["mean_hi"] < 0.01
    np.testing.assert_allclose([row["delta_after"] for row in found.rows], after - before)
    assert [row["seed"] for row in found.rows] == list(range(200_000, 200_016))
    assert "not that the shapes are better" in " ".join(found.says) and "tenth" not in " ".join(found.says)


def test_line_of_final_against_initial(tiny_comparison):
    before = RNG.normal(size=16)
    c = planted(tiny_comparison, {"before": before, "after": 3 + 0.25 * before, "control": before})
    lines = shift.shift(c, None).data["lines"]
    np.testing.assert_allclose([lines["after"]["slope"], lines["after"]["intercept"], lines["control"]["slope"]], [0.25, 3, 1])


def test_a_generator_against_itself(unchanged):
    found = shift.shift(unchanged, None)
    p = found.data["paired"]["after"]
    assert (p["positive"], p["ties"], p["mean"]) == (0, 16, 0) and "control" not in found.data["paired"]
    assert any("--control" in text for text in found.says)
    ranks = shift.ranks(unchanged, None).data
    assert ranks["rho"]["before"] == ranks["rho"]["after"]


def test_ranks_kept_and_turned(tiny_comparison):
    values = RNG.normal(size=16)
    c = planted(planted(tiny_comparison, {"before": values, "after": values}), {"before": values**3, "after": -values}, psi=0.25)
    rho = shift.ranks(c, None).data["rho"]
    assert rho["before"]["mean"] == 1 and rho["after"]["mean"] == -1


def test_truncation_table(tiny_comparison):
    rows = shift.over_psi(tiny_comparison, None).data["rows"]
    assert [(r["role"], r["psi"]) for r in rows] == [(role, psi) for role in ("before", "after") for psi in shift.PSIS]
    expected = tiny_comparison.scores(tiny_comparison.after, tiny_comparison.seeds(), 0.5).mean()
    np.testing.assert_allclose(next(r["mean"] for r in rows if r["role"] == "after" and r["psi"] == 0.5), expected, rtol=1e-5)
    assert all(r["lo"] <= r["mean"] <= r["hi"] for r in rows)


def test_everything_is_drawn(tiny_comparison, unchanged, tmp_path):
    parts = shift.jobs(tiny_comparison)[:1]
    jobs.run(parts, tmp_path, quiet=True)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3
    for part in (*shift.jobs(unchanged), *shift.jobs(tiny_comparison)[1:]):
        data = json.loads(json.dumps(part.compute(tmp_path).to_dict()))["data"]
        for plot in part.plots.values():
            assert all(axis.get_xlabel() and axis.get_ylabel() for axis in plot(data).axes)


@pytest.mark.parametrize("change", [{"n": 17}, {"psi": 0.5}, {"seed": 1}, {"reward_hash": "other"}])
def test_identity_follows_what_matters(tiny_comparison, change):
    other = Comparison(**{**vars(tiny_comparison), **change})
    assert shift.jobs(tiny_comparison)[0].identity() != shift.jobs(other)[0].identity()
    assert shift.jobs(tiny_comparison)[0].identity() == shift.jobs(Comparison(**{**vars(tiny_comparison), "batch": 3}))[0].identity()
