"""Labels of single shapes, thumbs or scores: one JSON object per line, as `eg3d_rlhf.preferences.labels` has
those of pairs.

| field     | meaning                                                                                   |
| --------- | ----------------------------------------------------------------------------------------- |
| seed      | of the shape, z = RandomState(seed).randn(z_dim); required                                |
| label     | 1 or true: preferred, 0 or false: not; this or score is required                          |
| score     | from 0 to 5; from 4.0 on the shape is preferred, up to 3.5 not, in between it is left out |
| generator | sha256 hex of the generator's weights that drew the shape                                 |
| psi       | truncation it was drawn at                                                                |
| annotator | who or what judged                                                                        |
| time      | when: ISO 8601 text, or seconds since 1970                                                |
| clean     | 1 or 0: what a noise-free annotator would say, where it is known                          |

Other fields are kept in `extra` and written back.
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
MIDDLE = 0.2  # share of the shapes with both roles in pairs that is left out, about the median strength


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """One judgement of one shape. Fields as in the table above."""

    seed: int
    label: bool | None = None
    score: float | None = None
    generator: str | None = None
    psi: float | None = None
    annotator: str | None = None
    time: str | float | None = None
    clean: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if (self.label is None) == (self.score is None):
            got = "neither" if self.label is None else "both"
            raise ValueError(
                f"expected a label (1 or 0) or a score (0 to {SCALE:g}), got {got}. Write one of them."
            )
        if self.score is not None and not 0 <= self.score <= SCALE:
            raise ValueError(f"expected a score from 0 to {SCALE:g}, got {self.score:g}. Rescale the scores.")
        check_psi(self.psi)

    @property
    def preferred(self) -> bool | None:
        """Whether the shape is preferred; None between the two thresholds of a score."""
        if self.score is None:
            return self.label
        return True if self.score >= GOOD else False if self.score <= BAD else None

    @property
    def target(self) -> float:
        """What the reward should say, 0..1."""
        return float(bool(self.label)) if self.score is None else self.score / SCALE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; fields that say nothing are left out."""
        known = {name: getattr(self, name) for name in FIELDS}
        return {
            **{k: int(v) if isinstance(v, bool) else v for k, v in known.items() if v is not None},
            **self.extra,
        }


def load_unpaired(path: str | Path) -> list[UnpairedPreference]:
    """All labels of a .jsonl file; of a file of pairs, what `from_pairs` makes of them.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(path)
    if path.suffix == ".csv" or (
        path.is_file() and "winner" in next((record for _, record in jsonl_records(path, "")), {})
    ):
        return from_pairs(load_labels(path))
    reader = functools.partial(jsonl_records, example="{'seed': ..., 'label': ...}")
    return read_records(path, {".jsonl": reader, ".ndjson": reader}, _parse, "shapes")


def write_unpaired(path: str | Path, labels: Iterable[UnpairedPreference]) -> Path:
    """Write .jsonl; the file appears whole or not at all. Returns the path."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"write_unpaired: expected a name ending in .jsonl, got {path.name}. Rename it.")
    write_atomic(path, "".join(json.dumps(label.to_dict()) + "\n" for label in labels).encode())
    return path


def _parse(record: Mapping[str, Any]) -> UnpairedPreference:
    if record.get("seed") is None:
        raise ValueError("expected seed, got none. Add it.")
    return UnpairedPreference(
        seed=parse_seed(record["seed"], "seed"),
        label=_truth(record, "label"),
        score=parse_number(record, "score"),
        clean=_truth(record, "clean"),
        **common_fields(record, FIELDS),
    )


def _truth(record: Mapping[str, Any], name: str) -> bool | None:
    value = record.get(name)
    if value not in (None, 0, 1):
        raise ValueError(
            f"expected {name} to be 1 or 0, got {value!r}. Correct it; marks on a scale are a score."
        )
    return None if value is None else bool(value)


