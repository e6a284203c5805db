"""How far annotators agree beyond chance: Cohen's kappa for two, Krippendorff's alpha for any number with
answers missing.

Letters: U units (pairs of shapes), K categories of answer, T kinds of unit (answers that units share), B
draws.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# fewer judged by two: no interval, since none was found that holds (docs/results/intervals.md)
LEAST_UNITS = 10
_DRAWS = 2000
# prior units; of those tried, they came nearest to 95 % of truths covered
_AGREEING = 0.7
_DIFFERING = 0.5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A coefficient: 1 perfect agreement, 0 what chance gives, below 0 disagreement by rule. None where it is
    undefined.
    """

    value: float | None
    lo: float | None  # None below LEAST_UNITS, too
    hi: float | None
    n: int  # units judged by at least two

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": None if self.lo is None else [self.lo, self.hi], "n": self.n}


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Cohen's kappa of two annotators' answers to the same units, in the same order.

    Cohen (1960): kappa = (p_o - p_e) / (1 - p_e). Interval: equal tails of the posterior under a Dirichlet
    prior of 0.7 agreeing and 0.5 differing units, spread evenly over the table's cells; up to 1 where all
    agree; none below LEAST_UNITS. n - 1 units' weight is given to the data. Large-sample variances
    (Fleiss, Cohen and Everitt 1969) and bootstraps have no width where all agree.
    Undefined (None) where both gave one and the same answer throughout: then chance agrees always.
    """
    n = len(first)
    index = {answer: i for i, answer in enumerate(dict.fromkeys([*first, *second]))}
    k = len(index)
    if k < 2:
        return Agreement(value=None, lo=None, hi=None, n=n)
    table = np.zeros((k, k))
    for a, b in zip(first, second, strict=True):
        table[index[a], index[b]] += 1
    value = float(_kappa(table))
    if n < LEAST_UNITS:
        return Agreement(value=value, lo=None, hi=None, n=n)
    prior = np.where(np.eye(k) > 0, _AGREEING / k, _DIFFERING / (k * k - k))
    drawn = _kappa(
        np.random.default_rng(seed).standard_gamma(table * (n - 1) / n + prior, size=(_DRAWS, k, k))
    )
    return _with_ends(value, drawn, n, confidence, perfect=np.trace(table) == n)


def _kappa(table: np.ndarray) -> np.ndarray:
    """Kappa [..] of tables [.., K, K] of weights."""
    p = table / table.sum((-1, -2), keepdims=True)
    expected = (p.sum(-1) * p.sum(-2)).sum(-1)
    kappa: np.ndarray = (np.trace(p, axis1=-2, axis2=-1) - expected) / (1 - expected)
    return kappa


def krippendorff_alpha(
    units: Sequence[Mapping[Any, Hashable]], confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Krippendorff's alpha for nominal answers; an annotator may have left units out.

    Krippendorff (2011): alpha = 1 - D_o / D_e over the values of units that have two or more. Interval: as of
    `cohen_kappa`, of the shares of the kinds of unit; the prior's differing units hold one dissenter each. It
    speaks of these annotators: units are what is drawn anew.
    Deviates: Krippendorff resamples the errors.

    Args: units: per unit the answers by annotator; units with fewer than two answers are left out.
    Undefined (None) where fewer than two units remain or all answers are equal.
    """
    kept = [list(unit.values()) for unit in units if len(unit) >= 2]
    index = {answer: i for i, answer in enumerate(dict.fromkeys(itertools.chain.from_iterable(kept)))}
    n = len(kept)
    k = len(index)
    if n < 2 or k < 2:
        return Agreement(value=None, lo=None, hi=None, n=n)
    counts = np.zeros((n, k))  # [U, K]
    for row, answers in enumerate(kept):
        for answer in answers:
            counts[row, index[answer]] += 1
    observed, chance, values = (float(part) for part in _disagreements(np.ones(n), counts))
    value = 1 - observed / chance * (values - 1) / values
    if n < LEAST_UNITS:
        return Agreement(value=value, lo=None, hi=None, n=n)
    kinds, units_of = np.unique(counts, axis=0, return_counts=True)  # [T, K], [T]
    each = np.eye(k) * max(2, round(values / n))
    dissent = [each[a] - np.eye(k)[a] + np.eye(k)[b] for a, b in itertools.permutations(range(k), 2)]
    weights = np.r_[
        units_of * (n - 1) / n, np.full(k, _AGREEING / k), np.full(len(dissent), _DIFFERING / len(dissent))
    ]
    drawn = np.random.default_rng(seed).standard_gamma(weights, size=(_DRAWS, len(weights)))  # [B, T + prior]
    observed_drawn, chance_drawn, _ = _disagreements(drawn, np.concatenate([kinds, each, dissent]))
    return _with_ends(value, 1 - observed_drawn / chance_drawn, n, confidence, perfect=observed == 0)


def _disagreements(weights: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Krippendorff's D_o [..], what D_e would be with replacement [..], and all values [..]; of weights
    [.., U], counts [U, K].
    """
    of_unit = counts.sum(axis=1)  # [U] answers
    values = weights @ of_unit
    observed = weights @ ((of_unit**2 - (counts**2).sum(axis=1)) / (of_unit - 1)) / values
    return observed, 1 - (((weights @ counts) / values[..., None]) ** 2).sum(axis=-1), values


def _with_ends(value: float, drawn: np.ndarray, n: int, confidence: float, perfect: bool) -> Agreement:
    lo, hi = (float(end) for end in np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    return Agreement(value=value, lo=min(lo, value), hi=1.0 if perfect else max(hi, value), n=n)
