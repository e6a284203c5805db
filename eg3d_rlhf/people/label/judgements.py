"""Recording of answers and undos, and reading of judgements.

An answer or undo is recorded in one short transaction. The page chooses a key for each of them, and repeats a
request whose reply did not arrive. Every key is recorded only once. Judgements are read in pages, so that
memory stays bounded.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from eg3d_rlhf.people.label.assignments import MINE, take_slot
from eg3d_rlhf.people.label.campaigns import FIELDS, Plan, settings_from_json, shape_from_row
from eg3d_rlhf.people.label.database import (
    Database,
    annotators,
    assignments,
    campaigns,
    judgements,
    pairs,
    shapes,
)
from eg3d_rlhf.people.label.entities import (
    JUDGE,
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
from eg3d_rlhf.preferences.provenance import ALL, PEOPLE, check_labels_from

MAX_TEXT = 200  # largest number of characters of keys, names of views, and versions
MAX_COMMENT = 500  # largest number of characters of a comment
MAX_VIEWS = 64  # largest number of names of views in one answer
# Integers up to 2**53 are exact as numbers in JavaScript, and fit the 64 bits of the column.
MAX_MILLISECONDS = 2**53
PAGE = 2000  # number of judgements that are read at once
ABOVE_ALL_SEQUENCES = 2**31 - 1  # larger than every sequence number of an assignment
# Columns that a `JudgementRow` contains unchanged and under the same names.
OF_JUDGEMENT = ("id", "reason", "milliseconds", "answered_at", "received_at", "page_version", "comment")
OF_ASSIGNMENT = ("sequence",)
AS_STORED = (*OF_JUDGEMENT, *OF_ASSIGNMENT, "annotator", "campaign")

# These statements are built once, because building a statement takes longer than running it.
BY_KEY = select(judgements).where(
    judgements.c.annotator_id == bindparam("annotator"), judgements.c.key == bindparam("key")
)
BY_TOKEN = select(assignments).where(assignments.c.token == bindparam("token"), MINE)
# Assignment whose answer was recorded last, among the annotator's answers that count.
LAST = (
    select(assignments)
    .where(MINE, assignments.c.answered.is_not(None))
    .order_by(assignments.c.answered.desc())
    .limit(1)
)
RECORD = insert(judgements)
# Sets the answer that counts. The statement locks the row, and returns the current value of `released`.
CLOSE = (
    update(assignments)
    .where(assignments.c.id == bindparam("assignment"))
    .values(answered=bindparam("judgement"), undone=None, leased=bindparam("now"))
)
CLOSE = CLOSE.returning(assignments.c.released)
# The annotator's answers that count. Gold checks and repeats are listed like other pairs.
OWN_ANSWERS = select(
    *(assignments.c[name] for name in ("sequence", "token", "pair_id", "first_is_left", "kind")),
    *(judgements.c[name] for name in ("choice", "reason", "votes", "comment", "received_at")),
).join_from(assignments, judgements, judgements.c.id == assignments.c.answered)
OWN_ANSWERS = OWN_ANSWERS.where(
    MINE, assignments.c.kind != Kind.TRAINING.value, assignments.c.sequence < bindparam("before")
)
OWN_ANSWERS = OWN_ANSWERS.order_by(assignments.c.sequence.desc()).limit(bindparam("count"))
COMMENTS = select(
    annotators.c.name.label("annotator"), judgements.c.received_at, judgements.c.choice, judgements.c.comment
)
COMMENTS = COMMENTS.join_from(judgements, assignments, assignments.c.answered == judgements.c.id).join(
    annotators, annotators.c.id == judgements.c.annotator_id
)
COMMENTS = COMMENTS.where(
    judgements.c.campaign_id == bindparam("campaign"), judgements.c.comment.is_not(None)
).order_by(judgements.c.id.desc())
COMMENTS = COMMENTS.limit(bindparam("count"))
# Number of pairs of the plan that people have answered, for the stopping rule of a study.
TRIALS = select(func.count()).select_from(
    assignments.join(annotators, annotators.c.id == assignments.c.annotator_id)
)
TRIALS = TRIALS.where(
    annotators.c.role != JUDGE,
    assignments.c.campaign_id == bindparam("campaign"),
    assignments.c.kind == Kind.PAIR.value,
    assignments.c.answered.is_not(None),
)
CHOICE = select(judgements.c.choice).where(judgements.c.id == bindparam("judgement"))


def check_answer(answer: Answer) -> None:
    """Check the values of an answer before it is stored.

    The web server checks requests, too, but scripts call the store directly.

    Raises:
        ValueError: a value cannot be stored.
    """
    for name, text in (("key", answer.key), *(("view", view) for view in answer.views)):
        check_text(name, text)
    check_text("page_version", answer.page_version, min_length=0)
    if answer.comment is not None:
        check_text("comment", answer.comment, max_length=MAX_COMMENT)
    if len(answer.views) > MAX_VIEWS:
        raise ValueError(
            f"answer: it contains {len(answer.views)} names of views, but at most {MAX_VIEWS} are allowed."
            " Send the name of each view only once."
        )
    if not 0 <= answer.milliseconds <= MAX_MILLISECONDS:
        raise ValueError(
            f"answer: milliseconds={answer.milliseconds} is not between 0 and 2**53. Send the time from the"
            " moment at which both shapes are visible to the choice."
        )
    # For nan, which Python's JSON parser accepts, the comparison is False and the value is rejected.
    if answer.answered_at is not None and not abs(answer.answered_at) < 1e15:
        raise ValueError(
            f"answer: answered_at={answer.answered_at} is not a time in seconds since 1970. Send such a"
            " time, or leave answered_at out."
        )
    if answer.reason is not None and answer.choice is not Choice.SKIP:
        raise ValueError(
            f"answer: the reason {answer.reason!r} was sent with the choice {answer.choice}, but only a skip"
            " may have a reason. Send no reason."
        )
    if answer.reason is not None and answer.reason not in SKIP_REASONS:
        raise ValueError(
            f"answer: the reason {answer.reason!r} is unknown. Send one of {', '.join(SKIP_REASONS)}."
        )


def check_text(name: str, checked_text: str, min_length: int = 1, max_length: int = MAX_TEXT) -> None:
    """Check that a text has an allowed length, and contains no control characters and no lone surrogates.

    Args:
        name: name of the text for the message.
        checked_text: text.
        min_length: smallest allowed number of characters.
        max_length: largest allowed number of characters.

    Raises:
        ValueError: the text is not allowed.
    """
    if not min_length <= len(checked_text) <= max_length or not checked_text.isprintable():
        raise ValueError(
            f"answer: the text of {name}, {checked_text[:40]!r}, must have {min_length} to {max_length}"
            " printable characters. Send another text."
        )


def submit(connection: Connection, plan: Plan, annotator_id: int, answer: Answer, now: float) -> Submitted:
    """Record an answer to an assignment. An answer that is sent twice with one key is recorded once.

    Args:
        connection: connection with a write transaction that has the annotator's lock.
        plan: plan of the campaign.
        annotator_id: id of the annotator.
        answer: answer that was checked by `check_answer`.
        now: time of receipt, seconds since 1970.

    Returns:
        Result that the page shows; for a repeated answer, the result of the first one.

    Raises:
        ValueError: the choice or a vote is not valid in this campaign.
        ConflictError: the assignment has an answer already, or the key was used for something else.
        LookupError: the annotator has no such assignment.
    """
    # The page repeats an answer whose reply did not arrive. The repetition must not be recorded again.
    earlier_row = _by_key(connection, annotator_id, answer.key)
    if earlier_row is not None and earlier_row.type != "choice":
        raise ConflictError(
            f"answer: an undo has used the key {answer.key!r}. Send the answer with a new key."
        )
    if earlier_row is not None:
        assignment_row = connection.execute(
            select(assignments).where(assignments.c.id == earlier_row.assignment_id)
        ).one()
        recorded_answer = (assignment_row.token, earlier_row.choice, earlier_row.reason, earlier_row.votes)
        if recorded_answer != (answer.assignment, answer.choice.value, answer.reason, _votes(answer)):
            raise ConflictError(
                f"answer: another answer has used the key {answer.key!r}. Send the answer with a new key."
            )
        return _outcome(plan, assignment_row, earlier_row.id, Choice(earlier_row.choice), duplicate=True)
    assignment_row = _assignment(connection, plan.campaign.id, annotator_id, answer.assignment)
    campaign_settings = plan.campaign.settings
    # The choice BAD is valid only in campaigns with `both_bad`, and a skip is always valid.
    valid_choices = [
        choice
        for choice in SCALES[campaign_settings.scale]
        if choice is not Choice.BAD or campaign_settings.both_bad
    ]
    if answer.choice not in (*valid_choices, Choice.SKIP):
        raise ValueError(
            f"answer: the choice {answer.choice} is not valid in this campaign. Reload the page, and choose"
            f" one of {', '.join(valid_choices)} or skip."
        )
    check_votes(campaign_settings.questions, answer.votes, answer.choice)
    # An annotator can have two pages open, which show the same assignment.
    if assignment_row.answered is not None:
        raise ConflictError(
            f"answer: the assignment {answer.assignment} has an answer already. Undo that answer first."
        )
    column_values = {
        "campaign_id": plan.campaign.id,
        "annotator_id": annotator_id,
        "key": answer.key,
        "type": "choice",
        "assignment_id": assignment_row.id,
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
    judgement_id = connection.execute(RECORD.returning(judgements.c.id), column_values).scalar_one()
    # CLOSE marks the assignment as answered, and renews its lease.
    close_parameters = {"assignment": assignment_row.id, "judgement": judgement_id, "now": now}
    released_at = connection.execute(CLOSE, close_parameters).scalar_one()
    # If the assignment was released, its slot is taken again if it is free. The answer counts in both cases.
    if released_at is not None and take_slot(connection, assignment_row.pair_id):
        connection.execute(
            update(assignments).where(assignments.c.id == assignment_row.id).values(released=None)
        )
    return _outcome(plan, assignment_row, judgement_id, answer.choice, duplicate=False)


def _votes(answer: Answer) -> str | None:
    """Return the text of the column `votes`: JSON with sorted keys, or None if there are no votes."""
    # With sorted keys, equal votes give equal texts, which `submit` compares.
    return json.dumps(dict(answer.votes), sort_keys=True) if answer.votes else None


def undo(
    connection: Connection, plan: Plan, annotator_id: int, key: str, assignment: str | None, now: float
) -> str | None:
    """Record that an answer is taken back. A second call with the same key has no effect.

    Args:
        connection: connection with a write transaction that has the annotator's lock.
        plan: plan of the campaign.
        annotator_id: id of the annotator.
        key: key of this undo.
        assignment: token of the assignment; None: the last answer that counts.
        now: time of receipt, seconds since 1970.

    Returns:
        Token of the assignment that is open again; None if there was no answer to take back.

    Raises:
        ConflictError: the answer may not be changed any more, or an answer has used the key.
        LookupError: the annotator has no such assignment.
    """
    campaign_id = plan.campaign.id
    earlier_row = _by_key(connection, annotator_id, key)
    if earlier_row is not None:
        if earlier_row.type != "undo":
            raise ConflictError(f"undo: an answer has used the key {key!r}. Send the undo with a new key.")
        # The undo was recorded before. Its result is returned again.
        return connection.execute(
            select(assignments.c.token).where(assignments.c.id == earlier_row.assignment_id)
        ).scalar()
    if assignment is not None:
        # The annotator has chosen an answer from the list of own answers.
        latest_row: Row | None = _assignment(connection, campaign_id, annotator_id, assignment)
    else:
        latest_row = connection.execute(LAST, {"campaign": campaign_id, "annotator": annotator_id}).first()
    # An assignment without an answer has nothing to take back.
    undone_row = latest_row if latest_row is not None and latest_row.answered is not None else None
    # The undo is recorded even if there is no answer to take back. When the page repeats it, it has no effect
    # then.
    column_values = {
        "campaign_id": campaign_id,
        "annotator_id": annotator_id,
        "key": key,
        "type": "undo",
        "received_at": now,
    }
    if undone_row is not None:
        check_open(connection, plan, undone_row, now)
        column_values |= {"assignment_id": undone_row.id, "takes_back": undone_row.answered}
        # The lease starts again, so that the assignment is not released at once.
        connection.execute(
            update(assignments)
            .where(assignments.c.id == undone_row.id)
            .values(answered=None, undone=now, leased=now)
        )
    connection.execute(RECORD, column_values)
    return None if undone_row is None else undone_row.token


def _by_key(connection: Connection, annotator_id: int, key: str) -> Row | None:
    """Return the row of the annotator's answer or undo with a key, or None if the key is new."""
    return connection.execute(BY_KEY, {"annotator": annotator_id, "key": key}).first()


