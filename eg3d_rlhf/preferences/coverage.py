"""Whether the intervals of agreement and of leaderboards hold what they say: judgements of a known truth, drawn many times.

Letters: S studies, U units, A annotators, K answers, M comparisons, G generators, P prompts.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.preferences.agreement import Agreement, cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.strengths import FEW, Design, fit, strengths

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # of a standard normal


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How annotators answer: each names a unit's answer with one and the same chance, else another at random."""

    agreement: float  # chance that two give the same answer, were there two answers
    prevalence: float  # of the first answer among those that are no tie
    ties: float = 0.0  # share of units that are ties
    annotators: int = 2
    units: int = 10

    @property
    def shares(self) -> np.ndarray:
        """[K] of the units' answers."""
        shares = [self.prevalence * (1 - self.ties), (1 - self.prevalence) * (1 - self.ties)]
        return np.array([*shares, self.ties] if self.ties else shares)

    @property
    def right(self) -> float:
        """Chance that one names the unit's answer."""
        return 0.5 * (1 + np.sqrt(2 * self.agreement - 1))

    @property
    def truth(self) -> float:
        """Kappa, and alpha, of endlessly many units."""
        k = len(self.shares)
        said = np.where(np.eye(k) > 0, self.right, (1 - self.right) / (k - 1))  # [unit's, given]
        both = np.einsum("u,ua,ub->ab", self.shares, said, said)
        return float(1 - (1 - np.trace(both)) / (1 - (both.sum(axis=0) ** 2).sum()))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Answers [U, A]."""
        k, shape = len(self.shares), (self.units, self.annotators)
        true = rng.choice(k, size=self.units, p=self.shares)[:, None]
        return np.where(rng.random(shape) < self.right, true, (true + rng.integers(1, k, size=shape)) % k)


def agreement_coverage(kind: Answers, studies: int, seed: int = 0) -> dict:
    """Share of studies whose interval holds the truth; those without a figure (all answers alike) are counted aside."""
    rng, figures = np.random.default_rng(seed), []
    for _ in range(studies):
        answers = kind.draw(rng)
        figures.append(_kappa(answers) if kind.annotators == 2 else krippendorff_alpha([dict(enumerate(row)) for row in answers.tolist()]))
    shown = [(f.lo, f.hi) for f in figures if f.lo is not None and f.hi is not None]
    held = [lo <= kind.truth <= hi for lo, hi in shown]
    covered = float(np.mean(held)) if held else None
    return {"truth": kind.truth, "n": kind.units, "studies": studies, "shown": len(shown), "coverage": covered}


def _kappa(answers: np.ndarray) -> Agreement:
    return cohen_kappa(answers[:, 0].tolist(), answers[:, 1].tolist())


def agreement_grid(units: int, full: bool = True) -> Iterator[Answers]:
    """Agreement from .55 to .98, prevalence from .5 to .9, with and without ties, 2 to 5 annotators."""
    levels, prevalences = ((0.55, 0.7, 0.8, 0.9, 0.95, 0.98), (0.5, 0.7, 0.9)) if full else ((0.55, 0.8, 0.98), (0.5, 0.8))
    for people, ties, prevalence, level in itertools.product((2, 3, 5) if full else (2, 4), (0.0, 0.15), prevalences, levels):
        yield Answers(agreement=level, prevalence=prevalence, ties=ties, annotators=people, units=units)


def share_coverage(n: int) -> list[float]:
    """Exact coverage of Wilson's interval at each of SHARES."""
    ends = np.array([wilson_interval(k, n) for k in range(n + 1)])
    return [float(binom.pmf(np.arange(n + 1), n, p)[(ends[:, 0] <= p) & (p <= ends[:, 1])].sum()) for p in SHARES]


