"""Stores with answers of people and of a judge, for tests that both are kept apart."""

from collections.abc import Callable

from eg3d_rlhf.people.label.judge_answers import JudgeAnswer, judge_annotator, open_pairs, record_answer
from eg3d_rlhf.people.label.store import Store

MODEL = "acme/vl-7b"
JUDGE_HASH = "9" * 64
CALIBRATION = "c" * 64


def origin(
    questions: dict[str, str], flip: bool = False, calibrated: bool = False, judge: str = JUDGE_HASH, **more
) -> dict:
    """Origin of a judge's answer: name of a question -> criterion."""
    return {
        "model": MODEL,
        "family": "acme",
        "calibration": CALIBRATION,
        "calibrated": calibrated,
        "questions": {
            name: {"criterion": criterion, "judge": judge, "answer": "a" * 64, "order_flip": flip}
            for name, criterion in questions.items()
        },
        **more,
    }


def answer_as_judge(
    store: Store,
    campaign: int,
    verdict: str | None | Callable = "first",
    most: int = 10_000,
    votes: dict[str, str] | None = None,
    model: str = MODEL,
    criteria: dict[str, str] | None = None,
    **fields,
) -> int:
    """Let a judge answer the open pairs of a campaign, and return their number."""
    who = judge_annotator(store, model).id
    pairs = open_pairs(store, campaign, who)[:most]
    shapes = store.plan(campaign).shapes
    for pair in pairs:
        given = verdict(shapes[pair.first], shapes[pair.second]) if callable(verdict) else verdict
        record_answer(
            store,
            campaign,
            who,
            pair,
            JudgeAnswer(
                verdict=given,
                votes=votes or {},
                origin=origin(
                    criteria or {"": "geometry_details", **dict.fromkeys(votes or {}, "texture_details")},
                    **fields,
                ),
            ),
        )
    return len(pairs)
