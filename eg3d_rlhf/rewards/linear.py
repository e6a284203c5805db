"""Linear reward on principal components of observations, for tens of labels instead of thousands.

The generator gives as many unlabelled observations as wanted. Their principal components reduce an
observation to K features, of which labels then determine a linear function:

    f(x) = C (x - m) / s           features [K]; m is the mean, the rows of C are the components
    r(x) = b . f(x)                reward
    P(winner, loser) = 1 / (1 + exp(-b . (f(winner) - f(loser))))      logistic regression on differences

All features are divided by the same number s, the standard deviation along the first component. They are not
whitened: a component with little variance then needs a large weight, which the ridge penalty makes unlikely.
The ridge is chosen by five-fold cross-validation of the log loss. The posterior of b is approximated by a
normal distribution (Laplace), with the inverse Hessian of the penalised loss as its covariance.

Shapes: N samples, D entries of an observation, K components, P labelled pairs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import UNLABELLED_SAMPLES
from eg3d_rlhf.generators import Generator, LoadedGenerator
from eg3d_rlhf.preferences.dataset import common_value, fold_labels
from eg3d_rlhf.preferences.labels import Preference, labels_hash
from eg3d_rlhf.rewards.cache import ObservationCache, cache_file, observe_seeds
from eg3d_rlhf.rewards.evaluation import fit_temperature, rate
from eg3d_rlhf.rewards.linear_network import LINEAR, LinearReward
from eg3d_rlhf.rewards.observations import Observation, observation_of
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.rewards.stated_accuracy import CONTROL

COMPONENTS = 64  # largest number of principal components, K
FOLDS = 5
UNLABELLED = 600  # unlabelled samples from which the components are computed
RESOLUTION = 32  # grid points per axis of the complete cube, of which the reward reads a crop
# Candidates of the ridge. Smaller ones were tried and left out: with 25 to 100 of the bundled labels, the
# cross-validation chose them by chance, and the accuracy on other labels fell by .01 to .02.
RIDGES = tuple(float(ridge) for ridge in 10.0 ** np.arange(1, 3.01, 0.5))
MIN_LABELS = 10  # labels of pairs; with fewer, a fold has a single pair
# Observations from which the components are computed. More hardly change them, and the time grows with the
# cube of their number.
_MOST_OBSERVATIONS = 1200
_CHUNK = 4096  # entries of an observation that are converted to float32 at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrincipalComponents:
    """Principal components of observations, with the standard deviation along the first one."""

    mean: np.ndarray  # [D], float32
    components: np.ndarray  # unit vectors [K, D], float32, by descending variance
    scale: float  # standard deviation along the first component
    explained: float  # share of the variance that the components explain, 0..1

    def project(self, store: ObservationCache, seeds: Sequence[int]) -> np.ndarray:
        """Compute the features [N, K], float64, of the observations of seeds."""
        features = [
            # [64, ...] -> [64, D] -> [64, K]; the cached values have
            # half precision, the subtraction of the mean gives float32.
            (store.take(seeds[start : start + 64]).flatten(1).numpy() - self.mean) @ self.components.T
            for start in range(0, len(seeds), 64)
        ]
        # float64, because the fits below solve linear systems
        return np.concatenate(features).astype(np.float64) / self.scale


def principal_components(
    store: ObservationCache, seeds: Sequence[int], count: int = COMPONENTS
) -> PrincipalComponents:
    """Compute the principal components of the observations of seeds.

    With fewer observations than entries, the eigenvectors of the Gram matrix X X^T of the centred
    observations X [N, D] give the components X^T u / |X^T u|. If there are more than 1,200 seeds, an even
    selection of them is used.

    Args:
        store: cache that contains the observations.
        seeds: seeds of the observations.
        count: largest number of components; there are at most N - 1 and at most D.
    Raises: ValueError if all observations are equal.
    """
    if len(seeds) > _MOST_OBSERVATIONS:
        selected = np.linspace(0, len(seeds) - 1, _MOST_OBSERVATIONS).round().astype(int)
        seeds = [seeds[index] for index in selected]
    # half precision, as in the cache, so that full slabs of all samples fit into memory
    observations = torch.cat(
        [store.take(seeds[start : start + 64]).flatten(1).half() for start in range(0, len(seeds), 64)]
    )
    sample_count, entry_count = observations.shape
    # float32 sums: half precision would overflow beyond 65,504
    mean = torch.cat([chunk.float().mean(dim=0) for chunk in observations.split(_CHUNK, dim=1)])
    # The Gram matrix is small, [N, N], where the covariance of the entries would be [D, D].
    # float64 for the sum over chunks, because eigenvalues far below the largest one would vanish in float32.
    gram = torch.zeros(sample_count, sample_count, dtype=torch.float64)
    for start in range(0, entry_count, _CHUNK):
        # [N, 4096] at a time, so that the float32 copy of all observations never exists.
        centred = observations[:, start : start + _CHUNK].float() - mean[start : start + _CHUNK]
        gram += (centred @ centred.T).double()
    # These are eigenvalues of X X^T, thus N - 1 times the variances.
    variances, vectors = torch.linalg.eigh(gram)
    # eigh sorts in ascending order
    variances = variances.flip(0).clamp_min(0)
    vectors = vectors.flip(1)
    if not variances[0] > 0:
        raise ValueError(
            f"linear reward: the observations of all {sample_count} samples are equal. Check the generator"
            " and the crop of the observation."
        )
    # components of rounding errors alone are left out
    usable_count = int((variances > 1e-6 * variances[0]).sum())
    count = min(count, usable_count)
    components = torch.empty(count, entry_count)
    for start in range(0, entry_count, _CHUNK):
        centred = observations[:, start : start + _CHUNK].float() - mean[start : start + _CHUNK]
        # X^T u, computed for one chunk of entries: [K, N] @ [N, chunk].
        components[:, start : start + _CHUNK] = vectors[:, :count].T.float() @ centred
    # X^T u has the length of the singular value
    components /= components.norm(dim=1, keepdim=True)
    return PrincipalComponents(
        mean=mean.numpy(),
        components=components.numpy(),
        # The division by N - 1 gives the sample variance along the first component.
        scale=float((variances[0] / (sample_count - 1)).sqrt()),
        explained=float(variances[:count].sum() / variances.sum()),
    )


def fit_logistic(differences: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit weights b by ridge logistic regression without an intercept, with Newton's method.

    The minimised loss is sum log(1 + exp(-x . b)) + ridge / 2 |b|^2, in which each row x of the differences
    points from the loser to the winner. It is convex, so the minimum is unique.

    Args:
        differences: features of the winners minus features of the losers, [P, K].
        ridge: weight of the penalty, above 0.
    Returns: b [K], and the Hessian of the loss [K, K], whose inverse is Laplace's covariance of b.
    """
    size = differences.shape[1]
    # The loss is convex, so any start leads to the minimum.
    weights = np.zeros(size)

    def loss(candidate: np.ndarray) -> float:
        """Compute the penalised loss."""
        # logaddexp(0, -x) = log(1 + exp(-x)) without overflow for large negative margins.
        return float(np.logaddexp(0, -differences @ candidate).sum() + ridge / 2 * candidate @ candidate)

    for _ in range(100):
        # probability of the opposite order, [P]
        error_probability = np.exp(-np.logaddexp(0, differences @ weights))
        # Gradient of the penalised loss, [K]: sum of -(1 - p) x, plus the ridge term.
        gradient = ridge * weights - differences.T @ error_probability
        # p (1 - p) for each pair, [P]; it is largest for undecided pairs.
        curvature = error_probability * (1 - error_probability)
        # [K, P] @ [P, K] -> [K, K]
        hessian = (differences * curvature[:, None]).T @ differences + ridge * np.eye(size)
        # The ridge makes the Hessian positive definite, also with fewer pairs than features.
        # No inverse is formed: solving is faster and more accurate.
        step = np.linalg.solve(hessian, gradient)
        if np.abs(step).max() < 1e-9 * max(1.0, float(np.abs(weights).max())):
            break
        # A full step may overshoot where the curvature is small.
        step_length = 1.0
        while loss(weights - step_length * step) > loss(weights) and step_length > 1e-6:
            step_length /= 2
        weights = weights - step_length * step
    return weights, hessian


