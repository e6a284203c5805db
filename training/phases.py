"""Phases, which are the optimisation steps that a training loop repeats, and updates computed in several
rounds.

A batch may be processed in K rounds, one after the other on one process or side by side on several. The
update is the same as that of one pass over the whole batch. Two rules make it so:

1. Round k holds rows k, k + K, k + 2K, ... of the batch. The layer of D that computes minibatch statistics
   groups the samples i, i + N/G, ... . With this division its groups lie within rounds, if a round holds a
   multiple of G samples.
2. Random numbers are drawn for the whole batch, and each round keeps its rows. What a sample receives depends
   on its place in the batch and on nothing else.

Shapes: N batch, Z z_dim, K number of rounds (over all ranks).
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from training.distributed import Ranks


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss term of a phase.

    The loop takes its mean, multiplies it by the phase's gain and runs backward before it asks for the next
    term.
    """

    value: torch.Tensor  # [N]
    stats: dict[str, torch.Tensor]  # name in stats.jsonl -> values to average


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One optimisation step on one network, every `interval` iterations, with its loss scaled by `gain`."""

    name: str  # in the log; its first letter names the optimiser in checkpoints, see own_optimizer
    module: torch.nn.Module  # the network whose parameters are updated
    optimizer: torch.optim.Optimizer
    losses: Callable[[Any], Iterator[Loss]]  # from a batch, as the loop's subject returns it, to loss terms
    interval: int = 1  # iterations between two steps
    gain: float = 1.0  # factor of every term; equal to `interval` for lazy regularisation
    state: torch.nn.Module | None = None  # the phase's own buffers and weights, stored in checkpoints
    own_optimizer: bool = False  # the optimiser is not the network's; stored under the whole name


LAST_SHARE = 0.02  # learning rate at the end of a stage, as a share of the one at its start


def cosine(first: float, progress: float) -> float:
    """Return the learning rate of a cosine schedule.

    Args:
        first: learning rate at the start of the stage.
        progress: completed share of the stage, 0 to 1. From 1 on, the rate stays at `LAST_SHARE` of the
            first.
    """
    return first * (LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def lazy_adam(
    module: torch.nn.Module,
    lr: float,
    interval: int | None = None,
    betas: tuple[float, float] = (0.0, 0.99),
) -> torch.optim.Adam:
    """Return Adam with the correction for lazy regularisation.

    With the regulariser applied every I iterations and r = I / (I + 1), the learning rate is lr * r and the
    betas are betas**r (Karras et al. 2020, appendix B).

    Args:
        interval: iterations between regularisations, I; None for no correction.
    """
    r = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(
        list(module.parameters()), lr=lr * r, betas=(betas[0] ** r, betas[1] ** r), eps=1e-8
    )


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on any printable values."""
    # Not Python's hash(), which differs between processes. The
    # shift leaves 63 bits: torch takes signed seeds.
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """Error for a loss that became NaN or infinite.

    The message names the phase, the iteration and the last good checkpoint.
    """


# Rounds of a batch

# These functions draw in ways that RowDraws cannot divide into rows. Inside it, they would silently give each
# round other numbers than one pass over the whole batch, so calling one is an error.
_FORBIDDEN_DRAWS = {
    torch.normal,
    torch.bernoulli,
    torch.randperm,
    torch.randint_like,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
    torch.Tensor.exponential_,
    torch.nn.functional.dropout2d,
    torch.nn.functional.dropout3d,
}


