"""The order in which training images are drawn: endless, windowed reshuffling, resumable at any position."""

from collections.abc import Iterator

import numpy as np
import torch

_SKIP_BLOCK = 1 << 16  # positions replayed per vectorised draw when resuming


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Endless sampler with EG3D's windowed shuffle.

    An initial permutation of 0 .. n-1 is walked cyclically. At position k, with i = k mod n, the entry order[i] is yielded if
    k mod num_replicas == rank; then it is swapped with the entry r places earlier (cyclically), r uniform in [0, window), so that an image
    comes back after at least (1 - window) n other positions. Every rank walks all positions, hence the same draws.

    Deviates: `start_index` (EG3D restarts from position 0) and an argument check; the order itself is EG3D's.

    Args:
        dataset: anything with a length, not 0.
        rank, num_replicas: this process and their number; 0 <= rank < num_replicas.
        shuffle: False walks 0 .. n-1 in order.
        seed: of the numpy RandomState.
        window_size: window as a fraction of n, in [0, 1]; a window under 2 places disables reshuffling.
        start_index: position at which to begin, counted over all ranks: the images consumed before a resumed run. The positions before it
            are replayed without yielding (well under a microsecond each), so the order continues exactly.

    Raises:
        ValueError: on an empty dataset or values outside those ranges.
    """

    def __init__(
        self, dataset, rank: int = 0, num_replicas: int = 1, shuffle: bool = True, seed: int = 0, window_size: float = 0.5,
        start_index: int = 0,
    ):
        if len(dataset) == 0:
            raise ValueError("InfiniteSampler: expected at least one image, got an empty dataset. Check the path and max_size.")
        if not (0 <= rank < num_replicas and 0 <= window_size <= 1 and start_index >= 0):
            raise ValueError(
                "InfiniteSampler: expected 0 <= rank < num_replicas, 0 <= window_size <= 1 and start_index >= 0, got "
                f"rank={rank}, num_replicas={num_replicas}, window_size={window_size}, start_index={start_index}."
            )
        super().__init__()
        self.length = len(dataset)
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.window_size = window_size
        self.start_index = start_index

    def __iter__(self) -> Iterator[int]:
        n = self.length
        order = np.arange(n)
        random, window = None, 0
        if self.shuffle:
            random = np.random.RandomState(self.seed)
            random.shuffle(order)
            window = int(np.rint(n * self.window_size))
        order = order.tolist()
        if window >= 2:
            self._replay(order, random, window)
        position = self.start_index
        while True:
            i = position % n
            if position % self.num_replicas == self.rank:
                yield order[i]
            if window >= 2:
                j = (i - int(random.randint(window))) % n
                order[i], order[j] = order[j], order[i]
            position += 1

    def _replay(self, order: list[int], random: np.random.RandomState, window: int) -> None:
        """Perform the swaps of the positions before `start_index`; a vectorised draw gives the same numbers as single ones."""
        n = self.length
        for first in range(0, self.start_index, _SKIP_BLOCK):
            count = min(_SKIP_BLOCK, self.start_index - first)
            for position, back in enumerate(random.randint(window, size=count).tolist(), start=first):
                i = position % n
                j = (i - back) % n
                order[i], order[j] = order[j], order[i]
