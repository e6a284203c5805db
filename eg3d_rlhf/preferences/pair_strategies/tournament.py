"""Tournaments: round robins in random order, then Swiss rounds that use the answers to earlier ones.

The first rounds need no answers. Later rounds are Swiss: items of similar standing are compared, and no two
items twice. With fewer pairs than half of the items, only the upper part of the table continues, as in a
knockout. Finished assets have one tournament per prompt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import numpy as np

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    Answers,
    Chosen,
    Items,
    PairStrategy,
    Rng,
    StrategyOptions,
)

Pair = tuple[int, int]
Comparable = Callable[[int, int], bool]


def round_robin(count: int, rounds: int, rng: Rng) -> np.ndarray:
    """Return the first rounds of a round robin (circle method) over an even number of items in random order.

    One item stays in place, the others move by one place each round. No pair occurs twice, and any two
    successive rounds connect all items.

    Returns: [R, N/2, 2]; each round contains 0..N-1 once.
    """
    # The table is made for 0..N-1 and then relabelled at random.
    order = rng.permutation(count)
    # Item 0 stays in place.
    moving = np.arange(1, count)
    table = []
    for _ in range(rounds):
        circle = np.concatenate([[0], moving])
        # places on opposite sides of the circle
        table.append(np.stack([circle[: count // 2], circle[::-1][: count // 2]], axis=1))
        moving = np.roll(moving, 1)
    rounds_made: np.ndarray = order[np.stack(table)]
    return rounds_made


def standings(results: Iterable[Preference], rng: Rng) -> list[int]:
    """Order items from first to last.

    The order is by points (a win 1, a tie 1/2), then by the points of the opponents (Buchholz), then random.
    """
    points: dict[int, float] = defaultdict(float)
    opponents: dict[int, list[int]] = defaultdict(list)
    for result in results:
        # Points as in chess; a tie is half a point for both.
        points[result.winner] += 0.5 if result.tie else 1.0
        points[result.loser] += 0.5 if result.tie else 0.0
        opponents[result.winner].append(result.loser)
        opponents[result.loser].append(result.winner)
    numbers = sorted(points)
    # Random tie-breaks, the same for all comparisons of the sort.
    lot = dict(zip(numbers, rng.permutation(len(numbers)).tolist(), strict=True))
    return sorted(
        numbers, key=lambda item: (-points[item], -sum(points[other] for other in opponents[item]), lot[item])
    )


def swiss_round(
    results: Sequence[Preference],
    pairs: int,
    rng: Rng,
    comparable: Comparable = lambda a, b: True,
) -> list[Pair]:
    """Return the next round: the first 2 * `pairs` items of the standings, each with its nearest possible
    opponent.

    Items that have met are not paired again. If that is impossible for the last items, two pairs swap
    partners; items meet again only if no swap helps. Pairs that are not `comparable` count as having met.

    Returns: disjoint pairs of items, at most `pairs`, from the top of the table down.
    """
    table = standings(results, rng)
    if len(table) < 2:
        raise ValueError(
            "swiss_round: expected the results of an earlier round, got none. Label the first round first."
        )
    # Unordered pairs.
    met_before = {frozenset((result.winner, result.loser)) for result in results}

    def may_meet(a: int, b: int) -> bool:
        """Return True if two items may be paired."""
        return frozenset((a, b)) not in met_before and comparable(a, b)

    # an odd item at the end has no opponent
    waiting = table[: 2 * min(pairs, len(table) // 2)]
    round_pairs: list[Pair] = []
    while waiting:
        # From the top of the table.
        first = waiting.pop(0)
        nearest = next((i for i, other in enumerate(waiting) if may_meet(first, other)), None)
        second = waiting.pop(0 if nearest is None else nearest)
        round_pairs += (
            [(first, second)] if nearest is not None else _swapped(first, second, round_pairs, may_meet)
        )
    return round_pairs


def _swapped(first: int, second: int, made: list[Pair], may_meet: Comparable) -> list[Pair]:
    """Pair two items that have met with the partners of an existing pair, which is removed from `made`.

    The search starts at the last pair, whose items have the most similar standing.
    """
    # From the most recent pair.
    for i in range(len(made) - 1, -1, -1):
        a, b = made[i]
        for new_pairs in ([(a, first), (b, second)], [(a, second), (b, first)]):
            if all(may_meet(*pair) for pair in new_pairs):
                del made[i]
                return new_pairs
    return [(first, second)]


class Tournament(PairStrategy):
    """A tournament of all seeds, or of the assets of each prompt."""

    reads_answers = True

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds: two per pair of a round."""
        return 2 * (-(-options.pairs // options.rounds))

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose the first rounds, or the next round if there are answers to earlier ones."""
        if answers:
            planned = self._later(items, answers, rng, options.pairs)
        else:
            if items.unlimited and len(items) <= options.rounds:
                least_pairs = options.rounds * (options.rounds // 2) + 1
                raise ValueError(
                    f"plan: expected at least {least_pairs} pairs for {options.rounds} rounds, got"
                    f" {options.pairs}. Increase the pairs or reduce the rounds."
                )
            planned = self._first(items.groups(), rng, options.rounds)
        allowed = [pair for pair in planned if items.comparable(*pair)]
        return Chosen(allowed[: options.pairs])

    def _first(self, groups: list[list[int]], rng: Rng, rounds: int) -> list[Pair]:
        """Return the first rounds, round by round over all groups."""
        tables = []
        for group in groups:
            # With an odd number, one item of each round has no opponent
            # The circle method needs an even number.
            even = len(group) + len(group) % 2
            table = round_robin(even, min(rounds, even - 1), rng)
            tables.append(
                [[(group[a], group[b]) for a, b in row.tolist() if max(a, b) < len(group)] for row in table]
            )
        # round 1 of all groups, then round 2, ...
        return [pair for row in zip_longest(*tables, fillvalue=[]) for part in row for pair in part]

    def _later(self, items: Items, answers: Answers, rng: Rng, pairs: int) -> list[Pair]:
        """Return the next round of every group that has answers, from the top of the tables down."""
        groups = items.groups()
        # An answer belongs to the group of both of its items.
        group_of = {item: number for number, group in enumerate(groups) for item in group}
        results: dict[int, list[Preference]] = defaultdict(list)
        for answer in answers:
            results[group_of[answer.winner]].append(answer)
        # Every group gets the same number of pairs.
        share = -(-pairs // len(results))  # pairs per group, rounded up
        rounds = [swiss_round(results[number], share, rng, items.comparable) for number in sorted(results)]
        return [pair for row in zip_longest(*rounds) for pair in row if pair is not None]


STRATEGIES.add("tournament", Tournament())
