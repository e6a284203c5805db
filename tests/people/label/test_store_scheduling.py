"""Assignments: determined by seed and name, in the requested shares, each pair as often as it has places, and
none lost by absence.
"""

import re
from collections import Counter

import pytest
from sqlalchemy.dialects import sqlite

from eg3d_rlhf.people.label import assignments
from eg3d_rlhf.people.label.assignments import LEASE_SECONDS
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Kind
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import QUIET, answer, answer_all, plan


def campaign_of(store, pairs, name="c", **settings):
    """A campaign without gold checks or repeats, unless asked for."""
    return store.create_campaign(CampaignSettings(**{"name": name, **QUIET, **settings}), pairs)


def annotator(store, name="ann"):
    store.add_annotator(name)
    return store.annotators()[-1].id


def work_through(store, campaign, who, **how):
    answer_all(store, campaign, who, **how)
    name = next(a.name for a in store.annotators() if a.id == who)
    return list(store.judgements(annotators=[name]))


def seeds(shown, store, campaign):
    return [tuple(dict(store.shapes(campaign))[side].seed for side in (a.left, a.right)) for a in shown]


def test_order_and_sides_follow_from_seed_and_name(tmp_path):
    issued = {}
    for run, (seed, name) in enumerate([(1, "ann"), (1, "ann"), (2, "ann"), (1, "bob")]):
        with Store.open(f"sqlite:///{tmp_path / str(run)}.db") as store:
            campaign = campaign_of(store, plan(40), seed=seed)
            issued[run] = seeds(
                store.assignments(campaign, annotator(store, name), needed_count=40), store, campaign
            )
    assert issued[0] == issued[1]
    assert [a != b for a, b in ((issued[0], issued[2]), (issued[0], issued[3]))] == [True, True]
    for shown in issued.values():
        assert sorted(min(pair) for pair in shown) == list(range(0, 80, 2))
        # sides: 20 +- 12 is beyond 3.5 standard deviations
        assert 8 <= sum(left < right for left, right in shown) <= 32


def test_asking_again_gives_the_same_and_each_annotator_each_pair_once(store):
    campaign = campaign_of(store, plan(12), annotators_per_pair=2)
    ann, bob, eve = (annotator(store, name) for name in ("ann", "bob", "eve"))
    shown = store.assignments(campaign, ann)
    assert (
        store.assignments(campaign, ann) == shown
        and store.assignments(campaign, ann, needed_count=2) == shown[:2]
    )
    assert store.assignments(campaign, ann, needed_count=5)[:3] == shown
    for who in (ann, bob):
        rows = work_through(store, campaign, who)
        assert len({row.pair for row in rows}) == len(rows) == 12 and [row.sequence for row in rows] == list(
            range(1, 13)
        )
    assert store.assignments(campaign, eve) == []  # both places of every pair are taken


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """240 pairs worked through with repeats, swaps and gold checks."""
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('long') / 'l.db'}") as store:
        settings = {"repeat_share": 0.1, "swap_share": 0.05, "repeat_gap": 20, "gold_every": 15, "seed": 3}
        campaign = campaign_of(store, plan(240, gold=10), **settings)
        yield work_through(store, campaign, annotator(store))


