"""Which pairs teach most: those over which a small ensemble of rewards disagrees, spread over the shapes there are.

The disagreement over a pair is the standard deviation, over the members, of the probability that the first shape is better (Christiano et
al. 2017, arXiv 1706.03741, 2.2.4: queries by the variance across an ensemble), P = sigmoid((r_a - r_b) / T), T the member's temperature.
By itself that picks the same doubt over and over, so pairs are chosen one by one, by disagreement and by their distance to the nearest pair
already chosen in the space of the rewards' embeddings (greedy max-min).

Letters: S seeds, K members, M entries of all embeddings, C candidate pairs, P chosen pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

_BATCH = 16  # seeds judged at once
_MATCHINGS = 4  # random pairings of all seeds that candidates come from

Tell = Callable[[int, int], None]  # (seeds judged, seeds in all)


@dataclass(frozen=True)
class Judged:
    """What an ensemble makes of seeds."""

    scores: np.ndarray  # [K, S], in units of each member's temperature
    embeddings: np.ndarray  # [S, M]


@dataclass(frozen=True)
class Selection:
    """Pairs in the order in which they were chosen, and why."""

    pairs: np.ndarray  # [P, 2], indices of seeds
    disagreement: np.ndarray  # [P]
    distance: np.ndarray  # [P] to the nearest pair chosen before; infinite for the first


@dataclass(frozen=True)
class Ensemble:
    """Rewards that were handed in, on the shapes of one generator; this module knows neither rewards nor generators."""

    judge: Callable[[Sequence[int]], Judged]  # of a few seeds at a time
    size: int  # K
    described: list[dict]  # of every file of rewards, for the campaign's record

    def __post_init__(self):
        if self.size < 2:
            raise ValueError(f"active selection: expected at least 2 rewards, got {self.size}. Name another file as well.")


def judge(ensemble: Ensemble, seeds: Sequence[int], tell: Tell | None = None) -> Judged:
    """Scores and embeddings of seeds, in batches."""
    parts = []
    for start in range(0, len(seeds), _BATCH):
        parts.append(ensemble.judge(seeds[start : start + _BATCH]))
        if tell is not None:
            tell(min(start + _BATCH, len(seeds)), len(seeds))
    return Judged(np.concatenate([part.scores for part in parts], axis=1), np.concatenate([part.embeddings for part in parts]))


def disagreement(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Standard deviation [C] over the members of P(first better) for pairs [C, 2], from scores [K, S]. Swapping a pair changes nothing."""
    return expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).std(axis=0)


def pair_features(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Where pairs [C, 2] lie, whichever shape comes first: middle and distance of the standardised embeddings, [C, 2 M]."""
    spread = embeddings.std(axis=0)
    standard = np.divide(embeddings - embeddings.mean(axis=0), spread, out=np.zeros_like(embeddings), where=spread > 0)
    a, b = standard[pairs[:, 0]], standard[pairs[:, 1]]
    return np.concatenate([(a + b) / 2, np.abs(a - b) / 2], axis=1) / np.sqrt(2 * embeddings.shape[1])


def candidates(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Candidate pairs [C, 2] of 0..S-1, ordered within the pair: several random pairings of all seeds, without repeats."""
    rows = [rng.permutation(seeds)[: seeds - seeds % 2].reshape(-1, 2) for _ in range(_MATCHINGS)]
    return np.unique(np.sort(np.concatenate(rows), axis=1), axis=0)


def select(judged: Judged, pairs: np.ndarray, count: int, diversity: float) -> Selection:
    """`count` of the candidate pairs [C, 2], no seed in two of them.

    Each step takes the pair with the greatest (1 - diversity) * disagreement + diversity * distance, both in shares of the greatest among
    the candidates left; distance is that to the nearest pair chosen so far, and counts from the second step on.
    Args: diversity 0 (disagreement alone) .. 1 (after the first pair, distance alone).
    Raises: ValueError where the candidates do not hold so many disjoint pairs.
    """
    doubt, features = disagreement(judged.scores, pairs), pair_features(judged.embeddings, pairs)
    nearest, free = np.full(len(pairs), np.inf), np.ones(len(pairs), dtype=bool)
    chosen: list[int] = []
    distances: list[float] = []
    for _ in range(count):
        if not free.any():
            raise ValueError(f"active selection: expected {count} disjoint pairs, found {len(chosen)} among {len(pairs)}. Raise the pool.")
        worth = (1 - diversity) * _share(doubt, free)
        if chosen:
            worth += diversity * _share(nearest, free)
        best = int(np.where(free, worth, -np.inf).argmax())
        chosen.append(best)
        distances.append(nearest[best])
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
        free &= ~np.isin(pairs, pairs[best]).any(axis=1)
    return Selection(pairs[chosen], doubt[chosen], np.array(distances))


def _share(values: np.ndarray, free: np.ndarray) -> np.ndarray:
    greatest = values[free].max()
    return values / greatest if greatest > 0 else np.zeros_like(values)
