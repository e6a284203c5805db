"""Candidate directions for the steering of latents, and the test whether labels determine a direction.

There are three candidates:

    reward-z    ridge regression of a reward's scores on z
    reward-w    the same on w, which is whitened by the covariance of the samples
    labels-z    ridge logistic regression of the labels on differences of z

The scores are standardised and clipped before the regression. From below they are clipped at -1, so that a
few very bad samples do not decide. From above they are clipped at a quantile, so that all good samples count
as equally good: the differences among them are mostly differences of identity and noise of the reward, and a
direction that follows them moves good samples for nothing. See docs/lab-book/2026-11-steering.md for the
measurements. The reward is fitted to the same labels (`eg3d_rlhf.rewards.linear`), or it is a trained one.

In w, the coefficients b of the whitened coordinates become the direction C^(1/2) b of w, where C is the
covariance of w. This is the smallest move, in standard deviations of the samples, that raises the score. The
normal C^(-1/2) b orders samples slightly better, but points along combinations of w that hardly vary: moved
along it by one standard deviation, the bundled heads lost 4 % of their error instead of 50 to 83 %.

The test splits the labels into two disjoint halves, and compares the directions of both halves by their
cosine. The folds of a cross-validation cannot serve for that, because they share three quarters of their
data.

Shapes: S samples, N of them labelled; Z = z_dim; W = w_dim, of which V directions have variance; K features;
P labelled pairs; R sets of labels.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from eg3d_rlhf.preferences.dataset import pair_of
from eg3d_rlhf.preferences.labels import Preference, invert
from eg3d_rlhf.rewards.linear import fit_first_step, fit_logistic

# Names of the candidates, and the space of each. A later one must be significantly more accurate.
CANDIDATES = {"reward-z": "z", "reward-w": "w", "labels-z": "z"}
RIDGE = 10.0  # of all regressions on latents
LOWEST = -1.0  # standardised score at which scores are clipped from below
UPPER_QUANTILE = (
    0.55  # quantile of the scores at which they are clipped from above, as in the preset of tuning
)
SPLITS = 20  # splits of the labels into halves
RANDOMISED = 200  # sets of randomised labels in the test
QUANTILE = 0.95  # of the cosines under randomised labels, which the labels must exceed


def clip_scores(scores: np.ndarray) -> np.ndarray:
    """Standardise scores [S] or [S, R] over the samples, clip them, and centre the result.

    The bounds are LOWEST and the quantile UPPER_QUANTILE. Equal scores become 0.
    """
    standardised = (scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), 1e-12)
    clipped = np.clip(standardised, LOWEST, np.quantile(standardised, UPPER_QUANTILE, axis=0))
    # The regression has no intercept, so an offset would add noise to the direction.
    return clipped - clipped.mean(axis=0)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [D] or columns [D, R] to length 1; a vector of length 0 stays 0."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Latents and reward features of samples, in the order of their seeds."""

    seeds: Sequence[int]  # [S]
    z: np.ndarray  # latents, scaled to the length sqrt(Z), [S, Z]
    w: np.ndarray  # style vectors of the first layer after truncation, [S, W]
    features: np.ndarray | None  # features of the linear reward, [S, K]; None with a trained reward
    scores: np.ndarray | None  # scores of a trained reward, [S]; None without one
    reward_ridge: float = 1.0  # ridge of the linear reward

    @cached_property
    def index(self) -> dict[int, int]:
        """Index of each seed."""
        return {seed: index for index, seed in enumerate(self.seeds)}

    def pairs(self, labels: Sequence[Preference]) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices [P] of the winners and of the losers."""
        return (
            np.array([self.index[label.winner] for label in labels]),
            np.array([self.index[label.loser] for label in labels]),
        )

    @cached_property
    def w_mean(self) -> np.ndarray:
        """Mean style vector, [W]."""
        return self.w.mean(axis=0)

    @cached_property
    def principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes [W, V] of w, and the standard deviation [V] along each, without axes of rounding."""
        # np.cov expects variables in rows, [W, S]. eigh returns ascending variances, so the last one is the
        # largest.
        variances, vectors = np.linalg.eigh(np.cov(self.w.T))
        has_variance = variances > 1e-6 * variances[-1]
        return vectors[:, has_variance], np.sqrt(variances[has_variance])

    def positions(self, candidate: str) -> np.ndarray:
        """Return the coordinates in which a candidate is fitted: z [S, Z], or whitened w [S, V]."""
        if CANDIDATES[candidate] == "z":
            return self.z
        axes, axis_stds = self.principal_axes
        # [S, W] @ [W, V] -> [S, V], each column with variance 1
        return (self.w - self.w_mean) @ axes / axis_stds


