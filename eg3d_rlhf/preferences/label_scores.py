"""Goodness r in 0..1 of assets, from labels of any kind: one JSON object per line, of one kind in a file.

| line                                               | applies to         | written by                       |
| -------------------------------------------------- | ------------------ | -------------------------------- |
| {"asset", "condition", "thumb": true}              | an asset           | you; as `label`: `asset-scores`  |
| {"asset", "condition", "score": 4, "rater": "ann"} | an asset           | `asset-scores`                   |
| {"asset", "condition", "p": 0.8, "rater": "m-1"}   | an asset's P(good) | an ensemble of rewards           |
| {"asset", "condition", "rank": 1}                  | an asset; 1: best  | `rankings`, `ranking.jsonl`      |
| {"preferred": "a.ply", "rejected": "b.ply"}        | a pair             | `asset-pairs`; "tie" for neither |

An asset has the name in the list of assets, or the path of one of its files, relative to the labels.
`condition`, the prompt of the asset, may be left out. `mesh` may stand for `asset`, and `annotator` for
`rater`. Other fields are ignored. Ranks order all assets of a prompt. `asset-scores`, `rankings` and
`asset-pairs` are exports of the labelling tool (its `--kind`). `"tie": true` means that neither asset is
preferred.

Advantages A = 2 r - 1 sum to 0 over the assets of each prompt. A flow that is trained with r moves towards
all assets of a finite set if A > 0 throughout, and away from all if A < 0, so the mean is removed. An asset
that is alone in its prompt has nothing to be compared with: r = 1/2, which has no training signal. If the
centred A of a prompt exceed the range ±1, all of them are divided by the largest. Clipping them would change
the sum.
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

PRIOR = 2.0  # pseudo-votes that each asset starts with, divided into good and bad as the prompt's votes are
Goodness = Mapping[str, float]  # r by asset, of the assets that have labels
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of each key, in order of appearance."""
    groups: dict[Key, list[Value]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


# Labels of one prompt -> r of its assets.


def of_ranks(ranks: Mapping[str, float]) -> dict[str, float]:
    """Compute (beaten + ties / 2) / (K - 1) from ranks, 1 the best. The mean is 1/2; two assets get 1 and 0.

    >>> of_ranks({"a": 1, "b": 2, "c": 2})
    {'a': 1.0, 'b': 0.25, 'c': 0.25}
    """
    # 1..K; ties get the mean of their places
    places = rankdata(list(ranks.values()))
    K = len(ranks)
    return {
        name: float((K - place) / (K - 1)) if K > 1 else 0.5
        for name, place in zip(ranks, places, strict=True)
    }


def of_votes(votes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Compute p = (good + 2 s) / (n + 2) of each asset, with s the fraction of good votes in the prompt.

    A = 2 p - 1, centred.

    >>> {name: round(r, 3) for name, r in of_votes([("a", True), ("b", False)]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    votes_by_asset = _grouped(votes)
    share = float(np.mean([vote for asset_votes in votes_by_asset.values() for vote in asset_votes]))
    return centred(
        {
            name: (2 * (sum(asset_votes) + PRIOR * share) / (len(asset_votes) + PRIOR)) - 1
            for name, asset_votes in votes_by_asset.items()
        }
    )


def goodness_from_probabilities(given: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Compute the mean of the P(good) of each asset. A = 2 p - 1, centred.

    The mean of probabilities and not the probability of a mean: members of an ensemble that disagree give
    about 1/2.
    """
    return centred({name: 2 * float(np.mean(values)) - 1 for name, values in _grouped(given).items()})


def of_pairs(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Compute r from results of pairs.

    Two assets that met only each other: (wins + ties / 2 + 1) / (n + 2). Others: the mean, over an asset's
    opponents, of P(it beats the opponent). P comes from Bradley-Terry strengths of all assets that a chain of
    comparisons connects. A fraction of wins would depend on the opponents that an asset happened to meet. A =
    2 r - 1, centred.

    >>> {name: round(r, 3) for name, r in of_pairs([Comparison("a", "b")]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    goodness: dict[str, float] = {}
    for group in linked(comparisons):
        names = list(dict.fromkeys(str(name) for c in group for name in (c.winner, c.loser)))
        # A direct comparison of two, with a uniform prior on the probability to win.
        if len(names) == 2:
            wins = sum(0.5 if c.tie else float(c.winner == names[0]) for c in group)
            # Laplace's rule of succession; Bradley-Terry strengths would be infinite after one win
            first = (wins + 1) / (len(group) + 2)
            values = {names[0]: first, names[1]: 1 - first}
        else:
            fit = bradley_terry(group)
            strength = dict(zip(fit.items, fit.strength.tolist(), strict=True))
            opponents: dict[Hashable, set[Hashable]] = defaultdict(set)
            for c in group:
                # Each opponent counts once, however often the two met.
                opponents[c.winner].add(c.loser)
                opponents[c.loser].add(c.winner)
            values = {
                name: float(np.mean([expit(strength[name] - strength[other]) for other in opponents[name]]))
                for name in names
            }
        goodness |= values
    return centred({name: 2 * r - 1 for name, r in goodness.items()})


def linked(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Split comparisons into sets without a common item: connected components of the graph of items."""
    items = {
        item: i
        for i, item in enumerate(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))
    }
    # Edges of the graph of items; the direction does not matter.
    ends = [items[c.winner] for c in comparisons], [items[c.loser] for c in comparisons]
    _, group = connected_components(
        coo_matrix((np.ones(len(comparisons)), ends), shape=(len(items), len(items))), directed=False
    )
    return list(_grouped((int(group[items[c.winner]]), c) for c in comparisons).values())


def goodness_from_scores(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Compute A as half the mean of an asset's standardised scores (`standardised_by_rater`), centred."""
    return centred({name: float(np.mean(values)) / 2 for name, values in _grouped(scores).items()})


def standardised_by_rater(scores: Iterable[tuple[str, float]]) -> list[float]:
    """Standardise scores by rater: (score - mean) / standard deviation over all scores of the rater.

    Args: scores: (rater, score).
    A rater whose scores are all equal gives 0.
    """
    score_list = list(scores)
    # Mean and standard deviation of each rater over all prompts.
    moments = {
        rater: (float(np.mean(values)), float(np.std(values)))
        for rater, values in _grouped(score_list).items()
    }
    return [
        (score - moments[rater][0]) / moments[rater][1] if moments[rater][1] > 1e-9 else 0.0
        for rater, score in score_list
    ]


def centred(advantages: Mapping[str, float]) -> dict[str, float]:
    """Convert advantages to r = (1 + A) / 2, after subtracting the mean of A.

    If a centred A exceeds ±1, all are divided by the largest.
    """
    values = np.array(list(advantages.values()), dtype=float)
    # The sum of A over a prompt becomes 0.
    values -= values.mean()
    values /= max(1.0, float(np.abs(values).max()))
    return {name: float(0.5 + value / 2) for name, value in zip(advantages, values, strict=True)}


# Advantages for losses over whole groups, and controls.


def normal_scores(r: Sequence[float] | np.ndarray) -> np.ndarray:
    """Compute advantages [K] from ranks by r: the normal quantile at (place - 1/2) / K.

    They have mean 0 and standard deviation 1; all are 0 if all assets are tied.

    >>> normal_scores([0.2, 0.9])
    array([-1.,  1.])
    """
    places = rankdata(r)
    if np.ptp(places) == 0:
        return np.zeros(len(places))
    # Ranks mapped to normal quantiles, and then standardised exactly.
    scores: np.ndarray = ndtri((places - 0.5) / len(places))
    scores = scores - scores.mean()
    scores = scores / scores.std()
    return scores


def as_used(goodness: Goodness, prompt_of: Mapping[str, str], use: str, seed: int) -> dict[str, float]:
    """Return r for a training ("labels") or for one of its controls.

    "randomised" gives each asset the r of another asset of its prompt. "inverted" gives 1 - r.

    Args: prompt_of: the prompt of every asset.
    """
    # A control: the signal with the wrong sign.
    if use == "inverted":
        return {name: 1 - r for name, r in goodness.items()}
    if use != "randomised":
        return dict(goodness)
    # a stream of its own; 3 distinguishes it from other uses of the seed
    rng = np.random.default_rng([seed, 3])
    shuffled = dict[str, float]()
    # Only within a prompt, so that the distribution of r per prompt stays the same.
    for names in _by_prompt(goodness, prompt_of).values():
        shuffled |= {
            name: goodness[other] for name, other in zip(names, rng.permutation(names).tolist(), strict=True)
        }
    # In the original order of assets.
    return {name: shuffled[name] for name in goodness}


def _by_prompt(names: Iterable[str], prompt_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Group names of assets by prompt."""
    return _grouped((prompt_of[name], name) for name in names)


# Files.


@dataclass(frozen=True, kw_only=True)
class Known:
    """The assets that labels may refer to."""

    conditions: Mapping[str, str]  # the prompt of every asset, by the asset's name
    files: Mapping[Path, str] = field(default_factory=dict)  # resolved path -> name of the asset

    def find(self, named: str, folder: Path) -> str:
        """Return the name of an asset, given by its name or by a path relative to a folder. Raises:
        ValueError if unknown.
        """
        if named in self.conditions:
            return named
        # The name may be a path, relative to the folder of the labels.
        name = self.files.get((folder / named).resolve())
        if name is None:
            examples = ", ".join(list(self.conditions)[:3])
            raise ValueError(
                f"expected one of {len(self.conditions)} assets ({examples}, ...), got {named!r}. Use a name"
                " from the list of assets."
            )
        return name


@dataclass(frozen=True, kw_only=True)
class LabelLine:
    """A parsed line of labels."""

    number: int  # line number
    kind: str  # thumb, score, p, rank or pair
    asset: str  # of a pair the better one
    value: float = 0.0
    rater: str = ""
    other: str = ""  # of a pair the other one
    tie: bool = False  # of a pair: neither is preferred


ALONE = ("thumb", "label", "score", "p", "rank")  # kinds of labels of a single asset
EXAMPLE = '{"asset": NAME, "condition": NAME, "thumb": true}'


def read_said(path: Path, known: Known) -> list[LabelLine]:
    """Read the lines of a file of labels, all of one kind; see the module for the kinds.

    Raises: FileNotFoundError; ValueError with the file, the line and a remedy for lines that do not fit,
    unknown assets, assets of another prompt, several kinds in one file, and an empty file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--labels: expected a .jsonl file of labels, got no file at {path}. Check the path."
        )
    lines: list[LabelLine] = []
    for number, record in jsonl_records(path, EXAMPLE):
        try:
            # Kinds are not mixed, because their scales differ.
            lines.append(_parse(number, record, known, path.parent))
            # The first line decides the kind of the file.
            if lines[-1].kind != lines[0].kind:
                raise ValueError(
                    f"expected {lines[0].kind}s as in line {lines[0].number}, got a {lines[-1].kind}. Put"
                    " each kind into a file of its own."
                )
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not lines:
        raise ValueError(
            f"{path.name}, line 1: expected at least one label, got an empty file. Label some assets first."
        )
    return lines


def read_goodness(path: Path, known: Known) -> dict[str, float]:
    """Read r by asset from a file of labels.

    Raises: see `read_said`; also ValueError for labels that do not distinguish any assets of a prompt.
    """
    lines = read_said(path, known)
    goodness = _goodness_from_lines(lines, known.conditions, path.name)
    # r = 1/2 everywhere: no asset is better than another of its prompt.
    if all(abs(r - 0.5) < 1e-9 for r in goodness.values()):
        raise ValueError(
            f"{path.name}, lines {lines[0].number} to {lines[-1].number}:"
            f" {_describe_no_signal(lines, known.conditions)}"
        )
    return goodness


def _parse(number: int, record: Mapping[str, Any], known: Known, folder: Path) -> LabelLine:
    """Parse a line. Raises: ValueError without file and line."""

    def asset(*keys: str) -> str:
        """Return the name of the asset in the first of `keys` that the line has."""
        # Alternative names of the field, in order of preference.
        named = next((record[key] for key in keys if record.get(key)), None)
        if not isinstance(named, str):
            raise ValueError(f"expected {keys[0]}, got none. Write {EXAMPLE}.")
        name = known.find(named, folder)
        condition = record.get("condition")
        # A wrong prompt is an error in the file or in the list, which must not pass silently.
        if condition is not None and condition != known.conditions[name]:
            got = f"got {condition!r}. Correct the line or the list"
            raise ValueError(
                f"expected condition {known.conditions[name]!r} of asset {named!r}, as in the list of assets,"
                f" {got}."
            )
        return name

    if "preferred" in record or "rejected" in record:
        better = asset("preferred")
        worse = asset("rejected")
        # An exported tie still has preferred and rejected, in any order.
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
        return LabelLine(number=number, kind="pair", asset=better, other=worse, tie=tie)
    # Exactly one kind of label per line.
    kinds = [key for key in ALONE if record.get(key) is not None]
    if len(kinds) != 1:
        raise ValueError(
            f"expected one of {', '.join(ALONE)}, got {' and '.join(kinds) or 'none'}. Write {EXAMPLE}."
        )
    # `label` is the name of a thumb in the export of the labelling tool.
    kind = "thumb" if kinds == ["label"] else kinds[0]
    value = record[kinds[0]]
    if (
        kind == "thumb"
        and value not in (True, False)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
    ):
        expected = "true or false" if kind == "thumb" else "a number"
        raise ValueError(f"expected {kinds[0]} to be {expected}, got {value!r}. Correct the line.")
    # A probability; other values are scores.
    if kind == "p" and not 0 <= value <= 1:
        raise ValueError(
            f"expected p from 0 to 1, got {value!r}. For ratings on another scale use the field score."
        )
    # Empty for a single, anonymous rater.
    rater = str(record.get("rater") or record.get("annotator") or "")
    return LabelLine(
        number=number, kind=kind, asset=asset("asset", "mesh", "look_at"), value=float(value), rater=rater
    )


def _goodness_from_lines(
    lines: Sequence[LabelLine], prompt_of: Mapping[str, str], file: str
) -> dict[str, float]:
    """Compute r of all assets from parsed lines of one kind."""
    kind = lines[0].kind
    values = (
        standardised_by_rater((line.rater, line.value) for line in lines)
        if kind == "score"
        else [line.value for line in lines]
    )
    labelled = zip(lines, values, strict=True)
    # Scores are standardised over all prompts of a rater, everything else is computed per prompt.
    groups = _grouped((prompt_of[line.asset], (line, value)) for line, value in labelled)
    converters: dict[str, Callable[[list[tuple[LabelLine, float]]], dict[str, float]]] = {
        "thumb": lambda group: of_votes([(line.asset, bool(value)) for line, value in group]),
        "score": lambda group: goodness_from_scores([(line.asset, value) for line, value in group]),
        "p": lambda group: goodness_from_probabilities([(line.asset, value) for line, value in group]),
        "pair": lambda group: of_pairs([Comparison(line.asset, line.other, line.tie) for line, _ in group]),
        "rank": lambda group: of_ranks(_unique_ranks(group, file)),
    }
    return {name: r for group in groups.values() for name, r in converters[kind](group).items()}


def _unique_ranks(group: Sequence[tuple[LabelLine, float]], file: str) -> dict[str, float]:
    """Return the rank of each asset of a prompt. Raises: ValueError for an asset with two ranks."""
    ranks: dict[str, float] = {}
    for line, value in group:
        if line.asset in ranks:
            raise ValueError(
                f"{file}, line {line.number}: expected one rank per asset, got another rank of"
                f" {line.asset!r}. Keep one."
            )
        ranks[line.asset] = value
    return ranks


def _describe_no_signal(lines: Sequence[LabelLine], prompt_of: Mapping[str, str]) -> str:
    """Describe why labels have no signal, and what to do."""
    kind = lines[0].kind
    labelled = {name for line in lines for name in (line.asset, line.other) if name}
    if len(labelled) == len({prompt_of[name] for name in labelled}):
        return (
            "expected labels of at least two assets of one prompt (field condition), got one asset of each."
            " Label several assets of a prompt."
        )
    if kind == "thumb" and len({line.value for line in lines}) == 1:
        return (
            f"expected good and bad assets, got {len(lines)} that are all"
            f" {'good' if lines[0].value else 'bad'}. Label other assets, or use scores."
        )
    kind_of_ties = "only ties" if kind in ("rank", "pair") else f"equal {kind}s"
    return (
        f"expected labels that distinguish assets of a prompt, got {kind_of_ties}. Label more assets, or use"
        " a finer scale."
    )


def contrast(goodness: Goodness, prompts: Collection[str], prompt_of: Mapping[str, str]) -> dict[str, float]:
    """Select the assets of some prompts that are not alone in their prompt: those with a training signal.

    Args: prompt_of: the prompt of every asset.
    """
    groups = _by_prompt(goodness, prompt_of)
    return {
        name: r
        for name, r in goodness.items()
        if prompt_of[name] in prompts and len(groups[prompt_of[name]]) > 1
    }
