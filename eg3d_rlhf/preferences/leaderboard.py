"""Leaderboard of generators: Bradley-Terry strengths whose intervals allow for comparisons that share
annotators and prompts, and points for those generators that have enough games.

Letters: N items, R repetitions, C cells (two generators that met), G generators.
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
    met = linked([Comparison(g.first, g.second) for g in kept]) if kept else []
    names_of_groups = [{name for c in part for name in c[:2]} for part in met]
    groups = [_standings([g for g in kept if g.first in names]) for names in names_of_groups]
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
