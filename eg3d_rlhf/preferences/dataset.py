"""Division of labels into training, validation and test pairs that share no seed, and seeds of reference
samples.

For latents of seeds see eg3d_rlhf.generators.latents.
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

# Truncation of the high-quality samples x_HQ of arXiv 2606.27305: close to the mean shape.
ANCHOR_PSI = 0.25
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Labels by split, with no seed in two splits, and the numbers of unused labels."""

    train: tuple[Preference, ...]  # to fit the reward
    val: tuple[Preference, ...]  # to choose the epoch and stop early
    test: tuple[Preference, ...]  # to report accuracy
    dropped: int  # labels whose seeds are in different splits
    ties: int  # labels without a preference, which accuracy cannot count

    def counts(self) -> dict[str, int]:
        """Return the numbers of labels by split and of unused ones, for logs."""
        return {
            **{name: len(getattr(self, name)) for name in SPLITS},
            "dropped": self.dropped,
            "ties": self.ties,
        }


def split_by_seed(
    labels: Sequence[Preference], fractions: Sequence[float] = (0.70, 0.15, 0.15), seed: int = 0
) -> Splits:
    """Divide labels into train, val and test so that no seed is in two splits.

    Seeds that a label connects stay together, even if their shapes come from different generators, so that no
    latent is in two splits. The connected components of the graph of seeds are assigned one by one, largest
    first, each to the split that is furthest below its fraction of the labels of the same generator. A
    component with more labels than the training fraction is cut: its seeds, in breadth-first order from a
    random one, are assigned in runs of the splits' sizes. Labels across a cut are dropped and counted.

    Args:
        fractions: three fractions that sum to 1.
        seed: of all random choices; equal arguments give equal splits.
    Raises: ValueError for fractions that do not sum to 1, and if a split with a fraction above 0 remains
    empty.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"split_by_seed(fractions): expected three fractions that sum to 1, got {tuple(fractions)}. Use"
            " 0.7 0.15 0.15."
        )
    # The order of random numbers below is part of a split's definition.
    rng = np.random.default_rng(seed)
    # A tie has no winner to learn, and accuracy cannot count it.
    usable = [label for label in labels if not label.tie]
    split_of_seed = _assign(usable, fractions, rng)
    train, val, test = (
        tuple(label for label in usable if split_of_seed[label.winner] == split_of_seed[label.loser] == split)
        for split in range(3)
    )
    # A split with a fraction of 0 may be empty.
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
    used_count = len(train) + len(val) + len(test)
    return Splits(
        train=train, val=val, test=test, dropped=len(usable) - used_count, ties=len(labels) - len(usable)
    )


def _assign(
    labels: Sequence[Preference], fractions: Sequence[float], rng: np.random.Generator
) -> dict[int, int]:
    """Assign each seed to a split, 0..2."""
    neighbours: dict[int, list[int]] = defaultdict(list)
    for label in labels:
        # The graph is undirected; repeated labels give repeated edges, which count as labels.
        neighbours[label.winner].append(label.loser)
        neighbours[label.loser].append(label.winner)
    components = _components(neighbours, rng)
    # Every label is counted at both of its seeds, hence the division by 2.
    weights = [sum(len(neighbours[s]) for s in seeds) / 2 for seeds in components]
    generator_of = {seed: label.generator for label in labels for seed in (label.winner, label.loser)}
    counts = Counter(label.generator for label in labels)
    remaining = {generator: [share * count for share in fractions] for generator, count in counts.items()}
    split_of_seed: dict[int, int] = {}
    # sorted() is stable: components of equal size keep their random order.
    # Large components first, since small ones can still even out the fractions afterwards.
    for k in sorted(range(len(components)), key=lambda k: -weights[k]):
        # Too large for any split: cut. A component of two seeds is one pair, which cannot be cut.
        if weights[k] > max(fractions) * len(labels) and len(components[k]) > 2:
            # Positions at which the next split begins, rounded to integers.
            edges = np.floor(np.cumsum(fractions) * len(components[k]) + 0.5)
            for position, seed in enumerate(components[k]):
                split_of_seed[seed] = int(np.searchsorted(edges, position, side="right"))
            continue
        # Fractions are kept per generator, so that each generator occurs in every split.
        remaining_labels = remaining[generator_of[components[k][0]]]
        target = max(range(3), key=lambda s: remaining_labels[s])
        remaining_labels[target] -= weights[k]
        # All seeds of the component go to one split.
        split_of_seed.update(dict.fromkeys(components[k], target))
    return split_of_seed


def _components(neighbours: dict[int, list[int]], rng: np.random.Generator) -> list[list[int]]:
    """Return connected components in random order, each breadth first from its first random seed."""
    # sorted, so that the result does not depend on the order of the labels
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
    """Return the seeds of reference samples by split: `count` consecutive ones from 100,000 on.

    Seeds in `exclude` (those with labels) are skipped.
    """
    # A set, because `exclude` may be an iterator.
    excluded = set(exclude)
    seeds = list(itertools.islice((seed for seed in itertools.count(ANCHORS) if seed not in excluded), count))
    # Boundaries of the splits, rounded.
    edges = [0, *(int(round(edge * count)) for edge in np.cumsum(fractions))]
    return {name: tuple(seeds[a:b]) for name, a, b in zip(SPLITS, edges[:-1], edges[1:], strict=True)}


def on_wrong_faces(labels: Sequence[Preference], seed: int = 0) -> list[Preference]:
    """Replace each seed in labels by another labelled seed, the same one throughout.

    This is a control in which every label is about other shapes than its seeds name. Published depth and
    point rewards were accidentally trained in this way (see docs/understand/rewards.md).
    """
    labelled = np.array(sorted({shape for label in labels for shape in (label.winner, label.loser)}))
    shuffled = np.random.default_rng([seed, len(labelled)]).permutation(labelled)
    # A rotation is a single cycle, so no seed keeps its own labels.
    replacement = {int(a): int(b) for a, b in zip(shuffled, np.roll(shuffled, 1), strict=True)}
    return [
        replace(
            label,
            winner=replacement[label.winner],
            loser=replacement[label.loser],
            clean=None if label.clean is None else replacement[label.clean],
        )
        for label in labels
    ]


def common_value(labels: "Iterable[Preference | UnpairedPreference]", name: str) -> Any:
    """Return the value of field `name` ('generator' or 'psi') that all labels share, or None if none states
    it.

    Raises: ValueError if they differ.
    """
    # Labels that do not state the field are compatible with any value.
    counts = Counter(value for label in labels if (value := getattr(label, name)) is not None)
    if len(counts) > 1:
        listed = ", ".join(f"{value} ({n} labels)" for value, n in counts.most_common(4))
        raise ValueError(
            f"labels: expected the same {name} in all labels, got {listed}. Put labels of each {name} into"
            " a file of their own."
        )
    return next(iter(counts), None)


def numbered(splits: Splits) -> tuple[Splits, list[tuple[str, int]]]:
    """Replace the seeds in labels of several generators by numbers, one for every (generator, seed).

    Returns: the labels, and the (generator, seed) of each number.
    """
    # (generator, seed) -> number, in order of appearance
    numbers: dict[tuple[str, int], int] = {}

    def with_numbers(label: Preference) -> Preference:
        """Replace the seeds of one label."""
        winner, loser = (
            numbers.setdefault((str(label.generator), seed), len(numbers))
            for seed in (label.winner, label.loser)
        )
        clean = None if label.clean is None else winner if label.clean == label.winner else loser
        return replace(label, winner=winner, loser=loser, clean=clean)

    train, val, test = (tuple(map(with_numbers, part)) for part in (splits.train, splits.val, splits.test))
    return replace(splits, train=train, val=val, test=test), list(numbers)