def fit_first_step(differences: np.ndarray, ridge: float) -> np.ndarray:
    """Compute the matrix [K, P] that maps signs of pairs to the first Newton step of `fit_logistic` from 0.

    At b = 0 all probabilities are 1/2, so the step is (X^T X / 4 + ridge)^-1 X^T y / 2 with y = 1 for each
    pair, or y = -1 for a pair with the opposite order. The matrix does not depend on y. Many sets of
    randomised labels therefore need one factorisation.

    Args: differences, ridge: see `fit_logistic`.
    """
    hessian = differences.T @ differences / 4 + ridge * np.eye(differences.shape[1])
    # The gradient at 0 is -X^T y / 2, because every error probability is one half there.
    return np.linalg.solve(hessian, differences.T / 2)


def held_out_margins(differences: np.ndarray, folds: np.ndarray, ridge: float) -> np.ndarray:
    """Compute the margin [P] of each pair by a fit to the pairs of all other folds.

    Args:
        differences: features of the winners minus features of the losers, [P, K].
        folds: number of the fold of each pair, [P].
        ridge: weight of the penalty.
    """
    margins = np.empty(len(differences))
    for fold in np.unique(folds):
        is_held_out = folds == fold
        # Labels of one pair share a fold (see `fold_labels`),
        # so no pair is predicted from its own repetition.
        weights, _ = fit_logistic(differences[~is_held_out], ridge)
        margins[is_held_out] = differences[is_held_out] @ weights
    return margins


