"""Preferences out of a store: which judgements count, what they say in the open label format, and how a store
is named.

Importing this needs no database package; reading a store does.
"""

import contextlib
import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.people.label.entities import (
    Choice,
    JudgementRow,
    Kind,
    Mode,
    Shape,
    answers_to,
    parse_questions,
)
from eg3d_rlhf.preferences.labels import LabelSource, Preference, write_labels
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

_STORE = re.compile(r"(sqlite|postgresql|postgres)(\+\w+)?:")
# gold and training pairs have known answers and damaged shapes
COMPARED = (Kind.PAIR, Kind.REPEAT, Kind.SWAP)
WORDS = {
    Mode.LABEL: "one that collects preferences",
    Mode.STUDY: "a study",
    Mode.SINGLE: "one of shapes judged one by one",
}
_PASSWORD = re.compile(r"(//[^:/@]*):[^/]*@")


def is_store_url(source: object) -> bool:
    """Whether `source` names a store and not a file."""
    return isinstance(source, str) and _STORE.match(source) is not None


def without_password(url: str) -> str:
    """The URL as it may be shown and written down."""
    return _PASSWORD.sub(r"\1:***@", url)


def labels_source(source: str | Path) -> str | Path:
    """A store's URL as it is, anything else as a path."""
    return source if is_store_url(source) else Path(source)


def source_stem(source: str | Path) -> str:
    """A short name: the file's or database's, without its ending."""
    if is_store_url(source) and not str(source).startswith("sqlite"):
        return str(source).split("?")[0].rpartition("/")[2]  # a database's name has no ending
    return Path(str(source).split("?")[0] if is_store_url(source) else source).stem


@dataclass(frozen=True, kw_only=True)
class LabelFilters:
    """Which judgements become labels. Skips, gold checks, training and what was undone never do."""

    campaign: str | None = None  # name; None: all that collect preferences
    annotators: tuple[str, ...] = ()  # names; empty: all
    # 0..1; annotators below it, or without an answered gold check, are left out
    least_gold_accuracy: float | None = None
    drop_repeats: bool = False  # keep each annotator's first answer to a pair alone
    min_milliseconds: int = 0  # leave out faster answers
    # take the votes on it as answers; judgements without one are left out. None: which one is better
    criterion: str | None = None
    # received from then on: ISO 8601 (local time unless it says otherwise), or seconds since 1970
    since: str | float | None = None

    def __post_init__(self):
        if self.least_gold_accuracy is not None and not 0 <= self.least_gold_accuracy <= 1:
            raise ValueError(f"least_gold_accuracy must be 0..1, got {self.least_gold_accuracy}")
        if self.min_milliseconds < 0:
            raise ValueError(f"min_milliseconds must be >= 0, got {self.min_milliseconds}")
        _ = self.start  # says at once what is wrong with `since`

    @property
    def start(self) -> float:
        if self.since is None:
            return -math.inf
        with contextlib.suppress(ValueError):
            return float(self.since)
        try:
            return datetime.fromisoformat(str(self.since)).timestamp()
        except ValueError:
            raise ValueError(
                f"since: expected ISO 8601 or seconds since 1970, got {self.since!r}. Write 2025-01-31 or so."
            ) from None

    def keep(self, rows: Iterable[JudgementRow], mode: Mode = Mode.LABEL) -> list[JudgementRow]:
        """The judgements that count, in their order. Args: mode: of the campaigns, where none is named."""
        rows = [row for row in rows if not row.undone and (row.mode == mode or row.campaign == self.campaign)]
        rows = [
            row
            for row in rows
            if self.campaign in (None, row.campaign)
            and (not self.annotators or row.annotator in self.annotators)
        ]
        trusted = {row.annotator for row in rows}
        # those whose gold checks suffice, over all their checks in these rows
        if self.least_gold_accuracy is not None:
            hits: dict[str, list[bool]] = defaultdict(list)
            for row in rows:
                if row.kind is Kind.GOLD and row.choice is not Choice.SKIP:
                    hits[row.annotator].append(row.choice.meets(row.expected))
            trusted = {
                name for name, right in hits.items() if sum(right) >= self.least_gold_accuracy * len(right)
            }
        kinds = COMPARED[:1] if self.drop_repeats else COMPARED
        kept = [
            row
            for row in rows
            if row.kind in kinds
            and row.choice is not Choice.SKIP
            and row.annotator in trusted
            and row.milliseconds >= self.min_milliseconds
            and row.received_at >= self.start
        ]
        return kept if self.criterion is None else answers_to(self.criterion, kept)