def _assignment(connection: Connection, campaign_id: int, annotator_id: int, token: str) -> Row:
    """Return the annotator's assignment with a token.

    Raises:
        LookupError: there is no such assignment.
    """
    assignment_row = None
    # PostgreSQL rejects texts that contain a null character, so unprintable tokens are not looked up.
    if token.isprintable():
        assignment_row = connection.execute(
            BY_TOKEN, {"token": token, "campaign": campaign_id, "annotator": annotator_id}
        ).first()
    if assignment_row is None:
        raise LookupError(
            f"assignment: this annotator has no assignment with the token {token[:60]!r}. Use a token from"
            " the annotator's list of assignments."
        )
    return assignment_row


def _outcome(
    plan: Plan, assignment_row: Row, judgement_id: int, choice: Choice, duplicate: bool
) -> Submitted:
    """Make the result of a submission, which the page shows.

    The result of a practice pair contains its explanation. Results of other pairs contain the names of the
    generators if the campaign reveals them.

    Args:
        plan: plan of the campaign.
        assignment_row: row of the assignment.
        judgement_id: id of the judgement.
        choice: choice of the answer.
        duplicate: True if the answer was recorded before.
    """
    if assignment_row.kind != Kind.TRAINING:
        revealed_names = revealed(plan, assignment_row, choice)
        return Submitted(judgement=judgement_id, duplicate=duplicate, reveal=revealed_names)
    pair = plan.pairs[assignment_row.pair_id]
    expected_answer = expected_side(
        pair.expected, bool(assignment_row.first_is_left), plan.campaign.settings.mode
    )
    # A skip is neither correct nor wrong.
    is_correct = None if expected_answer is None or choice is Choice.SKIP else choice.meets(expected_answer)
    return Submitted(
        judgement=judgement_id,
        duplicate=duplicate,
        training=True,
        correct=is_correct,
        explanation=pair.explanation,
        better=expected_answer,
    )


