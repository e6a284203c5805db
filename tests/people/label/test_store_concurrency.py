"""Many at once, and a process that dies: no pair too often, no key twice, nothing acknowledged is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import text

from eg3d_rlhf.people.label.entities import CampaignSettings, ConflictError, Kind
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import QUIET, answer, plan

REPO = Path(__file__).resolve().parents[3]


def work(store, campaign, who):
    while shown := store.assignments(campaign, who):
        for assigned in shown:
            store.submit(campaign, who, answer(assigned, assigned.token))


def everybody(store, count):
    for k in range(count):
        store.add_annotator(f"annotator {k}")
    return [a.id for a in store.annotators()]


def assert_each_pair_so_often(store, places):
    rows = list(store.judgements())
    pairs = [row for row in rows if row.kind is Kind.PAIR]
    assert set(Counter(row.pair for row in pairs).values()) == {places}
    assert max(Counter((row.annotator, row.pair) for row in pairs).values()) == 1
    with store.database.read() as c:
        assert (
            c.execute(text("SELECT count(*) FROM pairs WHERE kind = 'pair' AND taken <> places")).scalar()
            == 0
        )
    return rows


def test_fifty_annotators_at_once_share_the_pairs(database_url):
    with Store.open(database_url) as store:
        campaign = store.create_campaign(CampaignSettings(name="c", annotators_per_pair=2, **QUIET), plan(60))
        people = everybody(store, 50)
        start = threading.Barrier(50)
        with ThreadPoolExecutor(50) as pool:
            list(pool.map(lambda who: (start.wait(), work(store, campaign, who)), people))
        assert len(assert_each_pair_so_often(store, 2)) == 120


def test_two_stores_share_one_database(database_url):
    """As two server processes do: nothing in memory keeps them apart."""
    stores = [Store.open(database_url) for _ in range(4)]
    campaign = stores[0].create_campaign(CampaignSettings(name="c", annotators_per_pair=3, **QUIET), plan(10))
    people = everybody(stores[0], 8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: work(stores[k % 4], campaign, people[k]), range(8)))
    assert_each_pair_so_often(stores[0], 3)
    for store in stores:
        store.close()


def test_one_annotator_in_many_tabs(database_url):
    with Store.open(database_url) as store:
        campaign = store.create_campaign(CampaignSettings(name="c", gold_every=0), plan(30))
        (who,) = everybody(store, 1)
        with ThreadPoolExecutor(8) as pool:
            shown = list(pool.map(lambda _: store.assignments(campaign, who), range(16)))
            assert all(each == shown[0] for each in shown) and len(shown[0]) == 3
            sent = list(pool.map(lambda _: store.submit(campaign, who, answer(shown[0][0], "k")), range(8)))
            assert (
                sorted(s.duplicate for s in sent) == [False] + [True] * 7
                and len({s.judgement for s in sent}) == 1
            )

            def conflicting(k):
                try:
                    return store.submit(campaign, who, answer(shown[0][1], f"k{k}")).duplicate
                except ConflictError:
                    return "conflict"

            assert Counter(pool.map(conflicting, range(8))) == {False: 1, "conflict": 7}
            assert {*pool.map(lambda _: store.undo(campaign, who, "u"), range(8))} == {shown[0][1].token}
        assert [row.undone for row in store.judgements(include_undone=True)] == [False, True]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import answer
store, campaign = Store.open(sys.argv[2], create=False), 1
def one(annotator):
    while shown := store.assignments(campaign, annotator.id):
        judgement = store.submit(campaign, annotator.id, answer(shown[0], shown[0].token)).judgement
        sys.stdout.write(f"[{judgement}, \\"{shown[0].token}\\"]\\n")
        sys.stdout.flush()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(one, store.annotators()))
"""


def test_what_was_acknowledged_survives_a_kill(database_url):
    with Store.open(database_url) as store:
        store.create_campaign(CampaignSettings(name="c", **QUIET), plan(120))
        everybody(store, 4)
    acknowledged = {}
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(REPO), database_url],
            stdout=subprocess.PIPE,
            text=True,
            env=quiet,
        )
        lines = [process.stdout.readline() for _ in range(15)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        acknowledged.update(json.loads(line) for line in lines if line.endswith("]\n"))
    with Store.open(database_url) as store:
        assignments = {row.id: row.assignment for row in store.judgements()}
        assert len(acknowledged) >= 30 and acknowledged.items() <= assignments.items()
        # at most those in flight were not acknowledged
        assert len(set(assignments.values())) == len(assignments) <= len(acknowledged) + 8
        for annotator in store.annotators():
            work(store, 1, annotator.id)
        assert len(assert_each_pair_so_often(store, 1)) == 120


def test_a_connection_that_was_lost_while_idle_is_replaced(postgres_url):
    with Store.open(postgres_url) as store:
        store.create_campaign(CampaignSettings(name="c"), plan(2))
        with Store.open(postgres_url) as other, other.database.write() as c:
            others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
            assert c.execute(text(f"SELECT pg_terminate_backend(pid) {others}")).all()
        assert store.campaign("c").pairs == 2
