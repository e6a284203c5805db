"""A plugin: a chain of pairs, in which every item is compared with the next one. Of finished assets there is
a chain for each prompt.

    EG3D_RLHF_PLUGINS=tests/preferences/pair_strategies/neighbours.py eg3d-rlhf label --strategy=neighbours
"""

from itertools import pairwise

from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Chosen, PairStrategy


class Neighbours(PairStrategy):
    """A chain through all seeds, or through the assets of each prompt, in random order."""

    def items_for(self, options):
        return options.pairs + 1

    def plan(self, items, answers, rng, options):
        pairs = [pair for group in items.groups() for pair in pairwise(rng.permutation(group).tolist())]
        return Chosen([pair for pair in pairs if items.comparable(*pair)][: options.pairs])


STRATEGIES.add("neighbours", Neighbours())
