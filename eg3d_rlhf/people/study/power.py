"""Computes the number of trials that a study needs, and checks the coverage of its intervals.

The number comes from a formula: the power of the exact binomial test against 0.5, with ties, and with trials
that share annotators and latents. The coverage comes from simulated studies with known truth: a true
preference, a side bias, and annotators and latents that differ.

Letters: S studies, N trials, A annotators, L latents.
"""

import functools
import math
from dataclasses import asdict, dataclass

import numpy as np

from training.config import check_knobs, knob

# Gauss-Hermite quadrature: nodes and weights of integrals over a standard normal distribution.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # the sum of probabilities is 1
_MOST = 100_000  # largest number of decided trials; smaller differences need more than a study can collect
_rare_power_knob = functools.partial(knob, group="Power", rare=True)


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """Effect that the study must be able to show, and expected properties of its trials."""

    true_rate: float = knob(
        0.6,
        "Win rate among decided trials that the study must be able to show.",
        "Power",
        metavar="0..1",
        low=0,
        high=1,
    )
    alpha: float = _rare_power_knob(
        0.05,
        "Probability of a false alarm; intervals have the level 1 - alpha.",
        metavar="0..1",
        above=0,
        below=1,
    )
    power: float = _rare_power_knob(
        0.8, "Probability of showing the true win rate.", metavar="0..1", above=0, below=1
    )
    tie_share: float = _rare_power_knob(0.1, "Expected share of ties.", metavar="0..1", low=0, below=1)
    annotators: int = 1
    annotators_per_pair: int = 1
    annotator_icc: float = _rare_power_knob(
        0.01, "Expected correlation of trials of the same annotator.", metavar="0..1", low=0, below=1
    )
    latent_icc: float = _rare_power_knob(
        0.2, "Expected correlation of trials of the same pair.", metavar="0..1", low=0, below=1
    )

    def __post_init__(self):
        check_knobs(self)
        # At 0 the power is trivial, and at 0.5 there is nothing to show.
        if self.true_rate in (0, 0.5):
            raise ValueError(
                f"true_rate must lie in 0..1 and differ from 0.5, got {self.true_rate}. Use the smallest win"
                " rate that would matter."
            )
        if self.power <= self.alpha:
            raise ValueError(
                f"power must exceed alpha, got {self.power} and {self.alpha}. Common values are 0.8 and 0.05."
            )
        if not 1 <= self.annotators_per_pair <= self.annotators:
            wrong = f"must lie in 1..annotators = {self.annotators}, got {self.annotators_per_pair}"
            raise ValueError(f"annotators_per_pair {wrong}. Ask more annotators, or fewer of them per pair.")


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Result of the power calculation."""

    options: PowerOptions
    decided: int  # number of decided trials if answers were independent
    attained: float  # power with that number
    design_effect: float  # number of clustered trials that are equivalent to one independent trial
    trials: int  # number of trials with ties and clustering, a multiple of annotators_per_pair
    per_annotator: int  # trials of each annotator, rounded up


def exact_power(n, true_rate: float, alpha: float = 0.05):
    """Compute the probability [..] that the two-sided exact binomial test of n [..] decided trials rejects
    0.5 if the win rate is `true_rate`.

    Under 0.5 the distribution is symmetric, so the test rejects if k <= c or k >= n - c, with the largest c
    for which 2 P(K <= c) <= alpha. If even c = 0 is too large, the test never rejects.
    """
    from scipy.stats import binom

    c = binom.ppf(alpha / 2, n, 0.5).astype(np.int64)  # smallest c with P(K <= c) >= alpha / 2
    # ppf gives the first c that reaches alpha / 2, which may exceed it.
    c = np.where(binom.cdf(c, n, 0.5) <= alpha / 2, c, c - 1)
    return np.where(c < 0, 0.0, binom.cdf(c, n, true_rate) + binom.sf(n - c - 1, n, true_rate))


def decided_trials(true_rate: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the smallest number of decided trials from which on the power is always sufficient. The power is
    no monotonic function of n, because the test is discrete.

    Raises: ValueError if more than _MOST trials would be needed.
    """
    from scipy.special import ndtri

    # Normal approximation of the number, as the first upper bound of the search.
    roughly = (ndtri(1 - alpha / 2) + ndtri(power)) ** 2 / (4 * (true_rate - 0.5) ** 2)
    if roughly > _MOST:
        raise ValueError(
            f"decided_trials: a true rate of {true_rate} is too close to 0.5: no study can show it. Use a"
            " larger difference."
        )
    upper = max(64, int(roughly))
    while True:
        short = np.flatnonzero(~(exact_power(np.arange(1, upper + 1), true_rate, alpha) >= power))
        # The drops of the power are short compared with a doubling of n, so none comes after this.
        if len(short) == 0 or short[-1] < upper // 2:
            # Index i means n = i + 1, and the next number is the first from which on the power suffices.
            return int(short[-1]) + 2 if len(short) else 1
        upper *= 2


