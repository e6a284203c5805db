"""Cache of observations by seed for reward training.

An observation is the input that a reward network reads from a shape, for example a cropped density grid.
Observations are computed once from a generator, stored as float16, and read as float32 batches.

Shapes: N seeds; [N, ...] is a batch of observations, whose other axes depend on the kind of observation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from eg3d_rlhf.core.seeds import SCALES
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import as_generator, ws_of_seeds
from eg3d_rlhf.rewards.observations import Observation
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE, Ranks
from training.storage import write_atomic

Source = Callable[[Sequence[int]], torch.Tensor]  # seeds -> observations [N, ...]


def observe_seeds(
    generator: Any,
    observation: Observation,
    *,
    psi: float = 1.0,
    cutoff: int | None = 14,
    ops: str | None = None,
) -> Source:
    """Create a function that computes the observations [N, ...] of a generator's samples from their seeds.

    The generator is conditioned on the frontal camera, and its noise inputs are constant.

    Args:
        generator: `Generator`, or a network from which `as_generator` creates one.
        observation: kind of observation to compute.
        psi: truncation psi of the latents w; 1 truncates nothing.
        cutoff: number of layers whose latents are truncated; None truncates all layers.
        ops: implementation of the custom operators; None: the one that `observation.ops` names.
    """
    generator = as_generator(generator)

    def observe(seeds: Sequence[int]) -> torch.Tensor:
        # The operators decide whether stored values are bitwise reproducible, see Observation.ops.
        with torch.no_grad(), implementation(ops or observation.ops):
            return observation.observe(generator.field(ws_of_seeds(generator, seeds, psi, cutoff)))

    return observe


def observe_untuned(
    generator: Any, observation: Observation, psi: float, cutoff: int | None, batch: int = 16
) -> Iterator[torch.Tensor]:
    """Yield batches [N, ...] of observations, on which the scores of ensemble members are standardised.

    The observations are those of the untuned generator's samples. Their seeds (`SCALES`) are reserved for
    this purpose.

    Args:
        generator: `Generator` before tuning, or a network from which `as_generator` creates one.
        observation: kind of observation to compute.
        psi: truncation psi of the latents w; 1 truncates nothing.
        cutoff: number of layers whose latents are truncated; None truncates all layers.
        batch: number of samples per batch.
    """
    observe = observe_seeds(generator, observation, psi=psi, cutoff=cutoff)
    return (observe(SCALES.seeds[start : start + batch]) for start in range(0, SCALES.count, batch))


def cache_file(
    root: Path, generator_hash: str, observation: Observation, psi: float, cutoff: int | None
) -> Path:
    """Return the path of the file that caches the observations of one generator with these settings.

    The name of the file's folder changes with every setting that changes observations. The store never marks
    this folder as finished, because later runs with other labels add observations of further seeds.

    Args:
        root: folder of the store (experiments/store.py), which contains the file's folder.
        generator_hash: hash of the generator's weights.
        observation: kind of observation.
        psi: truncation psi of the latents w; 1 truncates nothing.
        cutoff: number of layers whose latents are truncated; None truncates all layers.
    """
    inputs = {
        "generator": generator_hash,
        "observation": observation.to_dict(),
        "psi": psi,
        "cutoff": cutoff,
        # Values depend on the order in which seeds are observed, see `fill`.
        "order": "ascending",
    }
    return Store(root).folder(observation.kind, inputs) / "observed.safetensors"


class ObservationCache:
    """Observations of a set of seeds in memory, optionally stored in a file between runs.

    Values are rounded to float16, with a relative error of at most 0.05 %. The rounding changes scores by
    less than a repetition of the training with another seed does. Published rewards were trained on float16
    volumes as well.

    Args:
        source: function from seeds to their observations [N, ...]; it is called for seeds that are not in the
            cache.
        cache: path of the file that is read here and written by `save`; None keeps observations in memory
            only.
    Raises: ValueError if the file exists and is not a file of observations.
    """

    def __init__(self, source: Source, cache: Path | None = None):
        self._source = source
        self._cache = cache
        self._cached: dict[int, torch.Tensor] = {}  # seed -> observation of this seed, float16
        if cache is not None and cache.is_file():
            try:
                stored_tensors = safetensors.torch.load_file(cache)
                # Rows of one tensor share its memory, so nothing is copied.
                self._cached = dict(
                    zip(stored_tensors["seeds"].tolist(), stored_tensors["observed"], strict=True)
                )
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{cache}: this file of observations cannot be read ({error}). Delete the file; the"
                    " observations will then be computed again."
                ) from error

    def __len__(self) -> int:
        return len(self._cached)

    def fill(
        self,
        seeds: Iterable[int],
        batch: int = 16,
        on_drawn: Callable[[int], None] | None = None,
        ranks: Ranks = SINGLE,
    ) -> int:
        """Compute and store in memory the observations of all seeds that are not yet in the cache.

        The batches are distributed over the ranks, and every rank gets all results.

        Seeds are observed in ascending order, never in the order of the labels. The random offsets of a ray's
        samples depend on the index of its shape in the batch. If winners had even indices and losers had odd
        indices, a network would learn this difference instead of differences of shape.

        Args:
            seeds: seeds whose observations are needed; repetitions are allowed.
            batch: number of seeds that are observed at once.
            on_drawn: function that is called with the number of seeds after each batch of this rank.
            ranks: processes that share the work.
        Returns: number of seeds that were missing in the cache.
        """
        # Ranks on different machines may have different cache files. If they did not agree on the missing
        # seeds, the exchange below would deadlock. In this case every rank discards its observations.
        if ranks.world > 1:
            cached_seeds_by_rank = ranks.gather(list(self._cached))
            if len({tuple(cached_seeds) for cached_seeds in cached_seeds_by_rank}) > 1:
                self._cached = {}
        # A set removes repetitions, since labels name most seeds several times.
        missing_seeds = sorted({seed for seed in seeds if seed not in self._cached})
        observations: dict[int, torch.Tensor] = {}
        batches = [missing_seeds[start : start + batch] for start in range(0, len(missing_seeds), batch)]
        for batch_seeds in batches[ranks.rank :: ranks.world]:
            observation_rows = self._source(batch_seeds).to("cpu", torch.float16)
            observations.update(zip(batch_seeds, observation_rows, strict=True))
            if on_drawn:
                on_drawn(len(batch_seeds))
        # Each seed was observed by one rank. In a sum over ranks the other ranks add zeros, so that every
        # rank gets the observation. A rank without a batch observes one seed only to get the shape.
        if ranks.world > 1 and missing_seeds:
            observation_shape = (
                next(iter(observations.values())).shape
                if observations
                else self._source(missing_seeds[:1]).shape[1:]
            )
            # Zeros leave the sum of float16 values exact.
            zeros = torch.zeros(observation_shape, dtype=torch.float16)
            # 64 seeds at a time, so that the exchange needs little additional memory.
            for start in range(0, len(missing_seeds), 64):
                exchanged_seeds = missing_seeds[start : start + 64]
                observation_rows = torch.stack([observations.get(seed, zeros) for seed in exchanged_seeds])
                ranks.sum_(observation_rows, "exchange observations")
                observations.update(zip(exchanged_seeds, observation_rows, strict=True))
        # In ascending order on every rank, whichever rank observed a seed.
        self._cached.update((seed, observations[seed]) for seed in missing_seeds)
        return len(missing_seeds)

    def take(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> torch.Tensor:
        """Return the observations of seeds as float32 [N, ...]. `fill` must have computed these before."""
        return torch.stack([self._cached[seed] for seed in seeds]).to(device, torch.float32)

    def save(self) -> None:
        """Write the cache file atomically.

        Nothing is written if the cache is empty or has no file.
        """
        if self._cache is not None and self._cached:
            stored_tensors = {
                "seeds": torch.tensor(list(self._cached), dtype=torch.int64),
                "observed": torch.stack(list(self._cached.values())),
            }
            write_atomic(self._cache, safetensors.torch.save(stored_tensors))
