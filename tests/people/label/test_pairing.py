"""Plans of pairs: decided by their options, disjoint where they promise it, with known answers spread between."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.people.label.drawing import DAMAGES
from eg3d_rlhf.people.label.entities import CampaignSettings, Kind
from eg3d_rlhf.people.label.pairing import PairingOptions, known_answers, plan, spread
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.labels import Preference
from tests.people.label.plans import numbered

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
    assert seeds_of(plan_pairs(replace(options, seed=1), GENERATOR)) != seeds_of(plan_pairs(options, GENERATOR))


def test_shapes_are_drawn_as_the_options_say():
    options = PairingOptions(pairs=5, psi=0.7, level=12.0, resolution=64, triangles=900)
    shapes = [shape for pair in plan_pairs(options, GENERATOR) for shape in (pair.first, pair.second)]
    assert {(s.generator, s.source, s.psi, s.level, s.resolution, s.triangles) for s in shapes} == {("c" * 64, "", 0.7, 12.0, 64, 900)}


def test_another_networks_place_is_kept(tmp_path):
    elsewhere = SimpleNamespace(hash="d" * 64, path=tmp_path / "x.safetensors", generator=SimpleNamespace(level=10.0))
    assert plan_pairs(PairingOptions(pairs=1), elsewhere)[0].first.source == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize("strategy", ["random", "tournament"])
def test_known_answers_are_about_seeds_of_their_own_and_right(strategy):
    pairs = plan_pairs(PairingOptions(pairs=60, strategy=strategy, gold=12, training=4), GENERATOR)
    compared = {seed for pair in seeds_of(pairs) for seed in pair}
    known = [p for p in pairs if p.kind is not Kind.PAIR]
    assert Counter(p.kind for p in known) == {Kind.GOLD: 12, Kind.TRAINING: 4}
    assert len({p.first.seed for p in known}) == 16 and compared.isdisjoint(p.first.seed for p in known)
    for pair in known:
        right, wrong = (pair.first, pair.second) if pair.expected == "first" else (pair.second, pair.first)
        assert right.degradation == "" and wrong.degradation in DAMAGES and replace(wrong, degradation="") == right
    assert {p.expected for p in known} == {"first", "second"}
    assert {p.first.degradation + p.second.degradation for p in known if p.kind is Kind.GOLD} == set(DAMAGES)
    assert all(p.expected is None and not p.first.degradation and not p.second.degradation for p in pairs if p.kind is Kind.PAIR)


def test_training_comes_first_and_is_explained_gold_is_not():
    pairs = plan_pairs(PairingOptions(pairs=30), GENERATOR)
    assert [p.kind for p in pairs[:4]] == [Kind.TRAINING] * 3 + [Kind.PAIR]
    assert all((p.explanation != "") is (p.kind is Kind.TRAINING) for p in pairs)
    assert len({p.explanation for p in pairs[:3]}) == 3  # one for each damage


@pytest.mark.parametrize(("pairs", "gold"), [(100, 4), (100, 7), (3, 5), (5, 0), (1, 1)])
def test_gold_lies_at_even_distances(pairs, gold):
    pair, check = numbered(2), object()
    mixed = spread([pair] * pairs, [check] * gold)
    places = [i for i, item in enumerate(mixed) if item is check]
    assert len(mixed) == pairs + gold and len(places) == gold and mixed[0] is pair
    if gold:
        assert np.ptp(np.diff([-1, *places])) <= 1 + gold // pairs


def test_there_is_gold_by_default_and_none_on_request():
    assert len(seeds_of(plan_pairs(PairingOptions(pairs=1000), GENERATOR), Kind.GOLD)) == 40
    assert len(seeds_of(plan_pairs(PairingOptions(pairs=10), GENERATOR), Kind.GOLD)) == 4
    assert {p.kind for p in plan_pairs(PairingOptions(pairs=10, gold=0, training=0), GENERATOR)} == {Kind.PAIR}


@pytest.mark.parametrize(("pairs", "rounds"), [(100, 4), (90, 4), (7, 3), (10, 1)])
def test_a_tournament_has_so_many_pairs_and_so_many_of_each_shape(pairs, rounds):
    found = seeds_of(plan_pairs(PairingOptions(pairs=pairs, strategy="tournament", rounds=rounds), GENERATOR))
    games = Counter(seed for pair in found for seed in pair)
    assert len(found) == pairs == len({frozenset(p) for p in found})
    assert max(games.values()) == rounds and min(games.values()) >= rounds - 1


def test_the_next_round_follows_from_the_results():
    options = PairingOptions(pairs=8, strategy="tournament", rounds=1, gold=2)
    results = [Preference(winner=max(p), loser=min(p), generator="c" * 64, psi=1.0) for p in seeds_of(plan_pairs(options, GENERATOR))]
    pairs = plan_pairs(options, GENERATOR, results)
    winners = {r.winner for r in results}
    assert len(seeds_of(pairs)) == 8 and all((a in winners) == (b in winners) for a, b in seeds_of(pairs))
    assert len(seeds_of(plan_pairs(replace(options, pairs=4), GENERATOR, results))) == 4
    known = {p.first.seed for p in pairs if p.kind is not Kind.PAIR}
    assert known.isdisjoint(seed for pair in seeds_of(pairs) for seed in pair)


@pytest.mark.parametrize(("field", "value"), [("generator", "e" * 64), ("psi", 0.5)])
def test_results_about_other_shapes_are_refused(field, value):
    result = replace(Preference(winner=1, loser=2, generator="c" * 64, psi=1.0), **{field: value})
    with pytest.raises(ValueError, match="next round with the network and psi"):
        plan(PairingOptions(pairs=8, strategy="tournament"), GENERATOR, [result])


def test_results_without_a_tournament_are_refused():
    with pytest.raises(ValueError, match="for a tournament only"):
        plan(PairingOptions(pairs=8), GENERATOR, [Preference(winner=1, loser=2)])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"pairs": 0}, "pairs must be >= 1"), ({"strategy": "best"}, "random, active, tournament"), ({"psi": -1}, "psi"),
        ({"level": np.nan}, "level"), ({"resolution": 8}, "resolution must be >= 16"), ({"pool": 1.0}, "pool must be >= 2"),
        ({"gold": -1}, "gold"),
        ({"diversity": 1.5}, "diversity"), ({"first_seed": 2**32 - 10}, "smaller one"),
        ({"triangles": 3}, "triangles"), ({"training": -1}, "training"), ({"rounds": 0}, "rounds"), ({"seed": -1}, "seed"),
    ],
)
def test_impossible_options_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        PairingOptions(**fields)


def test_the_fewest_pairs_of_a_tournament_can_be_planned():
    for rounds in range(1, 12):
        options = PairingOptions(pairs=rounds * (rounds // 2) + 1, strategy="tournament", rounds=rounds)
        assert len(seeds_of(plan_pairs(options, GENERATOR))) == options.pairs
        if options.pairs > 1:
            with pytest.raises(ValueError, match=f"at least {options.pairs} pairs"):
                plan_pairs(replace(options, pairs=options.pairs - 1), GENERATOR)


def test_sides_of_known_answers_are_drawn():
    expected = Counter(p.expected for p in known_answers(numbered(400), Kind.GOLD, np.random.default_rng(0)))
    assert 150 < expected["first"] < 250


def test_a_plan_goes_through_the_store_unchanged(tmp_path):
    pairs = plan_pairs(PairingOptions(pairs=6, gold=3), GENERATOR)
    with Store.open(f"sqlite:///{tmp_path}/labels.db") as store:
        campaign = store.create_campaign(CampaignSettings(name="first"), pairs)
        stored = [shape for _, shape in store.shapes(campaign)]
    expected = dict.fromkeys(shape for pair in pairs for shape in (pair.first, pair.second))
    assert stored == list(expected) and {shape.degradation for shape in stored} == {"", *DAMAGES}


def test_the_level_is_the_generators_own_unless_one_is_named():
    other = SimpleNamespace(hash="c" * 64, path=bundled.GENERATOR, generator=SimpleNamespace(level=7.5))
    for named, level in ((None, 7.5), (12.0, 12.0)):
        found = plan(PairingOptions(pairs=2, level=named), other)
        assert {side.level for pair in found.pairs for side in (pair.first, pair.second)} == {level} and found.report["level"] == level
