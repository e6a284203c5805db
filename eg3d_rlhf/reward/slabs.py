"""Slabs by seed for reward training: drawn once from a generator, kept as float16, read as float32 batches.

Shape letters: N seeds, D, H, W = z, y, x.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from eg3d_rlhf.generators import ws_of_seeds
from eg3d_rlhf.sigma.slab import sample_slab
from eg3d_rlhf.sigma.spec import SlabSpec
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE, Ranks
from training.storage import write_atomic

SlabSource = Callable[[Sequence[int]], torch.Tensor]  # seeds -> [N, 1, D, H, W] in [0, 100]


def generator_slabs(G, spec: SlabSpec, *, psi: float = 1.0, cutoff: int | None = 14) -> SlabSource:
    """A source that draws each seed's slab from G: frontal conditioning, truncation `psi` up to layer `cutoff`, constant noise.

    In plain torch: what a reward is trained on should not depend on the compiler of the machine.
    """

    def draw(seeds: Sequence[int]) -> torch.Tensor:
        with torch.no_grad(), implementation("torch"):
            return sample_slab(G, ws_of_seeds(G, seeds, psi, cutoff), spec)

    return draw


def cache_name(generator: str, spec: SlabSpec, psi: float, cutoff: int | None) -> str:
    """File name that changes with everything the slabs depend on."""
    key = json.dumps([generator, spec.to_dict(), psi, cutoff], sort_keys=True)
    return f"slabs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


class SlabStore:
    """Slabs of a set of seeds in RAM, optionally kept in a file between runs.

    Values are rounded to float16, at most 0.05 % of a value off; scores move less than training noise does. Published rewards were
    trained on float16 volumes as well.

    Args:
        source: draws slabs for seeds it has not seen.
        cache: file to read at the start and to write by `save`; None keeps the slabs in RAM alone.
    """

    def __init__(self, source: SlabSource, cache: Path | None = None):
        self._source = source
        self._cache = cache
        self._row: dict[int, int] = {}
        self._slabs: torch.Tensor | None = None  # float16 [rows, 1, D, H, W]
        if cache is not None and cache.is_file():
            try:
                stored = safetensors.torch.load_file(cache)
                self._slabs, self._row = stored["slabs"], {seed: row for row, seed in enumerate(stored["seeds"].tolist())}
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(f"SlabStore({cache.name}): expected a slab cache, got: {error}. Delete the file.") from error

    def __len__(self) -> int:
        return len(self._row)

    def fill(
        self, seeds: Iterable[int], batch: int = 16, on_slabs: Callable[[int], None] | None = None, ranks: Ranks = SINGLE
    ) -> int:
        """Draw the seeds that are missing, `batch` at a time, in turn over the ranks; every rank gets all.

        `on_slabs` hears how many were added here. Returns the number drawn.
        """
        if ranks.world > 1 and len({tuple(held) for held in ranks.gather(list(self._row))}) > 1:
            self._row, self._slabs = {}, None  # the machines' caches differ
        missing = [seed for seed in dict.fromkeys(seeds) if seed not in self._row]
        old = len(self)
        parts = [(start, missing[start : start + batch]) for start in range(0, len(missing), batch)]
        for start, part in parts[ranks.rank :: ranks.world]:
            self._put(old + start, self._source(part), old + len(missing))
            if on_slabs:
                on_slabs(len(part))
        if ranks.world > 1 and missing:
            self._exchange(old, missing, ranks)
        self._row.update(zip(missing, range(old, old + len(missing)), strict=True))
        return len(missing)

    def _put(self, row: int, slabs: torch.Tensor, rows: int) -> None:
        if self._slabs is None or len(self._slabs) < rows:
            self._grow(rows, slabs.shape[1:])
        self._slabs[row : row + len(slabs)] = slabs.to("cpu", torch.float16)

    def _exchange(self, old: int, missing: Sequence[int], ranks: Ranks) -> None:
        """Add up the rows from `old` on, each of which one rank has drawn."""
        if self._slabs is None or len(self._slabs) < old + len(missing):  # nothing to draw here: one slab, for its shape
            self._grow(old + len(missing), self._source(missing[:1]).shape[1:])
        for rows in self._slabs[old : old + len(missing)].split(64):
            ranks.sum_(rows, "exchange slabs")

    def _grow(self, rows: int, shape: torch.Size) -> None:
        grown = torch.zeros(rows, *shape, dtype=torch.float16)
        if self._slabs is not None:
            grown[: len(self._slabs)] = self._slabs
        self._slabs = grown

    def take(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> torch.Tensor:
        """Slabs of seeds that `fill` has drawn, float32 [N, 1, D, H, W]."""
        return self._slabs[[self._row[seed] for seed in seeds]].to(device, torch.float32)

    def save(self) -> None:
        """Write the cache file, if there is one, atomically."""
        if self._cache is not None and self._slabs is not None:
            seeds = torch.tensor(list(self._row), dtype=torch.int64)
            write_atomic(self._cache, safetensors.torch.save({"seeds": seeds, "slabs": self._slabs[: len(seeds)].contiguous()}))
