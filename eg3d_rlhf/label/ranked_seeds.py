"""Ranked-seeds tables: CSV with a row number, the preferred seed and the other, as published with arXiv 2606.27305.

A table says neither who judged, nor when, nor on which side a shape was: sides are drawn by a hash, so that no side bias is invented.
"""

import csv
import hashlib
import math
import secrets
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update

from eg3d_rlhf.label import campaigns
from eg3d_rlhf.label.database import Lock, insert_all
from eg3d_rlhf.label.entities import CampaignSettings, Choice, Kind, PlannedPair, Shape
from eg3d_rlhf.label.preferences import LabelFilters
from eg3d_rlhf.label.schema import assignments, judgements, pairs
from eg3d_rlhf.label.store import Store
from eg3d_rlhf.preferences.labels import load_labels
from training.storage import write_atomic

HEADER = ["", "rank1", "rank2"]
ORIGIN = "ranked-seeds table"  # in the campaign's settings


def import_ranked_seeds(
    store: Store, path: str | Path, campaign: str | None = None, annotator: str = "imported", generator: str = "", psi: float = math.nan
) -> int:
    """Make a campaign of a table's pairs, all answered by `annotator`; returns the number of pairs.

    Args: `campaign` name, None: the file's; `generator` sha256 hex of the weights and `psi`, where they are known.
    Raises: FileNotFoundError; ValueError for a table that does not fit, with the line, and for a campaign's name in use.
    """
    path = Path(path)
    labels, numbers = load_labels(path), _row_numbers(path)
    name = campaign or path.stem
    extra = {"origin": ORIGIN, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    settings = CampaignSettings(name=name, repeat_share=0, swap_share=0, gold_every=0, extra=extra)
    known: dict[str, Any] = {"generator": generator, "source": "", "psi": psi, "level": math.nan, "resolution": 0, "triangles": 0}
    planned = [PlannedPair(first=Shape(seed=pref.winner, **known), second=Shape(seed=pref.loser, **known)) for pref in labels]
    who = store.annotator_without_token(annotator)
    with store.database.write((Lock.SCHEMA, 1)) as c:
        now = store.clock()
        campaign_id, ids = campaigns.create(c, settings, planned, now)
        _answer_all(c, {"campaign_id": campaign_id, "annotator_id": who.id}, ids, numbers, now)
    return len(labels)


def export_ranked_seeds(store: Store, path: str | Path, **filters) -> int:
    """Write the table of a store's labels; ties, which it cannot hold, are left out. An imported table comes out as it was.

    Filters as `LabelFilters`. Returns the number of rows. Raises: ValueError when none is left.
    """
    chosen = LabelFilters(**filters)
    kept = [row for row in chosen.keep(store.judgements(chosen.campaign, chosen.annotators)) if row.choice in (Choice.LEFT, Choice.RIGHT)]
    if not kept:
        raise ValueError("export_ranked_seeds: expected at least one preference, got none that passes the filters. Ask for less.")
    found = {row.campaign for row in kept}
    only = store.campaign(next(iter(found))) if len(found) == 1 else None
    numbered = only is not None and only.settings.extra.get("origin") == ORIGIN
    lines = [",".join(HEADER)]
    for number, row in enumerate(kept):
        first, second = (row.left, row.right) if row.choice is Choice.LEFT else (row.right, row.left)
        lines.append(f"{row.sequence - 1 if numbered else number},{first.seed},{second.seed}")
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return len(kept)


def _row_numbers(path: Path) -> list[int]:
    """First column. Raises: ValueError for another header, and for numbers that are not distinct and >= 0."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if [cell.strip() for cell in rows[0]][1:] != HEADER[1:]:
        raise ValueError(f"{path.name}, line 1: expected the columns row number, rank1, rank2, got {rows[0]}. Import it as labels instead.")
    seen: dict[int, int] = {}
    for line, row in enumerate(rows[1:], 2):
        if not row[0].strip().isdecimal() or int(row[0]) in seen or int(row[0]) >= 2**31 - 1:
            raise ValueError(f"{path.name}, line {line}: expected a new row number >= 0, got {row[0]!r}. Number the rows from 0 on.")
        seen[int(row[0])] = line
    return list(seen)


def _answer_all(c: Connection, mine: dict, ids: list[int], numbers: list[int], now: float) -> None:
    """One assignment and one judgement per pair, in the table's order; the row number becomes the sequence."""
    campaign = mine["campaign_id"]
    first_left = [hashlib.sha256(f"{campaign} {number}".encode()).digest()[0] & 1 for number in numbers]
    given = insert_all(c, assignments, [
        {**mine, "token": secrets.token_urlsafe(18), "pair_id": pair, "sequence": number + 1, "kind": Kind.PAIR.value,
         "first_is_left": left, "leased": now}
        for pair, number, left in zip(ids, numbers, first_left, strict=True)
    ])  # fmt: skip
    c.execute(insert(judgements), [
        {**mine, "key": f"{campaign}-{number}", "type": "choice", "choice": (Choice.LEFT if left else Choice.RIGHT).value,
         "assignment_id": assigned, "milliseconds": 0, "views": "[]", "received_at": now, "page_version": "import"}
        for assigned, number, left in zip(given, numbers, first_left, strict=True)
    ])  # fmt: skip
    own = select(judgements.c.id).where(judgements.c.assignment_id == assignments.c.id).scalar_subquery()
    c.execute(update(assignments).where(assignments.c.campaign_id == campaign).values(answered=own))
    c.execute(update(pairs).where(pairs.c.campaign_id == campaign).values(taken=pairs.c.places))