def test_shares_of_repeats_swaps_and_gold(long_run):
    kinds = Counter(row.kind for row in long_run)
    trials = len(long_run)
    assert kinds[Kind.PAIR] == 240
    assert abs(kinds[Kind.REPEAT] - 0.1 * trials) <= 2 and abs(kinds[Kind.SWAP] - 0.05 * trials) <= 2
    gold = [i for i, row in enumerate(long_run) if row.kind is Kind.GOLD]
    # one in each block of 15
    assert [i // 15 for i in gold] == list(range(len(gold))) and len(gold) >= trials // 15
    assert len({i % 15 for i in gold}) > 5  # at places that cannot be foreseen
    counts = Counter(long_run[i].pair for i in gold)
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 10


def test_repeats_keep_the_sides_and_swaps_do_not(long_run):
    first = {row.pair: row for row in long_run if row.kind is Kind.PAIR}
    again = [row for row in long_run if row.kind in (Kind.REPEAT, Kind.SWAP)]
    assert len({row.pair for row in again}) == len(again) > 30
    for row in again:
        before = first[row.pair]
        assert row.sequence - before.sequence > 20
        assert (
            (row.left == before.left)
            == (row.kind is Kind.REPEAT)
            == (row.first_is_left == before.first_is_left)
        )


@pytest.mark.parametrize(
    ("pairs", "settings", "choice", "kinds"),
    [
        # what is skipped never returns
        (plan(40), {"repeat_share": 0.25, "swap_share": 0.25, "repeat_gap": 1}, Choice.SKIP, {Kind.PAIR: 40}),
        # every trial gold ends when each was shown
        (plan(3, gold=4), {"gold_every": 1}, Choice.LEFT, {Kind.GOLD: 4, Kind.PAIR: 3}),
        (plan(4, training=3), {}, Choice.LEFT, {Kind.TRAINING: 3, Kind.PAIR: 4}),
    ],
)
def test_kinds_of_trials(store, pairs, settings, choice, kinds):
    rows = work_through(store, campaign_of(store, pairs, **settings), annotator(store), choice=choice)
    lessons = [min(row.left.seed, row.right.seed) for row in rows if row.kind is Kind.TRAINING]
    assert Counter(row.kind for row in rows) == kinds and lessons == [0, 2, 4][: len(lessons)]
    assert [row.kind for row in rows[: len(lessons)]] == [Kind.TRAINING] * len(lessons), (
        "training comes first, in the plan's order"
    )


def test_an_annotator_is_done_after_so_many_trials(store):
    campaign = campaign_of(store, plan(40, gold=2, training=2), trials_per_annotator=10, gold_every=5)
    ann = annotator(store)
    assert store.progress(campaign, ann).total == 10
    rows = work_through(store, campaign, ann)
    assert len(rows) == 12 and store.progress(campaign, ann).done == 10
    store.undo(campaign, ann, "u")
    assert len(store.assignments(campaign, ann)) == 1


def test_only_prepared_pairs_are_issued(store):
    campaign = campaign_of(store, plan(200, gold=3), gold_every=4)
    ann = annotator(store)
    prepared = set()
    assert store.assignments(campaign, ann, readiness_test=prepared.__contains__) == []
    assets = [asset for asset, _ in store.shapes(campaign)]
    prepared |= set(assets[300:309])  # pairs 149 .. 152 of the plan, and one shape of the next
    rows = work_through(store, campaign, ann, ready=prepared.__contains__)
    assert sorted(min(row.left.seed, row.right.seed) for row in rows) == [300, 302, 304, 306]
    prepared |= set(assets)
    assert len(work_through(store, campaign, ann, most=20, ready=prepared.__contains__)) > 4


def test_absent_annotators_lose_their_places_to_others(store, clock):
    campaign = campaign_of(store, plan(3))
    ann = annotator(store)
    bob = annotator(store, "bob")
    mine = store.assignments(campaign, ann)
    clock.now += LEASE_SECONDS - 1
    assert store.assignments(campaign, bob) == []
    assert store.assignments(campaign, ann) == mine  # seen again: the lease begins anew
    clock.now += LEASE_SECONDS - 1
    assert store.assignments(campaign, bob) == []
    clock.now += 2
    theirs = store.assignments(campaign, bob)
    assert len(theirs) == 3 and not {a.token for a in theirs} & {a.token for a in mine}
    assert store.assignments(campaign, ann) == [] and store.progress(campaign, ann).total == 0


def test_who_returns_in_time_gets_the_same_assignments_back(store, clock):
    campaign = campaign_of(store, plan(6))
    ann = annotator(store)
    bob = annotator(store, "bob")
    mine = store.assignments(campaign, ann)
    assert len(store.assignments(campaign, bob)) == 3
    clock.now += LEASE_SECONDS + 1
    store.submit(campaign, bob, answer(store.assignments(campaign, bob)[0], "k"))
    first = store.assignments(campaign, bob)  # ann's places were given back, and bob took one
    assert len(first) == 3
    back = store.assignments(campaign, ann)
    assert len(back) == 2 and {a.token for a in back} < {a.token for a in mine}
    work_through(store, campaign, ann)
    work_through(store, campaign, bob)
    assert Counter(row.pair for row in store.judgements()) == dict.fromkeys(range(1, 7), 1)


def test_late_answers_are_kept(store, clock):
    """A phone that was offline for hours sends what it has: nothing is thrown away, even if others have
    judged the pair since.
    """
    campaign = campaign_of(store, plan(1))
    ann = annotator(store)
    bob = annotator(store, "bob")
    (mine,) = store.assignments(campaign, ann)
    clock.now += 2 * LEASE_SECONDS
    (theirs,) = store.assignments(campaign, bob)
    assert not store.submit(campaign, ann, answer(mine, "k")).duplicate
    store.submit(campaign, bob, answer(theirs, "k"))
    assert [row.annotator for row in store.judgements()] == ["ann", "bob"]
    assert store.undo(campaign, ann, "u") == mine.token == store.assignments(campaign, ann)[0].token
    store.submit(campaign, ann, answer(mine, "k2", Choice.TIE))
    assert [row.choice for row in store.judgements()] == ["left", "tie"]


def test_practice_is_waited_for_unless_it_cannot_be_drawn(store):
    campaign = campaign_of(store, plan(4, training=3))
    ann = annotator(store)
    assets = [asset for asset, _ in store.shapes(campaign)]
    prepared = set(assets[6:])
    lost = set()

    def shown():
        return store.assignments(campaign, ann, 5, prepared.__contains__, lost.__contains__)

    assert shown() == [] and store.progress(campaign, ann, lost.__contains__).training_left == 3
    prepared |= set(assets[:2])
    (first,) = shown()
    assert first.training
    store.submit(campaign, ann, answer(first, "k0"))
    assert shown() == []
    lost.add(assets[2])  # the second one
    assert shown() == [] and store.progress(campaign, ann, lost.__contains__).training_left == 1
    prepared |= set(assets)
    assert [assigned.training for assigned in shown()] == [True, False, False, False, False]


@pytest.mark.parametrize("many", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_the_total_stays_and_is_reached_by_who_works_alone(store, clock, many):
    campaign = campaign_of(store, plan(many, gold=5), repeat_share=0.05, swap_share=0.05, gold_every=25)
    ann = annotator(store)
    totals = []
    shown = []
    while shown or (shown := store.assignments(campaign, ann, 10)):
        totals.append(store.progress(campaign, ann).total)
        store.submit(campaign, ann, answer(shown.pop(0), str(len(totals))))
        clock.now += 0.7
    kinds = Counter(row.kind for row in store.judgements())
    assert set(totals) == {len(totals)} and kinds[Kind.PAIR] == many
    assert [abs(kinds[kind] - len(totals) / 20) <= 2 for kind in (Kind.REPEAT, Kind.SWAP)] == [True, True]
    assert abs(kinds[Kind.GOLD] - len(totals) / 25) <= 1


def test_pairs_that_cannot_be_drawn_are_not_counted(store, clock):
    campaign = campaign_of(store, plan(40), repeat_share=0.1)
    ann = annotator(store)
    assets = [asset for asset, _ in store.shapes(campaign)]
    # pairs 0 .. 4 of the plan
    before = store.progress(campaign, ann).total
    lost = set(assets[:9])
    clock.now += 1
    assert before - 7 <= store.progress(campaign, ann, lost.__contains__).total <= before - 5
    rows = work_through(store, campaign, ann, ready=lambda asset: asset not in lost)
    at = store.progress(campaign, ann, lost.__contains__)
    assert at.done == at.total == len(rows) and Counter(row.kind for row in rows)[Kind.PAIR] == 35


HOT = {
    "answered": assignments.COUNTS,
    "free": assignments.FREE,
    "had": assignments.FREE_ASSIGNED_BEFORE,
    "hers": assignments.FREE_FOR_ANNOTATOR,
    "open": assignments.OPEN_ASSIGNMENTS,
    "past": assignments.PAST,
    "stamp": assignments.STAMP,
    "window": assignments.PAGE,
    "expired": assignments.EXPIRED,
}


@pytest.mark.parametrize("name", HOT)
def test_what_is_asked_at_every_judgement_reads_no_table_whole(store, name):
    store.create_campaign(CampaignSettings(name="c"), plan(6))
    text = str(HOT[name].compile(dialect=sqlite.dialect(paramstyle="named")))
    values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
    with store.database.read() as c:
        steps = [
            row[3] for row in c.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {text}", values)
        ]
    scans = [
        step
        for step in steps
        if re.match(r"SCAN (pairs|assignments|judgements|shapes|annotators|a|j)\b", step)
    ]
    assert steps and scans == []
