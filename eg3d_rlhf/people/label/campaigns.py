"""Campaigns: storing a plan, and reading it back as it was made."""

import json
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.people.label.database import campaigns, insert_all, pairs, shapes
from eg3d_rlhf.people.label.entities import (
    CampaignSettings,
    Kind,
    Mode,
    PlannedPair,
    Shape,
    StoredCampaign,
    parse_questions,
)

FIELDS = tuple(Shape.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """A pair of a campaign's plan."""

    id: int
    position: int
    first: str  # asset tokens
    second: str
    kind: Kind
    expected: str | None  # 'first' or 'second'
    explanation: str


@dataclass(frozen=True)
class Plan:
    """Everything of a campaign that never changes; kept in memory."""

    campaign: StoredCampaign
    shapes: dict[str, Shape]  # by asset token, in order of the plan
    pairs: dict[int, StoredPair]  # by id, in order of the plan

    @cached_property
    def training(self) -> list[StoredPair]:
        return [pair for pair in self.pairs.values() if pair.kind is Kind.TRAINING]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        """What annotators may be told of a generator, by hash and file: the file's name, with its folder's
        where several are called so.
        """
        known = {
            (shape.generator, shape.source): Path(shape.source)
            for shape in self.shapes.values()
            if not shape.file
        }
        stems = Counter(path.stem for path in known.values())
        called = {
            key: path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}"
            for key, path in known.items()
        }
        return {key: called[key] or "bundled generator" for key in known}

    def generator_name(self, shape: Shape) -> str:
        return shape.generator if shape.file else self._names[shape.generator, shape.source]

    @cached_property
    def gold(self) -> list[StoredPair]:
        return [pair for pair in self.pairs.values() if pair.kind is Kind.GOLD]


def create(
    c: Connection, settings: CampaignSettings, planned: Sequence[PlannedPair], now: float
) -> tuple[int, list[int]]:
    """Store a campaign; returns its id and its pairs'."""
    _check(c, settings, planned)
    text = json.dumps(
        {**asdict(settings), "mode": settings.mode.value, "extra": dict(settings.extra)}, sort_keys=True
    )
    record = {"name": settings.name, "settings": text, "created": now}
    campaign_id = c.execute(insert(campaigns).returning(campaigns.c.id), record).scalar_one()
    order = list(dict.fromkeys(_identity(shape) for pair in planned for shape in (pair.first, pair.second)))
    rows = [
        {
            "campaign_id": campaign_id,
            "position": i,
            "asset": secrets.token_urlsafe(16),
            **dict(zip(FIELDS, identity, strict=True)),
        }
        for i, identity in enumerate(order)
    ]
    ids = dict(zip(order, insert_all(c, shapes, rows), strict=True))
    plan = [
        {
            "campaign_id": campaign_id,
            "position": i,
            "first_id": ids[_identity(pair.first)],
            "second_id": ids[_identity(pair.second)],
            "kind": pair.kind.value,
            "expected": pair.expected,
            "explanation": pair.explanation,
            "places": settings.annotators_per_pair,
        }
        for i, pair in enumerate(planned)
    ]
    return campaign_id, insert_all(c, pairs, plan)


def _check(c: Connection, settings: CampaignSettings, planned: Sequence[PlannedPair]) -> None:
    name = settings.name
    parse_questions(settings.questions)
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(
            f"campaign: expected a printable name of 1 to 200 characters, got {name!r}. Choose another."
        )
    if c.execute(select(campaigns.c.id).where(campaigns.c.name == name)).first() is not None:
        raise ValueError(
            f"campaign: expected a new name, got {name!r}, which is in use. Choose another, or go on with"
            " that campaign."
        )
    if not planned:
        raise ValueError(f"campaign {name}: expected pairs, got none. Ask for at least one.")
    for position, pair in enumerate(planned):
        if (pair.first == pair.second) != (settings.mode is Mode.SINGLE):
            if settings.mode is Mode.SINGLE:
                raise ValueError(
                    f"campaign {name}, pair {position}: expected one shape by itself, got two. Correct the"
                    " plan."
                )
            seed = pair.first.seed
            raise ValueError(
                f"campaign {name}, pair {position}: expected two different shapes, got seed {seed} twice."
                " Draw again."
            )
    if settings.mode is not Mode.STUDY:  # a study judges, so it may look at what nothing has learnt from
        # an asset's is but a number
        seeds = (shape.seed for pair in planned for shape in (pair.first, pair.second) if not shape.file)
        refuse_held_out(seeds, f"campaign {name}")


def _identity(shape: Shape) -> tuple:
    """The columns of a shape, where nan (not known) is null; the same for equal shapes."""
    return tuple(None if value != value else value for value in (getattr(shape, name) for name in FIELDS))


def shape_of(row: Row, prefix: str = "") -> Shape:
    """The shape in a row's columns; null is nan."""
    columns = row._mapping
    values: dict[str, Any] = {
        name: math.nan if columns[prefix + name] is None else columns[prefix + name] for name in FIELDS
    }
    return Shape(**values)


def settings_from_json(text: str) -> CampaignSettings:
    """The settings of a row of campaigns."""
    values = json.loads(text)
    return CampaignSettings(
        **{**values, "mode": Mode(values["mode"]), "questions": tuple(values.get("questions", ()))}
    )


def listed(c: Connection, name: str | None = None, campaign_id: int | None = None) -> list[StoredCampaign]:
    """Campaigns, oldest first: all, or the one of a name or an id."""
    count = select(func.count()).where(pairs.c.campaign_id == campaigns.c.id).scalar_subquery()
    query = select(campaigns, count.label("pair_count")).order_by(campaigns.c.id)
    query = query.where(campaigns.c.name == name) if name is not None else query
    query = query.where(campaigns.c.id == campaign_id) if campaign_id is not None else query
    return [
        StoredCampaign(
            id=row.id, settings=settings_from_json(row.settings), created=row.created, pairs=row.pair_count
        )
        for row in c.execute(query)
    ]


def load_plan(c: Connection, campaign_id: int) -> Plan:
    """A campaign whole. Raises: LookupError."""
    campaign = listed(c, campaign_id=campaign_id)
    if not campaign:
        raise LookupError(f"store: expected a campaign, got the unknown id {campaign_id}.")
    rows = c.execute(
        select(shapes).where(shapes.c.campaign_id == campaign_id).order_by(shapes.c.position)
    ).all()
    assets = {row.id: row.asset for row in rows}
    stored = [
        StoredPair(
            id=row.id,
            position=row.position,
            first=assets[row.first_id],
            second=assets[row.second_id],
            kind=Kind(row.kind),
            expected=row.expected,
            explanation=row.explanation,
        )
        for row in c.execute(
            select(pairs).where(pairs.c.campaign_id == campaign_id).order_by(pairs.c.position)
        )
    ]
    return Plan(campaign[0], {row.asset: shape_of(row) for row in rows}, {pair.id: pair for pair in stored})
