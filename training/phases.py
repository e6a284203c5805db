"""What a loop repeats: phases, each an optimisation step on one network, with named, unreduced losses; and an
update from several rounds.

Rounds of a batch, in turn on one process or side by side on several, equal one pass over the whole batch.
With K rounds, round k holds rows k, k + K, k + 2K, ... of the batch: the groups of the minibatch-std layer
(i, i + N/G, ...) then lie within rounds, as long as a round holds a multiple of G samples. Random numbers are
drawn for the whole batch, and each round keeps its rows: what a sample meets depends on its place in the
batch alone.

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
    """One term of a phase: the loop takes its mean, scales by the phase's gain and runs backward before
    asking for the next.
    """

    value: torch.Tensor  # [N]
    stats: dict[str, torch.Tensor]  # name -> values to average


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One optimisation step on one network, every `interval` iterations, with its loss scaled by `gain`."""

    name: str
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Any], Iterator[Loss]]  # of a batch, as the loop's subject gives it
    interval: int = 1
    gain: float = 1.0
    state: torch.nn.Module | None = None  # what the phase itself must carry through a checkpoint
    own_optimizer: bool = False  # saved apart from the network's other optimizer


LAST_SHARE = 0.02  # last step size of a stage as a share of the first


def cosine(first: float, progress: float) -> float:
    """Step size after a share `progress` of a stage, which begins with `first` and falls to `LAST_SHARE` of
    it.
    """
    return first * (LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def lazy_adam(
    module: torch.nn.Module,
    lr: float,
    interval: int | None = None,
    betas: tuple[float, float] = (0.0, 0.99),
) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B): with r = I/(I+1), lr*r and
    betas**r.

    Args:
        interval: iterations between regularisations, or None for no correction.
    """
    r = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(
        list(module.parameters()), lr=lr * r, betas=(betas[0] ** r, betas[1] ** r), eps=1e-8
    )


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """A loss became NaN or infinite; the message names the phase,
    the iteration and the last good checkpoint.
    """


# Rounds of a batch

_REFUSED = {
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
    """A with-statement inside which rand, randn, rand_like, randn_like and dropout give rows of the whole
    batch's draws.

    A tensor of first axis q * m, m = len(rows), holds q values of each sample in turn (rays), or, with
    `blocks`, q blocks of m samples. Scalars ([]) and first axes that m does not divide are drawn as they are,
    alike for all parts of the batch. A first axis that m divides by chance would be misread: draw per sample,
    or scalars.

    Args:
        rows: which samples of the batch are at hand; total: how many it has.

    >>> torch.manual_seed(0), torch.rand([4, 2])[1::2]  # equals the next line
    >>> with RowDraws(range(1, 4, 2), 4): torch.manual_seed(0), torch.rand([2, 2])
    """

    def __init__(self, rows, total: int, blocks: bool = False):
        super().__init__()
        self.rows = torch.as_tensor(list(rows))
        self.total = total
        self.blocks = blocks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn):
            size = (
                kwargs.pop("size")
                if "size" in kwargs
                else args[0]
                if args and not isinstance(args[0], int)
                else args
            )
            whole = self._whole(list(size))
            return func(list(size), **kwargs) if whole is None else self._keep(func(whole, **kwargs))
        if func in (torch.rand_like, torch.randn_like):
            whole = self._whole(list(args[0].shape))
            return (
                func(*args, **kwargs)
                if whole is None
                else self._keep(func(args[0].new_empty(whole), *args[1:], **kwargs))
            )
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.multinomial:
            return self._multinomial(*args, **kwargs)
        assert func not in _REFUSED, f"{func}: inside RowDraws draw with rand or randn"
        return func(*args, **kwargs)

    def _whole(self, size: list[int]) -> list[int] | None:
        m = len(self.rows)
        return [size[0] // m * self.total, *size[1:]] if size and size[0] and size[0] % m == 0 else None

    def _keep(self, drawn: torch.Tensor) -> torch.Tensor:
        rows = self.rows.to(drawn.device)
        q = drawn.shape[0] // self.total
        if self.blocks:
            return drawn.unflatten(0, (q, self.total))[:, rows].flatten(0, 1)
        return drawn.unflatten(0, (self.total, q))[rows].flatten(0, 1)

    def _dropout(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        whole = self._whole(list(x.shape)) if training else None
        if whole is None:
            return torch.nn.functional.dropout(x, p, training, inplace)
        return x * self._keep(
            torch.nn.functional.dropout(torch.ones(whole, dtype=x.dtype, device=x.device), p)
        )

    def _multinomial(
        self, odds: torch.Tensor, count: int, replacement: bool = False, **kwargs
    ) -> torch.Tensor:
        whole = self._whole(list(odds.shape))
        assert whole is not None and bool((odds == odds[:1]).all()), (
            "inside RowDraws multinomial needs the same odds for every sample"
        )
        return self._keep(torch.multinomial(odds[:1].expand(whole), count, replacement, **kwargs))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is divided: over ranks, then into this rank's rounds."""

    batch: int  # N, over all ranks
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
        """Rounds that this rank runs."""
        return self.batch // self.ranks.world // (self.size or self.batch // self.ranks.world)

    @property
    def total(self) -> int:
        """Rounds over all ranks."""
        return self.here * self.ranks.world

    def rows(self, turn: int) -> slice:
        """Rows of the whole batch in this rank's round `turn`."""
        return slice(self.ranks.rank + turn * self.ranks.world, None, self.total)

    def draws(self, turn: int):
        """Inside: random numbers of those rows; with one round in all, plain draws."""
        if self.total == 1:
            return contextlib.nullcontext()
        return RowDraws(range(self.batch)[self.rows(turn)], self.batch)


class MovingAverages:
    """The buffers of a module that forward passes move (w_avg): all rounds start from the same values, the
    mean of their steps is taken.
    """

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
    """Gradients added up round by round, each round's own first: two rounds here give the bits of one round
    on each of two ranks.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rounds: int):
        self._parameters = list(parameters) if rounds > 1 else []
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def end_round(self) -> None:
        """Take the gradients of the round that has run backward."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                total = self._sums[i]
                self._sums[i] = parameter.grad if total is None else total.add_(parameter.grad)
                parameter.grad = None

    def finish(self) -> None:
        """Give the sums back as gradients."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total


def sum_over_ranks(
    ranks: Ranks, parameters: Iterable[torch.nn.Parameter], others: list[torch.Tensor]
) -> None:
    """Sum all gradients, and `others` in place, by one transfer; parameters without a gradient have none on
    any rank.
    """
    tensors = [p.grad for p in parameters if p.grad is not None] + others
    if ranks.world > 1:
        flat = ranks.sum_(torch.cat([t.reshape(-1).float() for t in tensors]))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