def sample_size(options: PowerOptions) -> SampleSize:
    """Compute the number of trials that the study needs.

    The design effect of crossed clusters is 1 + (m - 1) annotator_icc + (r - 1) latent_icc, with m trials per
    annotator and r annotators per pair. m grows with the number of trials, so the equation is solved for it:
    n = decided (1 - annotator_icc + (r - 1) latent_icc) / (1 - decided annotator_icc / annotators), divided
    by the share of decided trials.

    Raises: ValueError if no number of trials is enough for this number of annotators.
    """
    decided = decided_trials(options.true_rate, options.alpha, options.power)
    r = options.annotators_per_pair
    k = options.annotators
    icc = options.annotator_icc if k > 1 else 0.0  # a study with one annotator is about that annotator only
    remainder = 1 - decided * icc / k
    # Near 0 the number of trials goes to infinity.
    if remainder <= 0.02:
        raise ValueError(
            f"annotators: a correlation of {icc:g} within annotators needs more than"
            f" {math.ceil(decided * icc / 0.98)}"
            f" annotators, got {k}. Ask more people, or use a larger difference."
        )
    # number of decided trials with clustering
    effective = max(decided, decided * (1 - icc + (r - 1) * options.latent_icc) / remainder)
    # Ties decide nothing, so more trials are needed.
    trials = math.ceil(effective / (1 - options.tie_share))
    # Rounded up to a multiple of r, so that every pair gets r annotators.
    trials += -trials % r
    return SampleSize(
        options=options,
        decided=decided,
        attained=float(exact_power(decided, options.true_rate, options.alpha)),
        design_effect=effective / decided,
        trials=trials,
        per_annotator=math.ceil(trials / k),
    )


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """Settings of a kind of study that is simulated many times."""

    studies: int = knob(1000, "Number of simulated studies.", "Studies", low=1)
    annotators: int = knob(8, "Annotators per study.", "Studies", low=1, rare=True)
    latents: int = knob(150, "Pairs per study.", "Studies", low=1, rare=True)
    annotators_per_pair: int = knob(2, "Annotators who answer each pair.", "Studies", low=1, rare=True)
    preference: float = knob(
        0.7, "True win rate of b among decided trials.", "Truth", metavar="0..1", above=0, below=1, rare=True
    )
    left_bias: float = knob(
        0.6,
        "Probability of choosing the left of two equal shapes.",
        "Truth",
        metavar="0..1",
        above=0,
        below=1,
        rare=True,
    )
    annotator_sd: float = knob(
        0.4,
        "Standard deviation of the annotators' preferences.",
        "Truth",
        metavar="LOG-ODDS",
        low=0,
        rare=True,
    )
    latent_sd: float = knob(
        0.6, "Standard deviation of the pairs' preferences.", "Truth", metavar="LOG-ODDS", low=0, rare=True
    )
    tie_share: float = knob(0.1, "Share of ties.", "Truth", metavar="0..1", low=0, below=1, rare=True)
    ties: str = knob(
        "half", "Score of ties: half a win, or excluded.", "Studies", choices=("half", "excluded"), rare=True
    )
    random_sides: bool = True  # False: b is always on the left, which shows the effect of a side bias
    seed: int = knob(0, "Random seed of the simulation.", "Studies", low=0)

    def __post_init__(self):
        check_knobs(self)
        if self.annotators_per_pair > self.annotators:
            raise ValueError(
                f"annotators_per_pair must lie in 1..annotators = {self.annotators}, got"
                f" {self.annotators_per_pair}. Use more annotators."
            )

    @property
    def truth(self) -> float:
        """The win rate that a study with random sides estimates, under its rule for ties."""
        return (
            self.preference * (1 - self.tie_share) + 0.5 * self.tie_share
            if self.ties == "half"
            else self.preference
        )


@dataclass(frozen=True)
class SimulatedTrials:
    """Scores of many studies that share one assignment of annotators to latents."""

    scores: np.ndarray  # [S, N], as in eg3d_rlhf.people.study.analysis
    b_left: np.ndarray  # [S, N] bool
    chose_left: np.ndarray  # [S, N] bool; without meaning for ties
    annotator: np.ndarray  # [N]  # index
    latent: np.ndarray  # [N]  # index


