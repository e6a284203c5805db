"""Stores the plan of a campaign and reads it back unchanged."""

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

FIELDS = tuple(Shape.__dataclass_fields__)  # columns of the table `shapes` that describe a shape


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """A pair of a campaign's plan."""

    id: int
    position: int  # in the plan, from 0
    first: str  # asset token of the first shape
    second: str  # asset token of the second shape; equal to `first` where shapes are shown one by one
    kind: Kind  # PAIR, GOLD or TRAINING
    expected: str | None  # 'first' or 'second'
    explanation: str  # of training pairs


@dataclass(frozen=True)
class Plan:
    """The part of a campaign that never changes, so it is kept in memory."""

    campaign: StoredCampaign
    shapes: dict[str, Shape]  # by asset token, in order of the plan
    pairs: dict[int, StoredPair]  # by id, in order of the plan

    @cached_property
    def training(self) -> list[StoredPair]:
        """Training pairs, in order of the plan."""
        return [pair for pair in self.pairs.values() if pair.kind is Kind.TRAINING]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        """Names of generators that annotators may see, keyed by hash and file. The name is the stem of the
        file, preceded by its folder where several generators have files of that name.
        """
        paths = {
            (shape.generator, shape.source): Path(shape.source)
            for shape in self.shapes.values()
            if not shape.file
        }
        # How many files share a stem.
        stems = Counter(path.stem for path in paths.values())
        names = {
            key: path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}"
            for key, path in paths.items()
        }
        # The bundled generator has an empty source, whose stem is empty.
        return {key: names[key] or "bundled generator" for key in paths}

    def generator_name(self, shape: Shape) -> str:
        """Return the name that annotators may see; of an asset it is its label."""
        return shape.generator if shape.file else self._names[shape.generator, shape.source]

    @cached_property
    def gold(self) -> list[StoredPair]:
        """Gold pairs, in order of the plan."""
        return [pair for pair in self.pairs.values() if pair.kind is Kind.GOLD]


def create(
    c: Connection, settings: CampaignSettings, planned: Sequence[PlannedPair], now: float
) -> tuple[int, list[int]]:
    """Store a campaign. Returns its id and the ids of its pairs. Raises: ValueError for an invalid plan."""
    # Within the transaction, so that no other process can take the name in between.
    _check(c, settings, planned)
    # Sorted keys: an import compares the settings of two stores as text.
    text = json.dumps(
        {**asdict(settings), "mode": settings.mode.value, "extra": dict(settings.extra)}, sort_keys=True
    )
    record = {"name": settings.name, "settings": text, "created": now}
    campaign_id = c.execute(insert(campaigns).returning(campaigns.c.id), record).scalar_one()
    # A shape that occurs in several pairs is stored once. dict.fromkeys keeps the order of the plan.
    order = list(dict.fromkeys(_identity(shape) for pair in planned for shape in (pair.first, pair.second)))
    rows = [
        {
            "campaign_id": campaign_id,
            "position": number,
            "asset": secrets.token_urlsafe(16),
            **dict(zip(FIELDS, identity, strict=True)),
        }
        for number, identity in enumerate(order)
    ]
    # insert_all returns ids in the order of its rows.
    ids = dict(zip(order, insert_all(c, shapes, rows), strict=True))
    plan = [
        {
            "campaign_id": campaign_id,
            "position": number,
            "first_id": ids[_identity(pair.first)],
            "second_id": ids[_identity(pair.second)],
            "kind": pair.kind.value,
            "expected": pair.expected,
            "explanation": pair.explanation,
            "places": settings.annotators_per_pair,
        }
        for number, pair in enumerate(planned)
    ]
    return campaign_id, insert_all(c, pairs, plan)


def _check(c: Connection, settings: CampaignSettings, planned: Sequence[PlannedPair]) -> None:
    """Raise ValueError for an invalid or used name, an empty plan, wrong pairs, or held-out seeds."""
    name = settings.name
    parse_questions(settings.questions)
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(
            f"campaign: expected a printable name of 1 to 200 characters, got {name!r}. Choose another."
        )
    if c.execute(select(campaigns.c.id).where(campaigns.c.name == name)).first() is not None:
        raise ValueError(
            f"campaign: expected a new name, got {name!r}, which is in use. Choose another name, or continue"
            " that campaign."
        )
    if not planned:
        raise ValueError(f"campaign {name}: expected pairs, got none. Plan at least one.")
    for position, pair in enumerate(planned):
        # A plan of single shapes repeats its shape in `second`; a plan of pairs never does.
        if (pair.first == pair.second) != (settings.mode is Mode.SINGLE):
            if settings.mode is Mode.SINGLE:
                raise ValueError(
                    f"campaign {name}, pair {position}: expected the same shape twice, since shapes are shown"
                    " one by one, got two shapes. Correct the plan."
                )
            seed = pair.first.seed
            raise ValueError(
                f"campaign {name}, pair {position}: expected two different shapes, got seed {seed} twice."
                " Choose other seeds."
            )
    # Held-out seeds are reserved for evaluation. A study evaluates, so it may use them; other campaigns may
    # train a reward, so they may not. The seed of an asset file is only a number, not a latent.
    if settings.mode is not Mode.STUDY:
        seeds = (shape.seed for pair in planned for shape in (pair.first, pair.second) if not shape.file)
        refuse_held_out(seeds, f"campaign {name}")


def _identity(shape: Shape) -> tuple:
    """Return the columns of a shape; nan (unknown) becomes null. Equal shapes give equal columns."""
    # nan is unequal to itself, so without this two shapes with an unknown level would never be equal.
    return tuple(None if value != value else value for value in (getattr(shape, name) for name in FIELDS))


def shape_from_row(row: Row, prefix: str = "") -> Shape:
    """Build the shape from a row's columns; null becomes nan."""
    columns = row._mapping
    values: dict[str, Any] = {
        name: math.nan if columns[prefix + name] is None else columns[prefix + name] for name in FIELDS
    }
    return Shape(**values)


def settings_from_json(text: str) -> CampaignSettings:
    """Parse the settings of a row of the table `campaigns`."""
    values = json.loads(text)
    # Campaigns of older versions have no questions.
    return CampaignSettings(
        **{**values, "mode": Mode(values["mode"]), "questions": tuple(values.get("questions", ()))}
    )


def list_campaigns(
    c: Connection, name: str | None = None, campaign_id: int | None = None
) -> list[StoredCampaign]:
    """List campaigns, oldest first: all, or the campaign with the given name or id."""
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
    """Load a campaign with all shapes and pairs. Raises: LookupError for an unknown id."""
    campaign = list_campaigns(c, campaign_id=campaign_id)
    if not campaign:
        raise LookupError(f"store: unknown id of a campaign: {campaign_id}. Reload the page.")
    rows = c.execute(
        select(shapes).where(shapes.c.campaign_id == campaign_id).order_by(shapes.c.position)
    ).all()
    # id of a shape -> its token
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
    return Plan(
        campaign[0], {row.asset: shape_from_row(row) for row in rows}, {pair.id: pair for pair in stored}
    )
