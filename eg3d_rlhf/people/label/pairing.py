"""Plans the pairs of a campaign on a generator's seeds, with gold and training pairs, whose answer is known.

A strategy of `STRATEGIES` chooses the pairs. Equal options and generators give equal plans.
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

# One gold pair for every 25 other pairs, and at least 4 of them: with fewer, a random annotator would often
# pass.
_GOLD_EVERY = 25
_LEAST_GOLD = 4
SINGLE_EXPLANATION = "This one was broken on purpose: {}. It is not a good shape."
EXPLANATION = "One of the two was broken on purpose: {}. The other one is better."
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class PairingOptions(StrategyOptions):
    """Settings of a campaign's pairs: which shapes are compared, and which strategy chooses the pairs. Gold
    and training pairs are added to `pairs`.
    """

    strategy: str = knob(
        "random",
        f"Strategy that chooses the pairs: {', '.join(STRATEGIES)}, or one of a plugin.",
        TITLE,
        metavar="NAME",
    )
    seed: int = knob(0, "Random seed of pairs, order, sides and repeats.", TITLE, low=0, high=MAX_SEED)
    # The labels that come with the package use seeds 0 to about 3999; these are different shapes.
    first_seed: int = knob(
        10_000, "First latent seed; further shapes use the seeds after it.", TITLE, low=0, high=MAX_SEED
    )
    psi: float = _rare_title_knob(1.0, "Truncation psi.", metavar="0..2", low=0, high=2, flags=("--trunc",))
    level: float | None = _rare_title_knob(
        None, "Raw density sigma_raw at the surface.", shown="stored in the generator"
    )
    resolution: int = _rare_title_knob(
        128, "Grid points per axis at which the density is sampled.", metavar="POINTS", low=16, high=512
    )
    triangles: int = _rare_title_knob(
        30_000, "Approximate number of triangles per shape.", low=100, high=10**6
    )
    gold: int | None = _rare_title_knob(
        None,
        "Number of gold pairs, whose answer is known.",
        low=0,
        high=10**5,
        shown="one for 25 pairs, at least 4",
    )
    training: int = _rare_title_knob(3, "Number of explained examples at the start.", low=0, high=100)
    rewards: tuple[str, ...] = ()  # reward files of the ensemble; none: the two bundled rewards
    single: str | None = knob(
        None,
        "Show one shape at a time and ask for thumbs, or for scores from 0 to 5.",
        TITLE,
        choices=("thumbs", "scores"),
        shown="pairs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        STRATEGIES[self.strategy]  # raises for an unknown name
        # A strategy chooses pairs, and single shapes have none to choose.
        if self.single and self.strategy != "random":
            raise ValueError(
                f"--single cannot be combined with --strategy={self.strategy}. Remove one of the two, or use"
                " --strategy=random."
            )
        if self.level is not None and not np.isfinite(self.level):
            raise ValueError(
                f"--level: expected a finite number, got {self.level}. Remove it to use the value that is"
                " stored in the generator."
            )
        if self.first_seed + self.seeds > MAX_SEED:
            raise ValueError(
                f"--first-seed: the campaign needs {self.seeds} seeds up to {MAX_SEED}, got"
                f" {self.first_seed}. Use a smaller one."
            )
        # Seeds that are reserved for evaluation must not train a reward.
        refuse_held_out(
            range(self.first_seed, self.first_seed + self.seeds),
            f"--first-seed={self.first_seed}, {self.seeds} seeds",
        )

    @property
    def gold_pairs(self) -> int:
        """Number of gold pairs."""
        # -(-a // b) rounds up.
        return max(_LEAST_GOLD, -(-self.pairs // _GOLD_EVERY)) if self.gold is None else self.gold

    @property
    def compared(self) -> int:
        """Number of different shapes that the pairs compare."""
        return self.pairs if self.single else STRATEGIES[self.strategy].items_for(self)

    @property
    def seeds(self) -> int:
        """Number of seeds that the campaign uses: compared shapes, gold pairs, training pairs."""
        return self.compared + self.gold_pairs + self.training


@dataclass(frozen=True)
class Plan:
    """The pairs of a campaign in order, and a report of how they were chosen (JSON values)."""

    pairs: list[PlannedPair]  # in the order in which they are prepared and shown, approximately
    report: dict  # options, and the facts of the strategy


def plan(
    options: PairingOptions,
    generator: "LoadedGenerator",
    results: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
) -> Plan:
    """Plan the pairs of a campaign.

    Args:
        options: of the campaign.
        generator: whose shapes are compared.
        results: preferences of an earlier campaign, for strategies that read answers.
        ensemble: for strategies that read rewards.
    """
    from eg3d_rlhf.generators import check_seeds

    # The stored plan contains the number, not "the generator's level".
    options = options if options.level is not None else replace(options, level=generator.generator.level)
    results = results if STRATEGIES[options.strategy].reads_answers else ()
    # With results, the strategy chooses among the seeds of the earlier campaign, which were checked then.
    if not results:
        last = options.first_seed + options.seeds - 1
        check_seeds(
            generator.generator,
            last,
            f"--first-seed={options.first_seed}, {options.seeds} seeds with gold and training",
        )
    rng = np.random.default_rng(options.seed)
    make_shape = shape_factory(options, generator)
    report = {**asdict(options), "rewards": list(options.rewards)}
    seeds: Sequence[Sequence[int]]
    if options.single:
        rng.permutation(2 * options.pairs)  # version 0.1 drew pairs first; its random numbers follow
        seeds = [(seed, seed) for seed in (rng.permutation(options.pairs) + options.first_seed).tolist()]
    else:
        seeds, more = _chosen(options, generator, results, ensemble, rng)
        report |= more
    pairs = [PlannedPair(first=make_shape(a), second=make_shape(b)) for a, b in seeds]
    taken = {seed for pair in seeds for seed in pair}
    # Gold and training pairs use the next seeds that no pair uses, so that no annotator sees a shape both
    # damaged and undamaged outside them.
    unused = (seed for seed in range(options.first_seed + options.compared, MAX_SEED) if seed not in taken)
    known = [
        make_shape(seed)
        for seed, _ in zip(unused, range(options.gold_pairs + options.training), strict=False)
    ]
    known_pairs = damaged_singles if options.single else known_answers
    gold = known_pairs(known[: options.gold_pairs], Kind.GOLD, rng)
    training = known_pairs(known[options.gold_pairs :], Kind.TRAINING, rng)
    # Training comes first, because annotators learn the task from it.
    return Plan(training + interleave(pairs, gold), report)


def _chosen(
    options: PairingOptions,
    generator: "LoadedGenerator",
    results: Sequence[Preference],
    ensemble: Ensemble | None,
    rng: np.random.Generator,
) -> tuple[list[list[int]], dict]:
    """Choose pairs of seeds. Returns them and the report of the strategy."""
    for result in results:
        if result.generator not in (None, generator.hash) or result.psi not in (None, options.psi):
            got = f"{str(result.generator)[:12]} and psi {result.psi}"
            raise ValueError(
                f"plan: expected results of this generator and psi, got {got}. Use the same --network and"
                " --trunc as for those results."
            )
    # A later round compares the seeds of the earlier rounds. Strategies work with their positions in this
    # list.
    seeds: Sequence[int] = sorted({seed for result in results for seed in (result.winner, result.loser)})
    seeds = seeds or range(options.first_seed, options.first_seed + options.compared)
    position = {seed: index for index, seed in enumerate(seeds)} if results else {}
    scores = None
    if ensemble is not None:
        score = ensemble.score
        scores = replace(ensemble, score=lambda indices: score([seeds[index] for index in indices]))
    check_rewards(options.strategy, 0 if ensemble is None else ensemble.size)
    chosen = STRATEGIES[options.strategy].plan(
        # Seeds have no prompt and no generator that would restrict which pairs are possible.
        Items(members=[Item()] * len(seeds), unlimited=True, ensemble=scores),
        [replace(r, winner=position[r.winner], loser=position[r.loser]) for r in results],
        rng,
        options,
    )
    pairs = [[seeds[a], seeds[b]] for a, b in chosen.pairs]
    return pairs, report_with_names(chosen.report, lambda a, b: {"seeds": [seeds[a], seeds[b]]})


def report_with_names(report: Mapping, name: Callable[[int, int], Mapping]) -> dict:
    """Return a strategy's report in which names of the items replace their positions in the entries of "why".

    Args:
        name: returns the names of two items as JSON values.
    """
    named = dict(report)
    if "why" in report:
        named["why"] = [
            {**name(*entry["pair"]), **{key: value for key, value in entry.items() if key != "pair"}}
            for entry in report["why"]
        ]
    return named


def shape_factory(options: PairingOptions, generator: "LoadedGenerator") -> Callable[[int], Shape]:
    """Return a function from a seed to its shape under these options."""
    # An empty source means the bundled generator, whose path differs from installation to installation.
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
    """Pair each shape with a copy of itself that was damaged deliberately. The kinds of damage take turns,
    and the order of the two shapes is random.
    """
    pairs = []
    for number, shape in enumerate(shapes):
        name, seen = list(damages.items())[number % len(damages)]
        # Everything but the damage is equal, so only the damage can give the answer.
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


def damaged_singles(
    shapes: Sequence[Shape], kind: Kind, rng: np.random.Generator, damages: Mapping[str, str] = DAMAGES
) -> list[PlannedPair]:
    """Return each shape alone, damaged deliberately; see `known_answers`."""
    pairs = []
    # known_answers draws a side here, too, so the random numbers are the same as for pairs.
    for pair in known_answers(shapes, kind, rng, damages):
        damaged = pair.first if pair.first.degradation else pair.second
        explanation = SINGLE_EXPLANATION.format(damages[damaged.degradation]) if kind is Kind.TRAINING else ""
        pairs.append(replace(pair, first=damaged, second=damaged, expected="second", explanation=explanation))
    return pairs


def interleave(pairs: Sequence[PlannedPair], gold: Sequence[PlannedPair]) -> list[PlannedPair]:
    """Insert gold pairs at even distances between the others, none before the first."""
    out = []
    for number, pair in enumerate(pairs, 1):
        out.append(pair)
        # Integer division distributes the gold pairs without rounding errors: number * G // N of them stand
        # before or at the pair of that number.
        out += gold[(number - 1) * len(gold) // len(pairs) : number * len(gold) // len(pairs)]
    return out


def reward_ensemble(pairing: PairingOptions, generator: "LoadedGenerator") -> Ensemble:
    """Load the ensemble of the given reward files, each of which holds one reward or several. Without files
    it consists of the two bundled rewards.

    Raises: ValueError if there are fewer members than the strategy needs.
    """
    import torch

    from eg3d_rlhf.rewards.cache import observe_seeds
    from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward

    members: list[Reward] = []
    described = []
    # The two bundled rewards were trained independently on the same labels, so their disagreement is
    # informative.
    for path in map(Path, pairing.rewards or (bundled.REWARD, bundled.WATCH)):
        reward = load_reward(path)
        check_reward(reward, generator.generator, f"--strategy={pairing.strategy}: {path.name}")
        # An ensemble file counts as several members.
        parts = reward.members()
        members += parts
        described.append({"file": path.name, "sha256": file_hash(path), "members": len(parts)})
    # Members that share an observation share its computation.
    sources = {
        m.observation: observe_seeds(generator.generator, m.observation, psi=pairing.psi) for m in members
    }

    check_rewards(pairing.strategy, len(members))

    @torch.no_grad()
    def score(seeds: Sequence[int]) -> Scored:
        """Score seeds: scores [M members, N], in units of logits, and embeddings [N, sum of widths]."""
        observed = {observation: observe(seeds) for observation, observe in sources.items()}
        embeddings = [m.network.embed(observed[m.observation]) for m in members]
        # Dividing by its temperature turns each member's score into a calibrated logit.
        scores = [
            m.network.score_embedding(e) / m.temperature for m, e in zip(members, embeddings, strict=True)
        ]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(embeddings, dim=1).double().numpy())

    return Ensemble(score, len(members), described)
