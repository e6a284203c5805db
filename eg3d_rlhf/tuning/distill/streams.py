"""Random draws by name: each stream has its own generator, derived from (seed, stream, step).

A resumed run, another method's arm and another number of noises then see the same views, times and first noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.phases import derive_seed


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The draws of one run."""

    seed: int

    def generator(self, name: str, step: int) -> torch.Generator:
        """A fresh generator on the CPU; the same name and step give the same draws."""
        return torch.Generator().manual_seed(derive_seed(self.seed, name, step))

    def noises(self, count: int, like: torch.Tensor, step: int) -> torch.Tensor:
        """[count, *like.shape] standard normal; noise k is that of stream noise/k, whatever the count."""
        return torch.stack([self._normal(f"noise/{k}", like.shape, step) for k in range(count)]).to(like)

    def chance(self, name: str, count: int, step: int) -> torch.Tensor:
        """[count] uniform in 0..1."""
        return torch.rand(count, generator=self.generator(name, step))

    def _normal(self, name: str, shape: Sequence[int], step: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator(name, step))
