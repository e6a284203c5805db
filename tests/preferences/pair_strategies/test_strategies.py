"""Every strategy on every kind of items: allowed pairs, as many as possible, decided by the seed."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    Ensemble,
    Item,
    Items,
    Scored,
    StrategyOptions,
    check_rewards,
)
from eg3d_rlhf.preferences.pair_strategies.random_pairs import balanced
from tests.rejections import raising

NAMES = ("random", "active", "close", "tournament", "blocks")
SEEDED = ("random", "tournament", "blocks")  # the others draw nothing among few candidates


def ensemble(count: int, members: int = 2) -> Ensemble:
    rng = np.random.default_rng(count)
    scores = rng.normal(size=(members, count))
    embeddings = rng.normal(size=(count, 3))
    return Ensemble(
        lambda numbers: Scored(scores[:, list(numbers)], embeddings[list(numbers)]), members, [{"file": "x"}]
    )


def seeds(name: str, options: StrategyOptions) -> Items:
    count = STRATEGIES[name].items_for(options)
    return Items(members=[Item()] * count, unlimited=True, ensemble=ensemble(count))


def assets(prompts: int = 6, sources: int = 3, each: int = 2) -> Items:
    """Finished assets; the second of each prompt and generator is the same file for all generators."""
    members = [
        Item(prompt=f"p{p}", source=f"g{s}", content=f"{p}-{s}" if e == 0 else f"{p}")
        for s in range(sources)
        for p in range(prompts)
        for e in range(each)
    ]
    return Items(members=members, ensemble=ensemble(len(members)))


def chosen(name: str, items: Items, options: StrategyOptions, seed: int = 0, answers=()) -> list:
    rng = np.random.default_rng(seed)
    return list(map(tuple, STRATEGIES[name].plan(items, answers, rng, options).pairs))


def allowed(items: Items) -> set[frozenset]:
    """By definition, of every two items."""
    several = len({item.source for item in items.members}) > 1
    return {
        frozenset((i, j))
        for (i, a), (j, b) in itertools.combinations(enumerate(items.members), 2)
        if a.prompt == b.prompt and a.content != b.content and (a.source != b.source or not several)
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pairs", [10, 37])
def test_pairs_of_seeds_are_as_many_as_asked_for_and_different(name, pairs):
    options = StrategyOptions(pairs=pairs)
    chosen_pairs = chosen(name, seeds(name, options), options)
    assert len({frozenset(pair) for pair in chosen_pairs}) == len(chosen_pairs) == pairs
    assert all(a != b for a, b in chosen_pairs)
    assert chosen_pairs == chosen(name, seeds(name, options), options)
    assert chosen_pairs != chosen(name, seeds(name, options), options, seed=1)
    games = Counter(itertools.chain(*chosen_pairs))
    assert max(games.values()) == (1 if name in ("random", "active", "close") else options.rounds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(6, 3, 2), (5, 1, 4), (1, 5, 1)])
@pytest.mark.parametrize("pairs", [4, 20, 999])
def test_pairs_of_assets_are_allowed_ones(name, sizes, pairs):
    items = assets(*sizes)
    options = StrategyOptions(pairs=pairs, rounds=50)
    chosen_pairs = chosen(name, items, options)
    assert {frozenset(pair) for pair in chosen_pairs} <= allowed(items)
    assert (
        len({frozenset(pair) for pair in chosen_pairs})
        == len(chosen_pairs)
        == min(pairs, len(allowed(items)))
    )
    assert chosen_pairs == chosen(name, items, options)


@pytest.mark.parametrize("name", SEEDED)
def test_the_seed_decides_pairs_of_assets(name):
    options = StrategyOptions(pairs=5)
    assert chosen(name, assets(), options) != chosen(name, assets(), options, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_items_of_which_no_two_are_compared_give_no_pairs(name):
    items = assets(4, 1, 1)
    assert chosen(name, items, StrategyOptions(pairs=5)) == []


@pytest.mark.parametrize(("name", "worth"), [("active", max), ("close", min)])
def test_the_first_pair_by_scores_is_the_best_of_all(name, worth):
    """Two members and one item of each source: for each pair, disagreement by hand, or closeness."""
    items = assets(4, 4, 1)
    scores = items.scored().scores
    better = {
        pair: [1 / (1 + np.exp(-(row[min(pair)] - row[max(pair)]))) for row in scores]
        for pair in allowed(items)
    }
    by_hand = {
        "active": {pair: abs(p - q) / 2 for pair, (p, q) in better.items()},
        "close": {pair: abs(p + q - 1) for pair, (p, q) in better.items()},
    }[name]
    options = StrategyOptions(pairs=6, diversity=0.0)
    assert frozenset(chosen(name, items, options)[0]) == worth(by_hand, key=by_hand.get)
    report = STRATEGIES[name].plan(items, [], np.random.default_rng(0), options).report
    assert [tuple(entry["pair"]) for entry in report["why"]] == chosen(name, items, options)


def test_a_share_of_the_pairs_of_assets_is_random():
    items = assets()
    options = StrategyOptions(pairs=12, doubtful=0.25, diversity=0.0)
    plan = STRATEGIES["active"].plan(items, [], np.random.default_rng(0), options)
    by_scores = {frozenset(entry["pair"]) for entry in plan.report["why"]}
    every = [frozenset(pair) for pair in plan.pairs]
    assert len(set(every)) == len(every) == 12 and len(by_scores) == 3 and by_scores < set(every)


def test_blocks_are_complete():
    options = StrategyOptions(pairs=30, rounds=4)  # 3 blocks of 5 seeds
    items = seeds("blocks", options)
    assert len(items) == 15
    games = Counter(itertools.chain(*chosen("blocks", items, options)))
    assert set(games.values()) == {4}
    study = Items(
        members=[Item(prompt=str(i), source=side) for i in (5, 3, 4) for side in "ab"], ordered=True
    )
    assert chosen("blocks", study, StrategyOptions(pairs=3)) == [(0, 1), (2, 3), (4, 5)]


def test_a_tournament_of_assets_has_its_rounds_in_every_prompt():
    items = assets(3, 6, 1)
    options = StrategyOptions(pairs=3 * 3 * 2, rounds=2)
    made = chosen("tournament", items, options)
    games = Counter(itertools.chain(*made))
    assert len(games) == 18 and set(games.values()) == {2}
    answers = [Preference(winner=min(pair), loser=max(pair)) for pair in made]
    for _ in range(2):
        later = chosen("tournament", items, StrategyOptions(pairs=9), answers=answers)
        assert len(later) == 9 and {frozenset(pair) for pair in later} <= allowed(items)
        met = {frozenset((answer.winner, answer.loser)) for answer in answers}
        assert met.isdisjoint(map(frozenset, later))
        answers += [Preference(winner=min(pair), loser=max(pair)) for pair in later]


def test_a_later_round_pairs_different_generators():
    items = assets(2, 2, 4)
    answers = [
        Preference(winner=min(pair), loser=max(pair))
        for pair in chosen("tournament", items, StrategyOptions(pairs=99, rounds=3))
    ]
    later = chosen("tournament", items, StrategyOptions(pairs=8), answers=answers)
    assert later and {frozenset(pair) for pair in later} <= allowed(items)


def test_balanced_ends_where_there_is_nothing():
    assert list(balanced({}, np.random.default_rng(0))) == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"pairs": 0}, ("pairs", "1", "0")),
        ({"pool": 1.0}, ("pool", "2", "1.0")),
        ({"doubtful": 0.0}, ("doubtful", "0")),
        ({"diversity": 1.5}, ("diversity", "1.5")),
        ({"rounds": 0}, ("rounds", "0")),
    ],
)
def test_impossible_options_are_rejected(options, names):
    with raising(*names):
        StrategyOptions(**options)


def test_an_unknown_strategy_and_too_few_rewards_are_rejected():
    with raising("--strategy", *NAMES, "'best'"):
        STRATEGIES["best"]
    for name, least in (("active", 2), ("close", 1)):
        check_rewards(name, least)
        with raising(f"--strategy={name}", str(least), str(least - 1)):
            check_rewards(name, least - 1)
    check_rewards("random", 0)


def test_a_strategy_is_imported_when_it_is_asked_for_and_torch_never():
    code = (
        "import sys, eg3d_rlhf.preferences.pair_strategies as p; known = set(sys.modules);"
        " assert not [n for n in known if n.startswith('eg3d_rlhf.preferences.pair_strategies.')];"
        " [p.STRATEGIES[name] for name in p.STRATEGIES]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
