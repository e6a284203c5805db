"""Compute the goodness r of assets from labels of any kind: 0 (worst) to 1 (best) within a prompt.

A file of labels contains one JSON object per line. All lines of a file are of one kind:

| line                                               | applies to         | written by                       |
| -------------------------------------------------- | ------------------ | -------------------------------- |
| {"asset", "condition", "thumb": true}              | an asset           | the user; `asset-scores`         |
| {"asset", "condition", "score": 4, "rater": "ann"} | an asset           | `asset-scores`                   |
| {"asset", "condition", "p": 0.8, "rater": "m-1"}   | an asset's P(good) | an ensemble of rewards           |
| {"asset", "condition", "rank": 1}                  | an asset; 1 = best | `rankings`, `ranking.jsonl`      |
| {"preferred": "a.ply", "rejected": "b.ply"}        | a pair             | `asset-pairs`                    |

An asset is named by its name in the list of assets, or by the path of one of its files, relative to the file
of labels. `condition`, the prompt of the asset, may be left out. `mesh` is accepted for `asset`, `annotator`
for `rater`, and `label` for `thumb`. The fields of `preferences.provenance` state the origin of a label;
labels of judges are read only if the caller selects them. All other fields are ignored. Ranks order all
assets of a prompt. `asset-scores`, `rankings` and `asset-pairs` are exports of the labelling tool (its
`--kind`). With `"tie": true` neither asset of a pair is preferred.

The advantages A = 2 r - 1 of the assets of each prompt sum to 0. Without this, a flow that is trained with r
would move towards all assets if all A were positive, and away from all assets if all A were negative. An
asset that is the only one of its prompt cannot be compared: it gets r = 1/2, which has no training signal. If
an advantage of a prompt exceeds the range -1..1, all of them are divided by the largest absolute value.
Clipping them would change the sum.

Shapes: K assets of a prompt.
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
from eg3d_rlhf.preferences.provenance import (
    PEOPLE_ONLY,
    LabelChoice,
    LabelUse,
    check_not_empty,
    origin_of,
)

# Number of pseudo-votes that are added to the votes on each asset. They are divided into good and bad in the
# same ratio as all votes of the prompt.
PRIOR = 2.0
Goodness = Mapping[str, float]  # r by name of the asset, for the assets that have labels
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def _grouped(keys_and_values: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of each key. Keys and values are in the order of their first occurrence."""
    values_by_key: dict[Key, list[Value]] = defaultdict(list)
    for key, value in keys_and_values:
        values_by_key[key].append(value)
    return values_by_key


# Functions that convert the labels of one prompt to the goodness r of its assets


def goodness_from_ranks(ranks: Mapping[str, float]) -> dict[str, float]:
    """Compute the goodness r of the assets of a prompt from their ranks, of which 1 is the best.

    r = (number of worse assets + number of tied assets / 2) / (K - 1). The mean over the assets is 1/2. A
    single asset gets 1/2.

    >>> goodness_from_ranks({"a": 1, "b": 2, "c": 2})
    {'a': 1.0, 'b': 0.25, 'c': 0.25}
    """
    # Ranks 1..K without gaps; tied assets get the mean of their ranks.
    mean_ranks = rankdata(list(ranks.values()))
    K = len(ranks)
    return {
        name: float((K - rank) / (K - 1)) if K > 1 else 0.5
        for name, rank in zip(ranks, mean_ranks, strict=True)
    }


