"""Two strategies that choose pairs by scores of rewards.

The strategy `active` chooses pairs on which an ensemble of rewards disagrees, and `close` chooses pairs whose
scores are close. Without an ensemble, `active` fits a reward to the answers so far instead; see
eg3d_rlhf/people/label/active.py.

For a member with the temperature T, the probability that item a is better than item b is
P = sigmoid((r_a - r_b) / T). The disagreement over a pair is the standard deviation of P over the members
(Christiano et al. 2017, arXiv 1706.03741, section 2.2.4). The closeness of a pair is 1 - |2 P - 1|, with the
mean of P over the members. It is 1 for equal scores, and 0 if one item is certainly better.

Disagreement or closeness alone would select many similar pairs. Pairs are therefore chosen one by one, by
this quantity and by the distance to the nearest pair that is already chosen, in the space of the rewards'
embeddings (greedy max-min selection).
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

_MATCHINGS = 4  # number of random pairings of all seeds whose pairs are candidates
# Function that computes the worth [C] >= 0 of pairs from scores [K, N] and pairs [C, 2]
Worth = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Selection:
    """Pairs in the order in which they were chosen, with the quantities by which they were chosen."""

    pairs: np.ndarray  # numbers of the items, [P, 2]
    worth: np.ndarray  # worth of each pair, [P]
    # Distance [P] to the nearest pair that was chosen earlier; infinite for the first pair
    distance: np.ndarray


def disagreement(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Compute the disagreement [C] of rewards over pairs. It does not depend on the order within a pair.

    Args:
        scores: scores [K, N] of items, divided by the temperature of each reward.
        pairs: numbers of the items of each pair, [C, 2].
    """
    # Standard deviation over the K rewards of the probability that the first item is better
    probability_std: np.ndarray = expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).std(axis=0)
    return probability_std


