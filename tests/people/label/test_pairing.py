"""Plans of pairs: decided by their options, disjoint where they promise it, with known answers interleaved
between.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.people.label.entities import DAMAGES, Kind
from eg3d_rlhf.people.label.pairing import PairingOptions, plan
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES
from tests.rejections import raising

GENERATOR = SimpleNamespace(hash="c" * 64, path=bundled.GENERATOR, generator=SimpleNamespace(level=10.0))


def plan_pairs(*args) -> list:
    return plan(*args).pairs


def seeds_of(pairs, kind=Kind.PAIR) -> list[tuple[int, int]]:
    return [(p.first.seed, p.second.seed) for p in pairs if p.kind is kind]


def test_random_pairs_use_every_seed_once():
    pairs = plan_pairs(PairingOptions(pairs=200, first_seed=30), GENERATOR)
    seeds = [seed for pair in seeds_of(pairs) for seed in pair]
    assert sorted(seeds) == list(range(30, 430)) and seeds != sorted(seeds)


@pytest.mark.parametrize("strategy", ["random", "tournament"])
def test_equal_options_give_equal_plans_and_the_seed_decides(strategy):
    options = PairingOptions(pairs=40, strategy=strategy)
    assert plan(options, GENERATOR) == plan(options, GENERATOR)
    assert seeds_of(plan_pairs(replace(options, seed=1), GENERATOR)) != seeds_of(
        plan_pairs(options, GENERATOR)
    )


def test_shapes_are_drawn_as_the_options_say(tmp_path):
    options = PairingOptions(pairs=5, psi=0.7, level=12.0, resolution=64, triangles=900)
    shapes = [shape for pair in plan_pairs(options, GENERATOR) for shape in (pair.first, pair.second)]
    assert {(s.generator, s.source, s.psi, s.level, s.resolution, s.triangles) for s in shapes} == {
        ("c" * 64, "", 0.7, 12.0, 64, 900)
    }
    other = SimpleNamespace(
        hash="d" * 64, path=tmp_path / "x.safetensors", generator=SimpleNamespace(level=7.5)
    )
    made = plan(PairingOptions(pairs=1), other)
    assert made.pairs[0].first.source == str(tmp_path / "x.safetensors"), "another network's place is kept"
    assert (
        {side.level for pair in made.pairs for side in (pair.first, pair.second)}
        == {made.report["level"]}
        == {7.5}
    ), "its own level"


@pytest.mark.parametrize("strategy", ["random", "tournament"])
def test_known_answers_are_about_seeds_of_their_own_and_right(strategy):
    pairs = plan_pairs(PairingOptions(pairs=60, strategy=strategy, gold=12, training=4), GENERATOR)
    compared = {seed for pair in seeds_of(pairs) for seed in pair}
    known = [p for p in pairs if p.kind is not Kind.PAIR]
    assert Counter(p.kind for p in known) == {Kind.GOLD: 12, Kind.TRAINING: 4}
    assert len({p.first.seed for p in known}) == 16 and compared.isdisjoint(p.first.seed for p in known)
    for pair in known:
        right, wrong = (pair.first, pair.second) if pair.expected == "first" else (pair.second, pair.first)
        assert (
            right.degradation == ""
            and wrong.degradation in DAMAGES
            and replace(wrong, degradation="") == right
        )
    assert {p.expected for p in known} == {"first", "second"}
    assert {p.first.degradation + p.second.degradation for p in known if p.kind is Kind.GOLD} == set(DAMAGES)
    assert all(
        p.expected is None and not p.first.degradation and not p.second.degradation
        for p in pairs
        if p.kind is Kind.PAIR
    )


@pytest.mark.parametrize(("pairs", "rounds"), [(100, 4), (90, 4), (7, 3), (10, 1)])
def test_a_tournament_has_so_many_pairs_and_so_many_of_each_shape(pairs, rounds):
    planned = seeds_of(
        plan_pairs(PairingOptions(pairs=pairs, strategy="tournament", rounds=rounds), GENERATOR)
    )
    games = Counter(seed for pair in planned for seed in pair)
    assert len(planned) == pairs == len({frozenset(p) for p in planned})
    assert max(games.values()) == rounds and min(games.values()) >= rounds - 1


def test_the_next_round_follows_from_the_results():
    options = PairingOptions(pairs=8, strategy="tournament", rounds=1, gold=2)
    results = [
        Preference(winner=max(p), loser=min(p), generator="c" * 64, psi=1.0)
        for p in seeds_of(plan_pairs(options, GENERATOR))
    ]
    pairs = plan_pairs(options, GENERATOR, results)
    winners = {r.winner for r in results}
    assert len(seeds_of(pairs)) == 8 and all((a in winners) == (b in winners) for a, b in seeds_of(pairs))
    assert len(seeds_of(plan_pairs(replace(options, pairs=4), GENERATOR, results))) == 4
    known = {p.first.seed for p in pairs if p.kind is not Kind.PAIR}
    assert known.isdisjoint(seed for pair in seeds_of(pairs) for seed in pair)


@pytest.mark.parametrize(
    ("strategy", "result", "names"),
    [
        ("tournament", {"generator": "e" * 64}, ("generator", "e" * 12, "psi 1.0")),
        ("tournament", {"psi": 0.5}, ("generator", "c" * 12, "psi 0.5")),
    ],
)
def test_results_that_do_not_fit_are_rejected(strategy, result, names):
    results = [Preference(**{"winner": 1, "loser": 2, "generator": "c" * 64, "psi": 1.0, **result})]
    with raising(*names):
        plan(PairingOptions(pairs=8, strategy=strategy), GENERATOR, results)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"pairs": 0}, ("pairs", "1", "0")),
        ({"strategy": "best"}, ("--strategy", *STRATEGIES, "'best'")),
        ({"psi": -1}, ("psi", "-1")),
        ({"level": np.nan}, ("level", "nan")),
        ({"level": np.inf}, ("level", "inf")),
        ({"resolution": 8}, ("resolution", "16", "8")),
        ({"pool": 1.0}, ("pool", "2", "1.0")),
        ({"gold": -1}, ("gold", "-1")),
        ({"diversity": 1.5}, ("diversity", "1.5")),
        ({"first_seed": 2**32 - 10}, ("--first-seed", "4294967286", "4294967295")),
        ({"triangles": 3}, ("triangles", "100", "3")),
        ({"training": -1}, ("training", "-1")),
        ({"rounds": 0}, ("rounds", "0")),
        ({"seed": -1}, ("seed", "-1")),
    ],
)
def test_impossible_options_are_rejected(fields, names):
    with raising(*names):
        PairingOptions(**fields)
