"""The open files of votes on assets: pairs.jsonl and scores.jsonl, one JSON object per line.

pairs.jsonl:

| key        | meaning                                                                                    |
| ---------- | ------------------------------------------------------------------------------------------ |
| winner     | preferred asset: a path relative to the folder of assets, or {"model", "prompt"}; required |
| loser      | the other asset; required                                                                  |
| prompt     | text of the prompt, or the path of an image                                                |
| criterion  | what was compared, in lower case with underscores; "overall" if absent                     |
| weight     | vote share of the winner, 0..1; 1 where there was one vote                                 |
| tie        | true: neither is preferred; the order of winner and loser then has no meaning              |
| annotator  | name of the person or program                                                              |
| provenance | "people", "model: NAME" or "unknown" (preferences/provenance.py); "people" if absent       |
| source_row | number of the row in the file that it was imported from, from 1                            |

scores.jsonl has asset, score, and optionally low and high (ends of the scale) and higher_is_better, beside
prompt, criterion, annotator, provenance and source_row. All other keys are kept in `extra`.
"""

import functools
import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eg3d_rlhf.preferences.labels import JSONL_SUFFIXES, jsonl_records, read_records
from eg3d_rlhf.preferences.provenance import PEOPLE, origin_of
from training.storage import write_atomic

OVERALL = "overall"  # criterion of votes that name none
# Examples for messages about lines of the two files.
PAIRS_EXAMPLE = '{"winner": "a/chair.glb", "loser": "b/chair.glb"}'
SCORES_EXAMPLE = '{"asset": "a/chair.glb", "score": 3}'
# Outcomes of a vote or a verdict on a pair.
FIRST = "first"
SECOND = "second"
TIE = "tie"

# Path relative to the folder of assets, or (model, prompt) where there is no file.
Asset = str | tuple[str, str]


def _asset(key: str, value: object) -> Asset:
    """Return an asset of a record: a path, or (model, prompt)."""
    # A path; whether the file exists is checked where it is opened.
    if isinstance(value, str) and value.strip():
        return value
    # Sets without files name the method and the prompt instead.
    if isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("model", "prompt")):
        return value["model"], value["prompt"]
    raise ValueError(
        f"{key}: expected the path of an asset or an object with the texts model and prompt, got {value!r}."
        " Correct it."
    )


def _asset_json(asset: Asset) -> object:
    """Return an asset in JSON types."""
    return asset if isinstance(asset, str) else {"model": asset[0], "prompt": asset[1]}


