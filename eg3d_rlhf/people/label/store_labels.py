"""Preferences from a label store: selection of the judgements that count, and conversion to files of labels.

Importing this module does not need the database package SQLAlchemy, but reading a store does.
"""

import contextlib
import functools
import json
import math
import re
from collections import Counter, defaultdict
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
from eg3d_rlhf.preferences.asset_votes import OVERALL, AssetPair, write_asset_votes
from eg3d_rlhf.preferences.labels import LabelSource, Preference, write_labels
from eg3d_rlhf.preferences.provenance import (
    ALL,
    JUDGES,
    PEOPLE,
    PEOPLE_ONLY,
    LabelChoice,
    LabelUse,
    check_labels_from,
    is_used,
    select_labels,
)
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store
    from eg3d_rlhf.preferences.bradley_terry import Comparison
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

_STORE = re.compile(r"(sqlite|postgresql|postgres)(\+\w+)?:")  # start of the URL of a store
# Kinds of pairs whose answers become labels. Gold and practice pairs contain damaged shapes, and their
# answers are known in advance.
COMPARED = (Kind.PAIR, Kind.REPEAT, Kind.SWAP)
MODE_NAMES = {
    Mode.LABEL: "a campaign that collects preferences",
    Mode.STUDY: "a study",
    Mode.SINGLE: "a campaign of shapes shown one by one",
}
# The password in a URL is between the colon after the user name and the @.
_PASSWORD = re.compile(r"(//[^:/@]*):[^/]*@")


def is_store_url(file_or_url: object) -> bool:
    """Return True if `file_or_url` is the URL of a label store, and False if it is the name of a file."""
    # A `Path` is always a file, even if its name looks like a URL.
    return isinstance(file_or_url, str) and _STORE.match(file_or_url) is not None


def without_password(url: str) -> str:
    """Return a URL with *** in place of its password, for messages and files."""
    return _PASSWORD.sub(r"\1:***@", url)


def labels_source(file_or_url: str | Path) -> str | Path:
    """Return the URL of a store unchanged, and the name of a file as a `Path`."""
    return file_or_url if is_store_url(file_or_url) else Path(file_or_url)


