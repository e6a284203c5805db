"""Options of a campaign besides which is better: both bad, questions, comments, names after the answer, the
annotator's own answers.
"""

import itertools
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, ConflictError, Kind, Mode, PlannedPair
from eg3d_rlhf.people.label.quality import quality_report
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import (
    LabelFilters,
    export_labels,
    export_unpaired,
    store_preferences,
)
from eg3d_rlhf.preferences.unpaired import load_unpaired
from tests.people.label import serving
from tests.people.label.plans import QUIET, answer, answer_all, plan, shape
from tests.people.label.serving import GENEROUS
from tests.rejections import raising, rejected

ASKED = ("geometry", "ears=Which has the finer ears?")


def begin(store, pairs=None, **values) -> tuple[int, int]:
    campaign = store.create_campaign(CampaignSettings(**{"name": "c", **QUIET, **values}), pairs or plan(6))
    return campaign, store.annotator_without_token("ann").id


def test_both_bad_is_a_tie_that_keeps_its_word_and_two_shapes_that_are_not_good(store, tmp_path):
    campaign, ann = begin(store, both_bad=True)
    for k, choice in enumerate((Choice.BAD, Choice.TIE, Choice.LEFT)):
        shown = store.assignments(campaign, ann, 1)[0]
        store.submit(campaign, ann, answer(shown, f"k{k}", choice))
    bad, tie, left = store_preferences(store)
    assert (bad.tie, tie.tie, left.tie) == (True, True, False) and (
        bad.extra.get("both"),
        tie.extra.get("both"),
    ) == ("bad", None)
    assert [row.choice for row in store.judgements()][0] == "bad"
    export_unpaired(store, tmp_path / "bad.jsonl", from_pairs=True)
    labels = load_unpaired(tmp_path / "bad.jsonl")
    assert {label.seed for label in labels} == {bad.winner, bad.loser} and [
        label.preferred for label in labels
    ] == [False, False]
    figures = quality_report(store.judgements())["annotators"][0]
    assert (figures["ties"], figures["both_bad"], figures["left_right_n"]) == (1, 1, 1)


def test_votes_and_names_outside_the_campaign_are_rejected(store):
    campaign, ann = begin(store)
    shown, *_ = store.assignments(campaign, ann)
    with raising("left", "right", "tie", "skip", "bad"):
        store.submit(campaign, ann, answer(shown, "k", Choice.BAD))
    with raising("--both-bad", "pairs"):
        CampaignSettings(name="s", mode=Mode.SINGLE, scale="thumbs", swap_share=0, both_bad=True)
    with raising("reveal", "study"):
        CampaignSettings(name="s", mode=Mode.STUDY, reveal=True)
    assert list(store.judgements()) == []


@pytest.mark.parametrize(
    ("choice", "votes", "names"),
    [
        ("left", {}, ("left", "right", "tie", "ears", "geometry")),
        ("left", {"geometry": "left"}, ("left", "right", "tie", "ears")),
        ("tie", {"geometry": "left", "ears": "tie", "hair": "tie"}, ("left", "right", "tie")),
        ("skip", {"geometry": "left"}, ("votes",)),
        ("left", {"geometry": "bad", "ears": "tie"}, ("left", "right", "tie")),
    ],
)
def test_every_question_and_no_other_is_voted_on(store, choice, votes, names):
    campaign, ann = begin(store, questions=ASKED)
    shown, *_ = store.assignments(campaign, ann)
    with raising(*(f"{vote!r} for {question!r}" for question, vote in votes.items()), *names):
        store.submit(
            campaign,
            ann,
            answer(shown, "k", Choice(choice), votes=votes, reason="unsure" if choice == "skip" else None),
        )
    assert list(store.judgements()) == []


@pytest.mark.parametrize(
    "written",
    [
        "hair",
        "Hair=Which?",
        "ears=",
        "ears=\u202eWhich?",
        "ears=" + 121 * "x",
        "=Which?",
        "geometry,geometry",
        "a=1,b=1,c=1,d=1,e=1,f=1,g=1",
    ],
)
def test_questions_that_cannot_be_asked_are_rejected(store, written):
    with raising("--criteria"):
        begin(store, questions=tuple(written.split(",")))
    assert store.campaigns() == []


def test_the_votes_on_a_question_become_labels(store, tmp_path):
    campaign, ann = begin(store, questions=ASKED)
    given = [("left", "right", "tie"), ("left", "left", "left"), ("right", "tie", "right")]
    for k, (choice, geometry, ears) in enumerate(given):
        shown = store.assignments(campaign, ann, 1)[0]
        store.submit(
            campaign, ann, answer(shown, f"k{k}", Choice(choice), votes={"geometry": geometry, "ears": ears})
        )
    store.submit(
        campaign, ann, answer(store.assignments(campaign, ann, 1)[0], "s", Choice.SKIP, reason="unsure")
    )
    rows = list(store.judgements())
    labels = store_preferences(store, LabelFilters(criterion="geometry"))
    seeds = [rows[0].right.seed, rows[1].left.seed, rows[2].left.seed]
    assert [(label.winner, label.tie) for label in labels] == list(
        zip(seeds, (False, False, True), strict=True)
    )
    export_labels(store, tmp_path / "ears.csv", criterion="ears")
    assert (tmp_path / "ears.csv").read_text().count("\n") == 4
    figures = {entry["name"]: entry for entry in quality_report(rows)["questions"]}
    assert {k: figures["geometry"][k] for k in ("n", "left", "right", "tie", "decided", "as_overall")} == {
        "n": 3,
        "left": 1,
        "right": 1,
        "tie": 1,
        "decided": 2,
        "as_overall": 1,
    }
    with raising("criterion", "ears", "geometry", "'hair'"):
        store_preferences(store, LabelFilters(criterion="hair"))