def label_source(source: str | Path, filters: LabelFilters | None = None) -> LabelSource:
    """Labels by the name of their file or the URL of their store.

    Raises: ValueError when a file is to be filtered.
    """
    if is_store_url(source):
        name = without_password(str(source))
        filters = filters or LabelFilters()
        return LabelSource(
            name,
            functools.partial(read_preferences, str(source), filters),
            {"labels": name, "filters": asdict(filters)},
        )
    given = [
        name
        for name, value in asdict(filters or LabelFilters()).items()
        if value != getattr(LabelFilters(), name)
    ]
    if given:
        flags = ", ".join("--campaign" if name == "campaign" else f"--set {name}" for name in given)
        raise ValueError(
            f"{flags}: expected a store in --labels, got {Path(source).name}. Write"
            " --labels=sqlite:///labels.db."
        )
    return LabelSource.of_file(Path(source))


def to_preference(row: JudgementRow) -> Preference:
    """A judgement of a pair in the open label format, its provenance in `extra`: texts and numbers alone, so
    that CSV holds them too.
    """
    left = row.left
    right = row.right
    refuse_assets(row, "asset-pairs")
    if row.choice.good is not None:
        raise ValueError(
            f"campaign {row.campaign}: expected pairs, got shapes one by one. Export it with --kind=unpaired."
        )
    if _drawn(left) != _drawn(right) or left.seed == right.seed or left.degradation or right.degradation:
        wrong = "expected two seeds of one generator, got a pair that seeds alone do not tell apart"
        raise ValueError(
            f"judgement {row.id} of campaign {row.campaign}: {wrong}. Export the judgements whole."
        )
    winner, loser = (right, left) if row.choice is Choice.RIGHT else (left, right)
    side = {Choice.LEFT: "left", Choice.RIGHT: "right"}.get(row.choice)
    both = "bad" if row.choice is Choice.BAD else None
    known = {**_known(row), "side": side, "left_seed": left.seed, "both": both}
    return Preference(
        winner=winner.seed,
        loser=loser.seed,
        generator=left.generator or None,
        psi=None if math.isnan(left.psi) else left.psi,
        annotator=row.annotator,
        time=row.received_at,
        tie=row.choice.equal,
        extra={k: v for k, v in known.items() if v is not None},
    )


def _known(row: JudgementRow) -> dict:
    shape = row.left
    return {
        "campaign": row.campaign,
        "judgement": row.id,
        "pair": row.pair,
        "kind": row.kind.value,
        "milliseconds": row.milliseconds,
        "views": " ".join(row.views),
        "answered_at": row.answered_at,
        "page_version": row.page_version,
        "level": None if math.isnan(shape.level) else shape.level,
        "resolution": shape.resolution,
        "triangles": shape.triangles,
    }


def to_unpaired(row: JudgementRow, shape: Shape) -> "UnpairedPreference":
    """What a judgement says of a shape by itself, its provenance in `extra`; "both are bad" says of either:
    not good.
    """
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

    score = float(row.choice.value) if row.choice.value.isdigit() else None
    label = False if row.choice is Choice.BAD else row.choice.good if score is None else None
    refuse_assets(row, "asset-scores")
    return UnpairedPreference(
        seed=shape.seed,
        label=label,
        score=score,
        generator=shape.generator or None,
        psi=None if math.isnan(shape.psi) else shape.psi,
        annotator=row.annotator,
        time=row.received_at,
        extra={k: v for k, v in _known(row).items() if v is not None},
    )


def refuse_assets(row: JudgementRow, kind: str = "asset-pairs") -> None:
    """Raises: ValueError for a judgement of files, which seeds cannot name."""
    if row.left.file or row.right.file:
        raise ValueError(
            f"campaign {row.campaign}: expected shapes of a generator's seeds, got files. Export it with"
            f" --kind={kind}."
        )


def _drawn(shape: Shape) -> tuple:
    values = (shape.generator, shape.psi, shape.level, shape.resolution, shape.triangles)
    return tuple(None if isinstance(v, float) and math.isnan(v) else v for v in values)


def preferences_of(store: "Store", filters: LabelFilters | None = None) -> list[Preference]:
    """Labels of a store in order of receipt."""
    return [to_preference(row) for row in kept_judgements(store, filters or LabelFilters(), Mode.LABEL)]


