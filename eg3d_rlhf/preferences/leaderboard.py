"""Leaderboard of generators: Bradley-Terry strengths with intervals that allow for shared annotators and
prompts.

Generators with enough comparisons ("games") get points.

Letters: N items, M games, R repetitions, C cells (pairs of generators that met), G generators, F free
directions.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import t as student

from eg3d_rlhf.preferences.bradley_terry import MEAN, SCALE, Comparison
from eg3d_rlhf.preferences.label_scores import linked

# Intervals that allow for comparisons with common annotators and prompts, and that have their coverage for
# few of them. A score is 1 if the first of a cell's two generators was preferred, 0 if the second was, 0.5
# for a tie. The same code serves one leaderboard (R = 1) and thousands of simulated ones.


# Number of annotators below which they are not resampled; the intervals then apply to these annotators only.
FEW = 4
REACH = 8.0  # the search for an end stops here; further out, the data do not bound the strength on that side
# Smallest (V_annotators - V_both) / V_both; tuned by simulation (docs/results/intervals.md).
_TOGETHER = -0.5
# Smallest variance relative to the model's for untied games. Where one generator nearly always wins, the
# variance from residuals is too small.
_LEAST = 0.45
_FIT_STEPS = 60  # of Newton's method
_HALVINGS = 40  # of the search for an end
_PRECISION = 1e-4  # of an end, in units of strength


@dataclass(frozen=True, kw_only=True)
class Design:
    """Structure of the games: the generators, annotator and prompt of each."""

    cells: np.ndarray  # [C, 2] indices of generators, from 0; the games connect all generators
    cell: np.ndarray  # [M] index of each game's cell, from 0
    annotator: np.ndarray  # [M] index of each game's annotator, from 0
    prompt: np.ndarray  # [M] index of each game's prompt, from 0

    @property
    def generators(self) -> int:
        """Return the number of generators G."""
        return int(self.cells.max()) + 1

    @property
    def signs(self) -> np.ndarray:
        """Return [C, G]: 1 for a cell's first generator, -1 for its second."""
        signs = np.zeros((len(self.cells), self.generators))
        rows = np.arange(len(self.cells))
        # A game between generators i and j depends on s_i - s_j only.
        signs[rows, self.cells[:, 0]], signs[rows, self.cells[:, 1]] = 1, -1
        return signs

    @property
    def games(self) -> np.ndarray:
        """Return the number of games of each cell [C]."""
        return np.bincount(self.cell, minlength=len(self.cells)).astype(np.float64)


