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
    """Yield the members of buckets by (group, prompt): groups take turns, and each goes through its prompts
    in random order, again and again.
    """
    groups: dict[G, list[Sequence[T]]] = defaultdict(list)
    for (group, _), members in buckets.items():
        groups[group].append(members)
    lines = [_in_turns(prompts, rng) for prompts in groups.values()]
    while lines:
        left = []
        for i in rng.permutation(len(lines)):
            for member in itertools.islice(lines[i], 1):
                yield member
                left.append(lines[i])
        lines = left


def _in_turns(buckets: list[Sequence[T]], rng: Rng) -> Iterator[T]:
    for turn in range(max(map(len, buckets))):
        rest = [bucket for bucket in buckets if len(bucket) > turn]
        yield from (rest[i][turn] for i in rng.permutation(len(rest)))


def meetings(items: Items, rng: Rng, most: int) -> dict[tuple[tuple[str, str], str], list[tuple[int, int]]]:
    """Group the pairs that may be compared by (sources of the two, prompt): at most `most` random ones of
    each group, in random order.
    """
    sides = items.by(lambda item: (item.source, item.prompt))
    sources = items.sources
    groups: dict[tuple[tuple[str, str], str], list[tuple[int, int]]] = {}
    for prompt in sorted({item.prompt for item in items.members}):
        for a, b in itertools.combinations(sources, 2) if len(sources) > 1 else [(sources[0],) * 2]:
            first = sides.get((a, prompt), [])
            second = sides.get((b, prompt), [])
            rows, columns = (
                np.triu_indices(len(first), 1)
                if a == b
                else np.indices((len(first), len(second))).reshape(2, -1)
            )
            chosen = rng.permutation(len(rows))[:most]
            pairs = [(first[rows[i]], second[columns[i]]) for i in chosen]
            if pairs := [pair for pair in pairs if items.comparable(*pair)]:
                groups[(a, b), prompt] = pairs
    return groups


class RandomPairs(PairStrategy):
    """Random pairs."""

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, 2, rng).tolist())
        # `balanced` draws as it goes: no more is taken from it than is used
        drawn = balanced(meetings(items, rng, options.pairs), rng)
        return Chosen(list(itertools.islice(drawn, options.pairs)))


STRATEGIES.add("random", RandomPairs())
