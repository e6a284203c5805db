"""Rewards: shift, truncation, ranks and slopes that are known; divergence found where it was planted, and not
in noise.
"""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.evaluation import rewards
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.rewards.reward import Reward
from tests.evaluation import comparisons

RNG = np.random.default_rng(0)


def planted(c, scores, psi=0.7):
    """The comparison with these scores per role, as if they had been computed."""
    memory = {
        (c.reward_hash, c.generators()[role].hash, tuple(c.seeds()), psi): torch.tensor(values)
        for role, values in scores.items()
    }
    return Comparison(**{**vars(c), "memory": {**c.memory, **memory}})


def test_planted_shift_is_found(tiny_comparison):
    before = RNG.normal(size=16)
    after = 2 + 0.5 * before
    after[:3] = before[:3] - 1
    c = planted(
        tiny_comparison, {"before": before, "after": after, "control": before + 1e-3 * RNG.normal(size=16)}
    )
    finding = rewards.shift(c, None)
    p = finding.data["paired"]["after"]
    assert (p["positive"], p["n"]) == ((after > before).sum(), 16)
    np.testing.assert_allclose(p["mean"], (after - before).mean())
    assert p["mean_lo"] < p["mean"] < p["mean_hi"] and finding.data["paired"]["control"]["mean_hi"] < 0.01
    np.testing.assert_allclose([row["delta_after"] for row in finding.rows], after - before)
    assert [row["seed"] for row in finding.rows] == list(range(200_000, 200_016))
    says = " ".join(finding.says)
    assert f"{p['positive']} of 16" in says and f"{p['mean']:+.3f} [{p['mean_lo']:+.3f}" in says
    share = abs(finding.data["paired"]["control"]["mean"] / p["mean"])
    assert share < 0.1 and f"{share:.1%}" in finding.says[-1]


def test_line_of_final_against_initial(tiny_comparison):
    before = RNG.normal(size=16)
    c = planted(tiny_comparison, {"before": before, "after": 3 + 0.25 * before, "control": before})
    lines = rewards.shift(c, None).data["lines"]
    np.testing.assert_allclose(
        [lines["after"]["slope"], lines["after"]["intercept"], lines["control"]["slope"]], [0.25, 3, 1]
    )


def test_a_generator_against_itself(unchanged):
    finding = rewards.shift(unchanged, None)
    p = finding.data["paired"]["after"]
    assert (p["positive"], p["ties"], p["mean"]) == (0, 16, 0) and "control" not in finding.data["paired"]
    assert any("--control" in text for text in finding.says)
    ranks = rewards.ranks(unchanged, None).data
    assert ranks["rho"]["before"] == ranks["rho"]["after"]


def test_ranks_kept_and_turned(tiny_comparison):
    values = RNG.normal(size=16)
    c = planted(
        planted(tiny_comparison, {"before": values, "after": values}),
        {"before": values**3, "after": -values},
        psi=0.25,
    )
    rho = rewards.ranks(c, None).data["rho"]
    assert rho["before"]["mean"] == 1 and rho["after"]["mean"] == -1


def test_truncation_table(tiny_comparison):
    rows = rewards.over_psi(tiny_comparison, None).data["rows"]
    assert [(r["role"], r["psi"]) for r in rows] == [
        (role, psi) for role in ("before", "after") for psi in rewards.PSIS
    ]
    expected = tiny_comparison.scores(tiny_comparison.after, tiny_comparison.seeds(), 0.5).mean()
    np.testing.assert_allclose(
        next(r["mean"] for r in rows if r["role"] == "after" and r["psi"] == 0.5), expected, rtol=1e-5
    )
    assert all(r["lo"] <= r["mean"] <= r["hi"] for r in rows)


def test_everything_is_drawn(tiny_comparison, unchanged, tmp_path):
    parts = rewards.jobs(tiny_comparison)[:1]
    pages.run(parts, tmp_path, quiet=True)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3
    for part in (*rewards.jobs(unchanged)[:3], *rewards.jobs(tiny_comparison)[1:3]):
        data = json.loads(json.dumps(part.compute(tmp_path).to_dict()))["data"]
        for plot in part.plots.values():
            assert all(axis.get_xlabel() and axis.get_ylabel() for axis in plot(data).axes)


@pytest.mark.parametrize("change", [{"n": 17}, {"psi": 0.5}, {"seed": 1}, {"reward_hash": "other"}])
def test_identity_follows_what_matters(tiny_comparison, change):
    other = Comparison(**{**vars(tiny_comparison), **change})
    batched = Comparison(**{**vars(tiny_comparison), "batch": 3})
    assert rewards.jobs(tiny_comparison)[0].inputs != rewards.jobs(other)[0].inputs
    assert rewards.jobs(tiny_comparison)[0].inputs == rewards.jobs(batched)[0].inputs


TIMES = np.array([0.0, 0.06, 0.12, 0.24])


def planted_values(slope, scatter, noise=0.0, n=100, seed=0):
    """Rewards [N, T]: every latent rises with its own slope."""
    rng = np.random.default_rng(seed)
    slopes = slope + scatter * rng.normal(size=n)
    return rng.normal(size=n)[:, None] + slopes[:, None] * TIMES + noise * rng.normal(size=(n, len(TIMES)))


def test_planted_slopes():
    finding = rewards.slope_summary(TIMES, planted_values(30, 2))
    assert abs(finding["mean"] - 30) < 0.6 and finding["mean_lo"] < finding["mean"] < finding["mean_hi"]
    np.testing.assert_allclose(
        [finding["spread_lo"], finding["spread_hi"]], np.quantile(finding["slopes"], [0.025, 0.975])
    )
    assert finding["spread_lo"] > 0


