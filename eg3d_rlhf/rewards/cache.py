"""Observations by seed for reward training: drawn once from a generator, kept as float16, read as float32
batches.

Shape letters: N seeds; [N, ...] is what the observation gives.
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

Source = Callable[[Sequence[int]], torch.Tensor]  # seeds -> [N, ...]


def observe_seeds(
    generator: Any, observation: Observation, *, psi: float = 1.0, cutoff: int | None = 14
) -> Source:
    """A source of what a generator's shapes look like from the front, with `Observation.ops`, truncation
    `psi`, constant noise.
    """
    generator = of(generator)

    def draw(seeds: Sequence[int]) -> torch.Tensor:
        with torch.no_grad(), implementation(observation.ops):
            return observation.observe(generator.field(ws_of_seeds(generator, seeds, psi, cutoff)))

    return draw


def untuned(
    generator: Any, observation: Observation, psi: float, cutoff: int | None, batch: int = 16
) -> Iterator[torch.Tensor]:
    """Batches [N, ...] of what is seen of the untuned samples on which an ensemble's members are
    standardised.
    """
    draw = observe_seeds(generator, observation, psi=psi, cutoff=cutoff)
    return (draw(SCALES.all[first : first + batch]) for first in range(0, SCALES.count, batch))


def cache_file(root: Path, generator: str, observation: Observation, psi: float, cutoff: int | None) -> Path:
    """The file of a cache in a store, whose folder's name changes with everything that observations depend
    on. It is never finished: other labels ask for further seeds.
    """
    inputs = {
        "generator": generator,
        "observation": observation.to_dict(),
        "psi": psi,
        "cutoff": cutoff,
        "order": "ascending",
    }
    return Store(root).folder(observation.kind, inputs) / "observed.safetensors"


class ObservationCache:
    """Observations of a set of seeds in RAM, optionally kept in a file between runs.

    Values are rounded to float16, at most 0.05 % of a value off; scores move less than training noise does.
    Published rewards were trained on float16 volumes as well.

    Args:
        source: draws for seeds it has not seen.
        cache: file to read at the start and to write by `save`; None keeps them in RAM alone.
    """

    def __init__(self, source: Source, cache: Path | None = None):
        self._source = source
        self._cache = cache
        self._kept: dict[int, torch.Tensor] = {}  # seed -> float16 [...]
        if cache is not None and cache.is_file():
            try:
                stored = safetensors.torch.load_file(cache)
                self._kept = dict(zip(stored["seeds"].tolist(), stored["observed"], strict=True))
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(
                    f"ObservationCache({cache.name}): expected a cache, got: {error}. Delete the file."
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
        """Draw the seeds that are missing, `batch` at a time, in turn over the ranks; every rank gets all.

        They are drawn in ascending order, never in that of the labels: a ray's jitter depends on its shape's
        place in the batch, and where winners have even places and losers odd ones, a network learns that
        instead of shapes.

        `on_drawn` hears how many were added here. Returns the number drawn.
        """
        if ranks.world > 1 and len({tuple(held) for held in ranks.gather(list(self._kept))}) > 1:
            self._kept = {}  # the machines' caches differ
        missing = sorted({seed for seed in seeds if seed not in self._kept})
        drawn: dict[int, torch.Tensor] = {}
        for part in [missing[start : start + batch] for start in range(0, len(missing), batch)][
            ranks.rank :: ranks.world
        ]:
            drawn.update(zip(part, self._source(part).to("cpu", torch.float16), strict=True))
            if on_drawn:
                on_drawn(len(part))
        # each was drawn on one rank; where none was drawn here, one is, for its shape
        if ranks.world > 1 and missing:
            shape = next(iter(drawn.values())).shape if drawn else self._source(missing[:1]).shape[1:]
            nothing = torch.zeros(shape, dtype=torch.float16)
            for start in range(0, len(missing), 64):
                part = missing[start : start + 64]
                rows = torch.stack([drawn.get(seed, nothing) for seed in part])
                ranks.sum_(rows, "exchange observations")
                drawn.update(zip(part, rows, strict=True))
        self._kept.update((seed, drawn[seed]) for seed in missing)
        return len(missing)

    def take(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> torch.Tensor:
        """Observations of seeds that `fill` has drawn, float32 [N, ...]."""
        return torch.stack([self._kept[seed] for seed in seeds]).to(device, torch.float32)

    def save(self) -> None:
        """Write the cache file, if there is one, atomically."""
        if self._cache is not None and self._kept:
            stored = {
                "seeds": torch.tensor(list(self._kept), dtype=torch.int64),
                "observed": torch.stack(list(self._kept.values())),
            }
            write_atomic(self._cache, safetensors.torch.save(stored))
