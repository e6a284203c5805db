"""Reads preferences from a store: selects the judgements that count and converts them to the open label
format.

Importing this module needs no database package; reading a store does.
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
# Gold and training pairs are not exported: their answers are known and they contain damaged shapes.
COMPARED = (Kind.PAIR, Kind.REPEAT, Kind.SWAP)
MODE_NAMES = {
    Mode.LABEL: "a campaign that collects preferences",
    Mode.STUDY: "a study",
    Mode.SINGLE: "a campaign of shapes shown one by one",
}
# The password of a URL: what stands between the colon after the user's name and the @.
_PASSWORD = re.compile(r"(//[^:/@]*):[^/]*@")


def is_store_url(source: object) -> bool:
    """Return True if `source` is the URL of a store, and False for the name of a file."""
    # A `Path` is never a URL, also if its name contains a colon.
    return isinstance(source, str) and _STORE.match(source) is not None


def without_password(url: str) -> str:
    """Return the URL with its password replaced, for messages and files."""
    return _PASSWORD.sub(r"\1:***@", url)


def labels_source(source: str | Path) -> str | Path:
    """Return a store's URL unchanged, and anything else as a path."""
    return source if is_store_url(source) else Path(source)


def source_stem(source: str | Path) -> str:
    """Return a short name: that of the file or database, without its suffix."""
    if is_store_url(source) and not str(source).startswith("sqlite"):
        return str(source).split("?")[0].rpartition("/")[2]  # PostgreSQL's name of the database has no suffix
    return Path(str(source).split("?")[0] if is_store_url(source) else source).stem


@dataclass(frozen=True, kw_only=True)
class LabelFilters:
    """Selection of the judgements that become labels. Skips, gold checks, training pairs and judgements that
    were taken back never do.
    """

    campaign: str | None = None  # name; None: all campaigns that collect preferences
    annotators: tuple[str, ...] = ()  # names; empty: all
    # 0..1; annotators with a lower accuracy, or without an answered gold check, are left out
    least_gold_accuracy: float | None = None
    drop_repeats: bool = False  # keep only each annotator's first answer to a pair
    min_milliseconds: int = 0  # least time to answer; faster answers are left out
    # Further criterion whose votes are used as answers; judgements without such a vote are left out.
    # None: the overall question, which shape is better.
    criterion: str | None = None
    # Only judgements received since then: ISO 8601 (local time without a time zone), or seconds since 1970.
    since: str | float | None = None

    def __post_init__(self):
        if self.least_gold_accuracy is not None and not 0 <= self.least_gold_accuracy <= 1:
            raise ValueError(f"least_gold_accuracy must be 0..1, got {self.least_gold_accuracy}. Correct it.")
        if self.min_milliseconds < 0:
            raise ValueError(f"min_milliseconds must be >= 0, got {self.min_milliseconds}. Correct it.")
        _ = self.start  # raises now for an invalid `since`, not at the first row

    @property
    def start(self) -> float:
        """The time of `since` in seconds since 1970; minus infinity without it."""
        if self.since is None:
            return -math.inf
        # A number is read first: fromisoformat would accept some numbers as dates, such as 20250131.
        with contextlib.suppress(ValueError):
            return float(self.since)
        try:
            return datetime.fromisoformat(str(self.since)).timestamp()
        except ValueError:
            raise ValueError(
                f"since: expected ISO 8601 or seconds since 1970, got {self.since!r}. Write it as 2025-01-31."
            ) from None

    def keep(self, rows: Iterable[JudgementRow], mode: Mode = Mode.LABEL) -> list[JudgementRow]:
        """Return the judgements that become labels, in their order.

        Args:
            rows: of one or several campaigns.
            mode: of the campaigns, if none is named.
        """
        # A campaign that is named explicitly counts in any mode.
        rows = [row for row in rows if not row.undone and (row.mode == mode or row.campaign == self.campaign)]
        rows = [
            row
            for row in rows
            if self.campaign in (None, row.campaign)
            and (not self.annotators or row.annotator in self.annotators)
        ]
        trusted = {row.annotator for row in rows}
        # The accuracy covers all gold checks of these rows, before the filters by time below.
        if self.least_gold_accuracy is not None:
            hits: dict[str, list[bool]] = defaultdict(list)
            for row in rows:
                if row.kind is Kind.GOLD and row.choice is not Choice.SKIP:
                    hits[row.annotator].append(row.choice.meets(row.expected))
            trusted = {
                name
                for name, correct in hits.items()
                if sum(correct) >= self.least_gold_accuracy * len(correct)
            }
        kinds = COMPARED[:1] if self.drop_repeats else COMPARED  # the first one is PAIR
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
    """Return labels by the name of their file or the URL of their store.

    Raises: ValueError if filters are given for a file.
    """
    if is_store_url(source):
        name = without_password(str(source))
        # The password never gets into the record of a training.
        filters = filters or LabelFilters()
        return LabelSource(
            name,
            # The store is opened only when the labels are needed.
            functools.partial(read_preferences, str(source), filters),
            {"labels": name, "filters": asdict(filters)},
        )
    # Names of the filters that differ from their default.
    used = [
        name
        for name, value in asdict(filters or LabelFilters()).items()
        if value != getattr(LabelFilters(), name)
    ]
    if used:
        flags = ", ".join("--campaign" if name == "campaign" else f"--set {name}" for name in used)
        raise ValueError(
            f"{flags}: filters need a store in --labels, got the file {Path(source).name}. Write"
            " --labels=sqlite:///labels.db."
        )
    return LabelSource.of_file(Path(source))


