"""Phases, which are optimisation steps that a training loop repeats, and updates that are computed in
several rounds.

A batch of N samples can be processed in K rounds, one after another on one process or in parallel on several
processes. The update of the weights is the same as for one pass over the full batch, for two reasons:

1. Round k contains the rows k, k + K, k + 2K, ... of the batch. The layer of D that computes minibatch
   statistics groups the samples i, i + N/G, i + 2N/G, ... with the group size G. If the number of samples in
   a round is a multiple of G, every group lies within one round.
2. Random numbers are drawn for the full batch, and each round uses only its rows. The random numbers of a
   sample therefore depend only on its index in the batch.

Shapes: N is the number of samples in a batch, K the number of rounds over all ranks, m the number of samples
in a round.
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

    The loop computes the mean over samples, multiplies it by the gain of the phase, and runs the backward
    pass before it requests the next term.
    """

    value: torch.Tensor  # loss of each sample [N]
    stats: dict[str, torch.Tensor]  # name in stats.jsonl -> values, whose mean is reported


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One optimisation step on one network, which is repeated every `interval` iterations."""

    # Name in the log. Its first letter is the name of the optimiser in checkpoints, see own_optimizer.
    name: str
    module: torch.nn.Module  # network whose parameters are updated
    optimizer: torch.optim.Optimizer  # optimiser of these parameters
    losses: Callable[[Any], Iterator[Loss]]  # function that yields the loss terms of a batch
    interval: int = 1  # number of iterations between two steps
    gain: float = 1.0  # factor on every loss term; equal to `interval` for lazy regularisation
    # Module whose state belongs to the phase and is stored in checkpoints; None: there is none.
    state: torch.nn.Module | None = None
    # True: the optimiser is not shared with other phases of the network, and has the phase's name
    # in checkpoints.
    own_optimizer: bool = False


LAST_FRACTION = 0.02  # learning rate at the end of a cosine schedule, as a fraction of the initial one


def cosine(initial_rate: float, progress: float) -> float:
    """Return the learning rate of a cosine schedule.

    Args:
        initial_rate: learning rate at the start.
        progress: completed fraction of the schedule. From 1 on, the rate is `LAST_FRACTION` times the
            initial rate.
    """
    return initial_rate * (
        LAST_FRACTION + (1 - LAST_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


def lazy_adam(
    module: torch.nn.Module,
    lr: float,
    interval: int | None = None,
    betas: tuple[float, float] = (0.0, 0.99),
) -> torch.optim.Adam:
    """Return an Adam optimiser with the correction for lazy regularisation (Karras et al. 2020, appendix B).

    If a regulariser is applied every I iterations, the learning rate is lr * r and the betas are betas**r
    with r = I / (I + 1).

    Args:
        module: network whose parameters are optimised.
        lr: learning rate without the correction.
        interval: number of iterations I between steps of the regulariser; None: no correction.
        betas: Adam's decay rates without the correction.
    """
    rate_factor = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(
        list(module.parameters()),
        lr=lr * rate_factor,
        betas=(betas[0] ** rate_factor, betas[1] ** rate_factor),
        eps=1e-8,
    )


def derive_seed(*seed_parts: object) -> int:
    """Return a seed of 63 bits that depends only on the values, written as texts, and on their order.

    Args: seed_parts: values such as the seed of the run, a number of images and a name.
    """
    # Python's hash() is not used, because it differs between processes.
    digest = hashlib.sha256("/".join(str(seed_part) for seed_part in seed_parts).encode()).digest()
    # 64 bits, shifted to 63 bits, because seeds of torch are signed.
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """Error for a loss that became NaN or infinite.

    The message names the phase, the iteration and the last good checkpoint.
    """


# Division of a batch into rounds.

# RowDraws does not support these random functions. Inside of it they would give each round other numbers than
# one pass over the full batch, so calling one of them is an error.
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
    """Context in which random functions draw for the full batch and return only the rows of one round.

    It supports rand, randn, rand_like, randn_like, dropout and multinomial. The first axis of a tensor has
    the length q * m with m = len(rows): it contains q values of the first sample (for example of its rays),
    then q values of the second, and so on. With `blocks`, it contains q blocks of one value for each of the m
    samples. Scalars ([]), and tensors whose first axis is not divisible by m, are drawn unchanged, and are
    therefore equal in all rounds. Code inside the context must not draw a tensor whose first axis is
    divisible by m by chance.

    Args:
        rows: indices in the batch of the samples of this round.
        sample_count: number of samples in the batch N.
        blocks: True: the first axis contains blocks, see above.
    >>> torch.manual_seed(0), torch.rand([4, 2])[1::2]  # the same numbers as in the next line
    >>> with RowDraws(range(1, 4, 2), 4): torch.manual_seed(0), torch.rand([2, 2])
    """

    def __init__(self, rows, sample_count: int, blocks: bool = False):
        super().__init__()
        self.rows = torch.as_tensor(list(rows))
        self.total = sample_count
        self.blocks = blocks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function of torch.

        Random functions draw for the full batch. All other functions are called unchanged.
        """
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn):
            # torch accepts rand(size=[2, 3]), rand([2, 3]) and rand(2, 3).
            if "size" in kwargs:
                requested_size = kwargs.pop("size")
            elif args and not isinstance(args[0], int):
                requested_size = args[0]
            else:
                requested_size = args
            full_size = self._full_size(list(requested_size))
            return (
                func(list(requested_size), **kwargs)
                if full_size is None
                else self._keep(func(full_size, **kwargs))
            )
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
        assert func not in _FORBIDDEN_DRAWS, f"{func} is not supported inside RowDraws. Use rand or randn."
        return func(*args, **kwargs)

    def _full_size(self, requested_size: list[int]) -> list[int] | None:
        """Return the size of a tensor for the full batch, or None if the first axis is not divisible by m."""
        samples_per_round = len(self.rows)
        # Scalars and empty tensors are drawn unchanged, too.
        is_divisible = (
            bool(requested_size) and requested_size[0] > 0 and requested_size[0] % samples_per_round == 0
        )
        return (
            [requested_size[0] // samples_per_round * self.total, *requested_size[1:]]
            if is_divisible
            else None
        )

    def _keep(self, full_values: torch.Tensor) -> torch.Tensor:
        """Return the rows of this round from values for the full batch."""
        row_indices = self.rows.to(full_values.device)
        values_per_sample = full_values.shape[0] // self.total
        if self.blocks:
            # [q, N, ...] -> [q, m, ...] -> [q * m, ...]
            return full_values.unflatten(0, (values_per_sample, self.total))[:, row_indices].flatten(0, 1)
        # [N, q, ...] -> [m, q, ...] -> [m * q, ...]
        return full_values.unflatten(0, (self.total, values_per_sample))[row_indices].flatten(0, 1)

    def _dropout(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """Apply dropout with the rows of this round from a mask for the full batch."""
        full_size = self._full_size(list(x.shape)) if training else None
        if full_size is None:
            return torch.nn.functional.dropout(x, p, training, inplace)
        # Dropout of ones gives the mask, which is scaled by 1 / (1 - p) already.
        return x * self._keep(
            torch.nn.functional.dropout(torch.ones(full_size, dtype=x.dtype, device=x.device), p)
        )

    def _multinomial(
        self, sample_weights: torch.Tensor, draw_count: int, replacement: bool = False, **kwargs
    ) -> torch.Tensor:
        """Draw indices for the full batch, and return those of this round. See torch.multinomial."""
        full_size = self._full_size(list(sample_weights.shape))
        # The weights of samples in other rounds are not available here, so all samples must have
        # equal weights.
        assert full_size is not None and bool((sample_weights == sample_weights[:1]).all()), (
            "inside RowDraws, multinomial needs the same weights for every sample"
        )
        return self._keep(
            torch.multinomial(sample_weights[:1].expand(full_size), draw_count, replacement, **kwargs)
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Division of a batch into ranks and rounds."""

    batch: int  # number of samples in an iteration over all ranks N
    ranks: Ranks  # position of this process among the processes of the run
    size: int | None = None  # number of samples in a round m; None: each rank has one round

    def __post_init__(self):
        world = self.ranks.world
        samples_per_round = self.size or max(self.batch // self.ranks.world, 1)
        if self.batch % (world * samples_per_round):
            raise ValueError(
                f"--batch: expected a multiple of {world * samples_per_round} ({world} processes x"
                f" {samples_per_round} images in a forward pass), got {self.batch}. Use such a multiple, or"
                " change --batch-gpu."
            )

    @property
    def rounds_per_rank(self) -> int:
        """Number of rounds of each rank."""
        return self.batch // self.ranks.world // (self.size or self.batch // self.ranks.world)

    @property
    def total(self) -> int:
        """Number of rounds over all ranks K."""
        return self.rounds_per_rank * self.ranks.world

    def rows(self, round_index: int) -> slice:
        """Return the rows of the full batch that belong to a round of this rank."""
        # Rank r has the rounds r, r + W, ... of all K rounds, so the rounds are the same for any number of
        # ranks W.
        return slice(self.ranks.rank + round_index * self.ranks.world, None, self.total)

    def random_rows(self, round_index: int):
        """Return a context in which random functions draw the numbers of a round's rows.

        The context has no effect if there is only one round (K = 1).
        """
        if self.total == 1:
            return contextlib.nullcontext()
        return RowDraws(range(self.batch)[self.rows(round_index)], self.batch)


class MovingAverages:
    """Correction of the running means (buffers w_avg) that forward passes update, for several rounds.

    All rounds start with the same values. At the end, the mean change of the rounds is added once. Without
    this correction, K rounds would update the running mean K times.

    Args: module: network with the buffers; round_count: number of rounds over all ranks K.
    """

    def __init__(self, module: torch.nn.Module, round_count: int):
        # A single round needs no correction. The list is then empty, and the methods have no effect.
        named_buffers = module.named_buffers() if round_count > 1 else ()
        self._buffers = [buffer for buffer_name, buffer in named_buffers if buffer_name.endswith("w_avg")]
        self._start = [buffer.clone() for buffer in self._buffers]  # values at the start of each round
        self.steps = [torch.zeros_like(buffer) for buffer in self._buffers]  # sums of changes divided by K
        self._rounds = round_count

    def end_round(self) -> None:
        """Add the changes of the round to `steps`, and reset the buffers."""
        for buffer, initial_value, mean_change in zip(self._buffers, self._start, self.steps, strict=True):
            mean_change += (buffer - initial_value) / self._rounds
            buffer.copy_(initial_value)

    def finish(self) -> None:
        """Add the mean change to the buffers.

        With several ranks, `steps` must have been summed over ranks before.
        """
        for buffer, mean_change in zip(self._buffers, self.steps, strict=True):
            buffer += mean_change


class GradientSum:
    """Sum of the gradients of several rounds.

    torch would add the gradients of each loss term directly to the sum. Here the gradients of a round are
    completed before they are added. With this order of additions, two rounds on one rank are bitwise
    identical to one round on each of two ranks.

    Args: parameters: parameters of the network; round_count: number of rounds of this rank.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], round_count: int):
        # With one round, the attributes `grad` of the parameters are the sums already.
        self._parameters = list(parameters) if round_count > 1 else []
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def end_round(self) -> None:
        """Add the gradients of a round to the sums, and clear them."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                gradient_sum = self._sums[i]
                # The tensor of the first round becomes the sum, without a copy. Later rounds are added to it
                # in place.
                self._sums[i] = parameter.grad if gradient_sum is None else gradient_sum.add_(parameter.grad)
                parameter.grad = None

    def finish(self) -> None:
        """Store the sums in the attributes `grad` of the parameters."""
        for parameter, gradient_sum in zip(self._parameters, self._sums, strict=True):
            parameter.grad = gradient_sum


def sum_over_ranks(
    ranks: Ranks, parameters: Iterable[torch.nn.Parameter], other_tensors: list[torch.Tensor]
) -> None:
    """Sum gradients and other tensors over ranks, in place.

    Args:
        ranks: position of this process among the processes of the run.
        parameters: parameters whose gradients are summed. All ranks must have gradients for the
            same parameters.
        other_tensors: further tensors.
    """
    tensors = [parameter.grad for parameter in parameters if parameter.grad is not None] + other_tensors
    if ranks.world > 1:
        # One transfer of a flat tensor, because the latency of hundreds of small transfers would be long.
        summed_tensor = ranks.sum_(torch.cat([tensor.reshape(-1).float() for tensor in tensors]))
        summed_values = summed_tensor.split([tensor.numel() for tensor in tensors])
        for tensor, tensor_values in zip(tensors, summed_values, strict=True):
            tensor.copy_(tensor_values.reshape(tensor.shape))