def test_mean_interval_covers_a_small_drift():
    inside = [rewards.slope_summary(TIMES, planted_values(-0.17, 0.2, seed=s)) for s in range(60)]
    assert 0.87 <= np.mean([f["mean_lo"] <= -0.17 <= f["mean_hi"] for f in inside])


def _roles(control):
    return {
        "after": rewards.slope_summary(TIMES, planted_values(30, 2)),
        "control": rewards.slope_summary(TIMES, control),
    }


def test_a_drifting_control_is_called_so():
    drifting = _roles(planted_values(-0.17, 0.2))
    *of_roles, last_sentence = rewards._describe_trajectories(drifting)
    for (role, finding), line in zip(drifting.items(), of_roles, strict=True):
        assert f"[{finding['spread_lo']:+.2f}, {finding['spread_hi']:+.2f}]" in line, role
        # whether the interval holds zero
        assert ("not" in line.split()) == (role == "after"), line
    assert f"{abs(drifting['control']['mean'] / drifting['after']['mean']):.1%}" in last_sentence
    last_sentence = rewards._describe_trajectories(_roles(planted_values(0, 0.2)))[-1]
    assert "control" in last_sentence and "%" not in last_sentence


def test_run_with_snapshots(tiny_comparison, tmp_path):
    part = rewards.trajectories_job(tiny_comparison)
    data = pages.run([part], tmp_path, quiet=True)["trajectories"].data["roles"]
    assert data["after"]["kimg"] == data["control"]["kimg"] == [0, 0.064, 0.128, 0.192]
    c = tiny_comparison
    seeds = tiny_comparison.seeds()
    np.testing.assert_allclose(
        np.array(data["after"]["values"])[:, [0, -1]].T, [c.scores(c.before, seeds), c.scores(c.after, seeds)]
    )
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2


@pytest.mark.parametrize("amounts", [{}, {64: 0.1}])
def test_too_few_snapshots(unchanged, tmp_path, amounts):
    run = comparisons.write_run(tmp_path / "run", amounts, 10.0) if amounts else None
    part = rewards.trajectories_job(Comparison(**{**vars(unchanged), "run": run}))
    (text,) = part.compute(tmp_path).says
    assert f"{len(amounts)} were found" in text and "--snap=1" in text and not part.plots


PROXY = np.array([0.0, 1, 2, 3, 4])


def measured(means, noise=0.2, n=64, seed=0):
    """[N, T] about these means."""
    return np.asarray(means) + noise * np.random.default_rng(seed).normal(size=(n, len(means)))


@pytest.mark.parametrize(
    ("means", "at"),
    [([0, 1, 2, 1.5, 1], 2), ([0, -0.5, -1, -1, -2], 0), ([0, 1, 2, 2.5, 3], None), ([0, 1, 2, 2, 2], None)],
)
def test_planted_divergence(means, at):
    assert rewards.divergence(measured(PROXY), measured(means, 0.05, seed=1)) == at


def test_noise_is_seldom_called_divergence():
    finding = [
        rewards.divergence(measured(PROXY[:3]), measured([0, 0, 0], 1.0, seed=100 + s)) for s in range(60)
    ]
    assert sum(at is not None for at in finding) <= 5  # the peak of noise is always followed by a fall


def test_curves_of_a_run_with_snapshots(tiny_comparison, tmp_path):
    (part,) = rewards.curve_jobs(tiny_comparison)
    finding = pages.run([part], tmp_path, quiet=True)["over-optimisation"]
    data = finding.data
    assert data["kimg"] == [0, 0.064, 0.128, 0.192] and list(data["curves"]) == [rewards.PROXY]
    assert data["distance"][0] == 0 and np.all(np.diff(data["distance"]) > 0)  # the noise grows along the run
    assert data["curves"][rewards.PROXY]["steps"][0] == {"mean": 0, "lo": 0, "hi": 0}
    says = " ".join(finding.says)
    assert "--heldout-reward" in says and "KL" in says
    assert (tmp_path / "figures" / "over-optimisation-curves.svg").is_file()


def test_without_snapshots_before_and_after_are_shown(unchanged, tmp_path):
    finding = rewards.overoptimisation(unchanged, tmp_path)
    assert (
        finding.data["kimg"] == [0.0, None]
        and finding.data["distance"] == [0, 0]
        and rewards.NO_SNAPSHOTS in finding.says
    )
    rewards.plot_curves(finding.data)


def test_independence_of_the_second_reward(tiny_comparison):
    """Labels and seed each make another statement; of the same labels it asks for another reward."""
    reward = tiny_comparison.reward

    def stated(**second):
        pair = {
            "reward": Reward(reward.observation, reward.network, {"labels": "a", "seed": 0}),
            "held_out": Reward(reward.observation, reward.network, second),
        }
        return rewards.independence(Comparison(**{**vars(tiny_comparison), **pair, "held_out_hash": "hash"}))

    same = [stated(labels="a", seed=seed) for seed in (0, 1)]
    others = [stated(labels="b", seed=seed) for seed in (0, 1)]
    unknown = stated()
    assert len({*same, *others, unknown}) == 5
    assert all("--heldout-reward" in text for text in same)
    assert not any("--heldout-reward" in text for text in (*others, unknown))


def test_bundled_networks_have_all_three_measures(tmp_path):
    c = load_comparison(Sources(after=bundled.GENERATOR, n=2, images=16))
    finding = rewards.overoptimisation(c, tmp_path)
    assert list(finding.data["curves"]) == [rewards.PROXY, rewards.SECOND, rewards.ORACLE]
    assert all(any(name in line for line in finding.says) for name in finding.data["curves"])
