"""The best of n: against all subsets by hand and on planted laws; the report sees planted mistakes, and
pessimism helps where it must.
"""

import itertools
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation import best_of_n
from eg3d_rlhf.evaluation.best_of_n import expected_best, fit, kl_divergence, number_at, peak, resample_best
from eg3d_rlhf.experiments.pages import Finding
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.best_of_n import main
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, Standard
from eg3d_rlhf.rewards.reward import Reward, load_reward
from tests.rejections import rejected
from tests.rewards.test_join import moved


@pytest.fixture
def drawn():
    return np.random.default_rng(0).normal(size=(2, 9))


@pytest.mark.parametrize("n", range(1, 10))
def test_the_mean_over_all_subsets(drawn, n):
    reward, evaluator = drawn
    by_hand = [
        evaluator[max(subset, key=lambda i: reward[i])] for subset in itertools.combinations(range(9), n)
    ]
    assert expected_best(reward, evaluator, [n])[0] == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_an_evaluator_that_is_the_reward_rises_and_its_opposite_falls():
    reward = np.random.default_rng(2).normal(size=4096)
    numbers = [1, 2, 3, 10, 50, 512]
    same = expected_best(reward, reward, numbers)
    opposite = expected_best(reward, -reward, numbers)
    assert (np.diff(same) > 0).all() and np.array_equal(same, -opposite)
    assert same[1] == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)  # the larger of two normals


def test_equal_rewards_share_their_chances():
    reward = np.array([0.0, 1, 1, 1])
    evaluator = np.array([5.0, 1, 2, 6])
    assert expected_best(reward, evaluator, [4])[0] == pytest.approx(3) and expected_best(
        reward, evaluator, [2]
    )[0] == pytest.approx(3)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        expected_best(reward[order], evaluator[order], [1, 2, 3, 4]),
        expected_best(reward, evaluator, [1, 2, 3, 4]),
    )


def test_the_law_is_found_again():
    distance = np.sqrt(kl_divergence([1, 2, 4, 8, 16, 64, 256]))
    result = fit(distance, np.stack([distance * (2 - 0.5 * distance), distance * (1 + 0.1 * distance)]))
    np.testing.assert_allclose(result, [[2, 0.5], [1, -0.1]], atol=1e-12)
    np.testing.assert_allclose(peak(*result.T), [2, np.inf])
    assert peak(np.array(-1.0), np.array(1.0)) == 0
    for n in (1, 2, 100, 512):
        assert number_at(float(np.sqrt(kl_divergence([n])[0]))) == pytest.approx(n, rel=1e-6)


def test_resamples(drawn):
    reward, evaluator = drawn
    counts = np.array([[1] * 9, [0, 2, 1, 1, 1, 1, 1, 1, 1], [9, *[0] * 8]])
    result = resample_best(reward, evaluator, [1, 3, 9], counts)
    np.testing.assert_allclose(result[0], expected_best(reward, evaluator, [1, 3, 9]), atol=1e-12)
    kept = np.repeat(np.arange(9), counts[1])
    np.testing.assert_allclose(result[1], expected_best(reward[kept], evaluator[kept], [1, 3, 9]), atol=1e-12)
    np.testing.assert_allclose(result[2], evaluator[0], atol=1e-12)


N = 1024


@pytest.fixture(scope="module")
def members(tiny_reward):
    return [moved(load_reward(tiny_reward), i, labels=str(i), start="s") for i in range(3)]


@pytest.fixture(scope="module")
def ensemble(members):
    networks = [one.network for one in members]
    return Reward(
        members[0].observation,
        RewardEnsemble(networks, standard=Standard((0.0,) * 3, (1.0,) * 3)),
        {"labels": "0+1+2"},
    )


@pytest.fixture(scope="module")
def trial(ensemble, tiny_networks):
    return best_of_n.Trial(
        generator=load_generator(tiny_networks),
        rewards={"reward": (ensemble, "f" * 64)},
        evaluator=None,
        n=N,
        most=128,
    )


def planted(errors: float) -> Finding:
    """Scores of three members: the evaluator's values and small noise, and now and then a large mistake of
    one member alone.
    """
    random = np.random.default_rng(0)
    evaluator = random.normal(size=N)
    scores = evaluator + 0.3 * random.normal(size=(3, N)) + errors * (random.random((3, N)) < 0.02)
    return Finding(
        facts=None,
        data={
            "scores": {f"member {i + 1}": list(s) for i, s in enumerate(scores)},
            "evaluator": evaluator.tolist(),
        },
    )


