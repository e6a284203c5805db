"""Active pairs, on which an ensemble of rewards disagrees, and close pairs, whose scores are close.

The disagreement over a pair is the standard deviation, over the members, of the probability that the first
item is better (Christiano et al. 2017, arXiv 1706.03741, 2.2.4), P = sigmoid((r_a - r_b) / T), with T the
member's temperature. The closeness of a pair is 1 - |2 P - 1|, with the mean of P over the members: 1 for
equal scores, 0 where the better one is certain.

By themselves both select similar pairs again and again. Pairs are therefore chosen one by one, by that
quantity and by their distance to the nearest pair already chosen, in the space of the rewards' embeddings
(greedy max-min).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    Answers,
    Chosen,
    Items,
    PairStrategy,
    Rng,
    Scored,
    StrategyOptions,
)
from eg3d_rlhf.preferences.pair_strategies.random_pairs import balanced, meetings

_MATCHINGS = 4  # number of random pairings of all seeds that give the candidates
# Function (scores [K, N], pairs [C, 2]) -> worth of each pair [C], >= 0.
Worth = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Selection:
    """Pairs in the order in which they were chosen, with the reasons."""

    pairs: np.ndarray  # [P, 2]
    worth: np.ndarray  # [P]
    distance: np.ndarray  # [P] to the nearest pair chosen before; infinite for the first


def disagreement(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the standard spread [C] over the members of P(first better) for pairs [C, 2], from scores
    [K, N]. Swapping a pair changes nothing.
    """
    # P(first better) of each member [K, C].
    spread: np.ndarray = expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).std(axis=0)
    return spread