def choose_ridge(differences: np.ndarray, folds: np.ndarray, ridges: Sequence[float] = RIDGES) -> float:
    """Return the ridge with the smallest log loss of held-out pairs; of equal ones, the largest.

    Args: differences, folds: see `held_out_margins`; ridges: candidates in ascending order.
    """
    # mean of log(1 + exp(-margin)), the log loss of a held-out pair
    losses = [np.logaddexp(0, -held_out_margins(differences, folds, ridge)).mean() for ridge in ridges]
    # argmin returns the first minimum, which in reversed order belongs to the largest ridge
    return ridges[len(ridges) - 1 - int(np.argmin(losses[::-1]))]


def usable_labels(labels: Sequence[Preference], minimum: int = MIN_LABELS) -> list[Preference]:
    """Return the labels without ties.

    Args: labels: labels of pairs; minimum: smallest number of labels without ties.
    Raises: ValueError if too few labels remain, or if they contradict each other about every pair.
    """
    # A tie has no order, and a logistic regression on differences has no place for it.
    decided_labels = [label for label in labels if not label.tie]
    if not decided_labels and labels:
        raise ValueError(
            f"labels: all {len(labels)} labels are ties, so no sample is preferred. Label pairs"
            " with a visible difference."
        )
    if len(decided_labels) < minimum:
        raise ValueError(
            f"labels: {len(decided_labels)} labels without ties are too few. Label at least {minimum} pairs;"
            " 50 are recommended."
        )
    # net number of answers for the smaller seed of each pair
    margin_by_pair: dict[tuple[int, int], int] = {}
    for label in decided_labels:
        pair = (min(label.winner, label.loser), max(label.winner, label.loser))
        # Two opposite answers to a pair cancel out and leave its net number at 0.
        sign = 1 if label.winner == pair[0] else -1
        margin_by_pair[pair] = margin_by_pair.get(pair, 0) + sign
    if not any(margin_by_pair.values()):
        raise ValueError(
            f"labels: the {len(decided_labels)} labels contradict each other about every pair. Label more"
            " pairs, each of them once."
        )
    return decided_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearFit:
    """Linear reward that was fitted to labels, with its accuracy on held-out folds."""

    network: LinearReward
    ridge: float
    folds: np.ndarray  # number of the fold of each label, [P]
    margins: np.ndarray  # margin of each label by a fit to the other folds, [P]
    labels: Sequence[Preference]  # labels without ties, [P]

    @property
    def accuracy(self) -> dict[str, Any]:
        """Cross-validated accuracy with its 95 % interval, see `evaluation.rate`."""
        return rate(self.margins > 0, self.labels)


def fit_linear(
    pca: PrincipalComponents,
    feature_of_seed: Mapping[int, np.ndarray],
    labels: Sequence[Preference],
    shape: Sequence[int],
    seed: int = 0,
) -> LinearFit:
    """Fit a linear reward to labels on given principal components.

    Args:
        pca: components that the reward reads.
        feature_of_seed: features [K] by the seed of a labelled sample.
        labels: labels of pairs; ties are ignored.
        shape: shape of one sample's observation.
        seed: random seed of the folds.
    Raises: ValueError for too few labels, see `usable_labels`.
    """
    decided_labels = usable_labels(labels)
    differences = np.stack(
        # [P, K]. An offset of the reward cancels in the difference, so none is fitted.
        [feature_of_seed[label.winner] - feature_of_seed[label.loser] for label in decided_labels]
    )
    # The same folds choose the ridge and measure the accuracy; five candidates hardly bias it.
    folds = fold_labels(decided_labels, FOLDS, seed)
    ridge = choose_ridge(differences, folds)
    weights, hessian = fit_logistic(differences, ridge)
    # The fit is written into buffers and not into parameters, so no optimizer can change it.
    network = LinearReward(shape, len(weights))
    network.mean.copy_(torch.from_numpy(pca.mean))
    network.components.copy_(torch.from_numpy(pca.components))
    network.scale.fill_(pca.scale)
    network.weights.copy_(torch.from_numpy(weights))
    # Laplace's approximation: the inverse Hessian at the minimum.
    network.covariance.copy_(torch.from_numpy(np.linalg.inv(hessian)))
    return LinearFit(
        network=network.eval().requires_grad_(False),
        ridge=ridge,
        folds=folds,
        margins=held_out_margins(differences, folds, ridge),
        labels=decided_labels,
    )


