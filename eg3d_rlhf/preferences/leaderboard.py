"""Leaderboard of generators from comparisons of their shapes.

Points are Bradley-Terry strengths, whose intervals take into account that comparisons with the same annotator
or the same prompt are not independent. A comparison is called a *game*. Only generators with enough games get
points.

Shapes: M games, R repetitions, C cells (pairs of generators with games), G generators, F free directions.
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

# Intervals for games with common annotators and prompts, which have the stated coverage also for few
# annotators and prompts. The score of a game is 1 if the first of the two generators of its cell was
# preferred, 0 if the second one was, and 0.5 for a tie. The same code computes one leaderboard (R = 1) and
# thousands of simulated leaderboards.


# With fewer annotators, differences between annotators are not estimated, and the intervals apply to these
# annotators only.
FEW = 4
# Greatest absolute strength at which an end of an interval is searched. If the end is not found, the interval
# is unbounded on this side.
REACH = 8.0
# Least value of (V_annotators - V_both) / V_both, chosen by simulation (docs/results/intervals.md)
_TOGETHER = -0.5
# Least variance, relative to the variance of the model for untied games. If one generator wins almost all
# games, the variance of the residuals is too small.
_MIN_VARIANCE = 0.45
_FIT_STEPS = 60  # largest number of steps of Newton's method
_HALVINGS = 40  # largest number of steps of the bisection for an end of an interval
_PRECISION = 1e-4  # precision of an end of an interval, in units of strength


@dataclass(frozen=True, kw_only=True)
class Design:
    """Structure of the games: generators, annotator and prompt of each game."""

    cells: np.ndarray  # indices of the two generators of each cell, [C, 2]; games connect all generators
    cell: np.ndarray  # index of the cell of each game, [M]
    annotator: np.ndarray  # index of the annotator of each game, [M]
    prompt: np.ndarray  # index of the prompt of each game, [M]

    @property
    def generator_count(self) -> int:
        """Number of generators, G."""
        return int(self.cells.max()) + 1

    @property
    def signs(self) -> np.ndarray:
        """Matrix [C, G] with 1 for the first generator of a cell and -1 for its second generator.

        Its product with the strengths gives the difference of strengths of each cell.
        """
        sign_matrix = np.zeros((len(self.cells), self.generator_count))
        cell_indices = np.arange(len(self.cells))
        sign_matrix[cell_indices, self.cells[:, 0]] = 1
        sign_matrix[cell_indices, self.cells[:, 1]] = -1
        return sign_matrix

    @property
    def game_counts(self) -> np.ndarray:
        """Number of games of each cell, [C]."""
        return np.bincount(self.cell, minlength=len(self.cells)).astype(np.float64)


def fit(
    cell_scores: np.ndarray,
    game_counts: np.ndarray,
    signs: np.ndarray,
    constraint: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Maximise the logistic quasi-likelihood of scores over strengths with mean 0.

    Args:
        cell_scores: sums [R, C] of the scores of each cell.
        game_counts: numbers [C] of games of each cell.
        signs: matrix [C, G] of `Design.signs`.
        constraint: coefficients c [G] and values [R] of an additional constraint c . strength = value; None
            for no constraint.
    Returns: strengths [R, G].
    """
    # Columns: the constraint that the mean is 0, and the additional constraint.
    constraints = (
        np.ones((signs.shape[1], 1)) if constraint is None else np.c_[np.ones(signs.shape[1]), constraint[0]]
    )
    # Basis [G, F] of the directions in which the constraints remain fulfilled: the left singular vectors
    # after the first ones, one for each constraint.
    free_directions = np.linalg.svd(constraints)[0][:, constraints.shape[1] :]
    # Strengths that fulfil the constraints
    if constraint is None:
        start_strengths = np.zeros((len(cell_scores), signs.shape[1]))
    else:
        constraint_coefficients, constraint_values = constraint
        start_strengths = (
            constraint_values[:, None]
            * constraint_coefficients
            / (constraint_coefficients @ constraint_coefficients)
        )
    free_signs = signs @ free_directions
    coefficients = np.zeros((len(cell_scores), free_directions.shape[1]))
    for _ in range(_FIT_STEPS if free_directions.shape[1] else 0):
        p = expit((start_strengths + coefficients @ free_directions.T) @ signs.T)
        # A step of Newton's method. If one generator wins a cell with certainty, the cell has no curvature,
        # and 1e-12 makes the matrix regular.
        hessian = np.einsum(
            "rc,ca,cb->rab", game_counts * p * (1 - p), free_signs, free_signs
        ) + 1e-12 * np.eye(free_directions.shape[1])
        step = np.linalg.solve(hessian, ((cell_scores - game_counts * p) @ free_signs)[..., None])[..., 0]
        # A step is limited to 2 units of strength.
        step *= np.minimum(1, 2 / np.abs(step).max(axis=1, keepdims=True).clip(1e-12))
        coefficients = coefficients + step
        # This is far below the precision of the ends of intervals.
        if np.abs(step).max() < 1e-7:
            break
    fitted_strengths: np.ndarray = start_strengths + coefficients @ free_directions.T
    return fitted_strengths


