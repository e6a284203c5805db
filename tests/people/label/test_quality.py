"""Quality figures of annotators whose habits are known."""

import dataclasses
import itertools
import json
import re
import time

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.entities import (
    CampaignSettings,
    Choice,
    JudgementRow,
    Kind,
    Mode,
    PlannedPair,
    Shape,
)
from eg3d_rlhf.people.label.quality import (
    QualityLimits,
    as_text,
    generator_names,
    leaderboard_of,
    quality_report,
)
from eg3d_rlhf.preferences.leaderboard import FEW
from tests.people.label.plans import QUIET, answer_all
from tests.people.label.plans import shape as planned_shape
from tests.rejections import rejected


def shape(seed: int, generator: str = "a" * 64) -> Shape:
    return planned_shape(seed, generator=generator)


def row(
    id: int, choice: str, *, pair: int | None = None, annotator="ann", kind="pair", first_is_left=True, **more
) -> JudgementRow:
    pair = id if pair is None else pair
    shapes = more.pop("shapes", (shape(2 * pair), shape(2 * pair + 1)))
    left, right = shapes if first_is_left else shapes[::-1]
    fields = {
        "campaign": "c",
        "mode": "label",
        "assignment": f"t{id}",
        "sequence": id,
        "reason": None,
        "expected": None,
        "milliseconds": 4000,
        "views": (),
        "answered_at": None,
        "received_at": 1e9 + 10.0 * id,
        "page_version": "1",
        "undone": False,
        **more,
    }
    return JudgementRow(
        id=id,
        annotator=annotator,
        pair=pair,
        kind=Kind(kind),
        left=left,
        right=right,
        first_is_left=first_is_left,
        choice=Choice(choice),
        **fields,
    )


def only(rows, **limits) -> dict:
    (report,) = quality_report(rows, QualityLimits(**limits))["annotators"]
    return report


def test_counts_pace_and_sides_by_hand():
    rows = [
        row(1, "left"),
        row(2, "left"),
        row(3, "right"),
        row(4, "tie"),
        row(5, "skip", reason="broken", milliseconds=90_000),
    ]
    report = only(rows)
    assert [report[k] for k in ("judgements", "ties", "skips", "left_right_n")] == [5, 1, 1, 3]
    assert report["left_share"] == pytest.approx(2 / 3) and report["skip_reasons"] == {"broken": 1}
    assert (
        report["median_seconds"] == 4 and report["per_hour"] == pytest.approx(360) and report["flags"] == []
    )


def test_breaks_undone_judgements_and_training_do_not_count():
    times = [0, 10, 20, 5000, 5010]
    assert only([row(i, "left", received_at=1e9 + t) for i, t in enumerate(times)])[
        "per_hour"
    ] == pytest.approx(360)
    rows = [row(1, "left"), row(2, "right", undone=True), row(3, "left", kind="training", expected="right")]
    report = quality_report(rows)
    assert report["judgements"] == 1 and report["annotators"][0]["gold_n"] == 0


def test_consistency_is_about_shapes_not_sides():
    rows = [
        row(1, "left", pair=1),
        row(2, "left", pair=2),
        row(3, "left", pair=3),
        row(4, "tie", pair=4),
        row(5, "left", pair=1, kind="repeat"),
        row(6, "right", pair=2, kind="repeat"),
        row(7, "tie", pair=4, kind="repeat"),
        row(8, "right", pair=1, kind="swap", first_is_left=False),
        row(9, "left", pair=2, kind="swap", first_is_left=False),
        row(10, "skip", pair=3, kind="swap", first_is_left=False),
    ]
    report = only(rows)
    assert (report["self_consistency"], report["self_consistency_n"]) == (pytest.approx(2 / 3), 3)
    assert (report["swap_consistency"], report["swap_consistency_n"]) == (0.5, 2)


def test_somebody_who_always_takes_the_left_is_found_out():
    rng = np.random.default_rng(0)
    rows = [row(i, "left", first_is_left=bool(rng.integers(2))) for i in range(40)]
    rows += [
        row(40 + i, "left", pair=i, kind="swap", first_is_left=not rows[i].first_is_left) for i in range(10)
    ]
    rows += [
        row(50 + i, "left", kind="gold", expected=("left", "right")[i % 2], milliseconds=300)
        for i in range(8)
    ]
    report = only(rows, fast_seconds=5)
    assert report["swap_consistency"] == 0 and report["left_share"] == 1 and report["gold_accuracy"] == 0.5
    # gold checks; seconds in the median; the left in so many of so many; the same when swapped
    figures = [set(re.findall(r"[\d.]+", flag)) for flag in report["flags"]]
    assert len(figures) == 4 and {"50", "8"} <= figures[0] and "100" in figures[2] and "10" in figures[3]