def test_mistakes_of_single_members_are_seen_and_pessimism_avoids_them(trial, tmp_path):
    result = best_of_n.curves(trial, planted(errors=8.0), tmp_path)
    arms = result.data["arms"]
    assert set(arms) == {"member 1", "member 2", "member 3", "mean", "min", "lcb 1", "uwo 0.5", "softmin 0.5"}
    last = {name: arm["steps"][-1]["mean"] for name, arm in arms.items()}
    assert (
        all(last["min"] > 1.5 > last[f"member {i}"] for i in (1, 2, 3)) and last["softmin 0.5"] > last["mean"]
    )
    assert all(row["lo"] > 0 for row in result.data["against"] if row["arm"] in ("min", "softmin 0.5"))
    at, low, high = arms["member 1"]["peak"]
    assert 0 < low <= at <= high < np.sqrt(result.data["kl"][-1])
    (line,) = (line for line in result.says if line.startswith("member 1"))
    assert f"{at:.2f} [{low:.2f}, {high:.2f}]" in line
    assert (
        arms["member 1"]["reward"][-1]
        > arms["member 1"]["reward"][3]
        > 0
        == arms["member 1"]["steps"][0]["mean"]
    )
    for plot in (best_of_n.plot_evaluator, best_of_n.plot_reward, best_of_n.plot_peaks):
        plot(json.loads(json.dumps(result.data)))


def test_without_mistakes_nothing_peaks(trial, tmp_path):
    result = best_of_n.curves(trial, planted(errors=0.0), tmp_path)
    reach = np.sqrt(result.data["kl"][-1])
    peaks = [arm["peak"][0] for arm in result.data["arms"].values()]
    assert all(at is None or at > reach for at in peaks)
    lines = result.says[: len(peaks)]
    assert all(line.startswith(name) for name, line in zip(result.data["arms"], lines, strict=True))
    assert all(line.endswith(f" {trial.numbers[-1]}.") and "d =" not in line for line in lines)
    assert (
        result.rows[0]["n"] == 1 and len(result.rows) == 8 * len(trial.numbers) and trial.numbers[-1] == 128
    )


def test_one_pass_scores_as_each_does_alone(ensemble, members, tiny_networks, tmp_path):
    small = best_of_n.Trial(
        generator=load_generator(tiny_networks),
        rewards={"a": (ensemble, "a"), "b": (members[0], "b")},
        evaluator=(members[1], "c"),
        n=6,
        most=2,
        batch=4,
    )
    result = best_of_n.score(small, tmp_path, quiet=True)
    assert (
        set(result.data["scores"]) == {"a: member 1", "a: member 2", "a: member 3", "b"}
        and len(result.data["evaluator"]) == 6
    )
    assert result.data["scores"]["a: member 1"] == result.data["scores"]["b"] and [
        row["seed"] for row in result.rows
    ] == list(small.seeds)
    assert set(best_of_n.arms(small)[1]) == {
        f"a: {kind}" for kind in ("mean", "min", "lcb 1", "uwo 0.5", "softmin 0.5")
    }


@pytest.fixture
def command(members, ensemble, tiny_networks, tmp_path):
    """Flags of the command on files of these rewards."""
    files = {f"m{i}": one.save(tmp_path / f"m{i}.safetensors") for i, one in enumerate(members)}
    shared = Reward(
        ensemble.observation,
        RewardEnsemble([one.network for one in members[:2]]),
        {"labels": "0+1", "start": "s"},
    )
    files["joined"] = shared.save(tmp_path / "joined.safetensors")

    def go(*flags: str):
        named = [flag.format(**files, tmp=tmp_path) for flag in flags]
        common = [
            f"--before={tiny_networks}",
            "--n=32",
            "--most=8",
            "--device=cpu",
            f"--outdir={tmp_path / 'page'}",
        ]
        return CliRunner().invoke(main, [*common, *named]), tmp_path / "page"

    return go


@pytest.mark.long
def test_the_page_with_a_reward_as_evaluator(command):
    flags = ("--reward-ckpt={joined}", "--heldout-reward={m2}")
    done, out = command(*flags)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    for arm in ("warm", "softmin 0.5"):
        assert any(line.startswith(arm) and re.search(r"\b8\b", line) for line in lines), arm
    assert 'id="best-of-n"' in (out / "index.html").read_text()
    assert {"best-of-n-evaluator.svg", "best-of-n-peaks.png"} <= {
        path.name for path in (out / "figures").iterdir()
    }
    before = (out / "data" / "scores.json").stat().st_mtime_ns
    again, _ = command(*flags, "--most=4")
    assert (
        again.exit_code == 0
        and (out / "data" / "scores.json").stat().st_mtime_ns == before
        and any(re.match(r"warm\b.*\b4\b", line) for line in again.stdout.splitlines())
    )


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--reward-ckpt={m0}"], ["--heldout-reward", "annotator"]),
        (["--reward-ckpt={m0}", "--heldout-reward={m0}"], ["--heldout-reward", "labels"]),
        (["--reward-ckpt={joined}", "--heldout-reward={m1}"], ["--heldout-reward", "labels"]),
        (["--reward-ckpt={m0}", "--heldout-reward={m1}", "--most=64"], ["--most", "--n=32", "64"]),
        (
            ["--reward-ckpt={tmp}/none.safetensors", "--heldout-reward={m1}"],
            ["--reward-ckpt: ", "none.safetensors"],
        ),
    ],
)
def test_mistakes_are_one_line(command, flags, names):
    done, out = command(*flags)
    rejected(done, *names)
    assert not out.exists()