def _text(record: Mapping[str, Any], key: str, default: str) -> str:
    """Return a text of a record; null and absent keys give the default."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a text, got {value!r}. Correct it.")
    return value


def _number(record: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """Return a finite number of a record; null and absent keys give the default."""
    value = record.get(key)
    if value is None:
        return default
    # True and False are integers in Python, and json.loads accepts NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key}: expected a finite number, got {value!r}. Correct it.")
    return float(value)


def _flag(record: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a truth value of a record; null and absent keys give the default."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {value!r}. Correct it.")
    return value


def _row(record: Mapping[str, Any]) -> int | None:
    """Return the source row of a record, or None if it has none."""
    value = record.get("source_row")
    # Rows are counted from 1, as editors and spreadsheets do.
    if value is None or isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"source_row: expected a whole number >= 1, got {value!r}. Correct it.")


@dataclass(frozen=True, kw_only=True)
class AssetPair:
    """A vote on two assets, a line of pairs.jsonl. The fields are described in the table of the module.

    Raises: ValueError for a value that is not allowed.
    """

    winner: Asset
    loser: Asset
    prompt: str = ""
    criterion: str = OVERALL
    weight: float = 1.0
    tie: bool = False
    annotator: str = ""
    provenance: str = PEOPLE
    source_row: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # raises for a wrong value
        origin_of({"provenance": self.provenance})
        # A self-pair holds no preference, and any answer to it would be correct.
        if self.winner == self.loser:
            raise ValueError(f"winner and loser are the same asset, {self.winner}. Remove this vote.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be between 0 and 1, got {self.weight:g}. Correct it.")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "AssetPair":
        """Create a vote from the keys of a line. Unknown keys become `extra`."""
        for key in ("winner", "loser"):
            if key not in record:
                raise ValueError(f"the key {key} is missing. Write, for example, {PAIRS_EXAMPLE}.")
        # A tie without a weight has half of the votes on each side.
        is_tie = _flag(record, "tie", False)
        weight = _number(record, "weight", 0.5 if is_tie else 1.0)
        assert weight is not None  # the default is a number
        return cls(
            winner=_asset("winner", record["winner"]),
            loser=_asset("loser", record["loser"]),
            prompt=_text(record, "prompt", ""),
            criterion=_text(record, "criterion", "") or OVERALL,
            weight=weight,
            tie=is_tie,
            annotator=_text(record, "annotator", ""),
            provenance=_text(record, "provenance", PEOPLE),
            source_row=_row(record),
            extra={key: value for key, value in record.items() if key not in cls.__dataclass_fields__},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the line in JSON types, with all keys of the format."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        assets = {"winner": _asset_json(self.winner), "loser": _asset_json(self.loser)}
        return {**fields, **assets, **self.extra}

    @property
    def outcome(self) -> str:
        """Return what the vote says about (winner, loser): first, second or tie."""
        # A weight of one half is a tie, also where the line does not say so.
        if self.tie or self.weight == 0.5:
            return TIE
        return FIRST if self.weight > 0.5 else SECOND


@dataclass(frozen=True, kw_only=True)
class AssetScore:
    """A score of one asset, a line of scores.jsonl.

    Raises: ValueError for a value that is not allowed.
    """

    asset: Asset
    score: float
    prompt: str = ""
    criterion: str = OVERALL
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    annotator: str = ""
    provenance: str = PEOPLE
    source_row: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # raises for a wrong value
        origin_of({"provenance": self.provenance})
        if (self.low is not None and self.score < self.low) or (
            self.high is not None and self.score > self.high
        ):
            raise ValueError(f"the score {self.score:g} is outside {self.low}..{self.high}. Correct it.")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "AssetScore":
        """Create a score from the keys of a line. Unknown keys become `extra`."""
        # A score of 0 is a score, so None marks a missing one.
        score = _number(record, "score", None)
        if "asset" not in record or score is None:
            raise ValueError(f"the keys asset and score are needed. Write, for example, {SCORES_EXAMPLE}.")
        return cls(
            asset=_asset("asset", record["asset"]),
            score=score,
            prompt=_text(record, "prompt", ""),
            criterion=_text(record, "criterion", "") or OVERALL,
            low=_number(record, "low", None),
            high=_number(record, "high", None),
            higher_is_better=_flag(record, "higher_is_better", True),
            annotator=_text(record, "annotator", ""),
            provenance=_text(record, "provenance", PEOPLE),
            source_row=_row(record),
            extra={key: value for key, value in record.items() if key not in cls.__dataclass_fields__},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the line in JSON types, with all keys of the format."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        return {**fields, "asset": _asset_json(self.asset), **self.extra}


def read_asset_pairs(path: Path) -> list[AssetPair]:
    """Read a pairs.jsonl.

    Raises: FileNotFoundError if the file does not exist; ValueError, which names the line, for a wrong line.
    """
    # The example stands in the message about a line that is no JSON.
    reader = functools.partial(jsonl_records, example=PAIRS_EXAMPLE)
    return read_records(path, dict.fromkeys(JSONL_SUFFIXES, reader), AssetPair.from_dict, "pairs")


def read_asset_scores(path: Path) -> list[AssetScore]:
    """Read a scores.jsonl. For errors, see `read_asset_pairs`."""
    reader = functools.partial(jsonl_records, example=SCORES_EXAMPLE)
    return read_records(path, dict.fromkeys(JSONL_SUFFIXES, reader), AssetScore.from_dict, "assets")


def write_asset_votes(path: Path, votes: Iterable[AssetPair | AssetScore]) -> Path:
    """Write a pairs.jsonl or a scores.jsonl atomically, and return its path."""
    # ensure_ascii=False keeps prompts in other scripts readable.
    lines = (json.dumps(vote.to_dict(), ensure_ascii=False) + "\n" for vote in votes)
    write_atomic(path, "".join(lines).encode())
    return path


def has_scores(path: Path) -> bool:
    """Return True if the first line of a file of votes is a score, and False if it is a pair.

    Raises: FileNotFoundError if the file does not exist; ValueError if it is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file. Pass the path of a pairs.jsonl or scores.jsonl."
        )
    # Only the first line is looked at: one file holds one kind of votes.
    for _, record in jsonl_records(path, PAIRS_EXAMPLE):
        if "winner" in record or "loser" in record:
            return False
        if "score" in record:
            return True
        raise ValueError(
            f"{path.name}, line 1: the line is neither a pair nor a score. Write, for example,"
            f" {PAIRS_EXAMPLE} or {SCORES_EXAMPLE}."
        )
    raise ValueError(f"{path.name}, line 1: the file is empty. Add votes on pairs or scores.")


