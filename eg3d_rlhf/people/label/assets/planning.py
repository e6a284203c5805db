"""Which assets a campaign compares: those of one prompt, between generators, or between seeds where there is one generator.

The first pairs of a plan, however many are asked for, are balanced: generators that meet take turns, and so do the prompts on which they
meet. Everything follows from the options' seed and the files.

Letters: A assets of a prompt.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import numpy as np

from eg3d_rlhf.people.label.assets.collection import Asset, Collection
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS, DAMAGES
from eg3d_rlhf.people.label.entities import Kind, PlannedPair, Shape
from eg3d_rlhf.people.label.pairing import PairingOptions, Plan, broken_shapes, known_answers, spread

T = TypeVar("T")
G = TypeVar("G", bound=Hashable)
Pair = tuple[Asset, Asset]


def shape_of(asset: Asset) -> Shape:
    """An asset as a campaign keeps it."""
    return Shape(
        generator=asset.generator, source=str(asset.path), seed=asset.seed, psi=math.nan, level=math.nan, resolution=0, triangles=0,
        file=asset.hash, condition=asset.prompt,
    )  # fmt: skip


def plan_assets(options: PairingOptions, collection: Collection, tell: Callable[[str], None] = lambda text: None) -> Plan:
    """The pairs of a campaign, or the assets one by one; `tell` hears what differs from what was asked for.

    Raises: ValueError for another strategy, and where no prompt has two assets to compare.
    """
    if options.strategy != "random":
        raise ValueError(f"--strategy={options.strategy}: expected random pairs of assets. Leave it out.")
    rng = np.random.default_rng(options.seed)
    found: list[Pair]
    if options.single:
        found = [(asset, asset) for asset in itertools.islice(balanced(_by_generator(collection), rng), options.pairs)]
    else:
        found = list(itertools.islice(balanced(_meetings(collection, rng, options.pairs), rng), options.pairs))
        found = [pair if rng.integers(2) else pair[::-1] for pair in found]
    if not found:
        raise ValueError("expected at least two assets of one prompt that differ, got none. Give each prompt a file of each generator.")
    if len(found) < options.pairs:
        tell(f"{len(found)} {'assets' if options.single else 'pairs'}: there are no more")
    options = replace(options, pairs=len(found))
    shown = [PlannedPair(first=shape_of(a), second=shape_of(b)) for a, b in found]
    gold, training = _known(options, collection, rng, tell)
    used = {key: value for key, value in asdict(options).items() if key in ("pairs", "seed", "single", "strategy")}
    report = {**used, "generators": collection.generators, "assets": len(collection.assets), "gold": len(gold), "training": len(training)}
    return Plan(training + spread(shown, gold), report)


def conditions(collection: Collection) -> dict[str, dict]:
    """Prompts as a campaign keeps them."""
    return {name: prompt.to_json() for name, prompt in collection.prompts.items()}


def balanced(buckets: Mapping[tuple[G, str], Sequence[T]], rng: np.random.Generator) -> Iterator[T]:
    """Items of buckets by (group, prompt): groups take turns, and each goes through its prompts in random order, again and again."""
    groups: dict[G, list[Sequence[T]]] = defaultdict(list)
    for (group, _), items in buckets.items():
        groups[group].append(items)
    lines = [_in_turns(prompts, rng) for prompts in groups.values()]
    while lines:
        left = []
        for i in rng.permutation(len(lines)):
            for item in itertools.islice(lines[i], 1):
                yield item
                left.append(lines[i])
        lines = left


def _in_turns(buckets: list[Sequence[T]], rng: np.random.Generator) -> Iterator[T]:
    for turn in range(max(map(len, buckets))):
        rest = [bucket for bucket in buckets if len(bucket) > turn]
        yield from (rest[i][turn] for i in rng.permutation(len(rest)))


def _by_generator(collection: Collection) -> dict[tuple[str, str], list[Asset]]:
    out: dict[tuple[str, str], list[Asset]] = defaultdict(list)
    for asset in collection.assets:
        out[asset.generator, asset.prompt].append(asset)
    return out


def _meetings(collection: Collection, rng: np.random.Generator, most: int) -> dict[tuple[tuple[str, str], str], list[Pair]]:
    """Pairs by who meets and on which prompt, in random order, at most so many of each; files that are equal do not meet."""
    sides, out = _by_generator(collection), {}
    several = len(collection.generators) > 1
    for prompt in sorted({asset.prompt for asset in collection.assets}):
        for a, b in itertools.combinations(collection.generators, 2) if several else [(collection.generators[0],) * 2]:
            first, second = sides.get((a, prompt), []), sides.get((b, prompt), [])
            rows, columns = np.triu_indices(len(first), 1) if a == b else np.indices((len(first), len(second))).reshape(2, -1)
            chosen = rng.permutation(len(rows))[:most]
            pairs = [(first[rows[i]], second[columns[i]]) for i in chosen]
            pairs = [(one, other) for one, other in pairs if one.hash != other.hash]
            if pairs:
                out[(a, b), prompt] = pairs
    return out


def _known(
    options: PairingOptions, collection: Collection, rng: np.random.Generator, tell: Callable[[str], None]
) -> tuple[list[PlannedPair], list[PlannedPair]]:
    """Gold pairs and training pairs, of assets that can be damaged."""
    whole = [asset for asset in collection.assets if asset.kind in DAMAGED_KINDS]
    if not whole:
        tell("no attention checks and no practice: videos cannot be damaged on purpose")
        return [], []
    order = itertools.cycle([whole[i] for i in rng.permutation(len(whole))])
    answers = broken_shapes if options.single else known_answers
    gold = answers([shape_of(asset) for asset in itertools.islice(order, options.gold_pairs)], Kind.GOLD, rng, DAMAGES)
    return gold, answers([shape_of(asset) for asset in itertools.islice(order, options.training)], Kind.TRAINING, rng, DAMAGES)
