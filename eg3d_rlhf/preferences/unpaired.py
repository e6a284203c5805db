"""Labels of single shapes: preferred or not preferred (thumbs), or scores. One JSON object per line.

Labels of pairs are in `eg3d_rlhf.preferences.labels`.

| field     | meaning                                                                                        |
| --------- | ---------------------------------------------------------------------------------------------- |
| seed      | seed of the shape, z = RandomState(seed).randn(z_dim); required                                |
| label     | 1 or true if the shape is preferred, 0 or false if it is not; this or score is required        |
| score     | 0 to 5; a shape is preferred from 4.0 upwards, not preferred up to 3.5, and not used otherwise |
| generator | SHA-256, in hex, of the weights of the generator of the shape                                  |
| psi       | truncation with which the shape was generated                                                  |
| annotator | name of the person or program that gave the label                                              |
| time      | ISO 8601 text, or seconds since 1970                                                           |
| clean     | 1 or 0, the label that an annotator without noise gives                                        |

All other fields are stored in `extra` and written again.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.preferences import BAD, GOOD
from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
from eg3d_rlhf.preferences.dataset import SPLITS, Splits
from eg3d_rlhf.preferences.labels import (
    CSV_SUFFIXES,
    JSONL_SUFFIXES,
    LabelSource,
    Preference,
    check_psi,
    check_seed,
    common_fields,
    jsonl_records,
    parse_number,
    parse_seed,
    read_labels,
    read_records,
)
from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, LabelUse, check_not_empty
from training.storage import write_atomic

FIELDS = ("seed", "label", "score", "generator", "psi", "annotator", "time", "clean")
SCALE = 5.0  # the best score
# Share of the shapes that both won and lost in pairs which get no label: those around the median strength
MIDDLE = 0.2


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """A label of one shape. The fields are described in the table of the module.

    Raises: ValueError for a value that is not allowed.
    """

    seed: int
    # Exactly one of label and score is stated.
    label: bool | None = None
    score: float | None = None
    # A field that is None was not stated.
    generator: str | None = None
    psi: float | None = None
    annotator: str | None = None
    time: str | float | None = None
    clean: bool | None = None
    # Further fields of the record. They are not hashed, since a dict has no hash.
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.label is None and self.score is None:
            raise ValueError(
                f"the fields label and score are missing. Write a label of 1 or 0, or a score from 0 to"
                f" {SCALE:g}."
            )
        if self.label is not None and self.score is not None:
            raise ValueError(
                f"expected a label or a score, got both: the label {self.label} and the score {self.score:g}."
                " Remove the field label or the field score."
            )
        if self.score is not None and not 0 <= self.score <= SCALE:
            raise ValueError(
                f"expected a score from 0 to {SCALE:g}, got {self.score:g}. Rescale the scores to this range."
            )
        check_psi(self.psi)

    @property
    def preferred(self) -> bool | None:
        """True if the shape is preferred, False if it is not, None for a score between both thresholds."""
        if self.score is None:
            return self.label
        if self.score >= GOOD:
            return True
        return False if self.score <= BAD else None

    @property
    def target(self) -> float:
        """Reward in 0..1 that corresponds to the label: 0 or 1, or the score divided by the best score."""
        return float(bool(self.label)) if self.score is None else self.score / SCALE

    def to_dict(self) -> dict[str, Any]:
        """Return the label as JSON values, with 1 and 0 for truth values, without fields that are None."""
        json_values = {}
        for name in FIELDS:
            field_value = getattr(self, name)
            if field_value is not None:
                json_values[name] = int(field_value) if isinstance(field_value, bool) else field_value
        return {**json_values, **self.extra}


def load_unpaired(path: str | Path, choice: LabelChoice = PEOPLE_ONLY) -> list[UnpairedPreference]:
    """Read labels of single shapes from a .jsonl file.

    If the file is a .csv file, or if its first record is a label of a pair, labels of pairs are read and
    converted by `from_pairs`.

    Args:
        path: the file.
        choice: selection of the labels by their origin; by default labels of judges are left out.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names the line, for a record that
        is not valid, and for a file without labels.
    """
    return read_unpaired(path, choice)[0]


def read_unpaired(
    path: str | Path, choice: LabelChoice = PEOPLE_ONLY
) -> tuple[list[UnpairedPreference], LabelUse]:
    """Read labels of single shapes, and count the labels of each origin. See `load_unpaired`."""
    path = Path(path)
    read_jsonl = functools.partial(jsonl_records, example="{'seed': ..., 'label': ...}")
    has_pairs = path.suffix.lower() in CSV_SUFFIXES
    if not has_pairs and path.is_file():
        # Only labels of pairs have a winner. An empty file has no first record.
        first_record = next((label_record for _, label_record in read_jsonl(path)), {})
        has_pairs = "winner" in {name.strip().lower() for name in first_record}
    if has_pairs:
        pair_labels, use = read_labels(path, choice)
        return from_pairs(pair_labels), use
    all_labels = read_records(path, dict.fromkeys(JSONL_SUFFIXES, read_jsonl), _parse, "shapes")
    labels, use = choice.select(all_labels, lambda label: label.extra)
    check_not_empty(labels, use, path.name)
    return labels, use


def write_unpaired(path: str | Path, labels: Iterable[UnpairedPreference]) -> Path:
    """Write labels to a .jsonl file, atomically. Return the path.

    Raises: ValueError for a file name with any other ending.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"write_unpaired: expected a file name with the ending .jsonl, got {path.name}. Use, for example,"
            f" {path.stem}.jsonl."
        )
    write_atomic(path, "".join(json.dumps(label.to_dict()) + "\n" for label in labels).encode())
    return path


