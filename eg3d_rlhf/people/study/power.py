"""How many trials a study needs, and whether its intervals hold.

By formula: power of the exact binomial test against 0.5, with ties, and trials that share annotators and
latents. By simulation: studies whose truth is known, with a true preference, side bias, moods of the
annotators, and latents that differ.

Letters: S studies, N trials, A annotators, L latents.
"""

import functools
import math
from dataclasses import asdict, dataclass

import numpy as np

from training.config import check_knobs, knob

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # of a standard normal
_MOST = 100_000  # decided trials; beyond, the difference is not one that a study can show
_rare_power_knob = functools.partial(knob, group="Power", rare=True)


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """What the study must be able to show, and what is expected of its trials."""

    true_rate: float = knob(
        0.6, "Win rate among decided trials that must be shown.", "Power", metavar="0..1", low=0, high=1
    )
    alpha: float = _rare_power_knob(
        0.05, "False alarms; intervals are of 1 - alpha.", metavar="0..1", above=0, below=1
    )
    power: float = _rare_power_knob(0.8, "Chance of showing the true rate.", metavar="0..1", above=0, below=1)
    tie_share: float = _rare_power_knob(
        0.1, "Share of ties that is expected.", metavar="0..1", low=0, below=1
    )
    annotators: int = 1
    annotators_per_pair: int = 1
    annotator_icc: float = _rare_power_knob(
        0.01, "Correlation within annotators that is expected.", metavar="0..1", low=0, below=1
    )
    latent_icc: float = _rare_power_knob(
        0.2, "Correlation within pairs that is expected.", metavar="0..1", low=0, below=1
    )

    def __post_init__(self):
        check_knobs(self)
        if self.true_rate in (0, 0.5):
            raise ValueError(
                f"true_rate must lie in 0..1 and differ from 0.5, got {self.true_rate}. Name the win rate"
                " that would matter."
            )
        if self.power <= self.alpha:
            raise ValueError(
                f"power must exceed alpha, got {self.power} and {self.alpha}. Usual are 0.8 and 0.05."
            )
        if not 1 <= self.annotators_per_pair <= self.annotators:
            wrong = f"must lie in 1..annotators = {self.annotators}, got {self.annotators_per_pair}"
            raise ValueError(f"annotators_per_pair {wrong}. Ask more annotators, or fewer of them per pair.")


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """The answer, and how it came about."""

    options: PowerOptions
    decided: int  # decided trials that independent answers would need
    attained: float  # power with just so many
    design_effect: float  # how many clustered trials are worth one independent one
    trials: int  # with ties and clustering, a multiple of annotators_per_pair
    per_annotator: int


def exact_power(n, true_rate: float, alpha: float = 0.05):
    """Chance [..] that the two-sided exact binomial test of n [..] decided trials rejects 0.5 when the win
    rate is true_rate.

    Under 0.5 the distribution is symmetric, so the test rejects at k <= c and k >= n - c with the largest c
    for which 2 P(K <= c) <= alpha; never where not even c = 0 will do.
    """
    from scipy.stats import binom

    c = binom.ppf(alpha / 2, n, 0.5).astype(np.int64)  # smallest with P >= alpha / 2
    c = np.where(binom.cdf(c, n, 0.5) <= alpha / 2, c, c - 1)
    return np.where(c < 0, 0.0, binom.cdf(c, n, true_rate) + binom.sf(n - c - 1, n, true_rate))


