"""Bradley-Terry strengths of items from paired comparisons, intransitive triples, and Elo ratings.

In the model of Bradley and Terry (1952) with the ties of Davidson (1970), an item with the strength t_i beats
an item with the strength t_j with probability sigmoid(t_i - t_j), if there is no tie. Elo ratings of a
tournament are the same strengths on a different scale.

Shapes: N items, M comparisons.
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
from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, LabelUse, check_not_empty
from eg3d_rlhf.preferences.settings import DRAWS

_STEPS = 200  # largest number of Newton steps
_TOLERANCE = 1e-10  # size of a Newton step below which the fit ends, in units of strength
PRIOR_SD = 2.0  # standard deviation of the normal prior, if the comparisons do not bound all strengths


class Comparison(NamedTuple):
    """Result of one comparison of two items."""

    winner: Hashable
    loser: Hashable
    tie: bool = False  # True if neither item was preferred


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Estimated strengths of items, on the scale of logits.

    The mean of all strengths is 0, unless strengths of some items were given.
    """

    items: tuple[Hashable, ...]
    strength: np.ndarray  # strength of each item, [N]
    lo: np.ndarray  # lower ends of the intervals, [N]
    hi: np.ndarray  # upper ends of the intervals, [N]
    covariance: np.ndarray  # covariance of the estimated strengths, [N, N]
    # Davidson's nu >= 0, which is 0 without ties. Two equally strong items tie with probability
    # nu / (2 + nu).
    tie_weight: float
    regularised: bool  # True if the comparisons do not bound all strengths, so that a prior was used


def bradley_terry(
    comparisons: Iterable[Comparison],
    given_strengths: Mapping[Hashable, float] | None = None,
    confidence: float = 0.95,
) -> Strengths:
    """Estimate strengths by maximum likelihood.

    With s = exp(strength) and the weight of ties nu (Davidson 1970),

        P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)),
        P(tie) = nu sqrt(s_i s_j) / (s_i + s_j + nu sqrt(s_i s_j)).

    The likelihood has a maximum if every item is connected with every other item by a chain of items, each of
    which beat or tied the next one (Ford 1957). Otherwise a prior N(0, PRIOR_SD^2) of each strength keeps
    the strengths finite, and `regularised` of the result is True. Intervals come from the observed
    information of the comparisons and of the prior.

    Args:
        comparisons: results of comparisons, at least one.
        given_strengths: strengths of items that are not estimated; the strengths of all other items are
            estimated relative to them.
        confidence: level of the intervals, in 0..1.
    Raises: ValueError if the strengths of all items are given.
    """
    comparisons = list(comparisons)
    assert comparisons and all(comparison.winner != comparison.loser for comparison in comparisons)
    # Items are in the order of their first occurrence.
    items = tuple(dict.fromkeys(item for comparison in comparisons for item in comparison[:2]))
    index_of_item = {item: k for k, item in enumerate(items)}
    i = np.array([index_of_item[comparison.winner] for comparison in comparisons])
    j = np.array([index_of_item[comparison.loser] for comparison in comparisons])
    is_tie = np.array([comparison.tie for comparison in comparisons])
    n = len(items)
    fixed_strengths = {
        index_of_item[item]: float(value)
        for item, value in (given_strengths or {}).items()
        if item in index_of_item
    }
    free_indices = np.array([k for k in range(n) if k not in fixed_strengths], dtype=int)
    if not len(free_indices):
        raise ValueError(
            f"bradley_terry(given_strengths): the strengths of all {n} items are given, so there is nothing"
            " to estimate. Give the strengths of fewer items."
        )
    # Fixed strengths need no comparisons to be bounded, so edges in a ring connect their items.
    fixed_indices = np.array(list(fixed_strengths), dtype=int)
    # Edges from winner to loser, and in both directions for ties
    edge_starts = np.r_[i, j[is_tie], fixed_indices]
    edge_ends = np.r_[j, i[is_tie], np.roll(fixed_indices, 1)]
    edges = coo_matrix((np.ones(len(edge_starts)), (edge_starts, edge_ends)), shape=(n, n))
    # Ford's condition: the graph is strongly connected, so it has one strong component.
    needs_prior = connected_components(edges, directed=True, connection="strong")[0] > 1
    ridge = 1 / PRIOR_SD**2 if needs_prior else 0.0
    # The search starts at the mean of the fixed strengths, or at 0 if there are none.
    start_strengths = np.array(
        [
            fixed_strengths.get(k, sum(fixed_strengths.values()) / max(1, len(fixed_strengths)))
            for k in range(n)
        ]
    )
    theta, eta, information = _newton(start_strengths, free_indices, i, j, is_tie, ridge)
    covariance = np.zeros((n, n))
    # The parameter of ties comes last in the information, and is left out here.
    covariance[np.ix_(free_indices, free_indices)] = np.linalg.inv(information)[
        : len(free_indices), : len(free_indices)
    ]
    if not fixed_strengths:
        # Without fixed strengths only differences of strengths are determined, so the covariance is that of
        # strengths relative to their mean.
        centring_matrix = np.eye(n) - 1 / n
        covariance = centring_matrix @ covariance @ centring_matrix
    # Normal quantile times the standard error; rounding may make a variance negative.
    half_width = float(ndtri(0.5 + confidence / 2)) * np.sqrt(np.diag(covariance).clip(min=0))
    return Strengths(
        items=items,
        strength=theta,
        lo=theta - half_width,
        hi=theta + half_width,
        covariance=covariance,
        tie_weight=math.exp(eta) if is_tie.any() else 0.0,
        regularised=needs_prior,
    )