class VotedPair(NamedTuple):
    """A pair of assets with all votes on it by one criterion."""

    first: Asset
    second: Asset
    prompt: str
    criterion: str
    votes: dict[str, str]  # annotator -> first, second or tie


def _is_exchanged(first: Asset, second: Asset, prompt: str) -> bool:
    """Return True for about half of the pairs, by their names, so that the winner is not always the first."""
    names = sorted([json.dumps(_asset_json(first)), json.dumps(_asset_json(second))])
    # Files list the winner first, so the order of the file must not decide.
    is_sorted = json.dumps(_asset_json(first)) == names[0]
    digest = hashlib.sha256(json.dumps([*names, prompt]).encode()).digest()
    # One bit of the hash: about half of the pairs begin with the smaller name.
    return is_sorted != bool(digest[0] & 1)


def votes_by_pair(pairs: Sequence[AssetPair]) -> list[VotedPair]:
    """Group votes by pair and criterion, whatever the order of the two assets in a vote.

    The votes of an annotator on a pair become one: the most frequent, a tie if two are equally frequent. So
    lines that are repeated change nothing. Votes without an annotator count one by one.

    Returns: pairs in the order of their first vote; whether an asset is first does not depend on the winner.
    """
    groups: dict[tuple[Asset, Asset, str, str], dict[str, list[str]]] = {}
    for index, pair in enumerate(pairs):
        # The vote in terms of (first, second), whichever of the two won.
        sides = (pair.winner, pair.loser)
        outcome = pair.outcome
        if _is_exchanged(*sides, pair.prompt):
            sides = sides[::-1]
            outcome = {FIRST: SECOND, SECOND: FIRST}.get(outcome, TIE)
        votes = groups.setdefault((*sides, pair.prompt, pair.criterion), defaultdict(list))
        # Without a name, each line counts as another person.
        votes[pair.annotator or f"row {index + 1}"].append(outcome)
    return [VotedPair(*key, joined_votes(votes)) for key, votes in groups.items()]