def closeness(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the closeness [C] of pairs [C, 2], from scores [K, N]. Swapping a pair changes nothing."""
    # Mean over the members: P(first better).
    better = expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).mean(axis=0)
    close: np.ndarray = 1 - np.abs(2 * better - 1)
    return close


def pair_features(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Compute the mean and the distance of the standardised embeddings of pairs [C, 2], as [C, 2 M].

    Swapping a pair changes nothing.
    """
    spread = embeddings.std(axis=0)
    # Entries that are constant over all items carry no information and become 0.
    standard = np.divide(
        embeddings - embeddings.mean(axis=0), spread, out=np.zeros_like(embeddings), where=spread > 0
    )
    a = standard[pairs[:, 0]]
    b = standard[pairs[:, 1]]
    features = np.concatenate([(a + b) / 2, np.abs(a - b) / 2], axis=1)
    # a scale that does not depend on the number of entries
    scaled: np.ndarray = features / np.sqrt(2 * embeddings.shape[1])
    return scaled


def candidates(items: Items, rng: Rng, most: int) -> np.ndarray:
    """Return candidate pairs [C, 2] without repetitions, sorted within the pair and among each other.

    They are several random pairings of all seeds, or the pairs of finished assets that may be compared.

    Args: most: largest number of pairs of each prompt and two generators.
    """
    count = len(items)
    if items.unlimited:
        # Each pairing uses every seed once; an odd one is left out.
        rows = [rng.permutation(count)[: count - count % 2].reshape(-1, 2) for _ in range(_MATCHINGS)]
    else:
        rows = [np.array(pairs) for pairs in meetings(items, rng, most).values()]
    all_pairs = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
    return np.unique(np.sort(all_pairs, axis=1), axis=0)


def select(
    scored: Scored, pairs: np.ndarray, count: int, diversity: float, worth: Worth = disagreement
) -> Selection:
    """Choose `count` of the candidate pairs [C, 2], or all if there are fewer.

    Each step takes the pair with the largest (1 - diversity) * worth + diversity * distance. Both are
    relative to the largest value among the remaining candidates. The distance is that to the nearest pair
    chosen so far, and counts from the second step on. Items are used evenly: an item is in at most ceil(2
    count / N) pairs, that is, in one if there are enough items, unless no other candidates are left.

    Args: diversity: 0 (worth alone) to 1 (after the first pair, distance alone).
    """
    # [C]; does not change during the selection
    values = worth(scored.scores, pairs)
    features = pair_features(scored.embeddings, pairs)
    # Distance of each candidate to the nearest pair chosen so far.
    nearest = np.full(len(pairs), np.inf)
    # `most` is raised only if every remaining candidate would exceed it.
    unchosen = np.ones(len(pairs), dtype=bool)
    used = np.zeros(len(scored.embeddings), dtype=np.int64)  # pairs that each item is in
    most = -(-2 * count // len(used))
    chosen: list[int] = []
    distances: list[float] = []
    for _ in range(min(count, len(pairs))):
        # candidates of which both items may be used again
        while not (free := unchosen & (used[pairs] < most).all(axis=1)).any():
            most += 1
        value = (1 - diversity) * _relative(values, free)
        # The first pair has no distance; it is chosen by its worth alone.
        if chosen:
            value += diversity * _relative(nearest, free)
        best = int(np.where(free, value, -np.inf).argmax())
        chosen.append(best)
        distances.append(nearest[best])
        # Greedy max-min (farthest-point) selection: only the new pair can reduce a distance.
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
        unchosen[best] = False
        used[pairs[best]] += 1
    return Selection(pairs[chosen], values[chosen], np.array(distances))


def _relative(values: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Divide values by the largest of those that are free; all are 0 if it is 0."""
    greatest = values[free].max()
    return values / greatest if greatest > 0 else np.zeros_like(values)


class ScoredPairs(PairStrategy):
    """Choice of pairs by a quantity of their scores, `worth`, which reports call `name`."""

    def __init__(self, name: str, worth: Worth, least_rewards: int):
        self.name = name
        self.worth = worth
        self.least_rewards = least_rewards

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds that are scored."""
        return round(2 * options.pairs * options.pool)

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose a fraction of the pairs by their scores, and the others at random.

        The report contains the quantities of the chosen pairs.
        """
        # All items are scored, though only some are used.
        scored = items.scored()
        table = candidates(items, rng, options.pairs)
        # No two items may be compared.
        if not len(table):
            return Chosen([])
        count = max(1, round(options.pairs * options.doubtful))
        selection = select(scored, table, count, options.diversity, self.worth)
        pairs = selection.pairs
        if count < options.pairs:
            others = self._others(items, selection.pairs, rng, options.pairs)
            pairs = np.concatenate([pairs, others])
            # Shuffled, so that annotators do not see all chosen pairs first.
            pairs = pairs[rng.permutation(len(pairs))]
        ensemble = items.ensemble
        assert ensemble is not None
        return Chosen(
            pairs.tolist(),
            {
                "rewards": ensemble.described,
                "candidates": len(table),
                f"{self.name}_candidates": float(self.worth(scored.scores, table).mean()),
                f"{self.name}_chosen": float(selection.worth.mean()),
                "why": [
                    {
                        "pair": pair,
                        self.name: round(float(worth), 5),
                        # the first pair has no distance
                        "distance": round(float(distance), 5) if np.isfinite(distance) else None,
                    }
                    for pair, worth, distance in zip(
                        selection.pairs.tolist(), selection.worth, selection.distance, strict=True
                    )
                ],
            },
        )

    def _others(self, items: Items, chosen: np.ndarray, rng: Rng, wanted: int) -> np.ndarray:
        """Sample random pairs for the rest of the wanted ones.

        Seeds: pairs of seeds that are in none of the chosen pairs. Assets: pairs that were not chosen.
        """
        # number of random pairs
        missing_count = wanted - len(chosen)
        if items.unlimited:
            # Seeds that no chosen pair uses.
            free = rng.permutation(np.setdiff1d(np.arange(len(items)), chosen))
            return free[: 2 * missing_count].reshape(-1, 2)
        chosen_pairs = set(map(tuple, np.sort(chosen, axis=1).tolist()))
        random_pairs = balanced(meetings(items, rng, wanted), rng)
        others = [pair for pair in random_pairs if tuple(sorted(pair)) not in chosen_pairs]
        return np.array(others[:missing_count], dtype=np.int64).reshape(-1, 2)


STRATEGIES.add("active", ScoredPairs("disagreement", disagreement, least_rewards=2))
STRATEGIES.add("close", ScoredPairs("closeness", closeness, least_rewards=1))
