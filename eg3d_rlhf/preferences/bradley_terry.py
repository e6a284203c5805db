"""Bradley-Terry strengths of paired comparisons: the maximum-likelihood fit with ties, cycles that contradict
any order, and Elo ratings of a tournament, which are the same strengths on another scale.

Letters: N items, M comparisons.
"""

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtri

from eg3d_rlhf.preferences.labels import jsonl_records
from eg3d_rlhf.preferences.settings import DRAWS

_STEPS = 200
_TOLERANCE = 1e-10
PRIOR_SD = 2.0  # of a strength that the comparisons do not bound


class Comparison(NamedTuple):
    """One judgement: `winner` beat `loser`, or the two tied."""

    winner: Hashable
    loser: Hashable
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Log-strengths with mean 0 (or beside held ones): P(i over j | no tie) = sigmoid(strength[i] -
    strength[j]).
    """

    items: tuple[Hashable, ...]
    strength: np.ndarray  # [N]
    lo: np.ndarray  # [N]
    hi: np.ndarray  # [N]
    covariance: np.ndarray  # [N, N] of the strengths
    tie_weight: float  # Davidson's nu >= 0: 0 without ties; a tie of equals has probability nu / (2 + nu)
    regularised: bool  # the comparisons do not bound every strength, so a normal prior of PRIOR_SD held them


def bradley_terry(
    comparisons: Iterable[Comparison], held: Mapping[Hashable, float] | None = None, confidence: float = 0.95
) -> Strengths:
    """Maximum-likelihood strengths, with ties after Davidson (1970).

    P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)), P(tie) = nu sqrt(s_i s_j) / (same),
    s = exp(strength). The maximum exists where every item is reachable from every other by 'was not beaten
    by' (Ford 1957; a tie goes both ways); elsewhere a prior N(0, PRIOR_SD^2) on each strength keeps them
    finite and `regularised` says so. Intervals from the observed information (with the prior's, where it is
    used).

    Args: held: strengths that are known and stay; the others are measured against them.
    Raises: ValueError where nothing is left to estimate.
    """
    comparisons = list(comparisons)
    assert comparisons and all(c.winner != c.loser for c in comparisons)
    items = tuple(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))
    index = {item: i for i, item in enumerate(items)}
    i = np.array([index[c.winner] for c in comparisons])
    j = np.array([index[c.loser] for c in comparisons])
    tie = np.array([c.tie for c in comparisons])
    n = len(items)
    known = {index[item]: float(value) for item, value in (held or {}).items() if item in index}
    free = np.array([k for k in range(n) if k not in known], dtype=int)
    if not len(free):
        raise ValueError(
            "bradley_terry: expected an item whose strength is unknown, got held ones alone. Hold fewer."
        )
    ring = np.array(list(known), dtype=int)  # held strengths are bounded, whatever the comparisons say
    ends = np.r_[i, j[tie], ring], np.r_[j, i[tie], np.roll(ring, 1)]
    edges = coo_matrix((np.ones(len(ends[0])), ends), shape=(n, n))
    regularised = connected_components(edges, directed=True, connection="strong")[0] > 1
    ridge = 1 / PRIOR_SD**2 if regularised else 0.0
    start = np.array([known.get(k, sum(known.values()) / max(1, len(known))) for k in range(n)])
    theta, eta, information = _newton(start, free, i, j, tie, ridge)
    covariance = np.zeros((n, n))
    covariance[np.ix_(free, free)] = np.linalg.inv(information)[: len(free), : len(free)]
    if not known:
        centre = np.eye(n) - 1 / n  # strengths vary about their mean
        covariance = centre @ covariance @ centre
    half = float(ndtri(0.5 + confidence / 2)) * np.sqrt(np.diag(covariance).clip(min=0))
    return Strengths(
        items=items,
        strength=theta,
        lo=theta - half,
        hi=theta + half,
        covariance=covariance,
        tie_weight=math.exp(eta) if tie.any() else 0.0,
        regularised=regularised,
    )


def _newton(
    start: np.ndarray, free: np.ndarray, i: np.ndarray, j: np.ndarray, tie: np.ndarray, ridge: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """Damped Newton on (theta [N], eta = log nu), of which `free` places move: both, and the information of
    the moving ones at the maximum.

    Without a prior and without held strengths the data say nothing of the direction in which all strengths
    move together; 1 / N is added along it. The prior pulls towards the mean of the start.
    """
    n = len(start)
    ties = bool(tie.any())
    decided = ~tie
    centre = float(start.mean()) if len(free) < n else 0.0
    x = np.r_[start, 0.0]
    if ties:
        x[n] = math.log(2 * tie.sum() / max(1, decided.sum()))  # the estimate if all were equal

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = x[i] - x[j]
        logits = np.stack([d / 2, -d / 2, np.full_like(d, x[n] if ties else -np.inf)])  # win, loss, tie
        top = logits.max(axis=0)
        return logits, top + np.log(np.exp(logits - top).sum(axis=0))

    def objective(x: np.ndarray) -> float:
        logits, total = parts(x)
        prior = ridge * ((x[:n] - centre) ** 2).sum() + _ETA_PRIOR * ties * x[n] ** 2
        return float((np.where(tie, logits[2], logits[0]) - total).sum() - 0.5 * prior)

    value = objective(x)
    used = np.r_[free, [n] * ties].astype(int)
    together = np.zeros((n + 1, n + 1))
    if not ridge and len(free) == n:
        together[:n, :n] = 1 / n
    together = together[np.ix_(used, used)]
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(x, n, i, j, tie, ridge, centre, *parts(x))
        step = np.zeros_like(x)
        step[used] = np.linalg.solve(hessian[np.ix_(used, used)] + together, gradient[used])
        scale = 1.0
        while scale > 1e-8 and objective(x + scale * step) < value:
            scale /= 2
        x = x + scale * step
        if len(free) == n:
            x[:n] -= x[:n].mean()
        value = objective(x)
        if np.abs(scale * step).max() < _TOLERANCE:
            break
    _, hessian = _derivatives(x, n, i, j, tie, ridge, centre, *parts(x))
    return x[:n], float(x[n]), hessian[np.ix_(used, used)] + together


_ETA_PRIOR = 1e-9  # finite when every comparison is a tie; without effect elsewhere


def _derivatives(
    x: np.ndarray,
    n: int,
    i: np.ndarray,
    j: np.ndarray,
    tie: np.ndarray,
    ridge: float,
    centre: float,
    logits: np.ndarray,
    total: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient [N + 1] and negative Hessian [N + 1, N + 1] of the log-likelihood with prior."""
    win, loss, draw = np.exp(logits - total)  # [M] each
    by_d = np.where(tie, 0.0, 0.5) - 0.5 * (win - loss)  # derivative by theta_i - theta_j
    by_eta = tie - draw
    gradient = np.zeros(n + 1)
    np.add.at(gradient, i, by_d)
    np.add.at(gradient, j, -by_d)
    gradient[:n] -= ridge * (x[:n] - centre)
    gradient[n] = by_eta.sum() - _ETA_PRIOR * x[n]
    dd = 0.25 * ((win + loss) - (win - loss) ** 2)
    de = -0.5 * (win - loss) * draw
    size = n + 1
    rows = np.r_[i, j, i, j]
    columns = np.r_[i, j, j, i]
    hessian = coo_matrix((np.r_[dd, dd, -dd, -dd], (rows, columns)), shape=(size, size)).toarray()
    cross = np.zeros(n)
    np.add.at(cross, i, de)
    np.add.at(cross, j, -de)
    hessian[:n, n] = hessian[n, :n] = cross
    hessian[n, n] = (draw * (1 - draw)).sum() + _ETA_PRIOR
    hessian[np.arange(n), np.arange(n)] += ridge
    return gradient, hessian