def expected_side(expected_shape: str | None, first_is_left: bool, mode: Mode) -> str | None:
    """Convert the correct answer of a pair of the plan to the answer that an annotator must give.

    Args:
        expected_shape: 'first' or 'second'; None: not known.
        first_is_left: True if the first shape of the pair is shown on the left.
        mode: mode of the campaign.

    Returns:
        'left' or 'right'; for a single shape 'up' for 'first' and 'down' for 'second'; None if
        `expected_shape` is None.
    """
    if expected_shape is None:
        return None
    if mode is Mode.SINGLE:
        return {"first": "up", "second": "down"}[expected_shape]
    return "left" if (expected_shape == "first") == first_is_left else "right"


def read_judgements(
    database: Database,
    campaign: str | None = None,
    annotator_names: Sequence[str] = (),
    include_undone: bool = False,
    labels_from: str = PEOPLE,
) -> Iterator[JudgementRow]:
    """Yield judgements in order of receipt. Undos are not yielded.

    Args:
        database: database of the label store.
        campaign: name of the campaign; None: all campaigns.
        annotator_names: names of the annotators; empty: all annotators.
        include_undone: True yields judgements that were taken back as well.
        labels_from: one of LABELS_FROM; by default the answers of judges are not yielded.
    """
    check_labels_from(labels_from)
    # A judgement refers to two shapes, so the table of shapes is joined twice. The columns get the prefixes
    # "first_" and "second_".
    first_shapes = shapes.alias("first")
    second_shapes = shapes.alias("second")
    shape_columns = [first_shapes.c[name].label(f"first_{name}") for name in FIELDS] + [
        second_shapes.c[name].label(f"second_{name}") for name in FIELDS
    ]
    selected_columns = (
        *(judgements.c[name] for name in (*OF_JUDGEMENT, "choice", "views", "votes", "judge")),
        *(
            assignments.c[name]
            for name in (*OF_ASSIGNMENT, "token", "kind", "first_is_left", "answered", "pair_id")
        ),
        pairs.c.expected,
        annotators.c.name.label("annotator"),
        campaigns.c.name.label("campaign"),
        campaigns.c.settings,
        *shape_columns,
    )
    joined_tables = judgements.join(
        assignments, and_(assignments.c.id == judgements.c.assignment_id, judgements.c.type == "choice")
    ).join(pairs, pairs.c.id == assignments.c.pair_id)
    joined_tables = joined_tables.join(first_shapes, first_shapes.c.id == pairs.c.first_id).join(
        second_shapes, second_shapes.c.id == pairs.c.second_id
    )
    joined_tables = joined_tables.join(annotators, annotators.c.id == judgements.c.annotator_id).join(
        campaigns, campaigns.c.id == judgements.c.campaign_id
    )
    judgement_query = select(*selected_columns).select_from(joined_tables)
    judgement_query = (
        judgement_query.where(campaigns.c.name == campaign) if campaign is not None else judgement_query
    )
    judgement_query = (
        judgement_query.where(annotators.c.name.in_(list(annotator_names)))
        if annotator_names
        else judgement_query
    )
    if labels_from != ALL:
        is_person = judgements.c.judge.is_(None)
        judgement_query = judgement_query.where(is_person if labels_from == PEOPLE else ~is_person)
    judgement_query = (
        judgement_query
        if include_undone
        else judgement_query.where(assignments.c.answered == judgements.c.id)
    )
    # name of a campaign -> its mode, so that settings are parsed once per campaign
    mode_by_campaign: dict[str, str] = {}
    last_id = 0
    while True:
        # A new transaction for each page: a slow consumer of this generator does not block the database.
        with database.read() as connection:
            page_rows = connection.execute(
                judgement_query.where(judgements.c.id > last_id).order_by(judgements.c.id).limit(PAGE)
            ).all()
        for row in page_rows:
            yield _row(row, mode_by_campaign)
        if len(page_rows) < PAGE:
            return
        # Ids increase with the time of receipt, so the next page starts after the last id of this one.
        last_id = page_rows[-1].id


