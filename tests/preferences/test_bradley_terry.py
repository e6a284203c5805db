"""Strengths against closed forms and a published table; cycles against counting by hand."""

import itertools
import math

import numpy as np
import pytest

from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry, cycles


def games(wins: dict) -> list[Comparison]:
    """{(winner, loser): times}."""
    return [Comparison(a, b) for (a, b), n in wins.items() for _ in range(n)]


def strength(result, item) -> float:
    return float(result.strength[result.items.index(item)])


def test_two_items_have_the_log_odds_and_its_variance():
    result = bradley_terry(games({("a", "b"): 30, ("b", "a"): 10}))
    assert strength(result, "a") - strength(result, "b") == pytest.approx(math.log(3))
    contrast = np.array([1.0, -1.0])
    assert contrast @ result.covariance @ contrast == pytest.approx(1 / 30 + 1 / 10)
    assert result.strength.sum() == pytest.approx(0) and not result.regularised and result.tie_weight == 0


def test_two_items_with_ties_have_davidsons_closed_form():
    ties = [Comparison("a", "b", True)] * 5 + [Comparison("b", "a", True)] * 7
    result = bradley_terry(games({("a", "b"): 18, ("b", "a"): 8}) + ties)
    assert strength(result, "a") - strength(result, "b") == pytest.approx(math.log(18 / 8))
    assert result.tie_weight == pytest.approx(12 / math.sqrt(18 * 8))


def test_the_american_league_of_1987():
    teams = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")  # Agresti, Categorical Data Analysis
    rows = ([0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10], [6, 2, 6, 7, 0, 7, 12],
            [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0])  # fmt: skip
    result = bradley_terry(games({(teams[i], teams[j]): n for i, row in enumerate(rows) for j, n in enumerate(row)}))
    over_baltimore = [strength(result, team) - strength(result, "Baltimore") for team in teams]
    assert over_baltimore == pytest.approx([1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0], abs=6e-3)
    i, j = result.items.index("Milwaukee"), result.items.index("Baltimore")
    error = math.sqrt(result.covariance[i, i] + result.covariance[j, j] - 2 * result.covariance[i, j])
    assert error == pytest.approx(0.343, abs=2e-3)


def test_the_score_equations_hold_at_the_maximum():
    rng = np.random.default_rng(0)
    pairs = [Comparison(*rng.choice(8, 2, replace=False).tolist(), tie=bool(rng.random() < 0.2)) for _ in range(300)]
    result = bradley_terry(pairs)
    points, expected, draws = np.zeros(8), np.zeros(8), 0.0
    s = {item: math.exp(strength(result, item)) for item in range(8)}
    for a, b, tie in pairs:
        points[a] += 0.5 if tie else 1
        points[b] += 0.5 if tie else 0
        root = result.tie_weight * math.sqrt(s[a] * s[b])
        total = s[a] + s[b] + root
        expected[a] += (s[a] + root / 2) / total
        expected[b] += (s[b] + root / 2) / total
        draws += root / total
    assert expected == pytest.approx(points, abs=1e-6) and draws == pytest.approx(sum(p.tie for p in pairs), abs=1e-6)


def test_an_unbeaten_item_is_held_by_the_prior_and_reported():
    result = bradley_terry(games({("a", "b"): 5, ("b", "c"): 3, ("c", "b"): 2}))
    assert result.regularised and np.isfinite(result.strength).all() and result.strength.argmax() == result.items.index("a")
    separate = bradley_terry(games({("a", "b"): 5, ("b", "a"): 2, ("c", "d"): 4, ("d", "c"): 4}))
    assert separate.regularised and strength(separate, "c") == pytest.approx(strength(separate, "d"), abs=1e-9)


def test_a_wider_prior_lets_the_strengths_go_further():
    wins = games({("a", "b"): 5})
    narrow, wide = (bradley_terry(wins, prior_sd=sd) for sd in (0.5, 5.0))
    assert 0 < strength(narrow, "a") < strength(wide, "a")


def test_ties_alone_make_equals():
    result = bradley_terry([Comparison("a", "b", True)] * 4)
    assert result.strength == pytest.approx([0, 0], abs=1e-9) and not result.regularised and result.tie_weight > 1000


def test_exchanging_winner_and_loser_negates_the_strengths():
    rng = np.random.default_rng(3)
    pairs = [Comparison(*rng.choice(6, 2, replace=False).tolist()) for _ in range(120)]
    forward, backward = bradley_terry(pairs), bradley_terry([Comparison(b, a) for a, b, _ in pairs])
    for item in range(6):
        assert strength(forward, item) == pytest.approx(-strength(backward, item), abs=1e-7)


def test_the_intervals_cover_known_strengths():
    rng = np.random.default_rng(5)
    truth = np.array([-1.0, -0.3, 0.2, 1.1])
    covered = []
    for _ in range(150):
        pairs = []
        for a, b in itertools.combinations(range(4), 2):
            wins = rng.binomial(25, 1 / (1 + math.exp(truth[b] - truth[a])))
            pairs += games({(a, b): wins, (b, a): 25 - wins})
        result = bradley_terry(pairs)
        where = [result.items.index(k) for k in range(4)]
        covered.append((result.lo[where] <= truth) & (truth <= result.hi[where]))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_what_cannot_be_compared_is_refused():
    for wrong in ([], [Comparison("a", "a")]):
        with pytest.raises(ValueError, match="two different items"):
            bradley_terry(wrong)
    with pytest.raises(ValueError, match="prior_sd"):
        bradley_terry([Comparison("a", "b")], prior_sd=0)


def test_cycles_by_hand():
    circle = games({("a", "b"): 1, ("b", "c"): 1, ("c", "a"): 1})
    assert cycles(circle).to_dict() == {"triples": 1, "cyclic": 1, "share": 1.0, "share_by_chance": 0.25, "largest_knot": 3}
    assert cycles(games({("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 1})).cyclic == 0
    outvoted = cycles(circle + games({("a", "c"): 2}))  # a : c is 2 : 1 now
    assert (outvoted.triples, outvoted.cyclic) == (1, 0)
    undecided = cycles(circle + games({("a", "c"): 1}))
    assert (undecided.triples, undecided.cyclic, undecided.share) == (0, 0, None)
    assert cycles([Comparison("a", "b", True)]).knot == 0


def test_cycles_agree_with_a_loop():
    rng = np.random.default_rng(2)
    beats = {(a, b) if rng.random() < 0.5 else (b, a) for a, b in itertools.combinations(range(12), 2) if rng.random() < 0.8}
    triples = cyclic = 0
    for trio in itertools.combinations(range(12), 3):
        edges = [e for e in itertools.permutations(trio, 2) if e in beats]
        triples += len(edges) == 3
        cyclic += len(edges) == 3 and len({winner for winner, _ in edges}) == 3
    found = cycles([Comparison(*e) for e in beats])
    assert (found.triples, found.cyclic) == (triples, cyclic) and cyclic > 0
