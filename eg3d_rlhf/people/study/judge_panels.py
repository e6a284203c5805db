"""Panels of judges in a blind study: results of vision-language models beside those of people.

A panel never adds to the result of people. It has the win rate and the interval of the study's design. No
answer is excluded: gold checks and answering times measure the attention of people, and a judge is measured
by its calibration instead.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from eg3d_rlhf.people.label.entities import MAIN_QUESTION, Choice, JudgementRow, Kind
from eg3d_rlhf.people.label.quality import side_free
from eg3d_rlhf.people.study.analysis import estimate
from eg3d_rlhf.people.study.design import StudyDesign
from eg3d_rlhf.preferences.agreement import cohen_kappa


def judge_panels(
    design: StudyDesign, judge_rows: Sequence[JudgementRow], people_rows: Sequence[JudgementRow]
) -> list[dict[str, Any]]:
    """Compute the result of each judge that answered a study.

    Args:
        design: design of the study.
        judge_rows: answers of judges.
        people_rows: answers of people, with which those of a judge are compared.

    Returns:
        One dict in JSON types per judge, by name: "name", "model", "family", "criterion", "calibration"
        (SHA-256 of the file, or None), "calibrated" (True if it lets labels by this criterion pass),
        "same_judge" (True if the user insisted on the family that labelled), "trials", "order_flips" (share
        of the readable pairs), "unreadable", "result" (see `analysis.estimate`) and "people" (agreement with
        the majority of people: "n", "kappa", "kappa_interval", "same").
    """
    rows_by_judge: dict[str, list[JudgementRow]] = defaultdict(list)
    for judgement in judge_rows:
        if judgement.judge is not None and judgement.kind is Kind.PAIR:
            rows_by_judge[judgement.annotator].append(judgement)
    return [_panel(design, name, rows, people_rows) for name, rows in sorted(rows_by_judge.items())]


def _panel(
    design: StudyDesign, name: str, rows: list[JudgementRow], people_rows: Sequence[JudgementRow]
) -> dict[str, Any]:
    """Compute the result of one judge; see `judge_panels`."""
    origins = [judgement.judge or {} for judgement in rows]
    readable = [judgement for judgement in rows if judgement.choice is not Choice.SKIP]
    flip_count = sum(_main(judgement).get("order_flip") is True for judgement in readable)
    calibrations = {origin.get("calibration") for origin in origins}
    return {
        "name": name,
        "model": origins[0].get("model"),
        "family": origins[0].get("family"),
        "criterion": ", ".join(sorted({str(_main(judgement).get("criterion", "")) for judgement in rows})),
        "calibration": calibrations.pop() if len(calibrations) == 1 else None,
        "calibrated": all(origin.get("calibrated") is True for origin in origins),
        "same_judge": any(origin.get("same_judge") is True for origin in origins),
        "trials": len(rows),
        "order_flips": flip_count / len(readable) if readable else None,
        "unreadable": len(rows) - len(readable),
        "result": estimate(rows, design.ties, design.confidence),
        "people": _agreement(readable, people_rows),
    }


def _main(judgement: JudgementRow) -> dict[str, Any]:
    """Return the origin of the choice of a judge's answer."""
    return (judgement.judge or {}).get("questions", {}).get(MAIN_QUESTION, {})


def _agreement(readable: Sequence[JudgementRow], people_rows: Sequence[JudgementRow]) -> dict[str, Any]:
    """Compare the answers of a judge with the majority of people on the same pairs."""
    votes_by_pair: dict[int, Counter[str]] = defaultdict(Counter)
    for judgement in people_rows:
        if judgement.kind is Kind.PAIR and judgement.choice is not Choice.SKIP:
            votes_by_pair[judgement.pair][side_free(judgement)] += 1
    people_answers = []
    judge_answers = []
    for judgement in readable:
        votes = votes_by_pair[judgement.pair].most_common()
        if votes:
            # Two answers that are equally frequent are a tie.
            is_shared = len(votes) > 1 and votes[0][1] == votes[1][1]
            people_answers.append(Choice.TIE.value if is_shared else votes[0][0])
            judge_answers.append(side_free(judgement))
    same_count = sum(answer == other for answer, other in zip(people_answers, judge_answers, strict=True))
    kappa = cohen_kappa(people_answers, judge_answers) if people_answers else None
    return {
        "n": len(people_answers),
        "same": same_count / len(people_answers) if people_answers else None,
        "kappa": None if kappa is None or kappa.lo is None else kappa.value,
        "kappa_interval": None if kappa is None else kappa.to_dict()["ci95"],
    }


def panel_sentences(panels: Sequence[dict[str, Any]], label_a: str, label_b: str) -> list[str]:
    """Return a sentence about the result of each panel, and what a reader must know about its judge.

    Args:
        panels: result of `judge_panels`.
        label_a, label_b: names of the two generators.
    """
    sentences = []
    for panel in panels:
        result = panel["result"]
        if result["win_rate"] is None:
            rate_text = "no answer counts"
        else:
            low, high = result["interval"]
            rate_text = (
                f"{label_b} won over {label_a} in {100 * result['win_rate']:.1f} % of {result['n']} trials,"
                f" {result['confidence']:.0%} interval {100 * low:.1f} % to {100 * high:.1f} %"
            )
        notes = []
        if panel["order_flips"] is not None:
            notes.append(f"{100 * panel['order_flips']:.1f} % of its verdicts changed with the order")
        if panel["people"]["kappa"] is not None:
            notes.append(f"kappa with people {panel['people']['kappa']:.2f} on {panel['people']['n']} pairs")
        notes.append(
            f"calibrated against people (file {panel['calibration'][:12]}...)"
            if panel["calibrated"] and panel["calibration"]
            else "UNCALIBRATED: no calibration against people has passed"
        )
        if panel["same_judge"]:
            notes.append("SAME JUDGE: a model of this family made the labels of the training (--same-judge)")
        sentences.append(
            f"Panel of the judge {panel['model']} (family {panel['family']}; not people): {rate_text}."
            f" {'; '.join(notes)}."
        )
    return sentences
