"""What a loop repeats: phases, each an optimisation step on one network, with named, unreduced losses."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Loss:
    """One term of a phase: the loop takes its mean, scales by the phase's gain and runs backward before asking for the next."""

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
    window: tuple[float, float] = (0, math.inf)  # from and until how many images it runs

    def due(self, batch_idx: int, cur_nimg: int) -> bool:
        """Whether it runs in an iteration."""
        return batch_idx % self.interval == 0 and self.window[0] <= cur_nimg < self.window[1]


def lazy_adam(
    module: torch.nn.Module, lr: float, interval: int | None = None, betas: tuple[float, float] = (0.0, 0.99), eps: float = 1e-8
) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B): with r = I/(I+1), lr*r and betas**r.

    Args:
        interval: iterations between regularisations, or None for no correction.
    """
    r = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(list(module.parameters()), lr=lr * r, betas=(betas[0] ** r, betas[1] ** r), eps=eps)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """A loss became NaN or infinite; the message names the phase, the iteration and the last good checkpoint."""