def strengths(
    scores: np.ndarray, design: Design, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate the strengths of generators, with intervals.

    The expected score of a game is sigmoid(s_i - s_j), where s_i, s_j are the strengths of the first and the
    second generator. Ties count half. G - 1 additional ties, distributed evenly over the cells, make the
    estimate finite. With two generators this is Firth's estimate.

    An end of an interval is the strength at which the squared efficient score of the games exceeds its
    variance V times the squared quantile of Student's t distribution. The efficient score is the derivative
    of the log-likelihood in this strength, see `_direction`. With two generators and independent games the
    result is Wilson's interval. The variance is V = V_prompts + V_annotators - V_both (Cameron, Gelbach and
    Miller 2011). V_prompts is the variance for games that are grouped by prompt, V_annotators for games that
    are grouped by annotator, and V_both for games that are grouped by prompt and annotator together. The
    difference V_annotators - V_both is limited to values of at least -0.5 V_both. With fewer than FEW
    annotators V is V_prompts. V is at least 0.45 times the variance of untied independent games. Degrees of
    freedom are those of Satterthwaite.

    Args:
        scores: scores [R, M] of the games.
        design: structure of the games, with at least two prompts.
        confidence: level of the intervals, in 0..1.
    Returns: the strengths with mean 0, the lower ends of their intervals, and the upper ends of their
        intervals, [R, G] each. An end is infinite if the games do not bound the strength on this side.
    """
    cell_membership = np.zeros((len(design.cell), len(design.cells)))  # [M, C]
    cell_membership[np.arange(len(design.cell)), design.cell] = 1
    cell_scores = scores @ cell_membership  # [R, C], sums of the scores of all games of a cell
    game_counts = design.game_counts
    signs = design.signs
    # Number of additional ties of each cell, a fraction of a game
    added_ties = np.full(len(game_counts), (design.generator_count - 1) / len(game_counts))
    estimated_strengths = fit(cell_scores + added_ties / 2, game_counts + added_ties, signs)
    win_probabilities = expit(estimated_strengths @ signs.T)
    # [R, M]. The second term in the bracket is the influence of the additional ties. With it the residuals
    # sum to 0.
    residuals = (
        scores - (win_probabilities - added_ties / game_counts * (0.5 - win_probabilities))[:, design.cell]
    )
    min_variance = _MIN_VARIANCE * (scores != 0.5).mean(axis=1)  # [R]; ties carry no variance
    interval_ends = np.empty((2, *estimated_strengths.shape))
    for generator_index in range(design.generator_count):
        # The product of this contrast and the strengths is the strength of generator k relative to the mean.
        contrast = np.eye(design.generator_count)[generator_index] - 1 / design.generator_count
        accepted_limit = _largest_accepted(
            residuals, min_variance, estimated_strengths, design, contrast, confidence
        )
        cell_data = (cell_scores, game_counts, signs, added_ties)
        # Lower end (-1) and upper end (1)
        for side, side_ends in zip((-1, 1), interval_ends, strict=True):
            side_ends[:, generator_index] = _find_end(
                estimated_strengths[:, generator_index], side, contrast, accepted_limit, cell_data
            )
    return estimated_strengths, interval_ends[0], interval_ends[1]


def _direction(
    strength_values: np.ndarray, game_counts: np.ndarray, signs: np.ndarray, contrast: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the direction of the efficient score of a contrast of strengths.

    The efficient score is the derivative of the log-likelihood in the contrast, if all other combinations of
    strengths are unknown.

    Args:
        strength_values: strengths [R, G] at which the direction is computed.
        game_counts: numbers [C] of games of each cell.
        signs: matrix [C, G] of `Design.signs`.
        contrast: coefficients [G] of the contrast, which sum to 0.
    Returns: the weights [R, G] with which the derivatives in the strengths are added to the efficient score,
        and the variance [R] of the efficient score in the model (its information).
    """
    p = expit(strength_values @ signs.T)
    information = np.einsum("rc,ca,cb->rab", game_counts * p * (1 - p), signs, signs)
    # The games give no information on the mean of all strengths. A constant that is added to all entries
    # makes the matrix regular, and does not change the result for a contrast.
    mean_information = np.trace(information, axis1=1, axis2=2)[:, None, None] / len(contrast) ** 2
    right_hand_sides = np.broadcast_to(contrast, strength_values.shape)[..., None]
    # The inverse of the information times the contrast, [R, G]
    inverse_times_contrast = np.linalg.solve(
        information + mean_information + 1e-14 * np.eye(len(contrast)), right_hand_sides
    )[..., 0]
    # The inverse of the efficient information is contrast . I^-1 contrast.
    variance = (inverse_times_contrast @ contrast)[:, None]
    return inverse_times_contrast / variance, 1 / variance[:, 0]


