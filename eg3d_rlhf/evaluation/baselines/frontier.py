"""The point of each rung that is shown, and the advice which rung suffices.

A rung with a strength is shown at the largest strength that keeps the collateral bound, so that rungs are
compared at the same collateral change and never by their gain alone. The advice is the cheapest rung whose
loss against the best one, paired over latents, has an upper bound below a share of the best one's gain. Gain
and loss are measured by the ground truth of the family or by a held-out reward, and never by the reward that
rungs use.
Shapes: N latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval

NEGLIGIBLE_LOSS = 0.1  # largest loss, as a share of the best rung's gain, at which a rung suffices


def choose_point(exceeded_by_point: Sequence[Sequence[str]], strongest: int | None = None) -> int:
    """Return the index of the strongest point that keeps the bound; 0, the weakest one, if none does.

    Args:
        exceeded_by_point: metrics that exceed the bound, for each point from weak to strong.
        strongest: index of the strongest point that may be chosen, for a strength that validation limits;
            None: the last one.
    """
    # The search goes from strong to weak. A weaker point may exceed the bound although a stronger one
    # keeps it, because the metrics of few samples are noisy.
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
    # An infinite share keeps all samples unfiltered, so the choice
    # can never be worse than doing nothing on the validation latents.
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
    # A rung that exceeds the bound may have a large gain because it changes everything, so it is
    # excluded before the best one is determined.
    candidates = {rung: gains for rung, gains in gains_by_rung.items() if keeps_bound[rung]}
    # All rungs are measured on the same latents, [N].
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
    # The maximum of noisy means is slightly optimistic. The paired
    # losses below use the same latents, so this matters little for them.
    best_rung = max(candidates, key=lambda rung: candidates[rung].mean())
    best_gain = bootstrap_mean_interval(candidates[best_rung])
    advice["best_gain"] = [best_gain.mean, best_gain.lo, best_gain.hi]
    # Without a certain gain there is nothing of which a share could be lost.
    if best_gain.lo <= 0:
        return advice
    advice["best"] = best_rung
    for rung, gains in candidates.items():
        # The loss is paired by latent, and the denominator is the fixed mean gain. A ratio of two resampled
        # means would have no finite variance near a gain of 0.
        loss = bootstrap_mean_interval((candidates[best_rung] - gains) / best_gain.mean)
        advice["losses"][rung] = [loss.mean, loss.lo, loss.hi]
        # The rungs come in the order of their cost, so the first sufficient one is the cheapest.
        if advice["cheapest"] is None:
            if loss.hi < negligible_loss:
                advice["cheapest"] = rung
            elif loss.lo < negligible_loss:
                advice["undecided"].append(rung)
    return advice
