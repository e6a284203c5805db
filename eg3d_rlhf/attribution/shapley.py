"""Shapley values of regions: exact, from sampled permutations, and from permutations in antithetic pairs.

Shapley (1953): phi_i = sum over coalitions S without i of |S|! (R - |S| - 1)! / R! (v(S + i) - v(S)).
Letters: R regions, M coalitions, P permutations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.attribution.coalitions import Value, all_coalitions
from eg3d_rlhf.attribution.regions import MOST_EXACT

METHODS = ("exact", "permutation", "antithetic")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What each region contributes to a reward difference."""

    method: str
    values: np.ndarray  # [R] float64, in units of the reward
    errors: np.ndarray | None = None  # [R] standard errors of sampling; None where nothing was sampled
    gap: float = 0.0  # sum of values - (r_tuned - r_original), the latter from the slabs themselves
    difference: float = 0.0  # r_tuned - r_original

    @property
    def relative_gap(self) -> float:
        """|gap| as a share of |difference|; infinite where the difference is 0 and the gap is not."""
        return relative_gap(self.gap, self.difference)


def relative_gap(gap: float, difference: float) -> float:
    """|gap| / |difference|, 0 where the gap is 0."""
    return 0.0 if gap == 0 else abs(gap) / abs(difference) if difference else math.inf


def exact(value: Value, regions: int) -> np.ndarray:
    """Shapley values [R] from all 2^R coalitions. Raises: ValueError for more regions than MOST_EXACT."""
    if not 1 <= regions <= MOST_EXACT:
        raise ValueError(
            f"--method=exact: expected 1 to {MOST_EXACT} regions, got {regions}, for 2^{regions} evaluations. Use --method=antithetic."
        )
    coalitions = all_coalitions(regions)
    return exact_from_table(value(coalitions).numpy())


def exact_from_table(table: np.ndarray) -> np.ndarray:
    """Shapley values [R] of a game given as the values [2^R] of all coalitions; bit i of the index says whether i takes part."""
    regions = len(table).bit_length() - 1
    index = np.arange(1 << regions)
    size = np.array([int(k).bit_count() for k in index])
    weight = np.array([1 / (regions * math.comb(regions - 1, s)) if s < regions else 0.0 for s in size])
    out = np.empty(regions)
    for i in range(regions):
        without = index[(index >> i & 1) == 0]
        out[i] = np.sum(weight[without] * (table[without | 1 << i] - table[without]))
    return out


def permutation(value: Value, regions: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors [R] of marginal contributions along `samples` random orders (Castro et al. 2009)."""
    orders = _orders(regions, samples, seed)
    return _mean_and_error(marginals(value, orders))


def antithetic(value: Value, regions: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from `samples` orders in pairs, each with its reverse (Mitchell et al. 2022, section 4.1); errors from the pairs' means."""
    if samples % 2:
        raise ValueError(f"--permutations: expected an even number of permutations for antithetic pairs, got {samples}. Add one.")
    orders = _orders(regions, samples // 2, seed)
    along = marginals(value, np.concatenate([orders, orders[:, ::-1]]))  # [P, R]
    return _mean_and_error((along[: len(orders)] + along[len(orders) :]) / 2)


def marginals(value: Value, orders: np.ndarray) -> np.ndarray:
    """Contribution [P, R] of each region when it joins, along orders [P, R] of joining."""
    samples, regions = orders.shape
    joined = np.argsort(orders, axis=1)  # [P, R], when each region joins
    steps = np.arange(regions + 1)
    coalitions = joined[:, None, :] < steps[None, :, None]  # [P, R + 1, R]
    values = value(torch.from_numpy(coalitions.reshape(-1, regions))).numpy().reshape(samples, regions + 1)
    return np.take_along_axis(np.diff(values, axis=1), joined, axis=1)


def _orders(regions: int, samples: int, seed: int) -> np.ndarray:
    if samples < 2:
        raise ValueError(f"--permutations: expected at least 2 permutations (4 for antithetic pairs), got {samples}. Errors need a spread.")
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(regions) for _ in range(samples)])


def _mean_and_error(along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return along.mean(axis=0), along.std(axis=0, ddof=1) / math.sqrt(len(along))


def shapley(value: Value, regions: int, difference: float, method: str = "exact", samples: int = 64, seed: int = 0) -> Attribution:
    """Shapley values by one of METHODS with their efficiency gap.

    Args: difference: r_tuned - r_original, computed apart from the coalitions; samples: permutations of the sampled methods.
    """
    if method not in METHODS:
        raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}. Choose one of them.")
    errors = None
    if method == "exact":
        values = exact(value, regions)
    else:
        sample = permutation if method == "permutation" else antithetic
        values, errors = sample(value, regions, samples, seed)
    return Attribution(method=method, values=values, errors=errors, gap=float(values.sum() - difference), difference=difference)


def check_gap(attributions: Sequence[Attribution], seeds: Sequence[int], bound: float) -> None:
    """Refuse attributions whose efficiency gap is above `bound`, as a share of the reward difference.

    Raises: ValueError naming the worst latent.
    """
    gaps = [a.relative_gap for a in attributions]
    worst = int(np.argmax(gaps))
    if not gaps[worst] <= bound:
        a = attributions[worst]
        raise ValueError(
            f"--gap-bound: expected an efficiency gap of at most {bound:g} of the reward difference, got {gaps[worst]:.3g} for seed "
            f"{seeds[worst]} (sum {a.values.sum():.6g}, difference {a.difference:.6g}). The attribution does not add up: raise the bound "
            "if the difference is all but zero, else leave that seed out with another --seed."
        )