def closeness(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Compute the closeness [C] of the scores of pairs. It does not depend on the order within a pair.

    Args:
        scores: scores [K, N] of items, divided by the temperature of each reward.
        pairs: numbers of the items of each pair, [C, 2].
    """
    # Mean over the K rewards of the probability that the first item is better
    mean_probability = expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).mean(axis=0)
    closeness_values: np.ndarray = 1 - np.abs(2 * mean_probability - 1)
    return closeness_values


def pair_features(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Compute features [C, 2 M] of pairs: mean and absolute difference of their standardised embeddings.

    The features do not depend on the order within a pair.

    Args:
        embeddings: embeddings [N, M] of items.
        pairs: numbers of the items of each pair, [C, 2].
    """
    entry_std = embeddings.std(axis=0)
    # Entries that are constant over all items carry no information and become 0.
    standardised_embeddings = np.divide(
        embeddings - embeddings.mean(axis=0),
        entry_std,
        out=np.zeros_like(embeddings),
        where=entry_std > 0,
    )
    a = standardised_embeddings[pairs[:, 0]]
    b = standardised_embeddings[pairs[:, 1]]
    features = np.concatenate([(a + b) / 2, np.abs(a - b) / 2], axis=1)
    # With this divisor, distances of features do not depend on the number of entries.
    scaled_features: np.ndarray = features / np.sqrt(2 * embeddings.shape[1])
    return scaled_features


def candidates(items: Items, rng: Rng, max_pairs: int) -> np.ndarray:
    """Return candidate pairs [C, 2] without repetitions, in ascending order.

    For seeds, the candidates are the pairs of several random pairings of all seeds. For finished assets, they
    are pairs that may be compared.

    Args:
        items: items that may be compared.
        rng: random numbers.
        max_pairs: largest number of pairs for each prompt and each two generators.
    """
    item_count = len(items)
    if items.unlimited:
        # Each pairing uses every seed once. If the number of seeds is odd, one seed is left out.
        pair_lists = [
            rng.permutation(item_count)[: item_count - item_count % 2].reshape(-1, 2)
            for _ in range(_MATCHINGS)
        ]
    else:
        pair_lists = [np.array(pairs) for pairs in meetings(items, rng, max_pairs).values()]
    all_pairs = np.concatenate(pair_lists) if pair_lists else np.empty((0, 2), dtype=np.int64)
    # Sorted within each pair, so that `unique` recognises repetitions in any order.
    return np.unique(np.sort(all_pairs, axis=1), axis=0)


def select(
    scored: Scored, pairs: np.ndarray, pair_count: int, diversity: float, compute_worth: Worth = disagreement
) -> Selection:
    """Choose `pair_count` of the candidate pairs, or all of them if there are fewer.

    Each step chooses the pair with the largest value of (1 - diversity) * worth + diversity * distance. Worth
    and distance are divided by their largest values among the available candidates. The distance is measured
    to the nearest pair that is already chosen, and counts from the second step on. All items are used equally
    often: an item is in at most ceil(2 pair_count / N) pairs, as long as there are such candidates.

    Args:
        scored: scores and embeddings of the items.
        pairs: candidate pairs [C, 2].
        pair_count: number of pairs to choose.
        diversity: weight of the distance, 0..1.
        compute_worth: function that computes the worth of pairs.
    """
    pair_worth = compute_worth(scored.scores, pairs)  # [C]
    features = pair_features(scored.embeddings, pairs)
    # [C]: distance of each candidate to the nearest chosen pair
    nearest_distance = np.full(len(pairs), np.inf)
    is_unchosen = np.ones(len(pairs), dtype=bool)
    use_counts = np.zeros(len(scored.embeddings), dtype=np.int64)  # number of chosen pairs with each item
    # -(-a // b) is a / b rounded up.
    max_use_count = -(-2 * pair_count // len(use_counts))
    chosen_indices: list[int] = []
    distances: list[float] = []
    for _ in range(min(pair_count, len(pairs))):
        # Available candidates: both of their items may be used again. The limit increases only if there are
        # none.
        while not (is_available := is_unchosen & (use_counts[pairs] < max_use_count).all(axis=1)).any():
            max_use_count += 1
        candidate_value = (1 - diversity) * _relative(pair_worth, is_available)
        # The first pair has no distance and is chosen by its worth alone.
        if chosen_indices:
            candidate_value += diversity * _relative(nearest_distance, is_available)
        best_index = int(np.where(is_available, candidate_value, -np.inf).argmax())
        chosen_indices.append(best_index)
        distances.append(nearest_distance[best_index])
        # Only the distance to the new pair can be smaller than before.
        distance_to_best = np.linalg.norm(features - features[best_index], axis=1)
        nearest_distance = np.minimum(nearest_distance, distance_to_best)
        is_unchosen[best_index] = False
        use_counts[pairs[best_index]] += 1
    return Selection(pairs[chosen_indices], pair_worth[chosen_indices], np.array(distances))


def _relative(values: np.ndarray, is_available: np.ndarray) -> np.ndarray:
    """Divide values [C] by their maximum over the available candidates. Return zeros if the maximum is 0."""
    largest_value = values[is_available].max()
    return values / largest_value if largest_value > 0 else np.zeros_like(values)


class ScoredPairs(PairStrategy):
    """Strategy that chooses pairs by a function of their scores.

    Args:
        name: name of the function in reports, such as "disagreement".
        compute_worth: function that computes the worth of pairs from their scores.
        least_rewards: smallest number of rewards in the ensemble.
        learns: True if a reward can be fitted to the answers instead, see `PairStrategy`.
    """

    def __init__(self, name: str, compute_worth: Worth, least_rewards: int, learns: bool = False):
        self.name = name
        self.worth = compute_worth
        self.least_rewards = least_rewards
        self.learns = learns

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds that are scored."""
        return round(2 * options.pairs * options.pool)

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose the share `options.doubtful` of the pairs by their scores, and all other pairs at random.

        The arguments are described in `PairStrategy.plan`. The report states worth and distance of the pairs
        that were chosen by their scores.
        """
        scored = items.scored()
        candidate_pairs = candidates(items, rng, options.pairs)
        # There are no candidates if no two items may be compared.
        if not len(candidate_pairs):
            return Chosen([])
        scored_pair_count = max(1, round(options.pairs * options.doubtful))
        selection = select(scored, candidate_pairs, scored_pair_count, options.diversity, self.worth)
        pairs = selection.pairs
        if scored_pair_count < options.pairs:
            random_pairs = self._random_pairs(items, selection.pairs, rng, options.pairs)
            pairs = np.concatenate([pairs, random_pairs])
            # The pairs are shuffled, so that annotators do not get all pairs of one kind first.
            pairs = pairs[rng.permutation(len(pairs))]
        ensemble = items.ensemble
        assert ensemble is not None
        return Chosen(
            pairs.tolist(),
            {
                "rewards": ensemble.described,
                "candidates": len(candidate_pairs),
                f"{self.name}_candidates": float(self.worth(scored.scores, candidate_pairs).mean()),
                f"{self.name}_chosen": float(selection.worth.mean()),
                "why": [
                    {
                        "pair": pair,
                        self.name: round(float(worth), 5),
                        # The distance of the first pair is infinite, which JSON cannot represent.
                        "distance": round(float(distance), 5) if np.isfinite(distance) else None,
                    }
                    for pair, worth, distance in zip(
                        selection.pairs.tolist(), selection.worth, selection.distance, strict=True
                    )
                ],
            },
        )

    def _random_pairs(self, items: Items, chosen_pairs: np.ndarray, rng: Rng, pair_count: int) -> np.ndarray:
        """Sample random pairs in addition to pairs that were chosen by their scores.

        For seeds, the random pairs consist of seeds that no chosen pair contains. For finished assets, the
        random pairs are pairs that were not chosen.

        Args:
            items: items that may be compared.
            chosen_pairs: pairs [P, 2] that were chosen by their scores.
            rng: random numbers.
            pair_count: number of chosen pairs and random pairs together.
        """
        random_count = pair_count - len(chosen_pairs)
        if items.unlimited:
            unused_seeds = rng.permutation(np.setdiff1d(np.arange(len(items)), chosen_pairs))
            return unused_seeds[: 2 * random_count].reshape(-1, 2)
        excluded_pairs = set(map(tuple, np.sort(chosen_pairs, axis=1).tolist()))
        balanced_pairs = balanced(meetings(items, rng, pair_count), rng)
        random_pairs = [pair for pair in balanced_pairs if tuple(sorted(pair)) not in excluded_pairs]
        # reshape gives two columns also if there are no pairs.
        return np.array(random_pairs[:random_count], dtype=np.int64).reshape(-1, 2)


STRATEGIES.add("active", ScoredPairs("disagreement", disagreement, least_rewards=2, learns=True))
STRATEGIES.add("close", ScoredPairs("closeness", closeness, least_rewards=1))
