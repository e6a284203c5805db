"""Kernel Inception Distance as published: the unbiased kernel distance, averaged over random subsets of both sets.

Bińkowski, Sutherland, Arbel and Gretton 2018 (Demystifying MMD GANs): cubic polynomial kernel, subsets of 1000. The subsets keep the Gram
matrices small and give the spread of the estimate.
Shape letters: N, M = samples, F = feature dimensions, S = subset size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.metrics.frechet import kernel_distance

SUBSETS = 100
SUBSET_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class KernelEstimate:
    """Mean and spread over subsets."""

    mean: float  # the distance; averages to 0 for equal distributions, and so may be negative
    std: float  # between subsets (they overlap, so this is no standard error)
    subsets: int
    size: int  # samples of each set in a subset


def draw_subsets(n: int, m: int, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random index arrays ([S], [S]) into sets of n and m samples, without repetition inside a subset; S = min(size, n, m)."""
    random, taken = np.random.RandomState(seed), min(size, n, m)
    for _ in range(subsets):
        yield random.choice(n, taken, replace=False), random.choice(m, taken, replace=False)


def average_over(features_1: np.ndarray, features_2: np.ndarray, draws: Iterable[tuple[np.ndarray, np.ndarray]]) -> KernelEstimate:
    """Kernel distances of given subsets of features [N, F] and [M, F].

    Raises: ValueError for no subsets, or as `kernel_distance`.
    """
    values, size = [], 0
    for first, second in draws:
        values.append(kernel_distance(features_1[first], features_2[second]))
        size = len(first)
    if not values:
        raise ValueError("average_over: expected at least one subset, got none. Raise the number of subsets.")
    return KernelEstimate(mean=float(np.mean(values)), std=float(np.std(values)), subsets=len(values), size=size)


def kernel_inception_distance(
    features_1: np.ndarray, features_2: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> KernelEstimate:
    """The published estimate from features [N, F] and [M, F]; repeatable for equal arguments. Lower is better."""
    return average_over(features_1, features_2, draw_subsets(len(features_1), len(features_2), subsets, size, seed))
