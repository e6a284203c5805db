"""Strengths behind paired comparisons: Bradley-Terry with ties, its intervals, and how often preferences run in circles.

Letters: N items, M comparisons.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtri

_STEPS, _TOLERANCE = 200, 1e-10


class Comparison(NamedTuple):
    """One judgement: `winner` beat `loser`, or the two tied."""

    winner: Hashable
    loser: Hashable
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Log-strengths with mean 0 (or beside held ones): P(i over j | no tie) = sigmoid(strength[i] - strength[j])."""

    items: tuple[Hashable, ...]
    strength: np.ndarray  # [N]
    lo: np.ndarray  # [N]
    hi: np.ndarray  # [N]
    covariance: np.ndarray  # [N, N] of the strengths
    tie_weight: float  # Davidson's nu >= 0: 0 without ties; a tie of equals has probability nu / (2 + nu)
    regularised: bool  # the comparisons do not bound every strength, so a normal prior of `prior_sd` held them


def bradley_terry(
    comparisons: Iterable[Comparison], prior_sd: float = 2.0, confidence: float = 0.95, held: Mapping[Hashable, float] | None = None
) -> Strengths:
    """Maximum-likelihood strengths, with ties after Davidson (1970).

    P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)), P(tie) = nu sqrt(s_i s_j) / (same), s = exp(strength). The maximum exists where
    every item is reachable from every other by 'was not beaten by' (Ford 1957; a tie goes both ways); elsewhere a prior N(0, prior_sd^2) on
    each strength keeps them finite and `regularised` says so. Intervals from the observed information (with the prior's, where it is used).

    Args: held: strengths that are known and stay; the others are measured against them.
    Raises: ValueError without comparisons, for an item compared with itself, prior_sd <= 0, or where nothing is left to estimate.
    """
    comparisons = list(comparisons)
    if not comparisons or any(c.winner == c.loser for c in comparisons):
        raise ValueError("bradley_terry: expected comparisons of two different items, got none or an item against itself. Drop those.")
    if prior_sd <= 0:
        raise ValueError(f"bradley_terry: expected prior_sd > 0, got {prior_sd}. Use 2.")
    items = tuple(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))
    index = {item: i for i, item in enumerate(items)}
    i = np.array([index[c.winner] for c in comparisons])
    j = np.array([index[c.loser] for c in comparisons])
    tie = np.array([c.tie for c in comparisons])
    n = len(items)
    known = {index[item]: float(value) for item, value in (held or {}).items() if item in index}
    free = np.array([k for k in range(n) if k not in known], dtype=int)
    if not len(free):
        raise ValueError("bradley_terry: expected an item whose strength is unknown, got held ones alone. Hold fewer.")
    ring = np.array(list(known), dtype=int)  # held strengths are bounded, whatever the comparisons say
    ends = np.r_[i, j[tie], ring], np.r_[j, i[tie], np.roll(ring, 1)]
    edges = coo_matrix((np.ones(len(ends[0])), ends), shape=(n, n))
    regularised = connected_components(edges, directed=True, connection="strong")[0] > 1
    ridge = 1 / prior_sd**2 if regularised else 0.0
    start = np.array([known.get(k, sum(known.values()) / max(1, len(known))) for k in range(n)])
    theta, eta, information = _newton(start, free, i, j, tie, ridge)
    covariance = np.zeros((n, n))
    covariance[np.ix_(free, free)] = np.linalg.inv(information)[: len(free), : len(free)]
    if not known:
        centre = np.eye(n) - 1 / n  # strengths vary about their mean
        covariance = centre @ covariance @ centre
    half = float(ndtri(0.5 + confidence / 2)) * np.sqrt(np.diag(covariance).clip(min=0))
    return Strengths(
        items=items, strength=theta, lo=theta - half, hi=theta + half, covariance=covariance,
        tie_weight=math.exp(eta) if tie.any() else 0.0, regularised=regularised,
    )  # fmt: skip


def _newton(
    start: np.ndarray, free: np.ndarray, i: np.ndarray, j: np.ndarray, tie: np.ndarray, ridge: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """Damped Newton on (theta [N], eta = log nu), of which `free` places move: both, and the information of the moving ones at the maximum.

    Without a prior and without held strengths the data say nothing of the direction in which all strengths move together; 1 / N is added
    along it. The prior pulls towards the mean of the start.
    """
    n, ties = len(start), bool(tie.any())
    decided = ~tie
    centre = float(start.mean()) if len(free) < n else 0.0
    x = np.r_[start, 0.0]
    if ties:
        x[n] = math.log(2 * tie.sum() / max(1, decided.sum()))  # the estimate if all were equal

    def parts(x):
        d = x[i] - x[j]
        logits = np.stack([d / 2, -d / 2, np.full_like(d, x[n] if ties else -np.inf)])  # win, loss, tie
        top = logits.max(axis=0)
        return logits, top + np.log(np.exp(logits - top).sum(axis=0))

    def objective(x):
        logits, total = parts(x)
        prior = ridge * ((x[:n] - centre) ** 2).sum() + _ETA_PRIOR * ties * x[n] ** 2
        return (np.where(tie, logits[2], logits[0]) - total).sum() - 0.5 * prior

    value, used = objective(x), np.r_[free, [n] * ties].astype(int)
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


def _derivatives(x, n, i, j, tie, ridge, centre, logits, total):
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
    rows, columns = np.r_[i, j, i, j], np.r_[i, j, j, i]
    hessian = coo_matrix((np.r_[dd, dd, -dd, -dd], (rows, columns)), shape=(size, size)).toarray()
    cross = np.zeros(n)
    np.add.at(cross, i, de)
    np.add.at(cross, j, -de)
    hessian[:n, n] = hessian[n, :n] = cross
    hessian[n, n] = (draw * (1 - draw)).sum() + _ETA_PRIOR
    hessian[np.arange(n), np.arange(n)] += ridge
    return gradient, hessian


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """Triples of items of which all three pairs were decided, and those among them that run in a circle."""

    triples: int
    cyclic: int
    knot: int  # items of the largest set in which each beats each other over some chain

    @property
    def share(self) -> float | None:
        """Share of triples that are cyclic; 1/4 where preferences are coin flips."""
        return self.cyclic / self.triples if self.triples else None

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {"triples": self.triples, "cyclic": self.cyclic, "share": self.share, "share_by_chance": 0.25, "largest_knot": self.knot}


def cycles(comparisons: Iterable[Comparison]) -> Cycles:
    """Count intransitive triples in the majority of each pair; pairs without a majority are left out."""
    lead: dict[tuple, int] = {}
    order: dict[Hashable, int] = {}
    for c in comparisons:
        a, b = order.setdefault(c.winner, len(order)), order.setdefault(c.loser, len(order))
        key, sign = ((a, b), 1) if a < b else ((b, a), -1)
        lead[key] = lead.get(key, 0) + (0 if c.tie else sign)
    edges = [(a, b) if margin > 0 else (b, a) for (a, b), margin in lead.items() if margin]
    if not edges:
        return Cycles(triples=0, cyclic=0, knot=0)
    winners, losers = np.array(edges).T
    beats = csr_matrix((np.ones(len(edges), dtype=np.int64), (winners, losers)), shape=(len(order), len(order)))
    either = beats + beats.T
    cyclic = int((beats @ beats).multiply(beats.T).sum()) // 3  # closed walks of length 3
    triples = int((either @ either).multiply(either).sum()) // 6
    sizes = np.bincount(connected_components(beats, directed=True, connection="strong")[1])
    return Cycles(triples=triples, cyclic=cyclic, knot=int(sizes.max()) if sizes.max() > 1 else 0)
