"""Strengths behind paired comparisons: Bradley-Terry with ties, with clustered intervals, as Elo of a
tournament, as a leaderboard.

Letters: N items, M comparisons, R repetitions, C cells (two generators that met), G generators.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, ndtri
from scipy.stats import t as student

from eg3d_rlhf.preferences.labels import jsonl_records

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


# Intervals that allow for comparisons sharing annotators and prompts, and that hold for few. A score is 1
# where the first of a cell's two generators was preferred, 0 where the second was, 0.5 for a tie. The same
# code serves one leaderboard and a thousand simulated ones.


FEW = 4  # annotators; fewer are taken as they are, and the figures speak of them alone
REACH = 8.0  # an end beyond is none: nothing bounds the strength on that side
# least of V_annotators - V_both over V_both; tuned by simulation (docs/results/intervals.md)
_TOGETHER = -0.5
# of the variance that the model gives untied comparisons: what residuals say is too little where one nearly
# always wins
_LEAST = 0.45
_FIT_STEPS = 60
_HALVINGS = 40
_PRECISION = 1e-4


@dataclass(frozen=True, kw_only=True)
class Design:
    """Who met whom, before whom, over what."""

    cells: np.ndarray  # [C, 2] numbers of generators from 0; every generator is reachable from every other
    cell: np.ndarray  # [M] numbers from 0
    annotator: np.ndarray  # [M] numbers from 0
    prompt: np.ndarray  # [M] numbers from 0

    @property
    def generators(self) -> int:
        return int(self.cells.max()) + 1

    @property
    def signs(self) -> np.ndarray:
        """[C, G]: 1 for a cell's first generator, -1 for its second."""
        signs = np.zeros((len(self.cells), self.generators))
        rows = np.arange(len(self.cells))
        signs[rows, self.cells[:, 0]], signs[rows, self.cells[:, 1]] = 1, -1
        return signs

    @property
    def games(self) -> np.ndarray:
        return np.bincount(self.cell, minlength=len(self.cells)).astype(np.float64)