def check_labels(generator: LoadedGenerator, labels: Sequence[Preference]) -> float:
    """Check that labels were given for samples of a generator.

    Returns: the truncation psi that the labels state, or 1 if they state none.
    Raises: ValueError if they state another generator, or several values of psi.
    """
    # Labels without a hash are accepted, since earlier files and other tools state none.
    foreign_hashes = sorted(
        {label.generator for label in labels if label.generator not in (None, generator.hash)}
    )
    if foreign_hashes:
        foreign_count = sum(label.generator == foreign_hashes[0] for label in labels)
        raise ValueError(
            f"labels: {foreign_count} labels belong to the generator {foreign_hashes[0][:12]}..., but"
            f" {generator.path.name} is the generator {generator.hash[:12]}.... Pass the generator of the"
            " labels with --network, or label samples of this one (eg3d-rlhf label)."
        )
    psi = common_value(labels, "psi")
    # psi 1 stands for samples without truncation.
    return 1.0 if psi is None else float(psi)


def slab_of(generator: Generator, resolution: int) -> Observation:
    """Return the σ slab that a linear reward reads, with the crop that rewards of this generator have."""
    return observation_of("sigma", generator, resolution=resolution)


def observe_samples(
    generator: LoadedGenerator,
    observation: Observation,
    seeds: Iterable[int],
    *,
    psi: float,
    cutoff: int | None = 14,
    cache: Path | None = None,
    on_observed: Callable[[int], None] | None = None,
) -> ObservationCache:
    """Observe samples, or read their observations from a cache, with the fastest operators of this machine.

    Args:
        generator: generator of the samples.
        observation: kind of observation.
        seeds: seeds of the samples; repetitions are allowed.
        psi: truncation psi of the samples.
        cutoff: number of layers whose latents are truncated; None: all layers.
        cache: folder in which observations are stored; None: memory only.
        on_observed: function that is called with the number of seeds after each batch.
    """
    cache_path = None
    if cache is not None:
        # Rounding differs between operators, so these values must not mix with those of other rewards.
        cache_path = cache_file(cache, f"{generator.hash}-auto", observation, psi, cutoff)
    store = ObservationCache(
        observe_seeds(generator.generator, observation, psi=psi, cutoff=cutoff, ops="auto"), cache_path
    )
    if store.fill(seeds, on_drawn=on_observed):
        store.save()
    return store


def labelled_seeds(labels: Iterable[Preference]) -> list[int]:
    """Return the seeds of labels without repetitions, in ascending order."""
    return sorted({seed for label in labels for seed in (label.winner, label.loser)})


