"""Records answers and undos, each once per key in one short transaction; reads judgements in pages."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from eg3d_rlhf.people.label.assignments import MINE, take_place
from eg3d_rlhf.people.label.campaigns import FIELDS, Plan, settings_from_json, shape_from_row
from eg3d_rlhf.people.label.database import Database, annotators, campaigns, pairs, shapes
from eg3d_rlhf.people.label.database import assignments as a
from eg3d_rlhf.people.label.database import judgements as j
from eg3d_rlhf.people.label.entities import (
    SCALES,
    SKIP_REASONS,
    Answer,
    Choice,
    ConflictError,
    JudgementRow,
    Kind,
    Mode,
    OwnAnswer,
    Submitted,
    check_votes,
)

MAX_TEXT = 200  # characters of keys, views and versions
MAX_COMMENT = 500  # characters
MAX_VIEWS = 64  # names of views in one answer
# integers up to 2**53 are exact in JavaScript's numbers and fit the column's 64 bits
MAX_MILLISECONDS = 2**53
PAGE = 2000  # judgements that are read at once, so that memory stays bounded
FIRST = 2**31 - 1  # above every sequence
# Columns that a `JudgementRow` contains unchanged and under the same names.
OF_JUDGEMENT = ("id", "reason", "milliseconds", "answered_at", "received_at", "page_version", "comment")
OF_ASSIGNMENT = ("sequence",)
AS_STORED = (*OF_JUDGEMENT, *OF_ASSIGNMENT, "annotator", "campaign")

# These statements are built once, because building a statement takes longer than running it.
BY_KEY = select(j).where(j.c.annotator_id == bindparam("annotator"), j.c.key == bindparam("key"))
BY_TOKEN = select(a).where(a.c.token == bindparam("token"), MINE)
# The annotator's answer that was recorded last, among those that count.
LAST = select(a).where(MINE, a.c.answered.is_not(None)).order_by(a.c.answered.desc()).limit(1)
RECORD = insert(j)
# Stores the answer that counts. It returns `released` as it is at this moment, under the row's lock.
CLOSE = (
    update(a)
    .where(a.c.id == bindparam("assignment"))
    .values(answered=bindparam("judgement"), undone=None, leased=bindparam("now"))
)
CLOSE = CLOSE.returning(a.c.released)
# The annotator's own answers that count. Gold checks and repeats are listed like other pairs.
OWN_ANSWERS = select(
    *(a.c[name] for name in ("sequence", "token", "pair_id", "first_is_left", "kind")),
    *(j.c[name] for name in ("choice", "reason", "votes", "comment", "received_at")),
).join_from(a, j, j.c.id == a.c.answered)
OWN_ANSWERS = OWN_ANSWERS.where(MINE, a.c.kind != Kind.TRAINING.value, a.c.sequence < bindparam("before"))
OWN_ANSWERS = OWN_ANSWERS.order_by(a.c.sequence.desc()).limit(bindparam("count"))
COMMENTS = select(annotators.c.name.label("annotator"), j.c.received_at, j.c.choice, j.c.comment)
COMMENTS = COMMENTS.join_from(j, a, a.c.answered == j.c.id).join(
    annotators, annotators.c.id == j.c.annotator_id
)
COMMENTS = COMMENTS.where(j.c.campaign_id == bindparam("campaign"), j.c.comment.is_not(None)).order_by(
    j.c.id.desc()
)
COMMENTS = COMMENTS.limit(bindparam("count"))
# Number of pairs of the plan that are answered, for the stopping rule of a study.
TRIALS = select(func.count()).where(
    a.c.campaign_id == bindparam("campaign"), a.c.kind == Kind.PAIR.value, a.c.answered.is_not(None)
)
CHOICE = select(j.c.choice).where(j.c.id == bindparam("judgement"))


def check_answer(answer: Answer) -> None:
    """Check an answer before it is stored. The web server has checked requests already, but scripts call the
    store directly.

    Raises: ValueError for values that cannot be stored.
    """
    for name, text in (("key", answer.key), *(("view", view) for view in answer.views)):
        check_text(name, text)
    check_text("page_version", answer.page_version, least=0)
    if answer.comment is not None:
        check_text("comment", answer.comment, most=MAX_COMMENT)
    if len(answer.views) > MAX_VIEWS:
        raise ValueError(
            f"answer: expected at most {MAX_VIEWS} views, got {len(answer.views)}. Send each view once."
        )
    if not 0 <= answer.milliseconds <= MAX_MILLISECONDS:
        raise ValueError(
            f"answer: expected milliseconds from 0 to 2**53, got {answer.milliseconds}. Send the time from"
            " both shapes being visible to the choice."
        )
    # The comparison is also False for nan, which JSON parsers of other languages may send.
    if answer.answered_at is not None and not abs(answer.answered_at) < 1e15:
        raise ValueError(
            f"answer: expected answered_at in seconds since 1970, got {answer.answered_at}. Correct it, or"
            " leave it out."
        )
    if answer.reason is not None and (answer.choice is not Choice.SKIP or answer.reason not in SKIP_REASONS):
        reasons = ", ".join(SKIP_REASONS)
        raise ValueError(
            f"answer: a reason may be given for a skip only, and must be one of {reasons}, got"
            f" {answer.reason!r}. Choose one of them."
        )


def check_text(name: str, value: str, least: int = 1, most: int = MAX_TEXT) -> None:
    """Check the length of a text and that it is printable: no control characters and no lone surrogates.

    Raises: ValueError.
    """
    if not least <= len(value) <= most or not value.isprintable():
        raise ValueError(
            f"answer: {name} must have {least} to {most} printable characters, got {value[:40]!r}. Send"
            " another text."
        )


def submit(c: Connection, plan: Plan, annotator_id: int, answer: Answer, now: float) -> Submitted:
    """Record a choice. Raises: as `Store.submit`."""
    # The page repeats an answer whose reply was lost. Such a repetition must not count twice.
    before = _by_key(c, annotator_id, answer.key)
    if before is not None and before.type != "choice":
        raise ConflictError(
            f"answer: expected a new key, got {answer.key!r}, which an undo has used. Use another key."
        )
    if before is not None:
        assigned = c.execute(select(a).where(a.c.id == before.assignment_id)).one()
        recorded = (assigned.token, before.choice, before.reason, before.votes)
        if recorded != (answer.assignment, answer.choice.value, answer.reason, _votes(answer)):
            raise ConflictError(
                f"answer: expected a new key, got {answer.key!r}, which another answer has used. Use another"
                " key."
            )
        return _outcome(plan, assigned, before.id, Choice(before.choice), duplicate=True)
    assigned = _assignment(c, plan.campaign.id, annotator_id, answer.assignment)
    settings = plan.campaign.settings
    # Scale and `both_bad` of the campaign decide which answers are valid.
    allowed = [choice for choice in SCALES[settings.scale] if choice is not Choice.BAD or settings.both_bad]
    if answer.choice not in (*allowed, Choice.SKIP):
        raise ValueError(
            f"answer: expected one of {', '.join(allowed)} or skip, got {answer.choice}. Reload the page."
        )
    check_votes(settings.questions, answer.votes, answer.choice)
    # Two pages of an annotator can show the same assignment.
    if assigned.answered is not None:
        raise ConflictError(
            f"answer: assignment {answer.assignment} is answered already. Undo that answer first."
        )
    values = {
        "campaign_id": plan.campaign.id,
        "annotator_id": annotator_id,
        "key": answer.key,
        "type": "choice",
        "assignment_id": assigned.id,
        "choice": answer.choice.value,
        "reason": answer.reason,
        "milliseconds": answer.milliseconds,
        "views": json.dumps(answer.views),
        "answered_at": answer.answered_at,
        "received_at": now,
        "page_version": answer.page_version,
        "votes": _votes(answer),
        "comment": answer.comment,
    }
    judgement = c.execute(RECORD.returning(j.c.id), values).scalar_one()
    # From here on the assignment is answered. Its lease is renewed, too.
    closed = {"assignment": assigned.id, "judgement": judgement, "now": now}
    released = c.execute(CLOSE, closed).scalar_one()  # as it is now, under the row's lock
    # If the lease had expired, the place is taken again if it is free. The answer counts in both cases.
    if released is not None and take_place(c, assigned.pair_id):
        c.execute(update(a).where(a.c.id == assigned.id).values(released=None))
    return _outcome(plan, assigned, judgement, answer.choice, duplicate=False)


def _votes(answer: Answer) -> str | None:
    """Return the votes as they are stored: JSON with sorted keys, or None if there are none."""
    # Sorted keys: a repeated answer is recognised by comparing texts.
    return json.dumps(dict(answer.votes), sort_keys=True) if answer.votes else None


def undo(
    c: Connection, plan: Plan, annotator_id: int, key: str, assignment: str | None, now: float
) -> str | None:
    """Record that a choice is taken back. Returns the token of the assignment that is open again.

    Raises: as `Store.undo`.
    """
    campaign_id = plan.campaign.id
    before = _by_key(c, annotator_id, key)
    if before is not None:
        if before.type != "undo":
            raise ConflictError(
                f"undo: expected a new key, got {key!r}, which an answer has used. Use another key."
            )
        # A repeated undo: the first result is returned again.
        return c.execute(select(a.c.token).where(a.c.id == before.assignment_id)).scalar()
    if assignment is not None:
        # A chosen answer, from the list of own answers.
        latest: Row | None = _assignment(c, campaign_id, annotator_id, assignment)
    else:
        latest = c.execute(LAST, {"campaign": campaign_id, "annotator": annotator_id}).first()
    # An assignment without an answer has nothing to take back.
    target = latest if latest is not None and latest.answered is not None else None
    # An undo is recorded even when there is nothing to take back, so that its key is used up.
    values = {
        "campaign_id": campaign_id,
        "annotator_id": annotator_id,
        "key": key,
        "type": "undo",
        "received_at": now,
    }
    if target is not None:
        check_open(c, plan, target, now)
        values |= {"assignment_id": target.id, "takes_back": target.answered}
        # The lease starts again, so the place is not released at once.
        c.execute(update(a).where(a.c.id == target.id).values(answered=None, undone=now, leased=now))
    c.execute(RECORD, values)
    return None if target is None else target.token


def _by_key(c: Connection, annotator_id: int, key: str) -> Row | None:
    """Return the annotator's judgement with a key, or None."""
    return c.execute(BY_KEY, {"annotator": annotator_id, "key": key}).first()


