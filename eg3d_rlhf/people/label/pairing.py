"""The pairs of a campaign on seeds of a generator, with known answers between them; `STRATEGIES` chooses the
pairs.

Equal options and generators give equal plans.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.people.label.entities import DAMAGES, Kind, PlannedPair, Shape
from eg3d_rlhf.preferences.labels import MAX_SEED, Preference
from eg3d_rlhf.preferences.pair_strategies import (
    STRATEGIES,
    TITLE,
    Ensemble,
    Item,
    Items,
    Scored,
    StrategyOptions,
    check_rewards,
)
from training.config import knob

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator

# one gold pair for so many others, and at least so many
_GOLD_EVERY = 25
_LEAST_GOLD = 4
BROKEN = "This one was broken on purpose: {}. It is not a good shape."
EXPLANATION = "One of the two was broken on purpose: {}. The other one is better."
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class PairingOptions(StrategyOptions):
    """Settings of a campaign's pairs: what is compared, and by which strategy the pairs are chosen. Gold and
    training pairs come on top of `pairs`.
    """

    strategy: str = knob(
        "random", f"How pairs are chosen: {', '.join(STRATEGIES)}, or a plugin's.", TITLE, metavar="NAME"
    )
    seed: int = knob(0, "Decides pairs, order, sides, repeats.", TITLE, low=0, high=MAX_SEED)
    # the bundled labels are about 0..3999
    first_seed: int = knob(10_000, "Shapes are seeds from here on.", TITLE, low=0, high=MAX_SEED)
    psi: float = _rare_title_knob(1.0, "Truncation.", metavar="0..2", low=0, high=2, flags=("--trunc",))
    level: float | None = _rare_title_knob(None, "Raw density of the surface.", shown="the generator's own")
    resolution: int = _rare_title_knob(128, "Grid points per axis.", metavar="POINTS", low=16, high=512)
    triangles: int = _rare_title_knob(30_000, "Per shape, about.", low=100, high=10**6)
    gold: int | None = _rare_title_knob(
        None, "Pairs with a known answer.", low=0, high=10**5, shown="one for 25, at least 4"
    )
    training: int = _rare_title_knob(3, "Explained examples at the start.", low=0, high=100)
    rewards: tuple[str, ...] = ()  # reward files of the ensemble; none: the bundled two
    single: str | None = knob(
        None,
        "Show one shape at a time, judged by thumbs, or by scores from 0 to 5.",
        TITLE,
        choices=("thumbs", "scores"),
        shown="pairs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        STRATEGIES[self.strategy]  # raises for an unknown name
        if self.single and self.strategy != "random":
            raise ValueError(
                f"--single: expected --strategy=random, got {self.strategy}. Leave one of the two out."
            )
        if self.level is not None and not np.isfinite(self.level):
            raise ValueError(
                f"PairingOptions: expected a finite level, got {self.level}. Leave it out for the generator's"
                " own."
            )
        if self.first_seed + self.seeds > MAX_SEED:
            raise ValueError(
                f"PairingOptions: expected seeds up to {MAX_SEED}, got first_seed={self.first_seed}. Use a"
                " smaller one."
            )
        refuse_held_out(
            range(self.first_seed, self.first_seed + self.seeds),
            f"--first-seed={self.first_seed}, {self.seeds} seeds",
        )

    @property
    def gold_pairs(self) -> int:
        return max(_LEAST_GOLD, -(-self.pairs // _GOLD_EVERY)) if self.gold is None else self.gold

    @property
    def compared(self) -> int:
        return self.pairs if self.single else STRATEGIES[self.strategy].items_for(self)

    @property
    def seeds(self) -> int:
        return self.compared + self.gold_pairs + self.training


@dataclass(frozen=True)
class Plan:
    """The pairs of a campaign in order, and how they came about (JSON values)."""

    pairs: list[PlannedPair]
    report: dict


def plan(
    options: PairingOptions,
    generator: "LoadedGenerator",
    results: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
) -> Plan:
    """Plan the pairs of a campaign.

    Args: results: of an earlier campaign, for strategies that read answers; ensemble: for those that read
        scores.
    """
    from eg3d_rlhf.generators import check_seeds

    options = options if options.level is not None else replace(options, level=generator.generator.level)
    results = results if STRATEGIES[options.strategy].reads_answers else ()
    if not results:
        last = options.first_seed + options.seeds - 1
        check_seeds(
            generator.generator,
            last,
            f"--first-seed={options.first_seed}, {options.seeds} seeds with gold and training",
        )
    rng = np.random.default_rng(options.seed)
    draw = shape_of(options, generator)
    report = {**asdict(options), "rewards": list(options.rewards)}
    seeds: Sequence[Sequence[int]]
    if options.single:
        rng.permutation(2 * options.pairs)  # version 0.1 drew pairs first, and the rest of the plan follows
        seeds = [(seed, seed) for seed in (rng.permutation(options.pairs) + options.first_seed).tolist()]
    else:
        seeds, more = _chosen(options, generator, results, ensemble, rng)
        report |= more
    pairs = [PlannedPair(first=draw(a), second=draw(b)) for a, b in seeds]
    taken = {seed for pair in seeds for seed in pair}
    unused = (seed for seed in range(options.first_seed + options.compared, MAX_SEED) if seed not in taken)
    known = [
        draw(seed) for seed, _ in zip(unused, range(options.gold_pairs + options.training), strict=False)
    ]
    answers = broken_shapes if options.single else known_answers
    gold = answers(known[: options.gold_pairs], Kind.GOLD, rng)
    training = answers(known[options.gold_pairs :], Kind.TRAINING, rng)
    return Plan(training + spread(pairs, gold), report)


def _chosen(
    options: PairingOptions,
    generator: "LoadedGenerator",
    results: Sequence[Preference],
    ensemble: Ensemble | None,
    rng: np.random.Generator,
) -> tuple[list[list[int]], dict]:
    """Choose pairs of seeds; returns them and the strategy's report."""
    for result in results:
        if result.generator not in (None, generator.hash) or result.psi not in (None, options.psi):
            got = f"{str(result.generator)[:12]} and psi {result.psi}"
            raise ValueError(
                f"plan: expected results of this generator and psi, got {got}. Plan the next round with them."
            )
    # a later round is of the seeds of the earlier ones
    seeds: Sequence[int] = sorted({seed for result in results for seed in (result.winner, result.loser)})
    seeds = seeds or range(options.first_seed, options.first_seed + options.compared)
    number = {seed: i for i, seed in enumerate(seeds)} if results else {}
    scores = None
    if ensemble is not None:
        score = ensemble.score
        scores = replace(ensemble, score=lambda numbers: score([seeds[i] for i in numbers]))
    check_rewards(options.strategy, 0 if ensemble is None else ensemble.size)
    chosen = STRATEGIES[options.strategy].plan(
        Items(members=[Item()] * len(seeds), unlimited=True, ensemble=scores),
        [replace(r, winner=number[r.winner], loser=number[r.loser]) for r in results],
        rng,
        options,
    )
    pairs = [[seeds[a], seeds[b]] for a, b in chosen.pairs]
    return pairs, named_in(chosen.report, lambda a, b: {"seeds": [seeds[a], seeds[b]]})


