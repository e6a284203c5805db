"""Reward training on several ranks: which pairs of a step this rank holds, and scores that the ranks compute between them.

Shape letters: N slabs (winners, losers, anchors in blocks), B blocks.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.reward.evaluation import score_seeds
from eg3d_rlhf.reward.slabs import SlabStore
from training.distributed import SINGLE, Ranks
from training.draws import RowDraws
from training.rounds import sum_over_ranks


class StoppedError(Exception):
    """SIGTERM or SIGINT arrived; what was trained up to the last whole epoch is in the state file."""


@dataclass(frozen=True)
class Share:
    """This rank's items of a step: every W-th; where a short last step leaves none, the first item with weight 0."""

    count: int  # items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        """Places in the step."""
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0]

    @property
    def weight(self) -> float:
        """Share of the step's mean that a mean over `rows` contributes."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / self.count

    def of_blocks(self, drawn: np.ndarray) -> np.ndarray:
        """The entries of these items among values drawn for B blocks of `count` items, [B * count] -> [B * len(rows)]."""
        return drawn.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def draws(self):
        """Inside: dropout and drawn orders as these items meet them in the whole step."""
        return contextlib.nullcontext() if self.ranks.world == 1 else RowDraws(self.rows, self.count, blocks=True)

    def update(self, model: torch.nn.Module, figures: dict[str, float], stop: bool) -> tuple[dict[str, float], bool]:
        """Sum gradients over ranks; returns the step's mean figures and whether any rank was asked to stop.

        The figure 'strength' is a norm over samples, its squares add up; the others are means.
        """
        if self.ranks.world == 1:
            return figures, stop
        real = float(self.weight > 0)
        parts = [value**2 * real if name == "strength" else value * self.weight for name, value in figures.items()]
        sums = torch.tensor([*parts, float(stop)], dtype=torch.float32, device=next(model.parameters()).device)
        sum_over_ranks(self.ranks, model.parameters(), [sums])
        *totals, stops = sums.tolist()
        return {k: v**0.5 if k == "strength" else v for k, v in zip(figures, totals, strict=True)}, stops > 0


def shared_scores(model, store: SlabStore, seeds: Sequence[int], ranks: Ranks = SINGLE, batch: int = 32) -> dict[int, float]:
    """`score_seeds`, batch by batch in turn over the ranks; every rank gets all scores."""
    unique = list(dict.fromkeys(seeds))
    parts = [unique[i : i + batch] for i in range(0, len(unique), batch)][ranks.rank :: ranks.world]
    mine = {seed: score for part in parts for seed, score in score_seeds(model, store, part, batch).items()}
    scores = {int(seed): score for part in ranks.gather(list(mine.items())) for seed, score in part}
    return {seed: scores[seed] for seed in unique}