def source_stem(file_or_url: str | Path) -> str:
    """Return a short name of a source of labels.

    It is the name of the file without its suffix, or the name of the PostgreSQL database.
    """
    if not is_store_url(file_or_url):
        return Path(file_or_url).stem
    url_path = str(file_or_url).split("?")[0]  # without parameters
    # the name of a PostgreSQL database may contain a dot, and has no suffix
    return Path(url_path).stem if url_path.startswith("sqlite") else url_path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class LabelFilters:
    """Selection of the judgements that become labels.

    Skips, gold checks, practice pairs and judgements that were taken back never become labels.
    """

    campaign: str | None = None  # name of the campaign; None: all campaigns that collect preferences
    annotators: tuple[str, ...] = ()  # names of the annotators; empty: all annotators
    # Smallest share of correct gold checks of an annotator, 0..1. Annotators below it, or without an answered
    # gold check, are left out. None: no restriction.
    least_gold_accuracy: float | None = None
    drop_repeats: bool = False  # True keeps only the first answer of each annotator to a pair
    min_milliseconds: int = 0  # shortest time to answer; faster answers are left out
    # Name of a further question, whose votes are used as answers; judgements without such a vote are left
    # out. None: the answers to the main question, which shape is better.
    criterion: str | None = None
    # Earliest time of receipt: ISO 8601 (local time if there is no time zone), or seconds since 1970. None:
    # no restriction.
    since: str | float | None = None
    # Whose answers become labels: "people", "judges" (vision-language models) or "all".
    labels_from: str = PEOPLE

    def __post_init__(self):
        check_labels_from(self.labels_from)
        if self.least_gold_accuracy is not None and not 0 <= self.least_gold_accuracy <= 1:
            raise ValueError(
                f"least_gold_accuracy={self.least_gold_accuracy} is not in the range 0..1. Use a number from"
                " 0 to 1."
            )
        if self.min_milliseconds < 0:
            raise ValueError(
                f"min_milliseconds={self.min_milliseconds} is negative. Use a number of milliseconds >= 0."
            )
        _ = self.start  # the access raises an error for an invalid `since`

    @property
    def start(self) -> float:
        """Return the time `since` in seconds since 1970, or minus infinity if `since` is None."""
        if self.since is None:
            return -math.inf
        # The text is parsed as a number first, because fromisoformat accepts some numbers as dates, such as
        # 20250131.
        with contextlib.suppress(ValueError):
            return float(self.since)
        try:
            return datetime.fromisoformat(str(self.since)).timestamp()
        except ValueError:
            raise ValueError(
                f"since={self.since!r} is not a time. Write a date such as 2025-01-31, a time in ISO 8601,"
                " or seconds since 1970."
            ) from None

    def _selected(self, judgement_rows: Iterable[JudgementRow], mode: Mode) -> list[JudgementRow]:
        """Return the judgements of the campaign and the annotators that the filters name, in their order."""
        return [
            judgement
            for judgement in judgement_rows
            if not judgement.undone
            # A campaign that `campaign` names is used in any mode.
            and (judgement.mode == mode or judgement.campaign == self.campaign)
            and self.campaign in (None, judgement.campaign)
            and (not self.annotators or judgement.annotator in self.annotators)
        ]

    def _gold_results(self, selected_rows: Iterable[JudgementRow]) -> dict[str, list[bool]]:
        """Return the results of the gold checks by annotator; True for a correct answer.

        The results are those of all gold checks of `selected_rows`, also those that the filters of time
        remove. An annotator without an answered gold check has an empty list.
        """
        gold_results: dict[str, list[bool]] = defaultdict(list)
        for judgement in selected_rows:
            results = gold_results[judgement.annotator]
            if judgement.kind is Kind.GOLD and judgement.choice is not Choice.SKIP:
                results.append(judgement.choice.meets(judgement.expected))
        return gold_results

    def _is_trusted(self, gold_answers: Sequence[bool]) -> bool:
        """Return True if an annotator with these results of gold checks passes `least_gold_accuracy`."""
        return self.least_gold_accuracy is None or (
            bool(gold_answers) and sum(gold_answers) >= self.least_gold_accuracy * len(gold_answers)
        )

    def keep(self, judgement_rows: Iterable[JudgementRow], mode: Mode = Mode.LABEL) -> list[JudgementRow]:
        """Return the judgements that become labels, in their order.

        Args:
            judgement_rows: judgements of one or several campaigns.
            mode: mode of the campaigns whose judgements are used, if `campaign` is None.
        """
        selected_rows = self._selected(judgement_rows, mode)
        gold_results = self._gold_results(selected_rows)
        counted_kinds = (Kind.PAIR,) if self.drop_repeats else COMPARED
        label_rows = [
            judgement
            for judgement in selected_rows
            if judgement.kind in counted_kinds
            and is_used(judgement.provenance, self.labels_from)
            and judgement.choice is not Choice.SKIP
            and (judgement.judge is not None or self._is_trusted(gold_results[judgement.annotator]))
            and (judgement.judge is not None or judgement.milliseconds >= self.min_milliseconds)
            and judgement.received_at >= self.start
        ]
        return label_rows if self.criterion is None else answers_to(self.criterion, label_rows)

    def untrusted(self, judgement_rows: Iterable[JudgementRow], mode: Mode = Mode.LABEL) -> list[str]:
        """Return a sentence for each annotator whose answers `least_gold_accuracy` leaves out.

        Args: see `keep`.
        """
        selected_rows = self._selected(judgement_rows, mode)
        answer_counts = Counter(
            judgement.annotator for judgement in selected_rows if judgement.kind in COMPARED
        )
        judge_names = {judgement.annotator for judgement in selected_rows if judgement.judge is not None}
        return [
            f"all {answer_counts[name]} answers of {name} are left out: "
            + (
                f"{sum(results)} of {len(results)} gold checks correct"
                f" ({sum(results) / len(results):.0%}), below {self.least_gold_accuracy:.0%}"
                if results
                else "no gold check answered"
            )
            for name, results in sorted(self._gold_results(selected_rows).items())
            if answer_counts[name] and name not in judge_names and not self._is_trusted(results)
        ]

    def explain(self, judgement_rows: Iterable[JudgementRow], mode: Mode = Mode.LABEL) -> str:
        """Return one line on the answers that do not become labels, with their numbers and the reasons.

        Args: see `keep`.
        """
        all_rows = [judgement for judgement in judgement_rows if not judgement.undone]
        rows = self._selected(all_rows, mode)
        if not rows:
            other_count = sum(judgement.mode != mode for judgement in all_rows)
            other_text = f"; {other_count} answers belong to campaigns of another mode" if other_count else ""
            scope = "" if self.campaign is None and not self.annotators else " of this campaign or annotator"
            return f"no answers{scope} are stored{other_text}"
        kind_counts = Counter(judgement.kind for judgement in rows)
        reasons = [
            f"{kind_counts[kind]} {noun}"
            for kind, noun in ((Kind.TRAINING, "practice answers"), (Kind.GOLD, "gold checks"))
            if kind_counts[kind]
        ]
        rows = [judgement for judgement in rows if judgement.kind in COMPARED]
        # Each step counts only the answers that the steps before it have kept.
        steps: list[tuple[str, Callable[[JudgementRow], bool]]] = [
            (
                f"of {'people' if self.labels_from == JUDGES else 'judges'}"
                f" (--labels-from={self.labels_from})",
                lambda judgement: is_used(judgement.provenance, self.labels_from),
            ),
            (
                "repeats (--drop-repeats)",
                lambda judgement: not self.drop_repeats or judgement.kind is Kind.PAIR,
            ),
            ("skips", lambda judgement: judgement.choice is not Choice.SKIP),
            (
                f"faster than {self.min_milliseconds} ms",
                lambda judgement: (
                    judgement.judge is not None or judgement.milliseconds >= self.min_milliseconds
                ),
            ),
            (f"before {self.since}", lambda judgement: judgement.received_at >= self.start),
        ]
        gold_results = self._gold_results(self._selected(all_rows, mode))
        steps.append(
            (
                "by annotators who are left out",
                lambda judgement: (
                    judgement.judge is not None or self._is_trusted(gold_results[judgement.annotator])
                ),
            )
        )
        for reason, keeps in steps:
            kept_rows = [judgement for judgement in rows if keeps(judgement)]
            if len(kept_rows) < len(rows):
                reasons.append(f"{len(rows) - len(kept_rows)} {reason}")
            rows = kept_rows
        if self.criterion is not None and len(answered_rows := answers_to(self.criterion, rows)) < len(rows):
            reasons.append(f"{len(rows) - len(answered_rows)} without an answer to {self.criterion}")
            rows = answered_rows
        stored_count = kind_counts.total()
        text = f"{stored_count} answers are stored, and {len(rows)} of them become labels"
        return text + (f"; not used: {', '.join(reasons)}" if reasons else "")


