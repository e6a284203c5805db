"""Active and close pairs: by disagreement or closeness, spread out, items used evenly."""

import math

import numpy as np

from eg3d_rlhf.preferences.pair_strategies import Item, Items, Scored
from eg3d_rlhf.preferences.pair_strategies.by_scores import candidates, closeness, disagreement, select


def scored(items: int = 40, members: int = 2, seed: int = 0) -> Scored:
    rng = np.random.default_rng(seed)
    return Scored(rng.normal(size=(members, items)), rng.normal(size=(items, 6)))


def seed_pairs() -> np.ndarray:
    items = Items(members=[Item()] * 40, unlimited=True)
    return candidates(items, np.random.default_rng(1), 20)


def test_disagreement_against_a_plain_loop():
    scores = scored(members=3).scores
    pairs = seed_pairs()

    def by_hand(a: int, b: int) -> float:
        chances = [1 / (1 + math.exp(-(row[a] - row[b]))) for row in scores]
        mean = sum(chances) / 3
        return math.sqrt(sum((p - mean) ** 2 for p in chances) / 3)

    assert np.allclose(disagreement(scores, pairs), [by_hand(a, b) for a, b in pairs])
    assert np.allclose(disagreement(scores, pairs), disagreement(scores, pairs[:, ::-1]))
    assert np.all(disagreement(np.repeat(scores[:1], 3, axis=0), pairs) < 1e-12)  # members that agree


def test_without_diversity_each_step_takes_the_greatest_doubt_left():
    scored_items = scored()
    pairs = seed_pairs()
    chosen = select(scored_items, pairs, 8, diversity=0.0)
    doubt = dict(zip(map(tuple, pairs.tolist()), disagreement(scored_items.scores, pairs), strict=True))
    used: set[int] = set()
    for a, b in chosen.pairs.tolist():
        assert (a, b) == max((p for p in doubt if used.isdisjoint(p)), key=doubt.get)
        used |= {a, b}
    assert len(used) == 16


def test_closeness_is_1_for_equal_scores_and_0_where_the_better_one_is_certain():
    scores = np.array([[0.0, 0.0, 50.0, math.log(3)]])
    pairs = np.array([[0, 1], [0, 2], [2, 0], [0, 3], [3, 0]])
    assert np.allclose(closeness(scores, pairs), [1, 0, 0, 0.5, 0.5])  # P = 3/4 of the last two


def test_items_are_used_evenly_and_again_where_no_others_are_left():
    scored_items = scored(items=6)
    every = np.array([(a, b) for a in range(6) for b in range(a + 1, 6)])
    for count in (3, 6, 10, 15, 99):
        chosen = select(scored_items, every, count, diversity=0.3).pairs
        assert len({tuple(pair) for pair in chosen.tolist()}) == len(chosen) == min(count, 15)
        assert np.bincount(chosen.ravel(), minlength=6).max() <= -(-2 * len(chosen) // 6) + 1
    disjoint = select(
        scored(items=12), np.array([(a, b) for a in range(12) for b in range(a + 1, 12)]), 6, 0.3
    )
    assert sorted(disjoint.pairs.ravel().tolist()) == list(range(12))
    star = np.array([(0, b) for b in range(1, 6)])  # the first item is in all of them
    assert len(select(scored_items, star, 4, diversity=0.3).pairs) == 4
