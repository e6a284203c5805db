"""Registry of strategies that choose the pairs to be compared by people.

Every planner of pairs uses a strategy of this registry: campaigns on seeds of a generator, on finished assets
and on samples of a flow, studies of two generators, and rounds of tuning. A strategy identifies items by
their numbers (see `Items`) and returns pairs of numbers, which the planner converts to shapes.

    chosen = STRATEGIES["active"].plan(items, judgements, np.random.default_rng(seed), options)

A new strategy is one file that adds it, and one entry of the table; or a plugin (docs/extending.md).

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
TITLE = "Pairs"  # title of the flags' group in --help
_BATCH = 16  # items that are scored at once; bounds memory
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Settings of the strategies. Raises: ValueError for values out of range."""

    pairs: int = knob(
        1000, "Number of pairs to label; with --single, number of shapes.", TITLE, low=1, high=10**6
    )
    pool: float = _rare_title_knob(
        2.0, "Strategies active and close: seeds that are scored per seed that is used.", low=2, high=100
    )
    doubtful: float = _rare_title_knob(
        1.0,
        "Strategies active and close: fraction of the pairs chosen by scores; the others are random.",
        metavar="0..1",
        above=0,
        high=1,
    )
    diversity: float = _rare_title_knob(
        0.5,
        "Strategies active and close: weight of a pair's distance to pairs chosen before; 0: scores alone.",
        metavar="0..1",
        low=0,
        high=1,
    )
    # the last round may be incomplete
    rounds: int = _rare_title_knob(
        4, "Strategies tournament and blocks: number of pairs that each shape is in.", low=1, high=1000
    )

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(frozen=True)
class Scored:
    """Scores and embeddings of items, from an ensemble of rewards."""

    scores: np.ndarray  # [K, N], in units of each member's temperature
    embeddings: np.ndarray  # [N, M]


@dataclass(frozen=True)
class Ensemble:
    """Rewards that score items."""

    score: Callable[[Sequence[int]], Scored]  # called with a few items at a time
    size: int  # K
    described: list[dict[str, Any]]  # JSON values of every reward file, for the record of the campaign


@dataclass(frozen=True, kw_only=True)
class Item:
    """Properties that decide which items may be compared with an item."""

    prompt: str = ""  # only items of one prompt are compared; in a study it is the latent
    source: str = ""  # the generator
    content: str = ""  # hash of the file; equal files are not compared. "": unknown


@dataclass(frozen=True, kw_only=True)
class Items:
    """The items of a campaign; strategies name them by their numbers, 0..N-1."""

    members: Sequence[Item]  # [N]
    # True: items are seeds. There are as many as a strategy requests, and all may be compared with one
    # another.
    unlimited: bool = False
    # True: the items have a random order already, which is kept (latents of a study).
    ordered: bool = False
    ensemble: Ensemble | None = None

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def sources(self) -> list[str]:
        """Return the names of all sources, sorted."""
        return sorted({item.source for item in self.members})

    def by(self, key: Callable[[Item], Key]) -> dict[Key, list[int]]:
        """Group the items' numbers by a key; groups and numbers are in the order of the items."""
        # Insertion order, so that results do not depend on hashes.
        groups: dict[Key, list[int]] = defaultdict(list)
        for number, item in enumerate(self.members):
            groups[key(item)].append(number)
        return groups

    def groups(self) -> list[list[int]]:
        """Group the items' numbers by prompt: only items of one group are compared."""
        return list(self.by(lambda item: item.prompt).values())

    def comparable(self, a: int, b: int) -> bool:
        """Return True if two items of one prompt may be compared.

        They need different contents and, if the items have several sources, different sources.
        """
        first = self.members[a]
        second = self.members[b]
        # Equal files: a comparison would have no answer.
        if first.content and first.content == second.content:
            return False
        # With several generators, pairs across generators are of interest.
        return len(self.sources) < 2 or first.source != second.source

    def scored(self) -> Scored:
        """Score all items, in batches. The planner has checked that there is an ensemble."""
        assert self.ensemble is not None
        numbers = range(len(self))
        # Batches bound the memory of the ensemble.
        parts = [
            self.ensemble.score(numbers[start : start + _BATCH]) for start in range(0, len(self), _BATCH)
        ]
        return Scored(
            np.concatenate([part.scores for part in parts], axis=1),
            np.concatenate([part.embeddings for part in parts]),
        )


@dataclass(frozen=True)
class Chosen:
    """Pairs in the order in which they are shown, and a report on the choice."""

    pairs: Sequence[Sequence[int]]  # [P, 2], numbers of items
    report: Mapping[str, Any] = field(default_factory=dict)  # JSON values, for the record of the campaign


class PairStrategy(abc.ABC):
    """A method to choose pairs; see `plan`."""

    least_rewards = 0  # smallest ensemble that it accepts; 0: it uses no scores
    reads_answers = False  # True: `plan` uses answers to an earlier campaign

    def items_for(self, options: StrategyOptions) -> int:
        """Return the number of items that the strategy needs for `options.pairs` pairs, if items are
        unlimited.
        """
        return 2 * options.pairs

    @abc.abstractmethod
    def plan(self, items: Items, answers: Answers, rng: Rng, options: StrategyOptions) -> Chosen:
        """Choose at most `options.pairs` pairs. Equal arguments give equal pairs.

        Args: answers: to earlier pairs of these items.
        Raises: ValueError if the options do not fit the items.
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
    # The look-up imports the strategy, or raises an error that lists the names.
    least = STRATEGIES[strategy].least_rewards
    if size < least:
        raise ValueError(
            f"--strategy={strategy}: expected at least {least} rewards, got {size}. Pass more reward files,"
            " or choose another strategy."
        )