def named_in(report: Mapping, name: Callable[[int, int], Mapping]) -> dict:
    """Return a strategy's report with facts of the items in place of their numbers, which stand under "why".

    Args: name: facts of the two items of a pair, JSON.
    """
    named = dict(report)
    if "why" in report:
        named["why"] = [
            {**name(*entry["pair"]), **{key: value for key, value in entry.items() if key != "pair"}}
            for entry in report["why"]
        ]
    return named


def shape_of(options: PairingOptions, generator: "LoadedGenerator") -> Callable[[int], Shape]:
    """The shape of a seed, as the options draw it; the bundled generator is known by its place, wherever that
    is.
    """
    source = "" if generator.path == bundled.GENERATOR else str(generator.path.resolve())
    level = generator.generator.level if options.level is None else options.level
    return lambda seed: Shape(
        generator=generator.hash,
        source=source,
        seed=int(seed),
        psi=float(options.psi),
        level=float(level),
        resolution=options.resolution,
        triangles=options.triangles,
    )


def known_answers(
    shapes: Sequence[Shape], kind: Kind, rng: np.random.Generator, damages: Mapping[str, str] = DAMAGES
) -> list[PlannedPair]:
    """Each shape against itself damaged on purpose; the kinds of damage take turns. Which of the two comes
    first is drawn.
    """
    pairs = []
    for number, shape in enumerate(shapes):
        name, seen = list(damages.items())[number % len(damages)]
        sides = [shape, replace(shape, degradation=name)]
        swapped = bool(rng.integers(2))
        pairs.append(
            PlannedPair(
                first=sides[swapped],
                second=sides[not swapped],
                kind=kind,
                expected="second" if swapped else "first",
                explanation=EXPLANATION.format(seen) if kind is Kind.TRAINING else "",
            )
        )
    return pairs


def broken_shapes(
    shapes: Sequence[Shape], kind: Kind, rng: np.random.Generator, damages: Mapping[str, str] = DAMAGES
) -> list[PlannedPair]:
    """Each shape damaged on purpose, by itself; see `known_answers`."""
    pairs = []
    for pair in known_answers(shapes, kind, rng, damages):
        broken = pair.first if pair.first.degradation else pair.second
        explanation = BROKEN.format(damages[broken.degradation]) if kind is Kind.TRAINING else ""
        pairs.append(replace(pair, first=broken, second=broken, expected="second", explanation=explanation))
    return pairs


def spread(pairs: Sequence[PlannedPair], gold: Sequence[PlannedPair]) -> list[PlannedPair]:
    """Gold pairs at even distances between the others, none before the first."""
    out = []
    for number, pair in enumerate(pairs, 1):
        out.append(pair)
        out += gold[(number - 1) * len(gold) // len(pairs) : number * len(gold) // len(pairs)]
    return out


def reward_ensemble(pairing: PairingOptions, generator: "LoadedGenerator") -> Ensemble:
    """Open the ensemble of the reward files that are named, each holding one reward or several; none named:
    the bundled two.

    Raises: ValueError if they are fewer than the strategy needs.
    """
    import torch

    from eg3d_rlhf.rewards.cache import observe_seeds
    from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward

    members: list[Reward] = []
    described = []
    # those two were trained apart on the same labels
    for path in map(Path, pairing.rewards or (bundled.REWARD, bundled.WATCH)):
        reward = load_reward(path)
        check_reward(reward, generator.generator, f"--strategy={pairing.strategy}: {path.name}")
        parts = reward.members()
        members += parts
        described.append({"file": path.name, "sha256": file_hash(path), "members": len(parts)})
    sources = {
        m.observation: observe_seeds(generator.generator, m.observation, psi=pairing.psi) for m in members
    }

    check_rewards(pairing.strategy, len(members))

    @torch.no_grad()
    def score(seeds: Sequence[int]) -> Scored:
        observed = {observation: draw(seeds) for observation, draw in sources.items()}
        seen = [m.network.embed(observed[m.observation]) for m in members]
        scores = [m.network.score_embedding(e) / m.temperature for m, e in zip(members, seen, strict=True)]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(seen, dim=1).double().numpy())

    return Ensemble(score, len(members), described)
