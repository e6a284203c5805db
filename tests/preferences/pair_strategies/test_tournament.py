"""Rounds of a tournament: no item sits out, no two meet twice, and the standings decide the next pairs."""

import itertools

import numpy as np

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies.tournament import round_robin, standings, swiss_round


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def won(*pairs: tuple[int, int]) -> list[Preference]:
    return [Preference(winner=a, loser=b) for a, b in pairs]


def test_standings_go_by_points_then_by_the_points_of_the_others():
    results = won((1, 2), (1, 3), (2, 3), (4, 1)) + [Preference(winner=5, loser=6, tie=True)]
    # points: 1: 2, 2: 1, 4: 1, 5: .5, 6: .5, 3: 0.  Opponents of 2: 1 and 3 (2 points), of 4: 1 (2 points): a
    # draw by lot
    table = standings(results, rng())
    assert table[0] == 1 and set(table[1:3]) == {2, 4} and set(table[3:5]) == {5, 6} and table[5] == 3
    assert table == standings(results, rng())
    later = standings([*results, *won((2, 7), (4, 3))], rng())
    assert later[0] in (1, 2, 4) and later.index(4) < later.index(7)


def test_a_swiss_round_pairs_neighbours_that_have_not_met():
    results = won((1, 5), (2, 6), (3, 7), (4, 8))
    pairs = swiss_round(results, 100, rng())
    met = {frozenset((r.winner, r.loser)) for r in results}
    assert len(pairs) == 4 and sorted(itertools.chain(*pairs)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {frozenset(p) for p in pairs}.isdisjoint(met)
    assert all((a <= 4) == (b <= 4) for a, b in pairs)  # winners meet winners
    # with fewer pairs the upper part continues
    assert sorted(itertools.chain(*swiss_round(results, 2, rng()))) == [1, 2, 3, 4]
    # they meet again if no other item is left
    assert swiss_round(won((1, 2)), 1, rng()) in ([(1, 2)], [(2, 1)])
    odd = swiss_round(won((1, 2), (1, 3)), 9, rng())
    assert len(odd) == 1 and 1 in odd[0]  # an odd table leaves out its last


def test_swiss_rounds_never_repeat_while_that_is_possible():
    """Truth by seed number: a larger seed wins. Up to 5 rounds of 12 shapes there is always a pairing without
    repeats.
    """
    for seed in range(20):
        results = won(*((max(p), min(p)) for p in (round_robin(12, 1, rng(seed))[0] + 1).tolist()))
        for _ in range(5):
            results += won(*((max(p), min(p)) for p in swiss_round(results, 6, rng(seed))))
        met = [frozenset((r.winner, r.loser)) for r in results]
        assert len(set(met)) == len(met) == 36
