"""Test the accuracy on held-out pairs: its margins against a loop in float64, the control's pairs, and that
random answers do not pass the test.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from eg3d_rlhf.core.statistics import clustered_mean, clustered_rate
from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.tuning.flow.training.accuracy import (
    Accuracy,
    PairAccuracy,
    compute_accuracy,
    compute_confidence,
    invert_half,
    score_order,
    signal_test,
)
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.dpo import draw_pairs
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from eg3d_rlhf.tuning.flow.training.trainer import ACCURACY, policy_and_reference
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import TinyPipeline, structure_pairs, tiny_config, voxel_pairs
from tests.tuning.flow.tiny_trainings import run


def moved(pipeline, stage=1):
    """Return the stage's network after a step in a random direction."""
    policy, _ = policy_and_reference(pipeline.stages[stage], tiny_config(lora=None))
    torch.manual_seed(1)
    with torch.no_grad():
        policy.to_out.weight += 0.1 * torch.randn_like(policy.to_out.weight)
    return policy


@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_margins_are_those_of_dpo_on_shared_times_and_noises_whatever_the_batch(stage):
    pipeline = TinyPipeline()
    place = ["structure", "voxels"].index(stage)
    pairs = structure_pairs(7) if stage == "structure" else voxel_pairs(7)
    policy = moved(pipeline, place)
    base = pipeline.stages[place]
    reference = FrozenModel(shared_copy(base.model))
    measured = PairAccuracy(ConditionedStage.from_pipeline(pipeline, stage), pairs, draws=3, batch=2)
    found = measured.measure(policy, reference)
    expected = np.zeros(7)
    rise = np.zeros(7)
    before = np.zeros(7)
    for i, pair in enumerate(pairs):
        for draw in range(3):
            cond = pipeline.conditioning([pair.condition], stage)
            drawn = draw_pairs(base, [pair], cond, None, DpoConfig(), measured.seed, draw)
            assert drawn.t[0] == drawn.t[1]
            with torch.no_grad():
                own, ref = (
                    base.path.errors(base.velocity(drawn.x_t, drawn.t, drawn.cond, m), drawn.x_0, drawn.eps)
                    .double()
                    .numpy()
                    for m in (policy, base.model)
                )
            expected[i] += ((ref[0] - own[0]) - (ref[1] - own[1])) / 3
            rise[i] = rise[i] + (own[0] - ref[0]) / 3
            before[i] = before[i] + ref[0] / 3
    np.testing.assert_allclose(found.margins, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.preferred, rise / before.mean(), rtol=1e-4, atol=1e-6)
    again = PairAccuracy(ConditionedStage.from_pipeline(pipeline, stage), pairs, draws=3, batch=7).measure(
        policy, reference
    )
    np.testing.assert_allclose(again.margins, found.margins, rtol=1e-4, atol=1e-6)
    untouched = measured.measure(shared_copy(base.model), reference)
    assert (
        (untouched.margins == 0).all()
        and (score_order(untouched.margins) == 0.5).all()
        and (untouched.preferred == 0).all()
    )


def test_swapping_a_pair_turns_its_margin():
    pipeline = TinyPipeline()
    pairs = voxel_pairs(6)
    flipped = [type(p)(**{**vars(p), "preferred": p.rejected, "rejected": p.preferred}) for p in pairs]
    policy = moved(pipeline)
    reference = FrozenModel(shared_copy(pipeline.stages[1].model))
    margins = [
        PairAccuracy(ConditionedStage.from_pipeline(pipeline, "voxels"), of)
        .measure(policy, reference)
        .margins
        for of in (pairs, flipped)
    ]
    np.testing.assert_allclose(margins[0], -margins[1], rtol=1e-5, atol=1e-7)


def test_the_accuracy_is_logged_chooses_and_stops_early(tmp_path):
    """Without an evaluator, learnable labels raise the accuracy.

    With inverted labels no update is better than the untuned network, and training stops.
    """
    pairs = voxel_pairs(24)
    unseen = voxel_pairs(12, seed=7)
    learnt = run(tmp_path / "a", pairs, unseen=unseen)
    values = {line["step"]: line[ACCURACY] for line in learnt.stats if ACCURACY in line}
    assert (
        list(values) == [0, 10, 20, 30, 40]
        and values[0] == 0.5
        and values[learnt.kept_step] == max(values.values()) > 0.7
    )
    assert all(math.isfinite(line["held_out_margin"]) for line in learnt.stats if ACCURACY in line)
    turned = [type(p)(**{**vars(p), "preferred": p.rejected, "rejected": p.preferred}) for p in unseen]
    said = []
    other = run(tmp_path / "b", pairs, tiny_config(patience=2), unseen=turned, say=said.append)
    assert other.kept_step == 0 and other.stats[-1]["step"] == 20
    assert "20" in said[-1] and f"{other.stats[-1][ACCURACY]:.3f}" in said[-1]
    assert not said[-1].startswith("step ")