def two_generators() -> list[PlannedPair]:
    """Pairs, two checks and a lesson of two generators whose files have one name."""
    first, second = (
        replace(shape(0), generator=c * 64, source=f"/secret/run-{c}/network.safetensors") for c in "ab"
    )
    kinds = [Kind.TRAINING, Kind.GOLD, Kind.GOLD] + 12 * [Kind.PAIR]
    return [
        PlannedPair(
            first=replace(first, seed=i),
            second=replace(second, seed=i),
            kind=kind,
            expected=None if kind is Kind.PAIR else "first",
        )
        for i, kind in enumerate(kinds)
    ]


def test_names_are_revealed_after_pairs_only_and_the_answer_then_stays(store):
    campaign, ann = begin(store, two_generators(), reveal=True, gold_every=3, repeat_share=0.25, repeat_gap=1)
    revealed: dict[Kind, set] = {}
    for k in range(12):
        shown = store.assignments(campaign, ann, 1)[0]
        choice = Choice.SKIP if k == 11 else Choice.LEFT
        sent = answer(shown, f"k{k}", choice, reason="unsure" if k == 11 else None)
        kept = store.submit(campaign, ann, sent)
        assert store.submit(campaign, ann, sent).reveal == kept.reveal
        row = list(store.judgements())[-1]
        names = tuple(
            {"a": "run-a/network", "b": "run-b/network"}[side.generator[0]] for side in (row.left, row.right)
        )
        assert kept.reveal in (None, names)
        revealed.setdefault(row.kind if k < 11 else "skip", set()).add(kept.reveal is not None)
        if k < 11 and row.kind is not Kind.TRAINING:
            with pytest.raises(ConflictError):
                store.undo(campaign, ann, f"u{k}")
            assert list(store.judgements())[-1] == row
    assert store.undo(campaign, ann, "last") == shown.token, "a skip reveals nothing"
    assert revealed == {
        Kind.TRAINING: {False},
        Kind.GOLD: {False},
        Kind.REPEAT: {False},
        Kind.PAIR: {True},
        "skip": {False},
    }
    assert {entry.changeable for entry in store.answers(campaign, ann)} == {False}


def test_own_answers_list_checks_and_repeats_like_pairs_and_a_change_stays_in_its_place(store):
    pairs = plan(12, gold=2, training=1)
    campaign, ann = begin(store, pairs, gold_every=3, repeat_share=0.25, repeat_gap=1)
    bob = store.annotator_without_token("bob").id
    given = []
    for k in range(13):
        shown = store.assignments(campaign, ann, 1)[0]
        store.submit(campaign, ann, answer(shown, f"k{k}", comment="hm" if k == 4 else None))
        given += [] if shown.training else [shown.token]
    kinds = {row.kind for row in store.judgements()}
    assert kinds == {Kind.TRAINING, Kind.GOLD, Kind.REPEAT, Kind.PAIR}
    pages = []
    before = None
    while page := store.answers(campaign, ann, before, 5):
        pages.append(page)
        before = page[-1].sequence
    assert [len(page) for page in pages] == [5, 5, 2] and [
        entry.assignment for page in pages for entry in page
    ] == given[::-1]
    assert [entry.sequence for page in pages for entry in page] == list(range(13, 1, -1)), (
        "no gap reveals a check"
    )
    assert {entry.changeable for page in pages for entry in page} == {True} and pages[1][3].comment == "hm"
    old = given[1]
    assert store.undo(campaign, ann, "u", old) == old
    assert old not in [entry.assignment for entry in store.answers(campaign, ann, max_count=50)]
    store.submit(campaign, ann, answer(old, "anew", Choice.RIGHT))
    listed = store.answers(campaign, ann, max_count=50)
    assert [entry.assignment for entry in listed] == given[::-1] and listed[-2].choice is Choice.RIGHT
    assert store.answers(campaign, bob) == []
    with pytest.raises(LookupError):
        store.undo(campaign, bob, "theirs", old)


