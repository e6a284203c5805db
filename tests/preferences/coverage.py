"""Simulate judgements with a known truth, to measure the coverage of intervals.

The intervals are those of the agreement of annotators and of leaderboards.

Shapes: S studies, U units, K answers, M comparisons, G generators, P prompts, C cells. A is the number of
annotators.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.preferences.agreement import cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.leaderboard import FEW, Design, fit, strengths

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # of a standard normal


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Model of annotators, who give the true answer of a unit with a fixed probability, else a random one."""

    agreement: float  # chance that two give the same answer, were there two answers
    prevalence: float  # of the first answer among those that are no tie
    ties: float  # share of units that are ties
    annotators: int
    units: int

    def parts(self) -> tuple[np.ndarray, float]:
        """Shares [K] of the units' answers, and the chance that one names the unit's."""
        shares = [self.prevalence * (1 - self.ties), (1 - self.prevalence) * (1 - self.ties)]
        return np.array([*shares, self.ties] if self.ties else shares), 0.5 * (
            1 + np.sqrt(2 * self.agreement - 1)
        )

    def truth(self) -> float:
        """Kappa, and alpha, of endlessly many units."""
        shares, right = self.parts()
        k = len(self.parts()[0])
        answer_rates = np.where(np.eye(k) > 0, right, (1 - right) / (k - 1))  # [unit's, given]
        both = np.einsum("u,ua,ub->ab", shares, answer_rates, answer_rates)
        return float(1 - (1 - np.trace(both)) / (1 - (both.sum(axis=0) ** 2).sum()))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Answers [U, A]."""
        shares, right = self.parts()
        shape = (self.units, self.annotators)
        true = rng.choice(len(shares), size=self.units, p=shares)[:, None]
        return np.where(
            rng.random(shape) < right, true, (true + rng.integers(1, len(shares), size=shape)) % len(shares)
        )


def agreement_coverage(kind: Answers, studies: int, seed: int = 0) -> float:
    """Share of studies whose interval holds the truth, of those that have a figure."""
    rng = np.random.default_rng(seed)
    held = []
    for answers in (kind.draw(rng) for _ in range(studies)):
        pair = kind.annotators == 2
        agreement = (
            cohen_kappa(*answers.T.tolist())
            if pair
            else krippendorff_alpha([dict(enumerate(row)) for row in answers.tolist()])
        )
        if agreement.lo is not None:  # else all answers are alike
            held.append(agreement.lo <= kind.truth() <= agreement.hi)
    return float(np.mean(held))


def agreement_grid(units: int, full: bool = True) -> Iterator[Answers]:
    """Agreement from .55 to .98, prevalence from .5 to .9, with and without ties, 2 to 5 annotators."""
    levels, prevalences = (
        ((0.55, 0.7, 0.8, 0.9, 0.95, 0.98), (0.5, 0.7, 0.9)) if full else ((0.55, 0.8, 0.98), (0.5, 0.8))
    )
    for people, ties, prevalence, level in itertools.product(
        (2, 3, 5) if full else (2, 4), (0.0, 0.15), prevalences, levels
    ):
        yield Answers(agreement=level, prevalence=prevalence, ties=ties, annotators=people, units=units)


@dataclass(frozen=True, kw_only=True)
class Games:
    """A model of generators: every two meet once or more in each prompt; strengths lie evenly from `strength`
    to -`strength`.
    """

    generators: int
    strength: float  # log-odds
    prompts: int
    annotators: int
    each: int = 1  # comparisons of two generators in a prompt
    ties: float = 0.0  # share of ties of equals, after Davidson
    annotator_sd: float = 0.0  # how far annotators differ about each generator, log-odds
    prompt_sd: float = 0.0

    def design(self) -> Design:
        """All comparisons, the annotators taking turns."""
        cells = np.array(list(itertools.combinations(range(self.generators), 2)))
        prompt, cell, _ = (x.ravel() for x in np.indices((self.prompts, len(cells), self.each)))
        return Design(cells=cells, cell=cell, annotator=np.arange(len(cell)) % self.annotators, prompt=prompt)

    def draw(self, studies: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores [S, M], and the annotators' offsets [S, A, G]."""
        d = self.design()
        even = np.linspace(self.strength, -self.strength, self.generators)
        people = self.annotator_sd * rng.standard_normal((studies, self.annotators, self.generators))
        prompts = self.prompt_sd * rng.standard_normal((studies, self.prompts, self.generators))
        first, second = (
            even[g] + people[:, d.annotator, g] + prompts[:, d.prompt, g] for g in d.cells[d.cell].T
        )
        win, tie = _outcomes(first - second, self.ties)
        u = rng.random(win.shape)
        return np.where(u < win, 1.0, np.where(u < win + tie, 0.5, 0.0)), people

    def truth(self, people: np.ndarray) -> np.ndarray:
        """[S, G] what endlessly many prompts would give, of these annotators where they are few, else of
        endlessly many.
        """
        d = self.design()
        even = np.linspace(self.strength, -self.strength, self.generators)
        first, second = d.cells.T
        # [1, C, 1]
        apart = (even[first] - even[second])[None, :, None]
        few = self.annotators < FEW
        spread = np.sqrt(2) * (self.prompt_sd if few else np.hypot(self.prompt_sd, self.annotator_sd))
        met = np.ones((len(d.cells), 1))
        if few:
            met = np.zeros((len(d.cells), self.annotators))
            np.add.at(met, (d.cell, d.annotator), 1)
            apart = apart + np.swapaxes(people[:, :, first] - people[:, :, second], 1, 2)  # [S, C, A]
        win, tie = _outcomes(apart[..., None] + spread * _NODES, self.ties)
        score = (((win + tie / 2) @ _WEIGHTS) * met / met.sum(axis=1, keepdims=True)).sum(
            axis=-1
        ) * d.game_counts
        return fit(score, d.game_counts, d.signs)


def _outcomes(difference: np.ndarray, ties: float) -> tuple[np.ndarray, np.ndarray]:
    """Chances of a win and of a tie."""
    ahead = np.exp(difference / 2)
    second_wins = np.exp(-difference / 2)
    nu = 2 * ties / (1 - ties)
    return ahead / (ahead + second_wins + nu), nu / (ahead + second_wins + nu)


def leaderboard_coverage(kind: Games, studies: int, seed: int = 0) -> float:
    """Share of intervals that hold the truth, over generators and studies."""
    scores, people = kind.draw(studies, np.random.default_rng(seed))
    _, lo, hi = strengths(scores, kind.design())
    truth = kind.truth(people)
    return float(((lo <= truth) & (truth <= hi)).mean())


def leaderboard_grid(prompts: int, full: bool = True) -> Iterator[Games]:
    """Two to six generators alike and far apart, with and without ties, 1 to 8 annotators who differ or not,
    prompts that differ or not.
    """
    people = ((1, 1), (2, 2), (5, 2), (8, 1)) if full else ((1, 1), (5, 2))
    apart = (0.0, 0.5, 1.5) if full else (0.0, 1.5)
    for size, strength, ties in itertools.product((2, 3, 4, 6) if full else (2, 4), apart, (0.0, 0.3)):
        for (annotators, each), (annotator_sd, prompt_sd) in itertools.product(
            people, ((0.0, 0.0), (0.4, 0.6))
        ):
            if prompts * each * (size - 1) >= 20:  # of each generator, fewer have no points
                yield Games(
                    generators=size,
                    strength=strength,
                    prompts=prompts,
                    annotators=annotators,
                    each=each,
                    ties=ties,
                    annotator_sd=annotator_sd,
                    prompt_sd=prompt_sd,
                )