def tally(connection: Connection) -> list[Row]:
    """Return the number of answers of each annotator in each campaign, in order of the first answer.

    Answers that were taken back and answers to practice pairs are not counted.

    Returns:
        Rows with campaign_id, name and role (of the annotator), judgements (number of answers that count) and
        last (time of receipt of the newest one, seconds since 1970).
    """
    # `answered` is null for an answer that was taken back, so the join leaves it out.
    aggregate_columns = func.count().label("judgements"), func.max(judgements.c.received_at).label("last")
    tally_query = select(
        judgements.c.campaign_id, annotators.c.name, annotators.c.role, *aggregate_columns
    ).join_from(assignments, judgements, judgements.c.id == assignments.c.answered)
    tally_query = tally_query.where(assignments.c.kind != Kind.TRAINING.value)
    tally_query = tally_query.join(annotators, annotators.c.id == judgements.c.annotator_id).group_by(
        judgements.c.campaign_id, judgements.c.annotator_id, annotators.c.name, annotators.c.role
    )
    return list(connection.execute(tally_query.order_by(func.min(judgements.c.id))))


def _row(query_row: Row, mode_by_campaign: dict[str, str]) -> JudgementRow:
    """Make a `JudgementRow` from a row of the query in `read_judgements`.

    Args:
        query_row: row of the query.
        mode_by_campaign: cache of the modes, by name of the campaign. It is extended in place.
    """
    if query_row.campaign not in mode_by_campaign:
        mode_by_campaign[query_row.campaign] = settings_from_json(query_row.settings).mode.value
    first_is_left = bool(query_row.first_is_left)
    first_shape = shape_from_row(query_row, "first_")
    second_shape = shape_from_row(query_row, "second_")
    left_shape, right_shape = (first_shape, second_shape) if first_is_left else (second_shape, first_shape)
    return JudgementRow(
        **{name: query_row._mapping[name] for name in AS_STORED},
        mode=mode_by_campaign[query_row.campaign],
        assignment=query_row.token,
        pair=query_row.pair_id,
        kind=Kind(query_row.kind),
        left=left_shape,
        right=right_shape,
        first_is_left=first_is_left,
        choice=Choice(query_row.choice),
        expected=expected_side(query_row.expected, first_is_left, Mode(mode_by_campaign[query_row.campaign])),
        views=tuple(json.loads(query_row.views)),
        # `answered` of the assignment is the id of the judgement that counts.
        undone=query_row.answered != query_row.id,
        votes=json.loads(query_row.votes) if query_row.votes else {},
        judge=json.loads(query_row.judge) if query_row.judge else None,
    )


