"""Random pairs: of seeds, each in one pair; of finished assets, balanced over prompts and generators."""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    Answers,
    Chosen,
    Items,
    PairStrategy,
    Rng,
    StrategyOptions,
)
from eg3d_rlhf.preferences.pair_strategies.blocks import blocks_of_pairs

T = TypeVar("T")
G = TypeVar("G", bound=Hashable)


def balanced(buckets: Mapping[tuple[G, str], Sequence[T]], rng: Rng) -> Iterator[T]:
    """Yield the members of buckets by (group, prompt).

    Groups take turns. Each group goes through its prompts in random order, again and again.
    """
    groups: dict[G, list[Sequence[T]]] = defaultdict(list)
    for (group, _), members in buckets.items():
        # The prompts of each group.
        groups[group].append(members)
    streams = [_in_turns(prompts, rng) for prompts in groups.values()]
    while streams:
        unfinished = []
        for i in rng.permutation(len(streams)):
            # islice takes one member, or none if the stream has ended.
            for member in itertools.islice(streams[i], 1):
                yield member
                unfinished.append(streams[i])
        streams = unfinished


def _in_turns(buckets: list[Sequence[T]], rng: Rng) -> Iterator[T]:
    """Yield one member of each bucket per turn, in random order; a bucket drops out when it is empty."""
    # Turn k takes the k-th member of every bucket that has one.
    for turn in range(max(map(len, buckets))):
        longer_buckets = [bucket for bucket in buckets if len(bucket) > turn]
        yield from (longer_buckets[i][turn] for i in rng.permutation(len(longer_buckets)))


def meetings(items: Items, rng: Rng, most: int) -> dict[tuple[tuple[str, str], str], list[tuple[int, int]]]:
    """Group the pairs that may be compared by (sources of the two, prompt).

    Each group has at most `most` random pairs, in random order.
    """
    # (source, prompt) -> numbers of items
    sides = items.by(lambda item: (item.source, item.prompt))
    sources = items.sources
    groups: dict[tuple[tuple[str, str], str], list[tuple[int, int]]] = {}
    for prompt in sorted({item.prompt for item in items.members}):
        for a, b in itertools.combinations(sources, 2) if len(sources) > 1 else [(sources[0],) * 2]:
            # A source may lack a prompt.
            first = sides.get((a, prompt), [])
            second = sides.get((b, prompt), [])
            rows, columns = (
                np.triu_indices(len(first), 1)
                if a == b  # all unordered pairs of one source
                else np.indices((len(first), len(second))).reshape(2, -1)  # all pairs of two sources
            )
            # A random subset: the number of pairs grows quadratically.
            chosen = rng.permutation(len(rows))[:most]
            pairs = [(first[rows[i]], second[columns[i]]) for i in chosen]
            if pairs := [pair for pair in pairs if items.comparable(*pair)]:
                groups[(a, b), prompt] = pairs
    return groups


class RandomPairs(PairStrategy):
    """Random pairs, balanced over prompts and sources."""

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose random pairs; each seed is in one pair."""
        # Seeds: blocks of two, so that each seed is used once.
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, 2, rng).tolist())
        # `balanced` consumes random numbers as it goes, so no more pairs are taken than are used.
        pairs = balanced(meetings(items, rng, options.pairs), rng)
        return Chosen(list(itertools.islice(pairs, options.pairs)))


STRATEGIES.add("random", RandomPairs())