def to_preference(row: JudgementRow) -> Preference:
    """Convert a judgement of a pair to the open label format. Its origin is stored in `extra`, as texts and
    numbers only, so that CSV files can hold it.

    Raises: ValueError for files, single shapes, and pairs that two seeds do not identify.
    """
    left = row.left
    right = row.right
    reject_assets(row, "asset-pairs")
    if row.choice.good is not None:
        raise ValueError(
            f"campaign {row.campaign}: it shows shapes one by one, not pairs. Export it with --kind=unpaired."
        )
    # A preference names its shapes by seeds only, so both must agree in everything else.
    if (
        _parameters(left) != _parameters(right)
        or left.seed == right.seed
        or left.degradation
        or right.degradation
    ):
        raise ValueError(
            f"judgement {row.id} of campaign {row.campaign}: the shapes of its pair differ in more than"
            " their seeds, which labels cannot express. Export complete judgements with --kind=judgements."
        )
    # For a tie the left shape stands in `winner`; `tie` says that it means nothing.
    winner, loser = (right, left) if row.choice is Choice.RIGHT else (left, right)
    side = {Choice.LEFT: "left", Choice.RIGHT: "right"}.get(row.choice)
    both = "bad" if row.choice is Choice.BAD else None
    extra = {**_origin(row), "side": side, "left_seed": left.seed, "both": both}
    return Preference(
        winner=winner.seed,
        loser=loser.seed,
        generator=left.generator or None,
        psi=None if math.isnan(left.psi) else left.psi,
        annotator=row.annotator,
        time=row.received_at,
        tie=row.choice.equal,
        extra={k: v for k, v in extra.items() if v is not None},
    )


def _origin(row: JudgementRow) -> dict:
    """Return campaign, pair, times and rendering parameters of a judgement."""
    # Both shapes have the same parameters (see to_preference).
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
    """Convert a judgement of a single shape, or "both are bad" for one shape of a pair, which means not good.
    Its origin is stored in `extra`.
    """
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

    # A score replaces the label, because its threshold for "good" is a choice of the training.
    score = float(row.choice.value) if row.choice.value.isdigit() else None
    # BAD belongs to a pair: both of its shapes are bad.
    label = False if row.choice is Choice.BAD else row.choice.good if score is None else None
    reject_assets(row, "asset-scores")
    return UnpairedPreference(
        seed=shape.seed,
        label=label,
        score=score,
        generator=shape.generator or None,
        psi=None if math.isnan(shape.psi) else shape.psi,
        annotator=row.annotator,
        time=row.received_at,
        extra={k: v for k, v in _origin(row).items() if v is not None},
    )