def cycles(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Intransitive triples in the majority of each pair, as JSON values; pairs without a majority are left
    out.

    Returns: triples of items of which all three pairs were decided, how many of them run in a circle, and
    their share (one in four where preferences are coin flips); largest_knot: items of the largest set in
    which each beats each other over some chain.
    """
    lead: dict[tuple[int, int], int] = {}
    order: dict[Hashable, int] = {}
    for c in comparisons:
        a = order.setdefault(c.winner, len(order))
        b = order.setdefault(c.loser, len(order))
        key, sign = ((a, b), 1) if a < b else ((b, a), -1)
        lead[key] = lead.get(key, 0) + (0 if c.tie else sign)
    edges = [(a, b) if margin > 0 else (b, a) for (a, b), margin in lead.items() if margin]
    if not edges:
        return {"triples": 0, "cyclic": 0, "share": None, "share_by_chance": 0.25, "largest_knot": 0}
    winners, losers = np.array(edges).T
    beats = csr_matrix(
        (np.ones(len(edges), dtype=np.int64), (winners, losers)), shape=(len(order), len(order))
    )
    either = beats + beats.T
    cyclic = int((beats @ beats).multiply(beats.T).sum()) // 3  # closed walks of length 3
    triples = int((either @ either).multiply(either).sum()) // 6
    sizes = np.bincount(connected_components(beats, directed=True, connection="strong")[1])
    share = cyclic / triples if triples else None
    knot = int(sizes.max()) if sizes.max() > 1 else 0
    return {
        "triples": triples,
        "cyclic": cyclic,
        "share": share,
        "share_by_chance": 0.25,
        "largest_knot": knot,
    }


# A tournament of methods, as GPTEval3D (2401.04092) rates text to 3D. P(i over j) = 1 / (1 + 10^((e_j - e_i)
# / 400)), so a rating is a Bradley-Terry strength times 400 / ln 10. GPTEval3D counts a draw as a win of both
# and climbs the likelihood by 10,000 steps of Adam from 0; here the maximum itself is found, and where there
# is none (a method that never lost to the others) a prior holds the ratings.


SCALE = 400 / math.log(10)  # Elo points of one unit of strength
MEAN = 1000.0  # of all ratings


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

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {"elo": r.elo, "ci95": [r.lo, r.hi], "judgements": r.judgements}
            for name, r in self.ratings.items()
        }
        return {
            "ratings": rows,
            "ties": self.draws,
            "tie_weight": self.tie_weight,
            "regularised": self.regularised,
            "prompts": self.prompts,
        }


def elo(
    judgements: Iterable[Judgement],
    *,
    draws: str = "both",
    held: Mapping[str, float] | None = None,
    resamples: int = 200,
) -> Tournament:
    """Ratings of all methods, with 95 % intervals from resampled prompts (judgements, where no prompt is
    named).

    Args:
        draws: 'both': a win for each, as GPTEval3D counts; 'davidson': a result of its own, more likely
            between equals.
        held: known ratings that stay; without them the mean of all is MEAN, since only differences are known.
    Raises: ValueError without judgements, and what bradley_terry refuses.
    """
    judgements = list(judgements)
    held = dict(held or {})
    assert draws in DRAWS and all(j.winner in ("a", "b", "tie") for j in judgements)
    if not judgements:
        raise ValueError("elo: expected judgements, got none. Judge some pairs first.")

    def fit(chosen: Sequence[Judgement]) -> tuple[Strengths, dict[str, float]]:
        compared = [c for j in chosen for c in _comparisons(j, draws)]
        strengths = bradley_terry(compared, held={name: value / SCALE for name, value in held.items()})
        shift = 0.0 if held else MEAN
        return strengths, {
            str(item): SCALE * float(s) + shift
            for item, s in zip(strengths.items, strengths.strength, strict=True)
        }

    named = all(j.prompt for j in judgements)
    clusters: dict[object, list[Judgement]] = defaultdict(list)
    for place, j in enumerate(judgements):
        clusters[j.prompt if named else place].append(j)
    strengths, ratings = fit(judgements)
    groups = list(clusters.values())
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = defaultdict(list)
    for _ in range(resamples):
        again = [j for k in rng.integers(len(groups), size=len(groups)) for j in groups[k]]
        if {name for j in again for name in (j.a, j.b)} - held.keys():
            for name, value in fit(again)[1].items():
                drawn[name].append(value)
    counts = {name: sum(name in (j.a, j.b) for j in judgements) for name in ratings}
    rows = {
        name: Rating(elo=value, **_ends(value, drawn[name]), judgements=counts[name])
        for name, value in ratings.items()
    }
    return Tournament(
        ratings=dict(sorted(rows.items(), key=lambda row: -row[1].elo)),
        draws=draws,
        tie_weight=strengths.tie_weight,
        regularised=strengths.regularised,
        prompts=len(groups) if named else 0,
    )


def _comparisons(j: Judgement, draws: str) -> list[Comparison]:
    if j.winner == "tie":
        return (
            [Comparison(j.a, j.b), Comparison(j.b, j.a)]
            if draws == "both"
            else [Comparison(j.a, j.b, tie=True)]
        )
    return [Comparison(j.a, j.b) if j.winner == "a" else Comparison(j.b, j.a)]


def _ends(value: float, drawn: Sequence[float]) -> dict[str, float]:
    """Normal ends, of the deviation over resamples: steadier than their quantiles where these are few."""
    half = 1.96 * float(np.std(drawn, ddof=1)) if len(drawn) > 1 else 0.0
    return {"lo": value - half, "hi": value + half}


def read_judgements(path: str | Path) -> list[Judgement]:
    """Judgements of a JSON-lines file with fields a, b, winner and, where known, prompt and criterion; others
    are passed over.

    Raises: OSError; ValueError with file, line and remedy for the first line that does not fit, and for a
        file without any.
    """
    path = Path(path)
    judgements = []
    for number, record in jsonl_records(path, '{"a": ..., "b": ..., "winner": "a", "b" or "tie"}'):
        values = {name: record[name] for name in Judgement._fields if name in record}
        judgement = Judgement(**values) if {"a", "b", "winner"} <= values.keys() else None
        if (
            judgement is None
            or not all(isinstance(text, str) for text in judgement)
            or judgement.a == judgement.b
            or judgement.winner not in ("a", "b", "tie")
        ):
            got = json.dumps(record)[:60]
            raise ValueError(
                f"{path.name}, line {number}: expected two methods and the winner a, b or tie, got {got}."
                " Correct the line."
            )
        judgements.append(judgement)
    if not judgements:
        raise ValueError(f"{path.name}: expected judgements, got none. Judge some pairs first.")
    return judgements


def markdown(tables: Mapping[str, Tournament]) -> str:
    """Tables by criterion, as text."""
    lines: list[str] = []
    for criterion, tournament in tables.items():
        ties = (
            "draws win for both"
            if tournament.draws == "both"
            else f"Davidson's ties, nu {tournament.tie_weight:.2f}"
        )
        over = f"{tournament.prompts} prompts" if tournament.prompts else "single judgements"
        lines += [f"## {criterion} ({ties}; intervals over {over})", ""]
        if tournament.regularised:
            lines += [
                (
                    "There is no maximum: some methods never lost to the others. A normal prior (347 Elo)"
                    " holds the ratings."
                ),
                "",
            ]
        lines += ["| method | Elo | 95 % | judgements |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {r.elo:.1f} | {r.lo:.1f} to {r.hi:.1f} | {r.judgements} |"
            for name, r in tournament.ratings.items()
        ]
        lines.append("")
    return "\n".join(lines)