class RowDraws(TorchFunctionMode):
    """Context inside which random functions return rows of what they would draw for the whole batch.

    This covers rand, randn, rand_like, randn_like, dropout and multinomial. A tensor whose first axis has
    length q * m, with m = len(rows), holds q values of each sample in turn (for instance of its rays), or,
    with `blocks`, q blocks of m samples. Scalars ([]) and tensors whose first axis m does not divide are
    drawn unchanged, and are therefore the same in all rounds. A first axis that is a multiple of m by chance
    would be misread: draw per sample, or draw scalars.

    Args:
        rows: indices of the samples of this round, in the batch.
        total: number of samples in the batch.
    >>> torch.manual_seed(0), torch.rand([4, 2])[1::2]  # equals the next line
    >>> with RowDraws(range(1, 4, 2), 4): torch.manual_seed(0), torch.rand([2, 2])
    """

    def __init__(self, rows, total: int, blocks: bool = False):
        super().__init__()
        self.rows = torch.as_tensor(list(rows))
        self.total = total
        self.blocks = blocks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace random functions by draws for the whole batch; call all others unchanged."""
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn):
            # torch accepts rand(2, 3), rand([2, 3]) and rand(size=[2, 3]).
            size = (
                kwargs.pop("size")
                if "size" in kwargs
                else args[0]
                if args and not isinstance(args[0], int)
                else args
            )
            full_size = self._full_size(list(size))
            return func(list(size), **kwargs) if full_size is None else self._keep(func(full_size, **kwargs))
        if func in (torch.rand_like, torch.randn_like):
            full_size = self._full_size(list(args[0].shape))
            return (
                func(*args, **kwargs)
                if full_size is None
                else self._keep(func(args[0].new_empty(full_size), *args[1:], **kwargs))
            )
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.multinomial:
            return self._multinomial(*args, **kwargs)
        assert func not in _FORBIDDEN_DRAWS, f"{func}: inside RowDraws draw with rand or randn"
        return func(*args, **kwargs)

    def _full_size(self, size: list[int]) -> list[int] | None:
        """Return the size of the draw for the whole batch; None for a size that m does not divide."""
        m = len(self.rows)
        return [size[0] // m * self.total, *size[1:]] if size and size[0] and size[0] % m == 0 else None

    def _keep(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return this round's rows of a draw for the whole batch."""
        rows = self.rows.to(drawn.device)
        q = drawn.shape[0] // self.total
        if self.blocks:
            return drawn.unflatten(0, (q, self.total))[:, rows].flatten(0, 1)  # [q, N, ...] -> [q * m, ...]
        return drawn.unflatten(0, (self.total, q))[rows].flatten(0, 1)  # [N, q, ...] -> [m * q, ...]

    def _dropout(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """Apply dropout whose mask is this round's part of a mask for the whole batch."""
        full_size = self._full_size(list(x.shape)) if training else None
        if full_size is None:
            return torch.nn.functional.dropout(x, p, training, inplace)
        # Dropout of ones is the mask, already scaled by 1 / (1 - p); the mask is then divided into rows.
        return x * self._keep(
            torch.nn.functional.dropout(torch.ones(full_size, dtype=x.dtype, device=x.device), p)
        )

    def _multinomial(
        self, odds: torch.Tensor, count: int, replacement: bool = False, **kwargs
    ) -> torch.Tensor:
        """Draw indices for the whole batch and keep this round's."""
        full_size = self._full_size(list(odds.shape))
        # The odds of the samples of other rounds are not available here. Equal odds can be expanded to them.
        assert full_size is not None and bool((odds == odds[:1]).all()), (
            "inside RowDraws multinomial needs the same odds for every sample"
        )
        return self._keep(torch.multinomial(odds[:1].expand(full_size), count, replacement, **kwargs))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Division of a batch over ranks, and of each rank's part into rounds."""

    batch: int  # N, samples per iteration over all ranks
    ranks: Ranks
    size: int | None = None  # samples per round; None = all that a rank has

    def __post_init__(self):
        world = self.ranks.world
        size = self.size or max(self.batch // self.ranks.world, 1)
        if self.batch % (world * size):
            raise ValueError(
                f"--batch: expected a multiple of {world} processes x {size} images per pass (--batch-gpu),"
                f" got {self.batch}. Change one."
            )

    @property
    def here(self) -> int:
        """Number of rounds that each rank runs."""
        return self.batch // self.ranks.world // (self.size or self.batch // self.ranks.world)

    @property
    def total(self) -> int:
        """Number of rounds over all ranks, K."""
        return self.here * self.ranks.world

    def rows(self, turn: int) -> slice:
        """Return the rows of the whole batch that belong to this rank's round `turn`."""
        # Rank r runs rounds r, r + W, ... of all K: with W ranks or with one, the same K rounds exist.
        return slice(self.ranks.rank + turn * self.ranks.world, None, self.total)

    def draws(self, turn: int):
        """Return a context that draws the random numbers of those rows. It does nothing if K = 1."""
        if self.total == 1:
            return contextlib.nullcontext()
        return RowDraws(range(self.batch)[self.rows(turn)], self.batch)


class MovingAverages:
    """Buffers that forward passes update by themselves (w_avg), made independent of the number of rounds.

    All rounds start from the same values. At the end the mean of the rounds' changes is added once. Without
    this, K rounds would move the average K times, each time further.
    """

    def __init__(self, module: torch.nn.Module, rounds: int):
        # A single round needs nothing of this: without buffers, every method is a loop over nothing.
        named = module.named_buffers() if rounds > 1 else ()
        self._buffers = [b for name, b in named if name.endswith("w_avg")]
        self._start = [b.clone() for b in self._buffers]
        self.steps = [torch.zeros_like(b) for b in self._buffers]
        self._rounds = rounds

    def end_round(self) -> None:
        """Record how far the round moved the buffers, and move them back."""
        for buffer, start, step in zip(self._buffers, self._start, self.steps, strict=True):
            step += (buffer - start) / self._rounds
            buffer.copy_(start)

    def finish(self) -> None:
        """Add the mean change to the buffers. With several ranks, `steps` must have been summed before."""
        for buffer, step in zip(self._buffers, self.steps, strict=True):
            buffer += step


class GradientSum:
    """Sum of the gradients of several rounds.

    The gradients of a round are complete before they are added to the sum. Floating-point addition depends on
    order: with this one, two rounds on one rank are bitwise identical to one round on each of two ranks.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rounds: int):
        # With one round, the parameters' own .grad already is the sum.
        self._parameters = list(parameters) if rounds > 1 else []
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def end_round(self) -> None:
        """Add the gradients of the round that has run backward, and clear them."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                total = self._sums[i]
                # The first round's tensor becomes the sum, which saves a
                # copy; later rounds are added in place.
                self._sums[i] = parameter.grad if total is None else total.add_(parameter.grad)
                parameter.grad = None

    def finish(self) -> None:
        """Store the sums as the parameters' gradients."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total


def sum_over_ranks(
    ranks: Ranks, parameters: Iterable[torch.nn.Parameter], others: list[torch.Tensor]
) -> None:
    """Sum all gradients, and `others`, over ranks, in place and in one transfer.

    A parameter that has no gradient on this rank must have none on any rank.
    """
    tensors = [p.grad for p in parameters if p.grad is not None] + others
    if ranks.world > 1:
        # One flat tensor: a transfer per parameter would cost its latency hundreds of times.
        flat = ranks.sum_(torch.cat([t.reshape(-1).float() for t in tensors]))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
