"""Agreement of annotators beyond chance: Cohen's kappa for two, Krippendorff's alpha for any number with
missing answers.

Letters: U units (pairs of shapes), K categories of answers, T kinds of units (units with equal answers), B
random samples.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# With fewer units that two annotators answered there is no interval: none that we tried has its coverage
# (docs/results/intervals.md).
LEAST_UNITS = 10
_DRAWS = 2000  # samples of the posterior
# Prior numbers of agreeing and differing units. Of those tried, these gave a coverage nearest to 95 %.
_AGREEING = 0.7
_DIFFERING = 0.5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A coefficient of agreement: 1 is perfect agreement, 0 the agreement by chance; below 0, annotators
    disagree systematically. None if it is undefined.
    """

    value: float | None  # the coefficient
    lo: float | None  # None also below LEAST_UNITS
    hi: float | None
    n: int  # units with answers of at least two annotators

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"value": self.value, "ci95": None if self.lo is None else [self.lo, self.hi], "n": self.n}


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Compute Cohen's kappa of two annotators' answers to the same units, in the same order.

    Cohen (1960): kappa = (p_o - p_e) / (1 - p_e).

    The interval has equal tails of the posterior under a Dirichlet prior of 0.7 agreeing and 0.5 differing
    units, spread evenly over the cells of the table. The data have the weight of n - 1 units. The upper end
    is 1 if all answers agree. There is no interval below LEAST_UNITS. Large-sample variances (Fleiss, Cohen
    and Everitt 1969) and bootstraps have zero width if all answers agree.

    Undefined (None) if both annotators gave a single, equal answer throughout: chance then always agrees.
    """
    n = len(first)
    index = {answer: i for i, answer in enumerate(dict.fromkeys([*first, *second]))}
    k = len(index)
    if k < 2:
        return Agreement(value=None, lo=None, hi=None, n=n)
    table = np.zeros((k, k))  # [K, K], rows: first annotator
    for a, b in zip(first, second, strict=True):
        table[index[a], index[b]] += 1
    value = float(_kappa(table))
    if n < LEAST_UNITS:
        return Agreement(value=value, lo=None, hi=None, n=n)
    # Diagonal cells share the agreeing units, the K^2 - K others the differing ones.
    prior = np.where(np.eye(k) > 0, _AGREEING / k, _DIFFERING / (k * k - k))
    # Gamma variables divided by their sum have a Dirichlet distribution; `_kappa` divides.
    posterior = _kappa(
        np.random.default_rng(seed).standard_gamma(table * (n - 1) / n + prior, size=(_DRAWS, k, k))
    )
    return _with_interval(value, posterior, n, confidence, perfect=np.trace(table) == n)


def _kappa(table: np.ndarray) -> np.ndarray:
    """Compute kappa [...] of tables [..., K, K] of weights."""
    # Weights may be counts or gamma variables, so they are normalised here.
    p = table / table.sum((-1, -2), keepdims=True)
    expected = (p.sum(-1) * p.sum(-2)).sum(-1)
    kappa: np.ndarray = (np.trace(p, axis1=-2, axis2=-1) - expected) / (1 - expected)
    return kappa


def krippendorff_alpha(
    units: Sequence[Mapping[Any, Hashable]], confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Compute Krippendorff's alpha for nominal answers; annotators may have left units out.

    Krippendorff (2011): alpha = 1 - D_o / D_e over the values of units with at least two.

    The interval is that of `cohen_kappa`, for the proportions of the kinds of units. The differing units of
    the prior have one dissenting answer each. Units are resampled and annotators are not, so the interval
    applies to these annotators only.

    Args: units: for each unit the answers by annotator; units with fewer than two answers are left out.
    Undefined (None) if fewer than two units remain or all answers are equal.
    Deviates: Krippendorff resamples the errors.
    """
    # A unit with one answer has no disagreement, and Krippendorff's alpha excludes it.
    answers_of_units = [list(unit.values()) for unit in units if len(unit) >= 2]
    index = {
        answer: i for i, answer in enumerate(dict.fromkeys(itertools.chain.from_iterable(answers_of_units)))
    }
    n = len(answers_of_units)
    k = len(index)
    if n < 2 or k < 2:
        return Agreement(value=None, lo=None, hi=None, n=n)
    counts = np.zeros((n, k))  # [U, K]
    for row, answers in enumerate(answers_of_units):
        for answer in answers:
            counts[row, index[answer]] += 1
    observed, chance, values = (float(part) for part in _disagreements(np.ones(n), counts))
    # D_e without replacement has the factor V / (V - 1), V values in all
    value = 1 - observed / chance * (values - 1) / values
    if n < LEAST_UNITS:
        return Agreement(value=value, lo=None, hi=None, n=n)
    # Units with equal answers have the same contribution, so the posterior is over kinds of units.
    kinds, units_of = np.unique(counts, axis=0, return_counts=True)  # [T, K], [T]
    # prior units in agreement: of the mean number of answers, at least 2
    agreeing = np.eye(k) * max(2, round(values / n))
    # the same with one answer a replaced by b
    dissenting = [agreeing[a] - np.eye(k)[a] + np.eye(k)[b] for a, b in itertools.permutations(range(k), 2)]
    # Concentrations of the Dirichlet posterior: data, agreeing and dissenting prior units.
    weights = np.r_[
        units_of * (n - 1) / n,
        np.full(k, _AGREEING / k),
        np.full(len(dissenting), _DIFFERING / len(dissenting)),
    ]
    posterior = np.random.default_rng(seed).standard_gamma(
        weights, size=(_DRAWS, len(weights))
    )  # [B, T + prior]
    posterior_observed, posterior_chance, _ = _disagreements(
        posterior, np.concatenate([kinds, agreeing, dissenting])
    )
    return _with_interval(
        value, 1 - posterior_observed / posterior_chance, n, confidence, perfect=observed == 0
    )


def _disagreements(weights: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute Krippendorff's disagreements from units [U, K] (counts) with weights [..., U].

    Returns: D_o [...], D_e as if values were drawn with replacement [...], and the number of values [...].
    """
    answers_per_unit = counts.sum(axis=1)  # [U]
    # Weighted number of answers.
    values = weights @ answers_per_unit
    # Pairs of different answers within a unit, divided by its number of answers - 1 (Krippendorff 2011).
    observed = weights @ ((answers_per_unit**2 - (counts**2).sum(axis=1)) / (answers_per_unit - 1)) / values
    return observed, 1 - (((weights @ counts) / values[..., None]) ** 2).sum(axis=-1), values


def _with_interval(
    value: float, posterior: np.ndarray, n: int, confidence: float, perfect: bool
) -> Agreement:
    """Add the interval: quantiles of the posterior, extended to the value if they do not contain it."""
    lo, hi = (float(end) for end in np.quantile(posterior, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    return Agreement(value=value, lo=min(lo, value), hi=1.0 if perfect else max(hi, value), n=n)
