"""Campaigns that learn from their answers: which pairs are appended when, and who sees what."""

import contextlib
import itertools
import json
from dataclasses import replace

import pytest

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.active import (
    PairPlanner,
    batch_count,
    candidate_seeds,
    learning_report,
    pair_key,
    pairing_of,
    random_places,
    rises,
    seed_pairs_of,
)
from eg3d_rlhf.people.label.entities import LOCAL, PAIR_TOTAL, CampaignSettings, Choice, Kind, PlannedPair
from eg3d_rlhf.people.label.pairing import PairingOptions, random_seed_pairs
from eg3d_rlhf.people.label.server.options import AppOptions
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes
from eg3d_rlhf.people.label.shape_files import ShapeCache
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.rewards import linear
from tests.people.label.plans import QUIET, answer
from tests.people.label.serving import fill, running
from tests.rejections import raising

PAIRS = 50
_keys = itertools.count()


def request(network, **pairing) -> launch.Request:
    options = {"pairs": PAIRS, "gold": 2, "training": 1, "level": 1.2, **pairing}
    settings = launch.with_defaults(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED | QUIET
    return launch.Request(
        name="c",
        network=str(network),
        after=None,
        pairing=PairingOptions(**{"strategy": "active", **options}),
        settings=settings,
    )


@pytest.fixture(scope="module")
def planned(tiny_networks):
    return launch.plan_campaign(None, request(tiny_networks), lambda line: None)


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return load_generator(tiny_networks)


@pytest.fixture(scope="module")
def observation(generator):
    return linear.slab_of(generator.generator, 12)


@pytest.fixture
def store(tmp_path, planned):
    with Store.open(f"sqlite:///{tmp_path / 'labels.db'}") as opened:
        opened.create_campaign(*planned)
        opened.annotator_without_token(LOCAL)
        yield opened


@pytest.fixture
def planner(store, generator, observation, tmp_path):
    return PairPlanner(
        store, store.campaign("c"), generator, tmp_path, unlabelled=32, observation=observation
    )


def label(store, count, choose=lambda left, right: Choice.LEFT if left > right else Choice.RIGHT):
    """Answer new pairs: the sample with the larger seed is better."""
    campaign = store.campaign("c").id
    annotator = store.annotators()[0].id
    for _ in range(count):
        (assigned, *_) = store.assignments(campaign, annotator, 1)
        shapes = store.plan(campaign).shapes
        choice = choose(shapes[assigned.left].seed, shapes[assigned.right].seed)
        store.submit(campaign, annotator, answer(assigned, f"key {next(_keys)}", choice))


def test_a_campaign_starts_with_random_pairs_and_states_its_total(planned, store):
    settings, pairs = planned
    new_pairs = [pair for pair in pairs if pair.kind is Kind.PAIR]
    assert len(new_pairs) == 33 and settings.extra[PAIR_TOTAL] == PAIRS
    plan = store.plan(store.campaign("c").id)
    assert (plan.pair_count, plan.missing_count, batch_count(plan)) == (33, 17, 0)
    assert store.size(plan.campaign.id, LOCAL) == (PAIRS, PAIRS)
    assert store.progress(plan.campaign.id, 1).total == PAIRS
    assert learning_report(plan)["latest"] is None
    # no seed of gold or practice pairs can become a candidate
    known = {pair.first.seed for pair in pairs if pair.kind is not Kind.PAIR}
    assert not known & set(candidate_seeds(pairing_of(plan.campaign), PAIRS))


def test_batches_follow_the_answers_until_the_total_is_reached(store, planner):
    campaign = store.campaign("c").id
    label(store, 1 + 24)  # a practice pair comes first
    assert not planner.append_batch(), "24 labels are too few"
    label(store, 1)
    assert not planner.append_batch(), "8 pairs are still free"
    label(store, 1)
    assert planner.append_batch() and store.plan(campaign).pair_count == 41
    assert not planner.append_batch(), "the new pairs are free"
    label(store, 8)
    assert planner.append_batch() and store.plan(campaign).pair_count == 49
    label(store, 8)
    assert planner.append_batch() and store.plan(campaign).missing_count == 0
    label(store, 8)
    assert not planner.append_batch() and store.progress(campaign, 1).done == PAIRS
    records = list(seed_pairs_of(store.plan(campaign)).values())
    assert [record.get("batch", 0) for record in records] == [0] * 33 + [1] * 8 + [2] * 8 + [3]
    appended = records[33:]
    assert [record["random"] for record in appended] == [(n + 1) % 5 == 0 for n in range(33, 50)]
    assert all((record["reduction"] is None) == record["random"] for record in appended)
    # one reward for each batch
    assert len({record["reward"] for record in appended}) == 3
    report = learning_report(store.plan(campaign))
    assert (report["pairs"], report["total"]) == (50, 50)
    # Annotators answer the pairs in another order, so some of the random pairs may still be open.
    assert 33 <= report["latest"]["labels"] <= 49 and 25 <= report["latest"]["random_labels"] <= 36
    json.dumps(report)


def test_seeds_are_in_one_pair_and_random_pairs_have_seeds_of_their_own(store, planner):
    label(store, 27)
    assert planner.append_batch()
    pairing = pairing_of(store.campaign("c"))
    records = seed_pairs_of(store.plan(store.campaign("c").id))
    seeds = [seed for pair in records for seed in pair]
    assert len(seeds) == len(set(seeds)) == 82
    reserved = set(range(pairing.first_seed, pairing.first_seed + 2 * PAIRS))
    for pair, record in records.items():
        assert (set(pair) <= reserved) == record.get("random", True)
    random_pairs = [pair_key(*pair) for pair in random_seed_pairs(pairing)]
    assert [pair for pair, record in records.items() if record.get("random", True)] == random_pairs[:35]


def test_ties_and_skips_are_followed_by_random_pairs(store, planner):
    label(store, 1 + 32, lambda left, right: Choice.TIE)
    assert not planner.append_batch(), "a pair is left"
    label(store, 1, lambda left, right: Choice.TIE)
    assert planner.append_batch()
    records = list(seed_pairs_of(store.plan(store.campaign("c").id)).values())[33:]
    assert all(record["random"] and record["reward"] is None for record in records)


def test_two_processes_append_one_batch(store, planner):
    campaign = store.campaign("c").id
    with Store.open(str(store.database.url)) as other:
        before = other.plan(campaign)
        label(store, 27)
        assert planner.append_batch()
        pair = PlannedPair(
            first=replace(next(iter(before.shapes.values())), seed=5, degradation=""),
            second=replace(next(iter(before.shapes.values())), seed=6, degradation=""),
        )
        assert not other.append_pairs(campaign, [pair], len(before.pairs)), "chosen for an older plan"
        assert other.plan(campaign).pair_count == 41
        assert other.plan(campaign).shapes == store.plan(campaign).shapes


def test_the_server_shows_new_pairs_once_they_are_prepared(store, planner, tmp_path):
    campaign = store.campaign("c")
    cache = ShapeCache(tmp_path / "cache")
    fill(cache, (shape for _, shape in store.shapes(campaign.id)))
    addresses = Addresses(b"k" * 32, (token for token, _ in store.shapes(campaign.id)))
    shapes = PreparedShapes(AppOptions(store=store, campaign="c", cache=cache), campaign, addresses.add)
    label(store, 27)
    assert planner.append_batch()
    new_tokens = [token for token, _ in store.shapes(campaign.id)][-16:]
    assert not any(map(shapes.is_ready, new_tokens))
    fill(cache, (shape for _, shape in store.shapes(campaign.id)))
    shapes._checked_at = -1.0  # the next call looks at the cache again
    assert all(map(shapes.is_ready, new_tokens))
    assert [addresses.asset(addresses.address("a", token)) for token in new_tokens] == new_tokens
    assert shapes.progress()["total"] == len(store.shapes(campaign.id))


def test_only_admins_receive_the_state_of_the_reward(planned, tmp_path):
    settings, pairs = planned
    with running(tmp_path, planned=pairs, campaign={"extra": dict(settings.extra)}, exposed=True) as served:
        tokens = {role: served.store.add_annotator(role, role) for role in ("annotator", "admin")}
        with contextlib.closing(served.client(tokens["admin"])) as admin:
            report = admin.get("/api/admin/quality").json()["learning"]
            assert (report["pairs"], report["total"], report["latest"]) == (33, PAIRS, None)
        with contextlib.closing(served.client(tokens["annotator"])) as annotator:
            assert annotator.get("/api/admin/quality").status_code == 403
            reply = annotator.get("/api/assignments?count=3").json()
            assert set(reply["assignments"][0]) == {"assignment", "left", "right", "prompt", "training"}
            assert reply["progress"]["total"] >= PAIRS


def test_labelling_is_advised_to_stop_where_nothing_rises():
    def assessment(labels, half_cosine, accuracy):
        return {"labels": labels, "half_cosine": half_cosine, "accuracy": accuracy}

    first = assessment(25, 0.60, 0.70)
    assert rises([first]) == {"half_cosine": None, "accuracy": None, "stop": False}
    assert rises([first, assessment(74, 0.60, 0.70)])["stop"] is False
    later = rises([first, assessment(33, 0.7, 0.7), assessment(75, 0.70, 0.80)])
    assert later["half_cosine"] == pytest.approx(0.1) and later["stop"] is False
    assert rises([first, assessment(75, 0.61, 0.80)])["stop"] is True
    assert rises([first, assessment(75, 0.70, 0.71)])["stop"] is True
    assert rises([assessment(25, 0.6, None), assessment(75, 0.7, 0.8)])["accuracy"] is None


def test_every_fifth_pair_is_random():
    assert random_places(33, 8) == [False, True, False, False, False, False, True, False]


def test_options_without_effect_are_rejected(tiny_networks):
    for name, value in (("doubtful", 0.5), ("diversity", 0.1)):
        with raising(f"--set {name}", "--reward=FILE"):
            launch.plan_campaign(None, request(tiny_networks, **{name: value}), lambda line: None)
    with raising("--pairs=33", "--strategy=active", "random"):
        launch.plan_campaign(None, request(tiny_networks, pairs=33), lambda line: None)
