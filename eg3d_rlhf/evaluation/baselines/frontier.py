"""The point of each rung that is shown, and the advice which rung suffices.

A rung with a strength is shown at the largest strength that keeps the collateral bound, so that rungs are
compared at the same collateral change and never by their gain alone. The advice is the cheapest rung whose
loss against the best one, paired over latents, has an upper bound below a share of the best one's gain. Gain
and loss are measured by the ground truth of the family or by a held-out reward, and never by the reward that
rungs use.
Shapes: N latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval

NEGLIGIBLE_LOSS = 0.1  # largest loss, as a share of the best rung's gain, at which a rung suffices


@dataclass(frozen=True, kw_only=True)
class CollateralBound:
    """Largest collateral change at which a point is still shown. A metric that is None is not checked."""

    identity: float = 0.95  # smallest share of latents that keep their identity
    front: float = 0.1  # largest median distance by which fronts move, voxels of a 64^3 grid
    variety: float = 0.95  # smallest variety, relative to the untuned samples
    harm: float = 0.02  # largest share of intact samples that are degraded

    def exceeded_by(self, metrics: Mapping[str, float | None]) -> list[str]:
        """Return the names of the metrics of a point that exceed the bound."""

        def is_above(name: str, bound: float) -> bool:
            value = metrics.get(name)
            return value is not None and value > bound

        def is_below(name: str, bound: float) -> bool:
            value = metrics.get(name)
            return value is not None and value < bound

        checks = {
            "identity_kept": is_below("identity_kept", self.identity),
            "front_moved_voxels": is_above("front_moved_voxels", self.front),
            "variety": is_below("variety", self.variety),
            # One degraded sample is always allowed, since a share of few intact samples says little.
            "intact_degraded": is_above(
                "intact_degraded", max(self.harm, 1 / (metrics.get("intact") or np.inf))
            ),
        }
        return [name for name, is_exceeded in checks.items() if is_exceeded]


def choose_point(exceeded_by_point: Sequence[Sequence[str]], strongest: int | None = None) -> int:
    """Return the index of the strongest point that keeps the bound; 0, the weakest one, if none does.

    Args:
        exceeded_by_point: metrics that exceed the bound, for each point from weak to strong.
        strongest: index of the strongest point that may be chosen, for a strength that validation limits;
            None: the last one.
    """
    last = len(exceeded_by_point) - 1 if strongest is None else strongest
    return next((index for index in range(last, -1, -1) if not exceeded_by_point[index]), 0)


def choose_share(
    scores_before: np.ndarray, scores_after: np.ndarray, changed: np.ndarray, shares: Sequence[float]
) -> tuple[int, float]:
    """Choose the share of a weighed filter by the reward.

    Args:
        scores_before: reward of the untuned samples, [N].
        scores_after: reward of the filtered samples, [N].
        changed: share of its volume that the filter changes in each sample, [N].
        shares: candidates; the filter is applied where it changes more than the share.
    Returns: the index of the chosen share, the first one of equally good ones, and its mean reward. An
        infinite share among the candidates stands for a filter that is never applied.
    """
    means = [float(np.where(changed > share, scores_after, scores_before).mean()) for share in shares]
    best_index = int(np.argmax(means))
    return best_index, means[best_index]


def advise(
    gains_by_rung: Mapping[str, np.ndarray],
    keeps_bound: Mapping[str, bool],
    negligible_loss: float = NEGLIGIBLE_LOSS,
) -> dict[str, Any]:
    """Find the cheapest rung that suffices.

    Args:
        gains_by_rung: gain of each latent, [N], by rung from cheap to dear; higher is better.
        keeps_bound: by rung, whether its shown point keeps the collateral bound. Other rungs are no
            candidates.
        negligible_loss: largest loss as a share of the best rung's gain.
    Returns: JSON values. "best" is the rung with the largest mean gain, or None if no gain is above zero with
        certainty; "cheapest" the cheapest rung whose loss is negligible with certainty; "undecided" the
        cheaper rungs whose loss may or may not be negligible; "losses" the loss of each candidate as a share
        of the best gain, with its 95 % interval.
    """
    candidates = {rung: gains for rung, gains in gains_by_rung.items() if keeps_bound[rung]}
    latent_count = len(next(iter(gains_by_rung.values())))
    advice: dict[str, Any] = {
        "latents": latent_count,
        "best": None,
        "best_gain": None,
        "cheapest": None,
        "undecided": [],
        "losses": {},
    }
    if not candidates:
        return advice
    best_rung = max(candidates, key=lambda rung: candidates[rung].mean())
    best_gain = bootstrap_mean_interval(candidates[best_rung])
    advice["best_gain"] = [best_gain.mean, best_gain.lo, best_gain.hi]
    # Without a certain gain there is nothing of which a share could be lost.
    if best_gain.lo <= 0:
        return advice
    advice["best"] = best_rung
    for rung, gains in candidates.items():
        loss = bootstrap_mean_interval((candidates[best_rung] - gains) / best_gain.mean)
        advice["losses"][rung] = [loss.mean, loss.lo, loss.hi]
        if advice["cheapest"] is None:
            if loss.hi < negligible_loss:
                advice["cheapest"] = rung
            elif loss.lo < negligible_loss:
                advice["undecided"].append(rung)
    return advice