def _newton(
    start_strengths: np.ndarray,
    free_indices: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    is_tie: np.ndarray,
    ridge: float,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Maximise the likelihood over the strengths theta [N] and eta = log nu with damped Newton steps.

    Only the entries `free_indices` of theta, and eta if there are ties, are estimated. Without a prior and
    without fixed strengths, the likelihood does not change if all strengths increase by the same number.
    Therefore 1 / N is added to the information in this direction. The prior is centred on the mean of
    `start_strengths`.

    Args:
        start_strengths: strengths [N] at the start.
        free_indices: indices of the strengths that are estimated.
        i: index of the winner of each comparison, [M].
        j: index of the loser of each comparison, [M].
        is_tie: bool [M], True for ties.
        ridge: inverse variance of the prior of each strength; 0 for no prior.
    Returns: the strengths theta [N], the logarithm eta of the weight of ties, and the information matrix of
        the estimated parameters at the maximum.
    """
    n = len(start_strengths)
    has_ties = bool(is_tie.any())
    # With fixed strengths the prior is centred on their mean, otherwise on 0.
    prior_mean = float(start_strengths.mean()) if len(free_indices) < n else 0.0
    # All parameters: theta, followed by eta
    parameters = np.r_[start_strengths, 0.0]
    # Without ties eta cannot be estimated, and is not used.
    if has_ties:
        # The estimate of eta for equal strengths
        parameters[n] = math.log(2 * is_tie.sum() / max(1, (~is_tie).sum()))

    def logits_and_log_sum(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [3, M] of win, loss and tie, and the logarithm [M] of their summed exponentials."""
        strength_difference = parameters[i] - parameters[j]
        tie_logit = np.full_like(strength_difference, parameters[n] if has_ties else -np.inf)
        logits = np.stack([strength_difference / 2, -strength_difference / 2, tie_logit])
        # Subtracting the largest logit avoids overflow.
        largest_logit = logits.max(axis=0)
        return logits, largest_logit + np.log(np.exp(logits - largest_logit).sum(axis=0))

    def objective(parameters: np.ndarray) -> float:
        """Return the log-likelihood, including the prior."""
        logits, log_sum = logits_and_log_sum(parameters)
        prior_penalty = (
            ridge * ((parameters[:n] - prior_mean) ** 2).sum() + _ETA_PRIOR * has_ties * parameters[n] ** 2
        )
        return float((np.where(is_tie, logits[2], logits[0]) - log_sum).sum() - 0.5 * prior_penalty)

    log_likelihood = objective(parameters)
    # Indices of the estimated parameters; `[n] * has_ties` is empty without ties.
    estimated_indices = np.r_[free_indices, [n] * has_ties].astype(int)
    # Information in the direction in which all strengths increase equally
    common_information = np.zeros((n + 1, n + 1))
    if not ridge and len(free_indices) == n:
        common_information[:n, :n] = 1 / n
    common_information = common_information[np.ix_(estimated_indices, estimated_indices)]
    for _ in range(_STEPS):
        gradient, hessian = _derivatives(
            parameters, n, i, j, is_tie, ridge, prior_mean, *logits_and_log_sum(parameters)
        )
        step = np.zeros_like(parameters)
        # The Hessian is that of the negative log-likelihood, so this step increases the likelihood.
        step[estimated_indices] = np.linalg.solve(
            hessian[np.ix_(estimated_indices, estimated_indices)] + common_information,
            gradient[estimated_indices],
        )
        step_scale = 1.0
        # The likelihood is concave, so it increases after enough halvings of the step.
        while step_scale > 1e-8 and objective(parameters + step_scale * step) < log_likelihood:
            step_scale /= 2
        parameters = parameters + step_scale * step
        if len(free_indices) == n:
            parameters[:n] -= parameters[:n].mean()  # the mean of the strengths is 0
        log_likelihood = objective(parameters)
        if np.abs(step_scale * step).max() < _TOLERANCE:
            break
    _, hessian = _derivatives(parameters, n, i, j, is_tie, ridge, prior_mean, *logits_and_log_sum(parameters))
    return (
        parameters[:n],
        float(parameters[n]),
        hessian[np.ix_(estimated_indices, estimated_indices)] + common_information,
    )


# Inverse variance of a prior of eta. It makes eta finite if every comparison is a tie, and is negligible
# otherwise.
_ETA_PRIOR = 1e-9


def _derivatives(
    parameters: np.ndarray,
    n: int,
    i: np.ndarray,
    j: np.ndarray,
    is_tie: np.ndarray,
    ridge: float,
    prior_mean: float,
    logits: np.ndarray,
    log_sum: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the derivatives of the log-likelihood, including the prior, in its parameters.

    Args:
        parameters: parameters [N + 1]: the strengths theta, followed by the logarithm eta of the weight of
            ties.
        n: number of items, N.
        i: index of the winner of each comparison, [M].
        j: index of the loser of each comparison, [M].
        is_tie: bool [M], True for ties.
        ridge: inverse variance of the prior of each strength.
        prior_mean: mean of the prior.
        logits: logits [3, M] of win, loss and tie.
        log_sum: logarithm [M] of the sum of the exponentials of the three logits.
    Returns: the gradient [N + 1] and the negative Hessian matrix [N + 1, N + 1].
    """
    win_probability, loss_probability, tie_probability = np.exp(logits - log_sum)  # probabilities, [M] each
    # Derivatives of each comparison's log-likelihood in theta_i - theta_j and in eta
    difference_derivative = np.where(is_tie, 0.0, 0.5) - 0.5 * (win_probability - loss_probability)
    eta_derivative = is_tie - tie_probability
    gradient = np.zeros(n + 1)
    # Unlike gradient[i] += ..., np.add.at adds all values of repeated indices.
    np.add.at(gradient, i, difference_derivative)
    np.add.at(gradient, j, -difference_derivative)
    gradient[:n] -= ridge * (parameters[:n] - prior_mean)
    gradient[n] = eta_derivative.sum() - _ETA_PRIOR * parameters[n]
    difference_curvature = 0.25 * (
        (win_probability + loss_probability) - (win_probability - loss_probability) ** 2
    )
    mixed_curvature = -0.5 * (win_probability - loss_probability) * tie_probability
    parameter_count = n + 1
    # Each comparison contributes to the four entries of its two items.
    rows = np.r_[i, j, i, j]
    columns = np.r_[i, j, j, i]
    # coo_matrix sums the values of repeated entries.
    hessian = coo_matrix(
        (
            np.r_[difference_curvature, difference_curvature, -difference_curvature, -difference_curvature],
            (rows, columns),
        ),
        shape=(parameter_count, parameter_count),
    ).toarray()
    # Mixed derivatives in theta and eta
    mixed_column = np.zeros(n)
    np.add.at(mixed_column, i, mixed_curvature)
    np.add.at(mixed_column, j, -mixed_curvature)
    hessian[:n, n] = hessian[n, :n] = mixed_column
    hessian[n, n] = (tie_probability * (1 - tie_probability)).sum() + _ETA_PRIOR
    # The prior contributes to the diagonal only.
    hessian[np.arange(n), np.arange(n)] += ridge
    return gradient, hessian


def cycles(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Count intransitive triples of items: a beats b, b beats c, and c beats a.

    An item beats another item if it won the majority of their comparisons. Pairs without a majority are left
    out.

    Returns: a dict of JSON values. "triples" is the number of triples of items whose three pairs all have a
        majority, and "cyclic" is the number of intransitive triples. "share" is cyclic / triples, or None if
        there are no triples. "share_by_chance" is the expected share for random results. "largest_knot" is
        the size of the largest set of items in which every item beats every other item through a chain of
        items, or 0 if there is no such set.
    """
    margins: dict[tuple[int, int], int] = {}
    index_of_item: dict[Hashable, int] = {}
    for comparison in comparisons:
        # setdefault returns the index of an item that has one, and adds the next index otherwise.
        winner = index_of_item.setdefault(comparison.winner, len(index_of_item))
        loser = index_of_item.setdefault(comparison.loser, len(index_of_item))
        # The margin of a pair is the number of wins minus losses of its item with the smaller index.
        index_pair, sign = ((winner, loser), 1) if winner < loser else ((loser, winner), -1)
        margins[index_pair] = margins.get(index_pair, 0) + (0 if comparison.tie else sign)
    winner_loser_pairs = [(a, b) if margin > 0 else (b, a) for (a, b), margin in margins.items() if margin]
    if not winner_loser_pairs:
        return {"triples": 0, "cyclic": 0, "share": None, "share_by_chance": 0.25, "largest_knot": 0}
    winners, losers = np.array(winner_loser_pairs).T
    # [N, N], 1 where the item of the row beats the item of the column
    beats_matrix = csr_matrix(
        (np.ones(len(winner_loser_pairs), dtype=np.int64), (winners, losers)),
        shape=(len(index_of_item), len(index_of_item)),
    )
    # [N, N], symmetric: 1 for pairs with a majority
    majority_matrix = beats_matrix + beats_matrix.T
    # Every cycle of three items is counted at each of its three items.
    cyclic_count = int((beats_matrix @ beats_matrix).multiply(beats_matrix.T).sum()) // 3
    # Every triple is counted at each of its three items, in two directions.
    triple_count = int((majority_matrix @ majority_matrix).multiply(majority_matrix).sum()) // 6
    # Sizes of the strongly connected components
    component_sizes = np.bincount(connected_components(beats_matrix, directed=True, connection="strong")[1])
    cyclic_share = cyclic_count / triple_count if triple_count else None
    # A component of one item contains no cycle.
    largest_knot = int(component_sizes.max()) if component_sizes.max() > 1 else 0
    return {
        "triples": triple_count,
        "cyclic": cyclic_count,
        "share": cyclic_share,
        "share_by_chance": 0.25,
        "largest_knot": largest_knot,
    }


# Tournament of methods, rated as GPTEval3D (arXiv 2401.04092) rates text-to-3D methods. With the Elo ratings
# e, method i beats method j with probability 1 / (1 + 10^((e_j - e_i) / 400)), so a rating is a Bradley-Terry
# strength times 400 / ln 10. GPTEval3D counts a tie as a win of both methods, and maximises the likelihood
# with 10,000 steps of Adam from 0. Here the maximum itself is computed. If there is no maximum (a method
# never lost to the others), a prior makes the ratings finite.


SCALE = 400 / math.log(10)  # Elo points per unit of strength
MEAN = 1000.0  # mean of all ratings


class Judgement(NamedTuple):
    """Result of a comparison of the assets of two methods for one prompt."""

    a: str  # name of the first method
    b: str  # name of the second method
    winner: str  # 'a', 'b' or 'tie'
    prompt: str = ""  # prompt of both assets; '' if it is not stated
    criterion: str = "overall"  # criterion of the comparison


@dataclass(frozen=True, kw_only=True)
class Rating:
    """Rating of one method."""

    elo: float  # Elo rating
    lo: float  # lower end of the 95 % interval over resampled prompts
    hi: float  # upper end of this interval
    judgements: int  # number of comparisons of the method


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """Ratings of all methods of a tournament."""

    ratings: dict[str, Rating]  # ratings by name of the method, best first
    draws: str  # treatment of ties, see `elo`
    tie_weight: float  # Davidson's nu; 0 if ties count as wins of both methods
    # True if the likelihood has no maximum (a method never lost to the others), so that a prior was used
    regularised: bool
    prompts: int  # number of prompts that were resampled; 0 if single comparisons were resampled

    def to_dict(self) -> dict[str, Any]:
        """Return the ratings as JSON values."""
        ratings_as_json = {
            name: {"elo": rating.elo, "ci95": [rating.lo, rating.hi], "judgements": rating.judgements}
            for name, rating in self.ratings.items()
        }
        return {
            "ratings": ratings_as_json,
            "ties": self.draws,
            "tie_weight": self.tie_weight,
            "regularised": self.regularised,
            "prompts": self.prompts,
        }


def elo(
    judgements: Iterable[Judgement],
    *,
    tie_rule: str = "both",
    given_ratings: Mapping[str, float] | None = None,
    resample_count: int = 200,
) -> Tournament:
    """Compute Elo ratings of all methods, with 95 % intervals.

    Intervals come from resampled prompts, because comparisons with the same prompt are not independent. If a
    comparison does not state its prompt, comparisons are resampled instead.

    Args:
        judgements: results of comparisons.
        tie_rule: treatment of ties: "both" counts a tie as a win of both methods, as in GPTEval3D; "davidson"
            counts it as a separate result, which is more likely between equal methods.
        given_ratings: ratings of methods that are not estimated. Without them the mean of all ratings is
            MEAN.
        resample_count: number of resamples for the intervals.
    Raises: ValueError without comparisons, or if the ratings of all methods are given.
    """
    # The argument may be an iterator, and is read several times below.
    judgements = list(judgements)
    given_ratings = dict(given_ratings or {})
    assert tie_rule in DRAWS and all(judgement.winner in ("a", "b", "tie") for judgement in judgements)
    if not judgements:
        raise ValueError("elo: there are no judgements. Add results of comparisons.")

    def fit(judgement_sample: Sequence[Judgement]) -> tuple[Strengths, dict[str, float]]:
        """Return the strengths and the ratings of a sample of comparisons."""
        comparisons = []
        for judgement in judgement_sample:
            comparisons += _comparisons(judgement, tie_rule)
        strengths = bradley_terry(
            comparisons,
            given_strengths={name: method_elo / SCALE for name, method_elo in given_ratings.items()},
        )
        # Given ratings determine the zero of the scale. Otherwise the mean of the strengths is 0.
        shift = 0.0 if given_ratings else MEAN
        return strengths, {
            str(item): SCALE * float(strength) + shift
            for item, strength in zip(strengths.items, strengths.strength, strict=True)
        }

    has_prompts = all(judgement.prompt for judgement in judgements)
    groups_by_key: dict[object, list[Judgement]] = defaultdict(list)
    for judgement_index, judgement in enumerate(judgements):
        # Without prompts, each comparison is a separate group.
        groups_by_key[judgement.prompt if has_prompts else judgement_index].append(judgement)
    strengths, elo_by_method = fit(judgements)
    judgement_groups = list(groups_by_key.values())
    # The seed is fixed, so that equal comparisons give equal intervals.
    rng = np.random.default_rng(0)
    resampled_elos_by_method: dict[str, list[float]] = defaultdict(list)
    for _ in range(resample_count):
        resampled_judgements = []
        for k in rng.integers(len(judgement_groups), size=len(judgement_groups)):
            resampled_judgements += judgement_groups[k]
        resampled_methods = {
            name for judgement in resampled_judgements for name in (judgement.a, judgement.b)
        }
        # If the ratings of all methods in a resample are given, there is nothing to estimate.
        if resampled_methods - given_ratings.keys():
            for name, method_elo in fit(resampled_judgements)[1].items():
                resampled_elos_by_method[name].append(method_elo)
    judgement_counts = {
        name: sum(name in (judgement.a, judgement.b) for judgement in judgements) for name in elo_by_method
    }
    rating_by_method = {
        name: Rating(
            elo=method_elo,
            **_interval(method_elo, resampled_elos_by_method[name]),
            judgements=judgement_counts[name],
        )
        for name, method_elo in elo_by_method.items()
    }
    return Tournament(
        ratings=dict(sorted(rating_by_method.items(), key=lambda row: -row[1].elo)),
        draws=tie_rule,
        tie_weight=strengths.tie_weight,
        regularised=strengths.regularised,
        prompts=len(judgement_groups) if has_prompts else 0,
    )


def _comparisons(judgement: Judgement, tie_rule: str) -> list[Comparison]:
    """Convert a judgement to comparisons for `bradley_terry`.

    With `tie_rule` = "both", a tie gives two comparisons, one with each winner.
    """
    a = judgement.a
    b = judgement.b
    if judgement.winner == "tie":
        return [Comparison(a, b), Comparison(b, a)] if tie_rule == "both" else [Comparison(a, b, tie=True)]
    return [Comparison(a, b) if judgement.winner == "a" else Comparison(b, a)]


def _interval(estimate: float, resampled_estimates: Sequence[float]) -> dict[str, float]:
    """Return the ends "lo" and "hi" of a normal 95 % interval, from the standard deviation over resamples.

    With few resamples these ends are more stable than quantiles. With fewer than two resamples the interval
    has no width.
    """
    std = float(np.std(resampled_estimates, ddof=1)) if len(resampled_estimates) > 1 else 0.0
    # 1.96 is the quantile of the normal distribution for 95 %.
    half_width = 1.96 * std
    return {"lo": estimate - half_width, "hi": estimate + half_width}


def read_judgements(path: str | Path, choice: LabelChoice = PEOPLE_ONLY) -> list[Judgement]:
    """Read comparisons from a file, without their numbers by origin. See `read_counted_judgements`."""
    return read_counted_judgements(path, choice)[0]


def read_counted_judgements(
    path: str | Path, choice: LabelChoice = PEOPLE_ONLY
) -> tuple[list[Judgement], LabelUse]:
    """Read comparisons from a file with one JSON object per line.

    The fields are those of `Judgement`: a, b, winner and, optionally, prompt and criterion. The field
    provenance states who judged, see `preferences.provenance`. All other fields are ignored.

    Args:
        path: the file.
        choice: selection of the comparisons by their origin; by default those of judges are left out.
    Returns: the selected comparisons, and the numbers of comparisons of each origin.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not valid, or the file contains no comparison. The message names the file, and
            the line that is not valid.
    """
    path = Path(path)
    judged_lines = []
    for line_number, line_record in jsonl_records(path, '{"a": ..., "b": ..., "winner": "a", "b" or "tie"}'):
        judgement_fields = {name: line_record[name] for name in Judgement._fields if name in line_record}
        judgement = Judgement(**judgement_fields) if {"a", "b", "winner"} <= judgement_fields.keys() else None
        if (
            judgement is None
            or not all(isinstance(field_value, str) for field_value in judgement)
            or judgement.a == judgement.b
            or judgement.winner not in ("a", "b", "tie")
        ):
            raise ValueError(
                f"{path.name}, line {line_number}: expected the names of two different methods in a and b,"
                f" and a, b or tie in winner, got {json.dumps(line_record)[:60]}. Write, for example,"
                ' {"a": "ours", "b": "baseline", "winner": "a"}.'
            )
        judged_lines.append((judgement, line_record))
    if not judged_lines:
        raise ValueError(f"{path.name}: the file contains no judgement. Add results of comparisons.")
    selected_lines, use = choice.select(judged_lines, lambda judged_line: judged_line[1])
    check_not_empty(selected_lines, use, path.name)
    return [judgement for judgement, _ in selected_lines], use


def markdown(tournaments: Mapping[str, Tournament]) -> str:
    """Format the ratings of each criterion as a table in Markdown.

    Args: tournaments: ratings by criterion.
    """
    markdown_lines: list[str] = []
    for criterion, tournament in tournaments.items():
        tie_treatment_text = (
            "a draw is a win of both"
            if tournament.draws == "both"
            else f"Davidson's ties, nu {tournament.tie_weight:.2f}"
        )
        resampled_units_text = f"{tournament.prompts} prompts" if tournament.prompts else "single comparisons"
        markdown_lines += [
            f"## {criterion} ({tie_treatment_text}; intervals over {resampled_units_text})",
            "",
        ]
        if tournament.regularised:
            # 347 Elo points are PRIOR_SD * SCALE.
            markdown_lines += [
                (
                    "The ratings have no maximum-likelihood estimate, because a method never lost to the"
                    " others. A normal prior (standard deviation 347 Elo) keeps them finite."
                ),
                "",
            ]
        markdown_lines += ["| method | Elo | 95 % | comparisons |", "| --- | --- | --- | --- |"]
        markdown_lines += [
            f"| {name} | {rating.elo:.1f} | {rating.lo:.1f} to {rating.hi:.1f} | {rating.judgements} |"
            for name, rating in tournament.ratings.items()
        ]
        markdown_lines.append("")
    return "\n".join(markdown_lines)