def plurality(outcomes: Sequence[str]) -> str | None:
    """Return the most frequent outcome, a tie if the greatest number is shared, and None without any."""
    # Sorted by number, so two equal numbers at the start are a shared maximum.
    counts = Counter(outcomes).most_common()
    if not counts:
        return None
    return TIE if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def joined_votes(votes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Join the votes of each annotator on one pair to one vote, see `plurality`.

    Args: votes: annotator -> at least one vote.
    """
    return {annotator: plurality(outcomes) or TIE for annotator, outcomes in votes.items()}


def pairs_from_scores(scores: Sequence[AssetScore], margin: float, max_pairs: int = 1000) -> list[AssetPair]:
    """Make pairs of assets of the same prompt, criterion and annotator from scores.

    The asset with the better score wins if the scores differ by at least `margin` and are not equal;
    otherwise the pair is a tie. Several scores of an annotator for an asset are averaged.

    Args:
        scores: scores of assets.
        margin: smallest difference of scores that decides, >= 0, in the unit of the scores.
        max_pairs: greatest number of pairs of a criterion. More are thinned out by a hash of their names, so
            that the choice depends neither on the order of the lines nor on the scores.

    Raises: ValueError for a negative margin.
    """
    if not margin >= 0:
        raise ValueError(f"--margin must be >= 0, got {margin:g}. Pass a difference of scores.")
    # (criterion, prompt) -> asset -> annotator -> scores, larger is better
    groups: dict[tuple[str, str], dict[Asset, dict[str, list[float]]]] = {}
    for score in scores:
        by_asset = groups.setdefault((score.criterion, score.prompt), {})
        # Grades of defects are larger for worse assets.
        value = score.score if score.higher_is_better else -score.score
        by_asset.setdefault(score.asset, defaultdict(list))[score.annotator].append(value)
    # A pair of scores has the provenance of the scores that it was made from.
    provenances = {(score.criterion, score.asset, score.annotator): score.provenance for score in scores}
    # By criterion, because each criterion has a limit of its own.
    chosen: dict[str, list[tuple[bytes, str, Asset, Asset]]] = defaultdict(list)
    for (criterion, prompt), by_asset in groups.items():
        # Assets of different prompts are never compared.
        for first, second in _combinations(list(by_asset), max_pairs):
            # Sorted, so that (a, b) and (b, a) have the same hash.
            names = sorted([json.dumps(_asset_json(first)), json.dumps(_asset_json(second))])
            digest = hashlib.sha256(json.dumps([*names, prompt]).encode()).digest()
            chosen[criterion].append((digest, prompt, first, second))
    pairs = []
    for criterion, candidates in chosen.items():
        # Sorting by hash and cutting off is a random choice that any run repeats.
        for _, prompt, first, second in sorted(candidates, key=lambda row: row[0])[:max_pairs]:
            by_asset = groups[criterion, prompt]
            # Scores of two people are on different scales, so pairs are within one person.
            # Sorted, because the order of a set of texts differs between runs of Python.
            for annotator in sorted(by_asset[first].keys() & by_asset[second].keys()):
                means = [math.fsum(values) / len(values) for values in
                         (by_asset[first][annotator], by_asset[second][annotator])]  # fmt: skip
                difference = means[0] - means[1]
                # A margin of 0 leaves only equal scores as ties.
                is_tie = difference == 0 or abs(difference) < margin
                # Of a tie, the order has no meaning.
                winner, loser = (first, second) if difference >= 0 else (second, first)
                pairs.append(
                    AssetPair(
                        winner=winner,
                        loser=loser,
                        prompt=prompt,
                        criterion=criterion,
                        weight=0.5 if is_tie else 1.0,
                        tie=is_tie,
                        annotator=annotator,
                        provenance=provenances[criterion, first, annotator],
                    )
                )
    return pairs


def _combinations(assets: Sequence[Asset], max_pairs: int) -> Iterator[tuple[Asset, Asset]]:
    """Yield pairs of assets: all, or of a large group those of neighbours in an order by hash."""
    # All pairs of 10,000 assets would be 50 million.
    if len(assets) * (len(assets) - 1) // 2 <= 20 * max_pairs:
        yield from itertools.combinations(assets, 2)
        return
    # Neighbours in an order by hash are a random choice of pairs.
    ordered = sorted(
        assets, key=lambda asset: hashlib.sha256(json.dumps(_asset_json(asset)).encode()).digest()
    )
    # each asset with the next ones, until there are enough pairs to choose from
    for step in range(1, -(-max_pairs // len(ordered)) + 1):
        yield from zip(ordered[:-step], ordered[step:], strict=True)
