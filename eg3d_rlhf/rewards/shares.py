"""How the ranks of a reward training divide a step: which items each takes, what they exchange, and the same random numbers as of one rank.

Letters: B blocks of pairs.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.unpaired import UnpairedPreference
from training.distributed import SINGLE, Ranks
from training.phases import RowDraws, sum_over_ranks


@dataclass(frozen=True)
class Share:
    """This rank's items of a step: every W-th; where a short last step leaves none, the first item with weight 0."""

    count: int  # items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        """Places in the step."""
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0][: self.count]

    @property
    def weight(self) -> float:
        """Share of the step's mean that a mean over `rows` contributes."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / max(self.count, 1)

    def of_blocks(self, drawn: np.ndarray) -> np.ndarray:
        """The entries of these items among values drawn for B blocks of `count` items, [B * count] -> [B * len(rows)]."""
        return drawn.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Values [len(rows), ...] of every rank as those of the whole step, [count, ...]. Differentiable in this rank's own."""
        if self.ranks.world == 1:
            return own
        whole, rows = own.new_zeros(self.count, *own.shape[1:]), torch.tensor(self.rows, device=own.device)
        if not self.weight:
            return self.ranks.sum_(whole, "exchange embeddings")
        whole[rows] = own.detach()
        return self.ranks.sum_(whole, "exchange embeddings").index_copy(0, rows, own)

    def update(
        self, model: torch.nn.Module, figures: dict[str, float], stop: bool, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], bool]:
        """Sum gradients over ranks; returns the step's mean figures and whether any rank was asked to stop.

        The figure 'strength' is a norm over samples, its squares add up; the others are means, of this rank's `weights`, else `weight`.
        """
        if self.ranks.world == 1:
            return figures, stop
        real = float(self.weight > 0)
        parts = [value**2 * real if name == "strength" else value * weights.get(name, self.weight) for name, value in figures.items()]
        sums = torch.tensor([*parts, float(stop)], dtype=torch.float32, device=next(model.parameters()).device)
        sum_over_ranks(self.ranks, model.parameters(), [sums])
        *totals, stops = sums.tolist()
        return {k: v**0.5 if k == "strength" else v for k, v in zip(figures, totals, strict=True)}, stops > 0


class Step:
    """The pairs and the unpaired labels of a step, and this rank's shares of them."""

    def __init__(self, items: Sequence[Preference], shapes: Sequence[UnpairedPreference], ranks: Ranks):
        self.items, self.shapes, self.ranks = items, shapes, ranks
        self.of_items, self.of_shapes = Share(len(items), ranks), Share(len(shapes), ranks)

    def draws(self, rows: int) -> contextlib.AbstractContextManager:
        """Inside: random numbers of the whole step, for a forward pass over `rows` of pairs, block by block, and then the shapes."""
        if self.ranks.world == 1:
            return contextlib.nullcontext()
        blocks = rows // max(len(self.of_items.rows), 1)
        places = [block * len(self.items) + row for block in range(blocks) for row in self.of_items.rows]
        return RowDraws([*places, *(blocks * len(self.items) + row for row in self.of_shapes.rows)],
                        blocks * len(self.items) + len(self.shapes))

    def block_draws(self) -> contextlib.AbstractContextManager:
        """Inside: those of blocks of pairs."""
        return contextlib.nullcontext() if self.ranks.world == 1 else RowDraws(self.of_items.rows, len(self.items), blocks=True)
