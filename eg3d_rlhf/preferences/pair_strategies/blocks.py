"""Strategy that compares all pairs of items within blocks.

Finished assets with the same prompt form a block. In a study, the shapes of all generators from the same
latent form a block (a randomised complete block design). Seeds are divided into blocks at random.
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


def blocks_of_pairs(pair_count: int, block_size: int, rng: Rng) -> np.ndarray:
    """Divide numbers into blocks at random, and return the pairs within all blocks, [P, 2].

    The numbers are 0, 1, ..., as many as the blocks need. No number is in two blocks, so labels can be split
    by blocks without a common sample.

    Args:
        pair_count: number of pairs, P.
        block_size: number of numbers in a block.
        rng: random numbers.
    """
    # Positions of the two members of each pair within a block
    first_position, second_position = np.triu_indices(block_size, 1)
    # -(-a // b) is a / b rounded up; the last block may be used in part.
    block_count = -(-pair_count // len(first_position))
    members = rng.permutation(block_count * block_size).reshape(block_count, block_size)
    # [number of blocks, pairs of a block, 2] -> [number of all pairs, 2]
    pairs = np.stack([members[:, first_position], members[:, second_position]], axis=2).reshape(-1, 2)
    return pairs[:pair_count]


class Blocks(PairStrategy):
    """Strategy that chooses all pairs of each block, block by block."""

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds in complete blocks for `options.pairs` pairs."""
        # Each item of a block of B items is in B - 1 pairs, which are the rounds. A block has B (B - 1) / 2
        # pairs.
        block_size = options.rounds + 1
        return -(-options.pairs // (block_size * (block_size - 1) // 2)) * block_size

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose all pairs of each block, block by block; see `PairStrategy.plan`."""
        if items.unlimited:
            return Chosen(blocks_of_pairs(options.pairs, options.rounds + 1, rng).tolist())
        blocks = items.groups()
        # Ordered items already have a random order (see `Items`).
        block_order = range(len(blocks)) if items.ordered else rng.permutation(len(blocks))
        # Generators, so that no more pairs are formed than are needed
        all_pairs = (pair for i in block_order for pair in combinations(blocks[i], 2))
        comparable_pairs = (pair for pair in all_pairs if items.comparable(*pair))
        return Chosen(list(islice(comparable_pairs, options.pairs)))


STRATEGIES.add("blocks", Blocks())