def goodness_from_votes(votes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Compute the goodness r of the assets of a prompt from votes (asset, True if the asset is good).

    The advantage of an asset is 2 p - 1, centred over the prompt, with p = (good + 2 s) / (n + 2). An asset
    has n votes, of which `good` are good, and s is the share of good votes of the prompt.

    >>> {name: round(r, 3) for name, r in goodness_from_votes([("a", True), ("b", False)]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    votes_by_asset = _grouped(votes)
    good_share = float(np.mean([vote for asset_votes in votes_by_asset.values() for vote in asset_votes]))
    return centred(
        {
            name: (2 * (sum(asset_votes) + PRIOR * good_share) / (len(asset_votes) + PRIOR)) - 1
            for name, asset_votes in votes_by_asset.items()
        }
    )


def goodness_from_probabilities(probabilities: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Compute the goodness r of the assets of a prompt from (asset, probability that the asset is good).

    The advantage of an asset is 2 p - 1, centred over the prompt, where p is the mean of its probabilities.
    If the members of an ensemble disagree about an asset, p is about 1/2.
    """
    return centred(
        {
            asset: 2 * float(np.mean(asset_probabilities)) - 1
            for asset, asset_probabilities in _grouped(probabilities).items()
        }
    )


def goodness_from_pairs(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Compute the goodness r of the assets of a prompt from comparisons of pairs of assets.

    The advantage of an asset is 2 p - 1, centred over the prompt. For two assets that were only compared with
    each other, p = (wins + ties / 2 + 1) / (n + 2) for n comparisons. For all other assets, p is the mean,
    over the opponents of the asset, of the probability that it beats the opponent. This probability comes
    from the Bradley-Terry strengths of all assets that are connected by comparisons. A share of wins would
    instead depend on the opponents with which an asset was compared.

    >>> {name: round(r, 3) for name, r in goodness_from_pairs([Comparison("a", "b")]).items()}
    {'a': 0.667, 'b': 0.333}
    """
    probabilities: dict[str, float] = {}
    for linked_comparisons in linked(comparisons):
        # Names in the order of their first occurrence
        asset_names: list[str] = []
        for comparison in linked_comparisons:
            for name in (str(comparison.winner), str(comparison.loser)):
                if name not in asset_names:
                    asset_names.append(name)
        if len(asset_names) == 2:
            first_win_count = sum(
                0.5 if comparison.tie else float(comparison.winner == asset_names[0])
                for comparison in linked_comparisons
            )
            # Laplace's rule of succession (a uniform prior). Bradley-Terry strengths would be infinite after
            # one win.
            first_probability = (first_win_count + 1) / (len(linked_comparisons) + 2)
            probabilities |= {asset_names[0]: first_probability, asset_names[1]: 1 - first_probability}
        else:
            fitted_strengths = bradley_terry(linked_comparisons)
            strength_of_asset = dict(
                zip(fitted_strengths.items, fitted_strengths.strength.tolist(), strict=True)
            )
            # A set counts each opponent once, even after several comparisons.
            opponents_of_asset: dict[Hashable, set[Hashable]] = defaultdict(set)
            for comparison in linked_comparisons:
                opponents_of_asset[comparison.winner].add(comparison.loser)
                opponents_of_asset[comparison.loser].add(comparison.winner)
            for name in asset_names:
                win_probabilities = [
                    expit(strength_of_asset[name] - strength_of_asset[opponent])
                    for opponent in opponents_of_asset[name]
                ]
                probabilities[name] = float(np.mean(win_probabilities))
    return centred({name: 2 * p - 1 for name, p in probabilities.items()})


def linked(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Split comparisons into groups that have no item in common.

    The groups are the connected components of the graph whose vertices are items and whose edges are
    comparisons. They are in the order of their first comparison.
    """
    items = dict.fromkeys(item for comparison in comparisons for item in comparison[:2])
    index_of_item = {item: i for i, item in enumerate(items)}
    # Edges of the graph; their direction does not matter.
    winners = [index_of_item[comparison.winner] for comparison in comparisons]
    losers = [index_of_item[comparison.loser] for comparison in comparisons]
    edges = coo_matrix(
        (np.ones(len(comparisons)), (winners, losers)), shape=(len(index_of_item), len(index_of_item))
    )
    _, component_of_item = connected_components(edges, directed=False)
    return list(
        _grouped(
            (int(component_of_item[index_of_item[comparison.winner]]), comparison)
            for comparison in comparisons
        ).values()
    )


def goodness_from_scores(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Compute the goodness r of the assets of a prompt from (asset, standardised score).

    The scores are standardised by `standardised_by_rater`.

    The advantage of an asset is half the mean of its standardised scores, centred over the prompt.
    """
    return centred(
        {asset: float(np.mean(asset_scores)) / 2 for asset, asset_scores in _grouped(scores).items()}
    )


def standardised_by_rater(scores: Iterable[tuple[str, float]]) -> list[float]:
    """Standardise scores: (score - mean) / standard deviation, over all scores of the same rater.

    The standardised scores of a rater whose scores are all equal are 0.

    Args: scores: scores as (rater, score), of all prompts.
    Returns: standardised scores, in the same order.
    """
    # The argument may be an iterator, and is read twice below.
    score_list = list(scores)
    # Mean and standard deviation of the scores of each rater
    moments_by_rater = {
        rater: (float(np.mean(rater_scores)), float(np.std(rater_scores)))
        for rater, rater_scores in _grouped(score_list).items()
    }
    return [
        (score - moments_by_rater[rater][0]) / moments_by_rater[rater][1]
        if moments_by_rater[rater][1] > 1e-9
        else 0.0
        for rater, score in score_list
    ]


def centred(advantages: Mapping[str, float]) -> dict[str, float]:
    """Subtract the mean from the advantages A of a prompt, and convert them to r = (1 + A) / 2.

    If an advantage then exceeds the range -1..1, all are divided by the largest absolute value.

    Args: advantages: advantages by asset.
    """
    advantage_array = np.array(list(advantages.values()), dtype=float)
    # The sum of A over a prompt becomes 0.
    advantage_array -= advantage_array.mean()
    advantage_array /= max(1.0, float(np.abs(advantage_array).max()))
    return {
        name: float(0.5 + advantage / 2) for name, advantage in zip(advantages, advantage_array, strict=True)
    }


# Advantages for losses over all assets of a prompt, and controls


def normal_scores(r: Sequence[float] | np.ndarray) -> np.ndarray:
    """Compute advantages [K] from the order of the goodness r [K].

    The asset of rank i (1 is the worst) gets the normal quantile at (i - 1/2) / K. The advantages are then
    standardised to mean 0 and standard deviation 1. All are 0 if all assets are tied.

    >>> normal_scores([0.2, 0.9])
    array([-1.,  1.])
    """
    ranks = rankdata(r)
    # Standardisation would divide by 0 if all ranks are equal.
    if np.ptp(ranks) == 0:
        return np.zeros(len(ranks))
    advantages: np.ndarray = ndtri((ranks - 0.5) / len(ranks))
    advantages = advantages - advantages.mean()
    advantages = advantages / advantages.std()
    return advantages


def goodness_for_use(
    goodness: Goodness, prompt_of: Mapping[str, str], label_use: str, seed: int
) -> dict[str, float]:
    """Return the goodness with which a flow is trained, or that of one of the two controls.

    Args:
        goodness: goodness r by asset.
        prompt_of: prompt of every asset.
        label_use: "labels" for the goodness itself; or one of two controls: "randomised" permutes r at random
            over the assets of each prompt, and "inverted" gives 1 - r.
        seed: seed of the random permutation.
    """
    if label_use == "inverted":
        return {name: 1 - r for name, r in goodness.items()}
    if label_use != "randomised":
        return dict(goodness)
    # A separate stream of random numbers: the number 3 distinguishes it from other uses of the seed.
    rng = np.random.default_rng([seed, 3])
    permuted_goodness = dict[str, float]()
    # The permutation is within a prompt, so that each prompt has the same values of r as before.
    for prompt_assets in _by_prompt(goodness, prompt_of).values():
        for name, source_name in zip(prompt_assets, rng.permutation(prompt_assets).tolist(), strict=True):
            permuted_goodness[name] = goodness[source_name]
    # In the order of the assets in `goodness`
    return {name: permuted_goodness[name] for name in goodness}


def _by_prompt(names: Iterable[str], prompt_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Group names of assets by prompt."""
    return _grouped((prompt_of[name], name) for name in names)


# Files.


@dataclass(frozen=True, kw_only=True)
class KnownAssets:
    """The list of assets to which labels may refer."""

    prompt_of: Mapping[str, str]  # prompt of every asset, by the name of the asset
    files: Mapping[Path, str] = field(default_factory=dict)  # name of the asset by resolved path of its files

    def find(self, name_or_path: str, folder: Path) -> str:
        """Return the name of the asset that a label names.

        Args:
            name_or_path: name of the asset, or path of one of its files.
            folder: folder to which the path is relative.
        Raises: ValueError if the list of assets does not contain the asset.
        """
        if name_or_path in self.prompt_of:
            return name_or_path
        name = self.files.get((folder / name_or_path).resolve())
        if name is None:
            example_names = ", ".join(list(self.prompt_of)[:3])
            raise ValueError(
                f"{name_or_path!r} is not one of the {len(self.prompt_of)} assets ({example_names}, ...). Use"
                " a name or a file from the list of assets."
            )
        return name


@dataclass(frozen=True, kw_only=True)
class LabelLine:
    """Parsed line of a file of labels."""

    number: int  # number of the line, from 1
    kind: str  # kind of the label: thumb, score, p, rank or pair
    asset: str  # name of the asset; for a pair, of the preferred asset
    value: float = 0.0  # value of the label; 0 for a pair
    rater: str = ""  # name of the rater; '' if the line does not state it
    other: str = ""  # for a pair: name of the rejected asset
    tie: bool = False  # for a pair: True if neither asset is preferred


# Names of the fields with labels of a single asset
SINGLE_ASSET_KINDS = ("thumb", "label", "score", "p", "rank")
EXAMPLE = '{"asset": NAME, "condition": NAME, "thumb": true}'


def read_label_lines(
    path: Path, known_assets: KnownAssets, choice: LabelChoice = PEOPLE_ONLY
) -> list[LabelLine]:
    """Read the lines of a file of labels, without their numbers by origin. See `read_counted_label_lines`."""
    return read_counted_label_lines(path, known_assets, choice)[0]


def read_counted_label_lines(
    path: Path, known_assets: KnownAssets, choice: LabelChoice = PEOPLE_ONLY
) -> tuple[list[LabelLine], LabelUse]:
    """Read the lines of a file of labels. The docstring of the module describes the kinds of labels.

    Args:
        path: the .jsonl file.
        known_assets: assets to which labels may refer.
        choice: selection of the labels by their origin.
    Returns: the selected lines, and the numbers of lines of each origin.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names file and line, for a line
        that is not valid, for an unknown asset or a wrong prompt, for several kinds of labels in one file,
        and for a file without labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--labels={path}: this file does not exist. Pass the path of a .jsonl file.")
    label_lines: list[LabelLine] = []
    records: list[Mapping[str, Any]] = []  # JSON objects of the lines
    for line_number, json_object in jsonl_records(path, EXAMPLE):
        try:
            origin_of(json_object)  # raises an error for an unknown origin
            label_line = _parse(line_number, json_object, known_assets, path.parent)
            label_lines.append(label_line)
            records.append(json_object)
            # Kinds cannot be mixed, because their scales differ. The first line decides the kind of the file.
            if label_line.kind != label_lines[0].kind:
                raise ValueError(
                    f"this is a label of the kind {label_line.kind}, but line {label_lines[0].number} is of"
                    f" the kind {label_lines[0].kind}. Put the labels of each kind into a separate file."
                )
        except ValueError as error:
            raise ValueError(f"{path.name}, line {line_number}: {error}") from None
    if not label_lines:
        raise ValueError(
            f"{path.name}, line 1: the file is empty and contains no label. Add labels of some assets."
        )
    lines_and_records = list(zip(label_lines, records, strict=True))
    selected_lines, use = choice.select(lines_and_records, lambda line_and_record: line_and_record[1])
    check_not_empty(selected_lines, use, path.name)
    return [label_line for label_line, _ in selected_lines], use


def read_goodness(
    path: Path, known_assets: KnownAssets, choice: LabelChoice = PEOPLE_ONLY
) -> dict[str, float]:
    """Read a file of labels, without their numbers by origin. See `read_counted_goodness`."""
    return read_counted_goodness(path, known_assets, choice)[0]


def read_counted_goodness(
    path: Path, known_assets: KnownAssets, choice: LabelChoice = PEOPLE_ONLY
) -> tuple[dict[str, float], LabelUse]:
    """Read a file of labels, and compute the goodness r of each labelled asset.

    Args:
        path: the .jsonl file.
        known_assets: assets to which labels may refer.
        choice: selection of the labels by their origin.
    Returns: the goodness by name of the asset, and the numbers of labels of each origin.
    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not valid (see `read_label_lines`), or the labels do not distinguish any assets
            of a prompt.
    """
    label_lines, use = read_counted_label_lines(path, known_assets, choice)
    goodness = _goodness_from_lines(label_lines, known_assets.prompt_of, path.name)
    # If all r are 1/2, no asset is better than another asset of its prompt.
    if all(abs(r - 0.5) < 1e-9 for r in goodness.values()):
        raise ValueError(
            f"{path.name}, lines {label_lines[0].number} to {label_lines[-1].number}:"
            f" {_describe_no_signal(label_lines, known_assets.prompt_of)}"
        )
    return goodness, use


def _parse(
    line_number: int, json_object: Mapping[str, Any], known_assets: KnownAssets, folder: Path
) -> LabelLine:
    """Convert the JSON object of a line to a `LabelLine`.

    Args:
        line_number: number of the line, from 1.
        json_object: JSON object of the line.
        known_assets: assets to which labels may refer.
        folder: folder to which paths of assets are relative.
    Raises: ValueError for a record that is not valid; the caller adds file and line to the message.
    """

    def find_asset(*field_names: str) -> str:
        """Return the name of the asset in the first of `field_names` that the record has."""
        name_or_path = next((json_object[name] for name in field_names if json_object.get(name)), None)
        if not isinstance(name_or_path, str):
            raise ValueError(
                f"the field {field_names[0]} with the name of an asset is missing. Write, for example,"
                f" {EXAMPLE}."
            )
        name = known_assets.find(name_or_path, folder)
        condition = json_object.get("condition")
        if condition is not None and condition != known_assets.prompt_of[name]:
            raise ValueError(
                f"expected condition {known_assets.prompt_of[name]!r} of the asset {name_or_path!r}, as in"
                f" the list of assets, got {condition!r}. Correct the condition of this line, or that of the"
                " asset in the list."
            )
        return name

    if "preferred" in json_object or "rejected" in json_object:
        preferred_asset = find_asset("preferred")
        rejected_asset = find_asset("rejected")
        # An exported tie has both fields, too, in any order.
        is_tie = json_object.get("tie", False)
        if preferred_asset == rejected_asset:
            raise ValueError(
                f"the fields preferred and rejected name the same asset, {preferred_asset!r}. Remove this"
                " line, or correct the field preferred or the field rejected."
            )
        if known_assets.prompt_of[preferred_asset] != known_assets.prompt_of[rejected_asset]:
            raise ValueError(
                f"the assets {preferred_asset!r} and {rejected_asset!r} have different prompts (condition),"
                " so they cannot be compared. Remove this line."
            )
        if not isinstance(is_tie, bool):
            raise ValueError(
                f"expected tie to be true or false, got {is_tie!r}. Write true or false, or remove the field"
                " tie."
            )
        return LabelLine(
            number=line_number, kind="pair", asset=preferred_asset, other=rejected_asset, tie=is_tie
        )
    label_fields = [name for name in SINGLE_ASSET_KINDS if json_object.get(name) is not None]
    if not label_fields:
        raise ValueError(
            f"the line has none of the fields {', '.join(SINGLE_ASSET_KINDS)}. Write, for example, {EXAMPLE}."
        )
    if len(label_fields) > 1:
        raise ValueError(
            f"the line has several labels: {' and '.join(label_fields)}. Keep one of these fields, and remove"
            " all others."
        )
    label_field = label_fields[0]
    # The export of the labelling tool names a thumb `label`.
    label_kind = "thumb" if label_field == "label" else label_field
    label_value = json_object[label_field]
    # In Python, 1 == True and 0 == False, so 1 and 0 are accepted for a thumb, too.
    if label_kind == "thumb" and label_value not in (True, False):
        raise ValueError(
            f"expected {label_field} to be true or false, got {label_value!r}. Write true or false."
        )
    if not isinstance(label_value, (int, float)) or not math.isfinite(label_value):
        raise ValueError(f"expected {label_field} to be a number, got {label_value!r}. Write a number.")
    if label_kind == "p" and not 0 <= label_value <= 1:
        raise ValueError(
            f"expected the probability p from 0 to 1, got {label_value!r}. For ratings on a different scale"
            " use the field score."
        )
    # Labels without the name of a rater count as labels of one rater, ''.
    rater_values = (json_object.get(name) for name in ("rater", "annotator"))
    # A number may name a rater, also 0.
    rater = next((str(value) for value in rater_values if value not in (None, "")), "")
    asset = find_asset("asset", "mesh", "look_at")
    return LabelLine(number=line_number, kind=label_kind, asset=asset, value=float(label_value), rater=rater)


def _goodness_from_lines(
    label_lines: Sequence[LabelLine], prompt_of: Mapping[str, str], file_name: str
) -> dict[str, float]:
    """Compute the goodness r of all assets from parsed lines of one kind.

    Args:
        label_lines: lines of a file of labels.
        prompt_of: prompt of every asset.
        file_name: name of the file, for messages.
    """
    label_kind = label_lines[0].kind
    # Scores are standardised over all prompts of a rater. Everything else is computed per prompt.
    label_values = (
        standardised_by_rater((label_line.rater, label_line.value) for label_line in label_lines)
        if label_kind == "score"
        else [label_line.value for label_line in label_lines]
    )
    lines_of_prompt = _grouped(
        (prompt_of[label_line.asset], (label_line, label_value))
        for label_line, label_value in zip(label_lines, label_values, strict=True)
    )
    # Functions that compute r of the assets of a prompt from their lines and values
    converters: dict[str, Callable[[list[tuple[LabelLine, float]]], dict[str, float]]] = {
        "thumb": lambda lines_and_values: goodness_from_votes(
            [(label_line.asset, bool(label_value)) for label_line, label_value in lines_and_values]
        ),
        "score": lambda lines_and_values: goodness_from_scores(
            [(label_line.asset, label_value) for label_line, label_value in lines_and_values]
        ),
        "p": lambda lines_and_values: goodness_from_probabilities(
            [(label_line.asset, label_value) for label_line, label_value in lines_and_values]
        ),
        "pair": lambda lines_and_values: goodness_from_pairs(
            [
                Comparison(label_line.asset, label_line.other, label_line.tie)
                for label_line, _ in lines_and_values
            ]
        ),
        "rank": lambda lines_and_values: goodness_from_ranks(_unique_ranks(lines_and_values, file_name)),
    }
    goodness: dict[str, float] = {}
    for lines_and_values in lines_of_prompt.values():
        goodness |= converters[label_kind](lines_and_values)
    return goodness


def _unique_ranks(lines_and_ranks: Sequence[tuple[LabelLine, float]], file_name: str) -> dict[str, float]:
    """Return the rank of each asset of a prompt.

    Args:
        lines_and_ranks: lines of the prompt with their ranks.
        file_name: name of the file, for messages.
    Raises: ValueError for an asset with two ranks.
    """
    rank_by_asset: dict[str, float] = {}
    # Number of the line of each asset, for the message
    line_number_by_asset: dict[str, int] = {}
    for label_line, rank in lines_and_ranks:
        if label_line.asset in rank_by_asset:
            first_number = line_number_by_asset[label_line.asset]
            raise ValueError(
                f"{file_name}, line {label_line.number}: the asset {label_line.asset!r} already has a rank in"
                f" line {first_number}. Remove line {first_number} or line {label_line.number}."
            )
        rank_by_asset[label_line.asset] = rank
        line_number_by_asset[label_line.asset] = label_line.number
    return rank_by_asset


def _describe_no_signal(label_lines: Sequence[LabelLine], prompt_of: Mapping[str, str]) -> str:
    """Return a message that states why labels do not distinguish assets, and what to do."""
    label_kind = label_lines[0].kind
    # Only pairs have a second asset; for all other kinds its name is ''.
    labelled_assets = {
        asset for label_line in label_lines for asset in (label_line.asset, label_line.other) if asset
    }
    if len(labelled_assets) == len({prompt_of[asset] for asset in labelled_assets}):
        return (
            "each prompt (condition) has labels of one asset only, so that no assets can be compared. Label"
            " several assets of a prompt."
        )
    if label_kind == "thumb" and len({label_line.value for label_line in label_lines}) == 1:
        return (
            f"all {len(label_lines)} labels state that the asset is"
            f" {'good' if label_lines[0].value else 'bad'}, so that they do not distinguish assets. Label"
            " further assets, or use scores."
        )
    equal_labels_text = "only ties" if label_kind in ("rank", "pair") else f"equal {label_kind}s"
    return (
        f"the labels of each prompt are {equal_labels_text}, so that they do not distinguish assets. Label"
        " further assets, or use a finer scale."
    )


def contrast(goodness: Goodness, prompts: Collection[str], prompt_of: Mapping[str, str]) -> dict[str, float]:
    """Select the assets that have a training signal: assets whose prompt has at least two labelled assets.

    Args:
        goodness: goodness r by asset.
        prompts: prompts whose assets are selected.
        prompt_of: prompt of every asset.
    """
    labelled_assets_by_prompt = _by_prompt(goodness, prompt_of)
    return {
        name: r
        for name, r in goodness.items()
        if prompt_of[name] in prompts and len(labelled_assets_by_prompt[prompt_of[name]]) > 1
    }
