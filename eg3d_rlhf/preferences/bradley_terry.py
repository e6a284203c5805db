"""Strengths behind paired comparisons: Bradley-Terry with ties, its intervals, and how often preferences run in circles.

Letters: N items, M comparisons.
"""

import math
from collections.abc import Hashable, Iterable
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
    """Log-strengths with mean 0: P(i over j | no tie) = sigmoid(strength[i] - strength[j])."""

    items: tuple[Hashable, ...]
    strength: np.ndarray  # [N]
    lo: np.ndarray  # [N]
    hi: np.ndarray  # [N]
    covariance: np.ndarray  # [N, N] of the strengths
    tie_weight: float  # Davidson's nu >= 0: 0 without ties; a tie of equals has probability nu / (2 + nu)
    regularised: bool  # the comparisons do not bound every strength, so a normal prior of `prior_sd` held them


def bradley_terry(comparisons: Iterable[Comparison], prior_sd: float = 2.0, confidence: float = 0.95) -> Strengths:
    """Maximum-likelihood strengths, with ties after Davidson (1970).

    P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)), P(tie) = nu sqrt(s_i s_j) / (same), s = exp(strength). The maximum exists where
    every item is reachable from every other by 'was not beaten by' (Ford 1957; a tie goes both ways); elsewhere a prior N(0, prior_sd^2) on
    each strength keeps them finite and `regularised` says so. Intervals from the observed information (with the prior's, where it is used).
    Raises: ValueError without comparisons, for an item compared with itself, or prior_sd <= 0.
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
    edges = coo_matrix((np.ones(len(i) + tie.sum()), (np.r_[i, j[tie]], np.r_[j, i[tie]])), shape=(n, n))
    regularised = connected_components(edges, directed=True, connection="strong")[0] > 1
    ridge = 1 / prior_sd**2 if regularised else 0.0
    theta, eta, information = _newton(n, i, j, tie, ridge)
    centre = np.eye(n) - 1 / n  # strengths vary about their mean
    covariance = centre @ np.linalg.inv(information)[:n, :n] @ centre
    half = float(ndtri(0.5 + confidence / 2)) * np.sqrt(np.diag(covariance).clip(min=0))
    return Strengths(
        items=items, strength=theta, lo=theta - half, hi=theta + half, covariance=covariance,
        tie_weight=math.exp(eta) if tie.any() else 0.0, regularised=regularised,
    )  # fmt: skip


def _newton(n: int, i: np.ndarray, j: np.ndarray, tie: np.ndarray, ridge: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Damped Newton on (theta [N], eta = log nu): returns both and the information [N or N + 1] squared at the maximum.

    Without a prior the data say nothing of the direction in which all strengths move together; 1 / N is added along it.
    """
    ties = bool(tie.any())
    decided = ~tie
    x = np.zeros(n + 1)
    if ties:
        x[n] = math.log(2 * tie.sum() / max(1, decided.sum()))  # the estimate if all were equal

    def parts(x):
        d = x[i] - x[j]
        logits = np.stack([d / 2, -d / 2, np.full_like(d, x[n] if ties else -np.inf)])  # win, loss, tie
        top = logits.max(axis=0)
        return logits, top + np.log(np.exp(logits - top).sum(axis=0))

    def objective(x):
        logits, total = parts(x)
        return (np.where(tie, logits[2], logits[0]) - total).sum() - 0.5 * ridge * (x[:n] ** 2).sum() - 0.5 * _ETA_PRIOR * ties * x[n] ** 2

    value, used = objective(x), slice(0, n + ties)
    together = (0.0 if ridge else 1.0) * np.pad(np.full((n, n), 1 / n), (0, int(ties)))
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(x, n, i, j, tie, ridge, *parts(x))
        step = np.zeros_like(x)
        step[used] = np.linalg.solve(hessian[used, used] + together, gradient[used])
        scale = 1.0
        while scale > 1e-8 and objective(x + scale * step) < value:
            scale /= 2
        x = x + scale * step
        x[:n] -= x[:n].mean()
        value = objective(x)
        if np.abs(scale * step).max() < _TOLERANCE:
            break
    _, hessian = _derivatives(x, n, i, j, tie, ridge, *parts(x))
    return x[:n], float(x[n]), hessian[used, used] + together


_ETA_PRIOR = 1e-9  # finite when every comparison is a tie; without effect elsewhere


def _derivatives(x, n, i, j, tie, ridge, logits, total):
    """Gradient [N + 1] and negative Hessian [N + 1, N + 1] of the log-likelihood with prior."""
    win, loss, draw = np.exp(logits - total)  # [M] each
    by_d = np.where(tie, 0.0, 0.5) - 0.5 * (win - loss)  # derivative by theta_i - theta_j
    by_eta = tie - draw
    gradient = np.zeros(n + 1)
    np.add.at(gradient, i, by_d)
    np.add.at(gradient, j, -by_d)
    gradient[:n] -= ridge * x[:n]
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