def test_evaluations_leave_what_is_learnt_as_it_is(tmp_path):
    plain = run(tmp_path / "a", config=tiny_config(steps=9))
    seen = run(
        tmp_path / "b", config=tiny_config(steps=9), unseen=voxel_pairs(6, seed=7), held_out=lambda model: 0.5
    )
    drop = {"win_rate", ACCURACY, "held_out_margin", "held_out_preferred"}
    updates = [{k: v for k, v in line.items() if k not in drop} for line in seen.stats if "loss" in line]
    assert updates == [line for line in plain.stats if "loss" in line]


def test_the_control_turns_half_of_every_condition_and_stages_alike():
    for n in (1, 2, 5, 9, 24):
        pairs = voxel_pairs(n)
        others = structure_pairs(n)
        turned = [a.preferred is not b.preferred for a, b in zip(pairs, invert_half(pairs, 3), strict=True)]
        of_others = [
            a.preferred is not b.preferred
            for a, b in zip(others[::-1], invert_half(others[::-1], 3), strict=True)
        ]
        assert of_others[::-1] == turned and abs(2 * sum(turned) - n) <= 1
        counts = Counter(p.condition for p in pairs)
        for name in counts:
            assert (
                abs(
                    2 * sum(t for t, p in zip(turned, pairs, strict=True) if p.condition == name)
                    - counts[name]
                )
                <= 1
            )
    pairs = voxel_pairs(12)
    drawn = {
        tuple(a.preferred is b.preferred for a, b in zip(pairs, invert_half(pairs, s), strict=True))
        for s in range(6)
    }
    assert len(drawn) > 1


# Intervals and the rule.


def test_clustered_intervals_against_their_formulas():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 6, 40)
    values = rng.integers(0, 2, 40).astype(float)
    p = values.mean()
    n = 40
    C = len(set(clusters))
    sums = [
        sum(v - p for v, c in zip(values, clusters, strict=True) if c == k) for k in sorted(set(clusters))
    ]
    variance = max(p * (1 - p) / n, sum(s**2 for s in sums) / n**2 * C / (C - 1))
    t = stats.t.ppf(0.975, C - 1)
    m = p * (1 - p) / variance
    centre = (p + t * t / 2 / m) / (1 + t * t / m)
    half = t / (1 + t * t / m) * math.sqrt(p * (1 - p) / m + t * t / 4 / m / m)
    found = clustered_rate(values, clusters)
    assert (
        found.mean == p
        and found.lo == pytest.approx(centre - half)
        and found.hi == pytest.approx(centre + half)
    )
    difference = rng.normal(size=40)
    mean = clustered_mean(difference, np.arange(40))
    again = stats.t.interval(0.95, 39, difference.mean(), difference.std(ddof=1) / math.sqrt(40))
    assert (mean.lo, mean.hi) == pytest.approx(again)
    with raising("clustered_rate", "two", "one"):
        clustered_rate([1.0, 0.0], ["a", "a"])


def answers(rng, prompts: int, ranked: bool):
    """Return outcomes of a fixed order of four assets per prompt, and of random answers: independent for each
    pair, or from a random ranking.
    """
    if not ranked:
        return rng.integers(0, 2, 6 * prompts).astype(float)
    ranks = [rng.permutation(4) for _ in range(prompts)]
    return np.array([float(r[i] < r[j]) for r in ranks for i, j in itertools.combinations(range(4), 2)])


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("conditions", [3, 8, 30])
def test_random_answers_pass_in_less_than_a_fortieth_of_stages(conditions, ranked):
    rng = np.random.default_rng(conditions + 100 * ranked)
    names = np.repeat(np.arange(conditions), 6)
    passed = sum(clustered_rate(answers(rng, conditions, ranked), names).lo > 0.5 for _ in range(1000))
    assert passed <= 35  # 25 expected at most; 35 is two standard deviations above


def test_the_rule():
    names = np.repeat(np.arange(20), 6).tolist()
    rng = np.random.default_rng(0)
    good, coin = (compute_accuracy(rng.random(120) - share, names) for share in (0.2, 0.5))
    assert (
        signal_test(5, good, None, names).learnable_signal
        and signal_test(5, good, coin, names).learnable_signal
    )
    assert (
        not signal_test(0, good, coin, names).learnable_signal
        and not signal_test(5, coin, None, names).learnable_signal
    )
    said = signal_test(5, good, good, names)
    assert not said.learnable_signal and said.above_control[1] <= 0
    assert all(f"{figure:+.3f}" in said.why for figure in said.above_control)  # the control is the reason
    assert compute_confidence(1) == compute_confidence(2) == 0.95 and compute_confidence(5) == pytest.approx(
        0.98
    )
    assert isinstance(good, Accuracy) and good.to_json()["pairs"] == 120
    # of the preferred ones' error: pairs in order, assets worse
    for rise, away in ((0.3, True), (-0.3, False), (0.0, False)):
        found = compute_accuracy(rng.random(120) - 0.2, names, preferred_rises=rng.normal(rise, 0.2, 120))
        said = signal_test(5, found, coin, names)
        assert (
            said.learnable_signal
            and said.likelihood_displacement == (away and found.preferred[1] > 0)
            and found.preferred[1] < rise < found.preferred[2]
        )
    with raising("prompts", "3", "2"):
        compute_accuracy(np.ones(4), ["a", "a", "b", "b"])
