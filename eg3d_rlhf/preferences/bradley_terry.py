"""Bradley-Terry strengths of paired comparisons: maximum-likelihood fit with ties, cycles, and Elo ratings.

A cycle contradicts any order of the items. Elo ratings of a tournament are the same strengths on another
scale.

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

_STEPS = 200  # largest number of Newton steps
_TOLERANCE = 1e-10  # of a step, in units of strength
PRIOR_SD = 2.0  # standard deviation of the prior on strengths that the comparisons do not bound


class Comparison(NamedTuple):
    """One result: `winner` beat `loser`, or the two tied."""

    winner: Hashable
    loser: Hashable
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Log-strengths with mean 0 (or relative to held ones): P(i over j | no tie) = sigmoid(strength[i] -
    strength[j]).
    """

    items: tuple[Hashable, ...]
    strength: np.ndarray  # [N]
    lo: np.ndarray  # [N] ends of the intervals
    hi: np.ndarray  # [N]
    covariance: np.ndarray  # [N, N] of the strengths
    tie_weight: float  # Davidson's nu >= 0: 0 without ties; a tie of equals has probability nu / (2 + nu)
    regularised: bool  # the comparisons do not bound every strength, so a normal prior of PRIOR_SD was used


def bradley_terry(
    comparisons: Iterable[Comparison], held: Mapping[Hashable, float] | None = None, confidence: float = 0.95
) -> Strengths:
    """Fit strengths by maximum likelihood, with ties after Davidson (1970).

    P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)), P(tie) = nu sqrt(s_i s_j) / (same), s =
    exp(strength).

    The maximum exists if every item is reachable from every other through 'was not beaten by' (Ford 1957; a
    tie counts in both directions). Otherwise a prior N(0, PRIOR_SD^2) on each strength keeps them finite, and
    `regularised` is True. Intervals are from the observed information (with that of the prior, where it is
    used).

    Args: held: known strengths, which remain fixed; the others are estimated relative to them.
    Raises: ValueError if all strengths are held.
    """
    comparisons = list(comparisons)
    assert comparisons and all(c.winner != c.loser for c in comparisons)
    # In order of appearance, which fixes the order of the results.
    items = tuple(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))
    index = {item: i for i, item in enumerate(items)}
    i = np.array([index[c.winner] for c in comparisons])
    j = np.array([index[c.loser] for c in comparisons])
    tie = np.array([c.tie for c in comparisons])
    n = len(items)
    fixed = {index[item]: float(value) for item, value in (held or {}).items() if item in index}
    free = np.array([k for k in range(n) if k not in fixed], dtype=int)
    if not len(free):
        raise ValueError(
            "bradley_terry: expected at least one item of unknown strength, but all are held. Hold fewer."
        )
    # Fixed strengths are bounded without comparisons: connect them in a ring.
    ring = np.array(list(fixed), dtype=int)
    # Edges from winner to loser, and in both directions for ties.
    ends = np.r_[i, j[tie], ring], np.r_[j, i[tie], np.roll(ring, 1)]
    edges = coo_matrix((np.ones(len(ends[0])), ends), shape=(n, n))
    # Ford's condition: the graph is strongly connected
    regularised = connected_components(edges, directed=True, connection="strong")[0] > 1
    ridge = 1 / PRIOR_SD**2 if regularised else 0.0
    # Unknown strengths start at the mean of the fixed ones, or at 0.
    start = np.array([fixed.get(k, sum(fixed.values()) / max(1, len(fixed))) for k in range(n)])
    theta, eta, information = _newton(start, free, i, j, tie, ridge)
    covariance = np.zeros((n, n))
    # without the tie parameter, which comes last
    covariance[np.ix_(free, free)] = np.linalg.inv(information)[: len(free), : len(free)]
    if not fixed:
        # without held strengths only differences are known; they are reported about their mean
        centre = np.eye(n) - 1 / n
        covariance = centre @ covariance @ centre
    # Normal quantile times the standard error; rounding may make a variance negative.
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
    """Maximise the likelihood over (theta [N], eta = log nu) with damped Newton steps. Only `free` entries of
    theta move.

    Without a prior and without held strengths, the data do not determine the direction in which all strengths
    move together. 1 / N is added to the information along it. The prior pulls towards the mean of the start.

    Returns: theta [N], eta, and the information of the moving parameters at the maximum.
    """
    n = len(start)
    ties = bool(tie.any())
    decided = ~tie
    # With held strengths the prior is centred on their mean, otherwise on 0.
    centre = float(start.mean()) if len(free) < n else 0.0
    x = np.r_[start, 0.0]
    # Without ties eta has no estimate and stays fixed.
    if ties:
        # the estimate for equal strengths
        x[n] = math.log(2 * tie.sum() / max(1, decided.sum()))

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [3, M] of win, loss and tie, and the logarithm of their summed exponentials [M]."""
        d = x[i] - x[j]
        logits = np.stack([d / 2, -d / 2, np.full_like(d, x[n] if ties else -np.inf)])  # win, loss, tie
        top = logits.max(axis=0)
        # shifted by the largest logit, against overflow
        return logits, top + np.log(np.exp(logits - top).sum(axis=0))

    def objective(x: np.ndarray) -> float:
        """Return the log-likelihood, with the prior."""
        logits, total = parts(x)
        prior = ridge * ((x[:n] - centre) ** 2).sum() + _ETA_PRIOR * ties * x[n] ** 2
        return float((np.where(tie, logits[2], logits[0]) - total).sum() - 0.5 * prior)

    value = objective(x)
    moving = np.r_[free, [n] * ties].astype(int)
    together = np.zeros((n + 1, n + 1))
    # Only then does the likelihood have a flat direction.
    if not ridge and len(free) == n:
        together[:n, :n] = 1 / n
    together = together[np.ix_(moving, moving)]
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(x, n, i, j, tie, ridge, centre, *parts(x))
        step = np.zeros_like(x)
        # The Hessian is that of the negative log-likelihood, so this is an ascent step.
        step[moving] = np.linalg.solve(hessian[np.ix_(moving, moving)] + together, gradient[moving])
        scale = 1.0
        # The likelihood is concave; halving the step guarantees that it increases.
        while scale > 1e-8 and objective(x + scale * step) < value:
            scale /= 2
        x = x + scale * step
        if len(free) == n:
            x[:n] -= x[:n].mean()  # keeps the mean at 0
        value = objective(x)
        if np.abs(scale * step).max() < _TOLERANCE:
            break
    _, hessian = _derivatives(x, n, i, j, tie, ridge, centre, *parts(x))
    return x[:n], float(x[n]), hessian[np.ix_(moving, moving)] + together


# Keeps eta finite if every comparison is a tie. Otherwise it has no effect.
_ETA_PRIOR = 1e-9


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
    """Compute the gradient [N + 1] and the negative Hessian [N + 1, N + 1] of the log-likelihood with its
    prior.
    """
    win, loss, draw = np.exp(logits - total)  # [M] each
    # derivative with respect to theta_i - theta_j
    by_difference = np.where(tie, 0.0, 0.5) - 0.5 * (win - loss)
    by_eta = tie - draw
    gradient = np.zeros(n + 1)
    # Unlike gradient[i] += ..., this adds repeated indices.
    np.add.at(gradient, i, by_difference)
    np.add.at(gradient, j, -by_difference)
    gradient[:n] -= ridge * (x[:n] - centre)
    gradient[n] = by_eta.sum() - _ETA_PRIOR * x[n]
    difference_curvature = 0.25 * ((win + loss) - (win - loss) ** 2)
    mixed_curvature = -0.5 * (win - loss) * draw
    size = n + 1
    # Each comparison adds to the four entries of its two items.
    rows = np.r_[i, j, i, j]
    columns = np.r_[i, j, j, i]
    # coo_matrix sums repeated entries
    hessian = coo_matrix(
        (
            np.r_[difference_curvature, difference_curvature, -difference_curvature, -difference_curvature],
            (rows, columns),
        ),
        shape=(size, size),
    ).toarray()
    cross = np.zeros(n)
    np.add.at(cross, i, mixed_curvature)
    np.add.at(cross, j, -mixed_curvature)
    hessian[:n, n] = hessian[n, :n] = cross
    hessian[n, n] = (draw * (1 - draw)).sum() + _ETA_PRIOR
    # The prior's part of the diagonal.
    hessian[np.arange(n), np.arange(n)] += ridge
    return gradient, hessian


def cycles(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Count intransitive triples in the majority results of pairs, as JSON values. Pairs without a majority
    are left out.

    Returns: triples: triples of items whose three pairs all have a majority; cyclic: those that form a cycle;
    share: their fraction (one in four for random preferences); largest_knot: the size of the largest set in
    which each item beats each other through some chain.
    """
    margins: dict[tuple[int, int], int] = {}
    order: dict[Hashable, int] = {}
    for c in comparisons:
        a = order.setdefault(c.winner, len(order))
        b = order.setdefault(c.loser, len(order))
        # The margin of a pair is counted for its item that appeared first.
        key, sign = ((a, b), 1) if a < b else ((b, a), -1)
        margins[key] = margins.get(key, 0) + (0 if c.tie else sign)
    edges = [(a, b) if margin > 0 else (b, a) for (a, b), margin in margins.items() if margin]
    if not edges:
        return {"triples": 0, "cyclic": 0, "share": None, "share_by_chance": 0.25, "largest_knot": 0}
    winners, losers = np.array(edges).T
    beats = csr_matrix(
        (np.ones(len(edges), dtype=np.int64), (winners, losers)), shape=(len(order), len(order))
    )
    # Undirected: pairs with a majority.
    either = beats + beats.T
    cyclic = int((beats @ beats).multiply(beats.T).sum()) // 3  # closed walks of length 3
    # each triangle has six closed walks in the undirected graph
    triples = int((either @ either).multiply(either).sum()) // 6
    # Strongly connected sets: each item reaches each other through a chain of majorities.
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


