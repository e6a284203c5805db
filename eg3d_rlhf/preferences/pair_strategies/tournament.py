"""Strategy that compares items in a tournament: a round robin in random order, and then Swiss rounds.

The first rounds need no answers. Later rounds use the answers to all earlier rounds: items of similar
standing are compared, and no two items twice. If there are fewer pairs than half of the items, only the best
items are compared further, as in a knockout tournament. Finished assets have one tournament per prompt.

Shapes: N items, R rounds.
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


def round_robin(item_count: int, round_count: int, rng: Rng) -> np.ndarray:
    """Return the first rounds of a round robin (circle method) over items in random order.

    No pair occurs twice, and any two successive rounds connect all items.

    Args:
        item_count: number of items, N, even.
        round_count: number of rounds, R, at most N - 1.
        rng: random numbers.
    Returns: pairs [R, N/2, 2] of numbers 0..N-1; each round contains every number once.
    """
    # The rounds are formed for the positions 0..N-1 of a circle, which are then assigned to items at random.
    item_order = rng.permutation(item_count)
    # In each round, all positions except 0 move by one.
    moving_positions = np.arange(1, item_count)
    position_pairs = []
    for _ in range(round_count):
        circle = np.concatenate([[0], moving_positions])
        # Opposite positions of the circle are paired.
        position_pairs.append(np.stack([circle[: item_count // 2], circle[::-1][: item_count // 2]], axis=1))
        moving_positions = np.roll(moving_positions, 1)
    pairs: np.ndarray = item_order[np.stack(position_pairs)]
    return pairs


def standings(answers: Iterable[Preference], rng: Rng) -> list[int]:
    """Order items from best to worst.

    The order is by points (1 for a win, 1/2 for a tie), then by the sum of the points of the opponents
    (Buchholz), and then random.

    Args:
        answers: answers to all earlier rounds; winner and loser are numbers of items.
        rng: random numbers.
    Returns: numbers of the items.
    """
    points_of_item: dict[int, float] = defaultdict(float)
    opponents_of_item: dict[int, list[int]] = defaultdict(list)
    for answer in answers:
        points_of_item[answer.winner] += 0.5 if answer.tie else 1.0
        points_of_item[answer.loser] += 0.5 if answer.tie else 0.0
        opponents_of_item[answer.winner].append(answer.loser)
        opponents_of_item[answer.loser].append(answer.winner)
    item_numbers = sorted(points_of_item)
    # Random order of items with equal points and equal opponents
    random_order = dict(zip(item_numbers, rng.permutation(len(item_numbers)).tolist(), strict=True))

    def sort_key(item: int) -> tuple[float, float, int]:
        """Return the key by which the best item comes first."""
        opponent_points = sum(points_of_item[opponent] for opponent in opponents_of_item[item])
        return -points_of_item[item], -opponent_points, random_order[item]

    return sorted(item_numbers, key=sort_key)


def swiss_round(
    answers: Sequence[Preference],
    max_pairs: int,
    rng: Rng,
    may_be_compared: Comparable = lambda a, b: True,
) -> list[Pair]:
    """Pair the best 2 * `max_pairs` items for the next round, each with its nearest possible opponent.

    Items that were already compared are not paired again. If this is impossible for the last items, they swap
    opponents with another pair. Items are compared again only if no swap is possible.

    Args:
        answers: answers to all earlier rounds.
        max_pairs: largest number of pairs.
        rng: random numbers.
        may_be_compared: function that returns False for two items that may not be compared.
    Returns: pairs of items, best items first; no item is in two pairs.
    Raises: ValueError if there are no answers.
    """
    ranked_items = standings(answers, rng)
    if len(ranked_items) < 2:
        raise ValueError(
            "swiss_round: there are no answers to an earlier round, on which a Swiss round depends. Label the"
            " first round first."
        )
    compared_pairs = {frozenset((answer.winner, answer.loser)) for answer in answers}

    def may_be_paired(a: int, b: int) -> bool:
        """Return True if two items may be compared and were not compared in an earlier round."""
        return frozenset((a, b)) not in compared_pairs and may_be_compared(a, b)

    # If the number of items is odd, the last item has no opponent.
    unpaired_items = ranked_items[: 2 * min(max_pairs, len(ranked_items) // 2)]
    round_pairs: list[Pair] = []
    while unpaired_items:
        # The best unpaired item
        item = unpaired_items.pop(0)
        opponent_index = next(
            (i for i, opponent in enumerate(unpaired_items) if may_be_paired(item, opponent)), None
        )
        if opponent_index is not None:
            round_pairs.append((item, unpaired_items.pop(opponent_index)))
        else:
            opponent = unpaired_items.pop(0)
            round_pairs += _swap_opponents(item, opponent, round_pairs, may_be_paired)
    return round_pairs


def _swap_opponents(
    first_item: int, second_item: int, round_pairs: list[Pair], may_be_paired: Comparable
) -> list[Pair]:
    """Pair two items, which may not be paired with each other, with the items of another pair of the round.

    The search starts at the last pair, whose items have the most similar standing.

    Args:
        first_item: first item.
        second_item: second item.
        round_pairs: pairs of the round, from which the other pair is removed.
        may_be_paired: function that returns True for two items that may be paired.
    Returns: list of two new pairs, or of the one pair (first_item, second_item) if no swap is possible.
    """
    for i in range(len(round_pairs) - 1, -1, -1):
        a, b = round_pairs[i]
        for new_pairs in ([(a, first_item), (b, second_item)], [(a, second_item), (b, first_item)]):
            if all(may_be_paired(*pair) for pair in new_pairs):
                del round_pairs[i]
                return new_pairs
    return [(first_item, second_item)]


class Tournament(PairStrategy):
    """Strategy that compares all seeds, or the assets of each prompt, in a tournament."""

    reads_answers = True

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds: two for each pair of a round."""
        # -(-a // b) is a / b rounded up: the number of pairs of a round.
        return 2 * (-(-options.pairs // options.rounds))

    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose the pairs of the first rounds or, if there are answers to earlier rounds, of the next round.

        The arguments are described in `PairStrategy.plan`.
        """
        if answers:
            planned_pairs = self._next_round(items, answers, rng, options.pairs)
        else:
            if items.unlimited and len(items) <= options.rounds:
                min_pair_count = options.rounds * (options.rounds // 2) + 1
                raise ValueError(
                    f"--pairs: a tournament with {options.rounds} rounds needs at least {min_pair_count}"
                    f" pairs, got {options.pairs}. Increase --pairs, or reduce the rounds with --set"
                    " rounds=NUMBER."
                )
            planned_pairs = self._first_rounds(items.groups(), rng, options.rounds)
        comparable_pairs = [pair for pair in planned_pairs if items.comparable(*pair)]
        return Chosen(comparable_pairs[: options.pairs])

    def _first_rounds(self, groups: list[list[int]], rng: Rng, round_count: int) -> list[Pair]:
        """Return the pairs of the first rounds: round 1 of all groups, round 2 of all groups, and so on.

        Args:
            groups: numbers of the items of each prompt.
            rng: random numbers.
            round_count: number of rounds.
        """
        rounds_of_groups = []
        for group_items in groups:
            # `round_robin` needs an even number of items. If the number is odd, a position without item is
            # added, and the item that is paired with it has no opponent in this round.
            even_count = len(group_items) + len(group_items) % 2
            group_rounds = []
            for round_positions in round_robin(even_count, min(round_count, even_count - 1), rng):
                group_rounds.append(
                    [
                        (group_items[a], group_items[b])
                        for a, b in round_positions.tolist()
                        if max(a, b) < len(group_items)
                    ]
                )
            rounds_of_groups.append(group_rounds)
        pairs: list[Pair] = []
        # Small groups have fewer rounds.
        for round_of_groups in zip_longest(*rounds_of_groups, fillvalue=[]):
            for group_pairs in round_of_groups:
                pairs += group_pairs
        return pairs

    def _next_round(self, items: Items, answers: Answers, rng: Rng, pair_count: int) -> list[Pair]:
        """Return the pairs of the next round of every group that has answers.

        The first pairs of all groups come first, then the second pairs, and so on.

        Args:
            items: items that may be compared.
            answers: answers to all earlier rounds.
            rng: random numbers.
            pair_count: number of pairs of all groups together.
        """
        group_of_item = {}
        for group_index, group in enumerate(items.groups()):
            group_of_item.update(dict.fromkeys(group, group_index))
        # Both items of an answer are in the same group.
        answers_of_group: dict[int, list[Preference]] = defaultdict(list)
        for answer in answers:
            answers_of_group[group_of_item[answer.winner]].append(answer)
        # Every group gets the same number of pairs, rounded up.
        pairs_per_group = -(-pair_count // len(answers_of_group))
        round_pairs_of_groups = [
            swiss_round(answers_of_group[group_index], pairs_per_group, rng, items.comparable)
            for group_index in sorted(answers_of_group)
        ]
        # zip_longest fills with None after the last pair of a group.
        return [
            pair
            for nth_pairs in zip_longest(*round_pairs_of_groups)
            for pair in nth_pairs
            if pair is not None
        ]


STRATEGIES.add("tournament", Tournament())
