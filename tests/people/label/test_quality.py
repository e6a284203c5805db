"""Quality figures of annotators whose habits are known."""

import json

import numpy as np
import pytest

from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, Shape
from eg3d_rlhf.people.label.quality import QualityLimits, quality_report


def shape(seed: int, generator: str = "a" * 64) -> Shape:
    return Shape(generator=generator, source="", seed=seed, psi=0.7, level=10.0, resolution=64, triangles=1000)


def row(id: int, choice: str, *, pair: int | None = None, annotator="ann", kind="pair", first_is_left=True, **more) -> JudgementRow:
    pair = id if pair is None else pair
    shapes = more.pop("shapes", (shape(2 * pair), shape(2 * pair + 1)))
    left, right = shapes if first_is_left else shapes[::-1]
    fields = {
        "campaign": "c", "mode": "label", "assignment": f"t{id}", "sequence": id, "reason": None, "expected": None, "milliseconds": 4000,
        "views": (), "answered_at": None, "received_at": 1e9 + 10.0 * id, "page_version": "1", "undone": False, **more,
    }  # fmt: skip
    return JudgementRow(
        id=id, annotator=annotator, pair=pair, kind=Kind(kind), left=left, right=right, first_is_left=first_is_left,
        choice=Choice(choice), **fields,
    )  # fmt: skip


def only(rows, **limits) -> dict:
    (found,) = quality_report(rows, QualityLimits(**limits))["annotators"]
    return found


def test_counts_pace_and_sides_by_hand():
    rows = [row(1, "left"), row(2, "left"), row(3, "right"), row(4, "tie"), row(5, "skip", reason="broken", milliseconds=90_000)]
    found = only(rows)
    assert [found[k] for k in ("judgements", "ties", "skips", "left_right_n")] == [5, 1, 1, 3]
    assert found["left_share"] == pytest.approx(2 / 3) and found["skip_reasons"] == {"broken": 1}
    assert found["median_seconds"] == 4 and found["per_hour"] == pytest.approx(360) and found["flags"] == []


def test_a_break_is_not_work():
    times = [0, 10, 20, 5000, 5010]
    assert only([row(i, "left", received_at=1e9 + t) for i, t in enumerate(times)])["per_hour"] == pytest.approx(360)


def test_undone_judgements_and_training_do_not_count():
    rows = [row(1, "left"), row(2, "right", undone=True), row(3, "left", kind="training", expected="right")]
    found = quality_report(rows)
    assert found["judgements"] == 1 and found["annotators"][0]["gold_n"] == 0


def test_consistency_is_about_shapes_not_sides():
    rows = [
        row(1, "left", pair=1), row(2, "left", pair=2), row(3, "left", pair=3), row(4, "tie", pair=4),
        row(5, "left", pair=1, kind="repeat"), row(6, "right", pair=2, kind="repeat"), row(7, "tie", pair=4, kind="repeat"),
        row(8, "right", pair=1, kind="swap", first_is_left=False), row(9, "left", pair=2, kind="swap", first_is_left=False),
        row(10, "skip", pair=3, kind="swap", first_is_left=False),
    ]  # fmt: skip
    found = only(rows)
    assert (found["self_consistency"], found["self_consistency_n"]) == (pytest.approx(2 / 3), 3)
    assert (found["swap_consistency"], found["swap_consistency_n"]) == (0.5, 2)


def test_somebody_who_always_takes_the_left_is_found_out():
    rng = np.random.default_rng(0)
    rows = [row(i, "left", first_is_left=bool(rng.integers(2))) for i in range(40)]
    rows += [row(40 + i, "left", pair=i, kind="swap", first_is_left=not rows[i].first_is_left) for i in range(10)]
    rows += [row(50 + i, "left", kind="gold", expected=("left", "right")[i % 2], milliseconds=300) for i in range(8)]
    found = only([r for r in rows], fast_seconds=5)
    assert found["swap_consistency"] == 0 and found["left_share"] == 1 and found["gold_accuracy"] == 0.5
    assert [flag.split(":")[0] for flag in found["flags"]] == ["gold checks", "fast", "side bias", "inconsistent"]


def test_skips_and_ties_without_end_are_flagged():
    assert only([row(i, "skip" if i % 2 else "left", first_is_left=i % 4 < 2) for i in range(30)])["flags"][-1] == "skips 15 of 30"
    assert only([row(i, "tie") for i in range(30)])["flags"] == ["ties 30 of 30"]


def test_a_careful_annotator_is_rarely_flagged():
    rng, flagged = np.random.default_rng(1), 0
    for _ in range(60):
        rows = []
        for i in range(200):
            first_is_left, better = bool(rng.integers(2)), rng.random() < 0.8
            rows.append(row(i, "left" if better == first_is_left else "right", first_is_left=first_is_left))
        flagged += bool(only(rows)["flags"])
    assert flagged <= 1


