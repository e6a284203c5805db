"""Strategy that chooses random pairs.

Each seed is in one pair. Pairs of finished assets are balanced over prompts and generators.
"""

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
    """Yield all members of buckets in an order that is balanced over groups and prompts.

    Each round yields one member of every group, in random order. The members of a group are balanced over its
    prompts in the same way.

    Args:
        buckets: members by (group, prompt).
        rng: random numbers.
    """
    prompt_buckets: dict[G, list[Sequence[T]]] = defaultdict(list)
    for (group, _), bucket in buckets.items():
        prompt_buckets[group].append(bucket)
    group_streams = [_balanced_over_prompts(group_buckets, rng) for group_buckets in prompt_buckets.values()]
    while group_streams:
        unfinished_streams = []
        for i in rng.permutation(len(group_streams)):
            # islice takes one member, or none if the stream has ended.
            for member in itertools.islice(group_streams[i], 1):
                yield member
                unfinished_streams.append(group_streams[i])
        group_streams = unfinished_streams


def _balanced_over_prompts(buckets: list[Sequence[T]], rng: Rng) -> Iterator[T]:
    """Yield in each round one member of every bucket that has a member left, in random order."""
    for round_index in range(max(map(len, buckets))):
        remaining_buckets = [bucket for bucket in buckets if len(bucket) > round_index]
        yield from (remaining_buckets[i][round_index] for i in rng.permutation(len(remaining_buckets)))


def meetings(
    items: Items, rng: Rng, max_pairs: int
) -> dict[tuple[tuple[str, str], str], list[tuple[int, int]]]:
    """Sample pairs that may be compared, grouped by generators and prompt.

    Args:
        items: items that may be compared.
        rng: random numbers.
        max_pairs: largest number of pairs of each group.
    Returns: pairs of numbers of items in random order, by ((first generator, second generator), prompt). If
        there is only one generator, it is named twice.
    """
    numbers_by_source_and_prompt = items.by(lambda item: (item.source, item.prompt))
    sources = items.sources
    source_pairs = (
        list(itertools.combinations(sources, 2))
        if len(sources) > 1
        else [(source, source) for source in sources]
    )
    pairs_by_group: dict[tuple[tuple[str, str], str], list[tuple[int, int]]] = {}
    for prompt in sorted({item.prompt for item in items.members}):
        for first_source, second_source in source_pairs:
            # A generator may have no item for a prompt.
            first_numbers = numbers_by_source_and_prompt.get((first_source, prompt), [])
            second_numbers = numbers_by_source_and_prompt.get((second_source, prompt), [])
            # Positions in both lists of all pairs: unordered pairs of one generator, or pairs of two
            # generators
            if first_source == second_source:
                first_positions, second_positions = np.triu_indices(len(first_numbers), 1)
            else:
                first_positions, second_positions = np.indices(
                    (len(first_numbers), len(second_numbers))
                ).reshape(2, -1)
            # The number of pairs grows quadratically, so a random subset is taken.
            # Pairs that were answered earlier do not count, since they may be all pairs of the subset.
            sampled_indices = rng.permutation(len(first_positions))
            if not items.answered:
                sampled_indices = sampled_indices[:max_pairs]
            pairs = [
                (first_numbers[first_positions[i]], second_numbers[second_positions[i]])
                for i in sampled_indices
            ]
            comparable_pairs = [pair for pair in pairs if items.comparable(*pair)][:max_pairs]
            if comparable_pairs:
                pairs_by_group[(first_source, second_source), prompt] = comparable_pairs
    return pairs_by_group


class RandomPairs(PairStrategy):
    """Strategy that chooses random pairs, balanced over prompts and generators."""

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose random pairs; see `PairStrategy.plan`."""
        # Seeds are divided into blocks of two, so that each seed is in one pair.
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, 2, rng).tolist())
        pairs = balanced(meetings(items, rng, options.pairs), rng)
        return Chosen(list(itertools.islice(pairs, options.pairs)))


STRATEGIES.add("random", RandomPairs())
