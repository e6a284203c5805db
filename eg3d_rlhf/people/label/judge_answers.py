"""Answers of judges (vision-language models) in a label store.

A judge answers the pairs of a campaign under its own name, beside people. Its assignments use no slots of the
pairs, so that people are asked as many pairs as without it. It answers every pair of the plan once, without
repeats, gold checks and practice pairs; a calibration against people takes their place. An answer is stored
in one transaction together with its assignment, so a process that is killed leaves no half of an answer, and
the database rejects a second answer of a judge to the same pair.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select, update

from eg3d_rlhf.people.label.campaigns import StoredPair
from eg3d_rlhf.people.label.database import Lock, assignments, judgements
from eg3d_rlhf.people.label.entities import (
    JUDGE,
    Choice,
    Kind,
    StoredAnnotator,
    check_judge_origin,
    check_votes,
)
from eg3d_rlhf.people.label.store import NAME, check_name, find, find_or_add

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

_PREFIX = "judge "  # start of the name of a judge; the rest is the name of its model
VERDICTS = ("first", "second", "tie")  # outcomes of a comparison
SKIP_REASON = "unsure"  # reason of the skip that records a pair without a readable verdict


@dataclass(frozen=True, kw_only=True)
class JudgeAnswer:
    """Verdicts of a judge on one pair of a campaign."""

    verdict: str | None  # "first", "second" or "tie" for the main question; None: no readable answer
    # name of a further question of the campaign -> verdict; a question without a readable answer is a tie
    votes: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any]  # value of `JudgementRow.judge`, in JSON types
    milliseconds: int = 0  # time of the calls; 0 if the answers were stored before


def judge_name(model: str) -> str:
    """Return the name of the annotator of a model.

    >>> judge_name("Qwen/Qwen2.5-VL-7B-Instruct")
    'judge Qwen-Qwen2.5-VL-7B-Instruct'
    """
    name = _PREFIX + re.sub(r"[^\w .@+-]", "-", model).strip()
    name = name[:80].strip()
    assert NAME.fullmatch(name)
    return name


def judge_annotator(store: "Store", model: str) -> StoredAnnotator:
    """Return the annotator of a judge's model, who is added if there is none.

    Args:
        store: label store.
        model: name of the model as the server knows it.

    Raises:
        ValueError: a person has the name of the judge, or a name that is too similar to it.
    """
    name = judge_name(model)
    with store.database.write((Lock.SCHEMA, 2)) as connection:
        annotator = find(connection, name)
        if annotator is None:
            check_name(name, [])
            annotator = find_or_add(connection, name, JUDGE, store.clock())
    if annotator.role != JUDGE:
        raise ValueError(
            f"--judge-model={model}: a person of the database has the name {name!r}. Use another database."
        )
    return annotator


def open_pairs(store: "Store", campaign_id: int, annotator_id: int) -> list[StoredPair]:
    """Return the pairs of a campaign that a judge has not answered, in order of the plan.

    Args:
        store: label store.
        campaign_id: id of the campaign.
        annotator_id: id of the judge.
    """
    with store.database.read() as connection:
        answered = set(
            connection.execute(
                select(assignments.c.pair_id).where(
                    assignments.c.campaign_id == campaign_id,
                    assignments.c.annotator_id == annotator_id,
                    assignments.c.answered.is_not(None),
                )
            ).scalars()
        )
    plan = store.plan(campaign_id)
    return [
        pair for pair_id, pair in plan.pairs.items() if pair.kind == Kind.PAIR and pair_id not in answered
    ]


def record_answer(
    store: "Store", campaign_id: int, annotator_id: int, pair: StoredPair, answer: JudgeAnswer
) -> int:
    """Store the answer of a judge to a pair, and return the id of the judgement.

    Args:
        store: label store.
        campaign_id: id of the campaign.
        annotator_id: id of the judge.
        pair: pair of the campaign.
        answer: verdicts of the judge.

    Raises:
        ValueError: a verdict is unknown, or a vote on a question of the campaign is missing.
        sqlalchemy.exc.IntegrityError: the judge has answered the pair before.
    """
    settings = store.plan(campaign_id).campaign.settings
    # The order on the page means nothing for a judge, who sees both. It alternates, so that a side that is
    # always the winner's does not appear in exports.
    first_is_left = pair.id % 2 == 0
    side_of = {
        "first": Choice.LEFT if first_is_left else Choice.RIGHT,
        "second": Choice.RIGHT if first_is_left else Choice.LEFT,
        "tie": Choice.TIE,
    }
    unknown_verdicts = ({answer.verdict} | set(answer.votes.values())) - {*VERDICTS, None}
    if unknown_verdicts:
        raise ValueError(f"the verdicts {unknown_verdicts} are none of {', '.join(VERDICTS)}.")
    choice = Choice.SKIP if answer.verdict is None else side_of[answer.verdict]
    votes = (
        {} if choice is Choice.SKIP else {name: side_of[vote].value for name, vote in answer.votes.items()}
    )
    check_votes(settings.questions, votes, choice)
    origin_json = json.dumps(dict(answer.origin), sort_keys=True)
    check_judge_origin(origin_json)
    now = store.clock()
    with store.database.write((Lock.ANNOTATOR, annotator_id)) as connection:
        sequence = (
            connection.execute(
                select(assignments.c.sequence)
                .where(assignments.c.campaign_id == campaign_id, assignments.c.annotator_id == annotator_id)
                .order_by(assignments.c.sequence.desc())
                .limit(1)
            ).scalar()
            or 0
        ) + 1
        token = secrets.token_urlsafe(12)
        assignment_id = connection.execute(
            insert(assignments).returning(assignments.c.id),
            {
                "token": token,
                "campaign_id": campaign_id,
                "annotator_id": annotator_id,
                "pair_id": pair.id,
                "sequence": sequence,
                "kind": Kind.PAIR.value,
                "first_is_left": int(first_is_left),
                "leased": now,
                # A released assignment uses no slot of its pair.
                "released": now,
            },
        ).scalar_one()
        judgement_id = connection.execute(
            insert(judgements).returning(judgements.c.id),
            {
                "campaign_id": campaign_id,
                "annotator_id": annotator_id,
                "key": token,
                "type": "choice",
                "assignment_id": assignment_id,
                "choice": choice.value,
                "reason": SKIP_REASON if choice is Choice.SKIP else None,
                "milliseconds": answer.milliseconds,
                "views": "[]",
                "received_at": now,
                "page_version": "",
                "votes": json.dumps(votes, sort_keys=True) if votes else None,
                "judge": origin_json,
            },
        ).scalar_one()
        connection.execute(
            update(assignments).where(assignments.c.id == assignment_id).values(answered=judgement_id)
        )
    return judgement_id