def fit(
    score: np.ndarray, games: np.ndarray, signs: np.ndarray, held: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Strengths [R, G] with mean 0 that make the logistic quasi-likelihood of the scores largest.

    Args: score [R, C] sums, games [C], signs [C, G]; held: (c [G], value [R]) keeps c . strength = value.
    """
    fixed = np.ones((signs.shape[1], 1)) if held is None else np.c_[np.ones(signs.shape[1]), held[0]]
    free = np.linalg.svd(fixed)[0][:, fixed.shape[1] :]  # [G, F] directions that may move
    start = (
        np.zeros((len(score), signs.shape[1]))
        if held is None
        else held[1][:, None] * held[0] / (held[0] @ held[0])
    )
    along = signs @ free
    moved = np.zeros((len(score), free.shape[1]))
    for _ in range(_FIT_STEPS if free.shape[1] else 0):
        p = expit((start + moved @ free.T) @ signs.T)
        hessian = np.einsum("rc,ca,cb->rab", games * p * (1 - p), along, along) + 1e-12 * np.eye(
            free.shape[1]
        )
        step = np.linalg.solve(hessian, ((score - games * p) @ along)[..., None])[..., 0]
        step *= np.minimum(1, 2 / np.abs(step).max(axis=1, keepdims=True).clip(1e-12))
        moved = moved + step
        if np.abs(step).max() < 1e-7:
            break
    strength: np.ndarray = start + moved @ free.T
    return strength


def strengths(
    scores: np.ndarray, design: Design, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strengths [R, G] with mean 0, and the ends of their intervals [R, G]; infinite where nothing bounds a
    strength.

    P(score) = sigmoid(s_i - s_j): ties count half, so of two generators the difference is the log-odds of the
    share of wins. G - 1 drawn games, spread evenly over the cells, keep the estimate finite (two generators:
    Firth's). Ends: where the efficient score of the given games, squared, exceeds its variance times
    Student's t quantile, squared; with two generators and independent games that is Wilson's interval. Its
    variance (Cameron, Gelbach and Miller 2011) is V = V_prompts + V_annotators - V_both, the last two not
    below -0.5 V_both; degrees of freedom after Satterthwaite. With fewer than FEW annotators V = V_prompts. V
    is never below 0.45 that of untied independent games.

    Args: scores [R, M]; design: with two prompts or more.
    """
    member = np.zeros((len(design.cell), len(design.cells)))
    member[np.arange(len(design.cell)), design.cell] = 1
    score = scores @ member
    games = design.games
    signs = design.signs
    drawn = np.full(len(games), (design.generators - 1) / len(games))
    estimate = fit(score + drawn / 2, games + drawn, signs)
    p = expit(estimate @ signs.T)
    # [R, M]; the drawn games' share makes their sum 0
    residual = scores - (p - drawn / games * (0.5 - p))[:, design.cell]
    least = _LEAST * (scores != 0.5).mean(axis=1)  # [R]
    ends = np.empty((2, *estimate.shape))
    for k in range(design.generators):
        contrast = np.eye(design.generators)[k] - 1 / design.generators
        allowed = _allowed(residual, least, estimate, design, contrast, confidence)
        for side, out in zip((-1, 1), ends, strict=True):
            out[:, k] = _end(estimate[:, k], side, contrast, allowed, (score, games, signs, drawn))
    return estimate, ends[0], ends[1]


def _direction(
    strength: np.ndarray, games: np.ndarray, signs: np.ndarray, contrast: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the score [R, G] that say most of the contrast, the other strengths unknown, and that
    score's information [R].
    """
    p = expit(strength @ signs.T)
    information = np.einsum("rc,ca,cb->rab", games * p * (1 - p), signs, signs)
    size = np.trace(information, axis1=1, axis2=2)[:, None, None] / len(contrast) ** 2
    wanted = np.broadcast_to(contrast, strength.shape)[..., None]
    solved = np.linalg.solve(information + size + 1e-14 * np.eye(len(contrast)), wanted)[..., 0]
    variance = (solved @ contrast)[:, None]
    return solved / variance, 1 / variance[:, 0]


def _allowed(
    residual: np.ndarray,
    least: np.ndarray,
    strength: np.ndarray,
    design: Design,
    contrast: np.ndarray,
    confidence: float,
) -> np.ndarray:
    """How large the squared score over its information may be [R]:
    quantile squared times the design effect.
    """
    weights, information = _direction(strength, design.games, design.signs, contrast)
    each = residual * (weights @ design.signs.T)[:, design.cell]  # [R, M]
    alone = (each**2).sum(axis=1)
    annotators, prompts = (len(np.unique(group)) for group in (design.annotator, design.prompt))
    total = _clustered(each, design.prompt)
    degrees = np.full(len(each), prompts - 1.0)
    if annotators >= FEW:
        of_prompts = total
        of_annotators = _clustered(each, design.annotator)
        of_both = _clustered(
            each, design.prompt.astype(np.int64) * (int(design.annotator.max()) + 1) + design.annotator
        )
        more = np.maximum(of_annotators - of_both, _TOGETHER * of_both)
        total = of_prompts + more
        spread = of_annotators**2 * (more > 0) / (annotators - 1) + of_prompts**2 / (prompts - 1)
        degrees = np.clip(total**2 / spread.clip(1e-300), min(annotators, prompts) - 1, prompts - 1)
    varied = alone > 1e-9 * information  # else nothing tells the spread
    total = np.where(varied, np.maximum(total, least * information), information)
    allowed: np.ndarray = student.ppf(0.5 + confidence / 2, degrees) ** 2 * total / information
    return allowed


def _clustered(each: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Variance [R] of the sum of M scores, from the sums over groups."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    squares: np.ndarray = (np.add.reduceat(each[:, order], starts, axis=1) ** 2).sum(axis=1)
    return squares * len(starts) / max(1, len(starts) - 1)


def _end(
    inside: np.ndarray, side: int, contrast: np.ndarray, allowed: np.ndarray, data: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Where the statistic passes what is allowed [R], between the estimate and REACH on that side; infinite
    where it does not.
    """
    score, games, signs, drawn = data

    def holds(value: np.ndarray) -> np.ndarray:
        held = fit(score + drawn / 2, games + drawn, signs, (contrast, value))
        weights, information = _direction(held, games, signs, contrast)
        gained = (((score - games * expit(held @ signs.T)) @ signs) * weights).sum(axis=1)
        inside: np.ndarray = gained**2 <= allowed * information
        return inside

    outside = np.full(len(inside), side * REACH)
    endless = holds(outside)
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        good = holds(middle)
        inside = np.where(good, middle, inside)
        outside = np.where(good, outside, middle)
        if np.abs(inside - outside).max() < _PRECISION:
            break
    return np.where(endless, side * np.inf, inside)


# A tournament of methods, as GPTEval3D (2401.04092) rates text to 3D. P(i over j) = 1 / (1 + 10^((e_j - e_i)
# / 400)), so a rating is a Bradley-Terry strength times 400 / ln 10. GPTEval3D counts a draw as a win of both
# and climbs the likelihood by 10,000 steps of Adam from 0; here the maximum itself is found, and where there
# is none (a method that never lost to the others) a prior holds the ratings.


SCALE = 400 / math.log(10)  # Elo points of one unit of strength
MEAN = 1000.0  # of all ratings
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

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {"elo": r.elo, "ci95": [r.lo, r.hi], "judgements": r.judgements}
            for name, r in self.ratings.items()
        }
        return {
            "ratings": rows,
            "draws": self.draws,
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


# A leaderboard of generators: points with intervals, nothing of those with too few games, and only among
# those who met. Points are 1000 + 400 / ln 10 times the strength, as Elo counts: 100 points ahead win 64 % of
# the games, 200 points 76 %.


# of a generator, of a group; fewer: no figure, none was found that holds (docs/results/intervals.md)
LEAST_GAMES = 20
LEAST_PROMPTS = 10


class Game(NamedTuple):
    """One judgement of two generators' shapes."""

    first: str
    second: str
    winner: str | None  # one of the two; None: a tie
    annotator: str
    prompt: Hashable  # what the two were made for; games over the same one are not independent
    bad: bool = False  # of a tie: both are bad


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One generator's."""

    name: str
    games: int
    wins: int
    losses: int
    ties: int  # both bad among them
    both_bad: int
    prompts: int
    points: float | None  # None: too few games or prompts
    lo: float | None  # None: open, nothing bounds it, or no points
    hi: float | None

    @property
    def score(self) -> float:
        """Share of games won, ties half."""
        return (self.wins + self.ties / 2) / self.games

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "points": self.points,
            "ci95": None if self.points is None else [self.lo, self.hi],
            "n": self.games,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "both_bad": self.both_bad,
            "prompts": self.prompts,
            "score": self.score,
            "needs": needs(self.games, self.prompts) if self.points is None else "",
        }


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Groups of generators that met each other, directly or over others, best first; the points of two groups
    say nothing of each other.
    """

    groups: tuple[tuple[Standing, ...], ...]
    few: tuple[Standing, ...]  # too few games for points; nobody's points count their games
    games: int
    annotators: int
    prompts: int

    def notes(self) -> list[str]:
        """What a reader has to know, in sentences."""
        sentences = []
        if self.groups:
            whose = "each group" if len(self.groups) > 1 else "all"
            sentences.append(f"95 % intervals. Ties count half; the mean of {whose} is {MEAN:g} points.")
        if len(self.groups) > 1:
            sentences.append(
                f"{len(self.groups)} groups of generators never met: points of different groups cannot be"
                " compared."
            )
        if self.groups and self.annotators < FEW:
            whose = "this annotator" if self.annotators == 1 else f"these {self.annotators} annotators"
            sentences.append(
                f"The intervals speak of {whose} alone: to speak of people like them takes"
                f" {FEW - self.annotators} more."
            )
        for s in (s for group in self.groups for s in group if not s.ties and not (s.wins and s.losses)):
            never, far = ("won", "behind") if s.losses else ("lost", "ahead")
            sentences.append(
                f"{s.name} has never {never}: nothing tells how far {far}, so the mean and the others' points"
                " are open, too."
            )
        sentences += [f"{s.name}: {needs(s.games, s.prompts)}." for s in self.few]
        return sentences

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": [[s.to_dict() for s in group] for group in self.groups],
            "few": [s.to_dict() for s in self.few],
            "notes": self.notes(),
            "n": self.games,
            "annotators": self.annotators,
            "prompts": self.prompts,
            "least_games": LEAST_GAMES,
            "least_prompts": LEAST_PROMPTS,
        }


def needs(games: int, prompts: int) -> str:
    """What is missing before there are points, in words."""
    missing = [
        (LEAST_GAMES - games, "more comparison", "s"),
        (LEAST_PROMPTS - prompts, "more prompt", "s or pairs"),
    ]
    words = [f"{short} {what}{plural if short > 1 else ''}" for short, what, plural in missing if short > 0]
    if not words:
        return f"{games} comparisons; its opponents have too few"
    return f"{games} comparisons over {prompts}; needs {' and '.join(words)}"


def leaderboard(games: Iterable[Game]) -> Leaderboard:
    """Points of every generator with LEAST_GAMES games over LEAST_PROMPTS prompts against others that have
    them, too.
    """
    games = list(games)
    assert all(game.first != game.second and game.winner in (game.first, game.second, None) for game in games)
    kept = games
    while True:  # who is left out takes the games away from the others
        names = sorted(name for name in _names(kept) if _enough(kept, name))
        fewer = [g for g in kept if g.first in names and g.second in names]
        if len(fewer) == len(kept):
            break
        kept = fewer
    groups = [_standings([g for g in kept if g.first in group]) for group in _groups(kept)]
    few = [_standing(games, name, None) for name in sorted(_names(games) - _names(kept))]
    return Leaderboard(
        groups=tuple(sorted(groups, key=lambda group: (-len(group), group[0].name))),
        few=tuple(few),
        games=len(games),
        annotators=len({g.annotator for g in games}),
        prompts=len({g.prompt for g in games}),
    )


def _names(games: Iterable[Game]) -> set[str]:
    return {name for game in games for name in (game.first, game.second)}


def _enough(games: Sequence[Game], name: str) -> bool:
    mine = [g for g in games if name in (g.first, g.second)]
    return len(mine) >= LEAST_GAMES and len({g.prompt for g in mine}) >= LEAST_PROMPTS


def _groups(games: Sequence[Game]) -> list[set[str]]:
    names = {name: i for i, name in enumerate(sorted(_names(games)))}
    if not names:
        return []
    ends = [names[g.first] for g in games], [names[g.second] for g in games]
    place = connected_components(
        coo_matrix((np.ones(len(games)), ends), shape=(len(names), len(names))), directed=False
    )[1]
    return [{name for name, i in names.items() if place[i] == group} for group in range(place.max() + 1)]


def _standings(games: Sequence[Game]) -> tuple[Standing, ...]:
    """The members of one group, best first."""
    names = {name: i for i, name in enumerate(sorted(_names(games)))}
    cells: dict[tuple[str, str], int] = {}
    cell = [cells.setdefault((min(g[:2]), max(g[:2])), len(cells)) for g in games]
    design = Design(
        cells=np.array([[names[a], names[b]] for a, b in cells]),
        cell=np.array(cell),
        annotator=_numbers(g.annotator for g in games),
        prompt=_numbers(g.prompt for g in games),
    )
    scores = np.array([0.5 if g.winner is None else float(g.winner == min(g[:2])) for g in games])
    points, lo, hi = (MEAN + SCALE * part[0] for part in strengths(scores[None], design))
    rows = [_standing(games, name, (points[i], lo[i], hi[i])) for name, i in names.items()]
    return tuple(sorted(rows, key=lambda row: -(row.points or 0)))


def _numbers(values: Iterable[Hashable]) -> np.ndarray:
    """From 0, in order of appearance."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values])


def _standing(games: Sequence[Game], name: str, ends: tuple[float, float, float] | None) -> Standing:
    mine = [g for g in games if name in (g.first, g.second)]
    points, lo, hi = (
        (float(x) if np.isfinite(x) else None for x in ends) if ends is not None else (None, None, None)
    )
    results = Counter("tie" if g.winner is None else "win" if g.winner == name else "loss" for g in mine)
    return Standing(
        name=name,
        games=len(mine),
        wins=results["win"],
        losses=results["loss"],
        ties=results["tie"],
        both_bad=sum(g.bad for g in mine),
        prompts=len({g.prompt for g in mine}),
        points=points,
        lo=lo,
        hi=hi,
    )