def _parse(label_record: Mapping[str, Any]) -> UnpairedPreference:
    """Create a label from a record.

    Raises: ValueError for a record that is not valid; the caller adds file and line to the message.
    """
    if label_record.get("seed") is None:
        raise ValueError("the field seed is missing. Add the seed with which the shape was generated.")
    return UnpairedPreference(
        seed=parse_seed(label_record["seed"], "seed"),
        label=_parse_truth(label_record, "label"),
        score=parse_number(label_record, "score"),
        clean=_parse_truth(label_record, "clean"),
        **common_fields(label_record, FIELDS),
    )


def _parse_truth(label_record: Mapping[str, Any], name: str) -> bool | None:
    """Return the field `name` as a truth value, or None if it is missing.

    Raises: ValueError for a value that is neither 1, 0, true nor false.
    """
    field_value = label_record.get(name)
    # In Python, True == 1 and False == 0, so true and false are accepted, too.
    if field_value not in (None, 0, 1):
        raise ValueError(
            f"expected {name} to be 1 or 0, got {field_value!r}. Write 1 or 0; for ratings on a scale use the"
            " field score."
        )
    return None if field_value is None else bool(field_value)


def from_pairs(labels: Sequence[Preference]) -> list[UnpairedPreference]:
    """Convert labels of pairs to labels of single shapes.

    A shape that won all of its comparisons is preferred, and a shape that lost all of them is not. Shapes
    that both won and lost are ordered by their Bradley-Terry strength: the upper two fifths are preferred,
    the lower two fifths are not, and the middle fifth gets no label. Ties count for the strength only.

    Returns: at most one label per shape, sorted by generator and seed.
    """
    # A shape is identified by (hash of the generator, seed). Its results are True for a win and False for a
    # loss.
    outcomes_of_shape: dict[tuple[str, int], set[bool]] = defaultdict(set)
    first_label_of_shape: dict[tuple[str, int], Preference] = {}
    for label in labels:
        for seed, has_won in ((label.winner, True), (label.loser, False)):
            shape_key = (label.generator or "", seed)
            first_label_of_shape.setdefault(shape_key, label)
            # The entry exists also for a shape that has only ties.
            outcomes_of_shape[shape_key] |= set() if label.tie else {has_won}
    mixed_shapes = [
        shape_key for shape_key, shape_outcomes in outcomes_of_shape.items() if len(shape_outcomes) == 2
    ]
    # Shapes with results of one kind only
    is_preferred_of_shape = {
        shape_key: next(iter(shape_outcomes))
        for shape_key, shape_outcomes in outcomes_of_shape.items()
        if len(shape_outcomes) == 1
    }
    if mixed_shapes:
        comparisons = [
            Comparison((label.generator or "", label.winner), (label.generator or "", label.loser), label.tie)
            for label in labels
        ]
        fitted_strengths = bradley_terry(comparisons)
        strength_of_shape = dict(zip(fitted_strengths.items, fitted_strengths.strength, strict=True))
        # Quantiles that bound the middle fifth of these shapes
        middle_start, middle_end = np.quantile(
            [strength_of_shape[shape_key] for shape_key in mixed_shapes], [0.5 - MIDDLE / 2, 0.5 + MIDDLE / 2]
        )
        for shape_key in mixed_shapes:
            if not middle_start <= strength_of_shape[shape_key] <= middle_end:
                is_preferred_of_shape[shape_key] = strength_of_shape[shape_key] > middle_end
    return [
        UnpairedPreference(
            seed=seed,
            label=bool(is_preferred_of_shape[generator, seed]),
            generator=first_label_of_shape[generator, seed].generator,
            psi=first_label_of_shape[generator, seed].psi,
            annotator=first_label_of_shape[generator, seed].annotator,
        )
        for generator, seed in sorted(is_preferred_of_shape)
    ]