def _largest_accepted(
    residuals: np.ndarray,
    min_variance: np.ndarray,
    estimated_strengths: np.ndarray,
    design: Design,
    contrast: np.ndarray,
    confidence: float,
) -> np.ndarray:
    """Compute the largest value [R] of (squared efficient score / information) inside the interval.

    It is the squared quantile of Student's t distribution times the ratio of the variance V of the score (see
    `strengths`) to its information.

    Args:
        residuals: residuals [R, M] of the games.
        min_variance: lower limit [R] of the variance, as a share of the information.
        estimated_strengths: estimated strengths [R, G].
        design: structure of the games.
        contrast: coefficients [G] of the contrast.
        confidence: level of the interval, in 0..1.
    """
    weights, information = _direction(estimated_strengths, design.game_counts, design.signs, contrast)
    contributions = residuals * (weights @ design.signs.T)[:, design.cell]  # [R, M]
    independent_variance = (contributions**2).sum(axis=1)
    annotator_count = len(np.unique(design.annotator))
    prompt_count = len(np.unique(design.prompt))
    # Games with the same prompt are not independent, so games are always grouped by prompt.
    prompt_variance = _grouped_variance(contributions, design.prompt)
    score_variance = prompt_variance
    degrees_of_freedom = np.full(len(contributions), prompt_count - 1.0)
    if annotator_count >= FEW:
        annotator_variance = _grouped_variance(contributions, design.annotator)
        # One number for each combination of prompt and annotator
        combination_index = (
            design.prompt.astype(np.int64) * (int(design.annotator.max()) + 1) + design.annotator
        )
        both_variance = _grouped_variance(contributions, combination_index)
        annotator_term = np.maximum(annotator_variance - both_variance, _TOGETHER * both_variance)
        score_variance = prompt_variance + annotator_term
        # Satterthwaite's approximation of the degrees of freedom of a sum of two variances
        denominator = annotator_variance**2 * (annotator_term > 0) / (
            annotator_count - 1
        ) + prompt_variance**2 / (prompt_count - 1)
        degrees_of_freedom = np.clip(
            score_variance**2 / denominator.clip(1e-300),
            min(annotator_count, prompt_count) - 1,
            prompt_count - 1,
        )
    # If one generator won all games, the residuals have no variance, and the variance of the model is used.
    has_variance = independent_variance > 1e-9 * information
    score_variance = np.where(
        has_variance, np.maximum(score_variance, min_variance * information), information
    )
    accepted_limit: np.ndarray = (
        student.ppf(0.5 + confidence / 2, degrees_of_freedom) ** 2 * score_variance / information
    )
    return accepted_limit


