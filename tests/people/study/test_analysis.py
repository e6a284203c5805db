"""The analysis does what the design says: what counts, who is left out, when it may be made."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from eg3d_rlhf.core.statistics import binomial_test, wilson_interval
from eg3d_rlhf.people.study.analysis import analyse
from eg3d_rlhf.people.study.study_report import conclusions
from tests.people.study.people import row, small_design
from tests.rejections import raising


def answers(design, chosen: str, **changes):
    """One row per letter: a, b, t(ie), s(kip); sides alternate."""
    words = {"t": "tie", "s": "skip"}
    return [
        row(design, i + 1, words.get(c, c), pair=i, b_left=i % 2 == 0, **changes)
        for i, c in enumerate(chosen)
    ]


def two_people(design, first: str, second: str):
    more = [replace(r, id=r.id + 1000, annotator="other") for r in answers(design, second)]
    return answers(design, first) + more


def varied(analysis: dict, start: str) -> dict:
    """The result under another rule: whose name begins so."""
    (row,) = [value for name, value in analysis["sensitivity"].items() if name.startswith(start)]
    return row


def test_counts_rates_and_tests_by_hand():
    design = small_design(annotators=1, annotators_per_pair=1, trials=20)
    analysis = analyse(design, answers(design, "bbbbbbbbbbbaaaaatts" + "b"))
    result = analysis["result"]
    assert [result[k] for k in ("n", "b_wins", "a_wins", "ties", "skips")] == [19, 12, 5, 2, 1]
    assert result["win_rate"] == pytest.approx(13 / 19) and result["p_exact"] == binomial_test(12, 17)
    assert result["wilson"] == pytest.approx(list(wilson_interval(13, 19)))
    assert varied(analysis, "ties")["win_rate"] == pytest.approx(12 / 17)
    assert (
        not analysis["interim"] and analysis["exclusions"] == [] and result["bootstrap"]["annotators"] is None
    )


def test_ties_may_be_left_out_by_design():
    design = small_design(annotators=1, annotators_per_pair=1, trials=10, ties="excluded")
    analysis = analyse(design, answers(design, "bbbbbattta"))
    assert analysis["result"]["n"] == 7 and analysis["result"]["win_rate"] == pytest.approx(5 / 7)
    assert varied(analysis, "ties")["win_rate"] == pytest.approx(6.5 / 10)


def test_a_side_bias_alone_is_no_preference():
    design = small_design(annotators=1, annotators_per_pair=1)
    rows = [
        row(design, i + 1, "b" if left else "a", pair=i, b_left=left)
        for i, left in enumerate([True, False] * 20)
    ]
    analysis = analyse(design, rows)
    assert analysis["result"]["win_rate"] == 0.5 and analysis["sides"]["left_share"] == 1
    assert (analysis["sides"]["win_rate_b_left"], analysis["sides"]["win_rate_b_right"]) == (1, 0)
    assert varied(analysis, "sides")["win_rate"] == 0.5
    assert not any("20 of 40" in line for line in conclusions(analysis)), "equal sides are no news"


def test_unequal_sides_are_noticed_and_adjusted_for():
    design = small_design(annotators=1, annotators_per_pair=1)
    analysis = analyse(design, [row(design, i + 1, "b", pair=i, b_left=True) for i in range(40)])
    assert analysis["sides"]["p_random"] < 0.001
    assert any("40 of 40" in line for line in conclusions(analysis))
    assert varied(analysis, "sides")["win_rate"] is None


def test_no_report_before_the_stopping_rule_is_met_unless_marked():
    design = small_design()
    rows = two_people(design, "b" * 15, "b" * 15)
    with raising("small", "40", "30", "--interim"):
        analyse(design, rows)
    analysis = analyse(design, rows, allow_interim=True)
    assert analysis["interim"] and "30 of 40" in conclusions(analysis)[0]
    over = small_design(until="2030-01-01T00:00:00+00:00")
    assert not analyse(over, two_people(over, "b" * 15, "b" * 15), now=datetime(2030, 1, 2, tzinfo=UTC))[
        "interim"
    ]
    with raising("40", "2030", "30", "--interim"):
        analyse(over, rows, now=datetime(2029, 1, 2, tzinfo=UTC))


def test_answers_after_the_end_do_not_count():
    design = small_design(annotators=1, annotators_per_pair=1, trials=10)
    analysis = analyse(design, answers(design, "b" * 10 + "a" * 5))
    assert (
        analysis["result"]["win_rate"] == 1
        and analysis["late"] == 5
        and analysis["exclusions"][-1]["trials"] == 5
    )
    timed = small_design(
        annotators=1,
        annotators_per_pair=1,
        trials=10,
        until=datetime.fromtimestamp(1e9 + 4.5, UTC).isoformat(),
    )
    assert analyse(timed, answers(timed, "bbbbaaaaaa"))["result"]["win_rate"] == 1


def test_taken_back_answers_gold_and_training_are_no_trials():
    design = small_design(annotators=1, annotators_per_pair=1, trials=10)
    rows = answers(design, "b" * 10)
    rows += [
        replace(rows[0], id=50, undone=True),
        row(design, 51, "a", kind="gold", b_left=False),
        row(design, 52, "a", kind="training"),
    ]
    analysis = analyse(design, rows)
    assert analysis["answered"] == 10 and analysis["annotators"][0]["gold_n"] == 1


def gold(design, name: str, right: int, wrong: int):
    return [
        row(design, 5000 + i + 100 * len(name), "b" if i < right else "a", kind="gold", annotator=name)
        for i in range(right + wrong)
    ]


def test_annotators_are_left_out_by_the_rules_with_the_reason():
    design = small_design(annotators=4, annotators_per_pair=1, trials=80)
    rows = []
    ids = iter(range(1, 1000))
    for name, n, ms in (
        ("careful", 27, 3000),
        ("careless", 26, 3000),
        ("hasty", 26, 200),
        ("short", 1, 3000),
    ):
        chosen = "b" if name == "careful" else "a"
        rows += [
            row(design, next(ids), chosen, annotator=name, b_left=i % 2 == 0, milliseconds=ms)
            for i in range(n)
        ]
    rows += gold(design, "careful", 4, 0) + gold(design, "careless", 1, 3) + gold(design, "short", 2, 0)
    analysis = analyse(design, rows)
    reasons = {e["what"].split()[-1]: re.findall(r"\d+", e["reason"]) for e in analysis["exclusions"]}
    assert reasons == {
        "careless": ["1", "4", "75"],  # right, of so many gold checks, below so many per cent
        "hasty": ["26", "26", "600"],  # of so many trials, under so many milliseconds
        "short": ["1", "20"],  # of so many trials
    }
    assert analysis["result"]["win_rate"] == 1 and analysis["result"]["n"] == 27
    everybody = varied(analysis, "without")
    assert everybody["n"] == 80 and analysis["result"]["interval"][0] > 0.5 > everybody["interval"][0]
    # one sentence with the figure, and one that the conclusion is another with it
    text = conclusions(analysis)
    at = next(i for i, line in enumerate(text) if f"{100 * everybody['win_rate']:.1f} %" in line)
    assert not re.search(r"\d", text[at + 1])
    assert [(p["name"], p["excluded"] is None) for p in analysis["annotators"]] == [
        ("careful", True),
        ("careless", False),
        ("hasty", False),
        ("short", False),
    ]


def test_single_hasty_trials_are_left_out_and_quick_skips_are_not():
    design = small_design(annotators=1, annotators_per_pair=1, trials=20)
    rows = answers(design, "b" * 19 + "s")
    rows[0], rows[-1] = replace(rows[0], milliseconds=100), replace(rows[-1], milliseconds=100)
    analysis = analyse(design, rows)
    assert analysis["result"]["n"] == 18
    (left_out,) = analysis["exclusions"]
    assert left_out["what"].endswith(" ann") and left_out["reason"] and left_out["trials"] == 1


def test_when_nobody_is_left_the_report_says_so():
    design = small_design(annotators=1, annotators_per_pair=1, trials=20)
    analysis = analyse(design, answers(design, "b" * 20, milliseconds=50))
    assert analysis["result"]["win_rate"] is None
    (line,) = conclusions(analysis)
    # the terminal prints this line alone, so it names who was left out, why, and how many trials
    (exclusion,) = analysis["exclusions"]
    assert exclusion["what"] in line and exclusion["reason"] in line and "(20 trials)" in line
    assert "100.0 %" in line, "the win rate without exclusions"


def test_foreign_answers_and_answers_older_than_the_design_are_rejected():
    design = small_design(annotators=1, annotators_per_pair=1, trials=2)
    rows = answers(design, "bb")
    with raising("small", "elsewhere"):
        analyse(design, [replace(rows[0], campaign="elsewhere")])
    with raising("small", "answer 1"):
        analyse(design, [replace(rows[0], left=rows[1].left)])
    late = replace(design, created="2030-01-01T00:00:00+00:00")
    with raising("small", "2030-01-01"):
        analyse(late, rows)


def test_opposed_annotators_widen_the_interval_and_the_words_say_so():
    design = small_design(trials=80)
    analysis = analyse(design, two_people(design, "b" * 40, ("ab" * 20)))
    lo, hi = analysis["result"]["interval"]
    assert (
        hi - lo > 2 * (analysis["result"]["wilson"][1] - analysis["result"]["wilson"][0])
        and analysis["result"]["design_effect"] > 5
    )
    text = conclusions(analysis)
    lines = [line for line in text if f"{analysis['result']['design_effect']:.1f}" in line]
    assert len(lines) == 1, "the design effect"
    assert sum("2 annotators" in line for line in text) == 2, "with the interval, and that they are few"
    assert sum(f"{100 * (hi - lo):.1f} %" in line for line in text) == 1, "how wide the interval is"
    assert analysis["result"]["p_exact"] < 1e-4 < analysis["result"]["p_clustered"]


def test_the_analysis_is_json_and_repeats_itself():
    design = small_design()
    rng = np.random.default_rng(0)
    rows = two_people(design, *("".join(rng.choice(list("aabbbts"), 20)) for _ in range(2)))
    now = datetime(2030, 1, 1, tzinfo=UTC)
    analysis = analyse(design, rows, now=now)
    assert (
        json.loads(json.dumps(analysis, allow_nan=False)) == analysis == analyse(design, rows[::-1], now=now)
    )