def to_pairs(labels: Sequence[UnpairedPreference], seed: int = 0) -> list[Preference]:
    """Form random pairs of a preferred shape and one that is not preferred. No shape is in two pairs.

    The accuracy of a reward is measured on these pairs if there are no labels of pairs. Shapes with
    contradictory labels are left out.

    Args:
        labels: labels of single shapes.
        seed: seed of the random pairing.
    Raises: ValueError if, without the contradictory labels, no shape is preferred or all shapes are.
    """
    # A separate stream of random numbers: the number 1 distinguishes it from other uses of the seed.
    rng = np.random.default_rng([seed, 1])
    good_labels = {label.seed: label for label in labels if label.preferred is True}
    bad_labels = {label.seed: label for label in labels if label.preferred is False}
    good_seeds = set(good_labels) - set(bad_labels)
    bad_seeds = set(bad_labels) - set(good_labels)
    if not good_seeds or not bad_seeds:
        raise ValueError(
            "unpaired labels: expected labels of preferred shapes and of shapes that are not preferred, got"
            f" {len(good_seeds)} preferred shapes and {len(bad_seeds)} other shapes (shapes whose labels"
            " contradict each other are left out). Label more shapes."
        )
    winners = rng.permutation(sorted(good_seeds)).tolist()
    losers = rng.permutation(sorted(bad_seeds)).tolist()
    # zip is not strict: surplus shapes of either kind remain without a pair.
    return [
        Preference(
            winner=winner,
            loser=loser,
            generator=good_labels[winner].generator,
            psi=good_labels[winner].psi,
            clean=_clean_winner(good_labels[winner], bad_labels[loser]),
        )
        for winner, loser in zip(winners, losers, strict=False)
    ]


def unpaired_source(path: Path, seed: int = 0, choice: LabelChoice = PEOPLE_ONLY) -> LabelSource:
    """Create a source of pairs from labels of single shapes, for a training without labels of pairs.

    Args:
        path: file of labels of single shapes.
        seed: seed of the random pairing, see `to_pairs`.
        choice: selection of the labels by their origin.
    """

    def read_pairs(choice: LabelChoice) -> tuple[list[Preference], LabelUse]:
        labels, use = read_unpaired(path, choice)
        return to_pairs(labels, seed), use

    return LabelSource(
        path.name, read_pairs, {"labels": str(path), "filters": None, **choice.to_dict()}, path, choice
    )


