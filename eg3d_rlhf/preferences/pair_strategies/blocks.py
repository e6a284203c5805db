"""All pairs within blocks of items.

A block of finished assets is a prompt, a block of a study is a latent with a shape of each generator (a
randomised complete block design). Seeds are divided into blocks at random.
"""

from itertools import combinations, islice

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


def blocks_of_pairs(count: int, block: int, rng: Rng) -> np.ndarray:
    """Return `count` pairs [P, 2] of numbers from 0: all pairs within each block of `block` numbers.

    The numbers are divided into blocks at random. Blocks share no number, so a split by blocks shares no
    sample.
    """
    # All pairs of positions within a block.
    first, second = np.triu_indices(block, 1)
    # rounded up; the last block may be used in part
    blocks = -(-count // len(first))
    members = rng.permutation(blocks * block).reshape(blocks, block)
    # [blocks, pairs of a block, 2] -> [P, 2]
    pairs = np.stack([members[:, first], members[:, second]], axis=2).reshape(-1, 2)
    return pairs[:count]


class Blocks(PairStrategy):
    """All pairs of each block, block by block."""

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of items of complete blocks for `options.pairs` pairs."""
        # each item of a block is in `rounds` pairs
        block = options.rounds + 1
        return -(-options.pairs // (block * (block - 1) // 2)) * block

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose all pairs of each block, block by block."""
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, options.rounds + 1, rng).tolist())
        groups = items.groups()
        # Ordered items have a random order already, which is kept (see `Items`).
        order = range(len(groups)) if items.ordered else rng.permutation(len(groups))
        all_pairs = (pair for i in order for pair in combinations(groups[i], 2))
        return Chosen(list(islice((pair for pair in all_pairs if items.comparable(*pair)), options.pairs)))


STRATEGIES.add("blocks", Blocks())
