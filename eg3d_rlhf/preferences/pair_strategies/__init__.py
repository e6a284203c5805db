"""Strategies that choose the pairs which people compare, by name.

Every planner of pairs uses a strategy of this registry: campaigns on seeds of a generator, on finished assets
and on samples of a flow, studies of two generators, and rounds of tuning. A strategy knows items by their
numbers alone, see `Items`. It returns pairs of numbers, which the planner turns into shapes.

    chosen = STRATEGIES["active"].plan(items, judgements, np.random.default_rng(seed), options)

A new strategy is one file that adds it, and one name in the table; or one plugin
(docs/extending.md).

Letters: N items, P pairs, C candidate pairs, K members of an ensemble, M entries of all embeddings.
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
Answers = Sequence[Preference]  # winner and loser are numbers of items
TITLE = "Pairs"  # of the flags
_BATCH = 16  # items that are scored at once
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Settings of the strategies."""

    pairs: int = knob(1000, "Pairs to label; with --single, shapes.", TITLE, low=1, high=10**6)
    pool: float = _rare_title_knob(
        2.0, "Active, close: seeds that are scored for each one used.", low=2, high=100
    )
    doubtful: float = _rare_title_knob(
        1.0,
        "Active, close: share of the pairs that is chosen by scores; the others are random.",
        metavar="0..1",
        above=0,
        high=1,
    )
    diversity: float = _rare_title_knob(
        0.5,
        "Active, close: weight of a pair's distance to those chosen before; 0: scores alone.",
        metavar="0..1",
        low=0,
        high=1,
    )
    # the last round is cut
    rounds: int = _rare_title_knob(4, "Tournament, blocks: pairs that each shape is in.", low=1, high=1000)

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(frozen=True)
class Scored:
    """Scores and embeddings of items by an ensemble of rewards."""

    scores: np.ndarray  # [K, N], in units of each member's temperature
    embeddings: np.ndarray  # [N, M]


@dataclass(frozen=True)
class Ensemble:
    """Rewards that score items."""

    score: Callable[[Sequence[int]], Scored]  # of a few items at a time
    size: int  # K
    described: list[dict[str, Any]]  # JSON, every file of rewards, for the campaign's record


@dataclass(frozen=True, kw_only=True)
class Item:
    """Properties that decide which items an item may be compared with."""

    prompt: str = ""  # items of one prompt are compared; for a study's items, the latent
    source: str = ""  # the generator
    content: str = ""  # hash; equal files are not compared. "": unknown


@dataclass(frozen=True, kw_only=True)
class Items:
    """The items of a campaign; strategies name them by their numbers, 0..N-1."""

    members: Sequence[Item]  # [N]
    # there are as many items as a strategy asks for, and all may be compared with one another (seeds)
    unlimited: bool = False
    ordered: bool = False  # the items come in a random order already, which is kept (a study's latents)
    ensemble: Ensemble | None = None

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def sources(self) -> list[str]:
        return sorted({item.source for item in self.members})

    def by(self, key: Callable[[Item], Key]) -> dict[Key, list[int]]:
        """Group the items' numbers by a key; groups and numbers are in the order of the items."""
        groups: dict[Key, list[int]] = defaultdict(list)
        for number, item in enumerate(self.members):
            groups[key(item)].append(number)
        return groups

    def groups(self) -> list[list[int]]:
        """Group the items' numbers by prompt: only items of one group are compared."""
        return list(self.by(lambda item: item.prompt).values())

    def comparable(self, a: int, b: int) -> bool:
        """Return whether two items of one prompt may be compared: they are of different sources, if the items
        have several, and of different contents.
        """
        first = self.members[a]
        second = self.members[b]
        if first.content and first.content == second.content:
            return False
        return len(self.sources) < 2 or first.source != second.source

    def scored(self) -> Scored:
        """Score all items, in batches. The planner has checked that there is an ensemble."""
        assert self.ensemble is not None
        numbers = range(len(self))
        parts = [
            self.ensemble.score(numbers[start : start + _BATCH]) for start in range(0, len(self), _BATCH)
        ]
        return Scored(
            np.concatenate([part.scores for part in parts], axis=1),
            np.concatenate([part.embeddings for part in parts]),
        )


@dataclass(frozen=True)
class Chosen:
    """Pairs in the order in which they are shown, and how they were chosen."""

    pairs: Sequence[Sequence[int]]  # [P, 2], numbers of items
    report: Mapping[str, Any] = field(default_factory=dict)  # JSON, for the campaign's record


class PairStrategy(abc.ABC):
    """A way to choose pairs; see `plan`."""

    least_rewards = 0  # members that the ensemble must have; 0: no scores are read
    reads_answers = False  # whether `plan` reads answers to an earlier campaign

    def items_for(self, options: StrategyOptions) -> int:
        """Return how many items the strategy needs for `options.pairs` pairs, where there are as many as
        asked for.
        """
        return 2 * options.pairs

    @abc.abstractmethod
    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose at most `options.pairs` pairs; equal arguments give equal pairs.

        Args: answers: to earlier pairs of these items.
        Raises: ValueError where the options do not fit the items.
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


def check_rewards(strategy: str, size: int) -> None:
    """Raise ValueError if an ensemble has too few members for a strategy. Args: size: members; 0: none."""
    least = STRATEGIES[strategy].least_rewards
    if size < least:
        raise ValueError(
            f"--strategy={strategy}: expected at least {least} rewards, got {size}. Name more reward files,"
            " or choose another strategy."
        )
