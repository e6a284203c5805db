"""Origin of labels: people, or a judge (a vision-language model that stands where an annotator stands).

Labels of judges never count as labels of people. Every reader of labels selects one origin, by default
people, and reports how many labels of each origin it found and used.

A record of a label states its origin in these fields. A record without them is a label of people, as in all
files of earlier versions. Labels of a simulated annotator have no such fields, either.

| field       | meaning                                                                                  |
| ----------- | ---------------------------------------------------------------------------------------- |
| provenance  | "people", "model: NAME" for a judge, or "unknown"                                        |
| judge       | SHA-256, in hex, of the judge: its model, questions, views and settings                  |
| calibration | SHA-256, in hex, of the calibration file that was passed when the judge labelled         |
| answer      | SHA-256, in hex, of the judge's stored answers, from which the label was made            |
| criterion   | criterion about which the judge was asked                                                |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

PEOPLE = "people"
JUDGES = "judges"
UNKNOWN = "unknown"
ALL = "all"
LABELS_FROM = (PEOPLE, JUDGES, ALL)  # values of --labels-from
MODEL_PREFIX = "model: "  # start of the field provenance of a label of a judge
# fields of a record that describe a judge's label, besides the field provenance
JUDGE_FIELDS = ("judge", "calibration", "answer", "criterion")
Label = TypeVar("Label")
# Function that raises ValueError if some labels of judges may not be used, see `people.judge.gate`.
Gate = Callable[[Sequence[Mapping[str, Any]]], None]


def origin_of(record: Mapping[str, Any]) -> str:
    """Return the origin of a label: PEOPLE, JUDGES or UNKNOWN.

    Raises: ValueError if the field provenance has another value than those in the table of the module.

    >>> origin_of({}), origin_of({"provenance": "model: qwen2.5-vl"}), origin_of({"provenance": "unknown"})
    ('people', 'judges', 'unknown')
    """
    provenance = record.get("provenance", PEOPLE)
    # an empty cell of a table, and JSON's null, state nothing
    if provenance in ("", None, PEOPLE):
        return PEOPLE
    if provenance == UNKNOWN:
        return UNKNOWN
    if isinstance(provenance, str) and provenance.startswith(MODEL_PREFIX):
        return JUDGES
    raise ValueError(
        f'expected provenance to be "people", "model: NAME" or "unknown", got {provenance!r}. Correct the'
        " field provenance, or remove it from labels of people."
    )


def check_labels_from(labels_from: str) -> None:
    """Raise ValueError if `labels_from` is none of LABELS_FROM."""
    if labels_from not in LABELS_FROM:
        raise ValueError(
            f"labels_from={labels_from!r} is unknown. Use one of {', '.join(map(repr, LABELS_FROM))}."
        )


@dataclass(frozen=True, kw_only=True)
class LabelUse:
    """Numbers of labels of each origin in a source, and the selection of those that are used."""

    labels_from: str = PEOPLE  # one of LABELS_FROM
    people: int = 0  # number of labels of people in the source
    unknown: int = 0  # number of labels of unknown origin; they are used only with ALL
    models: Mapping[str, int] = field(default_factory=dict)  # name of a judge's model -> number of labels
    # True if labels of judges are used without a calibration that has passed the gate
    uncalibrated: bool = False

    @property
    def judges(self) -> int:
        """Number of labels of judges in the source."""
        return sum(self.models.values())

    @property
    def used(self) -> dict[str, int]:
        """Numbers of the used labels by origin."""
        return {
            PEOPLE: self.people if self.labels_from != JUDGES else 0,
            JUDGES: self.judges if self.labels_from != PEOPLE else 0,
            UNKNOWN: self.unknown if self.labels_from == ALL else 0,
        }

    def __add__(self, other: "LabelUse") -> "LabelUse":
        """Add the numbers of two sources with the same selection."""
        return LabelUse(
            labels_from=self.labels_from,
            people=self.people + other.people,
            unknown=self.unknown + other.unknown,
            models=dict(Counter(self.models) + Counter(other.models)),
            uncalibrated=self.uncalibrated or other.uncalibrated,
        )

    def text(self, noun: str = "labels") -> str:
        """Return one line: how many labels of people and of judges are used, and how many are left out.

        >>> LabelUse(people=40, models={"qwen": 7}).text().partition("; ")[2]
        'left out by --labels-from=people: 7 of judges (qwen)'
        """
        used = self.used
        available = {PEOPLE: self.people, JUDGES: self.judges, UNKNOWN: self.unknown}
        model_text = f" ({', '.join(sorted(self.models))})" if self.models else ""
        # Files do not distinguish simulated annotators and people, so the text names both.
        origin_texts = {
            PEOPLE: "people or simulated annotators",
            JUDGES: f"judges{model_text}",
            UNKNOWN: "unknown origin",
        }
        used_texts = [
            f"{used[origin]} of"
            f" {origin_texts[origin] if used[origin] else origin_texts[origin].split(' (')[0]}"
            for origin in (PEOPLE, JUDGES, *([UNKNOWN] if used[UNKNOWN] else []))
        ]
        left_out_texts = [
            f"{available[origin] - used[origin]} of {origin_texts[origin]}"
            for origin in available
            if available[origin] > used[origin]
        ]
        text = f"{noun} used: {', '.join(used_texts)}"
        if left_out_texts:
            text += f"; left out by --labels-from={self.labels_from}: {', '.join(left_out_texts)}"
        if self.uncalibrated and used[JUDGES]:
            text += "; the judges' labels are UNCALIBRATED: no calibration against people has passed the gate"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values, for the record of a training and for reports."""
        return {
            "labels_from": self.labels_from,
            "used": self.used,
            "left_out": {
                origin: count - self.used[origin]
                for origin, count in (
                    (PEOPLE, self.people),
                    (JUDGES, self.judges),
                    (UNKNOWN, self.unknown),
                )
            },
            "judges": dict(self.models),
            "uncalibrated": self.uncalibrated and self.used[JUDGES] > 0,
        }


