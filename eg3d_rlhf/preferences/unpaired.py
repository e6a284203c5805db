"""Labels of single shapes (thumbs or scores), one JSON object per line. The counterpart of pairs is
`eg3d_rlhf.preferences.labels`.

| field     | meaning                                                                                       |
| --------- | --------------------------------------------------------------------------------------------- |
| seed      | seed of the shape, z = RandomState(seed).randn(z_dim); required                               |
| label     | 1 or true: preferred, 0 or false: not preferred; this or score is required                    |
| score     | from 0 to 5; from 4.0 on the shape is preferred, up to 3.5 it is not, in between it is unused |
| generator | SHA-256, in hex, of the weights of the generator of the shape                                 |
| psi       | truncation that the shape was generated with                                                  |
| annotator | name of the person or program that gave the label                                             |
| time      | ISO 8601 text, or seconds since 1970                                                          |
| clean     | 1 or 0: the label of a noise-free annotator, if it is known                                   |

Other fields are kept in `extra` and written again.
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
    LabelSource,
    Preference,
    check_psi,
    check_seed,
    common_fields,
    jsonl_records,
    load_labels,
    parse_number,
    parse_seed,
    read_records,
)
from training.storage import write_atomic

FIELDS = ("seed", "label", "score", "generator", "psi", "annotator", "time", "clean")
SCALE = 5.0  # the best score
# Fraction of the shapes with both roles in pairs that gets no label, around the median strength.
MIDDLE = 0.2


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """A label of one shape. Fields as in the table above. Raises: ValueError."""

    seed: int  # of the shape
    # Exactly one of label and score is set.
    label: bool | None = None
    score: float | None = None
    generator: str | None = None
    # None in the following fields: unknown.
    psi: float | None = None
    annotator: str | None = None
    time: str | float | None = None
    clean: bool | None = None
    # Not hashed: dicts have no hash.
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if (self.label is None) == (self.score is None):
            got = "neither" if self.label is None else "both"
            raise ValueError(
                f"expected a label (1 or 0) or a score (0 to {SCALE:g}), got {got}. Write exactly one of"
                " them."
            )
        if self.score is not None and not 0 <= self.score <= SCALE:
            raise ValueError(
                f"expected a score from 0 to {SCALE:g}, got {self.score:g}. Rescale the scores to this range."
            )
        check_psi(self.psi)

    @property
    def preferred(self) -> bool | None:
        """Return True if the shape is preferred, False if not; None between the two thresholds of a score."""
        # A thumb is always decided; a score between the thresholds is not.
        if self.score is None:
            return self.label
        return True if self.score >= GOOD else False if self.score <= BAD else None

    @property
    def target(self) -> float:
        """Return the desired reward, 0..1."""
        return float(bool(self.label)) if self.score is None else self.score / SCALE

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; fields without a value are left out."""
        # In the order of the table.
        fields = {name: getattr(self, name) for name in FIELDS}
        return {
            **{k: int(v) if isinstance(v, bool) else v for k, v in fields.items() if v is not None},
            **self.extra,
        }


def load_unpaired(path: str | Path) -> list[UnpairedPreference]:
    """Load all labels of a .jsonl file. Pairs are converted by `from_pairs`.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(path)
    # The first record decides whether a .jsonl file contains pairs.
    if path.suffix == ".csv" or (
        path.is_file() and "winner" in next((record for _, record in jsonl_records(path, "")), {})
    ):
        return from_pairs(load_labels(path))
    reader = functools.partial(jsonl_records, example="{'seed': ..., 'label': ...}")
    return read_records(path, {".jsonl": reader, ".ndjson": reader}, _parse, "shapes")


def write_unpaired(path: str | Path, labels: Iterable[UnpairedPreference]) -> Path:
    """Write a .jsonl file, atomically. Returns the path."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"write_unpaired: expected a name ending in .jsonl, got {path.name}. Change the suffix."
        )
    write_atomic(path, "".join(json.dumps(label.to_dict()) + "\n" for label in labels).encode())
    return path


def _parse(record: Mapping[str, Any]) -> UnpairedPreference:
    """Parse a record. Raises: ValueError without file and line."""
    if record.get("seed") is None:
        raise ValueError("expected the field seed, got none. Add it.")
    return UnpairedPreference(
        seed=parse_seed(record["seed"], "seed"),
        label=_truth(record, "label"),
        score=parse_number(record, "score"),
        clean=_truth(record, "clean"),
        **common_fields(record, FIELDS),
    )


def _truth(record: Mapping[str, Any], name: str) -> bool | None:
    """Return a field that is 1 or 0, or None if it is missing. Raises: ValueError."""
    value = record.get(name)
    # True == 1 in Python, so true and false are accepted
    if value not in (None, 0, 1):
        raise ValueError(
            f"expected {name} to be 1 or 0, got {value!r}. Correct it; for ratings on a scale use the field"
            " score."
        )
    return None if value is None else bool(value)