def kept_judgements(store: "Store", chosen: LabelFilters, mode: Mode) -> list[JudgementRow]:
    """The judgements that become labels, of campaigns of one mode."""
    if chosen.campaign is not None:
        campaign = store.campaign(chosen.campaign)
        if campaign is None:
            known = ", ".join(c.settings.name for c in store.campaigns()) or "none"
            raise ValueError(
                f"campaign: expected one of the store's ({known}), got {chosen.campaign!r}. Name one of them."
            )
        if campaign.settings.mode is not mode:
            wanted, got = (WORDS[m] for m in (mode, campaign.settings.mode))
            raise ValueError(f"campaign {chosen.campaign}: expected {wanted}, got {got}. Name another.")
    if chosen.criterion is not None:
        named = [c for c in store.campaigns() if chosen.campaign in (None, c.settings.name)]
        asked = {question.name for c in named for question in parse_questions(c.settings.questions)}
        if chosen.criterion not in asked:
            listed = ", ".join(sorted(asked)) or "none"
            raise ValueError(
                f"criterion: expected one that was asked ({listed}), got {chosen.criterion!r}. Name one of"
                " them."
            )
    names = {annotator.name for annotator in store.annotators()}
    unknown = sorted(set(chosen.annotators) - names)
    if unknown:
        listed = ", ".join(sorted(names)) or "none"
        raise ValueError(
            f"annotator: expected some of the store's ({listed}), got {', '.join(unknown)}. Name others."
        )
    return chosen.keep(store.judgements(chosen.campaign, chosen.annotators), mode)


def read_preferences(url: str, filters: LabelFilters | None = None) -> list[Preference]:
    """Labels of the store at a URL, in order of receipt."""
    try:
        from eg3d_rlhf.people.label.store import Store
    except ImportError as error:
        raise ValueError(
            f"--labels: expected SQLAlchemy to read a store, got: {error}. pip install 'eg3d-rlhf[label]'."
        ) from None
    with Store.open(url, create=False) as store:
        labels = preferences_of(store, filters)
    if not labels:
        name = without_password(url)
        raise ValueError(
            f"{name}: expected at least one label, got none that passes the filters. Label some pairs first,"
            " or ask for less."
        )
    return labels


def export_labels(store: "Store", path: str | Path, **filters) -> Path:
    """Write .jsonl or .csv in the open label format, with everything known of each judgement as further
    fields. Returns the path.
    """
    return write_labels(path, preferences_of(store, LabelFilters(**filters)))


def export_unpaired(store: "Store", path: str | Path, from_pairs: bool = False, **filters) -> Path:
    """Write .jsonl of the labels of single shapes, with everything known of each judgement as further fields.
    Returns the path.
    """
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    rows = kept_judgements(store, LabelFilters(**filters), Mode.LABEL if from_pairs else Mode.SINGLE)
    shown = [(row, row.left) for row in rows]
    if from_pairs:
        shown = [(row, shape) for row in rows if row.choice is Choice.BAD for shape in (row.left, row.right)]
    return write_unpaired(path, [to_unpaired(row, shape) for row, shape in shown])


# ---- judgements of assets as files that trainings read, JSON lines:
#
#     asset-pairs    {"condition", "prompt", "preferred", "rejected", "tie", ...}
#                    whoever trains a reward of images
#     rankings       {"condition", "rank", "asset", "strength", "judgements", ...}
#                    eg3d-rlhf flow tune --labels
#     asset-scores   {"mesh", "prompt", "score" or "label", ...}
#                    eg3d-rlhf reward mesh --data
#
# Paths are relative to the file where an asset lies below its folder, else absolute. An asset that a
# generator's tool drew (eg3d_rlhf.tuning.flow) brings along where its latents are, as its list says.

DRAWN = "ranking.jsonl"  # a generator's tool lists there what it drew
PLACES = ("structure", "latent", "latents", "look_at", "asset")  # fields of its lines that are paths
Where = Callable[[Path | str], str]  # a path as it is written


def export_assets(store: "Store", path: Path, kind: str, from_pairs: bool = False, **filters) -> Path:
    """Write asset-pairs, rankings or asset-scores of a store; `filters` as of `LabelFilters`. Returns the
    path.
    """
    mode = Mode.SINGLE if kind == "asset-scores" and not from_pairs else Mode.LABEL
    rows = kept_judgements(store, LabelFilters(**filters), mode)
    if from_pairs:
        rows = [
            replace(row, left=shape)
            for row in rows
            if row.choice is Choice.BAD
            for shape in (row.left, row.right)
        ]
    rows = [row for row in rows if row.left.file]
    if not rows:
        raise ValueError(
            f"--kind={kind}: expected judgements of assets, got none that passes the filters. Label some with"
            " --assets."
        )
    texts = {c.settings.name: c.settings.extra.get("conditions", {}) for c in store.campaigns()}

    def where(place: Path | str) -> str:
        place = Path(place).resolve()
        folder = path.parent.resolve()
        return str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)

    lines = (
        rankings(rows, where)
        if kind == "rankings"
        else [KINDS[kind](row, prompt_of(row, texts), where) for row in rows]
    )
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return path


