"""Studies whose truth is known: simulated annotators with a true preference, side bias, moods of their own, and latents that differ.

Letters: S studies, N trials, A annotators, L latents.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from eg3d_rlhf.study.estimate import cluster_bootstrap, win_rate

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # of a standard normal


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """One kind of study, simulated many times."""

    studies: int = 1000
    annotators: int = 8
    latents: int = 150
    annotators_per_pair: int = 2
    preference: float = 0.7  # true win rate of b among decided trials when the sides are random, 0..1
    left_bias: float = 0.6  # chance of taking the left of two equals; 0.5 is no bias
    annotator_sd: float = 0.4  # spread of the annotators' preferences, in log-odds
    latent_sd: float = 0.6  # spread of the pairs, in log-odds
    tie_share: float = 0.1
    ties: str = "half"  # how ties count: 'half' or 'excluded'
    random_sides: bool = True  # False: b is always on the left, what a study must never do
    seed: int = 0

    def __post_init__(self):
        for name in ("preference", "left_bias"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.tie_share < 1 or min(self.annotator_sd, self.latent_sd) < 0:
            raise ValueError("tie_share must lie in 0..1 and annotator_sd, latent_sd be >= 0.")
        if min(self.studies, self.annotators, self.latents) < 1 or not 1 <= self.annotators_per_pair <= self.annotators:
            raise ValueError(
                f"expected studies, annotators and latents >= 1 and annotators_per_pair in 1..{self.annotators}, got {self.studies}, "
                f"{self.annotators}, {self.latents} and {self.annotators_per_pair}."
            )
        if self.ties not in ("half", "excluded"):
            raise ValueError(f"ties must be 'half' or 'excluded', got {self.ties!r}.")

    @property
    def truth(self) -> float:
        """The win rate that a study with random sides estimates, by its rule for ties."""
        return self.preference * (1 - self.tie_share) + 0.5 * self.tie_share if self.ties == "half" else self.preference


@dataclass(frozen=True)
class SimulatedTrials:
    """Scores of many studies with one allocation."""

    scores: np.ndarray  # [S, N], as eg3d_rlhf.study.estimate takes them
    b_left: np.ndarray  # [S, N] bool
    chose_left: np.ndarray  # [S, N] bool; meaningless for ties
    annotator: np.ndarray  # [N]
    latent: np.ndarray  # [N]


def allocation(annotators: int, latents: int, per_pair: int) -> tuple[np.ndarray, np.ndarray]:
    """Who judges what, [N] each: every latent by `per_pair` different annotators, the work evenly spread."""
    latent = np.repeat(np.arange(latents), per_pair)
    return np.arange(len(latent)) % annotators, latent


def centre(preference: float, bias: float, sd: float) -> float:
    """Log-odds of b for the average annotator and pair, without sides, that make the win rate with random sides `preference`.

    Solves mean over sides s = +-1 and normal u of sigmoid(centre + s bias + sd u) = preference.
    """

    def rate(mu: float) -> float:
        return float(0.5 * (_WEIGHTS * (expit(mu + bias + sd * _NODES) + expit(mu - bias + sd * _NODES))).sum())

    return brentq(lambda mu: rate(mu) - preference, -60, 60)


def simulate(options: SimulationOptions) -> SimulatedTrials:
    """Draw the trials of all studies; the same seed gives the same trials."""
    o, rng = options, np.random.default_rng(options.seed)
    annotator, latent = allocation(o.annotators, o.latents, o.annotators_per_pair)
    shape = (o.studies, len(latent))
    bias = float(logit(o.left_bias))
    b_left = rng.random(shape) < 0.5 if o.random_sides else np.ones(shape, dtype=bool)
    mood = o.annotator_sd * rng.standard_normal((o.studies, o.annotators))[:, annotator]
    merit = o.latent_sd * rng.standard_normal((o.studies, o.latents))[:, latent]
    log_odds = centre(o.preference, bias, math.hypot(o.annotator_sd, o.latent_sd)) + np.where(b_left, bias, -bias) + mood + merit
    b_wins = rng.random(shape) < expit(log_odds)
    tied = rng.random(shape) < o.tie_share
    scores = np.where(tied, 0.5 if o.ties == "half" else np.nan, b_wins)
    return SimulatedTrials(scores, b_left, b_wins == b_left, annotator, latent)


def coverage(options: SimulationOptions, bootstrap_studies: int = 0, resamples: int = 1000) -> dict:
    """How often each interval covers the truth, and how often each rejects 0.5: power, or the false alarms where preference is 0.5.

    Args: bootstrap_studies: evaluate the bootstraps on the first so many studies; they take a while.
    """
    trials = simulate(options)
    found = win_rate(trials.scores, trials.annotator, trials.latent)
    truth = options.truth
    out = {
        "options": asdict(options), "truth": truth, "trials": trials.scores.shape[1],
        "mean_win_rate": float(found.rate.mean()), "sd_win_rate": float(found.rate.std(ddof=1)) if options.studies > 1 else None,
        "left_share": float(trials.chose_left.mean()), "design_effect": float(np.median(found.design_effect)),
        "intervals": {name: _covered(getattr(found, name), truth) for name in ("clustered", "wilson")},
    }  # fmt: skip
    few = min(bootstrap_studies, options.studies)
    for over in ("annotators", "latents", "both") if few else ():
        groups = (trials.annotator, trials.latent, over)
        drawn = [cluster_bootstrap(s, *groups, resamples=resamples, seed=i) for i, s in enumerate(trials.scores[:few])]
        if None not in drawn:
            lo, hi = np.array(drawn).T
            out["intervals"][f"bootstrap_{over}"] = _covered((lo, hi), truth)
    return out


def _covered(bounds: tuple[np.ndarray, np.ndarray], truth: float) -> dict:
    lo, hi = bounds
    return {
        "studies": len(lo), "coverage": float(((lo <= truth) & (truth <= hi)).mean()), "width": float((hi - lo).mean()),
        "rejects_half": float(((lo > 0.5) | (hi < 0.5)).mean()),
    }  # fmt: skip
