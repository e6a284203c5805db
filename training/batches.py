"""Batches of real images, read ahead by worker processes in the sampler's order: their number changes no bit.

Shape letters: n images per batch, C channels, R resolution, L numbers per label.
"""

import contextlib
import functools
import itertools
import mmap
import os
from collections.abc import Generator, Iterator

import numpy as np

from training.dataset import ImageFolderDataset
from training.distributed import Ranks
from training.workers import AHEAD, ahead

MOST_WORKERS = 3  # EG3D's default
KILLED = "--workers: expected the processes that read images to live, got one killed. Free memory, or use fewer; 0 reads in this process."


def default_workers(dataset: ImageFolderDataset, ranks: Ranks) -> int:
    """None for a set that is kept in memory, else one for each core that training leaves free, at most three."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if dataset.in_memory else max(0, min(MOST_WORKERS, cores // ranks.neighbours - 1))


Batches = Generator[tuple[np.ndarray, np.ndarray], None, None]


def read_batches(dataset: ImageFolderDataset, order: Iterator[int], n: int, workers: int) -> Batches:
    """Images [n, C, R, R] uint8 and labels [n, L] float32 of the next n indices in `order`, without end.

    Workers decode into memory that all share, which is claimed once: AHEAD batches for each of them, and the one that was yielded last. Its
    images are valid until the next is asked for.

    Args: workers: processes; 0 reads in this one. Raises: ValueError as the dataset does, or where a worker was killed.
    """
    slots = AHEAD * workers + 1
    size = (slots, n, dataset.num_channels, dataset.resolution, dataset.resolution)
    images = np.frombuffer(mmap.mmap(-1, int(np.prod(size))), np.uint8).reshape(size)
    work = functools.partial(_fill, dataset.without_memory() if workers else dataset, images)
    tasks = ((slot, list(itertools.islice(order, n))) for slot in itertools.cycle(range(slots)))
    with contextlib.closing(ahead(work, tasks, workers, KILLED)) as filled:
        for slot, labels in filled:
            yield images[slot], labels


def _fill(dataset: ImageFolderDataset, images: np.ndarray, task: tuple[int, list[int]]) -> tuple[int, np.ndarray]:
    """Decode one batch into its slot of `images` [slots, n, C, R, R]."""
    slot, rows = task
    labels = []
    for place, row in enumerate(rows):
        images[slot, place], label = dataset[row]
        labels.append(label)
    return slot, np.stack(labels)