def from_pairs(labels: Sequence[Preference]) -> list[UnpairedPreference]:
    """Judgements of pairs as those of shapes: a winner is preferred, a loser not.

    A shape with both roles goes by its Bradley-Terry strength among those of its kind: the lower ones are not
    preferred, the upper ones are, and the middle fifth is left out. One label a shape, by seed; shapes of
    several generators are told apart.
    """
    roles: dict[tuple[str, int], set[bool]] = defaultdict(set)
    first: dict[tuple[str, int], Preference] = {}
    for label in labels:
        for seed, won in ((label.winner, True), (label.loser, False)):
            first.setdefault(key := (label.generator or "", seed), label)
            roles[key] |= set() if label.tie else {won}
    both = [key for key, won in roles.items() if len(won) == 2]
    preferred = {key: next(iter(won)) for key, won in roles.items() if len(won) == 1}
    if both:
        compared = [
            Comparison((p.generator or "", p.winner), (p.generator or "", p.loser), p.tie) for p in labels
        ]
        fitted = bradley_terry(compared)
        strength = dict(zip(fitted.items, fitted.strength, strict=True))
        low, high = np.quantile([strength[key] for key in both], [0.5 - MIDDLE / 2, 0.5 + MIDDLE / 2])
        preferred |= {key: strength[key] > high for key in both if not low <= strength[key] <= high}
    return [
        UnpairedPreference(
            seed=seed,
            label=bool(preferred[generator, seed]),
            generator=first[generator, seed].generator,
            psi=first[generator, seed].psi,
            annotator=first[generator, seed].annotator,
        )
        for generator, seed in sorted(preferred)
    ]


def to_pairs(labels: Sequence[UnpairedPreference], seed: int = 0) -> list[Preference]:
    """Disjoint pairs of a preferred and another shape, drawn by `seed`: what accuracy on pairs needs where
    nobody judged any.

    Raises: ValueError where all shapes, or all labels of a shape, are of one kind.
    """
    rng = np.random.default_rng([seed, 1])
    good, bad = ({label.seed: label for label in labels if label.preferred is kind} for kind in (True, False))
    if not set(good) - set(bad) or not set(bad) - set(good):
        raise ValueError(
            f"unpaired labels: expected shapes of both kinds, got {len(good)} preferred and {len(bad)}"
            " others. Label more."
        )
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
    """`to_pairs` of a file, where a training has no labels of pairs."""
    return LabelSource(
        path.name, lambda: to_pairs(load_unpaired(path), seed), {"labels": str(path), "filters": None}, path
    )


def _better(first: UnpairedPreference, second: UnpairedPreference) -> int | None:
    """The seed that a noise-free annotator prefers, where the labels tell."""
    if first.clean is None or second.clean is None or first.clean == second.clean:
        return None
    return first.seed if first.clean else second.seed


def split_unpaired(
    labels: Sequence[UnpairedPreference], pairs: Splits, fractions: Sequence[float], seed: int = 0
) -> dict[str, tuple[UnpairedPreference, ...]]:
    """Usable labels per split ('train', 'val', 'test'): those of a shape that pairs hold go with them, the
    others are dealt by `fractions`.

    No shape is in two splits. Each kind of label is dealt by itself, so that every split gets its share of
    both.
    """
    home = {s: name for name in SPLITS for pair in getattr(pairs, name) for s in (pair.winner, pair.loser)}
    rng = np.random.default_rng([seed, 2])
    usable = [label for label in labels if label.preferred is not None]
    for kind in (True, False):
        free = sorted({label.seed for label in usable if label.preferred is kind} - set(home))
        edges = np.floor(np.cumsum(fractions) * len(free) + 0.5)
        for place, drawn in enumerate(rng.permutation(free).tolist()):
            home[drawn] = SPLITS[min(int(np.searchsorted(edges, place, side="right")), 2)]
    return {name: tuple(label for label in usable if home[label.seed] == name) for name in SPLITS}


def batches_of(
    labels: Sequence[UnpairedPreference], size: int, rng: np.random.Generator
) -> Iterator[list[UnpairedPreference]]:
    """Endless batches of `size` labels, the preferred half first; each kind comes in a new order whenever it
    has run out.
    """
    kinds = [[label for label in labels if label.preferred is kind] for kind in (True, False)]

    def endless(shapes: list[UnpairedPreference]) -> Iterator[UnpairedPreference]:
        while True:
            yield from (shapes[i] for i in rng.permutation(len(shapes)))

    draws = [endless(shapes) for shapes in kinds]
    while True:
        yield [next(draw) for draw in draws for _ in range(size // 2)]


def redrawn(labels: Sequence[UnpairedPreference], rng: np.random.Generator) -> list[UnpairedPreference]:
    """As many labels of each kind, drawn with replacement."""
    kinds = [[label for label in labels if label.preferred is kind] for kind in (True, False)]
    return [shapes[i] for shapes in kinds for i in rng.integers(max(len(shapes), 1), size=len(shapes))]