def test_agreement_of_annotators_who_saw_the_pairs_on_other_sides():
    rows = []
    for pair in range(20):
        preferred = pair % 3 != 0
        rows.append(row(3 * pair, "left" if preferred else "right", pair=pair, annotator="x"))
        rows.append(
            row(3 * pair + 1, "right" if preferred else "left", pair=pair, annotator="y", first_is_left=False)
        )
        rows.append(row(3 * pair + 2, "left", pair=pair, annotator="z"))
    report = quality_report(rows)["agreement"]
    kappa = {(k["a"], k["b"]): k["kappa"] for k in report["cohen_kappa"]}
    assert kappa["x", "y"] == 1 and kappa["x", "z"] == pytest.approx(0, abs=1e-12)
    assert (
        report["alpha_n"] == 20
        and report["alpha_ci95"][0] <= report["krippendorff_alpha"] <= report["alpha_ci95"][1]
    )


def test_strengths_rank_a_tournament_and_leave_lone_pairs_out():
    rng = np.random.default_rng(3)
    rows = []
    for i in range(400):
        a, b = rng.choice(6, 2, replace=False)
        wins = rng.random() < 1 / (1 + np.exp(b - a))
        rows.append(
            row(i, "left" if wins else "right", pair=int(a * 6 + b), shapes=(shape(int(a)), shape(int(b))))
        )
    rows.append(row(999, "left", pair=999))
    report = quality_report(rows)
    assert [s["label"] for s in report["bradley_terry"]] == [f"seed {k}" for k in (5, 4, 3, 2, 1, 0)]
    assert (
        all(s["ci95"][0] < s["strength"] < s["ci95"][1] for s in report["bradley_terry"])
        and report["cycles"]["triples"] == 20
    )
    few = quality_report(rows, QualityLimits(strengths=3))["bradley_terry"]
    assert len(few) == 3


