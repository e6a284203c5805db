"""Writing a store's campaigns without loss, as JSON lines: for archives, and for moving to another database (whole_import.py).

One record per line with a field `record`: campaign, shape, pair, annotator, assignment, judgement; those are the tables' rows, with names
and tokens where the tables have numbers. Judgements come in order of receipt, with undos. Token hashes, sessions and leases stay behind.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Row, Table, select

from eg3d_rlhf.label.accounts import listed
from eg3d_rlhf.label.schema import annotators, assignments, campaigns, judgements, pairs, shapes
from eg3d_rlhf.label.store import Store
from training.storage import write_atomic

FORMAT = 1


def export_judgements(store: Store, path: str | Path, campaign: str | None = None) -> Path:
    """Write one campaign, or all. Returns the path. Raises: ValueError for an unknown campaign."""
    with store.reading() as c:
        query = select(campaigns).order_by(campaigns.c.id)
        found = list(c.execute(query if campaign is None else query.where(campaigns.c.name == campaign)))
        if campaign is not None and not found:
            raise ValueError(f"campaign: expected one of the store's, got {campaign!r}. `campaigns` lists them.")
        lines = [json.dumps({"record": "format", "version": FORMAT})]
        for row in found:
            lines += [json.dumps(record) for record in _records(c, row)]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return Path(path)


def _records(c: Connection, campaign: Row) -> Iterator[dict]:
    """A campaign's records: whatever is referred to comes first."""
    own = {"campaign": campaign.name}
    yield {"record": "campaign", "name": campaign.name, "settings": json.loads(campaign.settings), "created": campaign.created}

    def rows(table: Table):
        return c.execute(select(table).where(table.c.campaign_id == campaign.id).order_by(table.c.id))

    asset = {}
    for row in rows(shapes):
        asset[row.id] = row.asset
        yield {"record": "shape", **own, **_plain(row)}
    position = {}
    for row in rows(pairs):
        position[row.id] = row.position
        yield {"record": "pair", **own, **_plain(row), "first": asset[row.first_id], "second": asset[row.second_id]}
    given = list(rows(assignments))
    names = {row.id: row.name for row in listed(c)}
    taking_part = {row.annotator_id for row in given}
    for row in c.execute(select(annotators).where(annotators.c.id.in_(taking_part)).order_by(annotators.c.id)):
        yield {"record": "annotator", "name": row.name, "role": row.role, "created": row.created}
    tokens = {row.id: row.token for row in given}
    for row in given:
        yield {"record": "assignment", **own, **_plain(row), "annotator": names[row.annotator_id], "pair": position[row.pair_id]}
    keys: dict[int, str] = {}
    for row in rows(judgements):
        keys[row.id] = row.key
        linked = {"assignment": tokens.get(row.assignment_id), "takes_back": keys.get(row.takes_back)}
        yield {"record": "judgement", **own, **_plain(row), "annotator": names[row.annotator_id], **linked}


def _plain(row: Row) -> dict:
    """Columns that mean the same in every database."""
    state = {"takes_back", "answered", "leased", "taken"}
    return {k: v for k, v in row._mapping.items() if k != "id" and not k.endswith("_id") and k not in state}
