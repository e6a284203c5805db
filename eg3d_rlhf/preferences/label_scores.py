"""How good each of some assets is, r in 0..1, from whatever people said of them: one JSON object per line, of
one kind in a file.

| line                                               | said of            | who writes it                    |
| -------------------------------------------------- | ------------------ | -------------------------------- |
| {"asset", "condition", "thumb": true}              | an asset           | you; as `label`: `asset-scores`  |
| {"asset", "condition", "score": 4, "rater": "ann"} | an asset           | `asset-scores`                   |
| {"asset", "condition", "p": 0.8, "rater": "m-1"}   | an asset's P(good) | an ensemble of rewards           |
| {"asset", "condition", "rank": 1}                  | an asset; 1: best  | `rankings`, `ranking.jsonl`      |
| {"preferred": "a.ply", "rejected": "b.ply"}        | a pair             | `asset-pairs`; "tie" for neither |

An asset is named as in the list of assets, or by the path of a file of its, relative to the labels;
`condition` may be left out, `mesh` stands for `asset`, `annotator` for `rater`. Other fields are passed over.
Ranks are one judgement of the assets of a condition. `asset-scores`, `rankings` and `asset-pairs` are what
the labelling tool exports under these names of its `--kind`; `"tie": true` says that neither is preferred.

A = 2 r - 1 sums up to 0 over the assets of every condition: a flow that is taught by r is drawn to all of a
finite set where A > 0 throughout, and driven from it where A < 0. An asset that is alone in its condition is
compared with nothing: r = 1/2, which teaches nothing. Where centring leaves a condition's A beyond ±1, all of
its are divided by the largest: clipping them would move the sum.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
from eg3d_rlhf.preferences.labels import jsonl_records

PRIOR = 2.0  # votes that an asset's share of good ones begins with, shared out as its condition's are
Goodness = Mapping[str, float]  # r by asset, of those that were judged
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of each key, in order of appearance."""
    groups: dict[Key, list[Value]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


# One condition's judgements -> r of its assets.


def of_ranks(ranks: Mapping[str, float]) -> dict[str, float]:
    """(beaten + ties / 2) / (K - 1) of assets with ranks, 1 the best: the mean is 1/2, and of two 1 and 0.

    >>> of_ranks({"a": 1, "b": 2, "c": 2})
    {'a': 1.0, 'b': 0.25, 'c': 0.25}
    """
    places = rankdata(list(ranks.values()))  # 1 .. K, the mean of places for ties
    K = len(ranks)
    return {
        name: float((K - place) / (K - 1)) if K > 1 else 0.5
        for name, place in zip(ranks, places, strict=True)
    }


def of_votes(votes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """p = (good + 2 s) / (n + 2) of each asset, s the share of good votes in the condition; A = 2 p - 1,
    centred.

    >>> {name: round(r, 3) for name, r in of_votes([("a", True), ("b", False)]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    said = _grouped(votes)
    share = float(np.mean([good for one in said.values() for good in one]))
    return centred(
        {name: (2 * (sum(one) + PRIOR * share) / (len(one) + PRIOR)) - 1 for name, one in said.items()}
    )


def of_probabilities(given: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the P(good) of each asset, not P of a mean: members of an ensemble that differ leave it near
    1/2; A = 2 p - 1, centred.
    """
    return centred({name: 2 * float(np.mean(one)) - 1 for name, one in _grouped(given).items()})


def of_pairs(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """r from judgements of pairs. Two assets that met each other alone: (wins + ties / 2 + 1) / (n + 2).
    Others: the mean over an asset's opponents of P(it beats them) by Bradley-Terry strengths of all that a
    chain of comparisons links, which a share of wins would owe to whom one met; A = 2 r - 1, centred.

    >>> {name: round(r, 3) for name, r in of_pairs([Comparison("a", "b")]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    found: dict[str, float] = {}
    for group in linked(comparisons):
        names = list(dict.fromkeys(str(name) for c in group for name in (c.winner, c.loser)))
        if len(names) == 2:
            won = sum(0.5 if c.tie else float(c.winner == names[0]) for c in group)
            first = (won + 1) / (len(group) + 2)
            values = {names[0]: first, names[1]: 1 - first}
        else:
            fit = bradley_terry(group)
            strength = dict(zip(fit.items, fit.strength.tolist(), strict=True))
            met: dict[Hashable, set[Hashable]] = defaultdict(set)
            for c in group:
                met[c.winner].add(c.loser)
                met[c.loser].add(c.winner)
            values = {
                name: float(np.mean([expit(strength[name] - strength[other]) for other in met[name]]))
                for name in names
            }
        found |= values
    return centred({name: 2 * r - 1 for name, r in found.items()})


def linked(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons, apart where no chain of them links their items."""
    items = {
        item: i
        for i, item in enumerate(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))
    }
    ends = [items[c.winner] for c in comparisons], [items[c.loser] for c in comparisons]
    _, group = connected_components(
        coo_matrix((np.ones(len(comparisons)), ends), shape=(len(items), len(items))), directed=False
    )
    return list(_grouped((int(group[items[c.winner]]), c) for c in comparisons).values())


def of_scores(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """A = half the mean of an asset's scores, which are in their raters' deviations already (`by_rater`),
    centred.
    """
    return centred({name: float(np.mean(one)) / 2 for name, one in _grouped(scores).items()})


def by_rater(scores: Iterable[tuple[str, float]]) -> list[float]:
    """(score - the rater's mean) / the rater's deviation over all that they scored, of (rater, score); 0 of
    one who never differs.
    """
    given = list(scores)
    of = {rater: (float(np.mean(one)), float(np.std(one))) for rater, one in _grouped(given).items()}
    return [(score - of[rater][0]) / of[rater][1] if of[rater][1] > 1e-9 else 0.0 for rater, score in given]


def centred(advantages: Mapping[str, float]) -> dict[str, float]:
    """r = (1 + A) / 2 of A less its mean, divided by the largest where one is beyond ±1."""
    values = np.array(list(advantages.values()), dtype=float)
    values -= values.mean()
    values /= max(1.0, float(np.abs(values).max()))
    return {name: float(0.5 + value / 2) for name, value in zip(advantages, values, strict=True)}


# What losses of whole groups want of r, and controls.


def normal_scores(r: Sequence[float] | np.ndarray) -> np.ndarray:
    """Advantages [K] of ranks by r: the normal's quantile at (place - 1/2) / K, with mean 0 and standard
    deviation 1; 0 where all are tied.

    >>> normal_scores([0.2, 0.9])
    array([-1.,  1.])
    """
    places = rankdata(r)
    if np.ptp(places) == 0:
        return np.zeros(len(places))
    scores: np.ndarray = ndtri((places - 0.5) / len(places))
    scores = scores - scores.mean()
    scores = scores / scores.std()
    return scores


def as_used(goodness: Goodness, conditions: Mapping[str, str], use: str, seed: int) -> dict[str, float]:
    """Return r for a training ("labels") or for one of its controls: "randomised" gives each asset the r of
    another asset of its condition, "inverted" gives 1 - r. Args: conditions: of every asset.
    """
    if use == "inverted":
        return {name: 1 - r for name, r in goodness.items()}
    if use != "randomised":
        return dict(goodness)
    rng = np.random.default_rng([seed, 3])
    shuffled = dict[str, float]()
    for names in _by_condition(goodness, conditions).values():
        shuffled |= {
            name: goodness[other] for name, other in zip(names, rng.permutation(names).tolist(), strict=True)
        }
    return {name: shuffled[name] for name in goodness}


def _by_condition(names: Iterable[str], conditions: Mapping[str, str]) -> dict[str, list[str]]:
    return _grouped((conditions[name], name) for name in names)


# Files.


@dataclass(frozen=True, kw_only=True)
class Known:
    """The assets that labels may speak of."""

    conditions: Mapping[str, str]  # of every asset, by its name
    files: Mapping[Path, str] = field(default_factory=dict)  # names by resolved path

    def find(self, named: str, folder: Path) -> str:
        """The name of an asset that is called so in a file of a folder. Raises: ValueError for none."""
        if named in self.conditions:
            return named
        name = self.files.get((folder / named).resolve())
        if name is None:
            some = ", ".join(list(self.conditions)[:3])
            raise ValueError(
                f"expected one of {len(self.conditions)} assets ({some}, ...), got {named!r}. Name an asset"
                " of the list."
            )
        return name


@dataclass(frozen=True, kw_only=True)
class Said:
    """A line."""

    number: int
    kind: str  # thumb, score, p, rank or pair
    asset: str  # of a pair the better one
    value: float = 0.0
    rater: str = ""
    other: str = ""  # of a pair
    tie: bool = False


ALONE = ("thumb", "label", "score", "p", "rank")
EXAMPLE = '{"asset": NAME, "condition": NAME, "thumb": true}'


def read_said(path: Path, known: Known) -> list[Said]:
    """The lines of a file of labels, of one kind; see the module for them.

    Raises: FileNotFoundError; ValueError naming the file, the line and a remedy: for lines that do not fit,
        assets that are not known or are said to be of another condition, several kinds in one file, and none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--labels: expected a .jsonl file of labels, got nothing at {path}. Check the path."
        )
    lines: list[Said] = []
    for number, record in jsonl_records(path, EXAMPLE):
        try:
            lines.append(_parse(number, record, known, path.parent))
            if lines[-1].kind != lines[0].kind:
                raise ValueError(
                    f"expected {lines[0].kind}s as in line {lines[0].number}, got a {lines[-1].kind}. Keep a"
                    " file for each."
                )
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not lines:
        raise ValueError(
            f"{path.name}, line 1: expected at least one label, got an empty file. Label some assets first."
        )
    return lines


def read_goodness(path: Path, known: Known) -> dict[str, float]:
    """r by asset of those that a file of labels speaks of. Raises: see `read_said`; also for labels that tell
    no assets of a condition apart.
    """
    lines = read_said(path, known)
    goodness = _of_lines(lines, known.conditions, path.name)
    if all(abs(r - 0.5) < 1e-9 for r in goodness.values()):
        raise ValueError(
            f"{path.name}, lines {lines[0].number} to {lines[-1].number}: {_nothing(lines, known.conditions)}"
        )
    return goodness


def _parse(number: int, record: Mapping[str, Any], known: Known, folder: Path) -> Said:
    """A line. Raises: ValueError without file and line."""

    def asset(*keys: str) -> str:
        named = next((record[key] for key in keys if record.get(key)), None)
        if not isinstance(named, str):
            raise ValueError(f"expected {keys[0]}, got none. Write {EXAMPLE}.")
        name = known.find(named, folder)
        condition = record.get("condition")
        if condition is not None and condition != known.conditions[name]:
            got = f"got {condition!r}. Correct one of them"
            raise ValueError(
                f"expected condition {known.conditions[name]!r} of asset {named!r}, as in the list of assets,"
                f" {got}."
            )
        return name

    if "preferred" in record or "rejected" in record:
        better = asset("preferred")
        worse = asset("rejected")
        tie = record.get("tie", False)
        if (
            better == worse
            or known.conditions[better] != known.conditions[worse]
            or not isinstance(tie, bool)
        ):
            raise ValueError(
                f"expected two assets of one condition, and tie true or false, got {record!r:.120}. Correct"
                " the line."
            )
        return Said(number=number, kind="pair", asset=better, other=worse, tie=tie)
    given = [key for key in ALONE if record.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"expected one of {', '.join(ALONE)}, got {' and '.join(given) or 'none'}. Write {EXAMPLE}."
        )
    kind = "thumb" if given == ["label"] else given[0]
    value = record[given[0]]
    if (
        kind == "thumb"
        and value not in (True, False)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
    ):
        wanted = "true or false" if kind == "thumb" else "a number"
        raise ValueError(f"expected {given[0]} to be {wanted}, got {value!r}. Correct the line.")
    if kind == "p" and not 0 <= value <= 1:
        raise ValueError(f"expected p from 0 to 1, got {value!r}. Marks on another scale are a score.")
    rater = str(record.get("rater") or record.get("annotator") or "")
    return Said(
        number=number, kind=kind, asset=asset("asset", "mesh", "look_at"), value=float(value), rater=rater
    )


def _of_lines(lines: Sequence[Said], conditions: Mapping[str, str], file: str) -> dict[str, float]:
    kind = lines[0].kind
    values = (
        by_rater((line.rater, line.value) for line in lines)
        if kind == "score"
        else [line.value for line in lines]
    )
    judged = zip(lines, values, strict=True)
    groups = _grouped((conditions[line.asset], (line, value)) for line, value in judged)
    makers: dict[str, Callable[[list[tuple[Said, float]]], dict[str, float]]] = {
        "thumb": lambda group: of_votes([(line.asset, bool(value)) for line, value in group]),
        "score": lambda group: of_scores([(line.asset, value) for line, value in group]),
        "p": lambda group: of_probabilities([(line.asset, value) for line, value in group]),
        "pair": lambda group: of_pairs([Comparison(line.asset, line.other, line.tie) for line, _ in group]),
        "rank": lambda group: of_ranks(_once(group, file)),
    }
    return {name: r for group in groups.values() for name, r in makers[kind](group).items()}


def _once(group: Sequence[tuple[Said, float]], file: str) -> dict[str, float]:
    ranks: dict[str, float] = {}
    for line, value in group:
        if line.asset in ranks:
            raise ValueError(
                f"{file}, line {line.number}: expected one rank for each asset, got another of"
                f" {line.asset!r}. Keep one."
            )
        ranks[line.asset] = value
    return ranks


def _nothing(lines: Sequence[Said], conditions: Mapping[str, str]) -> str:
    """Why labels say nothing, and what to do."""
    kind = lines[0].kind
    judged = {name for line in lines for name in (line.asset, line.other) if name}
    if len(judged) == len({conditions[name] for name in judged}):
        return (
            "expected two assets or more under one condition, got one under each: nothing to compare. Label"
            " several of a condition."
        )
    if kind == "thumb" and len({line.value for line in lines}) == 1:
        return (
            f"expected some of both, got {len(lines)} that are all {'good' if lines[0].value else 'bad'}."
            " Label others, or score them."
        )
    what = "ties everywhere" if kind in ("rank", "pair") else f"{kind}s that are alike"
    return (
        f"expected labels that tell assets of a condition apart, got {what}. Label more, or in finer steps."
    )


def contrast(goodness: Goodness, conditions: Collection[str], of: Mapping[str, str]) -> dict[str, float]:
    """Those of some conditions that are not alone there: what a training reads.

    Args: of: the condition of every asset.
    """
    groups = _by_condition(goodness, of)
    return {name: r for name, r in goodness.items() if of[name] in conditions and len(groups[of[name]]) > 1}
