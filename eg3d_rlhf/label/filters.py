"""From judgements to training labels: which of them count, and what they say in the open label format."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from eg3d_rlhf.label.records import Choice, JudgementRow, Kind, Mode, Shape
from eg3d_rlhf.preferences.labels import Preference

COMPARED = (Kind.PAIR, Kind.REPEAT, Kind.SWAP)  # gold and training pairs have known answers and damaged shapes


@dataclass(frozen=True, kw_only=True)
class LabelFilters:
    """Which judgements become labels. Skips, gold checks, training and what was undone never do."""

    campaign: str | None = None  # name; None: all that collect preferences
    annotators: tuple[str, ...] = ()  # names; empty: all
    least_gold_accuracy: float | None = None  # 0..1; annotators below it, or without an answered gold check, are left out
    drop_repeats: bool = False  # keep each annotator's first answer to a pair alone
    min_milliseconds: int = 0  # leave out faster answers
    since: str | float | None = None  # received from then on: ISO 8601 (local time unless it says otherwise), or seconds since 1970

    def __post_init__(self):
        if self.least_gold_accuracy is not None and not 0 <= self.least_gold_accuracy <= 1:
            raise ValueError(f"least_gold_accuracy must be 0..1, got {self.least_gold_accuracy}")
        if self.min_milliseconds < 0:
            raise ValueError(f"min_milliseconds must be >= 0, got {self.min_milliseconds}")
        _ = self.start  # says at once what is wrong with `since`

    @property
    def start(self) -> float:
        """`since` in seconds since 1970; minus infinity for None."""
        if self.since is None:
            return -math.inf
        try:
            return float(self.since)
        except ValueError:
            pass
        try:
            return datetime.fromisoformat(str(self.since)).timestamp()
        except ValueError:
            raise ValueError(f"since: expected ISO 8601 or seconds since 1970, got {self.since!r}. Write 2025-01-31 or so.") from None

    def keep(self, rows: Iterable[JudgementRow]) -> list[JudgementRow]:
        """The judgements that count, in their order."""
        rows = [row for row in rows if not row.undone and (row.mode == Mode.LABEL or row.campaign == self.campaign)]
        rows = [row for row in rows if self.campaign in (None, row.campaign) and (not self.annotators or row.annotator in self.annotators)]
        trusted = self._trusted(rows)
        kinds = COMPARED[:1] if self.drop_repeats else COMPARED
        return [
            row for row in rows
            if row.kind in kinds and row.choice is not Choice.SKIP and row.annotator in trusted
            and row.milliseconds >= self.min_milliseconds and row.received_at >= self.start
        ]  # fmt: skip

    def _trusted(self, rows: list[JudgementRow]) -> set[str]:
        """Annotators whose gold checks suffice, over all their checks in these rows."""
        if self.least_gold_accuracy is None:
            return {row.annotator for row in rows}
        hits: dict[str, list[bool]] = defaultdict(list)
        for row in rows:
            if row.kind is Kind.GOLD and row.choice is not Choice.SKIP:
                hits[row.annotator].append(row.choice == row.expected)
        return {name for name, found in hits.items() if sum(found) >= self.least_gold_accuracy * len(found)}


def to_preference(row: JudgementRow) -> Preference:
    """A judgement of a pair in the open label format, its provenance in `extra`.

    Raises: ValueError for pairs that the format cannot name: two generators or truncations, one seed twice, shapes damaged on purpose.
    """
    left, right = row.left, row.right
    if _drawn(left) != _drawn(right) or left.seed == right.seed or left.degradation or right.degradation:
        raise ValueError(
            f"judgement {row.id} of campaign {row.campaign}: expected two seeds of one generator, got a pair that seeds alone do not tell "
            "apart. Name another campaign, or export the judgements whole."
        )
    winner, loser = (right, left) if row.choice is Choice.RIGHT else (left, right)
    return Preference(
        winner=winner.seed, loser=loser.seed, generator=left.generator or None, psi=None if math.isnan(left.psi) else left.psi,
        annotator=row.annotator, time=row.received_at, tie=row.choice is Choice.TIE, extra=_provenance(row),
    )  # fmt: skip


def _drawn(shape: Shape) -> tuple:
    values = (shape.generator, shape.psi, shape.level, shape.resolution, shape.triangles)
    return tuple(None if isinstance(v, float) and math.isnan(v) else v for v in values)


def _provenance(row: JudgementRow) -> dict:
    """JSON types; texts and numbers alone, so that CSV holds them too."""
    shape = row.left
    side = {Choice.LEFT: "left", Choice.RIGHT: "right"}.get(row.choice)
    known = {
        "campaign": row.campaign, "judgement": row.id, "pair": row.pair, "kind": row.kind.value, "side": side,
        "left_seed": row.left.seed, "milliseconds": row.milliseconds, "views": " ".join(row.views), "answered_at": row.answered_at,
        "page_version": row.page_version, "level": None if math.isnan(shape.level) else shape.level, "resolution": shape.resolution,
        "triangles": shape.triangles,
    }  # fmt: skip
    return {k: v for k, v in known.items() if v is not None}
