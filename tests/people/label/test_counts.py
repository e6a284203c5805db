"""Counts of answers that agree with each other, exports that state what they left out, and gold checks of a
study that are reported while it runs.
"""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.study import _announcement
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Kind, Mode
from eg3d_rlhf.people.label.quality import quality_report
from eg3d_rlhf.people.label.server.gold_checks import REPORTED_AFTER, GoldReporter, describe_result, limits_of
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import LabelFilters, read_preferences
from eg3d_rlhf.people.study.design import campaign_settings
from tests.people.label.plans import answer, answer_all, plan
from tests.people.label.serving import running
from tests.people.study.people import small_design
from tests.rejections import raising
from tools import label


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'labels.db'}"


@pytest.fixture
def labelled(url) -> str:
    """Ann and bob answer 4 pairs, 4 gold checks and 3 practice pairs; ann is right on gold, and bob is wrong.
    Eve answers one pair and no gold check.
    """
    settings = CampaignSettings(
        name="heads", annotators_per_pair=3, gold_every=2, repeat_share=0, swap_share=0
    )
    with Store.open(url) as store:
        campaign = store.create_campaign(settings, plan(4, gold=2, training=3))
        better = lambda left, right: Choice.LEFT if left.seed < right.seed else Choice.RIGHT  # noqa: E731
        worse = lambda left, right: Choice.RIGHT if left.seed < right.seed else Choice.LEFT  # noqa: E731
        for name, choose, most in (("ann", better, 99), ("bob", worse, 99), ("eve", better, 4)):
            answer_all(store, campaign, store.annotator_without_token(name).id, choose, most)
    return url


def run(*flags):
    return CliRunner().invoke(label.main, [str(flag) for flag in flags])


def test_practice_answers_are_counted_nowhere(labelled):
    status = json.loads(run("status", "--json", f"--db={labelled}").stdout)["campaigns"][0]
    with Store.open(labelled, create=False) as store:
        rows = list(store.judgements("heads"))
        report = quality_report(rows)
        assert store.answer_count("heads") == 17
    assert sum(row.kind is Kind.TRAINING for row in rows) == 9
    assert status["judgements"] == report["judgements"] == 17
    assert status["annotators"] == {"ann": 8, "bob": 8, "eve": 1}


def test_an_export_names_the_annotators_that_it_leaves_out(labelled, tmp_path):
    export = ("export", tmp_path / "labels.jsonl", f"--db={labelled}", "--least-gold-accuracy=0.8")
    result = run(*export)
    assert result.exit_code == 0 and len((tmp_path / "labels.jsonl").read_text().splitlines()) == 4
    assert "bob" in result.stderr and "0 of 4" in result.stderr and " ann " not in result.stderr
    assert "eve" in result.stderr
    nobody = run(*export, "--annotator=bob")
    assert nobody.exit_code == 0 and (tmp_path / "labels.jsonl").read_text() == ""
    # 4 answers to pairs, 4 gold checks and 3 practice answers, of which none is a label
    assert {"11", "4", "3", "0"} <= set(nobody.stderr.replace(",", " ").split())
    assert "bob" in nobody.stderr and "0 of 4" in nobody.stderr
    with raising("bob", "0 of 4"):
        read_preferences(labelled, LabelFilters(annotators=("bob",), least_gold_accuracy=0.5))


def test_every_reason_is_stated_with_its_number(labelled):
    with Store.open(labelled, create=False) as store:
        rows = list(store.judgements("heads"))
    kept = LabelFilters().keep(rows)
    assert len(kept) == 9
    for filters, count, word in (
        (LabelFilters(min_milliseconds=5000), 9, "5000"),
        (LabelFilters(since="2999-01-01"), 9, "2999-01-01"),
        (LabelFilters(criterion="ears"), 9, "ears"),
        (LabelFilters(least_gold_accuracy=1.0), 5, "left out"),
    ):
        reasons = filters.explain(rows).split("not used: ")[1].split(", ")
        assert any(reason.startswith(f"{count} ") and word in reason for reason in reasons), reasons
        assert len(filters.keep(rows)) == 9 - count
    assert LabelFilters(campaign="none").explain(rows) != "" and LabelFilters().untrusted(rows) == []
    # an annotator who answered no gold check is left out, and named
    (sentence, *_) = LabelFilters(least_gold_accuracy=0.1, annotators=("eve",)).untrusted(rows)
    assert "eve" in sentence


RULE = {"gold_rule": [0.75, 3], "trials": 99, "until": None}


def study(gold_every: int = 2) -> dict:
    return {"gold_every": gold_every, "repeat_share": 0, "swap_share": 0, "extra": RULE}


@pytest.mark.parametrize(("choice", "correct"), [("first", REPORTED_AFTER), ("second", 0)])
def test_the_fifth_gold_check_is_reported_in_the_terminal_and_on_the_page(tmp_path, capsys, choice, correct):
    with running(
        tmp_path, mode=Mode.STUDY, planned=plan(12, gold=8), prepared=False, campaign=study()
    ) as served:
        store = served.store
        who = store.annotator_without_token("ann", "admin").id
        reporter = GoldReporter(store, store.campaign(served.options.campaign))
        lines = []
        for k in range(20):
            shown = store.assignments(served.campaign, who)
            if not shown:
                break
            shapes = dict(store.shapes(served.campaign))
            is_better_left = shapes[shown[0].left].seed < shapes[shown[0].right].seed
            side = Choice.LEFT if is_better_left == (choice == "first") else Choice.RIGHT
            store.submit(served.campaign, who, answer(shown[0], f"k{k}", side))
            reporter.after_answer("ann")
            lines += [(k, line) for line in capsys.readouterr().out.splitlines()]
        # once, although more checks follow
        ((at, line),) = lines
        rows = list(store.judgements(served.options.campaign))
        assert [row.kind for row in rows[: at + 1]].count(Kind.GOLD) == REPORTED_AFTER
        assert "ann" in line and f"{correct} of {REPORTED_AFTER}" in line
        assert ("--gold-every=0" in line) == (correct == 0)
        (metrics,) = quality_report(rows, limits_of(store.campaign(served.options.campaign)))["annotators"]
        assert any("gold" in flag for flag in metrics["flags"]) == (correct == 0)


def test_a_campaign_of_labels_reports_nothing(tmp_path, capsys, labelled):
    with Store.open(labelled, create=False) as store:
        GoldReporter(store, store.campaign("heads")).after_answer("ann")
        assert limits_of(store.campaign("heads")) is None
    assert capsys.readouterr().out == ""


def test_the_limit_is_that_of_the_design():
    assert campaign_settings(small_design()).extra["gold_rule"] == [0.75, 3]
    assert "--gold-every=0" in describe_result("ann", 3, 5, 0.75)
    assert "--gold-every=0" not in describe_result("ann", 4, 5, 0.75)


@pytest.mark.parametrize("gold_every", [0, 10])
def test_a_study_announces_its_gold_checks_before_it_starts(gold_every):
    lines = "\n".join(_announcement("http://a/", small_design(gold_every=gold_every), "add", 2))
    assert ("--gold-every=0" in lines) == (gold_every > 0) and ("75%" in lines) == (gold_every > 0)