def from_pairs(labels: Sequence[Preference]) -> list[UnpairedPreference]:
    """Convert labels of pairs to labels of shapes: a winner is preferred, a loser is not.

    Shapes with both roles are ordered by their Bradley-Terry strength: the lower two fifths are not
    preferred, the upper two fifths are, and the middle fifth gets no label. There is one label per shape,
    sorted by seed. Shapes of several generators are distinguished.
    """
    roles: dict[tuple[str, int], set[bool]] = defaultdict(set)
    first_label: dict[tuple[str, int], Preference] = {}
    for label in labels:
        for seed, won in ((label.winner, True), (label.loser, False)):
            first_label.setdefault(key := (label.generator or "", seed), label)
            # True: it won; False: it lost. A shape with both has both in the set.
            roles[key] |= set() if label.tie else {won}  # a tie gives no role
    both = [key for key, won in roles.items() if len(won) == 2]
    # One role: the label follows from it.
    preferred = {key: next(iter(won)) for key, won in roles.items() if len(won) == 1}
    # Both roles: the label follows from the strength.
    if both:
        # (generator, seed) identifies a shape
        compared = [
            Comparison((p.generator or "", p.winner), (p.generator or "", p.loser), p.tie) for p in labels
        ]
        fitted = bradley_terry(compared)
        strength = dict(zip(fitted.items, fitted.strength, strict=True))
        # The quantiles bound the middle fifth among shapes with both roles.
        low, high = np.quantile([strength[key] for key in both], [0.5 - MIDDLE / 2, 0.5 + MIDDLE / 2])
        preferred |= {key: strength[key] > high for key in both if not low <= strength[key] <= high}
    return [
        UnpairedPreference(
            seed=seed,
            label=bool(preferred[generator, seed]),
            generator=first_label[generator, seed].generator,
            psi=first_label[generator, seed].psi,
            annotator=first_label[generator, seed].annotator,
        )
        for generator, seed in sorted(preferred)
    ]


def to_pairs(labels: Sequence[UnpairedPreference], seed: int = 0) -> list[Preference]:
    """Form disjoint pairs of a preferred and another shape, at random by `seed`.

    Accuracy on pairs needs them if there are no labels of pairs.

    Raises: ValueError if all shapes, or all labels of each shape, are of one kind.
    """
    # A stream of its own; the second number distinguishes it from other uses of the seed.
    rng = np.random.default_rng([seed, 1])
    good, bad = ({label.seed: label for label in labels if label.preferred is kind} for kind in (True, False))
    if not set(good) - set(bad) or not set(bad) - set(good):
        raise ValueError(
            f"unpaired labels: expected preferred and other shapes, got {len(good)} preferred and {len(bad)}"
            " others. Label more shapes."
        )
    # Shapes with labels of both kinds are excluded.
    winners, losers = (
        rng.permutation(sorted(set(a) - set(b))).tolist() for a, b in ((good, bad), (bad, good))
    )
    return [
        Preference(
            winner=a, loser=b, generator=good[a].generator, psi=good[a].psi, clean=_better(good[a], bad[b])
        )
        for a, b in zip(winners, losers, strict=False)
    ]


def source_of_unpaired(path: Path, seed: int = 0) -> LabelSource:
    """Return the labels of a file as pairs (`to_pairs`), for a training without labels of pairs."""
    return LabelSource(
        path.name, lambda: to_pairs(load_unpaired(path), seed), {"labels": str(path), "filters": None}, path
    )


def _better(first: UnpairedPreference, second: UnpairedPreference) -> int | None:
    """Return the seed that a noise-free annotator prefers; None if it is unknown."""
    if first.clean is None or second.clean is None or first.clean == second.clean:
        return None
    return first.seed if first.clean else second.seed


def split_unpaired(
    labels: Sequence[UnpairedPreference], pairs: Splits, fractions: Sequence[float], seed: int = 0
) -> dict[str, tuple[UnpairedPreference, ...]]:
    """Divide usable labels into 'train', 'val' and 'test'.

    Labels of a shape that occurs in pairs go to the split of the pairs. The others are divided by
    `fractions`. No shape is in two splits. Each kind of label is divided by itself, so that every split gets
    its fraction of both.
    """
    split_of_seed = {
        s: name for name in SPLITS for pair in getattr(pairs, name) for s in (pair.winner, pair.loser)
    }
    # A stream of its own, see `to_pairs`.
    rng = np.random.default_rng([seed, 2])
    usable = [label for label in labels if label.preferred is not None]
    # Each kind by itself, so that all splits have the same fraction of preferred shapes.
    for kind in (True, False):
        free = sorted({label.seed for label in usable if label.preferred is kind} - set(split_of_seed))
        # + 0.5: rounded to the nearest integer
        edges = np.floor(np.cumsum(fractions) * len(free) + 0.5)
        for position, shape_seed in enumerate(rng.permutation(free).tolist()):
            # min: a guard against rounding of the last boundary
            split_of_seed[shape_seed] = SPLITS[min(int(np.searchsorted(edges, position, side="right")), 2)]
    return {name: tuple(label for label in usable if split_of_seed[label.seed] == name) for name in SPLITS}


def batches_of(
    labels: Sequence[UnpairedPreference], size: int, rng: np.random.Generator
) -> Iterator[list[UnpairedPreference]]:
    """Yield batches of `size` labels without end, the preferred half first.

    Each kind is shuffled again when all of its labels have been used.
    """
    kinds = [[label for label in labels if label.preferred is kind] for kind in (True, False)]

    def endless(shapes: list[UnpairedPreference]) -> Iterator[UnpairedPreference]:
        """Yield labels of one kind without end, in a new order each time."""
        while True:
            yield from (shapes[i] for i in rng.permutation(len(shapes)))

    streams = [endless(shapes) for shapes in kinds]
    while True:
        yield [next(stream) for stream in streams for _ in range(size // 2)]


def redrawn(labels: Sequence[UnpairedPreference], rng: np.random.Generator) -> list[UnpairedPreference]:
    """Sample as many labels of each kind, with replacement."""
    kinds = [[label for label in labels if label.preferred is kind] for kind in (True, False)]
    return [shapes[i] for shapes in kinds for i in rng.integers(max(len(shapes), 1), size=len(shapes))]
