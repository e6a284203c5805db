"""Leaderboards: closed forms, groups and too few games; intervals that cover a known truth."""

import json
import math
import re

import numpy as np
import pytest

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.preferences.leaderboard import Design, Game, leaderboard, strengths
from tests.preferences.coverage import Games, leaderboard_coverage, leaderboard_grid


def games(first: str, second: str, wins: int, losses: int, ties: int = 0, start: int = 0) -> list[Game]:
    """Each over a prompt of its own, before one annotator."""
    winners = [first] * wins + [second] * losses + [None] * ties
    return [Game(first, second, winner, "ann", start + i) for i, winner in enumerate(winners)]


def two(scores, annotator=None, prompt=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(scores)
    design = Design(
        cells=np.array([[0, 1]]),
        cell=np.zeros(n, dtype=int),
        annotator=np.zeros(n, dtype=int) if annotator is None else annotator,
        prompt=np.arange(n) if prompt is None else prompt,
    )
    return strengths(np.array(scores, dtype=float)[None], design)


def test_of_two_generators_and_independent_games_the_interval_is_wilsons():
    estimates, lo, hi = two([1] * 700 + [0] * 300)
    share = 1 / (1 + np.exp(-2 * np.array([lo[0, 0], estimates[0, 0], hi[0, 0]])))
    wilson = wilson_interval(700, 1000)
    assert share == pytest.approx(
        [wilson.lo, 700.5 / 1001, wilson.hi], abs=1e-3
    ) and estimates.sum() == pytest.approx(0)


def test_a_hundred_points_ahead_win_64_per_cent():
    ((first, second),) = leaderboard(games("a", "b", 640, 360)).groups
    assert first.name == "a" and first.points - second.points == pytest.approx(100, abs=1)
    assert first.points + second.points == pytest.approx(2000)
    assert first.lo < first.points < first.hi and first.score == 0.64


def test_one_who_always_wins_has_finite_points_and_a_bound_on_one_side_alone():
    board = leaderboard(
        [*games("best", "a", 30, 0), *games("best", "b", 30, 0, start=30), *games("a", "b", 15, 15, start=60)]
    )
    standing_of_name = {s.name: s for s in board.groups[0]}
    assert (
        math.isfinite(standing_of_name["best"].points)
        and standing_of_name["best"].hi is None
        and 1000 < standing_of_name["best"].lo < standing_of_name["best"].points
    )
    assert standing_of_name["a"].hi is not None
    assert [
        name for name in standing_of_name if any(re.search(rf"\b{name}\b", note) for note in board.notes())
    ] == ["best"]
    json.dumps(board.to_dict(), allow_nan=False)


def test_ties_count_half_and_both_bad_is_one():
    even = [g._replace(bad=True) for g in games("a", "b", 0, 0, ties=40)]
    a, b = leaderboard(even).groups[0]
    assert (a.points, b.points) == pytest.approx((1000, 1000)) and (a.ties, a.both_bad, a.wins, a.score) == (
        40,
        40,
        0,
        0.5,
    )
    ((a, _),) = leaderboard(games("a", "b", 30, 10, ties=40)).groups
    ((same, _),) = leaderboard(games("a", "b", 50, 30)).groups
    assert a.points == pytest.approx(same.points) and a.hi - a.lo < same.hi - same.lo  # half the variance


def test_groups_that_never_met_are_not_compared():
    board = leaderboard([*games("a", "b", 20, 10), *games("x", "y", 5, 25, start=90)])
    assert [[s.name for s in group] for group in board.groups] == [["a", "b"], ["y", "x"]]
    assert len(board.notes()) == 1 + len(leaderboard(games("a", "b", 20, 10)).notes())


def test_too_few_games_or_prompts_have_no_points_and_the_sentence_what_is_missing():
    board = leaderboard([*games("a", "b", 12, 7)])
    assert (
        board.groups == ()
        and board.few[0].points is None
        and re.findall(r"\b(?:b|\d+)\b", board.notes()[-1]) == ["b", "19", "19", "1"]
    )
    same = [g._replace(prompt=i % 9, annotator=str(i)) for i, g in enumerate(games("a", "b", 30, 15))]
    assert re.findall(r"\d+", leaderboard(same).notes()[-1]) == ["45", "9", "1"]
    board = leaderboard([*games("a", "b", 20, 10), *games("b", "late", 3, 2, start=90)])
    assert [s.name for s in board.groups[0]] == ["a", "b"] and [s.games for s in board.groups[0]] == [30, 30]
    assert [s.name for s in board.few] == ["late"] and any(
        re.search(r"\blate\b.*\b5\b", note) for note in board.notes()
    )
    assert leaderboard([]).to_dict()["groups"] == [] and leaderboard([]).notes() == []


def test_annotators_who_disagree_widen_the_interval():
    people = np.repeat(np.arange(6), 10)
    mixed = [i % 10 < 6 for i in range(60)]
    # the same share of wins, but each annotator gives always the same answer
    apart = [i < 36 for i in range(60)]
    even, by_person = (two(scores, people) for scores in (mixed, apart))
    assert (
        even[0] == pytest.approx(by_person[0])
        and (by_person[2] - by_person[1])[0, 0] > 1.5 * (even[2] - even[1])[0, 0]
    )


def check_coverage(prompts: int, studies: int, full: bool, least: float, most: float) -> None:
    kinds = list(leaderboard_grid(prompts, full))
    coverages = [leaderboard_coverage(kind, studies, seed=1) for kind in kinds]
    assert 0.93 <= np.mean(coverages) <= 0.97 and min(coverages) >= least and max(coverages) <= most, list(
        zip(coverages, kinds, strict=True)
    )


def test_intervals_hold_the_truth_at_the_fewest_prompts_that_are_shown():
    check_coverage(10, 60, full=False, least=0.85, most=1)


@pytest.mark.long
@pytest.mark.parametrize("prompts", [10, 20])
def test_intervals_hold_the_truth_over_the_whole_grid(prompts):
    check_coverage(prompts, 400, full=True, least=0.9, most=0.995)


def test_one_who_nearly_always_wins_is_covered_too():
    games_model = Games(generators=3, strength=2.5, prompts=10, annotators=1)
    assert leaderboard_coverage(games_model, 200, seed=3) > 0.93
