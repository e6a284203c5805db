"""A tournament of methods: Elo ratings from pairwise judgements, as GPTEval3D rates text-to-3D methods, with intervals.

P(i over j) = 1 / (1 + 10^((e_j - e_i) / 400)), so a rating is a Bradley-Terry strength times 400 / ln 10. GPTEval3D (2401.04092) counts a
draw as a win of both and climbs the likelihood by 10,000 steps of Adam from 0; here the maximum itself is found, and where there is none (a
method that never lost to the others) a prior holds the ratings and `regularised` says so.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eg3d_rlhf.preferences.bradley_terry import Comparison, Strengths, bradley_terry

SCALE = 400 / math.log(10)  # Elo points of one unit of strength
DRAWS = ("both", "davidson")


class Judgement(NamedTuple):
    """What a judge said of two methods' assets for one prompt."""

    a: str
    b: str
    winner: str  # 'a', 'b' or 'tie'
    prompt: str = ""
    criterion: str = "overall"


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One method's."""

    elo: float
    lo: float  # ends of the 95 % interval, of the resampled prompts
    hi: float
    judgements: int


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """Ratings by method, best first."""

    ratings: dict[str, Rating]
    draws: str
    tie_weight: float  # Davidson's nu; 0 where draws count for both
    regularised: bool  # no maximum: some methods never lost to the others, a prior holds the ratings
    prompts: int  # what was resampled; 0: single judgements

    def to_dict(self) -> dict:
        """Plain JSON types."""
        rows = {name: {"elo": r.elo, "ci95": [r.lo, r.hi], "judgements": r.judgements} for name, r in self.ratings.items()}
        return {
            "ratings": rows, "draws": self.draws, "tie_weight": self.tie_weight, "regularised": self.regularised, "prompts": self.prompts,
        }  # fmt: skip


def elo(
    judgements: Iterable[Judgement], *, draws: str = "both", mean: float = 1000.0, held: Mapping[str, float] | None = None,
    resamples: int = 200, seed: int = 0,
) -> Tournament:
    """Ratings of all methods, with 95 % intervals from resampled prompts (judgements, where no prompt is named).

    Args:
        draws: 'both': a win for each, as GPTEval3D counts; 'davidson': a result of its own, more likely between equals.
        mean: of all ratings, which only differences decide; held: known ratings that stay, instead of a mean.
    Raises: ValueError without judgements, for winners other than a, b and tie, and what bradley_terry refuses.
    """
    judgements, held = list(judgements), dict(held or {})
    if draws not in DRAWS:
        raise ValueError(f"elo: expected draws to be one of {', '.join(DRAWS)}, got {draws!r}. Choose one.")
    if not judgements:
        raise ValueError("elo: expected judgements, got none. Judge some pairs first.")
    wrong = next((j.winner for j in judgements if j.winner not in ("a", "b", "tie")), None)
    if wrong is not None:
        raise ValueError(f"elo: expected the winner to be a, b or tie, got {wrong!r}. Correct the judgement.")

    def fit(chosen: Sequence[Judgement]) -> tuple[Strengths, dict[str, float]]:
        compared = [c for j in chosen for c in _comparisons(j, draws)]
        found = bradley_terry(compared, held={name: value / SCALE for name, value in held.items()})
        shift = 0.0 if held else mean
        return found, {str(item): SCALE * float(s) + shift for item, s in zip(found.items, found.strength, strict=True)}

    named = all(j.prompt for j in judgements)
    clusters: dict[object, list[Judgement]] = defaultdict(list)
    for place, j in enumerate(judgements):
        clusters[j.prompt if named else place].append(j)
    found, ratings = fit(judgements)
    groups, rng = list(clusters.values()), np.random.default_rng(seed)
    drawn: dict[str, list[float]] = defaultdict(list)
    for _ in range(resamples):
        again = [j for k in rng.integers(len(groups), size=len(groups)) for j in groups[k]]
        if {name for j in again for name in (j.a, j.b)} - held.keys():
            for name, value in fit(again)[1].items():
                drawn[name].append(value)
    counts = {name: sum(name in (j.a, j.b) for j in judgements) for name in ratings}
    rows = {name: Rating(elo=value, **_ends(value, drawn[name]), judgements=counts[name]) for name, value in ratings.items()}
    return Tournament(
        ratings=dict(sorted(rows.items(), key=lambda row: -row[1].elo)), draws=draws, tie_weight=found.tie_weight,
        regularised=found.regularised, prompts=len(groups) if named else 0,
    )  # fmt: skip


def _comparisons(j: Judgement, draws: str) -> list[Comparison]:
    if j.winner == "tie":
        return [Comparison(j.a, j.b), Comparison(j.b, j.a)] if draws == "both" else [Comparison(j.a, j.b, tie=True)]
    return [Comparison(j.a, j.b) if j.winner == "a" else Comparison(j.b, j.a)]


def _ends(value: float, drawn: Sequence[float]) -> dict[str, float]:
    """Normal ends, of the deviation over resamples: steadier than their quantiles where these are few."""
    half = 1.96 * float(np.std(drawn, ddof=1)) if len(drawn) > 1 else 0.0
    return {"lo": value - half, "hi": value + half}


def read_judgements(path: str | Path) -> list[Judgement]:
    """Judgements of a JSON-lines file with fields a, b, winner and, where known, prompt and criterion; others are passed over.

    Raises: OSError; ValueError with file, line and remedy for the first line that does not fit, and for a file without any.
    """
    path, found = Path(path), []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path.name}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON, got: {error}. Correct the line.") from None
        values = {k: record[k] for k in Judgement._fields if k in record} if isinstance(record, dict) else {}
        if not {"a", "b", "winner"} <= values.keys() or not all(isinstance(v, str) for v in values.values()):
            raise ValueError(f"{where}: expected texts a, b and winner, got {line.strip()[:60]}. Correct the line.")
        judgement = Judgement(**values)
        if judgement.winner not in ("a", "b", "tie") or judgement.a == judgement.b:
            raise ValueError(f"{where}: expected two methods and the winner a, b or tie, got {line.strip()[:60]}. Correct the line.")
        found.append(judgement)
    if not found:
        raise ValueError(f"{path.name}: expected judgements, got none. Judge some pairs first.")
    return found


def markdown(tables: Mapping[str, Tournament]) -> str:
    """Tables by criterion, as text."""
    lines: list[str] = []
    for criterion, one in tables.items():
        ties = "draws win for both" if one.draws == "both" else f"Davidson's ties, nu {one.tie_weight:.2f}"
        over = f"{one.prompts} prompts" if one.prompts else "single judgements"
        lines += [f"## {criterion} ({ties}; intervals over {over})", ""]
        if one.regularised:
            lines += ["There is no maximum: some methods never lost to the others. A normal prior (347 Elo) holds the ratings.", ""]
        lines += ["| method | Elo | 95 % | judgements |", "| --- | --- | --- | --- |"]
        lines += [f"| {name} | {r.elo:.1f} | {r.lo:.1f} to {r.hi:.1f} | {r.judgements} |" for name, r in one.ratings.items()]
        lines.append("")
    return "\n".join(lines)
