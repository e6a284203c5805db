"""Bradley-Terry strengths with intervals that allow for comparisons sharing annotators and prompts, and that hold for few.

A score is 1 where the first of a cell's two generators was preferred, 0 where the second was, 0.5 for a tie. The same code serves one
leaderboard and a thousand simulated ones. Letters: R repetitions, M comparisons, C cells (two generators that met), G generators.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import t as student

FEW = 4  # annotators; fewer are taken as they are, and the figures speak of them alone
REACH = 8.0  # an end beyond is none: nothing bounds the strength on that side
_TOGETHER = -0.5  # least of V_annotators - V_both over V_both; tuned by simulation (docs/labelling.md)
_LEAST = 0.45  # of the variance that the model gives untied comparisons: what residuals say is too little where one nearly always wins
_STEPS, _HALVINGS, _PRECISION = 60, 40, 1e-4


@dataclass(frozen=True, kw_only=True)
class Design:
    """Who met whom, before whom, over what."""

    cells: np.ndarray  # [C, 2] numbers of generators from 0; every generator is reachable from every other
    cell: np.ndarray  # [M] numbers from 0
    annotator: np.ndarray  # [M] numbers from 0
    prompt: np.ndarray  # [M] numbers from 0

    @property
    def generators(self) -> int:
        """G."""
        return int(self.cells.max()) + 1

    @property
    def signs(self) -> np.ndarray:
        """[C, G]: 1 for a cell's first generator, -1 for its second."""
        signs, rows = np.zeros((len(self.cells), self.generators)), np.arange(len(self.cells))
        signs[rows, self.cells[:, 0]], signs[rows, self.cells[:, 1]] = 1, -1
        return signs

    @property
    def games(self) -> np.ndarray:
        """[C] comparisons."""
        return np.bincount(self.cell, minlength=len(self.cells)).astype(np.float64)


