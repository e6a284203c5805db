"""Reading judgements with everything known about them, in order of receipt, a page at a time."""

import json
from collections.abc import Iterator, Sequence

from sqlalchemy import Row, Select, and_, select

from eg3d_rlhf.label.answering import expected_side
from eg3d_rlhf.label.campaigns import settings_from_json, shape_of
from eg3d_rlhf.label.database import Database
from eg3d_rlhf.label.records import Choice, JudgementRow, Kind, Shape
from eg3d_rlhf.label.schema import annotators, assignments, campaigns, judgements, pairs, shapes

PAGE = 2000
SHAPE = tuple(Shape.__dataclass_fields__)


def read_judgements(
    database: Database, campaign: str | None = None, names: Sequence[str] = (), include_undone: bool = False
) -> Iterator[JudgementRow]:
    """Choices of a campaign (None: of all) by some annotators (none named: all), those taken back only on request."""
    query = _query()
    query = query.where(campaigns.c.name == campaign) if campaign is not None else query
    query = query.where(annotators.c.name.in_(list(names))) if names else query
    query = query if include_undone else query.where(assignments.c.answered == judgements.c.id)
    modes: dict[str, str] = {}
    last = 0
    while True:
        with database.read() as c:
            page = c.execute(query.where(judgements.c.id > last).order_by(judgements.c.id).limit(PAGE)).all()
        for row in page:
            yield _row(row, modes)
        if len(page) < PAGE:
            return
        last = page[-1].id


def _query() -> Select:
    first, second = shapes.alias("first"), shapes.alias("second")
    j, a = judgements.c, assignments.c
    named = [first.c[name].label(f"first_{name}") for name in SHAPE] + [second.c[name].label(f"second_{name}") for name in SHAPE]
    columns = (
        j.id, j.choice, j.reason, j.milliseconds, j.views, j.answered_at, j.received_at, j.page_version, a.token, a.sequence, a.kind,
        a.first_is_left, a.answered, a.pair_id, pairs.c.expected, annotators.c.name.label("annotator"), campaigns.c.name.label("campaign"),
        campaigns.c.settings, *named,
    )  # fmt: skip
    joined = judgements.join(assignments, and_(a.id == j.assignment_id, j.type == "choice")).join(pairs, pairs.c.id == a.pair_id)
    joined = joined.join(first, first.c.id == pairs.c.first_id).join(second, second.c.id == pairs.c.second_id)
    joined = joined.join(annotators, annotators.c.id == j.annotator_id).join(campaigns, campaigns.c.id == j.campaign_id)
    return select(*columns).select_from(joined)


def _row(row: Row, modes: dict[str, str]) -> JudgementRow:
    if row.campaign not in modes:
        modes[row.campaign] = settings_from_json(row.settings).mode.value
    first_is_left = bool(row.first_is_left)
    first, second = shape_of(row, "first_"), shape_of(row, "second_")
    left, right = (first, second) if first_is_left else (second, first)
    return JudgementRow(
        id=row.id, campaign=row.campaign, mode=modes[row.campaign], annotator=row.annotator, assignment=row.token, sequence=row.sequence,
        pair=row.pair_id, kind=Kind(row.kind), left=left, right=right, first_is_left=first_is_left, choice=Choice(row.choice),
        reason=row.reason, expected=expected_side(row.expected, first_is_left), milliseconds=row.milliseconds,
        views=tuple(json.loads(row.views)), answered_at=row.answered_at, received_at=row.received_at, page_version=row.page_version,
        undone=row.answered != row.id,
    )  # fmt: skip