class Fitter:
    """Fits the direction of one candidate to labels of samples.

    Args: samples: all samples; candidate: name of the candidate.
    """

    def __init__(self, samples: Samples, candidate: str):
        self.samples = samples
        self.candidate = candidate
        self.positions = samples.positions(candidate)  # [S, D], D is Z or V
        # The regression is linear in the scores, so it is factorised once for all sets of labels.
        size = self.positions.shape[1]
        # maps scores [S] to the coefficients of their ridge regression on the positions, [D, S]
        # (X^T X + ridge)^-1 X^T, which is [D, D]^-1 [D, S]
        self._regression = np.linalg.solve(
            self.positions.T @ self.positions + RIDGE * np.eye(size), self.positions.T
        )

    @property
    def uses_labels(self) -> bool:
        """True if the direction depends on the labels, and not on a trained reward alone."""
        return self.candidate == "labels-z" or self.samples.scores is None

    def fit(self, winners: np.ndarray, losers: np.ndarray) -> np.ndarray:
        """Fit the unit direction [D], in the coordinates of `positions`, to pairs of indices [P]."""
        if self.candidate == "labels-z":
            # Only the direction counts. The length depends on the ridge and on the number of labels.
            return unit(fit_logistic(self.positions[winners] - self.positions[losers], RIDGE)[0])
        scores = self.samples.scores
        if scores is None:
            features = self.samples.features
            assert features is not None
            scores = (
                # [S, K] @ [K] -> [S]: the reward scores all samples, also those without labels. The
                # regression on latents therefore has S rows and not P.
                features @ fit_logistic(features[winners] - features[losers], self.samples.reward_ridge)[0]
            )
        return unit(self._regression @ clip_scores(scores))

    def fit_many(self, winners: np.ndarray, losers: np.ndarray, signs: np.ndarray) -> np.ndarray:
        """Fit unit directions [D, R] to R sets of labels of the same pairs, by one Newton step each.

        Args:
            winners, losers: indices [P] of the samples of each pair.
            signs: 1, or -1 for a pair whose order is inverted, [P, R].
        """
        if self.candidate == "labels-z":
            return unit(fit_first_step(self.positions[winners] - self.positions[losers], RIDGE) @ signs)
        features = self.samples.features
        assert features is not None
        # One step from 0 suffices here: with few labels, all probabilities stay near one half.
        # [K, P], the same matrix for every set of randomised labels
        first_step = fit_first_step(features[winners] - features[losers], self.samples.reward_ridge)
        # [K, P] @ [P, R] -> [K, R]; then [S, R] scores, and [D, R] directions.
        return unit(self._regression @ clip_scores(features @ (first_step @ signs)))

    def held_out_margins(self, winners: np.ndarray, losers: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Compute by how much each winner lies farther along the direction of the other folds, [P]."""
        margins = np.empty(len(winners))
        for fold in np.unique(folds):
            is_held_out = folds == fold
            # Unlabelled samples take part in every fold. They contain
            # no information about the order of held-out labels.
            direction = self.fit(winners[~is_held_out], losers[~is_held_out])
            coordinates = self.coordinates(direction)
            margins[is_held_out] = coordinates[winners[is_held_out]] - coordinates[losers[is_held_out]]
        return margins

    def to_latent(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Convert a direction [D] to latents: a unit vector [Z] or [W], mean, and standard deviation."""
        if CANDIDATES[self.candidate] == "z":
            return unit(direction), np.zeros(len(direction)), 1.0
        axes, axis_stds = self.samples.principal_axes
        # The smallest move that raises the whitened score is C^(1/2) b, see the module's docstring.
        vector = unit(axes @ (axis_stds * direction))
        return vector, self.samples.w_mean, float(((self.samples.w - self.samples.w_mean) @ vector).std())

    def coordinates(self, direction: np.ndarray) -> np.ndarray:
        """Compute the coordinates [S] of all samples by which a steering along `direction` moves them."""
        vector, mean, std = self.to_latent(direction)
        # Standardised, so that a threshold has the same meaning in both spaces.
        latents = self.samples.z if CANDIDATES[self.candidate] == "z" else self.samples.w
        return (latents - mean) @ vector / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfCosines:
    """Agreement of the directions of two disjoint halves of the labels."""

    labels: float  # mean cosine over the splits
    randomised: np.ndarray  # the same for each set of randomised labels, [RANDOMISED]

    @property
    def bound(self) -> float:
        """Cosine that only 5 % of the sets of randomised labels exceed."""
        return float(np.quantile(self.randomised, QUANTILE))

    @property
    def is_above_randomised(self) -> bool:
        """True if the labels agree more than randomised labels do."""
        return self.labels > self.bound


def half_cosines(fitter: Fitter, labels: Sequence[Preference], seed: int = 0) -> HalfCosines:
    """Compare the directions of disjoint halves of the labels, for these labels and for randomised ones.

    All labels of one pair share a half, and are inverted together where labels are randomised, because
    repeated answers to one pair agree in any case.

    Args: fitter: candidate; labels: labels without ties; seed: random seed of the splits.
    """
    # The last number separates this random stream from others with the same seed.
    rng = np.random.default_rng([seed, len(labels), 7])
    # Sorted, because the order of a set of tuples is no part of the language.
    pairs = sorted({pair_of(label) for label in labels})
    pair_index = {pair: index for index, pair in enumerate(pairs)}
    index_of_label = np.array([pair_index[pair_of(label)] for label in labels])
    winners, losers = fitter.samples.pairs(labels)
    # column 0: the labels themselves
    pair_signs = np.concatenate(
        [np.ones((len(pairs), 1)), rng.choice([-1.0, 1.0], size=(len(pairs), RANDOMISED))], axis=1
    )
    signs = pair_signs[index_of_label]  # [P, 1 + RANDOMISED]
    # The splits are the same for all sets of labels, so that only the labels differ.
    cosines = np.zeros(1 + RANDOMISED)
    for _ in range(SPLITS):
        # Halves of equal size, up to one pair.
        is_first = rng.permutation(len(pairs)) < len(pairs) // 2
        # Pairs are drawn, and all labels of a pair follow.
        directions = [
            fitter.fit_many(winners[in_half], losers[in_half], signs[in_half])
            for in_half in (is_first[index_of_label], ~is_first[index_of_label])
        ]
        # Columns have length 1, so the sum of products is the cosine, [1 + RANDOMISED].
        cosines += (directions[0] * directions[1]).sum(axis=0) / SPLITS
    return HalfCosines(labels=float(cosines[0]), randomised=cosines[1:])


def randomise(labels: Sequence[Preference], rng: np.random.Generator) -> list[Preference]:
    """Return labels whose order is inverted with probability one half, for all labels of a pair together."""
    pairs = sorted({pair_of(label) for label in labels})
    # one draw for each pair, see `half_cosines`
    is_inverted = dict(zip(pairs, rng.random(len(pairs)) < 0.5, strict=True))
    return [invert(label) if is_inverted[pair_of(label)] else label for label in labels]
