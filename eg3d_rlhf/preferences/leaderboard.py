"""A leaderboard of generators from judged pairs: points with intervals, nothing of those with too few games, and only among those who met.

Points are 1000 + 400 / ln 10 times the Bradley-Terry strength, as Elo counts: 100 points ahead win 64 % of the games, 200 points 76 %.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from eg3d_rlhf.preferences.clustered_strengths import FEW, Design, strengths
from eg3d_rlhf.preferences.elo import SCALE

LEAST_GAMES, LEAST_PROMPTS = 20, 10  # of a generator, of a group; fewer: no figure, since none was found that holds (docs/labelling.md)
MEAN = 1000.0


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

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "name": self.name, "points": self.points, "ci95": None if self.points is None else [self.lo, self.hi], "n": self.games,
            "wins": self.wins, "losses": self.losses, "ties": self.ties, "both_bad": self.both_bad, "prompts": self.prompts,
            "score": self.score, "needs": needs(self.games, self.prompts) if self.points is None else "",
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Groups of generators that met each other, directly or over others, best first; the points of two groups say nothing of each other."""

    groups: tuple[tuple[Standing, ...], ...]
    few: tuple[Standing, ...]  # too few games for points; nobody's points count their games
    games: int
    annotators: int
    prompts: int

    def notes(self) -> list[str]:
        """What a reader has to know, in sentences."""
        found = []
        if self.groups:
            whose = "each group" if len(self.groups) > 1 else "all"
            found.append(f"95 % intervals. Ties count half; the mean of {whose} is {MEAN:g} points.")
        if len(self.groups) > 1:
            found.append(f"{len(self.groups)} groups of generators never met each other: points of different groups cannot be compared.")
        if self.groups and self.annotators < FEW:
            whose = "this annotator" if self.annotators == 1 else f"these {self.annotators} annotators"
            found.append(f"The intervals speak of {whose} alone: to speak of people like them takes {FEW - self.annotators} more.")
        for s in (s for group in self.groups for s in group if not s.ties and not (s.wins and s.losses)):
            never, far = ("won", "behind") if s.losses else ("lost", "ahead")
            found.append(f"{s.name} has never {never}: nothing tells how far {far}, so the mean and the others' points are open, too.")
        found += [f"{s.name}: {needs(s.games, s.prompts)}." for s in self.few]
        return found

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "groups": [[s.to_dict() for s in group] for group in self.groups], "few": [s.to_dict() for s in self.few],
            "notes": self.notes(), "n": self.games, "annotators": self.annotators, "prompts": self.prompts, "least_games": LEAST_GAMES,
            "least_prompts": LEAST_PROMPTS,
        }  # fmt: skip


def needs(games: int, prompts: int) -> str:
    """What is missing before there are points, in words."""
    missing = [(LEAST_GAMES - games, "more comparison", "s"), (LEAST_PROMPTS - prompts, "more prompt", "s or pairs")]
    words = [f"{short} {what}{plural if short > 1 else ''}" for short, what, plural in missing if short > 0]
    if not words:
        return f"{games} comparisons; its opponents have too few"
    return f"{games} comparisons over {prompts}; needs {' and '.join(words)}"


def leaderboard(games: Iterable[Game]) -> Leaderboard:
    """Points of every generator with LEAST_GAMES games over LEAST_PROMPTS prompts against others that have them, too.

    Raises: ValueError for a game of a generator against itself, or won by a third.
    """
    games = list(games)
    for game in games:
        if game.first == game.second or game.winner not in (game.first, game.second, None):
            raise ValueError(f"leaderboard: expected two generators and one of them, or none, to win, got {game}. Drop it.")
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
        groups=tuple(sorted(groups, key=lambda group: (-len(group), group[0].name))), few=tuple(few), games=len(games),
        annotators=len({g.annotator for g in games}), prompts=len({g.prompt for g in games}),
    )  # fmt: skip


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
    place = connected_components(coo_matrix((np.ones(len(games)), ends), shape=(len(names), len(names))), directed=False)[1]
    return [{name for name, i in names.items() if place[i] == group} for group in range(place.max() + 1)]


def _standings(games: Sequence[Game]) -> tuple[Standing, ...]:
    """The members of one group, best first."""
    names = {name: i for i, name in enumerate(sorted(_names(games)))}
    cells: dict[tuple[str, str], int] = {}
    cell = [cells.setdefault((min(g[:2]), max(g[:2])), len(cells)) for g in games]
    design = Design(
        cells=np.array([[names[a], names[b]] for a, b in cells]), cell=np.array(cell), annotator=_numbers(g.annotator for g in games),
        prompt=_numbers(g.prompt for g in games),
    )  # fmt: skip
    scores = np.array([0.5 if g.winner is None else float(g.winner == min(g[:2])) for g in games])
    found, lo, hi = (MEAN + SCALE * part[0] for part in strengths(scores[None], design))
    rows = [_standing(games, name, (found[i], lo[i], hi[i])) for name, i in names.items()]
    return tuple(sorted(rows, key=lambda row: -(row.points or 0)))


def _numbers(values: Iterable[Hashable]) -> np.ndarray:
    """From 0, in order of appearance."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values])


def _standing(games: Sequence[Game], name: str, found: tuple[float, float, float] | None) -> Standing:
    mine = [g for g in games if name in (g.first, g.second)]
    points, lo, hi = (float(x) if np.isfinite(x) else None for x in found) if found is not None else (None, None, None)
    results = Counter("tie" if g.winner is None else "win" if g.winner == name else "loss" for g in mine)
    return Standing(
        name=name, games=len(mine), wins=results["win"], losses=results["loss"], ties=results["tie"], both_bad=sum(g.bad for g in mine),
        prompts=len({g.prompt for g in mine}), points=points, lo=lo, hi=hi,
    )  # fmt: skip
