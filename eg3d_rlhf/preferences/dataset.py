"""Splits of labelled pairs into training, validation and test pairs that share no seed.

The module also chooses the seeds of reference samples.

A reference sample is a sample at a low truncation psi, which should score above every labelled shape.
"""

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eg3d_rlhf.core.seeds import REFERENCE_SAMPLES
from eg3d_rlhf.preferences.labels import Preference

if TYPE_CHECKING:
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

# Truncation psi of reference samples, the high-quality samples x_HQ of arXiv 2606.27305. It gives shapes
# close to the mean shape.
REFERENCE_PSI = 0.25
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Labelled pairs by split, and counts of the labels that are not used. No seed is in two splits."""

    train: tuple[Preference, ...]  # pairs to train the reward
    val: tuple[Preference, ...]  # pairs to choose the epoch and to stop early
    test: tuple[Preference, ...]  # pairs to measure the accuracy
    dropped: int  # number of labels that are not used because their seeds are in different splits
    ties: int  # number of labels without a preference, which are not used

    def pair_counts(self) -> dict[str, int]:
        """Return the number of different pairs of each split. A pair may have several labels."""
        return {name: len({pair_of(label) for label in getattr(self, name)}) for name in SPLITS}

    def counts(self) -> dict[str, int]:
        """Return the number of labels of each split, and the counts "dropped" and "ties" of unused labels."""
        return {
            **{name: len(getattr(self, name)) for name in SPLITS},
            "dropped": self.dropped,
            "ties": self.ties,
        }


def pair_of(label: Preference) -> tuple[int, int]:
    """Return the two seeds of a label in rising order, which identify its pair."""
    return min(label.winner, label.loser), max(label.winner, label.loser)


def describe_repeats(labels: Sequence[Preference]) -> str:
    """Return a sentence on labels that repeat a pair, and '' if every pair has one label.

    Args: labels: labels of pairs of one generator, or with numbers of shapes in place of seeds.
    """
    pair_count = len({pair_of(label) for label in labels})
    if pair_count == len(labels):
        return ""
    answer_count = len({(pair_of(label), label.annotator) for label in labels})
    sentence = (
        f"{len(labels)} labels of {pair_count} different pairs: {len(labels) - pair_count} labels repeat a"
        " pair"
    )
    if answer_count < len(labels):
        sentence += (
            f", {len(labels) - answer_count} of them by the same annotator, or without an annotator's name"
        )
    return f"{sentence}. Intervals and warnings count pairs."


def split_by_seed(
    labels: Sequence[Preference], fractions: Sequence[float] = (0.70, 0.15, 0.15), seed: int = 0
) -> Splits:
    """Split labelled pairs into train, val and test so that no seed is in two splits.

    Labels connect seeds to a graph. Seeds of one connected component stay together, even if their shapes come
    from different generators, so that no latent is in two splits. The components are assigned one by one, the
    largest first, each to the split that lacks most labels of the same generator. A component with more
    labels than the largest split is divided: its seeds, in breadth-first order from a random seed, are
    assigned to the splits in runs that are proportional to `fractions`. Labels between two runs are not used.

    Args:
        labels: labelled pairs; ties are not used.
        fractions: shares of train, val and test, which sum to 1.
        seed: random seed; equal arguments give equal splits.
    Raises: ValueError for shares that do not sum to 1, and if a split with a share above 0 gets no label.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            "split_by_seed(fractions): expected three shares of at least 0 that sum to 1, got"
            f" {tuple(fractions)}. Use, for example, 0.7 0.15 0.15."
        )
    # The order in which random numbers are drawn must not change, or equal seeds would give other splits.
    rng = np.random.default_rng(seed)
    # A tie has no winner, which training and accuracy need.
    usable_labels = [label for label in labels if not label.tie]
    split_of_seed = _assign(usable_labels, fractions, rng)
    # A label is used only if both of its seeds are in the same split.
    train, val, test = (
        tuple(
            label
            for label in usable_labels
            if split_of_seed[label.winner] == split_of_seed[label.loser] == split_index
        )
        for split_index in range(3)
    )
    # A split with a share of 0 may be empty.
    empty_splits = [
        name
        for name, split_labels, share in zip(SPLITS, (train, val, test), fractions, strict=True)
        if share > 0 and not split_labels
    ]
    if empty_splits:
        raise ValueError(
            f"split_by_seed: {len(usable_labels)} usable labels are too few, because the split"
            f" {' and the split '.join(empty_splits)} got no label. Add labels of pairs with new seeds."
        )
    used_count = len(train) + len(val) + len(test)
    return Splits(
        train=train,
        val=val,
        test=test,
        dropped=len(usable_labels) - used_count,
        ties=len(labels) - len(usable_labels),
    )


