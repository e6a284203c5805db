"""How many trials a study needs: power of the exact binomial test against 0.5, with ties, and trials that share annotators and latents."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import binom

_MOST = 100_000  # decided trials; beyond, the difference is not one that a study can show


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """What the study must be able to show, and what is expected of its trials."""

    true_rate: float = 0.6  # share of decided trials that b wins, the least that matters; 0..1 without 0.5
    alpha: float = 0.05  # chance of calling equals different
    power: float = 0.8  # chance of seeing true_rate
    tie_share: float = 0.1  # of trials expected to be ties, 0..1
    annotators: int = 1
    annotators_per_pair: int = 1
    annotator_icc: float = 0.01  # correlation of two answers of one annotator to different pairs, beyond the mean
    latent_icc: float = 0.2  # correlation of two annotators' answers to one pair, beyond the mean

    def __post_init__(self):
        if not (0 < self.true_rate <= 1) or self.true_rate == 0.5:
            raise ValueError(f"true_rate must lie in 0..1 and differ from 0.5, got {self.true_rate}. Name the win rate that would matter.")
        for name in ("alpha", "power"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}. Usual are 0.05 and 0.8.")
        if self.power <= self.alpha:
            raise ValueError(f"power must exceed alpha, got {self.power} and {self.alpha}. Usual are 0.8 and 0.05.")
        for name in ("tie_share", "annotator_icc", "latent_icc"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in 0..1, 1 excluded, got {getattr(self, name)}.")
        if not 1 <= self.annotators_per_pair <= self.annotators:
            raise ValueError(
                f"annotators_per_pair must lie in 1..annotators = {self.annotators}, got {self.annotators_per_pair}. "
                "Ask more annotators, or fewer of them per pair."
            )


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """The answer, and how it came about."""

    options: PowerOptions
    decided: int  # decided trials that independent answers would need
    attained: float  # power with just so many
    design_effect: float  # how many clustered trials are worth one independent one
    trials: int  # with ties and clustering, a multiple of annotators_per_pair
    per_annotator: int

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


def exact_power(n: int, true_rate: float, alpha: float = 0.05) -> float:
    """Chance that the two-sided exact binomial test of n decided trials rejects 0.5 when the win rate is true_rate.

    Under 0.5 the distribution is symmetric, so the test rejects at k <= c and k >= n - c with the largest c for which 2 P(K <= c) <= alpha.
    """
    c = _critical(np.array([n]), alpha)[0]
    return 0.0 if c < 0 else float(binom.cdf(c, n, true_rate) + binom.sf(n - c - 1, n, true_rate))


def _critical(n: np.ndarray, alpha: float) -> np.ndarray:
    """Largest c [..] with 2 P(K <= c) <= alpha for K ~ Binomial(n, 1/2); -1 where not even c = 0 will do."""
    c = binom.ppf(alpha / 2, n, 0.5).astype(np.int64)  # smallest with P >= alpha / 2
    return np.where(binom.cdf(c, n, 0.5) <= alpha / 2, c, c - 1)


def decided_trials(true_rate: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Fewest decided trials from which on the power never falls below the wanted one again; the power saws up and down with n.

    Raises: ValueError when more than 100,000 would be needed.
    """
    roughly = (ndtri(1 - alpha / 2) + ndtri(power)) ** 2 / (4 * (true_rate - 0.5) ** 2)  # by the normal approximation
    if roughly > _MOST:
        raise ValueError(f"decided_trials: expected a true rate that can be told from 0.5, got {true_rate}. Name a larger difference.")
    upper = max(64, int(roughly))
    while True:
        n = np.arange(1, upper + 1)
        c = _critical(n, alpha)
        reached = np.where(c < 0, 0.0, binom.cdf(c, n, true_rate) + binom.sf(n - c - 1, n, true_rate)) >= power
        short = np.flatnonzero(~reached)
        if len(short) == 0 or short[-1] < upper // 2:  # the teeth are short against a doubling of n
            return int(short[-1]) + 2 if len(short) else 1
        upper *= 2


def sample_size(options: PowerOptions) -> SampleSize:
    """Trials that the study needs.

    Design effect of crossed clusters: 1 + (m - 1) annotator_icc + (r - 1) latent_icc, m trials an annotator and r annotators a pair. As m
    grows with the trials, the equation is solved for them: n = decided (1 - annotator_icc + (r - 1) latent_icc) / (1 - decided
    annotator_icc / annotators), over the share that is decided.
    Raises: ValueError when no number of trials will do with so few annotators.
    """
    decided = decided_trials(options.true_rate, options.alpha, options.power)
    r, k = options.annotators_per_pair, options.annotators
    own = options.annotator_icc if k > 1 else 0.0  # one annotator's study speaks of that annotator
    room = 1 - decided * own / k
    if room <= 0.02:
        raise ValueError(
            f"annotators: expected more than {math.ceil(decided * own / 0.98)} of them, got {k}: with a correlation of {own:g} within "
            f"annotators, no number of trials shows a win rate of {options.true_rate:g}. Ask more people, or name a larger difference."
        )
    effective = max(decided, decided * (1 - own + (r - 1) * options.latent_icc) / room)  # decided trials with clustering
    trials = math.ceil(effective / (1 - options.tie_share))
    trials += -trials % r
    return SampleSize(
        options=options, decided=decided, attained=exact_power(decided, options.true_rate, options.alpha),
        design_effect=effective / decided, trials=trials, per_annotator=math.ceil(trials / k),
    )  # fmt: skip
