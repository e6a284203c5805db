"""Number of trials that a study needs, and coverage of its intervals.

The number of trials is computed from the power of the exact binomial test against 0.5. It accounts for ties,
and for trials that share annotators and latents. The coverage of the intervals is computed from simulated
studies with a known true preference, a side bias, and differences between annotators and between latents.

Shapes: S studies, N trials, A annotators, L latents.
"""

import functools
import math
from dataclasses import asdict, dataclass

import numpy as np

from training.config import check_knobs, knob

# Nodes and weights of Gauss-Hermite quadrature, with which means over a standard normal distribution are
# computed.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # hermegauss gives weights with the sum sqrt(2 pi)
# Largest number of decided trials (trials without ties). Smaller differences need more trials than a study
# can collect.
_MAX_TRIALS = 100_000
_rare_power_knob = functools.partial(knob, group="Power", rare=True)


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """Effect that a study must be able to show, and expected properties of its trials."""

    true_rate: float = knob(
        0.6,
        "True win rate of the second generator, b, among the trials without ties, that the study must be able"
        " to distinguish from 0.5. A value nearer to 0.5 needs more trials.",
        "Power",
        metavar="0..1",
        low=0,
        high=1,
    )
    alpha: float = _rare_power_knob(
        0.05,
        "Probability of finding a difference between equal generators. Intervals have the level 1 - alpha.",
        metavar="0..1",
        above=0,
        below=1,
    )
    power: float = _rare_power_knob(
        0.8,
        "Probability of finding a difference if the win rate is --true-rate.",
        metavar="0..1",
        above=0,
        below=1,
    )
    tie_share: float = _rare_power_knob(
        0.1, "Expected share of ties among the trials.", metavar="0..1", low=0, below=1
    )
    annotators: int = 1  # number of annotators
    annotators_per_pair: int = 1  # number of different annotators who answer each pair
    annotator_icc: float = _rare_power_knob(
        0.01, "Expected correlation of trials of the same annotator.", metavar="0..1", low=0, below=1
    )
    latent_icc: float = _rare_power_knob(
        0.2, "Expected correlation of trials of the same pair.", metavar="0..1", low=0, below=1
    )

    def __post_init__(self):
        check_knobs(self)
        # At 0 every trial has the same result, and at 0.5 there is no difference to show.
        if self.true_rate in (0, 0.5):
            raise ValueError(
                f"true_rate={self.true_rate} cannot be used, because it must be above 0 and differ from 0.5."
                " Use the smallest win rate whose difference from 0.5 matters to you."
            )
        if self.power <= self.alpha:
            raise ValueError(
                f"power={self.power} must be larger than alpha={self.alpha}. Common values are 0.8 and 0.05."
            )
        if not 1 <= self.annotators_per_pair <= self.annotators:
            raise ValueError(
                f"annotators_per_pair={self.annotators_per_pair} must be between 1 and the number of"
                f" annotators, {self.annotators}. Ask more annotators, or fewer of them per pair."
            )


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Result of the power calculation."""

    options: PowerOptions
    decided: int  # number of trials without a tie that would be needed if all trials were independent
    attained: float  # power with `decided` independent trials
    design_effect: float  # number of clustered trials that are equivalent to one independent trial
    trials: int  # number of trials that are needed, ties included; a multiple of annotators_per_pair
    per_annotator: int  # number of trials of each annotator, rounded up


def exact_power(n, true_rate: float, alpha: float = 0.05):
    """Compute the power of the two-sided exact binomial test against a win rate of 0.5.

    With a win rate of 0.5 the distribution of the number K of wins is symmetric. So the test rejects 0.5 if K
    <= c or K >= n - c, where c is the largest number with 2 P(K <= c) <= alpha. If there is no such c >= 0,
    it never rejects.

    Args:
        n: number of trials without ties, an integer or an array [...].
        true_rate: true win rate.
        alpha: level of the test.

    Returns:
        Probability that the test rejects 0.5, [...].
    """
    from scipy.stats import binom

    # ppf returns the smallest c with P(K <= c) >= alpha / 2. If the probability is larger, c must be one
    # less.
    c = binom.ppf(alpha / 2, n, 0.5).astype(np.int64)
    c = np.where(binom.cdf(c, n, 0.5) <= alpha / 2, c, c - 1)
    return np.where(c < 0, 0.0, binom.cdf(c, n, true_rate) + binom.sf(n - c - 1, n, true_rate))


def decided_trials(true_rate: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the number of trials without ties from which on the power is always sufficient.

    The power does not increase monotonically with the number of trials n, because the test is discrete. The
    result is the smallest number for which the power of it and of all larger numbers is at least `power`.

    Args:
        true_rate: true win rate.
        alpha: level of the test.
        power: required power.

    Raises:
        ValueError: more than _MAX_TRIALS trials would be needed.
    """
    from scipy.special import ndtri

    # The normal approximation of the number is the first upper bound of the search.
    approximate_count = (ndtri(1 - alpha / 2) + ndtri(power)) ** 2 / (4 * (true_rate - 0.5) ** 2)
    if approximate_count > _MAX_TRIALS:
        raise ValueError(
            f"decided_trials: a true win rate of {true_rate} is so close to 0.5 that more than"
            f" {_MAX_TRIALS:,} trials would be needed. Use a win rate that differs more from 0.5."
        )
    upper_bound = max(64, int(approximate_count))
    while True:
        # n starts at 1, so index i belongs to n = i + 1
        powers = exact_power(np.arange(1, upper_bound + 1), true_rate, alpha)
        insufficient_indices = np.flatnonzero(~(powers >= power))
        # The power drops only over short ranges of n. If it is sufficient in the upper half of the range, it
        # is sufficient for all larger n.
        if len(insufficient_indices) == 0 or insufficient_indices[-1] < upper_bound // 2:
            # The last insufficient n is insufficient_indices[-1] + 1, and the result is the next number.
            return int(insufficient_indices[-1]) + 2 if len(insufficient_indices) else 1
        upper_bound *= 2


