"""Who meets whom when every shape is compared more than once, so that the judgements can be turned into strengths.

The first rounds are drawn without knowing anything; later ones are Swiss: shapes of about equal standing meet, nobody twice. With fewer
pairs than shapes, the upper part of the table goes on, as in a knockout.

Letters: S shapes, R rounds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from eg3d_rlhf.preferences.labels import Preference


def round_robin(shapes: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """The first rounds of a tournament in which everyone meets everyone (the circle method), over shapes in random order.

    One shape stays, the others move on by one place each round: no pair occurs twice, and any two rounds in a row connect all shapes.
    Returns: [R, S/2, 2], each round holding 0..S-1 once.
    Raises: ValueError for an odd number of shapes, or for fewer than 1 or more than S - 1 rounds.
    """
    if shapes < 2 or shapes % 2 or not 1 <= rounds < shapes:
        raise ValueError(
            f"round_robin: expected an even number of shapes and fewer rounds than shapes, got {shapes} and {rounds}. Use fewer rounds."
        )
    order = rng.permutation(shapes)
    moving, table = np.arange(1, shapes), []
    for _ in range(rounds):
        circle = np.concatenate([[0], moving])
        table.append(np.stack([circle[: shapes // 2], circle[::-1][: shapes // 2]], axis=1))
        moving = np.roll(moving, 1)
    return order[np.stack(table)]


def standings(results: Iterable[Preference], rng: np.random.Generator) -> list[int]:
    """Seeds from first to last: by points (a win 1, a tie 1/2), then by the points of those they met, then by lot."""
    points: dict[int, float] = defaultdict(float)
    opponents: dict[int, list[int]] = defaultdict(list)
    for result in results:
        points[result.winner] += 0.5 if result.tie else 1.0
        points[result.loser] += 0.5 if result.tie else 0.0
        opponents[result.winner].append(result.loser)
        opponents[result.loser].append(result.winner)
    seeds = sorted(points)
    lot = dict(zip(seeds, rng.permutation(len(seeds)).tolist(), strict=True))
    return sorted(seeds, key=lambda seed: (-points[seed], -sum(points[other] for other in opponents[seed]), lot[seed]))


def swiss_round(results: Sequence[Preference], pairs: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The next round: the first 2 * `pairs` of the standings, each with the nearest one that it has not met.

    Where that cannot be had for the last ones, two pairs swap partners; shapes meet again only where no swap helps.
    Returns: disjoint pairs of seeds, at most `pairs`, the upper end of the table first.
    Raises: ValueError without results.
    """
    table = standings(results, rng)
    if len(table) < 2:
        raise ValueError("swiss_round: expected the results of an earlier round, got none. Label the first round before.")
    met = {frozenset((result.winner, result.loser)) for result in results}
    waiting = table[: 2 * min(pairs, len(table) // 2)]
    found: list[tuple[int, int]] = []
    while waiting:
        first = waiting.pop(0)
        fresh = next((i for i, other in enumerate(waiting) if frozenset((first, other)) not in met), None)
        second = waiting.pop(0 if fresh is None else fresh)
        found += [(first, second)] if fresh is not None else _swapped(first, second, found, met)
    return found


def _swapped(first: int, second: int, found: list[tuple[int, int]], met: set[frozenset[int]]) -> list[tuple[int, int]]:
    """Two that have met, with the partners of the nearest pair that has two others for them; that pair is taken out of `found`."""
    for i in range(len(found) - 1, -1, -1):
        a, b = found[i]
        for swap in ([(a, first), (b, second)], [(a, second), (b, first)]):
            if not any(frozenset(pair) in met for pair in swap):
                del found[i]
                return swap
    return [(first, second)]