def _assignment(c: Connection, campaign_id: int, annotator_id: int, token: str) -> Row:
    """Return the annotator's assignment with a token. Raises: LookupError if there is none."""
    row = None
    # PostgreSQL rejects texts that contain a null character, so unprintable tokens are not looked up.
    if token.isprintable():
        row = c.execute(
            BY_TOKEN, {"token": token, "campaign": campaign_id, "annotator": annotator_id}
        ).first()
    if row is None:
        raise LookupError(
            f"assignment: expected one of this annotator, got {token[:60]!r}. Request assignments first."
        )
    return row


def _outcome(plan: Plan, assigned: Row, judgement: int, choice: Choice, duplicate: bool) -> Submitted:
    """Make the reply to an answer: training pairs get their explanation, other pairs at most the names."""
    if assigned.kind != Kind.TRAINING:
        names = revealed(plan, assigned, choice)
        return Submitted(judgement=judgement, duplicate=duplicate, reveal=names)
    pair = plan.pairs[assigned.pair_id]
    expected = expected_side(pair.expected, bool(assigned.first_is_left), plan.campaign.settings.mode)
    # A skip is neither correct nor wrong.
    correct = None if expected is None or choice is Choice.SKIP else choice.meets(expected)
    return Submitted(
        judgement=judgement,
        duplicate=duplicate,
        training=True,
        correct=correct,
        explanation=pair.explanation,
        better=expected,
    )


