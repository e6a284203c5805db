"""All pairs within blocks of items.

A block of finished assets is a prompt, a block of a study is a latent with a shape of each generator (a
randomised complete block design). Seeds are divided into blocks at random.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    Chosen,
    Items,
    PairStrategy,
    StrategyOptions,
)


def blocks_of_pairs(count: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` pairs [P, 2] of numbers from 0: all pairs of each block of `block` numbers. Blocks are
    drawn at random, and a split by block shares no sample.
    """
    first, second = np.triu_indices(block, 1)
    blocks = -(-count // len(first))
    members = rng.permutation(blocks * block).reshape(blocks, block)
    pairs = np.stack([members[:, first], members[:, second]], axis=2).reshape(-1, 2)
    return pairs[:count]


class Blocks(PairStrategy):
    """All pairs of each block, block by block."""

    def items_for(self, options: StrategyOptions) -> int:
        block = options.rounds + 1  # of which each item is in `rounds` pairs
        return -(-options.pairs // (block * (block - 1) // 2)) * block

    def plan(
        self,
        items: Items,
        answers: Sequence[Preference],
        rng: np.random.Generator,
        options: StrategyOptions,
    ) -> Chosen:
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, options.rounds + 1, rng))
        groups = items.groups()
        order = range(len(groups)) if items.ordered else rng.permutation(len(groups))
        pairs = [pair for i in order for pair in combinations(groups[i], 2)]
        return Chosen(items.allowed(np.array(pairs, dtype=np.int64).reshape(-1, 2))[: options.pairs])


STRATEGIES.add("blocks", Blocks())