def _assign(
    labels: Sequence[Preference], fractions: Sequence[float], rng: np.random.Generator
) -> dict[int, int]:
    """Assign each seed to a split; see `split_by_seed`.

    Args:
        labels: labelled pairs without ties.
        fractions: shares of train, val and test, which sum to 1.
        rng: random numbers.
    Returns: a dict from each seed to the index of its split in SPLITS.
    """
    neighbours: dict[int, list[int]] = defaultdict(list)
    for label in labels:
        # The graph is undirected. Repeated labels give repeated edges, so edges count labels.
        neighbours[label.winner].append(label.loser)
        neighbours[label.loser].append(label.winner)
    components = _components(neighbours, rng)
    # Number of labels of each component. Every label is counted at each of its two seeds, hence the division
    # by 2.
    label_counts = [
        sum(len(neighbours[seed]) for seed in component_seeds) / 2 for component_seeds in components
    ]
    generator_of_seed = {seed: label.generator for label in labels for seed in (label.winner, label.loser)}
    label_count_by_generator = Counter(label.generator for label in labels)
    # Number of labels that each split still lacks, by generator, so that each generator occurs in every split
    missing_counts = {
        generator: [share * label_count for share in fractions]
        for generator, label_count in label_count_by_generator.items()
    }
    split_of_seed: dict[int, int] = {}
    # Large components come first, since small ones can still balance the splits afterwards. sorted() is
    # stable: components of equal size keep their random order.
    for component_index in sorted(
        range(len(components)), key=lambda component_index: -label_counts[component_index]
    ):
        component_seeds = components[component_index]
        # A component that is too large for any split is divided. A component of two seeds is one pair, which
        # cannot be divided.
        if label_counts[component_index] > max(fractions) * len(labels) and len(component_seeds) > 2:
            # Positions at which the next split begins, rounded to integers
            split_starts = np.floor(np.cumsum(fractions) * len(component_seeds) + 0.5)
            for seed_position, seed in enumerate(component_seeds):
                split_of_seed[seed] = int(np.searchsorted(split_starts, seed_position, side="right"))
            continue
        missing_by_split = missing_counts[generator_of_seed[component_seeds[0]]]
        target_split = max(range(3), key=lambda split: missing_by_split[split])
        missing_by_split[target_split] -= label_counts[component_index]
        split_of_seed.update(dict.fromkeys(component_seeds, target_split))
    return split_of_seed


def fold_labels(labels: Sequence[Preference], fold_count: int, seed: int = 0) -> np.ndarray:
    """Assign labels to the folds of a cross-validation: fold numbers [P].

    Labels that share a seed, directly or through other labels, get one fold, so that no shape is in two
    folds. Where such a group is larger than a fold and a half, its pairs are distributed instead, and shapes
    are then in several folds. Labels of one pair always share a fold.

    Args:
        labels: P labelled pairs.
        fold_count: number of folds; no fold is empty.
        seed: random seed of the assignment.
    Raises: ValueError if there are fewer different pairs than folds.
    """
    pairs = sorted({pair_of(label) for label in labels})
    if len(pairs) < fold_count:
        raise ValueError(
            f"labels: {len(pairs)} different pairs are too few for a cross-validation. Label at least"
            f" {fold_count} pairs."
        )
    rng = np.random.default_rng([seed, len(pairs)])
    neighbours: dict[int, list[int]] = defaultdict(list)
    for first_seed, second_seed in pairs:
        neighbours[first_seed].append(second_seed)
        neighbours[second_seed].append(first_seed)
    component_of_seed = {
        component_seed: component_index
        for component_index, component_seeds in enumerate(_components(neighbours, rng))
        for component_seed in component_seeds
    }
    pairs_by_component: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair in pairs:
        pairs_by_component[component_of_seed[pair[0]]].append(pair)
    # groups of pairs that stay together
    groups: list[list[tuple[int, int]]] = []
    for _, component_pairs in sorted(pairs_by_component.items()):
        if len(component_pairs) > 1.5 * len(pairs) / fold_count:
            groups += [[component_pairs[index]] for index in rng.permutation(len(component_pairs))]
        else:
            groups.append(component_pairs)
    fold_of_pair: dict[tuple[int, int], int] = {}
    fold_sizes = [0] * fold_count
    # Large groups come first, since small ones can still balance the folds afterwards.
    for group in sorted(groups, key=len, reverse=True):
        smallest_fold = fold_sizes.index(min(fold_sizes))
        fold_sizes[smallest_fold] += len(group)
        fold_of_pair.update(dict.fromkeys(group, smallest_fold))
    return np.array([fold_of_pair[pair_of(label)] for label in labels])


