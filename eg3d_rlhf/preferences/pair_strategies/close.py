"""Pairs whose scores by a reward, or by an ensemble of rewards, are close.

The closeness of a pair is 1 - |2 P - 1|, with P the mean over the members of the probability that the first
item is better: 1 for equal scores, 0 where the better one is certain. Diversity is as in active.py.
"""

import numpy as np
from scipy.special import expit

from eg3d_rlhf.preferences.pair_strategies import STRATEGIES
from eg3d_rlhf.preferences.pair_strategies.active import ScoredPairs


def closeness(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the closeness [C] of pairs [C, 2], from scores [K, N]. Swapping a pair changes nothing."""
    better = expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).mean(axis=0)
    close: np.ndarray = 1 - np.abs(2 * better - 1)
    return close


STRATEGIES.add("close", ScoredPairs("closeness", closeness, least_rewards=1))