def unlabelled_seeds(count: int, labels: Iterable[Preference]) -> list[int]:
    """Return the seeds of unlabelled samples, without seeds that have labels."""
    # Labels may use any seed that is not held out, also one of this range.
    # A labelled sample must not count twice in the principal components.
    excluded_seeds = set(labelled_seeds(labels))
    candidates = range(UNLABELLED_SAMPLES, UNLABELLED_SAMPLES + count + len(excluded_seeds))
    return [seed for seed in candidates if seed not in excluded_seeds][:count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedReward:
    """Linear reward with the samples from which it was fitted."""

    reward: Reward
    fit: LinearFit
    unlabelled: Sequence[int]  # seeds of the unlabelled samples, [N]
    unlabelled_features: np.ndarray  # features of these samples, [N, K]
    store: ObservationCache  # observations of all samples, labelled ones included
    pca: PrincipalComponents

    def features(self, seeds: Sequence[int]) -> np.ndarray:
        """Compute the features [M, K] of samples, which are observed if necessary."""
        self.store.fill(seeds)
        return self.pca.project(self.store, seeds)


def fit_linear_reward(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    *,
    unlabelled: int = UNLABELLED,
    resolution: int = RESOLUTION,
    seed: int = 0,
    cache: Path | None = None,
    control: str = "",
    on_observed: Callable[[int], None] | None = None,
) -> Reward:
    """Fit a linear reward to labels of a generator's samples.

    Args:
        generator: generator of the labelled samples.
        labels: labels of pairs; ties are ignored.
        unlabelled: number of unlabelled samples for the principal components.
        resolution: number of grid points per axis of the complete cube; the reward reads a crop of it.
        seed: random seed of the folds.
        cache: folder in which observations are stored; None: memory only.
        control: kind of control that the labels are, which the reward's file states; '' if they are none.
        on_observed: function that is called with the number of samples after each batch.
    Returns: the reward, with its cross-validated accuracy in the provenance.
    Raises: ValueError for labels of another generator, and for too few labels.
    """
    psi = check_labels(generator, labels)
    decided_labels = usable_labels(labels)
    seeds = [*labelled_seeds(decided_labels), *unlabelled_seeds(unlabelled, decided_labels)]
    observation = slab_of(generator.generator, resolution)
    store = observe_samples(generator, observation, seeds, psi=psi, cache=cache, on_observed=on_observed)
    return fit_observed(
        generator, labels, observation, store, unlabelled=unlabelled, seed=seed, control=control
    ).reward


def fit_observed(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    observation: Observation,
    store: ObservationCache,
    *,
    unlabelled: int = UNLABELLED,
    seed: int = 0,
    control: str = "",
) -> FittedReward:
    """Fit a linear reward to labels, with observations that several fits share.

    Args:
        generator, labels, unlabelled, seed, control: see `fit_linear_reward`.
        observation: observation that the reward reads.
        store: observations of the samples; those that are missing are added.
    Raises: ValueError for labels of another generator, and for too few labels.
    """
    psi = check_labels(generator, labels)
    decided_labels = usable_labels(labels)
    seeds_without_labels = unlabelled_seeds(unlabelled, decided_labels)
    seeds = [*labelled_seeds(decided_labels), *seeds_without_labels]
    store.fill(seeds)
    pca = principal_components(store, seeds)
    features = pca.project(store, seeds)
    feature_of_seed = dict(zip(seeds, features, strict=True))
    fit = fit_linear(pca, feature_of_seed, decided_labels, observation.shape, seed)
    unlabelled_features = features[len(seeds) - len(seeds_without_labels) :]
    # [U, K] @ [K] -> [U]: raw scores of unlabelled samples, which later standardise the reward.
    scores = unlabelled_features @ fit.network.weights.numpy()
    return FittedReward(
        reward=make_reward(fit, observation, generator, labels, psi, scores, seed, control),
        fit=fit,
        unlabelled=seeds_without_labels,
        unlabelled_features=unlabelled_features,
        store=store,
        pca=pca,
    )


def make_reward(
    fit: LinearFit,
    observation: Observation,
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    psi: float,
    unlabelled_scores: np.ndarray,
    seed: int = 0,
    control: str = "",
) -> Reward:
    """Make a reward of a fit, with the facts that a reward's file states.

    Args:
        fit: result of `fit_linear`.
        observation: observation that the reward reads.
        generator: generator of the labelled samples.
        labels: all labels, with ties.
        psi: truncation psi of the samples.
        unlabelled_scores: scores of unlabelled samples, for their mean and standard deviation.
        seed, control: see `fit_linear_reward`.
    """
    # Distinct pairs and not labels, because repeated answers are no further evidence.
    pair_count = fit.accuracy["pairs"]
    provenance = {
        "generator": generator.hash,
        "architecture": generator.generator.architecture,
        "psi": psi,
        "truncation_cutoff": 14,
        "labels": labels_hash(labels),
        "preset": LINEAR,
        "seed": seed,
        "ridge": fit.ridge,
        # The margins are held-out ones. Those of the training would make the reward look too certain.
        "temperature": fit_temperature(fit.margins),
        # Every pair is held out once, see `held_out_margins`.
        "test_accuracy": fit.accuracy,
        "pairs": {"train": pair_count, "val": pair_count, "test": pair_count},
        "cross_validation": FOLDS,
        "score_mean": float(unlabelled_scores.mean()),
        "score_std": float(unlabelled_scores.std()),
    }
    if control:
        provenance[CONTROL] = control
    return Reward(observation, fit.network, provenance).eval().requires_grad_(False)
