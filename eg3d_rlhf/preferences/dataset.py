"""From labels to training, validation and test pairs that share no seed; anchor seeds. Latents of seeds:
eg3d_rlhf.generators.latents.
"""

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eg3d_rlhf.core.seeds import ANCHORS
from eg3d_rlhf.preferences.labels import Preference

if TYPE_CHECKING:
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

ANCHOR_PSI = 0.25  # truncation of the high-quality anchors x_HQ of arXiv 2606.27305: close to the mean shape
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Labels per split, no seed in two of them, and what could not be used."""

    train: tuple[Preference, ...]
    val: tuple[Preference, ...]
    test: tuple[Preference, ...]
    dropped: int  # labels whose seeds fell into different splits
    ties: int  # labels without a preference, which accuracy cannot count

    def counts(self) -> dict[str, int]:
        """Labels per split and the left-out ones, for logs."""
        return {
            **{name: len(getattr(self, name)) for name in SPLITS},
            "dropped": self.dropped,
            "ties": self.ties,
        }


def split_by_seed(
    labels: Sequence[Preference], fractions: Sequence[float] = (0.70, 0.15, 0.15), seed: int = 0
) -> Splits:
    """Divide labels into train, val and test so that no seed is in two splits.

    Seeds that a label connects stay together, whichever generators drew them, so that no latent stands on two
    sides: connected components of the seed graph are dealt out, large ones first, each to the split furthest
    below its share of the labels of the same generator. A component with more labels than the training share
    is cut: its seeds, in breadth-first order from a drawn one, are dealt in runs of the shares' sizes, and
    labels across a cut are dropped and counted.

    Args: `fractions` three shares that sum to 1; `seed` decides every draw, so equal arguments give equal
        splits.
    Raises: ValueError on shares that do not sum to 1, and when a split with a share above 0 stays empty.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"split_by_seed(fractions): expected three shares that sum to 1, got {tuple(fractions)}. Use 0.7"
            " 0.15 0.15."
        )
    rng = np.random.default_rng(seed)
    usable = [label for label in labels if not label.tie]
    home = _assign(usable, fractions, rng)
    train, val, test = (
        tuple(label for label in usable if home[label.winner] == home[label.loser] == split)
        for split in range(3)
    )
    empty = [
        name
        for name, part, share in zip(SPLITS, (train, val, test), fractions, strict=True)
        if share > 0 and not part
    ]
    if empty:
        raise ValueError(
            f"split_by_seed: expected labels in every split, got none in {', '.join(empty)} from"
            f" {len(usable)} usable labels. Label more pairs with new seeds."
        )
    kept = len(train) + len(val) + len(test)
    return Splits(train=train, val=val, test=test, dropped=len(usable) - kept, ties=len(labels) - len(usable))


def _assign(
    labels: Sequence[Preference], fractions: Sequence[float], rng: np.random.Generator
) -> dict[int, int]:
    """Split index 0..2 per seed."""
    neighbours: dict[int, list[int]] = defaultdict(list)
    for label in labels:
        neighbours[label.winner].append(label.loser)
        neighbours[label.loser].append(label.winner)
    components = _components(neighbours, rng)
    weights = [sum(len(neighbours[s]) for s in seeds) / 2 for seeds in components]  # labels inside each
    drawn_by = {seed: label.generator for label in labels for seed in (label.winner, label.loser)}
    counts = Counter(label.generator for label in labels)
    room = {generator: [share * count for share in fractions] for generator, count in counts.items()}
    home: dict[int, int] = {}
    # stable: equal ones keep their drawn order
    for k in sorted(range(len(components)), key=lambda k: -weights[k]):
        if weights[k] > max(fractions) * len(labels) and len(components[k]) > 2:
            edges = np.floor(np.cumsum(fractions) * len(components[k]) + 0.5)
            for position, seed in enumerate(components[k]):
                home[seed] = int(np.searchsorted(edges, position, side="right"))
            continue
        here = room[drawn_by[components[k][0]]]
        target = max(range(3), key=lambda s: here[s])
        here[target] -= weights[k]
        home.update(dict.fromkeys(components[k], target))
    return home


def _components(neighbours: dict[int, list[int]], rng: np.random.Generator) -> list[list[int]]:
    """Connected components in drawn order, each breadth first from its first drawn seed."""
    order = sorted(neighbours)
    seen: set[int] = set()
    components = []
    for k in rng.permutation(len(order)):
        if order[k] in seen:
            continue
        queue = deque([order[k]])
        component = []
        seen.add(order[k])
        while queue:
            component.append(queue.popleft())
            for other in neighbours[component[-1]]:
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        components.append(component)
    return components


def anchor_seeds(
    count: int = 1000,
    fractions: Sequence[float] = (0.70, 0.15, 0.15),
    exclude: Iterable[int] = (),
) -> dict[str, tuple[int, ...]]:
    """Seeds of the anchors per split, `count` consecutive ones from ANCHORS on; seeds in `exclude`
    (labelled ones) are skipped.
    """
    taken = set(exclude)
    seeds = list(itertools.islice((seed for seed in itertools.count(ANCHORS) if seed not in taken), count))
    edges = [0, *(int(round(edge * count)) for edge in np.cumsum(fractions))]
    return {name: tuple(seeds[a:b]) for name, a, b in zip(SPLITS, edges[:-1], edges[1:], strict=True)}


def on_wrong_faces(labels: Sequence[Preference], seed: int = 0) -> list[Preference]:
    """The labels with each seed replaced by another labelled one, the same throughout: a control in which
    every judgement is about other shapes than those it names. Published depth and point rewards were trained
    so, by a slip (see docs/understand/rewards.md).
    """
    known = np.array(sorted({shape for label in labels for shape in (label.winner, label.loser)}))
    drawn = np.random.default_rng([seed, len(known)]).permutation(known)
    # one cycle: nobody keeps its own
    other = {int(a): int(b) for a, b in zip(drawn, np.roll(drawn, 1), strict=True)}
    return [
        replace(
            label,
            winner=other[label.winner],
            loser=other[label.loser],
            clean=None if label.clean is None else other[label.clean],
        )
        for label in labels
    ]


def common_value(labels: "Iterable[Preference | UnpairedPreference]", name: str) -> Any:
    """The one value of field `name` ('generator' or 'psi') over labels that state it, or None.

    Raises: ValueError where they differ.
    """
    counts = Counter(value for label in labels if (value := getattr(label, name)) is not None)
    if len(counts) > 1:
        listed = ", ".join(f"{value} ({n} labels)" for value, n in counts.most_common(4))
        raise ValueError(
            f"labels: expected one {name} throughout, got {listed}. Keep labels of one {name} in a file."
        )
    return next(iter(counts), None)


def numbered(splits: Splits) -> tuple[Splits, list[tuple[str, int]]]:
    """Labels of several generators with a number in place of each seed, one for every (generator, seed), and
    what the numbers stand for.
    """
    numbers: dict[tuple[str, int], int] = {}

    def changed(label: Preference) -> Preference:
        winner, loser = (
            numbers.setdefault((str(label.generator), seed), len(numbers))
            for seed in (label.winner, label.loser)
        )
        clean = None if label.clean is None else winner if label.clean == label.winner else loser
        return replace(label, winner=winner, loser=loser, clean=clean)

    train, val, test = (tuple(map(changed, part)) for part in (splits.train, splits.val, splits.test))
    return replace(splits, train=train, val=val, test=test), list(numbers)