def test_agreement_of_annotators_who_saw_the_pairs_on_other_sides():
    rows = []
    for pair in range(20):
        preferred = pair % 3 != 0
        rows.append(row(3 * pair, "left" if preferred else "right", pair=pair, annotator="x"))
        rows.append(row(3 * pair + 1, "right" if preferred else "left", pair=pair, annotator="y", first_is_left=False))
        rows.append(row(3 * pair + 2, "left", pair=pair, annotator="z"))
    found = quality_report(rows)["agreement"]
    kappa = {(k["a"], k["b"]): k["kappa"] for k in found["cohen_kappa"]}
    assert kappa["x", "y"] == 1 and kappa["x", "z"] == pytest.approx(0, abs=1e-12)
    assert found["alpha_n"] == 20 and found["alpha_ci95"][0] <= found["krippendorff_alpha"] <= found["alpha_ci95"][1]


def test_strengths_rank_a_tournament_and_leave_lone_pairs_out():
    rng, rows = np.random.default_rng(3), []
    for i in range(400):
        a, b = rng.choice(6, 2, replace=False)
        wins = rng.random() < 1 / (1 + np.exp(b - a))
        rows.append(row(i, "left" if wins else "right", pair=int(a * 6 + b), shapes=(shape(int(a)), shape(int(b)))))
    rows.append(row(999, "left", pair=999))
    found = quality_report(rows)
    assert [s["label"] for s in found["bradley_terry"]] == [f"seed {k}" for k in (5, 4, 3, 2, 1, 0)]
    assert all(s["ci95"][0] < s["strength"] < s["ci95"][1] for s in found["bradley_terry"]) and found["cycles"]["triples"] == 20
    few = quality_report(rows, QualityLimits(strengths=3))["bradley_terry"]
    assert len(few) == 3


def test_a_running_study_gives_no_strengths_away():
    rows = [row(i, "left", mode="study", pair=i % 3, shapes=(shape(i % 3), shape((i + 1) % 3))) for i in range(12)]
    found = quality_report(rows)
    assert found["bradley_terry"] == [] and found["cycles"]["triples"] == 0 and found["judgements"] == 12


def test_the_report_is_json_and_an_empty_one_too():
    rows = [row(i, ("left", "right", "tie", "skip")[i % 4], annotator=("x", "y")[i % 2], pair=i // 2) for i in range(40)]
    for found in (quality_report(rows), quality_report([])):
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert quality_report([])["annotators"] == [] and quality_report([])["timeline"] == []


def test_the_timeline_counts_everything_once_and_stays_short():
    rows = [row(i, "left", received_at=1e9 + 3600.0 * 7 * i) for i in range(300)]
    found = quality_report(rows)["timeline"]
    assert sum(b["judgements"] for b in found) == 300 and len(found) <= 240
    assert all(b["time"] % b["seconds"] == 0 for b in found)


def test_ten_thousand_judgements_are_reported_live():
    import time

    rng = np.random.default_rng(4)
    rows = [row(i, ("left", "right")[int(rng.integers(2))], pair=int(rng.integers(3000)), annotator=f"n{i % 8}") for i in range(10_000)]
    start = time.process_time()
    quality_report(rows)
    assert time.process_time() - start < 5


def test_two_common_pairs_say_nothing_of_agreement():
    rows = [row(10 * pair + i, "left" if pair else "right", pair=pair, annotator=name) for pair in range(2) for i, name in enumerate("xy")]
    found = quality_report(rows)["agreement"]
    assert (found["krippendorff_alpha"], found["alpha_ci95"], found["alpha_n"], found["alpha_needs"]) == (None, None, 2, 8)
    assert [(k["kappa"], k["ci95"], k["n"], k["same_needs"]) for k in found["cohen_kappa"]] == [(None, None, 2, 8)]
    more = [row(10 * pair + i, ("left", "right")[pair % 2], pair=pair, annotator=name) for pair in range(10) for i, name in enumerate("xy")]
    found = quality_report(more)["agreement"]
    assert found["krippendorff_alpha"] == 1 and found["alpha_ci95"][0] < 0.75 and found["cohen_kappa"][0]["same_ci95"][0] < 0.75


def test_few_repeats_and_gold_checks_have_counts_and_no_interval():
    rows = [row(i, "left", pair=i) for i in range(9)] + [row(20 + i, "left", pair=i, kind="repeat") for i in range(9)]
    found = only(rows)
    assert (found["self_consistency"], found["self_consistency_ci95"], found["self_consistency_needs"]) == (1, None, 1)
    found = only([*rows, row(9, "left", pair=9), row(40, "left", pair=9, kind="repeat")])
    assert found["self_consistency_ci95"] == [pytest.approx(0.722, abs=1e-3), 1] and found["self_consistency_needs"] == 0