def _grouped_variance(contributions: np.ndarray, group_indices: np.ndarray) -> np.ndarray:
    """Estimate the variance [R] of the sum of M contributions if contributions of different groups are
    independent.

    Args:
        contributions: contributions [R, M].
        group_indices: index of the group of each contribution, [M].
    """
    # Sorted by group, because np.add.reduceat sums runs. A stable sort gives a fixed order of summation.
    game_order = np.argsort(group_indices, kind="stable")
    group_starts = np.flatnonzero(np.diff(group_indices[game_order], prepend=-1))
    squared_sum: np.ndarray = (np.add.reduceat(contributions[:, game_order], group_starts, axis=1) ** 2).sum(
        axis=1
    )
    # The factor n / (n - 1) corrects the bias for a small number n of groups.
    return squared_sum * len(group_starts) / max(1, len(group_starts) - 1)


def _find_end(
    estimated_contrast: np.ndarray,
    side: int,
    contrast: np.ndarray,
    accepted_limit: np.ndarray,
    cell_data: tuple[np.ndarray, ...],
) -> np.ndarray:
    """Find the end of an interval on one side by bisection between the estimate and `side` * REACH.

    Args:
        estimated_contrast: estimated contrast [R].
        side: -1 for the lower end, 1 for the upper end.
        contrast: coefficients [G] of the contrast.
        accepted_limit: largest accepted value [R], see `_largest_accepted`.
        cell_data: four arrays that describe the cells: the sums of scores [R, C], the numbers of games [C],
            the matrix of signs [C, G] of `Design.signs`, and the numbers of additional ties [C].
    Returns: the end [R] of the interval. It is infinite, with the sign of `side`, if it is beyond REACH.
    """
    cell_scores, game_counts, signs, added_ties = cell_data

    def is_inside(contrast_values: np.ndarray) -> np.ndarray:
        """Return a mask [R] of the values [R] of the contrast that are inside the interval.

        All other combinations of strengths have their most likely values.
        """
        constrained_strengths = fit(
            cell_scores + added_ties / 2, game_counts + added_ties, signs, (contrast, contrast_values)
        )
        weights, information = _direction(constrained_strengths, game_counts, signs, contrast)
        derivative = (cell_scores - game_counts * expit(constrained_strengths @ signs.T)) @ signs
        efficient_score = (derivative * weights).sum(axis=1)
        is_accepted: np.ndarray = efficient_score**2 <= accepted_limit * information
        return is_accepted

    inner_value = estimated_contrast
    outer_value = np.full(len(estimated_contrast), side * REACH)
    is_unbounded = is_inside(outer_value)
    for _ in range(_HALVINGS):
        middle_value = (inner_value + outer_value) / 2
        is_middle_inside = is_inside(middle_value)
        inner_value = np.where(is_middle_inside, middle_value, inner_value)
        outer_value = np.where(is_middle_inside, outer_value, middle_value)
        if np.abs(inner_value - outer_value).max() < _PRECISION:
            break
    return np.where(is_unbounded, side * np.inf, inner_value)


# Leaderboard of generators: points with intervals. Generators with too few games get no points. Only
# generators that are connected by games, directly or through other generators, are compared. As in Elo
# ratings, points are 1000 + 400 / ln 10 times the strength: with 100 points more a generator wins 64 % of the
# games, and with 200 points more 76 %.


# Least numbers of games and prompts of a generator with points. With fewer games or prompts, no interval that
# we tried has the stated coverage (docs/results/intervals.md).
MIN_GAMES = 20
MIN_PROMPTS = 10