def allocation(annotators: int, latents: int, per_pair: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign annotators to trials: every latent gets `per_pair` different annotators, with equal work for
    all.

    Returns: indices of annotators [N] and latents [N].
    """
    latent = np.repeat(np.arange(latents), per_pair)
    # Consecutive trials have consecutive annotators, so the annotators of a latent are different.
    return np.arange(len(latent)) % annotators, latent


def centre(preference: float, bias: float, sd: float) -> float:
    """Return the log-odds of b for an average annotator and pair, without the effect of sides, for which the
    win rate with random sides is `preference`.

    Solves mean over sides s = +-1 and normal u of sigmoid(centre + s bias + sd u) = preference.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    def rate(mu: float) -> float:
        """Compute the win rate for a centre mu by quadrature over u."""
        return float(
            0.5 * (_WEIGHTS * (expit(mu + bias + sd * _NODES) + expit(mu - bias + sd * _NODES))).sum()
        )

    # The rate increases with mu, so the solution is unique; 60 is beyond float64's resolution of
    # probabilities.
    return brentq(lambda mu: rate(mu) - preference, -60, 60)


def simulate(options: SimulationOptions) -> SimulatedTrials:
    """Simulate the trials of all studies. The same seed gives the same trials."""
    from scipy.special import expit, logit

    o = options  # the formulas below stay readable
    rng = np.random.default_rng(options.seed)
    annotator, latent = allocation(o.annotators, o.latents, o.annotators_per_pair)
    shape = (o.studies, len(latent))
    bias = float(logit(o.left_bias))
    b_left = rng.random(shape) < 0.5 if o.random_sides else np.ones(shape, dtype=bool)
    annotator_effect = o.annotator_sd * rng.standard_normal((o.studies, o.annotators))[:, annotator]
    latent_effect = o.latent_sd * rng.standard_normal((o.studies, o.latents))[:, latent]
    log_odds = (
        # The sum of both effects has this standard deviation, so the mean win rate is `preference`.
        centre(o.preference, bias, math.hypot(o.annotator_sd, o.latent_sd))
        + np.where(b_left, bias, -bias)
        + annotator_effect
        + latent_effect
    )
    b_wins = rng.random(shape) < expit(log_odds)
    # Ties are independent of the preference.
    tied = rng.random(shape) < o.tie_share
    scores = np.where(tied, 0.5 if o.ties == "half" else np.nan, b_wins)
    return SimulatedTrials(scores, b_left, b_wins == b_left, annotator, latent)


def coverage(options: SimulationOptions, bootstrap_studies: int = 0, resamples: int = 1000) -> dict:
    """Compute how often each interval covers the truth, and how often it excludes 0.5. With a preference of
    0.5 the latter is the rate of false alarms, otherwise the power.

    Args:
        options: of the simulated studies.
        bootstrap_studies: number of studies for which bootstraps are computed as well, because they are slow.
        resamples: of each bootstrap.
    """
    from eg3d_rlhf.people.study.analysis import cluster_bootstrap, win_rate

    trials = simulate(options)
    rates = win_rate(trials.scores, trials.annotator, trials.latent)
    truth = options.truth
    figures = {
        "options": asdict(options),
        "truth": truth,
        "trials": trials.scores.shape[1],
        "mean_win_rate": float(rates.rate.mean()),
        "sd_win_rate": float(rates.rate.std(ddof=1)) if options.studies > 1 else None,
        "left_share": float(trials.chose_left.mean()),
        "design_effect": float(np.median(rates.design_effect)),
        "intervals": {name: _covered(getattr(rates, name), truth) for name in ("clustered", "wilson")},
    }
    few = min(bootstrap_studies, options.studies)
    for over in ("annotators", "latents", "both") if few else ():
        groups = (trials.annotator, trials.latent, over)
        intervals = [
            cluster_bootstrap(scores, *groups, resamples=resamples, seed=seed)
            for seed, scores in enumerate(trials.scores[:few])
        ]
        # With one annotator or latent there is no such bootstrap.
        if None not in intervals:
            lo, hi = np.array(intervals).T
            figures["intervals"][f"bootstrap_{over}"] = _covered((lo, hi), truth)
    return figures


def _covered(bounds: tuple[np.ndarray, np.ndarray], truth: float) -> dict:
    """Summarise intervals of S studies: coverage, mean width, share that excludes 0.5."""
    lo, hi = bounds
    return {
        "studies": len(lo),
        "coverage": float(((lo <= truth) & (truth <= hi)).mean()),
        "width": float((hi - lo).mean()),
        "rejects_50_percent": float(((lo > 0.5) | (hi < 0.5)).mean()),
    }