def fit(score: np.ndarray, games: np.ndarray, signs: np.ndarray, held: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Strengths [R, G] with mean 0 that make the logistic quasi-likelihood of the scores largest.

    Args: score [R, C] sums, games [C], signs [C, G]; held: (c [G], value [R]) keeps c . strength = value.
    """
    fixed = np.ones((signs.shape[1], 1)) if held is None else np.c_[np.ones(signs.shape[1]), held[0]]
    free = np.linalg.svd(fixed)[0][:, fixed.shape[1] :]  # [G, F] directions that may move
    start = np.zeros((len(score), signs.shape[1])) if held is None else held[1][:, None] * held[0] / (held[0] @ held[0])
    along, moved = signs @ free, np.zeros((len(score), free.shape[1]))
    for _ in range(_STEPS if free.shape[1] else 0):
        p = expit((start + moved @ free.T) @ signs.T)
        hessian = np.einsum("rc,ca,cb->rab", games * p * (1 - p), along, along) + 1e-12 * np.eye(free.shape[1])
        step = np.linalg.solve(hessian, ((score - games * p) @ along)[..., None])[..., 0]
        step *= np.minimum(1, 2 / np.abs(step).max(axis=1, keepdims=True).clip(1e-12))
        moved = moved + step
        if np.abs(step).max() < 1e-7:
            break
    return start + moved @ free.T


def strengths(scores: np.ndarray, design: Design, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strengths [R, G] with mean 0, and the ends of their intervals [R, G]; infinite where nothing bounds a strength.

    P(score) = sigmoid(s_i - s_j): ties count half, so of two generators the difference is the log-odds of the share of wins. G - 1 drawn
    games, spread evenly over the cells, keep the estimate finite (two generators: Firth's). Ends: where the efficient score of the given
    games, squared, exceeds its variance times Student's t quantile, squared; with two generators and independent games that is Wilson's
    interval. Its variance (Cameron, Gelbach and Miller 2011) is V = V_prompts + V_annotators - V_both, the last two not below -0.5 V_both;
    degrees of freedom after Satterthwaite. With fewer than FEW annotators V = V_prompts. V is never below 0.45 that of untied
    independent games.

    Args: scores [R, M]; design: with two prompts or more.
    """
    member = np.zeros((len(design.cell), len(design.cells)))
    member[np.arange(len(design.cell)), design.cell] = 1
    score, games, signs = scores @ member, design.games, design.signs
    drawn = np.full(len(games), (design.generators - 1) / len(games))
    found = fit(score + drawn / 2, games + drawn, signs)
    p = expit(found @ signs.T)
    residual = scores - (p - drawn / games * (0.5 - p))[:, design.cell]  # [R, M]; the drawn games' share makes their sum 0
    least = _LEAST * (scores != 0.5).mean(axis=1)  # [R]
    ends = np.empty((2, *found.shape))
    for k in range(design.generators):
        contrast = np.eye(design.generators)[k] - 1 / design.generators
        allowed = _allowed(residual, least, found, design, contrast, confidence)
        for side, out in zip((-1, 1), ends, strict=True):
            out[:, k] = _end(found[:, k], side, contrast, allowed, (score, games, signs, drawn))
    return found, ends[0], ends[1]


def _direction(strength: np.ndarray, games: np.ndarray, signs: np.ndarray, contrast: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the score [R, G] that say most of the contrast, the other strengths unknown, and that score's information [R]."""
    p = expit(strength @ signs.T)
    information = np.einsum("rc,ca,cb->rab", games * p * (1 - p), signs, signs)
    size = np.trace(information, axis1=1, axis2=2)[:, None, None] / len(contrast) ** 2
    wanted = np.broadcast_to(contrast, strength.shape)[..., None]
    solved = np.linalg.solve(information + size + 1e-14 * np.eye(len(contrast)), wanted)[..., 0]
    variance = (solved @ contrast)[:, None]
    return solved / variance, 1 / variance[:, 0]


def _allowed(
    residual: np.ndarray, least: np.ndarray, strength: np.ndarray, design: Design, contrast: np.ndarray, confidence: float
) -> np.ndarray:
    """How large the squared score over its information may be [R]: quantile squared times the design effect."""
    weights, information = _direction(strength, design.games, design.signs, contrast)
    each = residual * (weights @ design.signs.T)[:, design.cell]  # [R, M]
    alone = (each**2).sum(axis=1)
    annotators, prompts = (len(np.unique(group)) for group in (design.annotator, design.prompt))
    total, degrees = _clustered(each, design.prompt), np.full(len(each), prompts - 1.0)
    if annotators >= FEW:
        of_prompts, of_annotators = total, _clustered(each, design.annotator)
        of_both = _clustered(each, design.prompt.astype(np.int64) * (int(design.annotator.max()) + 1) + design.annotator)
        more = np.maximum(of_annotators - of_both, _TOGETHER * of_both)
        total = of_prompts + more
        spread = of_annotators**2 * (more > 0) / (annotators - 1) + of_prompts**2 / (prompts - 1)
        degrees = np.clip(total**2 / spread.clip(1e-300), min(annotators, prompts) - 1, prompts - 1)
    varied = alone > 1e-9 * information  # else nothing tells the spread
    total = np.where(varied, np.maximum(total, least * information), information)
    return student.ppf(0.5 + confidence / 2, degrees) ** 2 * total / information


def _clustered(each: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Variance [R] of the sum of M scores, from the sums over groups."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return (np.add.reduceat(each[:, order], starts, axis=1) ** 2).sum(axis=1) * len(starts) / max(1, len(starts) - 1)


def _end(inside: np.ndarray, side: int, contrast: np.ndarray, allowed: np.ndarray, data: tuple[np.ndarray, ...]) -> np.ndarray:
    """Where the statistic passes what is allowed [R], between the estimate and REACH on that side; infinite where it does not."""
    score, games, signs, drawn = data

    def holds(value: np.ndarray) -> np.ndarray:
        held = fit(score + drawn / 2, games + drawn, signs, (contrast, value))
        weights, information = _direction(held, games, signs, contrast)
        gained = (((score - games * expit(held @ signs.T)) @ signs) * weights).sum(axis=1)
        return gained**2 <= allowed * information

    outside = np.full(len(inside), side * REACH)
    endless = holds(outside)
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        good = holds(middle)
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
        if np.abs(inside - outside).max() < _PRECISION:
            break
    return np.where(endless, side * np.inf, inside)
