"""An annotator's own answers: listing them, what may still be taken back, and whose shapes they were where a campaign tells.

Checks and repeats are listed as other pairs are, so that the list tells neither what is one nor how many there are. Practice is not.
"""

import json
from datetime import UTC, datetime

from sqlalchemy import Connection, Row, bindparam, func, select

from eg3d_rlhf.people.label.assignments import MINE
from eg3d_rlhf.people.label.campaigns import Plan
from eg3d_rlhf.people.label.database import annotators
from eg3d_rlhf.people.label.database import assignments as a
from eg3d_rlhf.people.label.database import judgements as j
from eg3d_rlhf.people.label.entities import Choice, ConflictError, Kind, Mode, OwnAnswer

FIRST = 2**31 - 1  # above every sequence
OWN = select(
    a.c.sequence, a.c.token, a.c.pair_id, a.c.first_is_left, a.c.kind, j.c.choice, j.c.reason, j.c.votes, j.c.comment, j.c.received_at
).join_from(a, j, j.c.id == a.c.answered)  # fmt: skip
OWN = OWN.where(MINE, a.c.kind != Kind.TRAINING.value, a.c.sequence < bindparam("before"))
OWN = OWN.order_by(a.c.sequence.desc()).limit(bindparam("count"))
COMMENTS = select(annotators.c.name.label("annotator"), j.c.received_at, j.c.choice, j.c.comment)
COMMENTS = COMMENTS.join_from(j, a, a.c.answered == j.c.id).join(annotators, annotators.c.id == j.c.annotator_id)
COMMENTS = COMMENTS.where(j.c.campaign_id == bindparam("campaign"), j.c.comment.is_not(None)).order_by(j.c.id.desc())
COMMENTS = COMMENTS.limit(bindparam("count"))
TRIALS = select(func.count()).where(a.c.campaign_id == bindparam("campaign"), a.c.kind == Kind.PAIR.value, a.c.answered.is_not(None))
GIVEN = select(j.c.choice).where(j.c.id == bindparam("judgement"))


def own_answers(c: Connection, plan: Plan, annotator_id: int, before: int | None, count: int, now: float) -> list[OwnAnswer]:
    """The annotator's answers, the pair that was handed out last first: changing one does not move it.

    Args: before: only pairs of a lower sequence; None: all.
    """
    known = {"campaign": plan.campaign.id, "annotator": annotator_id, "before": FIRST if before is None else before, "count": count}
    over = study_over(c, plan, now)
    found = []
    for row in c.execute(OWN, known):
        pair, choice = plan.pairs[row.pair_id], Choice(row.choice)
        left, right = (pair.first, pair.second) if row.first_is_left else (pair.second, pair.first)
        found.append(OwnAnswer(
            sequence=row.sequence, assignment=row.token, left=left, right=right, choice=choice, reason=row.reason,
            votes=json.loads(row.votes) if row.votes else {}, comment=row.comment, answered=row.received_at,
            changeable=not over and not _told(plan, row.kind, choice),
        ))  # fmt: skip
    return found


def comments(c: Connection, campaign_id: int, count: int) -> list[Row]:
    """What annotators remarked with answers that count, newest first: annotator, received_at, choice, comment."""
    return list(c.execute(COMMENTS, {"campaign": campaign_id, "count": count}))


def check_open(c: Connection, plan: Plan, assigned: Row, now: float) -> None:
    """Raises: ConflictError for an answer that may not be taken back any more."""
    choice = Choice(c.execute(GIVEN, {"judgement": assigned.answered}).scalar_one()) if plan.campaign.settings.reveal else Choice.SKIP
    if _told(plan, assigned.kind, choice):
        raise ConflictError("answer: expected one that may be changed, got one after which this campaign tells the names. It stays.")
    if study_over(c, plan, now):
        raise ConflictError("answer: expected a study that goes on, got one that is complete. The answer stays.")


def study_over(c: Connection, plan: Plan, now: float) -> bool:
    """Whether the stopping rule of a study that names it is met: answers stay as they are from then on."""
    settings = plan.campaign.settings
    trials, until = settings.extra.get("trials"), settings.extra.get("until")
    if settings.mode is not Mode.STUDY or trials is None:
        return False
    if until is not None and now >= datetime.fromisoformat(until).astimezone(UTC).timestamp():
        return True
    return c.execute(TRIALS, {"campaign": plan.campaign.id}).scalar_one() >= trials


def revealed(plan: Plan, assigned: Row, choice: Choice) -> tuple[str, str] | None:
    """The generators' names of the left and the right shape, where the campaign tells them and this is a pair for its own sake."""
    if not _told(plan, assigned.kind, choice) or assigned.kind != Kind.PAIR:
        return None
    pair = plan.pairs[assigned.pair_id]
    first, second = (plan.generator_name(plan.shapes[asset]) for asset in (pair.first, pair.second))
    return (first, second) if assigned.first_is_left else (second, first)


def _told(plan: Plan, kind: str, choice: Choice) -> bool:
    """Whether the annotator learns from the reply what she may not know while she answers: names, or by their lack that it was a check."""
    return plan.campaign.settings.reveal and kind != Kind.TRAINING and choice is not Choice.SKIP
