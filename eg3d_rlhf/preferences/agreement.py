"""How far annotators agree beyond chance: Cohen's kappa for two, Krippendorff's alpha for any number with answers missing.

Letters: U units (pairs of shapes), K categories of answer, B bootstrap resamples.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

_CELLS = 4_000_000  # resampled values held at once


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A coefficient: 1 perfect agreement, 0 what chance gives, below 0 disagreement by rule. None where it is undefined."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int  # units judged by at least two

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {"value": self.value, "ci95": None if self.lo is None else [self.lo, self.hi], "n": self.n}


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], confidence: float = 0.95) -> Agreement:
    """Cohen's kappa of two annotators' answers to the same units, in the same order.

    Cohen (1960): kappa = (p_o - p_e) / (1 - p_e). Interval from the large-sample variance of Fleiss, Cohen and Everitt (1969), equation 13,
    cut to [-1, 1]. Undefined (None) where both gave one and the same answer throughout: then chance agrees always.
    Raises: ValueError for lists of different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"cohen_kappa: expected as many answers of both annotators, got {len(first)} and {len(second)}. Align by unit.")
    n = len(first)
    index = {answer: i for i, answer in enumerate(dict.fromkeys([*first, *second]))}
    table = np.zeros((len(index), len(index)))
    for a, b in zip(first, second, strict=True):
        table[index[a], index[b]] += 1
    if n == 0:
        return Agreement(value=None, lo=None, hi=None, n=0)
    p = table / n  # [K, K]
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = float(np.trace(p)), float(rows @ columns)
    if expected > 1 - 1e-12:
        return Agreement(value=None, lo=None, hi=None, n=n)
    kappa = (observed - expected) / (1 - expected)
    crossed = rows[None, :] + columns[:, None]  # p_.i + p_j. of cell (i, j)
    off = p * (1 - np.eye(len(p)))
    diagonal = float((np.diag(p) * (1 - (rows + columns) * (1 - kappa)) ** 2).sum())
    elsewhere = (1 - kappa) ** 2 * float((off * crossed**2).sum())
    variance = (diagonal + elsewhere - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    half = float(ndtri(0.5 + confidence / 2)) * math.sqrt(max(0.0, variance))
    return Agreement(value=kappa, lo=max(-1.0, kappa - half), hi=min(1.0, kappa + half), n=n)


def krippendorff_alpha(
    units: Sequence[Mapping[Any, Hashable]], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Agreement:
    """Krippendorff's alpha for nominal answers; an annotator may have left units out.

    Krippendorff (2011): alpha = 1 - D_o / D_e over the values of units that have two or more. Interval: percentile bootstrap over units.
    Deviates: Krippendorff resamples the errors instead of the units; units are what the next study draws anew.

    Args: units: per unit the answers by annotator; units with fewer than two answers are left out.
    Undefined (None) where fewer than two units remain or all answers are equal.
    """
    index = {answer: i for i, answer in enumerate(dict.fromkeys(v for unit in units for v in unit.values()))}
    kept = [unit for unit in units if len(unit) >= 2]
    counts = np.zeros((len(kept), len(index)))  # [U, K]
    for row, unit in enumerate(kept):
        for answer in unit.values():
            counts[row, index[answer]] += 1
    if len(kept) < 2 or np.count_nonzero(counts.sum(axis=0)) < 2:
        return Agreement(value=None, lo=None, hi=None, n=len(kept))
    value = float(_alpha(counts, np.ones((1, len(kept))))[0])
    rng, samples = np.random.default_rng(seed), []
    chunk = max(1, _CELLS // len(kept))
    for start in range(0, resamples, chunk):
        weights = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=min(chunk, resamples - start))  # [B, U]
        samples.append(_alpha(counts, weights.astype(np.float64)))
    drawn = np.concatenate(samples)
    lo, hi = np.quantile(drawn[np.isfinite(drawn)], [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Agreement(value=value, lo=float(lo), hi=float(hi), n=len(kept))


def _alpha(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Alpha [B] of units that occur `weights` [B, U] times; NaN where all values are equal."""
    values = counts.sum(axis=1)  # [U] answers of a unit
    disagreeing = (values**2 - (counts**2).sum(axis=1)) / (values - 1)  # ordered pairs that differ, as Krippendorff weighs them
    n, margins = weights @ values, weights @ counts  # [B], [B, K]
    chance = n**2 - (margins**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance > 0, 1 - (n - 1) * (weights @ disagreeing) / chance, np.nan)