def prompt_of(row: JudgementRow, texts: Mapping[str, Mapping]) -> str:
    """The prompt's text; its name where it is a picture alone."""
    return texts.get(row.campaign, {}).get(row.left.condition, {}).get("text") or row.left.condition


def to_pair(row: JudgementRow, prompt: str, where: Where) -> dict:
    """A judgement of two assets."""
    winner, loser = (row.right, row.left) if row.choice is Choice.RIGHT else (row.left, row.right)
    known = {
        "condition": row.left.condition,
        "prompt": prompt,
        "preferred": where(winner.source),
        "rejected": where(loser.source),
        "tie": row.choice not in (Choice.LEFT, Choice.RIGHT),
        "preferred_generator": winner.generator,
        "rejected_generator": loser.generator,
    }
    return {**known, "choice": row.choice.value, **_provenance(row)}


def to_score(row: JudgementRow, prompt: str, where: Where) -> dict:
    """A judgement of one asset."""
    said: dict = (
        {"score": float(row.choice.value)}
        if row.choice.value.isdigit()
        else {"label": int(bool(row.choice.good))}
    )
    known = {
        "mesh": where(row.left.source),
        "prompt": prompt,
        **said,
        "generator": row.left.generator,
        "condition": row.left.condition,
    }
    return {**known, **_provenance(row)}


KINDS = {"asset-pairs": to_pair, "asset-scores": to_score}


def _provenance(row: JudgementRow) -> dict:
    known = {
        "annotator": row.annotator,
        "time": row.received_at,
        "campaign": row.campaign,
        "judgement": row.id,
        "kind": row.kind.value,
    }
    return {
        **known,
        **{name: value for name, value in (("votes", row.votes), ("comment", row.comment)) if value},
    }


def rankings(rows: Sequence[JudgementRow], where: Where = str) -> list[dict]:
    """A line per asset that was compared, best first within its prompt: ranks by Bradley-Terry strengths,
    equal ones for equal strengths.

    Of assets that no chain of comparisons links, those of the largest group alone are ranked: their strengths
    say nothing of each other.
    """
    from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
    from eg3d_rlhf.preferences.label_scores import linked

    by_condition: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        by_condition[row.left.condition].append(row)
    lines = []
    drawn = _Drawn()
    for condition, judged in by_condition.items():
        assets = {shape.source: shape for row in judged for shape in (row.left, row.right)}
        compared = []
        for row in judged:
            winner, loser = (row.right, row.left) if row.choice is Choice.RIGHT else (row.left, row.right)
            tie = row.choice not in (Choice.LEFT, Choice.RIGHT)
            compared.append(Comparison(winner.source, loser.source, tie))
        # within the largest group of items that a chain of comparisons links
        comparisons = max(linked(compared), key=lambda part: len({end for c in part for end in c[:2]}))
        fit = bradley_terry(comparisons)
        strengths = dict(zip(map(str, fit.items), fit.strength.round(9).tolist(), strict=True))
        for source in sorted(strengths, key=lambda source: (-strengths[source], source)):
            known = {
                "condition": condition,
                "rank": 1 + sum(other > strengths[source] for other in strengths.values()),
                "generator": assets[source].generator,
                "strength": strengths[source],
                "judgements": sum(source in (c.winner, c.loser) for c in comparisons),
            }
            lines.append({**(drawn.of(assets[source], where) or {"asset": where(source)}), **known})
    return lines


class _Drawn:
    def __init__(self):
        self._lists: dict[Path, dict[str, dict]] = {}

    def of(self, shape: Shape, where: Where) -> dict:
        path = Path(shape.source)
        if path.parent not in self._lists:
            self._lists[path.parent] = {
                str(line.get("look_at")): line for line in _lines(path.parent / DRAWN)
            }
        line = self._lists[path.parent].get(path.name, {})
        return {
            name: where(path.parent / value) if name in PLACES and isinstance(value, str) else value
            for name, value in line.items()
            if name != "rank"
        }


def _lines(path: Path) -> Iterable[dict]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if isinstance(line, dict)]
