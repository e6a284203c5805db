"""The store on SQLite and on PostgreSQL: what is written once stays, what is sent twice counts once, secrets
are not kept.
"""

import math
import sqlite3

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from eg3d_rlhf.people.label.database import APPEND_ONLY
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, ConflictError, Mode, PlannedPair
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import answer, plan, shape
from tests.rejections import raising


@pytest.fixture
def store(database_url, clock):
    with Store.open(database_url, clock=clock) as opened:
        yield opened


@pytest.fixture
def work(store):
    """Campaign and annotator: 6 pairs, one training pair."""
    return begin(store)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """A store on SQLite with a campaign and an annotator, for what must leave it alone."""
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('lasting') / 'l.db'}") as opened:
        yield opened, *begin(opened)


def begin(store):
    campaign = store.create_campaign(CampaignSettings(name="first", gold_every=0), plan(6, training=1))
    store.add_annotator("ann")
    return campaign, store.annotators()[0].id


def answered(store, campaign, annotator, count, start=0):
    tokens = []
    for k in range(start, start + count):
        tokens.append(store.assignments(campaign, annotator)[0].token)
        store.submit(campaign, annotator, answer(tokens[-1], f"key {k}"))
    return tokens


def test_a_campaign_comes_back_as_it_was_made(store, database_url):
    settings = CampaignSettings(
        name="c",
        mode=Mode.STUDY,
        seed=5,
        annotators_per_pair=2,
        trials_per_annotator=9,
        extra={"why": [1, None]},
    )
    pairs = plan(3, gold=1, training=1)
    campaign = store.create_campaign(settings, pairs)
    with Store.open(database_url) as again:
        stored = again.campaign("c")
        assert (stored.id, stored.settings, stored.pairs) == (
            campaign,
            settings,
            5,
        ) and again.campaigns() == [stored]
        assert [s.seed for _, s in again.shapes(campaign)] == list(range(10))
        assert again.shapes(campaign) == store.shapes(campaign) and again.campaign("other") is None
        asset, drawn = again.shapes(campaign)[3]
        assert dict(again.shapes(campaign))[asset] == drawn == shape(3) and "x" not in dict(
            again.shapes(campaign)
        )


@pytest.mark.parametrize(
    ("name", "pairs", "names"),
    [
        ("first", plan(1), ("'first'",)),
        ("", plan(1), ("200", "''")),
        ("a\nb", plan(1), ("200", r"'a\nb'")),
        ("c", [], ("pairs",)),
        ("c", [PlannedPair(first=shape(1), second=shape(1))], ("pair 0", "seed 1")),
    ],
)
def test_plans_that_cannot_be_shown_are_rejected_whole(lasting, name, pairs, names):
    store, *_ = lasting
    with raising("campaign", *names):
        store.create_campaign(CampaignSettings(name=name), pairs)
    assert [c.settings.name for c in store.campaigns()] == ["first"]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": ""},
        {"key": "a\0b"},
        {"key": "\ud800"},
        {"key": "k" * 201},
        {"page_version": "\n"},
        {"views": ("x",) * 65},
        {"views": ("",)},
        {"milliseconds": -1},
        {"milliseconds": 2**60},
        {"answered_at": math.nan},
        {"comment": "\n"},
        {"reason": "broken"},
        {"choice": Choice.SKIP, "reason": "dull"},
    ],
)
def test_answers_that_cannot_be_stored_are_rejected(lasting, changes):
    store, campaign, ann = lasting
    shown = store.assignments(campaign, ann)[0]
    with raising("answer", "view" if "views" in changes else list(changes)[-1]):
        store.submit(campaign, ann, answer(shown, **{"key": "k", **changes}))
    assert list(store.judgements()) == []


def test_training_says_what_was_right(store, work):
    campaign, ann = work
    shown = store.assignments(campaign, ann)[0]
    assert shown.training
    right = Choice.LEFT if dict(store.shapes(campaign))[shown.left].seed == 0 else Choice.RIGHT
    wrong = Choice.RIGHT if right is Choice.LEFT else Choice.LEFT
    for n, (choice, correct) in enumerate(
        [(right, True), (wrong, False), (Choice.TIE, False), (Choice.SKIP, None)]
    ):
        result = store.submit(campaign, ann, answer(shown, f"k{n}", choice))
        assert (result.training, result.correct, result.explanation) == (True, correct, "because 0")
        again = store.submit(campaign, ann, answer(shown, f"k{n}", choice))
        assert again.duplicate and (again.judgement, again.correct) == (result.judgement, correct)
        store.undo(campaign, ann, f"u{n}")
    assert next(store.judgements(include_undone=True)).expected == right


def test_the_same_key_counts_once(store, work):
    campaign, ann = work
    shown = store.assignments(campaign, ann)[0]
    first = store.submit(campaign, ann, answer(shown, "k"))
    again = store.submit(campaign, ann, answer(shown, "k"))
    assert (again.judgement, again.duplicate, first.duplicate) == (first.judgement, True, False)
    assert [row.choice for row in store.judgements()] == [Choice.LEFT]
    with raising(shown.token, kind=ConflictError):
        store.submit(campaign, ann, answer(shown, "other"))
    for changed in (answer(shown, "k", Choice.TIE), answer(store.assignments(campaign, ann)[0], "k")):
        with raising("key", "'k'", kind=ConflictError):
            store.submit(campaign, ann, changed)
    store.add_annotator("bob")
    bob = store.annotators()[-1].id
    theirs = store.assignments(campaign, bob)[0]
    assert not store.submit(campaign, bob, answer(theirs, "k")).duplicate  # keys are each annotator's own
    assert len(list(store.judgements())) == 2


