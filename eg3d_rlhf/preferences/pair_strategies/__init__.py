"""Registry of strategies that choose the pairs which people compare.

Labelling projects on seeds of a generator, on finished assets and on samples of a flow, studies of two
generators, and rounds of tuning all use these strategies. An item is a shape that can be compared, and its
number is its index in `Items`. A strategy returns pairs of numbers, which the caller converts to shapes.

    plan = STRATEGIES["active"].plan(items, answers, np.random.default_rng(seed), options)

A new strategy is a file that adds it to the registry, and an entry of the table below; or a plugin, see
docs/extending.md.

Shapes: N items, P pairs, C candidate pairs, K members of an ensemble, M entries of the concatenated
embeddings of all members.
"""

import abc
import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.preferences.labels import Preference
from training.config import check_knobs, knob

Key = TypeVar("Key", bound=Hashable)
Rng = np.random.Generator
Answers = Sequence[Preference]  # answers to earlier pairs; winner and loser are numbers of items
TITLE = "Pairs"  # title of the group of flags in --help
_BATCH = 16  # number of items that are scored at once, which limits the memory
# Pairs of a strategy that learns from the answers (`PairStrategy.learns`):
FIRST_LABELS = 25  # labels of random pairs before a reward chooses pairs
LEARNT_BATCH = 8  # pairs that are chosen at once
RANDOM_EVERY = 5  # every fifth pair is random; only random pairs measure the accuracy
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Settings of the strategies that choose pairs.

    Raises: ValueError for values out of range.
    """

    pairs: int = knob(
        1000,
        "Number of pairs to label. With --single, which labels single shapes, the number of shapes.",
        TITLE,
        low=1,
        high=10**6,
    )
    pool: float = _rare_title_knob(
        2.0,
        "For --strategy=active and close: number of seeds that are scored for each seed that is used in a"
        " pair. A larger pool contains more informative pairs, and takes longer to score.",
        low=2,
        high=100,
    )
    doubtful: float = _rare_title_knob(
        1.0,
        "For --strategy=active and close: share of the pairs that is chosen by scores. All other pairs are"
        " random.",
        metavar="0..1",
        above=0,
        high=1,
    )
    diversity: float = _rare_title_knob(
        0.5,
        "For --strategy=active and close: weight of the distance between a pair and the pairs that are"
        " already chosen. A larger weight gives more varied pairs. With 0, only the scores count.",
        metavar="0..1",
        low=0,
        high=1,
    )
    rounds: int = _rare_title_knob(
        4,
        "For --strategy=tournament and blocks: number of pairs that contain each shape. The last round may be"
        " incomplete.",
        low=1,
        high=1000,
    )

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(frozen=True)
class Scored:
    """Scores and embeddings of items, computed by an ensemble of rewards."""

    scores: np.ndarray  # scores [K, N], divided by the temperature of each member
    embeddings: np.ndarray  # embeddings [N, M], those of all members concatenated


@dataclass(frozen=True)
class Ensemble:
    """Ensemble of rewards that scores items."""

    score: Callable[[Sequence[int]], Scored]  # function from numbers of a few items to scores and embeddings
    size: int  # number of rewards, K
    described: list[dict[str, Any]]  # JSON values that describe every reward, for the record of the project


@dataclass(frozen=True, kw_only=True)
class Item:
    """Properties of an item, which decide with which other items it may be compared."""

    prompt: str = ""  # prompt, or in a study the latent; only items with the same prompt are compared
    source: str = ""  # name of the generator
    content: str = ""  # hash of the file, '' if it is not available; items with equal files are not compared


@dataclass(frozen=True, kw_only=True)
class Items:
    """Items of a labelling project. The number of an item is its index, 0..N-1."""

    members: Sequence[Item]  # the N items
    # True if the items are seeds. There are then as many items as a strategy requests, and any two may be
    # compared.
    unlimited: bool = False
    # True if the items already have a random order, which strategies do not change (latents of a study)
    ordered: bool = False
    ensemble: Ensemble | None = None  # rewards that score the items; None if there are none
    # pairs of numbers that people have answered in earlier projects, and that are not asked again
    answered: frozenset[frozenset[int]] = frozenset()

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def sources(self) -> list[str]:
        """Sorted names of all generators."""
        return sorted({item.source for item in self.members})

    def by(self, key: Callable[[Item], Key]) -> dict[Key, list[int]]:
        """Group the numbers of items by a key. Groups and numbers are in the order of the items."""
        # A dict keeps the order of insertion, so that results do not depend on hashes.
        numbers_by_key: dict[Key, list[int]] = defaultdict(list)
        for item_number, item in enumerate(self.members):
            numbers_by_key[key(item)].append(item_number)
        return numbers_by_key

    def groups(self) -> list[list[int]]:
        """Group the numbers of items by prompt. Only items of the same group are compared."""
        return list(self.by(lambda item: item.prompt).values())

    def comparable(self, a: int, b: int) -> bool:
        """Return True if two items of the same prompt may be compared.

        Their files must differ, and the pair must not have been answered in an earlier project. If there are
        several generators, the items must come from different generators.

        Args:
            a: number of the first item.
            b: number of the second item.
        """
        item_a = self.members[a]
        item_b = self.members[b]
        if frozenset((a, b)) in self.answered:
            return False
        # Neither of two equal files can be better.
        if item_a.content and item_a.content == item_b.content:
            return False
        return len(self.sources) < 2 or item_a.source != item_b.source

    def scored(self) -> Scored:
        """Score all items with the ensemble, which must exist (see `check_rewards`)."""
        assert self.ensemble is not None
        item_numbers = range(len(self))
        scored_batches = [
            self.ensemble.score(item_numbers[start : start + _BATCH]) for start in range(0, len(self), _BATCH)
        ]
        return Scored(
            np.concatenate([scored_batch.scores for scored_batch in scored_batches], axis=1),
            np.concatenate([scored_batch.embeddings for scored_batch in scored_batches]),
        )


@dataclass(frozen=True)
class Chosen:
    """Pairs in the order in which they are shown, and a report on their choice."""

    pairs: Sequence[Sequence[int]]  # numbers of the items of each pair, [P, 2]
    report: Mapping[str, Any] = field(default_factory=dict)  # JSON values, for the record of the project


class PairStrategy(abc.ABC):
    """Base class of the methods that choose pairs."""

    least_rewards = 0  # least number of rewards in the ensemble; 0 if the strategy uses no scores
    # True if the strategy works without rewards for samples of a generator: a reward is then fitted to the
    # answers so far, and chooses further pairs while people label (eg3d_rlhf.people.label.active)
    learns = False
    reads_answers = False  # True if `plan` uses answers to pairs of an earlier labelling project

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of seeds that the strategy needs for `options.pairs` pairs."""
        return 2 * options.pairs

    @abc.abstractmethod
    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose at most `options.pairs` pairs. Equal arguments give equal pairs.

        Args:
            items: items that may be compared.
            answers: answers to earlier pairs of these items.
            rng: random numbers.
            options: settings of the strategy.
        Raises: ValueError if the options cannot be fulfilled with these items.
        """


STRATEGIES: Registry[PairStrategy] = Registry(
    "--strategy",
    {
        "random": "eg3d_rlhf.preferences.pair_strategies.random_pairs",
        "active": "eg3d_rlhf.preferences.pair_strategies.by_scores",
        "close": "eg3d_rlhf.preferences.pair_strategies.by_scores",
        "tournament": "eg3d_rlhf.preferences.pair_strategies.tournament",
        "blocks": "eg3d_rlhf.preferences.pair_strategies.blocks",
    },
)


def check_rewards(strategy: str, reward_count: int) -> None:
    """Raise ValueError if there are too few rewards for a strategy, or if the strategy is unknown.

    Args:
        strategy: name of the strategy.
        reward_count: number of rewards.
    """
    # The look-up imports the strategy, or raises an error that lists the names.
    min_reward_count = STRATEGIES[strategy].least_rewards
    if reward_count < min_reward_count:
        raise ValueError(
            f"--strategy={strategy} needs at least {min_reward_count} rewards, got {reward_count}. Pass more"
            " files of rewards, or use --strategy=random."
        )