def reject_assets(row: JudgementRow, kind: str = "asset-pairs") -> None:
    """Raise ValueError for a judgement of asset files, which seeds cannot identify."""
    if row.left.file or row.right.file:
        raise ValueError(
            f"campaign {row.campaign}: its shapes are files, not seeds of a generator. Export it with"
            f" --kind={kind}."
        )


def _parameters(shape: Shape) -> tuple:
    """Return everything besides the seed that determines a shape; nan becomes None, which equals itself."""
    values = (shape.generator, shape.psi, shape.level, shape.resolution, shape.triangles)
    return tuple(None if isinstance(v, float) and math.isnan(v) else v for v in values)


def store_preferences(store: "Store", filters: LabelFilters | None = None) -> list[Preference]:
    """Return the labels of a store in order of receipt."""
    return [to_preference(row) for row in kept_judgements(store, filters or LabelFilters(), Mode.LABEL)]


def kept_judgements(store: "Store", filters: LabelFilters, mode: Mode) -> list[JudgementRow]:
    """Return the judgements that become labels, from campaigns of one mode.

    Raises: ValueError for an unknown campaign, question or annotator, and for a campaign of another mode.
    """
    if filters.campaign is not None:
        campaign = store.campaign(filters.campaign)
        if campaign is None:
            names = ", ".join(c.settings.name for c in store.campaigns()) or "none"
            raise ValueError(
                f"campaign: expected a campaign of the store ({names}), got {filters.campaign!r}. Name one of"
                " them."
            )
        if campaign.settings.mode is not mode:
            expected, actual = (MODE_NAMES[m] for m in (mode, campaign.settings.mode))
            raise ValueError(
                f"campaign {filters.campaign}: expected {expected}, got {actual}. Name another campaign."
            )
    if filters.criterion is not None:
        selected = [c for c in store.campaigns() if filters.campaign in (None, c.settings.name)]
        asked = {question.name for c in selected for question in parse_questions(c.settings.questions)}
        if filters.criterion not in asked:
            questions = ", ".join(sorted(asked)) or "none"
            raise ValueError(
                f"criterion: expected one that was asked ({questions}), got {filters.criterion!r}. Name one"
                " of them."
            )
    # A misspelled name would otherwise give an empty result without an error.
    annotators = {annotator.name for annotator in store.annotators()}
    unknown = sorted(set(filters.annotators) - annotators)
    if unknown:
        known = ", ".join(sorted(annotators)) or "none"
        raise ValueError(
            f"annotator: expected annotators of the store ({known}), got {', '.join(unknown)}. Name others."
        )
    return filters.keep(store.judgements(filters.campaign, filters.annotators), mode)


def read_preferences(url: str, filters: LabelFilters | None = None) -> list[Preference]:
    """Return the labels of the store at a URL, in order of receipt.

    Raises: ValueError without SQLAlchemy, and if no label passes the filters.
    """
    try:
        from eg3d_rlhf.people.label.store import Store
    except ImportError as error:
        raise ValueError(
            f"--labels: reading a store needs SQLAlchemy ({error}). Run pip install 'eg3d-rlhf[label]'."
        ) from None
    with Store.open(url, create=False) as store:
        # Read completely before the store is closed.
        labels = store_preferences(store, filters)
    if not labels:
        name = without_password(url)
        raise ValueError(
            f"{name}: expected at least one label that passes the filters, got none. Label some pairs first,"
            " or loosen the filters."
        )
    return labels


def export_labels(store: "Store", path: str | Path, **filters) -> Path:
    """Write labels to a .jsonl or .csv file in the open label format, with further fields for the origin of
    each judgement. Returns the path.
    """
    return write_labels(path, store_preferences(store, LabelFilters(**filters)))