def _clean_winner(first_label: UnpairedPreference, second_label: UnpairedPreference) -> int | None:
    """Return the seed of the shape that an annotator without noise prefers.

    Return None if a label does not state this, or if both shapes are equally good.
    """
    if first_label.clean is None or second_label.clean is None or first_label.clean == second_label.clean:
        return None
    return first_label.seed if first_label.clean else second_label.seed


def split_unpaired(
    labels: Sequence[UnpairedPreference], pairs: Splits, fractions: Sequence[float], seed: int = 0
) -> dict[str, tuple[UnpairedPreference, ...]]:
    """Split labels of single shapes into train, val and test. No shape is in two splits.

    Labels of a shape that also occurs in pairs are put into the split of these pairs. All other shapes are
    split at random by `fractions`, separately for preferred and for other shapes, so that all splits have the
    same share of preferred shapes. Labels with a score between the thresholds are left out.

    Args:
        labels: labels of single shapes.
        pairs: splits of labelled pairs.
        fractions: shares of train, val and test, which sum to 1.
        seed: random seed.
    Returns: labels by the name of the split.
    """
    split_of_seed: dict[int, str] = {}
    for split_name in SPLITS:
        for pair in getattr(pairs, split_name):
            split_of_seed[pair.winner] = split_name
            split_of_seed[pair.loser] = split_name
    # A separate stream of random numbers: the number 2 distinguishes it from other uses of the seed.
    rng = np.random.default_rng([seed, 2])
    usable_labels = [label for label in labels if label.preferred is not None]
    for is_preferred in (True, False):
        usable_seeds = {label.seed for label in usable_labels if label.preferred is is_preferred}
        unassigned_seeds = sorted(usable_seeds - set(split_of_seed))
        # Positions at which the next split begins; adding 0.5 rounds to the nearest integer.
        split_starts = np.floor(np.cumsum(fractions) * len(unassigned_seeds) + 0.5)
        for seed_position, shape_seed in enumerate(rng.permutation(unassigned_seeds).tolist()):
            # `min` is needed if the sum of the shares is rounded to less than 1.
            split_index = min(int(np.searchsorted(split_starts, seed_position, side="right")), 2)
            split_of_seed[shape_seed] = SPLITS[split_index]
    return {
        split_name: tuple(label for label in usable_labels if split_of_seed[label.seed] == split_name)
        for split_name in SPLITS
    }


def endless_batches(
    labels: Sequence[UnpairedPreference], batch_size: int, rng: np.random.Generator
) -> Iterator[list[UnpairedPreference]]:
    """Yield batches without end, each with as many preferred shapes as other shapes, preferred ones first.

    Preferred shapes and other shapes are shuffled separately, each time when all of them have been used.

    Args:
        labels: labels of single shapes; some shapes must be preferred and some must not.
        batch_size: number of labels of a batch, even.
        rng: random numbers of the order.
    """
    label_sets = [
        [label for label in labels if label.preferred is is_preferred] for is_preferred in (True, False)
    ]

    def endless_labels(label_set: list[UnpairedPreference]) -> Iterator[UnpairedPreference]:
        """Yield labels of one kind without end, in a new random order each time."""
        while True:
            yield from (label_set[i] for i in rng.permutation(len(label_set)))

    label_streams = [endless_labels(label_set) for label_set in label_sets]
    while True:
        yield [next(label_stream) for label_stream in label_streams for _ in range(batch_size // 2)]


def resample_labels(
    labels: Sequence[UnpairedPreference], rng: np.random.Generator
) -> list[UnpairedPreference]:
    """Sample labels with replacement, separately for preferred and for other shapes.

    The result has as many preferred and as many other shapes as `labels`. Labels with a score between the
    thresholds are left out.
    """
    resampled_labels = []
    for is_preferred in (True, False):
        label_set = [label for label in labels if label.preferred is is_preferred]
        # rng.integers needs an upper bound of at least 1, even if the size is 0.
        sampled_indices = rng.integers(max(len(label_set), 1), size=len(label_set))
        resampled_labels += [label_set[i] for i in sampled_indices]
    return resampled_labels