def fit(
    score: np.ndarray, games: np.ndarray, signs: np.ndarray, held: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Maximise the logistic quasi-likelihood of scores. Returns the strengths [R, G], with mean 0.

    Args:
        score: [R, C], sum of the scores of each cell.
        games: [C]; signs: [C, G].
        held: (c [G], value [R]) adds the constraint c . strength = value.
    """
    constraints = np.ones((signs.shape[1], 1)) if held is None else np.c_[np.ones(signs.shape[1]), held[0]]
    # The null space of the constraints, from the singular value decomposition.
    free = np.linalg.svd(constraints)[0][:, constraints.shape[1] :]  # [G, F] directions that may move
    # A start that fulfils the constraints.
    start = (
        np.zeros((len(score), signs.shape[1]))
        if held is None
        else held[1][:, None] * held[0] / (held[0] @ held[0])
    )
    free_signs = signs @ free
    coefficients = np.zeros((len(score), free.shape[1]))
    for _ in range(_FIT_STEPS if free.shape[1] else 0):
        p = expit((start + coefficients @ free.T) @ signs.T)
        # Newton's method. 1e-12: a cell that one generator wins with certainty has no curvature.
        hessian = np.einsum("rc,ca,cb->rab", games * p * (1 - p), free_signs, free_signs) + 1e-12 * np.eye(
            free.shape[1]
        )
        step = np.linalg.solve(hessian, ((score - games * p) @ free_signs)[..., None])[..., 0]
        # at most 2 units of strength per step
        step *= np.minimum(1, 2 / np.abs(step).max(axis=1, keepdims=True).clip(1e-12))
        coefficients = coefficients + step
        # Far below the precision of an interval's end.
        if np.abs(step).max() < 1e-7:
            break
    strength: np.ndarray = start + coefficients @ free.T
    return strength


def strengths(
    scores: np.ndarray, design: Design, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate strengths [R, G], with mean 0, and the ends of their intervals [R, G].

    An end is infinite if the data do not bound the strength on that side.

    P(score) = sigmoid(s_i - s_j): ties count half, so with two generators the difference of strengths is the
    log-odds of the fraction of wins. G - 1 additional drawn games, spread evenly over the cells, keep the
    estimate finite (with two generators this is Firth's estimate).

    Ends: where the squared efficient score of the given games exceeds its variance times the squared quantile
    of Student's t. With two generators and independent games this is Wilson's interval. The variance
    (Cameron, Gelbach and Miller 2011) is V = V_prompts + V_annotators - V_both, where the sum of the last two
    is at least -0.5 V_both; degrees of freedom after Satterthwaite. With fewer than FEW annotators V =
    V_prompts. V is never below 0.45 times that of untied independent games.

    Args: scores: [R, M]; design: with at least two prompts.
    """
    cell_of_game = np.zeros((len(design.cell), len(design.cells)))  # [M, C]
    cell_of_game[np.arange(len(design.cell)), design.cell] = 1
    score = scores @ cell_of_game  # [R, C]
    # Each game counts equally, independent of its annotator.
    games = design.games
    signs = design.signs
    # One additional draw less than generators, as fractions of games per cell.
    drawn = np.full(len(games), (design.generators - 1) / len(games))
    estimate = fit(score + drawn / 2, games + drawn, signs)
    p = expit(estimate @ signs.T)
    # [R, M]. The second term is the drawn games' part of the estimate; with it the residuals sum to 0.
    residual = scores - (p - drawn / games * (0.5 - p))[:, design.cell]
    least_variance = _LEAST * (scores != 0.5).mean(axis=1)  # [R]; ties carry no variance
    ends = np.empty((2, *estimate.shape))
    for k in range(design.generators):
        # the strength of generator k relative to the mean
        contrast = np.eye(design.generators)[k] - 1 / design.generators
        allowed = _allowed(residual, least_variance, estimate, design, contrast, confidence)
        for side, out in zip((-1, 1), ends, strict=True):
            out[:, k] = _end(estimate[:, k], side, contrast, allowed, (score, games, signs, drawn))
    return estimate, ends[0], ends[1]


def _direction(
    strength: np.ndarray, games: np.ndarray, signs: np.ndarray, contrast: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the efficient score of a contrast of strengths, with the other strengths unknown.

    Returns: its weights on the scores [R, G], and its information [R].
    """
    p = expit(strength @ signs.T)
    information = np.einsum("rc,ca,cb->rab", games * p * (1 - p), signs, signs)
    # the direction in which all strengths move has no information; this makes the matrix regular
    size = np.trace(information, axis1=1, axis2=2)[:, None, None] / len(contrast) ** 2
    right_side = np.broadcast_to(contrast, strength.shape)[..., None]
    solved = np.linalg.solve(information + size + 1e-14 * np.eye(len(contrast)), right_side)[..., 0]
    # Inverse of the efficient information: contrast . I^-1 contrast
    variance = (solved @ contrast)[:, None]
    return solved / variance, 1 / variance[:, 0]


def _allowed(
    residual: np.ndarray,
    least_variance: np.ndarray,
    strength: np.ndarray,
    design: Design,
    contrast: np.ndarray,
    confidence: float,
) -> np.ndarray:
    """Compute the largest accepted squared score relative to its information [R]: squared quantile times
    design effect.
    """
    weights, information = _direction(strength, design.games, design.signs, contrast)
    contributions = residual * (weights @ design.signs.T)[:, design.cell]  # [R, M]
    independent_variance = (contributions**2).sum(axis=1)
    # numbers of clusters
    annotators, prompts = (len(np.unique(group)) for group in (design.annotator, design.prompt))
    # Games of one prompt are not independent, so prompts are always clusters.
    total = _clustered(contributions, design.prompt)
    degrees = np.full(len(contributions), prompts - 1.0)
    if annotators >= FEW:
        prompt_variance = total  # the variance over prompts
        annotator_variance = _clustered(contributions, design.annotator)
        # one key for each combination of prompt and annotator
        both_variance = _clustered(
            contributions,
            design.prompt.astype(np.int64) * (int(design.annotator.max()) + 1) + design.annotator,
        )
        annotator_part = np.maximum(annotator_variance - both_variance, _TOGETHER * both_variance)
        total = prompt_variance + annotator_part
        # Satterthwaite's approximation of the degrees of freedom of a sum of two variances
        spread = annotator_variance**2 * (annotator_part > 0) / (annotators - 1) + prompt_variance**2 / (
            prompts - 1
        )
        degrees = np.clip(total**2 / spread.clip(1e-300), min(annotators, prompts) - 1, prompts - 1)
    # Without any variation (all games won) the data have no variance, and the model's is used.
    varied = independent_variance > 1e-9 * information
    total = np.where(varied, np.maximum(total, least_variance * information), information)
    allowed: np.ndarray = student.ppf(0.5 + confidence / 2, degrees) ** 2 * total / information
    return allowed


def _clustered(contributions: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Compute the variance [R] of a sum of M contributions from their sums over groups."""
    # Stable, for a fixed order of summation.
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    # add.reduceat sums runs, so contributions are sorted by group.
    squares: np.ndarray = (np.add.reduceat(contributions[:, order], starts, axis=1) ** 2).sum(axis=1)
    # correction for few groups, C / (C - 1)
    return squares * len(starts) / max(1, len(starts) - 1)


def _end(
    inside: np.ndarray, side: int, contrast: np.ndarray, allowed: np.ndarray, data: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Find where the test statistic exceeds the accepted value [R], between the estimate and REACH on one
    side.

    The result is infinite where it never does.
    """
    score, games, signs, drawn = data

    def accepted(value: np.ndarray) -> np.ndarray:
        """Test a value of the contrast [R] with the other strengths at their best."""
        constrained = fit(score + drawn / 2, games + drawn, signs, (contrast, value))
        weights, information = _direction(constrained, games, signs, contrast)
        efficient_score = (((score - games * expit(constrained @ signs.T)) @ signs) * weights).sum(axis=1)
        is_accepted: np.ndarray = efficient_score**2 <= allowed * information
        return is_accepted

    # The bracket: `inside` is accepted, `outside` may not be.
    outside = np.full(len(inside), side * REACH)
    endless = accepted(outside)
    for _ in range(_HALVINGS):  # bisection
        middle = (inside + outside) / 2
        middle_accepted = accepted(middle)
        inside = np.where(middle_accepted, middle, inside)
        outside = np.where(middle_accepted, outside, middle)
        if np.abs(inside - outside).max() < _PRECISION:
            break
    return np.where(endless, side * np.inf, inside)


# A leaderboard of generators: points with intervals. Generators with too few games get no points, and only
# generators that met, directly or through others, are compared. Points are 1000 + 400 / ln 10 times the
# strength, as in Elo: 100 points more mean 64 % of the games won, 200 points 76 %.


# Numbers of games and prompts that a generator needs for points. With fewer, no interval that we tried has
# its coverage (docs/results/intervals.md).
LEAST_GAMES = 20
LEAST_PROMPTS = 10


class Game(NamedTuple):
    """One comparison of shapes of two generators."""

    first: str
    second: str
    winner: str | None  # one of the two names; None: a tie
    annotator: str
    prompt: Hashable  # what both shapes were generated from; games of the same prompt are not independent
    bad: bool = False  # of a tie: both shapes are bad


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The results of one generator."""

    name: str
    games: int
    wins: int
    losses: int
    ties: int  # including those with both bad
    both_bad: int
    prompts: int
    points: float | None  # None: too few games or prompts
    lo: float | None  # None: unbounded, or no points
    hi: float | None  # likewise

    @property
    def score(self) -> float:
        """Return the fraction of games won, ties counted half."""
        return (self.wins + self.ties / 2) / self.games

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
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
    """Groups of generators that met each other, directly or through others, best first.

    Points of different groups cannot be compared.
    """

    groups: tuple[tuple[Standing, ...], ...]
    few: tuple[Standing, ...]  # generators with too few games; their games count for no one's points
    games: int
    annotators: int
    prompts: int

    def notes(self) -> list[str]:
        """Return what a reader has to know, in sentences."""
        sentences = []
        if self.groups:
            average_over = "each group" if len(self.groups) > 1 else "all generators"
            sentences.append(
                f"95 % intervals. Ties count half. The mean of {average_over} is {MEAN:g} points."
            )
        if len(self.groups) > 1:
            sentences.append(
                f"{len(self.groups)} groups of generators never met: points of different groups cannot be"
                " compared."
            )
        if self.groups and self.annotators < FEW:
            annotators = "this annotator" if self.annotators == 1 else f"these {self.annotators} annotators"
            sentences.append(
                f"The intervals apply to {annotators} only. Add {FEW - self.annotators} or more annotators"
                " for intervals that include the differences between annotators."
            )
        for s in (s for group in self.groups for s in group if not s.ties and not (s.wins and s.losses)):
            lower = bool(s.losses)
            sentences.append(
                f"{s.name} has {'lost' if lower else 'won'} every game. The games do not bound how much"
                f" {'lower' if lower else 'higher'} its strength is, so the mean and the others' points are"
                " unbounded, too."
            )
        sentences += [f"{s.name}: {needs(s.games, s.prompts)}." for s in self.few]
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
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
    """Describe what is missing before a generator gets points."""
    missing = [
        (LEAST_GAMES - games, "more comparison", "s"),
        (LEAST_PROMPTS - prompts, "more prompt", "s or pairs"),
    ]
    words = [
        f"{missing_count} {unit}{plural if missing_count > 1 else ''}"
        for missing_count, unit, plural in missing
        if missing_count > 0
    ]
    if not words:
        return f"{games} comparisons, but its opponents have too few"
    return f"{games} comparisons over {prompts} prompts; needs {' and '.join(words)}"


def leaderboard(games: Iterable[Game]) -> Leaderboard:
    """Compute points of every generator with at least LEAST_GAMES games over LEAST_PROMPTS prompts.

    Only games against generators that fulfil this, too, are counted.
    """
    games = list(games)
    assert all(game.first != game.second and game.winner in (game.first, game.second, None) for game in games)
    # Games among generators that have enough of them.
    ranked_games = games
    # Removing a generator removes games of its opponents, which may then have too few as well.
    while True:
        names = sorted(name for name in _names(ranked_games) if _enough(ranked_games, name))
        remaining_games = [g for g in ranked_games if g.first in names and g.second in names]
        if len(remaining_games) == len(ranked_games):
            break
        ranked_games = remaining_games
    connected = linked([Comparison(g.first, g.second) for g in ranked_games]) if ranked_games else []
    names_of_groups = [{name for c in part for name in c[:2]} for part in connected]
    groups = [_standings([g for g in ranked_games if g.first in names]) for names in names_of_groups]
    few = [_standing(games, name, None) for name in sorted(_names(games) - _names(ranked_games))]
    return Leaderboard(
        groups=tuple(sorted(groups, key=lambda group: (-len(group), group[0].name))),
        few=tuple(few),
        games=len(games),
        annotators=len({g.annotator for g in games}),
        prompts=len({g.prompt for g in games}),
    )


def _names(games: Iterable[Game]) -> set[str]:
    """Return the names of all generators in games."""
    return {name for game in games for name in (game.first, game.second)}


def _enough(games: Sequence[Game], name: str) -> bool:
    """Return True if a generator has enough games over enough prompts."""
    own_games = [g for g in games if name in (g.first, g.second)]
    return len(own_games) >= LEAST_GAMES and len({g.prompt for g in own_games}) >= LEAST_PROMPTS


def _standings(games: Sequence[Game]) -> tuple[Standing, ...]:
    """Return the standings of one group, best first."""
    names = {name: i for i, name in enumerate(sorted(_names(games)))}
    cells: dict[tuple[str, str], int] = {}
    # A cell is an unordered pair of names; the smaller name is its first generator.
    cell = [cells.setdefault((min(g[:2]), max(g[:2])), len(cells)) for g in games]
    design = Design(
        cells=np.array([[names[a], names[b]] for a, b in cells]),
        cell=np.array(cell),
        annotator=_numbers(g.annotator for g in games),
        prompt=_numbers(g.prompt for g in games),
    )
    # The score of a game is that of its cell's first generator, the smaller name.
    scores = np.array([0.5 if g.winner is None else float(g.winner == min(g[:2])) for g in games])
    points, lo, hi = (MEAN + SCALE * part[0] for part in strengths(scores[None], design))
    rows = [_standing(games, name, (points[i], lo[i], hi[i])) for name, i in names.items()]
    return tuple(sorted(rows, key=lambda row: -(row.points or 0)))


def _numbers(values: Iterable[Hashable]) -> np.ndarray:
    """Number values from 0, in order of appearance."""
    number_of_value: dict[Hashable, int] = {}
    return np.array([number_of_value.setdefault(value, len(number_of_value)) for value in values])


def _standing(games: Sequence[Game], name: str, ends: tuple[float, float, float] | None) -> Standing:
    """Return the results of one generator; `ends` is (points, lo, hi) or None."""
    own_games = [g for g in games if name in (g.first, g.second)]
    points, lo, hi = (
        # infinite ends are None in JSON
        (float(x) if np.isfinite(x) else None for x in ends) if ends is not None else (None, None, None)
    )
    # From the point of view of this generator.
    results = Counter("tie" if g.winner is None else "win" if g.winner == name else "loss" for g in own_games)
    return Standing(
        name=name,
        games=len(own_games),
        wins=results["win"],
        losses=results["loss"],
        ties=results["tie"],
        both_bad=sum(g.bad for g in own_games),
        prompts=len({g.prompt for g in own_games}),
        points=points,
        lo=lo,
        hi=hi,
    )