def is_used(record: Mapping[str, Any], labels_from: str) -> bool:
    """Return True if a label of this origin is used by a reader with the selection `labels_from`."""
    return labels_from == ALL or origin_of(record) == labels_from


def select_labels(
    labels: Iterable[Label],
    record_of: Callable[[Label], Mapping[str, Any]],
    labels_from: str = PEOPLE,
    gate: Gate | None = None,
    uncalibrated: bool = False,
) -> tuple[list[Label], LabelUse]:
    """Select labels by their origin.

    Args:
        labels: labels of any kind.
        record_of: function that returns the fields of a label that are described in the table of the module.
        labels_from: one of LABELS_FROM.
        gate: function that raises ValueError if the selected labels of judges may not be used; None: no test,
            for readers that train nothing.
        uncalibrated: True if the user has chosen to use labels of judges without a calibration.
    Returns: the selected labels in their order, and the numbers of labels of each origin.
    Raises: ValueError for an unknown origin or selection, and errors of `gate`.
    """
    check_labels_from(labels_from)
    selected = []
    judge_records = []
    origin_counts: Counter[str] = Counter()
    model_counts: Counter[str] = Counter()
    for label in labels:
        record = record_of(label)
        origin = origin_of(record)
        origin_counts[origin] += 1
        if origin == JUDGES:
            model_counts[str(record["provenance"]).removeprefix(MODEL_PREFIX)] += 1
        if labels_from in (ALL, origin):
            selected.append(label)
            if origin == JUDGES:
                judge_records.append(record)
    if judge_records and gate is not None:
        gate(judge_records)
    use = LabelUse(
        labels_from=labels_from,
        people=origin_counts[PEOPLE],
        unknown=origin_counts[UNKNOWN],
        models=dict(model_counts),
        uncalibrated=uncalibrated,
    )
    return selected, use


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """Selection of labels by their origin, as the flags of a command state it."""

    labels_from: str = PEOPLE  # one of LABELS_FROM
    # True uses labels of judges although no calibration of the judge has passed
    uncalibrated: bool = False
    calibrations: tuple[str, ...] = ()  # paths of calibration files
    # Function that raises ValueError if labels of judges may not be used; None: no test. It follows from the
    # other fields, so it takes no part in comparisons.
    gate: Gate | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_labels_from(self.labels_from)

    def select(
        self, labels: Iterable[Label], record_of: Callable[[Label], Mapping[str, Any]]
    ) -> tuple[list[Label], LabelUse]:
        """Select labels, see `select_labels`."""
        return select_labels(labels, record_of, self.labels_from, self.gate, self.uncalibrated)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the record of a training; {} for labels of people, as in earlier versions."""
        if self.labels_from == PEOPLE:
            return {}
        return {
            "labels_from": self.labels_from,
            "calibrations": list(self.calibrations),
            "uncalibrated": self.uncalibrated,
        }


PEOPLE_ONLY = LabelChoice()
EVERYTHING = LabelChoice(labels_from=ALL)  # for copies of labels that were selected before


def check_not_empty(selected: Sequence[object], use: LabelUse, name: str) -> None:
    """Raise ValueError if a source has labels, but none of the selected origin.

    Args:
        selected: selected labels.
        use: numbers of labels of each origin.
        name: name of the source for the message.
    """
    if not selected and (use.people or use.judges or use.unknown):
        raise ValueError(
            f"{name}: no label is left by --labels-from={use.labels_from}; the source has {use.people} labels"
            f" of people, {use.judges} of judges and {use.unknown} of unknown origin. Use another value of"
            " --labels-from."
        )