def label_source(
    file_or_url: str | Path, filters: LabelFilters | None = None, choice: LabelChoice = PEOPLE_ONLY
) -> LabelSource:
    """Return a `LabelSource`, which reads the labels of a file or store when they are needed.

    Args:
        file_or_url: name of a label file, or URL of a label store.
        filters: selection of the judgements of a store; None: the default filters. Their field `labels_from`
            is not used.
        choice: selection of the labels by their origin.

    Raises:
        ValueError: `file_or_url` is a file, and a filter differs from its default.
    """
    if is_store_url(file_or_url):
        source_name = without_password(str(file_or_url))
        filters = filters or LabelFilters()
        filter_values = asdict(filters)
        # The entries of the choice state the origin, as for a file.
        del filter_values["labels_from"]
        return LabelSource(
            source_name,
            # This function opens the store when the labels are needed.
            functools.partial(read_counted_preferences, str(file_or_url), filters),
            # The record of a training contains the URL without its password.
            {"labels": source_name, "filters": filter_values, **choice.to_dict()},
            choice=choice,
        )
    # a file has no filters, so the user must not have set any
    used_filters = [
        filter_name
        for filter_name, value in asdict(filters or LabelFilters()).items()
        if value != getattr(LabelFilters(), filter_name) and filter_name != "labels_from"
    ]
    if used_filters:
        flag_text = ", ".join(
            "--campaign" if filter_name == "campaign" else f"--set {filter_name}"
            for filter_name in used_filters
        )
        raise ValueError(
            f"{flag_text}: filters can be used with a label store only, but --labels names the file"
            f" {Path(file_or_url).name}. Remove the filters, or name a store, such as"
            " --labels=sqlite:///labels.db."
        )
    return LabelSource.from_file(Path(file_or_url), choice)


def to_preference(judgement: JudgementRow) -> Preference:
    """Convert a judgement of a pair to a label in the format of `eg3d_rlhf.preferences.labels`.

    The field `extra` of the label describes the origin of the judgement (campaign, pair, times, parameters of
    the shapes). Its values are texts and numbers, so that CSV files can contain them.

    Raises:
        ValueError: the shapes are asset files or single shapes, have the same seed, differ in more than their
            seeds, or are damaged.
    """
    left_shape = judgement.left
    right_shape = judgement.right
    reject_assets(judgement, "asset-pairs")
    if judgement.choice.good is not None:
        raise ValueError(
            f"campaign {judgement.campaign} shows shapes one by one and contains no preferences. Export it"
            " with --kind=unpaired."
        )
    # A preference identifies its shapes by their seeds, so all other parameters of the two shapes must be
    # equal.
    if (
        _parameters(left_shape) != _parameters(right_shape)
        or left_shape.seed == right_shape.seed
        or left_shape.degradation
        or right_shape.degradation
    ):
        raise ValueError(
            f"judgement {judgement.id} of campaign {judgement.campaign}: a label can contain only undamaged"
            " shapes that differ in their seeds and in nothing else, which does not hold for this pair."
            " Export complete judgements with --kind=judgements."
        )
    # For a tie, `winner` is the left shape. It has no meaning then, because `tie` is True.
    winner_shape, loser_shape = (
        (right_shape, left_shape) if judgement.choice is Choice.RIGHT else (left_shape, right_shape)
    )
    chosen_side = {Choice.LEFT: "left", Choice.RIGHT: "right"}.get(judgement.choice)
    both_marker = "bad" if judgement.choice is Choice.BAD else None
    extra_fields = {
        **_origin(judgement),
        "side": chosen_side,
        "left_seed": left_shape.seed,
        "both": both_marker,
    }
    return Preference(
        winner=winner_shape.seed,
        loser=loser_shape.seed,
        generator=left_shape.generator or None,
        psi=None if math.isnan(left_shape.psi) else left_shape.psi,
        annotator=judgement.annotator,
        time=judgement.received_at,
        tie=judgement.choice.equal,
        extra={name: value for name, value in extra_fields.items() if value is not None},
    )