def _components(neighbours: dict[int, list[int]], rng: np.random.Generator) -> list[list[int]]:
    """Return the connected components of a graph of seeds, in random order.

    The seeds of a component are in breadth-first order from a random seed.

    Args:
        neighbours: seeds with which each seed shares a label.
        rng: random numbers.
    """
    # Sorted, so that the result does not depend on the order of the labels.
    seeds = sorted(neighbours)
    visited_seeds: set[int] = set()
    components = []
    for seed_index in rng.permutation(len(seeds)):
        if seeds[seed_index] in visited_seeds:
            continue
        queue = deque([seeds[seed_index]])
        component = []
        visited_seeds.add(seeds[seed_index])
        while queue:
            seed = queue.popleft()
            component.append(seed)
            for neighbour in neighbours[seed]:
                if neighbour not in visited_seeds:
                    visited_seeds.add(neighbour)
                    queue.append(neighbour)
        components.append(component)
    return components


def reference_seeds(
    seed_count: int = 1000,
    fractions: Sequence[float] = (0.70, 0.15, 0.15),
    unusable_seeds: Iterable[int] = (),
) -> dict[str, tuple[int, ...]]:
    """Return the seeds of reference samples by split.

    They are consecutive seeds from 100,000 on, without the seeds in `unusable_seeds`.

    Args:
        seed_count: number of seeds of all splits together.
        fractions: shares of train, val and test, which sum to 1.
        unusable_seeds: seeds that are not used, for example seeds of labelled shapes.
    """
    # A set, because `unusable_seeds` may be an iterator.
    excluded_seeds = set(unusable_seeds)
    seeds = list(
        itertools.islice(
            (seed for seed in itertools.count(REFERENCE_SAMPLES) if seed not in excluded_seeds), seed_count
        )
    )
    # Index of the first seed of each split, rounded, and the total number
    split_starts = [0, *(int(round(share * seed_count)) for share in np.cumsum(fractions))]
    return {
        name: tuple(seeds[start:stop])
        for name, start, stop in zip(SPLITS, split_starts[:-1], split_starts[1:], strict=True)
    }


def with_permuted_shapes(labels: Sequence[Preference], seed: int = 0) -> list[Preference]:
    """Replace every seed in labels by a different labelled seed, chosen at random.

    The result is a control without a learnable signal, because every label is applied to shapes that were not
    compared. Published depth and point rewards were trained in this way by accident (see
    docs/understand/rewards.md).

    Args:
        labels: labelled pairs.
        seed: seed of the random replacement.
    """
    labelled_seeds = np.array(sorted({shape for label in labels for shape in (label.winner, label.loser)}))
    shuffled_seeds = np.random.default_rng([seed, len(labelled_seeds)]).permutation(labelled_seeds)
    # Each seed is replaced by its predecessor in the shuffled order, so no seed is replaced by itself.
    replacement_of_seed = {
        int(old): int(new) for old, new in zip(shuffled_seeds, np.roll(shuffled_seeds, 1), strict=True)
    }
    return [
        replace(
            label,
            winner=replacement_of_seed[label.winner],
            loser=replacement_of_seed[label.loser],
            clean=None if label.clean is None else replacement_of_seed[label.clean],
        )
        for label in labels
    ]


def common_value(labels: "Iterable[Preference | UnpairedPreference]", field_name: str) -> Any:
    """Return the value of a field that all labels share.

    Labels that do not state the field are ignored. Return None if no label states it.

    Args:
        labels: labels of pairs or of single shapes.
        field_name: name of the field, "generator" or "psi".
    Raises: ValueError if labels state different values.
    """
    count_by_value = Counter(value for label in labels if (value := getattr(label, field_name)) is not None)
    if len(count_by_value) > 1:
        values_text = ", ".join(
            f"{value} ({label_count} labels)" for value, label_count in count_by_value.most_common(4)
        )
        raise ValueError(
            f"labels: expected the same {field_name} in all labels, got {values_text}. Put the labels of each"
            f" {field_name} into a separate file."
        )
    return next(iter(count_by_value), None)


def number_shapes(splits: Splits) -> tuple[Splits, list[tuple[str, int]]]:
    """Replace the seeds in labels of several generators by numbers of shapes.

    Every pair (hash of the generator, seed) gets one number, because a seed alone does not identify a shape.

    Returns: the splits with numbers in place of seeds, and a list of the (generator, seed) of each number.
    """
    # (generator, seed) -> number, in the order of the first occurrence
    number_of_shape: dict[tuple[str, int], int] = {}

    def with_numbers(label: Preference) -> Preference:
        """Replace the seeds of one label."""
        # setdefault returns the number of a shape that has one, and adds the next number otherwise.
        winner, loser = (
            number_of_shape.setdefault((str(label.generator), seed), len(number_of_shape))
            for seed in (label.winner, label.loser)
        )
        clean_number = None
        if label.clean is not None:
            clean_number = winner if label.clean == label.winner else loser
        return replace(label, winner=winner, loser=loser, clean=clean_number)

    train, val, test = (tuple(map(with_numbers, split)) for split in (splits.train, splits.val, splits.test))
    return replace(splits, train=train, val=val, test=test), list(number_of_shape)