def sample_size(options: PowerOptions) -> SampleSize:
    """Compute the number of trials that a study needs.

    The design effect is the factor by which the number of trials increases because they share annotators and
    latents. For crossed clusters it is

        1 + (m - 1) annotator_icc + (r - 1) latent_icc,    with m = n / k

    where n is the number of decided trials, k the number of annotators, m the number of trials per annotator,
    and r the number of annotators per pair. Since m depends on n, the equation n = decided * (design effect)
    is solved for n:

        n = decided (1 - annotator_icc + (r - 1) latent_icc) / (1 - decided annotator_icc / k)

    The result is divided by the share of trials that are not ties.

    Raises:
        ValueError: no number of trials is enough for this number of annotators.
    """
    n_decided = decided_trials(options.true_rate, options.alpha, options.power)
    r = options.annotators_per_pair
    k = options.annotators
    # The result of a study with one annotator is valid for this annotator only, so there are no differences
    # between annotators.
    icc = options.annotator_icc if k > 1 else 0.0
    denominator = 1 - n_decided * icc / k
    # When the denominator goes to 0, the number of trials goes to infinity.
    if denominator <= 0.02:
        raise ValueError(
            f"annotators={k} is too small: with a correlation of {icc:g} between trials of one annotator,"
            f" the study needs more than {math.ceil(n_decided * icc / 0.98)} annotators. Ask more annotators,"
            " or use a --true-rate that differs more from 0.5."
        )
    # n of the formula
    n_clustered = max(n_decided, n_decided * (1 - icc + (r - 1) * options.latent_icc) / denominator)
    n_trials = math.ceil(n_clustered / (1 - options.tie_share))
    # -trials % r is the number that is missing to a multiple of r. With it, every pair gets r annotators.
    n_trials += -n_trials % r
    return SampleSize(
        options=options,
        decided=n_decided,
        attained=float(exact_power(n_decided, options.true_rate, options.alpha)),
        design_effect=n_clustered / n_decided,
        trials=n_trials,
        per_annotator=math.ceil(n_trials / k),
    )


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """Settings of a study that is simulated many times."""

    studies: int = knob(1000, "Number of simulated studies.", "Studies", low=1)
    annotators: int = knob(8, "Number of annotators in each study.", "Studies", low=1, rare=True)
    latents: int = knob(150, "Number of pairs in each study.", "Studies", low=1, rare=True)
    annotators_per_pair: int = knob(
        2, "Number of annotators who answer each pair.", "Studies", low=1, rare=True
    )
    preference: float = knob(
        0.7,
        "True win rate of the second generator, b, among the trials without ties.",
        "Truth",
        metavar="0..1",
        above=0,
        below=1,
        rare=True,
    )
    left_bias: float = knob(
        0.6,
        "Probability that an annotator chooses the left one of two equal shapes.",
        "Truth",
        metavar="0..1",
        above=0,
        below=1,
        rare=True,
    )
    annotator_sd: float = knob(
        0.4,
        "Standard deviation of the preference for the second generator, b, between annotators, in log-odds.",
        "Truth",
        metavar="LOG-ODDS",
        low=0,
        rare=True,
    )
    latent_sd: float = knob(
        0.6,
        "Standard deviation of the preference for the second generator, b, between pairs, in log-odds.",
        "Truth",
        metavar="LOG-ODDS",
        low=0,
        rare=True,
    )
    tie_share: float = knob(
        0.1, "Share of ties among the trials.", "Truth", metavar="0..1", low=0, below=1, rare=True
    )
    ties: str = knob(
        "half",
        "Rule for ties: half counts a tie as half a win of each generator, and excluded leaves ties out of"
        " the win rate.",
        "Studies",
        choices=("half", "excluded"),
        rare=True,
    )
    # False puts b always on the left, which shows the effect of a side bias
    random_sides: bool = True
    seed: int = knob(0, "Random seed of the simulation.", "Studies", low=0)

    def __post_init__(self):
        check_knobs(self)
        if self.annotators_per_pair > self.annotators:
            raise ValueError(
                f"annotators_per_pair={self.annotators_per_pair} must not be larger than the number of"
                f" annotators, {self.annotators}. Use more annotators, or fewer of them per pair."
            )

    @property
    def truth(self) -> float:
        """Return the true value of the win rate that a study with random sides estimates."""
        if self.ties == "half":
            return self.preference * (1 - self.tie_share) + 0.5 * self.tie_share
        return self.preference