def _origin(judgement: JudgementRow) -> dict:
    """Return the campaign, the pair, the times and the parameters of the shapes of a judgement."""
    # Both shapes of a pair have the same parameters, see to_preference.
    shape = judgement.left
    return {
        "campaign": judgement.campaign,
        "judgement": judgement.id,
        "pair": judgement.pair,
        "kind": judgement.kind.value,
        "milliseconds": judgement.milliseconds,
        "views": " ".join(judgement.views),
        "answered_at": judgement.answered_at,
        "page_version": judgement.page_version,
        "level": None if math.isnan(shape.level) else shape.level,
        "resolution": shape.resolution,
        "triangles": shape.triangles,
        **judgement.provenance,
    }


def to_unpaired(judgement: JudgementRow, shape: Shape) -> "UnpairedPreference":
    """Convert a judgement to the label of a single shape. Its origin is stored in the field `extra`.

    Args:
        judgement: judgement of a single shape; or the judgement "both are bad" of a pair, which labels each
            of its two shapes as not good.
        shape: shape that is labelled.

    Raises:
        ValueError: the shape is an asset file.
    """
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

    score = float(judgement.choice.value) if judgement.choice.value.isdigit() else None
    label: bool | None = None
    if judgement.choice is Choice.BAD:  # both shapes of a pair
        label = False
    elif score is None:  # thumbs up or down
        label = judgement.choice.good
    else:
        # A score has no label, because the training chooses the lowest score that counts as good.
        label = None
    reject_assets(judgement, "asset-scores")
    return UnpairedPreference(
        seed=shape.seed,
        label=label,
        score=score,
        generator=shape.generator or None,
        psi=None if math.isnan(shape.psi) else shape.psi,
        annotator=judgement.annotator,
        time=judgement.received_at,
        extra={name: value for name, value in _origin(judgement).items() if value is not None},
    )


def reject_assets(judgement: JudgementRow, export_kind: str = "asset-pairs") -> None:
    """Raise ValueError if a judgement is about asset files, which have no seeds that identify them.

    Args:
        judgement: judgement that a preference cannot contain if its shapes are asset files.
        export_kind: value of --kind with which it can be exported, for the message.
    """
    if judgement.left.file or judgement.right.file:
        raise ValueError(
            f"campaign {judgement.campaign}: its shapes are asset files and not seeds of a generator. Export"
            f" it with --kind={export_kind}."
        )


def _parameters(shape: Shape) -> tuple:
    """Return the parameters that determine a shape together with its seed. A value nan becomes None."""
    shape_parameters = (shape.generator, shape.psi, shape.level, shape.resolution, shape.triangles)
    # nan is unequal to itself, so two tuples that contain it could not be compared
    return tuple(
        None if isinstance(value, float) and math.isnan(value) else value for value in shape_parameters
    )


def store_preferences(store: "Store", filters: LabelFilters | None = None) -> list[Preference]:
    """Return the labels of a store that pass the filters, in order of receipt.

    Args:
        store: label store.
        filters: selection of the judgements; None: the default filters.

    Raises:
        ValueError: the filters name something that the store does not contain, or a judgement cannot be
            written as a label (see `to_preference`).
    """
    return [
        to_preference(judgement)
        for judgement in kept_judgements(store, filters or LabelFilters(), Mode.LABEL)
    ]


def kept_judgements(store: "Store", filters: LabelFilters, mode: Mode) -> list[JudgementRow]:
    """Return the judgements of a store that become labels.

    Args:
        store: label store.
        filters: selection of the judgements.
        mode: mode that the campaigns must have.

    Raises:
        ValueError: the filters name an unknown campaign, question or annotator, or a campaign of another
            mode.
    """
    if filters.campaign is not None:
        campaign = store.campaign(filters.campaign)
        if campaign is None:
            campaign_names = (
                ", ".join(stored_campaign.settings.name for stored_campaign in store.campaigns()) or "none"
            )
            raise ValueError(
                f"campaign: the store has no campaign {filters.campaign!r}. Choose one of its campaigns:"
                f" {campaign_names}."
            )
        if campaign.settings.mode is not mode:
            raise ValueError(
                f"campaign {filters.campaign} is {MODE_NAMES[campaign.settings.mode]}, but must be"
                f" {MODE_NAMES[mode]}. Choose another campaign."
            )
    if filters.criterion is not None:
        question_names: set[str] = set()
        for stored_campaign in store.campaigns():
            if filters.campaign in (None, stored_campaign.settings.name):
                question_names |= {
                    question.name for question in parse_questions(stored_campaign.settings.questions)
                }
        if filters.criterion not in question_names:
            raise ValueError(
                f"criterion: the question {filters.criterion!r} was not asked. Choose one of the questions"
                f" that were asked: {', '.join(sorted(question_names)) or 'none'}."
            )
    # Without this check, a misspelled name would give an empty result.
    annotator_names = {annotator.name for annotator in store.annotators()}
    unknown_names = sorted(set(filters.annotators) - annotator_names)
    if unknown_names:
        raise ValueError(
            f"annotator: the store has no annotator {', '.join(unknown_names)}. Choose among its annotators:"
            f" {', '.join(sorted(annotator_names)) or 'none'}."
        )
    # The filters select by origin, so that their explanation counts the answers of all origins.
    return filters.keep(store.judgements(filters.campaign, filters.annotators, labels_from=ALL), mode)