def expected_side(expected: str | None, first_is_left: bool, mode: Mode) -> str | None:
    """Return 'left' or 'right' for the plan's 'first' or 'second'; for a single shape 'up' or 'down'."""
    if expected is None:
        return None
    if mode is Mode.SINGLE:
        return {"first": "up", "second": "down"}[expected]
    return "left" if (expected == "first") == first_is_left else "right"


def read_judgements(
    database: Database, campaign: str | None = None, names: Sequence[str] = (), include_undone: bool = False
) -> Iterator[JudgementRow]:
    """Yield choices in order of receipt.

    Args:
        campaign: name; None: all campaigns.
        names: of annotators; empty: all.
        include_undone: yield choices that were taken back, too.
    """
    # Each judgement names two shapes, so the table of shapes is joined twice, with prefixes for its columns.
    first = shapes.alias("first")
    second = shapes.alias("second")
    named = [first.c[name].label(f"first_{name}") for name in FIELDS] + [
        second.c[name].label(f"second_{name}") for name in FIELDS
    ]
    columns = (
        *(j.c[name] for name in (*OF_JUDGEMENT, "choice", "views", "votes")),
        *(a.c[name] for name in (*OF_ASSIGNMENT, "token", "kind", "first_is_left", "answered", "pair_id")),
        pairs.c.expected,
        annotators.c.name.label("annotator"),
        campaigns.c.name.label("campaign"),
        campaigns.c.settings,
        *named,
    )
    joined = j.join(a, and_(a.c.id == j.c.assignment_id, j.c.type == "choice")).join(
        pairs, pairs.c.id == a.c.pair_id
    )
    joined = joined.join(first, first.c.id == pairs.c.first_id).join(second, second.c.id == pairs.c.second_id)
    joined = joined.join(annotators, annotators.c.id == j.c.annotator_id).join(
        campaigns, campaigns.c.id == j.c.campaign_id
    )
    query = select(*columns).select_from(joined)
    query = query.where(campaigns.c.name == campaign) if campaign is not None else query
    query = query.where(annotators.c.name.in_(list(names))) if names else query
    query = query if include_undone else query.where(a.c.answered == j.c.id)
    # Settings are parsed once per campaign, not once per row.
    modes: dict[str, str] = {}
    last = 0
    while True:
        # Each page is read in a transaction of its own, so that a slow reader does not block the database.
        with database.read() as c:
            page = c.execute(query.where(j.c.id > last).order_by(j.c.id).limit(PAGE)).all()
        for row in page:
            yield _row(row, modes)
        if len(page) < PAGE:
            return
        # Ids grow with the time of receipt, so pages need no offset.
        last = page[-1].id


