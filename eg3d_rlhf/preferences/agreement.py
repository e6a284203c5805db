"""Agreement of annotators beyond chance: Cohen's kappa for two annotators, Krippendorff's alpha for any
number.

Cohen (1960), "A coefficient of agreement for nominal scales". Krippendorff (2011), "Computing Krippendorff's
alpha-reliability"; with alpha, annotators may leave units unanswered.

Shapes: U units (pairs of shapes that were labelled), K categories of answers, T kinds of units (units with
the same answers are of one kind), B random samples.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Least number of units with answers of two annotators for which an interval is computed. With fewer units, no
# interval that we tried has the stated coverage (docs/results/intervals.md).
LEAST_UNITS = 10
_DRAWS = 2000  # number of random samples of the posterior
# Prior numbers of agreeing and of differing units. Of the values that we tried, these gave intervals whose
# coverage is closest to 95 %.
_AGREEING = 0.7
_DIFFERING = 0.5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Coefficient of the agreement between annotators, with its interval.

    A value of 1 is perfect agreement, and 0 is the agreement by chance. Below 0, annotators disagree
    systematically.
    """

    value: float | None  # coefficient; None if it is undefined
    lo: float | None  # lower end of the interval; None if undefined or for fewer than LEAST_UNITS units
    hi: float | None  # upper end of the interval; None in the same cases as `lo`
    n: int  # number of units with answers of at least two annotators

    def to_dict(self) -> dict[str, Any]:
        """Return the coefficient and its interval as JSON values."""
        return {"value": self.value, "ci95": None if self.lo is None else [self.lo, self.hi], "n": self.n}