class Game(NamedTuple):
    """One comparison of shapes of two generators."""

    first: str  # name of the first generator
    second: str  # name of the second generator
    winner: str | None  # name of the generator whose shape was preferred; None for a tie
    annotator: str  # name of the annotator
    prompt: Hashable  # prompt or latent of both shapes; games with the same prompt are not independent
    bad: bool = False  # for a tie: True if both shapes are bad


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Points of one generator, and the counts of its games."""

    name: str  # name of the generator
    games: int  # number of games
    wins: int  # number of games in which its shape was preferred
    losses: int  # number of games in which the other shape was preferred
    ties: int  # number of ties, including those in which both shapes are bad
    both_bad: int  # number of ties in which both shapes are bad
    prompts: int  # number of different prompts
    points: float | None  # points; None for too few games or prompts
    lo: float | None  # lower end of the interval; None if it is unbounded or there are no points
    hi: float | None  # upper end of the interval; None in the same cases

    @property
    def score(self) -> float:
        """Share of games that the generator won, where ties count half."""
        return (self.wins + self.ties / 2) / self.games

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
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
    """Results of all generators, in groups of generators that are connected by games.

    Points of different groups cannot be compared.
    """

    groups: tuple[tuple[Standing, ...], ...]  # generators with points, best first in each group
    few: tuple[Standing, ...]  # generators with too few games, whose games count for no points
    games: int  # number of all games
    annotators: int  # number of all annotators
    prompts: int  # number of all prompts

    def notes(self) -> list[str]:
        """Return sentences that explain the results, for readers of a report."""
        sentences = []
        if self.groups:
            average_scope_text = "each group" if len(self.groups) > 1 else "all generators"
            sentences.append(
                f"95 % intervals. Ties count half. The mean of {average_scope_text} is {MEAN:g} points."
            )
        if len(self.groups) > 1:
            sentences.append(
                f"There are {len(self.groups)} groups of generators without comparisons between them, so"
                " points of different groups cannot be compared."
            )
        if self.groups and self.annotators < FEW:
            annotators_text = (
                "this annotator" if self.annotators == 1 else f"these {self.annotators} annotators"
            )
            sentences.append(
                f"The intervals apply to {annotators_text} only. Add {FEW - self.annotators} or more"
                " annotators for intervals that include the differences between annotators."
            )
        for group in self.groups:
            for standing in group:
                if standing.ties or (standing.wins and standing.losses):
                    continue
                has_lost = bool(standing.losses)
                sentences.append(
                    f"{standing.name} has {'lost' if has_lost else 'won'} every game. The games do not bound"
                    f" how much {'lower' if has_lost else 'higher'} its strength is, so the mean and the"
                    " points of all other generators are unbounded, too."
                )
        sentences += [f"{standing.name}: {needs(standing.games, standing.prompts)}." for standing in self.few]
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "groups": [[standing.to_dict() for standing in group] for group in self.groups],
            "few": [standing.to_dict() for standing in self.few],
            "notes": self.notes(),
            "n": self.games,
            "annotators": self.annotators,
            "prompts": self.prompts,
            "least_games": MIN_GAMES,
            "least_prompts": MIN_PROMPTS,
        }


def needs(n_games: int, n_prompts: int) -> str:
    """Describe how many games and prompts a generator still needs for points.

    Args:
        n_games: number of its games.
        n_prompts: number of different prompts of its games.
    """
    # Missing number, name of the unit, and ending of its plural
    requirements = [
        (MIN_GAMES - n_games, "more comparison", "s"),
        (MIN_PROMPTS - n_prompts, "more prompt", "s or pairs"),
    ]
    phrases = [
        f"{missing_count} {unit_name}{plural_unit if missing_count > 1 else ''}"
        for missing_count, unit_name, plural_unit in requirements
        if missing_count > 0
    ]
    if not phrases:
        return f"{n_games} comparisons, but its opponents have too few"
    return f"{n_games} comparisons over {n_prompts} prompts; needs {' and '.join(phrases)}"


def leaderboard(games: Iterable[Game]) -> Leaderboard:
    """Compute the leaderboard of all generators in games.

    A generator gets points if it has at least MIN_GAMES games with MIN_PROMPTS different prompts against
    other generators with points.
    """
    games = list(games)
    assert all(game.first != game.second and game.winner in (game.first, game.second, None) for game in games)
    # Games between generators that have enough games
    ranked_games = games
    # Removing a generator removes games of its opponents, which may then have too few games as well.
    while True:
        sufficient_names = sorted(
            name for name in _names(ranked_games) if _has_enough_games(ranked_games, name)
        )
        remaining_games = [
            game
            for game in ranked_games
            if game.first in sufficient_names and game.second in sufficient_names
        ]
        if len(remaining_games) == len(ranked_games):
            break
        ranked_games = remaining_games
    connected_comparisons = []
    if ranked_games:
        connected_comparisons = linked([Comparison(game.first, game.second) for game in ranked_games])
    standing_groups = []
    for comparisons in connected_comparisons:
        group_names = {name for comparison in comparisons for name in comparison[:2]}
        standing_groups.append(_standings([game for game in ranked_games if game.first in group_names]))
    few_standings = [_standing(games, name, None) for name in sorted(_names(games) - _names(ranked_games))]
    return Leaderboard(
        groups=tuple(sorted(standing_groups, key=lambda group: (-len(group), group[0].name))),
        few=tuple(few_standings),
        games=len(games),
        annotators=len({game.annotator for game in games}),
        prompts=len({game.prompt for game in games}),
    )


def _names(games: Iterable[Game]) -> set[str]:
    """Return the names of all generators in games."""
    return {name for game in games for name in (game.first, game.second)}


def _has_enough_games(games: Sequence[Game], generator_name: str) -> bool:
    """Return True if a generator has enough games with enough different prompts."""
    generator_games = [game for game in games if generator_name in (game.first, game.second)]
    return len(generator_games) >= MIN_GAMES and len({game.prompt for game in generator_games}) >= MIN_PROMPTS


def _standings(games: Sequence[Game]) -> tuple[Standing, ...]:
    """Compute the results of a group of generators that are connected by games, best first."""
    index_of_name = {name: i for i, name in enumerate(sorted(_names(games)))}
    # A cell is an unordered pair of names, and its first generator is the one with the smaller name. The
    # first two fields of a game are the names.
    index_of_cell: dict[tuple[str, str], int] = {}
    cell_of_game = [
        index_of_cell.setdefault((min(game[:2]), max(game[:2])), len(index_of_cell)) for game in games
    ]
    design = Design(
        cells=np.array([[index_of_name[first], index_of_name[second]] for first, second in index_of_cell]),
        cell=np.array(cell_of_game),
        annotator=_enumerate_values(game.annotator for game in games),
        prompt=_enumerate_values(game.prompt for game in games),
    )
    # Scores of the first generator of the cell
    scores = np.array([0.5 if game.winner is None else float(game.winner == min(game[:2])) for game in games])
    # One leaderboard is one repetition, R = 1.
    points, lo, hi = (MEAN + SCALE * estimate[0] for estimate in strengths(scores[None], design))
    generator_standings = [
        _standing(games, name, (points[i], lo[i], hi[i])) for name, i in index_of_name.items()
    ]
    return tuple(sorted(generator_standings, key=lambda row: -(row.points or 0)))


def _enumerate_values(values: Iterable[Hashable]) -> np.ndarray:
    """Return a number for each value: 0, 1, ... in the order of the first occurrences."""
    number_of_value: dict[Hashable, int] = {}
    return np.array([number_of_value.setdefault(value, len(number_of_value)) for value in values])


def _standing(games: Sequence[Game], name: str, interval: tuple[float, float, float] | None) -> Standing:
    """Collect the results of one generator.

    Args:
        games: all games.
        name: name of the generator.
        interval: points, lower end and upper end; None for a generator without points.
    """
    generator_games = [game for game in games if name in (game.first, game.second)]
    points = lo = hi = None
    if interval is not None:
        # JSON has no infinity, so an infinite end is None.
        points, lo, hi = (float(value) if np.isfinite(value) else None for value in interval)
    outcome_counts: Counter[str] = Counter()
    for game in generator_games:
        if game.winner is None:
            outcome_counts["tie"] += 1
        else:
            outcome_counts["win" if game.winner == name else "loss"] += 1
    return Standing(
        name=name,
        games=len(generator_games),
        wins=outcome_counts["win"],
        losses=outcome_counts["loss"],
        ties=outcome_counts["tie"],
        both_bad=sum(game.bad for game in generator_games),
        prompts=len({game.prompt for game in generator_games}),
        points=points,
        lo=lo,
        hi=hi,
    )
