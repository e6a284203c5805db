"""Rounds of a tournament: nobody sits out, nobody meets twice, and the standings decide who meets next."""

import itertools

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eg3d_rlhf.people.label.pairing import round_robin, standings, swiss_round
from eg3d_rlhf.preferences.labels import Preference


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def won(*pairs: tuple[int, int]) -> list[Preference]:
    return [Preference(winner=a, loser=b) for a, b in pairs]


@pytest.mark.parametrize("shapes", [2, 4, 6, 10, 16])
def test_all_rounds_together_are_all_pairs(shapes):
    table = round_robin(shapes, shapes - 1, rng())
    assert {frozenset(pair) for pair in table.reshape(-1, 2).tolist()} == {frozenset(p) for p in itertools.combinations(range(shapes), 2)}
    assert all(sorted(play.ravel()) == list(range(shapes)) for play in table)


@pytest.mark.parametrize("shapes", [4, 6, 16, 100])
def test_two_rounds_connect_all_shapes(shapes):
    pairs = round_robin(shapes, 2, rng(1)).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(shapes, shapes))
    assert connected_components(graph, directed=False)[0] == 1


def test_impossible_round_robins_are_refused():
    for shapes, rounds in ((5, 2), (4, 4), (4, 0), (0, 1)):
        with pytest.raises(ValueError, match="round_robin"):
            round_robin(shapes, rounds, rng())


def test_standings_go_by_points_then_by_the_points_of_the_others():
    results = won((1, 2), (1, 3), (2, 3), (4, 1)) + [Preference(winner=5, loser=6, tie=True)]
    # points: 1: 2, 2: 1, 4: 1, 5: .5, 6: .5, 3: 0.  Opponents of 2: 1 and 3 (2 points), of 4: 1 (2 points): a draw by lot
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


def test_fewer_pairs_let_the_upper_part_go_on():
    pairs = swiss_round(won((1, 5), (2, 6), (3, 7), (4, 8)), 2, rng())
    assert sorted(itertools.chain(*pairs)) == [1, 2, 3, 4]


def test_swiss_rounds_never_repeat_while_that_is_possible():
    """Truth by seed number: a larger seed wins. Up to 5 rounds of 12 shapes there is always a pairing without repeats."""
    for seed in range(20):
        results = won(*((max(p), min(p)) for p in (round_robin(12, 1, rng(seed))[0] + 1).tolist()))
        for _ in range(5):
            results += won(*((max(p), min(p)) for p in swiss_round(results, 6, rng(seed))))
        met = [frozenset((r.winner, r.loser)) for r in results]
        assert len(set(met)) == len(met) == 36


def test_shapes_meet_again_where_nobody_else_is_left():
    assert swiss_round(won((1, 2)), 1, rng()) in ([(1, 2)], [(2, 1)])


def test_an_odd_table_leaves_out_its_last():
    pairs = swiss_round(won((1, 2), (1, 3)), 9, rng())
    assert len(pairs) == 1 and 1 in pairs[0]


def test_the_best_comes_out_on_top():
    """True strength = seed; five rounds among 16 shapes."""
    results: list[Preference] = []
    pairs = (round_robin(16, 1, rng(3))[0] + 1).tolist()
    for _ in range(5):
        results += won(*((max(p), min(p)) for p in pairs))
        pairs = swiss_round(results, 8, rng(3))
    assert standings(results, rng(3))[0] == 16


def test_no_results_are_refused():
    with pytest.raises(ValueError, match="first round"):
        swiss_round([], 3, rng())
