"""Choice of the pairs that people label next, by the posterior of a linear reward.

A linear reward (`eg3d_rlhf.rewards.linear`) has weights b with the covariance S, by Laplace's approximation.
The direction of the latents that the reward prefers is the ridge regression of its scores on z:

    d = M b,   M = (Z^T Z + ridge)^-1 Z^T F

where Z are latents of unlabelled samples and F their features. Only the direction of d matters, so its
variance is measured perpendicular to d, and relative to the length of d:

    V(S) = trace(Q S),   Q = M^T (1 - u u^T) M / |d|^2,   u = d / |d|

Expected cosine of d with a direction that is drawn from the posterior: about 1 / sqrt(1 + V).

The answer to a pair with the difference x of features has the Fisher information p (1 - p) x x^T, where p is
the probability of the answer, averaged over the posterior (MacKay 1992). One more label therefore changes the
covariance, before its answer is known, to

    S' = S - w S x x^T S / (1 + w x^T S x),   w = p (1 - p)

and reduces V by w x^T S Q S x / (1 + w x^T S x). Each step takes the pair with the largest reduction, and
replaces S by S', so that the pairs of a batch do not repeat each other.

Shapes: N samples, K features, Z = z_dim, C candidate samples, P pairs.
"""

import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.generators import LoadedGenerator, latents
from eg3d_rlhf.preferences.dataset import pair_of
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import rate
from eg3d_rlhf.rewards.observations import Observation

RIDGE = 10.0  # of the regression on latents, as in `tuning.gan.steering_directions`
SPLITS = 20  # splits of the labels into halves