def label_use(judgement_rows: Iterable[JudgementRow], labels_from: str = PEOPLE) -> LabelUse:
    """Count judgements of people and of judges.

    Args:
        judgement_rows: judgements of all origins, of which `labels_from` selects those that are used.
        labels_from: one of LABELS_FROM.
    """
    return select_labels(judgement_rows, lambda judgement: judgement.provenance, labels_from)[1]


def store_label_use(store: "Store", filters: LabelFilters, mode: Mode) -> LabelUse:
    """Count the judgements that would become labels, of people and of judges. See `kept_judgements`."""
    return label_use(kept_judgements(store, replace(filters, labels_from=ALL), mode), filters.labels_from)


def read_preferences(url: str, filters: LabelFilters | None = None) -> list[Preference]:
    """Return the labels of the store at a URL, in order of receipt.

    Args:
        url: URL of the store.
        filters: selection of the judgements; None: the default filters.

    Raises:
        FileNotFoundError: there is no store at the URL.
        ValueError: SQLAlchemy is not installed, or no label passes the filters.
    """
    filters = filters or LabelFilters()
    return read_counted_preferences(url, filters, LabelChoice(labels_from=filters.labels_from))[0]


def read_counted_preferences(
    url: str, filters: LabelFilters, choice: LabelChoice
) -> tuple[list[Preference], LabelUse]:
    """Return the labels of the store at a URL, and the numbers of labels of each origin.

    Args:
        url: URL of the store.
        filters: selection of the judgements; the field `labels_from` is not used.
        choice: selection of the labels by their origin.

    Raises: see `read_preferences`, and errors of the gate of `choice`.
    """
    try:
        from eg3d_rlhf.people.label.store import Store
    except ImportError as error:
        raise ValueError(
            f"--labels: reading a store needs SQLAlchemy ({error}). Run pip install 'eg3d-rlhf[label]'."
        ) from None
    filters = replace(filters, labels_from=choice.labels_from)
    with Store.open(url, create=False) as store:
        all_labels = store_preferences(store, replace(filters, labels_from=ALL))
        labels, use = choice.select(all_labels, lambda label: label.extra)
        if not labels:
            raise ValueError(
                f"{without_password(url)}: no label passes the filters:"
                f" {why_left_out(store, filters, Mode.LABEL)}. Label some pairs first, or"
                " remove some of the filters."
            )
    return labels, use


def why_left_out(store: "Store", filters: LabelFilters, mode: Mode) -> str:
    """Return one line on the answers of a store that do not become labels, and on the annotators left out."""
    judgement_rows = list(store.judgements(filters.campaign, filters.annotators, labels_from=ALL))
    return "; ".join([filters.explain(judgement_rows, mode), *filters.untrusted(judgement_rows, mode)])


def export_mode(kind: str, from_pairs: bool = False) -> Mode:
    """Return the mode of the campaigns that an export reads.

    Args:
        kind: value of --kind of the export.
        from_pairs: True if labels of single shapes are made from pairs.
    """
    return Mode.SINGLE if kind in ("unpaired", "asset-scores") and not from_pairs else Mode.LABEL


def export_labels(store: "Store", path: str | Path, **filters) -> Path:
    """Write the labels of a store into a file, and return its path.

    The format is that of `eg3d_rlhf.preferences.labels`. Further fields of the labels describe the origin of
    each judgement.

    Args:
        store: label store.
        path: file with the suffix .jsonl or .csv.
        filters: keyword arguments of `LabelFilters`, which select the labels; none: the default selection.
    """
    return write_labels(path, store_preferences(store, LabelFilters(**filters)))