def export_unpaired(store: "Store", path: str | Path, from_pairs: bool = False, **filters) -> Path:
    """Write labels of single shapes to a .jsonl file, with further fields for the origin of each judgement.
    Returns the path.

    Args:
        from_pairs: use the pairs of which both shapes were called bad.
    """
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    rows = kept_judgements(store, LabelFilters(**filters), Mode.LABEL if from_pairs else Mode.SINGLE)
    labelled = [(row, row.left) for row in rows]
    if from_pairs:
        labelled = [
            (row, shape) for row in rows if row.choice is Choice.BAD for shape in (row.left, row.right)
        ]
    return write_unpaired(path, [to_unpaired(row, shape) for row, shape in labelled])


# ---- judgements of assets in files that trainings read, as JSON lines:
#
#     asset-pairs    {"condition", "prompt", "preferred", "rejected", "tie", ...}
#                    trainings of rewards of images
#     rankings       {"condition", "rank", "asset", "strength", "judgements", ...}
#                    eg3d-rlhf flow tune --labels
#     asset-scores   {"mesh", "prompt", "score" or "label", ...}
#                    eg3d-rlhf reward mesh --data
#
# Paths are relative to the file for an asset below its folder, and absolute otherwise. Lines about an asset
# that
# `eg3d-rlhf flow sample` generated also contain the paths of its latents, which the list of that tool names.

SAMPLE_LIST = "ranking.jsonl"  # file in which a generator's tool lists its samples
PATH_FIELDS = ("structure", "latent", "latents", "look_at", "asset")  # fields of its lines that are paths
WritePath = Callable[[Path | str], str]  # converts a path to the text that is written


def export_assets(store: "Store", path: Path, kind: str, from_pairs: bool = False, **filters) -> Path:
    """Write asset-pairs, rankings or asset-scores of a store. Returns the path.

    Args:
        path: of the file; asset paths below its folder are written relative to it.
        kind: "asset-pairs", "rankings" or "asset-scores".
        from_pairs: for asset-scores, use the pairs of which both shapes were called bad.
        filters: as of `LabelFilters`.

    Raises: ValueError if no judgement of assets passes the filters.
    """
    mode = Mode.SINGLE if kind == "asset-scores" and not from_pairs else Mode.LABEL
    rows = kept_judgements(store, LabelFilters(**filters), mode)
    if from_pairs:
        # Each such pair gives two judgements of single shapes. The shape is stored in `left`.
        rows = [
            replace(row, left=shape)
            for row in rows
            if row.choice is Choice.BAD
            for shape in (row.left, row.right)
        ]
    # Shapes of generators have no file that a line could name.
    rows = [row for row in rows if row.left.file]
    if not rows:
        raise ValueError(
            f"--kind={kind}: expected judgements of assets that pass the filters, got none. Label some with"
            " --assets."
        )
    texts = {c.settings.name: c.settings.extra.get("conditions", {}) for c in store.campaigns()}

    def write_path(place: Path | str) -> str:
        place = Path(place).resolve()
        folder = path.parent.resolve()
        # Relative paths, so that a folder with its assets and labels can be moved.
        return str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)

    lines = (
        rankings(rows, write_path)
        if kind == "rankings"
        else [KINDS[kind](row, prompt_of(row, texts), write_path) for row in rows]
    )
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return path


def prompt_of(row: JudgementRow, texts: Mapping[str, Mapping]) -> str:
    """Return the text of the prompt, or its name if it is an image without a text."""
    return texts.get(row.campaign, {}).get(row.left.condition, {}).get("text") or row.left.condition


def to_pair(row: JudgementRow, prompt: str, write_path: WritePath) -> dict:
    """Convert a judgement of two assets to a line of asset-pairs."""
    winner, loser = (row.right, row.left) if row.choice is Choice.RIGHT else (row.left, row.right)
    fields = {
        "condition": row.left.condition,
        "prompt": prompt,
        "preferred": write_path(winner.source),
        "rejected": write_path(loser.source),
        "tie": row.choice not in (Choice.LEFT, Choice.RIGHT),
        "preferred_generator": winner.generator,
        "rejected_generator": loser.generator,
    }
    return {**fields, "choice": row.choice.value, **_provenance(row)}