def direction_map(z: np.ndarray, features: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Compute the matrix M [Z, K] that maps weights of a linear reward to a direction of z.

    Args: z: latents [N, Z]; features: features of the same samples [N, K]; ridge: weight of the penalty.
    """
    # centred, because the regression has no intercept
    centred = features - features.mean(axis=0)
    return np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ centred)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posterior:
    """Normal posterior of a linear reward's weights, and the map from weights to a direction."""

    weights: np.ndarray  # mean b, [K]
    covariance: np.ndarray  # S, [K, K]
    to_direction: np.ndarray  # M, [Z, K]

    @property
    def importance(self) -> np.ndarray:
        """Matrix Q [K, K], for which trace(Q S) is the relative variance of the direction."""
        direction = self.to_direction @ self.weights
        # A reward without any preference has the direction 0 and no relative variance.
        length = max(float(np.linalg.norm(direction)), 1e-12)
        unit = direction / length
        perpendicular = self.to_direction - np.outer(unit, unit @ self.to_direction)
        importance: np.ndarray = perpendicular.T @ perpendicular / length**2
        return importance

    @property
    def variance(self) -> float:
        """Variance of the direction relative to its squared length."""
        return float(np.trace(self.importance @ self.covariance))

    @property
    def certainty(self) -> float:
        """Expected cosine of the direction with one that is drawn from the posterior, 0..1."""
        return float(1 / np.sqrt(1 + self.variance))

    def information(self, differences: np.ndarray) -> np.ndarray:
        """Compute the expected information p (1 - p) [P] of the answers to pairs, from differences [P, K]."""
        margin_variance = ((differences @ self.covariance) * differences).sum(axis=1)
        # MacKay's approximation of the mean of a sigmoid over a normal distribution
        probability = expit(differences @ self.weights / np.sqrt(1 + np.pi / 8 * margin_variance))
        return probability * (1 - probability)

    def after(self, difference: np.ndarray) -> "Posterior":
        """Return the posterior that is expected after one more label of a pair with this difference [K]."""
        weight = float(self.information(difference[None])[0])
        covariance_x = self.covariance @ difference
        shrinkage = weight / (1 + weight * float(difference @ covariance_x))
        return dataclasses.replace(
            self, covariance=self.covariance - shrinkage * np.outer(covariance_x, covariance_x)
        )

    def reductions(self, differences: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Compute the expected reduction [P] of the variance by one more label of each pair.

        Args: differences: differences of features [P, K]; importance: matrix Q, which one batch shares.
        """
        covariance_x = differences @ self.covariance
        weight = self.information(differences)
        gain = ((covariance_x @ importance) * covariance_x).sum(axis=1)
        reductions: np.ndarray = weight * gain / (1 + weight * (covariance_x * differences).sum(axis=1))
        return reductions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenPair:
    """Pair that the posterior chose."""

    first: int  # index of the first sample
    second: int  # index of the second sample
    reduction: float  # expected reduction of the direction's variance


def choose_pairs(
    posterior: Posterior, features: np.ndarray, count: int, pending: np.ndarray | None = None
) -> list[ChosenPair]:
    """Choose pairs of distinct samples by the expected reduction of the direction's variance.

    Args:
        posterior: posterior of the reward after the labels so far.
        features: features of the candidate samples, [C, K].
        count: number of pairs; at most half the number of candidates.
        pending: differences [P, K] of pairs that are planned already and have no label yet.
    Raises: ValueError if there are too few candidates.
    """
    if 2 * count > len(features):
        raise ValueError(
            f"active pairs: {count} pairs need {2 * count} samples, got {len(features)} candidates. Raise"
            " --set pool."
        )
    importance = posterior.importance
    for difference in [] if pending is None else pending:
        posterior = posterior.after(difference)
    first_indices, second_indices = np.triu_indices(len(features), k=1)
    differences = features[first_indices] - features[second_indices]
    is_available = np.ones(len(differences), dtype=bool)
    chosen_pairs = []
    for _ in range(count):
        reductions = np.where(is_available, posterior.reductions(differences, importance), -np.inf)
        best = int(reductions.argmax())
        first = int(first_indices[best])
        second = int(second_indices[best])
        chosen_pairs.append(ChosenPair(first=first, second=second, reduction=float(reductions[best])))
        posterior = posterior.after(differences[best])
        for used in (first, second):
            is_available &= (first_indices != used) & (second_indices != used)
    return chosen_pairs


def half_cosine(
    differences: np.ndarray, pair_numbers: np.ndarray, ridge: float, to_direction: np.ndarray, seed: int = 0
) -> float:
    """Compute the mean cosine of the directions of two disjoint halves of the labels.

    Args:
        differences: features of the winners minus features of the losers, [P, K].
        pair_numbers: number of the pair of each label; labels of one pair share a half, [P].
        ridge: ridge of the linear reward.
        to_direction: matrix M [Z, K].
        seed: random seed of the splits.
    """
    rng = np.random.default_rng([seed, len(differences), 7])
    pair_count = int(pair_numbers.max()) + 1
    cosines = []
    for _ in range(SPLITS):
        is_first = (rng.permutation(pair_count) < pair_count // 2)[pair_numbers]
        halves = [
            to_direction @ linear.fit_logistic(differences[in_half], ridge)[0]
            for in_half in (is_first, ~is_first)
        ]
        lengths = [max(float(np.linalg.norm(half)), 1e-30) for half in halves]
        cosines.append(float(halves[0] @ halves[1]) / (lengths[0] * lengths[1]))
    return float(np.mean(cosines))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActiveReward:
    """Linear reward of the labels so far, with the posterior that chooses the next pairs."""

    fitted: linear.FittedReward
    posterior: Posterior

    @classmethod
    def fit(
        cls,
        generator: LoadedGenerator,
        labels: Sequence[Preference],
        observation: Observation,
        store: ObservationCache,
        unlabelled: int = linear.UNLABELLED,
    ) -> "ActiveReward":
        """Fit the reward to labels of a generator's samples.

        Args:
            generator: generator of the labelled samples.
            labels: labels of pairs; ties are ignored.
            observation: observation that the reward reads.
            store: observations of samples; those that are missing are added.
            unlabelled: number of unlabelled samples.
        Raises: ValueError for labels of another generator, and for too few labels.
        """
        fitted = linear.fit_observed(generator, labels, observation, store, unlabelled=unlabelled)
        z = latents(fitted.unlabelled, generator.generator.z_dim).double().numpy()
        network = fitted.fit.network
        posterior = Posterior(
            weights=network.weights.double().numpy(),
            covariance=network.covariance.double().numpy(),
            to_direction=direction_map(z, fitted.unlabelled_features),
        )
        return cls(fitted=fitted, posterior=posterior)

    @property
    def hash(self) -> str:
        """SHA-256 of the file that `Reward.save` writes."""
        with tempfile.TemporaryDirectory() as folder:
            return file_hash(self.fitted.reward.save(Path(folder) / "reward.safetensors"))

    def differences(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Compute the differences [P, K] of the features of pairs of seeds."""
        features = self.fitted.features([seed for pair in pairs for seed in pair])
        return features[0::2] - features[1::2]

    def choose(
        self, candidate_seeds: Sequence[int], count: int, pending: Sequence[tuple[int, int]] = ()
    ) -> list[tuple[int, int, float]]:
        """Choose pairs of distinct seeds.

        Args:
            candidate_seeds: seeds of the candidates.
            count: number of pairs.
            pending: pairs of seeds that are planned already and have no label yet.
        Returns: first seed, second seed and expected reduction of the direction's variance of each pair.
        Raises: ValueError if there are too few candidates.
        """
        chosen_pairs = choose_pairs(
            self.posterior,
            self.fitted.features(candidate_seeds),
            count,
            self.differences(pending) if pending else None,
        )
        return [
            (candidate_seeds[pair.first], candidate_seeds[pair.second], pair.reduction)
            for pair in chosen_pairs
        ]

    def assess(self, random_pairs: Collection[tuple[int, int]]) -> dict[str, Any]:
        """Assess how certain the reward is.

        Args: random_pairs: pairs that were chosen at random, as `pair_of` returns them.
        Returns: JSON values: number of labels, certainty, agreement of halves, and the accuracy on labels of
            random pairs by fits to the other folds, None without such labels.
        """
        fit = self.fitted.fit
        pairs = [pair_of(label) for label in fit.labels]
        number_of_pair = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
        differences = self.differences([(label.winner, label.loser) for label in fit.labels])
        is_random = np.array([pair in random_pairs for pair in pairs])
        accuracy = None
        # Pairs that the reward chose itself are harder than others, so they would understate the accuracy.
        if is_random.any():
            random_labels = [label for label, random in zip(fit.labels, is_random, strict=True) if random]
            accuracy = rate(fit.margins[is_random] > 0, random_labels)
        return {
            "labels": len(fit.labels),
            "certainty": self.posterior.certainty,
            "half_cosine": half_cosine(
                differences,
                np.array([number_of_pair[pair] for pair in pairs]),
                fit.ridge,
                self.posterior.to_direction,
            ),
            "random_labels": int(is_random.sum()),
            "accuracy": None if accuracy is None else accuracy["accuracy"],
            "accuracy_interval": None if accuracy is None else list(accuracy["interval_95"]),
        }