# A tournament of methods, as GPTEval3D (arXiv 2401.04092) rates text-to-3D. P(i over j) = 1 / (1 + 10^((e_j -
# e_i) / 400)), so a rating is a Bradley-Terry strength times 400 / ln 10. GPTEval3D counts a draw as a win of
# both, and maximises the likelihood with 10,000 steps of Adam from 0. Here the maximum itself is computed. If
# there is none (a method never lost to the others), a prior keeps ratings finite.


SCALE = 400 / math.log(10)  # Elo points of one unit of strength
MEAN = 1000.0  # mean of all ratings


class Judgement(NamedTuple):
    """The result of a comparison of two methods' assets for one prompt."""

    a: str
    b: str
    winner: str  # 'a', 'b' or 'tie'
    prompt: str = ""
    criterion: str = "overall"


@dataclass(frozen=True, kw_only=True)
class Rating:
    """The rating of one method."""

    elo: float
    lo: float  # ends of the 95 % interval over resampled prompts
    hi: float
    judgements: int  # number of comparisons


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """Ratings by method, best first."""

    ratings: dict[str, Rating]
    draws: str  # see `elo`
    tie_weight: float  # Davidson's nu; 0 if draws count as wins of both
    regularised: (
        bool  # the likelihood has no maximum (a method never lost to the others), so a prior was used
    )
    prompts: int  # number of prompts that were resampled; 0: single comparisons were

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
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
    """Rate all methods, with 95 % intervals from resampled prompts (resampled comparisons, if prompts are
    unknown).

    Args:
        draws: 'both': a draw is a win of each, as in GPTEval3D; 'davidson': a draw is a result of its own,
            more likely between equals.
        held: known ratings, which remain fixed. Without them the mean of all ratings is MEAN, since only
            differences are known.
    Raises: ValueError without comparisons, and as `bradley_terry`.
    """
    # Read several times below; the argument may be an iterator.
    judgements = list(judgements)
    held = dict(held or {})
    assert draws in DRAWS and all(j.winner in ("a", "b", "tie") for j in judgements)
    if not judgements:
        raise ValueError("elo: expected judgements, got none. Compare some pairs first.")

    def fit(chosen: Sequence[Judgement]) -> tuple[Strengths, dict[str, float]]:
        """Return the strengths and the ratings of a sample of comparisons."""
        comparisons = [c for j in chosen for c in _comparisons(j, draws)]
        strengths = bradley_terry(comparisons, held={name: value / SCALE for name, value in held.items()})
        # Held ratings define the scale; otherwise the mean is set.
        shift = 0.0 if held else MEAN
        return strengths, {
            str(item): SCALE * float(s) + shift
            for item, s in zip(strengths.items, strengths.strength, strict=True)
        }

    prompts_known = all(j.prompt for j in judgements)
    clusters: dict[object, list[Judgement]] = defaultdict(list)
    for number, j in enumerate(judgements):
        # Without prompts, each comparison is a cluster of its own.
        clusters[j.prompt if prompts_known else number].append(j)
    strengths, ratings = fit(judgements)
    groups = list(clusters.values())
    # A fixed seed: equal comparisons give equal intervals.
    rng = np.random.default_rng(0)
    resampled: dict[str, list[float]] = defaultdict(list)
    # Resampled prompts, because comparisons of one prompt are not independent.
    for _ in range(resamples):
        resample = [j for k in rng.integers(len(groups), size=len(groups)) for j in groups[k]]
        # A resample in which all methods are held has nothing to estimate.
        if {name for j in resample for name in (j.a, j.b)} - held.keys():
            for name, value in fit(resample)[1].items():
                resampled[name].append(value)
    counts = {name: sum(name in (j.a, j.b) for j in judgements) for name in ratings}
    rows = {
        name: Rating(elo=value, **_ends(value, resampled[name]), judgements=counts[name])
        for name, value in ratings.items()
    }
    return Tournament(
        ratings=dict(sorted(rows.items(), key=lambda row: -row[1].elo)),
        draws=draws,
        tie_weight=strengths.tie_weight,
        regularised=strengths.regularised,
        prompts=len(groups) if prompts_known else 0,
    )