def tally(c: Connection) -> list[Row]:
    """Count judgements that count, by campaign and annotator, in order of their first judgement.

    Returns: rows with campaign_id, name, judgements, last (time of receipt).
    """
    # Joined by `answered`, so answers that were taken back are left out.
    figures = func.count().label("judgements"), func.max(j.c.received_at).label("last")
    query = select(j.c.campaign_id, annotators.c.name, *figures).join_from(a, j, j.c.id == a.c.answered)
    query = query.join(annotators, annotators.c.id == j.c.annotator_id).group_by(
        j.c.campaign_id, j.c.annotator_id, annotators.c.name
    )
    return list(c.execute(query.order_by(func.min(j.c.id))))


def _row(row: Row, modes: dict[str, str]) -> JudgementRow:
    """Build a `JudgementRow`. `modes` caches the mode of each campaign."""
    if row.campaign not in modes:
        modes[row.campaign] = settings_from_json(row.settings).mode.value
    first_is_left = bool(row.first_is_left)
    first = shape_from_row(row, "first_")
    second = shape_from_row(row, "second_")
    left, right = (first, second) if first_is_left else (second, first)
    return JudgementRow(
        **{name: row._mapping[name] for name in AS_STORED},
        mode=modes[row.campaign],
        assignment=row.token,
        pair=row.pair_id,
        kind=Kind(row.kind),
        left=left,
        right=right,
        first_is_left=first_is_left,
        choice=Choice(row.choice),
        expected=expected_side(row.expected, first_is_left, Mode(modes[row.campaign])),
        views=tuple(json.loads(row.views)),
        # Only the judgement that its assignment names in `answered` counts.
        undone=row.answered != row.id,
        votes=json.loads(row.votes) if row.votes else {},
    )