def cohen_kappa(
    first_answers: Sequence[Hashable],
    second_answers: Sequence[Hashable],
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compute Cohen's kappa of two annotators.

    kappa = (p_o - p_e) / (1 - p_e) (Cohen 1960), where p_o is the share of units with equal answers, and p_e
    this share if the answers of both annotators were independent. The value is None if all answers of both
    annotators are the same, because p_e is then 1.

    The interval contains the middle of the posterior distribution of kappa, with equal tails. The prior is a
    Dirichlet distribution with 0.7 agreeing and 0.5 differing units, distributed evenly over the cells of the
    table of answers, and the data have the weight of n - 1 units. The upper end is 1 if all answers agree.
    Intervals from large-sample variances (Fleiss, Cohen and Everitt 1969) and from bootstraps would have zero
    width in this case. There is no interval for fewer than LEAST_UNITS units.

    Args:
        first_answers: answers of the first annotator.
        second_answers: answers of the second annotator to the same units, in the same order.
        confidence: level of the interval, in 0..1.
        seed: seed of the random samples of the posterior.
    """
    n_units = len(first_answers)
    category_index = {answer: i for i, answer in enumerate(dict.fromkeys([*first_answers, *second_answers]))}
    n_categories = len(category_index)
    if n_categories < 2:
        return Agreement(value=None, lo=None, hi=None, n=n_units)
    # [K, K], numbers of units by the answers of the first and second annotator
    unit_counts = np.zeros((n_categories, n_categories))
    for first_answer, second_answer in zip(first_answers, second_answers, strict=True):
        unit_counts[category_index[first_answer], category_index[second_answer]] += 1
    kappa = float(_kappa(unit_counts))
    if n_units < LEAST_UNITS:
        return Agreement(value=kappa, lo=None, hi=None, n=n_units)
    # The K diagonal cells share the agreeing units of the prior, and the K^2 - K other cells the differing
    # ones.
    prior_unit_counts = np.where(
        np.eye(n_categories) > 0,
        _AGREEING / n_categories,
        _DIFFERING / (n_categories * n_categories - n_categories),
    )
    # Gamma variables divided by their sum have a Dirichlet distribution, and `_kappa` divides by the sum.
    posterior_kappas = _kappa(
        np.random.default_rng(seed).standard_gamma(
            unit_counts * (n_units - 1) / n_units + prior_unit_counts,
            size=(_DRAWS, n_categories, n_categories),
        )
    )
    return _with_interval(
        kappa, posterior_kappas, n_units, confidence, is_perfect=np.trace(unit_counts) == n_units
    )


def _kappa(table: np.ndarray) -> np.ndarray:
    """Compute kappa [...] of tables [..., K, K] of the answers of two annotators."""
    # Tables may contain numbers of units or gamma variables, so they are normalised to a sum of 1.
    p = table / table.sum((-1, -2), keepdims=True)
    # Agreement by chance: sum over categories of the product of both annotators' shares
    chance_agreement = (p.sum(-1) * p.sum(-2)).sum(-1)
    kappa: np.ndarray = (np.trace(p, axis1=-2, axis2=-1) - chance_agreement) / (1 - chance_agreement)
    return kappa


def krippendorff_alpha(
    units: Sequence[Mapping[Any, Hashable]], confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Compute Krippendorff's alpha for nominal answers of any number of annotators.

    alpha = 1 - D_o / D_e (Krippendorff 2011), where D_o is the observed disagreement within units, and D_e
    the disagreement of answers that are drawn at random from all units. Units with fewer than two answers are
    left out. The value is None if fewer than two units remain, or if all answers are the same.

    The interval is computed as in `cohen_kappa`, but the posterior is over the proportions of the kinds of
    units. In each differing unit of the prior, one annotator differs from all others. The interval describes
    the uncertainty over units and not over annotators, so it applies to these annotators only.

    Deviates: Krippendorff computes the interval by resampling errors.

    Args:
        units: answers to each unit, by annotator.
        confidence: level of the interval, in 0..1.
        seed: seed of the random samples of the posterior.
    """
    answers_of_units = [list(unit.values()) for unit in units if len(unit) >= 2]
    # Index of each category of answers, in the order of the first occurrence
    categories = dict.fromkeys(itertools.chain.from_iterable(answers_of_units))
    category_index = {answer: i for i, answer in enumerate(categories)}
    n_units = len(answers_of_units)
    n_categories = len(category_index)
    if n_units < 2 or n_categories < 2:
        return Agreement(value=None, lo=None, hi=None, n=n_units)
    answer_counts = np.zeros((n_units, n_categories))  # [U, K]
    for unit_index, answers in enumerate(answers_of_units):
        for answer in answers:
            answer_counts[unit_index, category_index[answer]] += 1
    observed_disagreement, chance_disagreement, answer_count = (
        float(total) for total in _disagreements(np.ones(n_units), answer_counts)
    )
    # Krippendorff draws without replacement, which multiplies D_e by V / (V - 1) for V answers.
    alpha = 1 - observed_disagreement / chance_disagreement * (answer_count - 1) / answer_count
    if n_units < LEAST_UNITS:
        return Agreement(value=alpha, lo=None, hi=None, n=n_units)
    # Units with the same answers contribute the same, so the posterior is over kinds of units.
    unit_kinds, unit_counts = np.unique(answer_counts, axis=0, return_counts=True)  # [T, K], [T]
    # Agreeing units of the prior, one per category, with the mean number of answers, but at least 2
    agreeing_units = np.eye(n_categories) * max(2, round(answer_count / n_units))
    # Differing units of the prior: one answer a of an agreeing unit is replaced by an answer b.
    differing_units = [
        agreeing_units[a] - np.eye(n_categories)[a] + np.eye(n_categories)[b]
        for a, b in itertools.permutations(range(n_categories), 2)
    ]
    # Concentrations of the Dirichlet posterior for the data and both kinds of prior units
    concentrations = np.r_[
        unit_counts * (n_units - 1) / n_units,
        np.full(n_categories, _AGREEING / n_categories),
        np.full(len(differing_units), _DIFFERING / len(differing_units)),
    ]
    # [B, T + number of prior units]; `_disagreements` does not depend on the sum of the weights.
    posterior_weights = np.random.default_rng(seed).standard_gamma(
        concentrations, size=(_DRAWS, len(concentrations))
    )
    posterior_observed, posterior_chance, _ = _disagreements(
        posterior_weights, np.concatenate([unit_kinds, agreeing_units, differing_units])
    )
    return _with_interval(
        alpha,
        1 - posterior_observed / posterior_chance,
        n_units,
        confidence,
        is_perfect=observed_disagreement == 0,
    )


def _disagreements(
    unit_weights: np.ndarray, answer_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the observed disagreement and the disagreement by chance of weighted units.

    Args:
        unit_weights: weights [..., U] of the units.
        answer_counts: numbers [U, K] of answers of each category in each unit.
    Returns: D_o [...], D_e [...] for answers that are drawn with replacement, and the weighted number of
        answers [...].
    """
    answers_per_unit = answer_counts.sum(axis=1)  # [U]
    answer_count = unit_weights @ answers_per_unit  # [...]
    # Ordered pairs of different answers in a unit, divided by its number of answers - 1 (Krippendorff 2011)
    unit_disagreement = (answers_per_unit**2 - (answer_counts**2).sum(axis=1)) / (answers_per_unit - 1)
    observed = unit_weights @ unit_disagreement / answer_count
    # Probability that two answers that are drawn at random differ
    chance_disagreement = 1 - (((unit_weights @ answer_counts) / answer_count[..., None]) ** 2).sum(axis=-1)
    return observed, chance_disagreement, answer_count


def _with_interval(
    coefficient: float, posterior_samples: np.ndarray, n_units: int, confidence: float, is_perfect: bool
) -> Agreement:
    """Add the interval to the value of a coefficient.

    Its ends are quantiles of the posterior, extended so that the interval contains the value.

    Args:
        coefficient: the coefficient.
        posterior_samples: random samples [B] of the posterior.
        n_units: number of units.
        confidence: level of the interval, in 0..1.
        is_perfect: True if all answers agree; the upper end is then 1.
    """
    lo, hi = (
        float(interval_end)
        for interval_end in np.quantile(posterior_samples, [0.5 - confidence / 2, 0.5 + confidence / 2])
    )
    return Agreement(
        value=coefficient, lo=min(lo, coefficient), hi=1.0 if is_perfect else max(hi, coefficient), n=n_units
    )
