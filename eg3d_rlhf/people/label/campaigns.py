"""Storing and loading of labelling campaigns: their settings, shapes and pairs."""

import json
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Table, func, insert, select

from eg3d_rlhf.core.seeds import reject_held_out_seeds
from eg3d_rlhf.people.label.database import campaigns, insert_all, pairs, shapes
from eg3d_rlhf.people.label.entities import (
    PAIR_TOTAL,
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
    """Pair of the plan of a campaign, as it is stored."""

    id: int
    position: int  # position in the plan, from 0
    first: str  # asset token of the first shape
    second: str  # asset token of the second shape; equal to `first` if shapes are shown one by one
    kind: Kind  # PAIR, GOLD or TRAINING
    # correct answer of a gold or practice pair: 'first' or 'second'; None for other pairs
    expected: str | None
    # explanation of a practice pair; for an appended pair, how it was chosen, as JSON; "" for other pairs
    explanation: str


@dataclass(frozen=True)
class Plan:
    """Campaign with its shapes and pairs.

    A campaign changes only if it learns from its answers: pairs are then appended, and nothing else changes.
    """

    campaign: StoredCampaign
    shapes: dict[str, Shape]  # by asset token, in order of the plan
    pairs: dict[int, StoredPair]  # by id, in order of the plan

    @cached_property
    def training(self) -> list[StoredPair]:
        """Return the practice pairs, in order of the plan."""
        return [pair for pair in self.pairs.values() if pair.kind is Kind.TRAINING]

    @cached_property
    def pair_count(self) -> int:
        """Return the number of pairs, without gold and practice pairs."""
        return sum(pair.kind is Kind.PAIR for pair in self.pairs.values())

    @property
    def missing_count(self) -> int:
        """Return the number of pairs that will still be appended."""
        return max(0, self.campaign.settings.extra.get(PAIR_TOTAL, 0) - self.pair_count)

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        """Return the names of generators that annotators may see, by (hash, path of the file).

        The name is the stem of the file. If several files have this stem, the name of the folder precedes it.
        """
        path_by_key = {
            (shape.generator, shape.source): Path(shape.source)
            for shape in self.shapes.values()
            if not shape.file
        }
        files_per_stem = Counter(path.stem for path in path_by_key.values())
        name_by_key = {
            key: path.stem if files_per_stem[path.stem] == 1 else f"{path.parent.name}/{path.stem}"
            for key, path in path_by_key.items()
        }
        # The bundled generator has an empty source, whose stem is empty.
        return {key: name_by_key[key] or "bundled generator" for key in path_by_key}

    def generator_name(self, shape: Shape) -> str:
        """Return the name of a shape's generator that annotators may see; for an asset file, its label."""
        return shape.generator if shape.file else self._names[shape.generator, shape.source]

    @cached_property
    def gold(self) -> list[StoredPair]:
        """Return the gold pairs, in order of the plan."""
        return [pair for pair in self.pairs.values() if pair.kind is Kind.GOLD]


def create(
    connection: Connection,
    campaign_settings: CampaignSettings,
    planned_pairs: Sequence[PlannedPair],
    now: float,
) -> tuple[int, list[int]]:
    """Store a new campaign.

    Args:
        connection: connection with an open transaction.
        campaign_settings: settings of the campaign.
        planned_pairs: pairs in order of the plan.
        now: time of creation, seconds since 1970.

    Returns:
        Id of the campaign, and the ids of its pairs in the order of `planned_pairs`.

    Raises:
        ValueError: the name, the settings or the pairs are invalid.
    """
    # The check is part of the transaction, so that no other process can use the name in the meantime.
    _check(connection, campaign_settings, planned_pairs)
    # The keys are sorted, because an import compares the settings of two stores as text.
    settings_json = json.dumps(
        {
            **asdict(campaign_settings),
            "mode": campaign_settings.mode.value,
            "extra": dict(campaign_settings.extra),
        },
        sort_keys=True,
    )
    campaign_values = {"name": campaign_settings.name, "settings": settings_json, "created": now}
    campaign_id = connection.execute(
        insert(campaigns).returning(campaigns.c.id), campaign_values
    ).scalar_one()
    return campaign_id, _insert_pairs(
        connection, campaign_id, planned_pairs, campaign_settings.annotators_per_pair
    )


def append(
    connection: Connection, campaign: StoredCampaign, planned_pairs: Sequence[PlannedPair], pair_count: int
) -> bool:
    """Append pairs to a campaign that learns from its answers.

    Args:
        connection: connection with a write transaction that has the lock (Lock.CAMPAIGN, id).
        campaign: campaign.
        planned_pairs: pairs of new shapes.
        pair_count: number of pairs of all kinds for which the new pairs were chosen.

    Returns:
        False if the campaign has another number of pairs, because another process has appended pairs in the
        meantime. Nothing is stored then.

    Raises:
        ValueError: a pair is invalid.
    """
    _check_pairs(campaign.settings, planned_pairs)
    if next_position(connection, campaign.id) != pair_count:
        return False
    _insert_pairs(connection, campaign.id, planned_pairs, campaign.settings.annotators_per_pair)
    return True


def next_position(connection: Connection, campaign_id: int, table: Table = pairs) -> int:
    """Return the position after the last pair of a campaign, or after its last shape (table `shapes`)."""
    last_position = connection.execute(
        select(func.max(table.c.position)).where(table.c.campaign_id == campaign_id)
    ).scalar()
    return 0 if last_position is None else last_position + 1


def _insert_pairs(
    connection: Connection, campaign_id: int, planned_pairs: Sequence[PlannedPair], places: int
) -> list[int]:
    """Store pairs and their shapes after those that a campaign has. Return the ids of the pairs.

    Args:
        connection: connection with an open transaction.
        campaign_id: id of the campaign.
        planned_pairs: pairs in order of the plan, whose shapes the campaign does not contain yet.
        places: number of annotators who shall answer each pair.
    """
    # A shape that occurs in several pairs is stored once. dict.fromkeys removes repetitions and keeps the
    # order of the plan.
    planned_shapes = [shape for pair in planned_pairs for shape in (pair.first, pair.second)]
    unique_shape_keys = list(dict.fromkeys(_shape_key(shape) for shape in planned_shapes))
    shape_rows = [
        {
            "campaign_id": campaign_id,
            "position": position,
            "asset": secrets.token_urlsafe(16),  # 128 random bits
            **dict(zip(FIELDS, shape_key, strict=True)),
        }
        for position, shape_key in enumerate(
            unique_shape_keys, next_position(connection, campaign_id, shapes)
        )
    ]
    # insert_all returns ids in the order of its rows.
    id_by_shape_key = dict(zip(unique_shape_keys, insert_all(connection, shapes, shape_rows), strict=True))
    pair_rows = [
        {
            "campaign_id": campaign_id,
            "position": position,
            "first_id": id_by_shape_key[_shape_key(pair.first)],
            "second_id": id_by_shape_key[_shape_key(pair.second)],
            "kind": pair.kind.value,
            "expected": pair.expected,
            "explanation": pair.explanation,
            "places": places,
        }
        for position, pair in enumerate(planned_pairs, next_position(connection, campaign_id))
    ]
    return insert_all(connection, pairs, pair_rows)


def _check(
    connection: Connection, campaign_settings: CampaignSettings, planned_pairs: Sequence[PlannedPair]
) -> None:
    """Check a campaign before it is stored.

    Raises:
        ValueError: the name is invalid or in use, the plan is empty, a pair does not fit the mode of the
            campaign, or a seed is held out for evaluation.
    """
    name = campaign_settings.name
    parse_questions(campaign_settings.questions)
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(
            f"campaign: the name {name!r} is invalid. Choose a name of 1 to 200 printable characters."
        )
    if connection.execute(select(campaigns.c.id).where(campaigns.c.name == name)).first() is not None:
        raise ValueError(
            f"campaign: the name {name!r} is in use. Choose another name, or continue the campaign of this"
            " name."
        )
    _check_pairs(campaign_settings, planned_pairs)


def _check_pairs(campaign_settings: CampaignSettings, planned_pairs: Sequence[PlannedPair]) -> None:
    """Check pairs before they are stored.

    Raises:
        ValueError: there are no pairs, a pair does not fit the mode of the campaign, or a seed is held out
            for evaluation.
    """
    name = campaign_settings.name
    if not planned_pairs:
        raise ValueError(f"campaign {name}: the plan contains no pairs. Plan at least one pair.")
    for position, pair in enumerate(planned_pairs):
        # A plan of single shapes repeats its shape in `second`; a plan of pairs never does.
        if (pair.first == pair.second) != (campaign_settings.mode is Mode.SINGLE):
            if campaign_settings.mode is Mode.SINGLE:
                raise ValueError(
                    f"campaign {name}, pair {position}: the pair consists of two different shapes, but this"
                    " campaign shows shapes one by one. Use the same shape as `first` and as `second`."
                )
            seed = pair.first.seed
            raise ValueError(
                f"campaign {name}, pair {position}: both shapes of the pair are the shape of seed {seed}."
                " Choose two different seeds."
            )
    # Held-out seeds are reserved for evaluation. A study evaluates generators, so it may use them. Answers of
    # other campaigns may train a reward, so these campaigns may not use them. The seed of an asset file is
    # the number of the file and no seed of a latent.
    if campaign_settings.mode is not Mode.STUDY:
        latent_seeds = (
            shape.seed for pair in planned_pairs for shape in (pair.first, pair.second) if not shape.file
        )
        reject_held_out_seeds(latent_seeds, f"campaign {name}")


def _shape_key(shape: Shape) -> tuple:
    """Return the values of a shape's columns, in the order of FIELDS. Equal shapes give equal values.

    A value nan, which means an unknown value, becomes None.
    """
    column_values = (getattr(shape, name) for name in FIELDS)
    # Only nan is unequal to itself. Because of that, two shapes with nan would never be equal.
    return tuple(None if value != value else value for value in column_values)


def shape_from_row(shape_row: Row, prefix: str = "") -> Shape:
    """Make the shape that a row of the database describes. A null becomes nan.

    Args:
        shape_row: row with the columns FIELDS.
        prefix: text before the name of each column in this row.
    """
    row_columns = shape_row._mapping
    shape_values: dict[str, Any] = {
        name: math.nan if row_columns[prefix + name] is None else row_columns[prefix + name]
        for name in FIELDS
    }
    return Shape(**shape_values)


def settings_from_json(settings_json: str) -> CampaignSettings:
    """Convert the JSON text in the column `settings` of the table `campaigns` to `CampaignSettings`."""
    setting_values = json.loads(settings_json)
    # JSON has neither enums nor tuples. Campaigns of older versions have no questions.
    mode = Mode(setting_values["mode"])
    questions = tuple(setting_values.get("questions", ()))
    return CampaignSettings(**{**setting_values, "mode": mode, "questions": questions})


def list_campaigns(
    connection: Connection, name: str | None = None, campaign_id: int | None = None
) -> list[StoredCampaign]:
    """Return campaigns, oldest first.

    Args:
        connection: connection.
        name: name of the only campaign that is returned; None: no restriction.
        campaign_id: id of the only campaign that is returned; None: no restriction.
    """
    pair_count = select(func.count()).where(pairs.c.campaign_id == campaigns.c.id).scalar_subquery()
    campaign_query = select(campaigns, pair_count.label("pair_count")).order_by(campaigns.c.id)
    campaign_query = campaign_query.where(campaigns.c.name == name) if name is not None else campaign_query
    campaign_query = (
        campaign_query.where(campaigns.c.id == campaign_id) if campaign_id is not None else campaign_query
    )
    return [
        StoredCampaign(
            id=campaign_row.id,
            settings=settings_from_json(campaign_row.settings),
            created=campaign_row.created,
            pairs=campaign_row.pair_count,
        )
        for campaign_row in connection.execute(campaign_query)
    ]


def load_plan(connection: Connection, campaign_id: int) -> Plan:
    """Load a campaign with all its shapes and pairs.

    Raises:
        LookupError: there is no campaign with this id.
    """
    stored_campaigns = list_campaigns(connection, campaign_id=campaign_id)
    if not stored_campaigns:
        raise LookupError(f"store: there is no campaign with the id {campaign_id}. Reload the page.")
    # The pairs are read before the shapes. Pairs that are appended in between are then left out, and no pair
    # lacks its shapes.
    pair_rows = connection.execute(
        select(pairs).where(pairs.c.campaign_id == campaign_id).order_by(pairs.c.position)
    ).all()
    shape_rows = connection.execute(
        select(shapes).where(shapes.c.campaign_id == campaign_id).order_by(shapes.c.position)
    ).all()
    token_by_shape_id = {row.id: row.asset for row in shape_rows}  # id of a shape -> its asset token
    stored_pairs = [
        StoredPair(
            id=row.id,
            position=row.position,
            first=token_by_shape_id[row.first_id],
            second=token_by_shape_id[row.second_id],
            kind=Kind(row.kind),
            expected=row.expected,
            explanation=row.explanation,
        )
        for row in pair_rows
    ]
    return Plan(
        stored_campaigns[0],
        {row.asset: shape_from_row(row) for row in shape_rows},
        {pair.id: pair for pair in stored_pairs},
    )