def export_unpaired(store: "Store", path: str | Path, from_pairs: bool = False, **filters) -> Path:
    """Write the labels of single shapes, and return the path of the file.

    Further fields of the labels describe the origin of each judgement.

    Args:
        store: label store.
        path: file with the suffix .jsonl.
        from_pairs: False uses campaigns of single shapes. True uses campaigns of pairs: an answer that both
            shapes are bad labels both of them as not good.
        filters: keyword arguments of `LabelFilters`, which select the labels; none: the default selection.
    """
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    judgement_rows = kept_judgements(store, LabelFilters(**filters), export_mode("unpaired", from_pairs))
    if from_pairs:
        bad_rows = [judgement for judgement in judgement_rows if judgement.choice is Choice.BAD]
        labels = [
            to_unpaired(judgement, shape)
            for judgement in bad_rows
            for shape in (judgement.left, judgement.right)
        ]
    else:
        labels = [to_unpaired(judgement, judgement.left) for judgement in judgement_rows]
    return write_unpaired(path, labels)


# ---- judgements of assets in files that trainings read, as JSON lines:
#
#     asset-pairs    {"condition", "prompt", "preferred", "rejected", "tie", ...}
#                    trainings of rewards of images
#     rankings       {"condition", "rank", "asset", "strength", "judgements", ...}
#                    eg3d-rlhf flow tune --labels
#     asset-scores   {"mesh", "prompt", "score" or "label", ...}
#                    eg3d-rlhf reward mesh --data
#
# The path of an asset below the folder of the file is relative to that folder, and absolute otherwise. Lines
# about an asset that `eg3d-rlhf flow sample` generated also contain the paths of its latents, from the list
# of that command.

SAMPLE_LIST = "ranking.jsonl"  # file in which `eg3d-rlhf flow sample` lists its samples
PATH_FIELDS = ("structure", "latent", "latents", "look_at", "asset")  # fields of this list that are paths
WritePath = Callable[[Path | str], str]  # (path) -> text that is written into a file of labels


def export_assets(store: "Store", path: Path, label_format: str, from_pairs: bool = False, **filters) -> Path:
    """Write the judgements of asset files as JSON lines, and return the path of the file.

    Args:
        store: label store.
        path: file; the paths of assets below its folder are written relative to this folder.
        label_format: format of the lines: "asset-pairs", "rankings" or "asset-scores".
        from_pairs: for "asset-scores": False uses campaigns of single shapes. True uses campaigns of pairs:
            an answer that both shapes are bad labels both of them as bad.
        filters: keyword arguments of `LabelFilters`, which select the labels; none: the default selection.

    Raises:
        ValueError: no judgement of asset files passes the filters.
    """
    campaign_mode = export_mode(label_format, from_pairs)
    judgement_rows = kept_judgements(store, LabelFilters(**filters), campaign_mode)
    if from_pairs:
        # Each pair of two bad shapes becomes two judgements of a single shape, which is stored in `left`.
        bad_rows = [judgement for judgement in judgement_rows if judgement.choice is Choice.BAD]
        judgement_rows = [
            replace(judgement, left=shape)
            for judgement in bad_rows
            for shape in (judgement.left, judgement.right)
        ]
    # samples of a generator have no file whose path could be written
    judgement_rows = [judgement for judgement in judgement_rows if judgement.left.file]
    if not judgement_rows:
        raise ValueError(
            f"--kind={label_format}: no judgement of asset files passes the filters"
            f" ({why_left_out(store, LabelFilters(**filters), campaign_mode)}). Remove some of the filters,"
            " or label asset files with --assets."
        )
    # name of a campaign -> its prompts
    prompts_by_campaign = {
        campaign.settings.name: campaign.settings.extra.get("conditions", {})
        for campaign in store.campaigns()
    }

    def write_asset_path(asset_path: Path | str) -> str:
        asset_path = Path(asset_path).resolve()
        folder = path.parent.resolve()
        # A folder that contains assets and labels can be moved if the paths are relative.
        return str(asset_path.relative_to(folder)) if asset_path.is_relative_to(folder) else str(asset_path)

    label_lines = (
        rankings(judgement_rows, write_asset_path)
        if label_format == "rankings"
        else [
            KINDS[label_format](judgement, prompt_of(judgement, prompts_by_campaign), write_asset_path)
            for judgement in judgement_rows
        ]
    )
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in label_lines).encode())
    return path