# ---- an annotator's own answers. Gold checks and repeats are listed like other pairs, so that the list
# reveals neither which pairs they are nor how many there are.


def own_answers(
    c: Connection, plan: Plan, annotator_id: int, before: int | None, count: int, now: float
) -> list[OwnAnswer]:
    """Return the annotator's answers, newest assignment first. Changing an answer does not move it."""
    parameters = {
        "campaign": plan.campaign.id,
        "annotator": annotator_id,
        "before": FIRST if before is None else before,
        "count": count,
    }
    complete = study_over(c, plan, now)
    answers = []
    for row in c.execute(OWN_ANSWERS, parameters):
        pair = plan.pairs[row.pair_id]
        choice = Choice(row.choice)
        # The same sides as when it was shown.
        left, right = (pair.first, pair.second) if row.first_is_left else (pair.second, pair.first)
        answers.append(
            OwnAnswer(
                sequence=row.sequence,
                assignment=row.token,
                left=left,
                right=right,
                choice=choice,
                reason=row.reason,
                votes=json.loads(row.votes) if row.votes else {},
                comment=row.comment,
                answered=row.received_at,
                changeable=not complete and not _reply_reveals(plan, row.kind, choice),
            )
        )
    return answers


def comments(c: Connection, campaign_id: int, count: int) -> list[Row]:
    """Return comments on answers that count, newest first: annotator, received_at, choice, comment."""
    return list(c.execute(COMMENTS, {"campaign": campaign_id, "count": count}))


def check_open(c: Connection, plan: Plan, assigned: Row, now: float) -> None:
    """Raise ConflictError if an answer may not be taken back any more."""
    # The choice matters only in campaigns that reveal names; elsewhere its look-up is saved.
    choice = (
        Choice(c.execute(CHOICE, {"judgement": assigned.answered}).scalar_one())
        if plan.campaign.settings.reveal
        else Choice.SKIP
    )
    if _reply_reveals(plan, assigned.kind, choice):
        raise ConflictError(
            "answer: it cannot be changed, because this campaign has shown the names of the generators after"
            " it. Continue with the next pair."
        )
    if study_over(c, plan, now):
        raise ConflictError(
            "answer: it cannot be changed, because the study is complete. No further answer is needed."
        )


def study_over(c: Connection, plan: Plan, now: float) -> bool:
    """Return True if the stopping rule of a study is met. From then on no answer may be changed."""
    settings = plan.campaign.settings
    trials = settings.extra.get("trials")
    until = settings.extra.get("until")
    # Only studies that were planned with a stopping rule have `trials`.
    if settings.mode is not Mode.STUDY or trials is None:
        return False
    # A date without a time zone is local time of the server.
    if until is not None and now >= datetime.fromisoformat(until).astimezone(UTC).timestamp():
        return True
    return c.execute(TRIALS, {"campaign": plan.campaign.id}).scalar_one() >= trials


def revealed(plan: Plan, assigned: Row, choice: Choice) -> tuple[str, str] | None:
    """Return the names of the left and the right generator, or None. They are shown only in campaigns with
    `reveal`, and not for repeats and gold checks.
    """
    # Names of a gold pair would be equal and show that it was one.
    if not _reply_reveals(plan, assigned.kind, choice) or assigned.kind != Kind.PAIR:
        return None
    pair = plan.pairs[assigned.pair_id]
    first, second = (plan.generator_name(plan.shapes[asset]) for asset in (pair.first, pair.second))
    return (first, second) if assigned.first_is_left else (second, first)


def _reply_reveals(plan: Plan, kind: str, choice: Choice) -> bool:
    """Return True if the reply to an answer reveals what the annotator must not know before: the generators'
    names, or, because names are missing, that the pair was a repeat or a gold check.
    """
    return plan.campaign.settings.reveal and kind != Kind.TRAINING and choice is not Choice.SKIP