def _comparisons(j: Judgement, draws: str) -> list[Comparison]:
    """Return a result as comparisons for `bradley_terry`; a draw that counts for both gives two."""
    if j.winner == "tie":
        return (
            [Comparison(j.a, j.b), Comparison(j.b, j.a)]
            if draws == "both"
            else [Comparison(j.a, j.b, tie=True)]
        )
    return [Comparison(j.a, j.b) if j.winner == "a" else Comparison(j.b, j.a)]


def _ends(value: float, resampled: Sequence[float]) -> dict[str, float]:
    """Return the ends of a normal interval, from the standard deviation over resamples.

    With few resamples this is more stable than their quantiles.
    """
    half = 1.96 * float(np.std(resampled, ddof=1)) if len(resampled) > 1 else 0.0
    return {"lo": value - half, "hi": value + half}


def read_judgements(path: str | Path) -> list[Judgement]:
    """Read comparisons from a JSON-lines file with the fields a, b, winner and, if known, prompt and
    criterion.

    Other fields are ignored.

    Raises: OSError; ValueError with file, line and remedy for the first line that does not fit, and for a
    file without comparisons.
    """
    path = Path(path)
    judgements = []
    for number, record in jsonl_records(path, '{"a": ..., "b": ..., "winner": "a", "b" or "tie"}'):
        # Unknown fields are dropped.
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
                f"{path.name}, line {number}: expected two methods and as winner a, b or tie, got {got}."
                " Correct the line."
            )
        judgements.append(judgement)
    if not judgements:
        raise ValueError(f"{path.name}: expected judgements, got none. Compare some pairs first.")
    return judgements


def markdown(tables: Mapping[str, Tournament]) -> str:
    """Format tables by criterion as Markdown."""
    lines: list[str] = []
    for criterion, tournament in tables.items():
        ties = (
            "a draw is a win of both"
            if tournament.draws == "both"
            else f"Davidson's ties, nu {tournament.tie_weight:.2f}"
        )
        over = f"{tournament.prompts} prompts" if tournament.prompts else "single comparisons"
        lines += [f"## {criterion} ({ties}; intervals over {over})", ""]
        if tournament.regularised:
            lines += [
                (
                    "The ratings have no maximum-likelihood estimate, because a method never lost to the"
                    " others. A normal prior (standard deviation 347 Elo) keeps them finite."
                ),
                "",
            ]
        lines += ["| method | Elo | 95 % | comparisons |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {r.elo:.1f} | {r.lo:.1f} to {r.hi:.1f} | {r.judgements} |"
            for name, r in tournament.ratings.items()
        ]
        lines.append("")
    return "\n".join(lines)