@dataclass(frozen=True)
class SimulatedTrials:
    """Trials of many simulated studies, which all assign annotators to latents in the same way."""

    scores: np.ndarray  # [S, N] scores, see eg3d_rlhf.people.study.analysis
    b_left: np.ndarray  # [S, N] bool, True if b was on the left
    chose_left: np.ndarray  # [S, N] bool, True if the left shape was preferred; it has no meaning for ties
    annotator: np.ndarray  # [N] index of the annotator
    latent: np.ndarray  # [N] index of the latent


def allocation(
    annotator_count: int, latent_count: int, annotators_per_pair: int
) -> tuple[np.ndarray, np.ndarray]:
    """Assign annotators to trials, so that their numbers of trials differ by at most one.

    Args:
        annotator_count: number of annotators.
        latent_count: number of latents.
        annotators_per_pair: number of different annotators per latent.

    Returns:
        Index of the annotator [N] and of the latent [N] of each trial, with N = latent_count *
        annotators_per_pair.
    """
    latent_indices = np.repeat(np.arange(latent_count), annotators_per_pair)
    # The trials of a latent are consecutive, and so are the indices of their annotators, which therefore
    # differ.
    return np.arange(len(latent_indices)) % annotator_count, latent_indices


def centre(preference: float, bias: float, sd: float) -> float:
    """Return the mean log-odds of b at which the win rate of b with random sides is `preference`.

    The result mu solves

        mean over s and u of sigmoid(mu + s bias + sd u) = preference

    where the side s is +1 or -1 with equal probability, and u has a standard normal distribution.

    Args:
        preference: win rate of b, 0..1.
        bias: increase of the log-odds if b is on the left, and decrease if b is on the right.
        sd: standard deviation of the log-odds between trials.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    def rate(mu: float) -> float:
        """Compute the mean on the left-hand side of the equation by quadrature over u."""
        return float(
            0.5 * (_WEIGHTS * (expit(mu + bias + sd * _NODES) + expit(mu - bias + sd * _NODES))).sum()
        )

    # The rate increases with mu, so there is one solution. At log-odds of +-60 the probability is 0 or 1 in
    # float64.
    return brentq(lambda mu: rate(mu) - preference, -60, 60)


def simulate(options: SimulationOptions) -> SimulatedTrials:
    """Simulate the trials of all studies. Equal options give equal trials."""
    from scipy.special import expit, logit

    o = options  # a short name for the formulas below
    rng = np.random.default_rng(options.seed)
    annotator_indices, latent_indices = allocation(o.annotators, o.latents, o.annotators_per_pair)
    scores_shape = (o.studies, len(latent_indices))
    # the bias in log-odds: 0 if both sides are equally likely
    bias = float(logit(o.left_bias))
    b_left = rng.random(scores_shape) < 0.5 if o.random_sides else np.ones(scores_shape, dtype=bool)
    # one effect per study and annotator [S, A], looked up for each trial: [S, N]
    annotator_effect = o.annotator_sd * rng.standard_normal((o.studies, o.annotators))[:, annotator_indices]
    # one effect per study and latent [S, L], looked up for each trial: [S, N]
    latent_effect = o.latent_sd * rng.standard_normal((o.studies, o.latents))[:, latent_indices]
    log_odds = (
        # The sum of the two effects has the standard deviation hypot(...). `centre` uses it, so that the
        # win rate is `preference`.
        centre(o.preference, bias, math.hypot(o.annotator_sd, o.latent_sd))
        + np.where(b_left, bias, -bias)
        + annotator_effect
        + latent_effect
    )
    # a trial is won by b with the probability that belongs to the log-odds
    b_wins = rng.random(scores_shape) < expit(log_odds)
    # ties occur independently of the preference
    is_tie = rng.random(scores_shape) < o.tie_share
    scores = np.where(is_tie, 0.5 if o.ties == "half" else np.nan, b_wins)
    # the left shape is chosen if b wins on the left, or a wins while b is on the right
    return SimulatedTrials(scores, b_left, b_wins == b_left, annotator_indices, latent_indices)


def coverage(options: SimulationOptions, bootstrap_study_count: int = 0, resample_count: int = 1000) -> dict:
    """Compute how often each interval contains the true win rate, and how often it excludes 0.5.

    With a preference of 0.5, the share of intervals that exclude 0.5 is the rate of false alarms. With
    another preference, it is the power.

    Args:
        options: settings of the simulated studies.
        bootstrap_study_count: number of studies for which bootstrap intervals are computed as well, which is
            slow.
        resample_count: number of resamples of each bootstrap.

    Returns:
        Dict in JSON types: "options", "truth" (true win rate), "trials" (number in each study), mean and
        standard deviation of the estimated win rates, "left_share", median "design_effect", and "intervals"
        (name of an interval -> its coverage, see `_covered`).
    """
    from eg3d_rlhf.people.study.analysis import cluster_bootstrap, win_rate

    trials = simulate(options)
    win_rates = win_rate(trials.scores, trials.annotator, trials.latent)
    true_rate = options.truth
    coverage_json = {
        "options": asdict(options),
        "truth": true_rate,
        "trials": trials.scores.shape[1],
        "mean_win_rate": float(win_rates.rate.mean()),
        "sd_win_rate": float(win_rates.rate.std(ddof=1)) if options.studies > 1 else None,
        "left_share": float(trials.chose_left.mean()),
        "design_effect": float(np.median(win_rates.design_effect)),
        "intervals": {
            interval_name: _covered(getattr(win_rates, interval_name), true_rate)
            for interval_name in ("clustered", "wilson")
        },
    }
    bootstrap_count = min(bootstrap_study_count, options.studies)
    for resampled_clusters in ("annotators", "latents", "both") if bootstrap_count else ():
        bootstrap_arguments = (trials.annotator, trials.latent, resampled_clusters)
        bootstrap_intervals = [
            cluster_bootstrap(scores, *bootstrap_arguments, resample_count=resample_count, seed=seed)
            for seed, scores in enumerate(trials.scores[:bootstrap_count])
        ]
        # With a single annotator or latent, a bootstrap over it gives None.
        if None not in bootstrap_intervals:
            lo, hi = np.array(bootstrap_intervals).T
            coverage_json["intervals"][f"bootstrap_{resampled_clusters}"] = _covered((lo, hi), true_rate)
    return coverage_json


def _covered(interval_ends: tuple[np.ndarray, np.ndarray], true_rate: float) -> dict:
    """Summarise the intervals of S studies.

    Args:
        interval_ends: lower ends [S] and upper ends [S].
        true_rate: true win rate.

    Returns:
        {"studies": S, "coverage": share of intervals that contain `true_rate`, "width": mean width,
        "rejects_50_percent": share of intervals that exclude 0.5}
    """
    lo, hi = interval_ends
    return {
        "studies": len(lo),
        "coverage": float(((lo <= true_rate) & (true_rate <= hi)).mean()),
        "width": float((hi - lo).mean()),
        "rejects_50_percent": float(((lo > 0.5) | (hi < 0.5)).mean()),
    }