def test_foreign_and_unknown_assignments_are_not_found(store, work):
    campaign, ann = work
    store.add_annotator("bob")
    bob = store.annotators()[-1].id
    shown = store.assignments(campaign, ann)[0]
    other = store.create_campaign(CampaignSettings(name="other"), plan(2))
    for where, who, token in [
        (campaign, bob, shown.token),
        (other, ann, shown.token),
        (campaign, ann, "x"),
        (campaign, ann, "\0"),
    ]:
        with raising("assignment", repr(token), kind=LookupError):
            store.submit(where, who, answer(token, "k"))
        with raising("assignment", repr(token), kind=LookupError):
            store.undo(where, who, "u", token)
    with pytest.raises(LookupError) as caught:
        store.assignments(campaign, 999)
    assert "annotator" in str(caught.value) and "999" in str(caught.value)
    assert list(store.judgements()) == []


def test_undo_is_a_further_record_and_the_pair_comes_back_first(store, work):
    campaign, ann = work
    tokens = answered(store, campaign, ann, 3)
    assert store.undo(campaign, ann, "u1") == tokens[2] and store.undo(campaign, ann, "u2") == tokens[1]
    assert store.undo(campaign, ann, "u1") == tokens[2]  # known key: nothing more happens
    assert [a.token for a in store.assignments(campaign, ann)][:2] == [tokens[1], tokens[2]]
    store.submit(campaign, ann, answer(tokens[1], "new", Choice.TIE))
    assert store.assignments(campaign, ann)[0].token == tokens[2]
    kept = [(row.assignment, row.choice, row.undone) for row in store.judgements(include_undone=True)]
    assert kept == [
        (tokens[0], "left", False),
        (tokens[1], "left", True),
        (tokens[2], "left", True),
        (tokens[1], "tie", False),
    ]
    assert [row.choice for row in store.judgements()] == ["left", "tie"]
    with store.database.read() as c:
        assert c.execute(text("SELECT type, takes_back FROM judgements ORDER BY id")).all() == [
            ("choice", None),
            ("choice", None),
            ("choice", None),
            ("undo", 3),
            ("undo", 2),
            ("choice", None),
        ]


def test_the_database_rejects_to_change_judgements(store, work, database_url):
    campaign, ann = work
    answered(store, campaign, ann, 2)
    statements = [
        "UPDATE judgements SET choice = 'right'",
        "UPDATE judgements SET milliseconds = 1 WHERE id = 1",
        "DELETE FROM judgements",
        "DELETE FROM judgements WHERE id = 1",
        "UPDATE judgements SET page_version = page_version",
    ]
    for statement in [
        *statements,
        *([] if database_url.startswith("sqlite") else ["TRUNCATE judgements CASCADE"]),
    ]:
        with pytest.raises(DBAPIError) as caught, store.database.write() as c:
            c.execute(text(statement))
        assert APPEND_ONLY in str(caught.value), statement
    assert [row.choice for row in store.judgements()] == ["left", "left"]


def test_sqlite_rejects_from_other_programs_too(tmp_path):
    with Store.open(f"sqlite:///{tmp_path / 'l.db'}") as store:
        campaign = store.create_campaign(CampaignSettings(name="c"), plan(3))
        answered(store, campaign, store.annotator_without_token("local", "admin").id, 1)
    with sqlite3.connect(tmp_path / "l.db") as other:
        for statement in (
            "UPDATE judgements SET choice = 'tie'",
            "DELETE FROM judgements",
            "INSERT OR REPLACE INTO judgements SELECT * FROM judgements",
        ):
            with pytest.raises(sqlite3.IntegrityError) as caught:
                other.execute(statement)
            assert APPEND_ONLY in str(caught.value), statement
        assert other.execute("SELECT choice FROM judgements").fetchall() == [("left",)]
    other.close()


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "<b>", "a\nb", "a/b", "=1", "x" * 81, "local", "a\0", "'; --"]
)
def test_names_that_could_do_harm_are_rejected(lasting, name):
    store, *_ = lasting
    with raising("annotator", repr(name)):
        store.add_annotator(name)
    with raising("fine", "'root'"):
        store.add_annotator("fine", "root")
    assert [a.name for a in store.annotators()] == ["ann"]


def test_sessions_end_and_survive_a_restart(store, database_url, clock):
    store.add_annotator("ann")
    ann = store.annotators()[0]
    login = store.open_session(ann.id, 100)
    other = store.open_session(ann.id, 300)
    with Store.open(database_url, clock=clock) as again:
        assert again.session(login) == ann
        again.close_session(login)
        assert again.session(login) is None and store.session(login) is None and again.session("\0") is None
        clock.now += 300
        assert again.session(other) is None
        store.open_session(ann.id, 1)
        with again.database.read() as c:
            # those that ended are cleared away
            assert c.execute(text("SELECT count(*) FROM sessions")).scalar() == 1


def test_no_secret_is_in_the_database_and_sqlite_writes_through_to_the_disk(tmp_path):
    path = tmp_path / "l.db"
    with Store.open(f"sqlite:///{path}") as store:
        token = store.add_annotator("ann")
        login = store.open_session(store.annotators()[0].id, 1000)
        with store.database.read() as c:
            settings = {
                name: c.execute(text(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            }
    content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"ann" in content and token.encode() not in content and login.encode() not in content
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}, "a commit is on the disk"