@dataclass(frozen=True, kw_only=True)
class Games:
    """How generators fare: every two meet once or more in each prompt; strengths lie evenly from `strength` to -`strength`."""

    generators: int
    strength: float  # log-odds
    prompts: int
    annotators: int
    each: int = 1  # comparisons of two generators in a prompt
    ties: float = 0.0  # share of ties of equals, after Davidson
    annotator_sd: float = 0.0  # how far annotators differ about each generator, log-odds
    prompt_sd: float = 0.0

    @property
    def games(self) -> int:
        """Of each generator."""
        return self.prompts * self.each * (self.generators - 1)

    def design(self) -> Design:
        """All comparisons, the annotators taking turns."""
        cells = np.array(list(itertools.combinations(range(self.generators), 2)))
        prompt, cell, _ = (x.ravel() for x in np.indices((self.prompts, len(cells), self.each)))
        return Design(cells=cells, cell=cell, annotator=np.arange(len(cell)) % self.annotators, prompt=prompt)

    @property
    def strengths(self) -> np.ndarray:
        """[G]"""
        return np.linspace(self.strength, -self.strength, self.generators)

    def draw(self, studies: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores [S, M], and the annotators' deviations [S, A, G]."""
        d = self.design()
        people = self.annotator_sd * rng.standard_normal((studies, self.annotators, self.generators))
        prompts = self.prompt_sd * rng.standard_normal((studies, self.prompts, self.generators))
        first, second = d.cells[d.cell].T
        chance = lambda g: self.strengths[g] + people[:, d.annotator, g] + prompts[:, d.prompt, g]  # noqa: E731
        win, tie = _outcomes(chance(first) - chance(second), self.ties)
        u = rng.random(win.shape)
        return np.where(u < win, 1.0, np.where(u < win + tie, 0.5, 0.0)), people

    def truth(self, people: np.ndarray) -> np.ndarray:
        """[S, G] what endlessly many prompts would give, of these annotators where they are few, else of endlessly many."""
        d = self.design()
        first, second = d.cells.T
        apart = (self.strengths[first] - self.strengths[second])[None, :, None]  # [1, C, 1]
        spread = np.sqrt(2) * (self.prompt_sd if self.annotators < FEW else np.hypot(self.prompt_sd, self.annotator_sd))
        if self.annotators < FEW:
            met = np.zeros((len(d.cells), self.annotators))
            np.add.at(met, (d.cell, d.annotator), 1)
            apart = apart + np.swapaxes(people[:, :, first] - people[:, :, second], 1, 2)  # [S, C, A]
        else:
            met = np.ones((len(d.cells), 1))
        win, tie = _outcomes(apart[..., None] + spread * _NODES, self.ties)
        score = (((win + tie / 2) @ _WEIGHTS) * met / met.sum(axis=1, keepdims=True)).sum(axis=-1) * d.games
        return fit(score, d.games, d.signs)


def _outcomes(difference: np.ndarray, ties: float) -> tuple[np.ndarray, np.ndarray]:
    """Chances of a win and of a tie."""
    ahead, behind, nu = np.exp(difference / 2), np.exp(-difference / 2), 2 * ties / (1 - ties)
    return ahead / (ahead + behind + nu), nu / (ahead + behind + nu)


def leaderboard_coverage(kind: Games, studies: int, seed: int = 0) -> dict:
    """Share of intervals that hold the truth, over generators, and the share of intervals that are open at an end."""
    scores, people = kind.draw(studies, np.random.default_rng(seed))
    _, lo, hi = strengths(scores, kind.design())
    truth = kind.truth(people)
    held = (lo <= truth) & (truth <= hi)
    return {"n": kind.games, "studies": studies, "coverage": float(held.mean()), "open": float((~np.isfinite(hi - lo)).mean())}


def leaderboard_grid(prompts: int, full: bool = True) -> Iterator[Games]:
    """Two to six generators alike and far apart, with and without ties, 1 to 8 annotators who differ or not, prompts that differ or not."""
    people: Sequence[tuple[int, int]] = ((1, 1), (2, 2), (5, 2), (8, 1)) if full else ((1, 1), (5, 2))
    apart = (0.0, 0.5, 1.5) if full else (0.0, 1.5)
    for size, strength, ties in itertools.product((2, 3, 4, 6) if full else (2, 4), apart, (0.0, 0.3)):
        for (annotators, each), (annotator_sd, prompt_sd) in itertools.product(people, ((0.0, 0.0), (0.4, 0.6))):
            yield Games(
                generators=size, strength=strength, prompts=prompts, annotators=annotators, each=each, ties=ties,
                annotator_sd=annotator_sd, prompt_sd=prompt_sd,
            )  # fmt: skip
