"""Cache of observations by seed for reward training.

Observations are computed once from a generator, stored as float16, and read as float32 batches.
Shape letters: N seeds; [N, ...] is the shape of the observation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from eg3d_rlhf.core.seeds import SCALES
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.rewards.observations import Observation
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE, Ranks
from training.storage import write_atomic

Source = Callable[[Sequence[int]], torch.Tensor]  # seeds -> observations [N, ...]


def observe_seeds(
    generator: Any, observation: Observation, *, psi: float = 1.0, cutoff: int | None = 14
) -> Source:
    """Create a source that observes a generator's shapes from the front.

    It uses the operators `Observation.ops`, truncation `psi`, and constant noise.
    """
    generator = of(generator)

    def observe(seeds: Sequence[int]) -> torch.Tensor:
        # The operators decide whether stored values are bitwise reproducible, see Observation.ops.
        with torch.no_grad(), implementation(observation.ops):
            return observation.observe(generator.field(ws_of_seeds(generator, seeds, psi, cutoff)))

    return observe


def untuned(
    generator: Any, observation: Observation, psi: float, cutoff: int | None, batch: int = 16
) -> Iterator[torch.Tensor]:
    """Yield batches [N, ...] of observations of the untuned samples on which members of an ensemble are
    standardised.
    """
    # SCALES are held-out seeds that serve only this purpose.
    observe = observe_seeds(generator, observation, psi=psi, cutoff=cutoff)
    return (observe(SCALES.all[first : first + batch]) for first in range(0, SCALES.count, batch))


def cache_file(root: Path, generator: str, observation: Observation, psi: float, cutoff: int | None) -> Path:
    """Return the path of a cache in a store.

    The name of the folder changes with every setting that changes observations. The folder is never marked as
    finished, because other labels add further seeds.
    """
    inputs = {
        "generator": generator,
        "observation": observation.to_dict(),
        "psi": psi,
        "cutoff": cutoff,
        # Values depend on the order in which seeds are observed, see `fill`.
        "order": "ascending",
    }
    return Store(root).folder(observation.kind, inputs) / "observed.safetensors"


class ObservationCache:
    """Observations of a set of seeds in memory, optionally stored in a file between runs.

    Values are rounded to float16, with an error of at most 0.05 %. Scores change by less than the noise of
    training. Published rewards were trained on float16 volumes as well.

    Args:
        source: computes the observations of seeds that are not in the cache.
        cache: file to read at the start and to write by `save`; None keeps observations in memory only.
    """

    def __init__(self, source: Source, cache: Path | None = None):
        self._source = source
        self._cache = cache
        self._kept: dict[int, torch.Tensor] = {}  # seed -> float16 [...]
        if cache is not None and cache.is_file():
            try:
                stored = safetensors.torch.load_file(cache)
                # Rows of one tensor share its memory, so nothing is copied.
                self._kept = dict(zip(stored["seeds"].tolist(), stored["observed"], strict=True))
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(
                    f"ObservationCache({cache.name}): expected a file of observations, got: {error}. Delete"
                    " the file; it will be computed again."
                ) from error

    def __len__(self) -> int:
        return len(self._kept)

    def fill(
        self,
        seeds: Iterable[int],
        batch: int = 16,
        on_drawn: Callable[[int], None] | None = None,
        ranks: Ranks = SINGLE,
    ) -> int:
        """Observe the missing seeds, `batch` at a time.

        Ranks take batches in turn, and every rank gets all results.

        Seeds are observed in ascending order, never in the order of the labels. The jitter of a ray depends
        on its shape's place in the batch. If winners had even places and losers odd ones, a network would
        learn that instead of shapes.

        Args: on_drawn: called with the number of seeds after each batch of this rank.
        Returns: the number of seeds that were missing.
        """
        # Ranks on different machines may have different cache files. They must agree on what is missing, or
        # the exchange below would deadlock, so all of them start empty.
        if ranks.world > 1 and len({tuple(held) for held in ranks.gather(list(self._kept))}) > 1:
            self._kept = {}
        # A set first: labels name most seeds several times.
        missing = sorted({seed for seed in seeds if seed not in self._kept})
        observed: dict[int, torch.Tensor] = {}
        for part in [missing[start : start + batch] for start in range(0, len(missing), batch)][
            ranks.rank :: ranks.world
        ]:
            observed.update(zip(part, self._source(part).to("cpu", torch.float16), strict=True))
            if on_drawn:
                on_drawn(len(part))
        # Each seed was observed by one rank, so a sum over ranks, in which the other ranks add zeros, gives
        # its value to all. A rank without a batch observes one seed only to get the shape.
        if ranks.world > 1 and missing:
            shape = next(iter(observed.values())).shape if observed else self._source(missing[:1]).shape[1:]
            # Zeros leave the sum of float16 values exact.
            nothing = torch.zeros(shape, dtype=torch.float16)
            # In parts of 64, so that the exchange needs little additional memory.
            for start in range(0, len(missing), 64):
                part = missing[start : start + 64]
                rows = torch.stack([observed.get(seed, nothing) for seed in part])
                ranks.sum_(rows, "exchange observations")
                observed.update(zip(part, rows, strict=True))
        self._kept.update((seed, observed[seed]) for seed in missing)
        return len(missing)

    def take(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> torch.Tensor:
        """Return observations of seeds that `fill` has computed, as float32 [N, ...]."""
        return torch.stack([self._kept[seed] for seed in seeds]).to(device, torch.float32)

    def save(self) -> None:
        """Write the cache file atomically, if there is one."""
        if self._cache is not None and self._kept:
            stored = {
                "seeds": torch.tensor(list(self._kept), dtype=torch.int64),
                "observed": torch.stack(list(self._kept.values())),
            }
            write_atomic(self._cache, safetensors.torch.save(stored))