def to_score(row: JudgementRow, prompt: str, write_path: WritePath) -> dict:
    """Convert a judgement of one asset to a line of asset-scores."""
    rating: dict = (
        {"score": float(row.choice.value)}
        if row.choice.value.isdigit()
        else {"label": int(bool(row.choice.good))}
    )
    fields = {
        "mesh": write_path(row.left.source),
        "prompt": prompt,
        **rating,
        "generator": row.left.generator,
        "condition": row.left.condition,
    }
    return {**fields, **_provenance(row)}


KINDS = {"asset-pairs": to_pair, "asset-scores": to_score}


def _provenance(row: JudgementRow) -> dict:
    """Return the origin of a judgement; votes and comment only if there are any."""
    origin = {
        "annotator": row.annotator,
        "time": row.received_at,
        "campaign": row.campaign,
        "judgement": row.id,
        "kind": row.kind.value,
    }
    return {
        **origin,
        **{name: value for name, value in (("votes", row.votes), ("comment", row.comment)) if value},
    }


def rankings(rows: Sequence[JudgementRow], write_path: WritePath = str) -> list[dict]:
    """Return one line per compared asset, best first within its prompt. Ranks follow Bradley-Terry strengths,
    and equal strengths get equal ranks.

    Strengths are comparable only between assets that a chain of comparisons links. If there are several such
    groups, only the largest is ranked.
    """
    from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
    from eg3d_rlhf.preferences.label_scores import linked

    # Prompt -> judgements. Assets of different prompts are never compared.
    by_condition: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        by_condition[row.left.condition].append(row)
    lines = []
    sample_lists = _SampleLists()
    for condition, compared_rows in by_condition.items():
        # The path identifies an asset within a campaign.
        assets = {shape.source: shape for row in compared_rows for shape in (row.left, row.right)}
        compared = []
        for row in compared_rows:
            winner, loser = (row.right, row.left) if row.choice is Choice.RIGHT else (row.left, row.right)
            tie = row.choice not in (Choice.LEFT, Choice.RIGHT)
            compared.append(Comparison(winner.source, loser.source, tie))
        # The largest group of assets; the first two entries of a comparison are its assets.
        comparisons = max(linked(compared), key=lambda part: len({end for c in part for end in c[:2]}))
        fit = bradley_terry(comparisons)
        # Rounding makes strengths equal that differ by the tolerance of the solver only.
        strengths = dict(zip(map(str, fit.items), fit.strength.round(9).tolist(), strict=True))
        # Equal strengths are ordered by path, so that the file is the same at every export.
        for source in sorted(strengths, key=lambda source: (-strengths[source], source)):
            fields = {
                "condition": condition,
                "rank": 1 + sum(other > strengths[source] for other in strengths.values()),
                "generator": assets[source].generator,
                "strength": strengths[source],
                "judgements": sum(source in (c.winner, c.loser) for c in comparisons),
            }
            # A sample of a flow is written as its tool's list has it; any other asset as its path.
            sample = sample_lists.fields_of(assets[source], write_path)
            lines.append({**(sample or {"asset": write_path(source)}), **fields})
    return lines


class _SampleLists:
    """Cache of the lists in which generators' tools describe their samples, by folder."""

    def __init__(self):
        self._lists: dict[Path, dict[str, dict]] = {}

    def fields_of(self, shape: Shape, write_path: WritePath) -> dict:
        """Return the line of an asset with its paths rewritten; empty if the asset is in no list."""
        path = Path(shape.source)
        if path.parent not in self._lists:
            self._lists[path.parent] = {
                str(line.get("look_at")): line for line in _lines(path.parent / SAMPLE_LIST)
            }
        # `look_at` is the name of the file that annotators have seen.
        line = self._lists[path.parent].get(path.name, {})
        return {
            name: write_path(path.parent / value) if name in PATH_FIELDS and isinstance(value, str) else value
            for name, value in line.items()
            # The rank of an earlier export is replaced by the rank of these comparisons.
            if name != "rank"
        }


def _lines(path: Path) -> Iterable[dict]:
    """Read the JSON objects of a file of JSON lines; a missing file has none."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # Lines of other JSON types are ignored: the list comes from another tool.
    return [line for line in lines if isinstance(line, dict)]