def decided_trials(true_rate: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Fewest decided trials from which on the power never falls below the wanted one again; the power saws up
    and down with n.
    """
    from scipy.special import ndtri

    # by the normal approximation
    roughly = (ndtri(1 - alpha / 2) + ndtri(power)) ** 2 / (4 * (true_rate - 0.5) ** 2)
    if roughly > _MOST:
        raise ValueError(
            f"decided_trials: expected a true rate that can be told from 0.5, got {true_rate}. Name a larger"
            " difference."
        )
    upper = max(64, int(roughly))
    while True:
        short = np.flatnonzero(~(exact_power(np.arange(1, upper + 1), true_rate, alpha) >= power))
        if len(short) == 0 or short[-1] < upper // 2:  # the teeth are short against a doubling of n
            return int(short[-1]) + 2 if len(short) else 1
        upper *= 2


def sample_size(options: PowerOptions) -> SampleSize:
    """Trials that the study needs.

    Design effect of crossed clusters: 1 + (m - 1) annotator_icc + (r - 1) latent_icc, m trials an annotator
    and r annotators a pair. As m grows with the trials, the equation is solved for them: n = decided
    (1 - annotator_icc + (r - 1) latent_icc) / (1 - decided annotator_icc / annotators), over the share that
    is decided.
    """
    decided = decided_trials(options.true_rate, options.alpha, options.power)
    r = options.annotators_per_pair
    k = options.annotators
    icc = options.annotator_icc if k > 1 else 0.0  # one annotator's study speaks of that annotator
    room = 1 - decided * icc / k
    if room <= 0.02:
        wrong = (
            f"expected more than {math.ceil(decided * icc / 0.98)} of them, got {k}, with a correlation of"
            f" {icc:g} within annotators"
        )
        raise ValueError(f"annotators: {wrong}. Ask more people, or name a larger difference.")
    # decided trials with clustering
    effective = max(decided, decided * (1 - icc + (r - 1) * options.latent_icc) / room)
    trials = math.ceil(effective / (1 - options.tie_share))
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
    """One kind of study, simulated many times."""

    studies: int = knob(1000, "How many are simulated.", "Studies", low=1)
    annotators: int = knob(8, "Per study.", "Studies", low=1, rare=True)
    latents: int = knob(150, "Pairs per study.", "Studies", low=1, rare=True)
    annotators_per_pair: int = knob(2, "To judge each pair.", "Studies", low=1, rare=True)
    preference: float = knob(
        0.7, "True win rate of b among decided trials.", "Truth", metavar="0..1", above=0, below=1, rare=True
    )
    left_bias: float = knob(
        0.6, "Chance of taking the left of two equals.", "Truth", metavar="0..1", above=0, below=1, rare=True
    )
    annotator_sd: float = knob(
        0.4, "Spread of the annotators.", "Truth", metavar="LOG-ODDS", low=0, rare=True
    )
    latent_sd: float = knob(0.6, "Spread of the pairs.", "Truth", metavar="LOG-ODDS", low=0, rare=True)
    tie_share: float = knob(0.1, "Share of ties.", "Truth", metavar="0..1", low=0, below=1, rare=True)
    ties: str = knob("half", "How ties count.", "Studies", choices=("half", "excluded"), rare=True)
    random_sides: bool = True  # False: b is always on the left, what a study must never do
    seed: int = knob(0, "Of the simulation.", "Studies", low=0)

    def __post_init__(self):
        check_knobs(self)
        if self.annotators_per_pair > self.annotators:
            raise ValueError(
                f"annotators_per_pair must lie in 1..annotators = {self.annotators}, got"
                f" {self.annotators_per_pair}."
            )

    @property
    def truth(self) -> float:
        """The win rate that a study with random sides estimates, by its rule for ties."""
        return (
            self.preference * (1 - self.tie_share) + 0.5 * self.tie_share
            if self.ties == "half"
            else self.preference
        )


@dataclass(frozen=True)
class SimulatedTrials:
    """Scores of many studies with one allocation."""

    scores: np.ndarray  # [S, N], as eg3d_rlhf.people.study.analysis.win_rate takes them
    b_left: np.ndarray  # [S, N] bool
    chose_left: np.ndarray  # [S, N] bool; meaningless for ties
    annotator: np.ndarray  # [N]
    latent: np.ndarray  # [N]


def allocation(annotators: int, latents: int, per_pair: int) -> tuple[np.ndarray, np.ndarray]:
    """Who judges what, [N] each: every latent by `per_pair` different annotators, the work evenly spread."""
    latent = np.repeat(np.arange(latents), per_pair)
    return np.arange(len(latent)) % annotators, latent


def centre(preference: float, bias: float, sd: float) -> float:
    """Log-odds of b for the average annotator and pair, without sides, that make the win rate with random
    sides `preference`.

    Solves mean over sides s = +-1 and normal u of sigmoid(centre + s bias + sd u) = preference.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    def rate(mu: float) -> float:
        return float(
            0.5 * (_WEIGHTS * (expit(mu + bias + sd * _NODES) + expit(mu - bias + sd * _NODES))).sum()
        )

    return brentq(lambda mu: rate(mu) - preference, -60, 60)


def simulate(options: SimulationOptions) -> SimulatedTrials:
    """Draw the trials of all studies; the same seed gives the same trials."""
    from scipy.special import expit, logit

    o = options
    rng = np.random.default_rng(options.seed)
    annotator, latent = allocation(o.annotators, o.latents, o.annotators_per_pair)
    shape = (o.studies, len(latent))
    bias = float(logit(o.left_bias))
    b_left = rng.random(shape) < 0.5 if o.random_sides else np.ones(shape, dtype=bool)
    mood = o.annotator_sd * rng.standard_normal((o.studies, o.annotators))[:, annotator]
    merit = o.latent_sd * rng.standard_normal((o.studies, o.latents))[:, latent]
    log_odds = (
        centre(o.preference, bias, math.hypot(o.annotator_sd, o.latent_sd))
        + np.where(b_left, bias, -bias)
        + mood
        + merit
    )
    b_wins = rng.random(shape) < expit(log_odds)
    tied = rng.random(shape) < o.tie_share
    scores = np.where(tied, 0.5 if o.ties == "half" else np.nan, b_wins)
    return SimulatedTrials(scores, b_left, b_wins == b_left, annotator, latent)


def coverage(options: SimulationOptions, bootstrap_studies: int = 0, resamples: int = 1000) -> dict:
    """How often each interval covers the truth, and how often each rejects 0.5: power, or the false alarms
    where preference is 0.5.
    """
    from eg3d_rlhf.people.study.analysis import cluster_bootstrap, win_rate

    trials = simulate(options)
    rates = win_rate(trials.scores, trials.annotator, trials.latent)
    truth = options.truth
    out = {
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
        drawn = [
            cluster_bootstrap(s, *groups, resamples=resamples, seed=i)
            for i, s in enumerate(trials.scores[:few])
        ]
        if None not in drawn:
            lo, hi = np.array(drawn).T
            out["intervals"][f"bootstrap_{over}"] = _covered((lo, hi), truth)
    return out


def _covered(bounds: tuple[np.ndarray, np.ndarray], truth: float) -> dict:
    lo, hi = bounds
    return {
        "studies": len(lo),
        "coverage": float(((lo <= truth) & (truth <= hi)).mean()),
        "width": float((hi - lo).mean()),
        "rejects_50_percent": float(((lo > 0.5) | (hi < 0.5)).mean()),
    }
