"""The win rate of b over a and what is known about it, from scores alone; the same code serves one study and a thousand simulated ones.

Letters: S studies, N trials, A annotators, L latents, R resamples. A score is 1 where b was preferred, 0 where a was, 0.5 for a tie that
counts half, NaN for a trial that does not count.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import t as student

_CELLS = 2_000_000  # resampled values held at once


class Bounds(NamedTuple):
    """Ends of an interval, [S] each or two numbers."""

    lo: Any
    hi: Any


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Win rates of S studies; arrays [S]."""

    n: np.ndarray  # trials that count
    rate: np.ndarray  # mean score
    wilson: Bounds  # as if all trials were independent
    clustered: Bounds  # allows for annotators and latents; the interval to quote
    p_clustered: np.ndarray  # two-sided, against 0.5; below 1 - confidence just where `clustered` leaves 0.5 out
    design_effect: np.ndarray  # variance over that of independent trials
    degrees: np.ndarray  # of freedom of the t quantile


def wilson(rate: np.ndarray, n: np.ndarray, quantile: np.ndarray | float) -> Bounds:
    """Wilson's interval of a rate with (effective) sample size n, for any quantile. See eg3d_rlhf.metrics.statistics.wilson_interval."""
    scale = 1 + quantile**2 / n
    centre = (rate + quantile**2 / (2 * n)) / scale
    half = quantile * np.sqrt(rate * (1 - rate) / n + quantile**2 / (4 * n**2)) / scale
    return Bounds(np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1))


def win_rate(scores: np.ndarray, annotator: np.ndarray, latent: np.ndarray, confidence: float = 0.95) -> WinRate:
    """Win rate with an interval that allows for trials sharing annotators and latents.

    Two-way clustered variance (Cameron, Gelbach and Miller 2011): V = V_annotators + V_latents - V_trials, each times G / (G - 1). The
    interval is Wilson's with effective size rate (1 - rate) / V and the t quantile with min(A, L) - 1 degrees of freedom: the variance is
    known no better than from so many clusters. With one annotator V_annotators is left out: it then speaks of that annotator alone.

    Args: scores [S, N], NaN where a trial does not count; annotator, latent [N] numbers from 0.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    counted = ~np.isnan(scores)
    n = counted.sum(axis=1).astype(np.float64)
    if (n == 0).any():
        raise ValueError("win_rate: expected at least one trial that counts, got none. Collect answers first.")
    rate = np.where(counted, scores, 0).sum(axis=1) / n
    residual = np.where(counted, scores - rate[:, None], 0)  # [S, N]
    variance, clusters = {}, {}
    for name, groups in (("annotator", annotator), ("latent", latent), ("trial", None)):
        variance[name], clusters[name] = _cluster_variance(residual, counted, n, groups)
    own = variance["trial"]
    several = clusters["annotator"] > 1
    total = np.where(several, variance["annotator"], own) + variance["latent"] - own
    total = np.maximum(total, _LEAST * own)  # V can be 0 or below by chance
    degrees = np.maximum(1, np.minimum(np.where(several, clusters["annotator"], n), clusters["latent"]) - 1)
    spread = rate * (1 - rate)
    effective = np.where(total > 0, spread / np.where(total > 0, total, 1), n)
    statistic = np.abs(rate - 0.5) / np.sqrt(0.25 / np.where(effective > 0, effective, n))
    effective = np.where(effective > 0, effective, n)
    return WinRate(
        n=n, rate=rate, wilson=wilson(rate, n, float(ndtri(0.5 + confidence / 2))),
        clustered=wilson(rate, effective, student.ppf(0.5 + confidence / 2, degrees)),
        p_clustered=2 * student.sf(statistic, degrees), degrees=degrees,
        design_effect=np.where(own > 0, total / np.where(own > 0, own, 1), 1.0),
    )  # fmt: skip


_LEAST = 0.05  # of the variance of independent trials: no design is so lucky


def _cluster_variance(residual: np.ndarray, counted: np.ndarray, n: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the mean from sums of residuals over clusters, and how many clusters have trials; [S] each."""
    if groups is None:
        sums, present = residual, n
    else:
        member = np.zeros((len(groups), int(np.max(groups)) + 1))  # [N, G]
        member[np.arange(len(groups)), groups] = 1
        sums, present = residual @ member, ((counted @ member) > 0).sum(axis=1).astype(np.float64)
    correction = present / np.maximum(present - 1, 1)
    return (sums**2).sum(axis=1) / n**2 * correction, present


def cluster_bootstrap(
    scores: np.ndarray, annotator: np.ndarray, latent: np.ndarray, over: str, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Bounds | None:
    """Percentile bootstrap of one study's win rate over whole clusters; None where there is one cluster only.

    `over`: 'annotators', 'latents', or 'both' (Owen's pigeonhole bootstrap, 2007: both resampled, trials weighted by the product; wider
    than needed where trials differ more than clusters do). Args: scores [N] and the rest as in `win_rate`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    keep = ~np.isnan(scores)
    sides = {"annotators": [annotator], "latents": [latent], "both": [annotator, latent]}[over]
    groups = [np.unique(side[keep], return_inverse=True)[1] for side in sides]
    counts = [int(g.max()) + 1 for g in groups]
    if min(counts) < 2:
        return None
    rng, rates, values = np.random.default_rng(seed), [], scores[keep]
    chunk = max(1, _CELLS // len(values))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = np.ones((size, len(values)))  # [R, N]
        for group, count in zip(groups, counts, strict=True):
            weights *= rng.multinomial(count, np.full(count, 1 / count), size=size)[:, group]
        total = weights.sum(axis=1)
        rates.append((weights @ values)[total > 0] / total[total > 0])  # with both, no trial may be left
    lo, hi = np.quantile(np.concatenate(rates), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Bounds(float(lo), float(hi))