def test_changed_answers_say_nothing_about_consistency(store):
    campaign, ann = begin(store, plan(12), repeat_share=0.5, repeat_gap=1)
    choices = itertools.cycle((Choice.LEFT, Choice.RIGHT, Choice.RIGHT))
    answer_all(store, campaign, ann, lambda *sides: next(choices), 12, 1)
    rows = list(store.judgements(include_undone=True))
    before = quality_report(rows)["annotators"][0]
    inconsistent = next(
        r
        for r in rows
        if r.kind is Kind.REPEAT and r.choice is not next(o.choice for o in rows if o.pair == r.pair)
    )
    store.undo(campaign, ann, "u", inconsistent.assignment)  # and made to agree, after a look at the list
    other = Choice.LEFT if inconsistent.choice is Choice.RIGHT else Choice.RIGHT
    store.submit(campaign, ann, answer(inconsistent.assignment, "agrees", other))
    after = quality_report(store.judgements(include_undone=True))["annotators"][0]
    assert (
        after["self_consistency_n"] == before["self_consistency_n"] - 1
        and after["judgements"] == before["judgements"]
    )
    hits = [figures["self_consistency"] * figures["self_consistency_n"] for figures in (before, after)]
    assert hits[0] == pytest.approx(hits[1])


def test_answers_of_a_complete_study_stay(store):
    extra = {"trials": 4, "until": None}
    campaign, ann = begin(store, plan(4), mode=Mode.STUDY, extra=extra)
    for k in range(4):
        shown = store.assignments(campaign, ann, 1)[0]
        store.submit(campaign, ann, answer(shown, f"k{k}"))
        if k == 2:
            assert store.undo(campaign, ann, "slip") == shown.token
            store.submit(campaign, ann, answer(shown, "k2 again"))
            assert {entry.changeable for entry in store.answers(campaign, ann)} == {True}
    with pytest.raises(ConflictError):
        store.undo(campaign, ann, "late")
    assert len(list(store.judgements())) == 4
    assert {entry.changeable for entry in store.answers(campaign, ann)} == {False}
    late = {"trials": 4, "until": "2025-06-15T15:06:41+00:00"}  # one second from now
    other, _ = begin(store, plan(4), name="timed", mode=Mode.STUDY, extra=late)
    answer_all(store, other, ann, most=1)
    store.clock.now += 1
    with pytest.raises(ConflictError):
        store.undo(other, ann, "later")
    assert len(list(store.judgements())) == 5


# ---- over HTTP


@pytest.fixture
def served(tmp_path):
    campaign = {"questions": ASKED, "both_bad": True, **QUIET}
    planned = serving.plan(8, training=0, gold=0)
    with serving.running(
        tmp_path / "s", exposed=True, limits=GENEROUS, campaign=campaign, planned=planned
    ) as s:
        roles = {"ann": "annotator", "bob": "annotator", "eve": "admin"}
        s.tokens = {name: s.store.add_annotator(name, role) for name, role in roles.items()}
        yield s


def send(page, key: str, **values):
    pair = page.get("/api/assignments?count=1").json()["assignments"][0]
    votes = {"geometry": "left", "ears": "tie"}
    return pair, serving.answer(page, pair["assignment"], key, **{"choice": "bad", "votes": votes, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"votes": {}},
        {"votes": {"geometry": "left", "ears": "up"}},
        {"votes": {"__proto__": "left"}},
        {"votes": None},
        {"comment": ""},
        {"comment": "x" * 501},
        {"comment": "a\u0000b"},
        {"comment": 5},
    ],
)
def test_bad_votes_and_comments_are_rejected_and_nothing_is_kept(served, values):
    _, response = send(served.browser(served.tokens["ann"]), "k", **values)
    assert (
        response.status_code == 422
        and set(response.json()) == {"error", "remedy"}
        and list(served.store.judgements()) == []
    )


# ---- the command line


def dry_run(tmp_path, *flags):
    return CliRunner().invoke(main, [f"--db=sqlite:///{tmp_path / 'l.db'}", "--dry-run", *flags])


def resolved(tmp_path, *flags) -> dict:
    """Return the output of --dry-run."""
    result = dry_run(tmp_path, *flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_flags_of_what_is_asked(tmp_path):
    usual = resolved(tmp_path)
    assert (usual["both_bad"], usual["questions"], usual["reveal"]) == (True, [], False)
    assert resolved(tmp_path, "--single=thumbs")["both_bad"] is False
    assert resolved(tmp_path, "--criteria=geometry, ears=Which?")["questions"] == ["geometry", "ears=Which?"]
    rejected(dry_run(tmp_path, "--single=thumbs", "--set=both_bad=true"), "--set both_bad", "pairs")
    rejected(dry_run(tmp_path, "--criteria=prompt"), "--criteria", "'prompt'", "--assets")
    result = dry_run(tmp_path, "--criteria=hair")
    rejected(result, "--criteria", "geometry", "texture", "prompt", "NAME=TEXT", "'hair'")
    with Store.open(f"sqlite:///{tmp_path / 'l.db'}") as store:
        store.create_campaign(CampaignSettings(name="labels", extra={"flags": {"both_bad": False}}), plan(2))
    assert (
        resolved(tmp_path)["action"] == "resume"
        and resolved(tmp_path, "--set=both_bad=false")["action"] == "resume"
    )
    rejected(dry_run(tmp_path, "--set=both_bad=true"), "--set both_bad", "False", "'labels'", "True")
