"""One update from several rounds of a batch, in turn on one process or side by side on several, equal to one pass over the whole batch.

With K rounds, round k holds rows k, k + K, k + 2K, ... of the batch: the groups of the minibatch-std layer (i, i + N/G, ...) then lie
within rounds, as long as a round holds a multiple of G samples.

Shapes: N batch, Z z_dim, K number of rounds (over all ranks).
"""

import contextlib
import dataclasses
from collections.abc import Iterable

import torch

from training.distributed import Ranks
from training.draws import RowDraws


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is divided: over ranks, then into this rank's rounds."""

    batch: int  # N, over all ranks
    ranks: Ranks
    size: int | None = None  # samples per round; None = all that a rank has

    def __post_init__(self):
        world, size = self.ranks.world, self.size or max(self.batch // self.ranks.world, 1)
        if self.batch % (world * size):
            raise ValueError(
                f"--batch: expected a multiple of {world} processes x {size} images per pass (--batch-gpu), got {self.batch}. Change one."
            )

    @property
    def here(self) -> int:
        """Rounds that this rank runs."""
        return self.batch // self.ranks.world // (self.size or self.batch // self.ranks.world)

    @property
    def total(self) -> int:
        """Rounds over all ranks."""
        return self.here * self.ranks.world

    def rows(self, turn: int) -> slice:
        """Rows of the whole batch in this rank's round `turn`."""
        return slice(self.ranks.rank + turn * self.ranks.world, None, self.total)

    def local_rows(self, turn: int) -> slice:
        """The same, among the rows that this rank has."""
        return slice(turn, None, self.here)

    def draws(self, turn: int):
        """Inside: random numbers of those rows; with one round in all, plain draws."""
        if self.total == 1:
            return contextlib.nullcontext()
        return RowDraws(range(self.batch)[self.rows(turn)], self.batch)


class MovingAverages:
    """The buffers of a module that forward passes move (w_avg): all rounds start from the same values, the mean of their steps is taken."""

    def __init__(self, module: torch.nn.Module, rounds: int):
        named = module.named_buffers() if rounds > 1 else ()
        self._buffers = [b for name, b in named if name.endswith("w_avg")]
        self._start = [b.clone() for b in self._buffers]
        self.steps = [torch.zeros_like(b) for b in self._buffers]
        self._rounds = rounds

    def end_round(self) -> None:
        """Note how far the round moved them, and move back."""
        for buffer, start, step in zip(self._buffers, self._start, self.steps, strict=True):
            step += (buffer - start) / self._rounds
            buffer.copy_(start)

    def finish(self) -> None:
        """Take the whole step."""
        for buffer, step in zip(self._buffers, self.steps, strict=True):
            buffer += step


class GradientSum:
    """Gradients added up round by round, each round's own first: two rounds here give the bits of one round on each of two ranks."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rounds: int):
        self._parameters = list(parameters) if rounds > 1 else []
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def end_round(self) -> None:
        """Take the gradients of the round that has run backward."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                self._sums[i] = parameter.grad if self._sums[i] is None else self._sums[i].add_(parameter.grad)
                parameter.grad = None

    def finish(self) -> None:
        """Give the sums back as gradients."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total


def sum_over_ranks(ranks: Ranks, parameters: Iterable[torch.nn.Parameter], others: list[torch.Tensor]) -> None:
    """Sum all gradients, and `others` in place, by one transfer; parameters without a gradient have none on any rank."""
    tensors = [p.grad for p in parameters if p.grad is not None] + others
    if ranks.world > 1:
        flat = ranks.sum_(torch.cat([t.reshape(-1).float() for t in tensors]))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