# ---- an annotator's own answers. Gold checks and repeats are listed like other pairs, so that the list
# reveals neither which pairs they are nor how many there are.


def own_answers(
    connection: Connection,
    plan: Plan,
    annotator_id: int,
    before_sequence: int | None,
    max_count: int,
    now: float,
) -> list[OwnAnswer]:
    """Return answers of an annotator that count, newest assignment first, without practice pairs.

    An answer that was changed keeps its position in this order, because the assignment is the same.

    Args:
        connection: connection to read from.
        plan: plan of the campaign.
        annotator_id: id of the annotator.
        before_sequence: sequence number; only answers to assignments with a smaller number are returned.
            None: no restriction.
        max_count: largest number of answers that are returned.
        now: time in seconds since 1970, which decides whether the study is complete.
    """
    query_parameters = {
        "campaign": plan.campaign.id,
        "annotator": annotator_id,
        "before": ABOVE_ALL_SEQUENCES if before_sequence is None else before_sequence,
        "count": max_count,
    }
    is_complete = study_over(connection, plan, now)
    listed_answers = []
    for row in connection.execute(OWN_ANSWERS, query_parameters):
        pair = plan.pairs[row.pair_id]
        choice = Choice(row.choice)
        # The shapes are on the same sides as in the assignment.
        left_token, right_token = (
            (pair.first, pair.second) if row.first_is_left else (pair.second, pair.first)
        )
        listed_answers.append(
            OwnAnswer(
                sequence=row.sequence,
                assignment=row.token,
                left=left_token,
                right=right_token,
                choice=choice,
                reason=row.reason,
                votes=json.loads(row.votes) if row.votes else {},
                comment=row.comment,
                answered=row.received_at,
                changeable=not is_complete and not _reply_reveals(plan, row.kind, choice),
            )
        )
    return listed_answers