def export_pairs(store: "Store", path: Path, **filters) -> Path:
    """Write judgements of pairs of assets as the open format pairs.jsonl, and return the path of the file.

    Each line is one vote: winner and loser (paths of the assets, relative to the folder of the file where
    they lie below it), prompt, criterion, weight (1; 0.5 for a tie), tie, annotator, provenance ("people" or
    "model: NAME") and source_row (number of the judgement). The votes on further questions are lines of their
    own.

    Args:
        store: label store.
        path: file with the suffix .jsonl.
        filters: keyword arguments of `LabelFilters`, which select the judgements.

    Raises:
        ValueError: no judgement of asset files passes the filters.
    """
    label_filters = LabelFilters(**filters)
    judgement_rows = [
        judgement for judgement in kept_judgements(store, label_filters, Mode.LABEL) if judgement.left.file
    ]
    if not judgement_rows:
        raise ValueError(
            f"no judgement of asset files passes the filters"
            f" ({why_left_out(store, label_filters, Mode.LABEL)})."
            " Remove some of the filters, or label asset files."
        )
    prompts_by_campaign = {
        campaign.settings.name: campaign.settings.extra.get("conditions", {})
        for campaign in store.campaigns()
    }
    folder = path.parent.resolve()

    def write_asset_path(asset_path: str) -> str:
        resolved = Path(asset_path).resolve()
        return str(resolved.relative_to(folder)) if resolved.is_relative_to(folder) else str(resolved)

    pairs = []
    for judgement in judgement_rows:
        prompt = prompt_of(judgement, prompts_by_campaign)
        # A criterion that the filters name has replaced the choice, and its origin, already.
        pairs.append(
            _asset_pair(judgement, prompt, label_filters.criterion or OVERALL, judgement.choice.value, "")
        )
        if not label_filters.criterion:
            pairs += [
                _asset_pair(judgement, prompt, name, vote, name) for name, vote in judgement.votes.items()
            ]
    return write_asset_votes(
        path,
        (
            replace(pair, winner=write_asset_path(str(pair.winner)), loser=write_asset_path(str(pair.loser)))
            for pair in pairs
        ),
    )


def _asset_pair(judgement: JudgementRow, prompt: str, criterion: str, vote: str, question: str) -> AssetPair:
    """Return one vote of pairs.jsonl.

    Args:
        judgement: judgement of two assets.
        prompt: text of the prompt.
        criterion: name of the question, which people and judges share.
        vote: "left", "right", or another choice, which is a tie.
        question: name of the question in the origin of a judge's answer; "" for the choice.
    """
    winner, loser = (
        (judgement.right, judgement.left) if vote == Choice.RIGHT.value else (judgement.left, judgement.right)
    )
    is_tie = vote not in (Choice.LEFT.value, Choice.RIGHT.value)
    origin = judgement.provenance_of(question)
    judge_fields = {name: value for name, value in origin.items() if name not in ("provenance", "criterion")}
    if origin:
        # the judge's own criterion, to which its calibration belongs
        judge_fields["judge_criterion"] = origin["criterion"]
    return AssetPair(
        winner=winner.source,
        loser=loser.source,
        prompt=prompt,
        criterion=criterion,
        weight=0.5 if is_tie else 1.0,
        tie=is_tie,
        annotator=judgement.annotator,
        provenance=origin.get("provenance", PEOPLE),
        source_row=judgement.id,
        extra=judge_fields,
    )


def prompt_of(judgement: JudgementRow, prompts_by_campaign: Mapping[str, Mapping]) -> str:
    """Return the text of a judgement's prompt, or the prompt's name if it is an image without a text.

    Args:
        judgement: judgement of asset files.
        prompts_by_campaign: name of a campaign -> name of a prompt -> prompt, with its "text".
    """
    return (
        prompts_by_campaign.get(judgement.campaign, {}).get(judgement.left.condition, {}).get("text")
        or judgement.left.condition
    )


def to_pair(judgement: JudgementRow, prompt: str, write_path: WritePath) -> dict:
    """Convert a judgement of two assets to a line of the format asset-pairs.

    Args:
        judgement: judgement of a pair of assets.
        prompt: text of the prompt.
        write_path: function (path) -> text that is written.
    """
    winner_shape, loser_shape = (
        (judgement.right, judgement.left)
        if judgement.choice is Choice.RIGHT
        else (judgement.left, judgement.right)
    )
    label_fields = {
        "condition": judgement.left.condition,
        "prompt": prompt,
        "preferred": write_path(winner_shape.source),
        "rejected": write_path(loser_shape.source),
        "tie": judgement.choice not in (Choice.LEFT, Choice.RIGHT),
        "preferred_generator": winner_shape.generator,
        "rejected_generator": loser_shape.generator,
    }
    return {**label_fields, "choice": judgement.choice.value, **_provenance(judgement)}


def to_score(judgement: JudgementRow, prompt: str, write_path: WritePath) -> dict:
    """Convert a judgement of one asset, `judgement.left`, to a line of the format asset-scores.

    Args:
        judgement: judgement of one asset; of its two shapes, only `left` is used.
        prompt: text of the prompt.
        write_path: function (path) -> text that is written.
    """
    rating_fields: dict = (
        {"score": float(judgement.choice.value)}
        if judgement.choice.value.isdigit()
        else {"label": int(bool(judgement.choice.good))}
    )
    label_fields = {
        "mesh": write_path(judgement.left.source),
        "prompt": prompt,
        **rating_fields,
        "generator": judgement.left.generator,
        "condition": judgement.left.condition,
    }
    return {**label_fields, **_provenance(judgement)}


KINDS = {"asset-pairs": to_pair, "asset-scores": to_score}