def test_the_report_is_json_and_an_empty_one_too():
    rows = [
        row(i, ("left", "right", "tie", "skip")[i % 4], annotator=("x", "y")[i % 2], pair=i // 2)
        for i in range(40)
    ]
    for report in (quality_report(rows), quality_report([])):
        assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert quality_report([])["annotators"] == [] and quality_report([])["timeline"] == []


def test_ten_thousand_judgements_are_reported_live():
    rng = np.random.default_rng(4)
    rows = [
        row(i, ("left", "right")[int(rng.integers(2))], pair=int(rng.integers(3000)), annotator=f"n{i % 8}")
        for i in range(10_000)
    ]
    start = time.process_time()
    quality_report(rows)
    assert time.process_time() - start < 5


# ---- leaderboards: what counts as a game, generators' names, questions, and the commands

NAN = float("nan")


def asset(generator: str, prompt: str, seed: int = 0):
    made = shape(seed, generator)
    return dataclasses.replace(
        made,
        source=f"/assets/{generator}/{prompt}.glb",
        psi=NAN,
        level=NAN,
        resolution=0,
        triangles=0,
        file="f" * 64,
        condition=prompt,
    )


def judged(count: int = 40, better: float = 0.75, **more) -> list:
    """Rows of two generators' assets over ten prompts and more."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        shapes = asset("trellis", f"prompt {i % 20}"), asset("hunyuan", f"prompt {i % 20}")
        choice = "left" if rng.random() < better else "right"
        rows.append(row(i, choice, shapes=shapes, annotator=f"n{i % 4}", **{"votes": {}, **more}))
    return rows


def test_games_are_first_answers_to_pairs_of_two_generators():
    rows = judged()
    others = [
        row(100, "skip", pair=100, shapes=(asset("trellis", "x"), asset("hunyuan", "x"))),
        row(101, "left", pair=101, shapes=(asset("trellis", "x", 1), asset("trellis", "x", 2))),
        row(102, "right", pair=0, annotator="n0", kind="repeat", shapes=(rows[0].left, rows[0].right)),
        row(
            103,
            "left",
            pair=103,
            kind="gold",
            expected="left",
            shapes=(asset("trellis", "x"), asset("hunyuan", "x")),
        ),
        row(104, "left", pair=104, undone=True, shapes=(asset("trellis", "x"), asset("hunyuan", "x"))),
    ]
    board = leaderboard_of([*rows, *others])
    assert (board.games, board.annotators, board.prompts) == (40, 4, 20) and board == leaderboard_of(rows)
    assert [s.name for s in board.groups[0]] == ["trellis", "hunyuan"]


def test_both_bad_ties_and_votes_count_as_they_should():
    bad = [dataclasses.replace(r, choice=Choice.BAD, votes={"texture": "right"}) for r in judged()]
    board = leaderboard_of(bad)
    assert board.groups[0][0].points == board.groups[0][1].points and board.groups[0][0].both_bad == 40
    texture = leaderboard_of(bad, "texture").groups[0]
    assert (
        [s.name for s in texture] == ["hunyuan", "trellis"]
        and texture[0].both_bad == 0
        and texture[0].wins == 40
    )
    assert [b["question"] for b in quality_report(bad)["leaderboards"]] == [None, "texture"]


def test_a_study_and_a_single_generator_have_none():
    (line,) = as_text(leaderboard_of([])).splitlines()
    assert not re.search(r"\d", line)
    assert (
        leaderboard_of(judged(mode="study")).games == 0
        and quality_report(judged(mode="study"))["leaderboards"] == []
    )
    assert quality_report([row(i, "left") for i in range(30)])["leaderboards"] == []


def test_generators_have_names_that_people_know():
    def network(generator, source):
        return dataclasses.replace(shape(0, generator * 64), source=source)

    names = generator_names(
        [network("a", ""), network("b", "/runs/1/net.safetensors"), asset("trellis", "x")]
    )
    assert len(names) == len(set(names.values())) == 3 and {"net.safetensors", "trellis"} < set(
        names.values()
    )
    assert names["a" * 64], "the bundled generator, which has no file"
    names = generator_names(
        [network("a", "/runs/1/net.safetensors"), network("b", "/runs/2/net.safetensors")]
    )
    assert set(names.values()) == {"1/net.safetensors", "2/net.safetensors"}
    names = generator_names(
        [network("a", "/runs/1/net.safetensors"), network("b", "/runs/1/net.safetensors")]
    )
    assert names["a" * 64] == "1/net.safetensors aaaaaaaa"


def test_the_command_prints_text_json_and_csv(store, tmp_path):
    pairs = [
        PlannedPair(first=asset("trellis", f"p{i}"), second=asset("hunyuan", f"p{i}")) for i in range(25)
    ]
    campaign = store.create_campaign(CampaignSettings(name="c", **QUIET), pairs)
    ann = store.annotator_without_token("ann").id
    trial = itertools.count()

    def choose(left: Shape, right: Shape) -> Choice:
        i = next(trial) % 5
        return (
            Choice.TIE
            if i == 0
            else Choice.LEFT
            if (left.generator == "trellis") == (i != 1)
            else Choice.RIGHT
        )

    answer_all(store, campaign, ann, choose, ahead=1)
    alone = PlannedPair(first=shape(1), second=shape(1))
    store.create_campaign(
        CampaignSettings(name="one", mode=Mode.SINGLE, scale="thumbs", swap_share=0), [alone]
    )

    def run(*args: str):
        return CliRunner().invoke(main, ["leaderboard", f"--db=sqlite:///{tmp_path / 'labels.db'}", *args])

    text = run("--campaign=c").output
    (first,) = [line for line in text.splitlines() if line.startswith(" 1.")]
    assert "trellis" in first and {"25", "15", "5"} <= set(first.split())
    # place, points, both ends of the interval, n, score, won, lost, tied, both bad
    assert len(re.findall(r"\d+", first)) == 10
    note = text.rstrip().splitlines()[-1]
    assert re.findall(r"\d+", note) == [str(FEW - 1)], "annotators that it would take besides"
    report = json.loads(run("--json").output)
    assert [(s["name"], s["n"], s["wins"], s["ties"]) for s in report["groups"][0]] == [
        ("trellis", 25, 15, 5),
        ("hunyuan", 25, 5, 5),
    ]
    rejected(run("--criterion=texture"), "--criterion", "texture")
    rejected(run("--campaign=x"), "--campaign", "label status")
    rejected(run("--campaign=one"), "--campaign", "single")