def comments(connection: Connection, campaign_id: int, max_count: int) -> list[Row]:
    """Return the newest comments on answers that count, newest first.

    Returns:
        At most `max_count` rows with annotator (name), received_at (seconds since 1970), choice and comment.
    """
    return list(connection.execute(COMMENTS, {"campaign": campaign_id, "count": max_count}))


def check_open(connection: Connection, plan: Plan, assignment_row: Row, now: float) -> None:
    """Check that the answer to an assignment may still be taken back.

    Raises:
        ConflictError: the study is complete, or the page has shown the names of the generators.
    """
    # The choice has an influence only in campaigns that reveal names. Other campaigns save this query.
    choice = (
        Choice(connection.execute(CHOICE, {"judgement": assignment_row.answered}).scalar_one())
        if plan.campaign.settings.reveal
        else Choice.SKIP
    )
    if _reply_reveals(plan, assignment_row.kind, choice):
        raise ConflictError(
            "answer: it cannot be changed, because the names of the generators were shown after it. Continue"
            " with the next pair."
        )
    if study_over(connection, plan, now):
        raise ConflictError(
            "answer: it cannot be changed, because the study is complete. No further answer is needed."
        )


def study_over(connection: Connection, plan: Plan, now: float) -> bool:
    """Return True if the stopping rule of a study is met, after which no answer may be changed.

    Campaigns of other modes, and studies without a stopping rule, are never over.
    """
    campaign_settings = plan.campaign.settings
    max_trials = campaign_settings.extra.get("trials")
    end_time = campaign_settings.extra.get("until")
    # `extra` contains "trials" only if the study was planned with a stopping rule.
    if campaign_settings.mode is not Mode.STUDY or max_trials is None:
        return False
    # astimezone() interprets a date without a time zone as local time of the server.
    if end_time is not None and now >= datetime.fromisoformat(end_time).astimezone(UTC).timestamp():
        return True
    return connection.execute(TRIALS, {"campaign": plan.campaign.id}).scalar_one() >= max_trials


def revealed(plan: Plan, assignment_row: Row, choice: Choice) -> tuple[str, str] | None:
    """Return the names of the generators of the left and the right shape, or None if they are not shown.

    They are shown only in campaigns with `reveal`, and not after a skip, a repeat or a gold check.
    """
    # Both shapes of a gold pair are from the same generator. Equal names would reveal that it is a gold pair.
    if not _reply_reveals(plan, assignment_row.kind, choice) or assignment_row.kind != Kind.PAIR:
        return None
    pair = plan.pairs[assignment_row.pair_id]
    first_name = plan.generator_name(plan.shapes[pair.first])
    second_name = plan.generator_name(plan.shapes[pair.second])
    return (first_name, second_name) if assignment_row.first_is_left else (second_name, first_name)


def _reply_reveals(plan: Plan, pair_kind: str, choice: Choice) -> bool:
    """Return True if the reply to an answer reveals something, so that the answer may not be changed later.

    In campaigns with `reveal`, the reply contains the names of the generators. If it does not contain them,
    it reveals that the pair was a repeat or a gold check.
    """
    return plan.campaign.settings.reveal and pair_kind != Kind.TRAINING and choice is not Choice.SKIP