def _provenance(judgement: JudgementRow) -> dict:
    """Return the fields that describe the origin of a judgement. Empty votes and comments are left out."""
    origin_fields = {
        "annotator": judgement.annotator,
        "time": judgement.received_at,
        "campaign": judgement.campaign,
        "judgement": judgement.id,
        "kind": judgement.kind.value,
    }
    return {
        **origin_fields,
        **judgement.provenance,
        **{
            name: value
            for name, value in (("votes", judgement.votes), ("comment", judgement.comment))
            if value
        },
    }


def rankings(judgement_rows: Sequence[JudgementRow], write_path: WritePath = str) -> list[dict]:
    """Rank the compared assets of each prompt, and return one line per asset, best first.

    The rank of an asset follows from its Bradley-Terry strength; equal strengths get equal ranks. Strengths
    can be compared only between assets that are linked by a chain of comparisons. If there are several such
    groups of a prompt, only the largest group is ranked.

    Args:
        judgement_rows: judgements of pairs of assets.
        write_path: function (path) -> text that is written.

    Returns:
        Lines of the format rankings, in JSON types.
    """
    from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
    from eg3d_rlhf.preferences.label_scores import linked

    # name of a prompt -> judgements; assets of different prompts are never compared
    rows_by_prompt: dict[str, list[JudgementRow]] = defaultdict(list)
    for judgement in judgement_rows:
        rows_by_prompt[judgement.left.condition].append(judgement)
    ranking_lines = []
    sample_lists = _SampleLists()
    for prompt_name, prompt_rows in rows_by_prompt.items():
        # an asset is identified by its path
        shape_by_path = {
            shape.source: shape for judgement in prompt_rows for shape in (judgement.left, judgement.right)
        }
        all_comparisons = []
        for judgement in prompt_rows:
            winner_shape, loser_shape = (
                (judgement.right, judgement.left)
                if judgement.choice is Choice.RIGHT
                else (judgement.left, judgement.right)
            )
            is_tie = judgement.choice not in (Choice.LEFT, Choice.RIGHT)
            all_comparisons.append(Comparison(winner_shape.source, loser_shape.source, is_tie))
        # the linked group with the most assets
        comparisons = max(linked(all_comparisons), key=_asset_count)
        strength_fit = bradley_terry(comparisons)
        # Strengths that differ only by the tolerance of the solver become equal by rounding.
        strength_by_path = dict(
            zip(map(str, strength_fit.items), strength_fit.strength.round(9).tolist(), strict=True)
        )
        # Assets of equal strength are ordered by their path, so that every export gives the same file.
        for asset_path in sorted(strength_by_path, key=lambda source: (-strength_by_path[source], source)):
            ranking_fields = {
                "condition": prompt_name,
                "rank": 1
                + sum(
                    other_strength > strength_by_path[asset_path]
                    for other_strength in strength_by_path.values()
                ),
                "generator": shape_by_path[asset_path].generator,
                "strength": strength_by_path[asset_path],
                "judgements": sum(
                    asset_path in (comparison.winner, comparison.loser) for comparison in comparisons
                ),
            }
            # A sample of a flow gets the fields of its list, and another asset gets only its path.
            sample_fields = sample_lists.fields_of(shape_by_path[asset_path], write_path)
            ranking_lines.append({**(sample_fields or {"asset": write_path(asset_path)}), **ranking_fields})
    return ranking_lines


def _asset_count(comparisons: Iterable["Comparison"]) -> int:
    """Count the different assets in comparisons."""
    asset_paths: set = set()
    for comparison in comparisons:
        asset_paths |= {comparison.winner, comparison.loser}
    return len(asset_paths)


class _SampleLists:
    """Cache of the lists in which `eg3d-rlhf flow sample` describes its samples."""

    def __init__(self):
        # folder -> name of the file that annotators see -> line of the list
        self._lists: dict[Path, dict[str, dict]] = {}

    def fields_of(self, shape: Shape, write_path: WritePath) -> dict:
        """Return the line of an asset in the list of its folder, or {} if it is in no list.

        Args:
            shape: asset.
            write_path: function that converts the paths in the line.
        """
        asset_path = Path(shape.source)
        if asset_path.parent not in self._lists:
            self._lists[asset_path.parent] = {
                str(list_line.get("look_at")): list_line
                for list_line in _lines(asset_path.parent / SAMPLE_LIST)
            }
        # annotators have seen the file `look_at` of a sample
        list_line = self._lists[asset_path.parent].get(asset_path.name, {})
        return {
            name: write_path(asset_path.parent / value)
            if name in PATH_FIELDS and isinstance(value, str)
            else value
            for name, value in list_line.items()
            # A rank in the list is of an earlier export. `rankings` adds the new rank.
            if name != "rank"
        }


def _lines(path: Path) -> Iterable[dict]:
    """Read the JSON objects of a file of JSON lines. Returns an empty list if there is no such file."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # another program may have written the file, so lines that are not JSON objects are ignored
    return [line for line in lines if isinstance(line, dict)]
