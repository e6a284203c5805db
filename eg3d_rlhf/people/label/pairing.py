"""Planning of the pairs of a labelling campaign whose shapes are samples of a generator.

A strategy of `STRATEGIES` chooses the pairs. Gold pairs and practice pairs, whose correct answer is known,
are added. Equal options and generators give equal plans.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.seeds import reject_held_out_seeds
from eg3d_rlhf.people.label.entities import DAMAGES, Kind, PlannedPair, Shape
from eg3d_rlhf.preferences.labels import MAX_SEED, Preference
from eg3d_rlhf.preferences.pair_strategies import (
    FIRST_LABELS,
    LEARNT_BATCH,
    RANDOM_EVERY,
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
    from eg3d_rlhf.generators import Generator, LoadedGenerator

# There is one gold pair for every 25 other pairs, and at least 4 gold pairs. With fewer, an annotator who
# answers at random would often pass all of them.
_GOLD_EVERY = 25
_MIN_GOLD_PAIRS = 4
SINGLE_EXPLANATION = "This one was broken on purpose: {}. It is not a good shape."
EXPLANATION = "One of the two was broken on purpose: {}. The other one is better."
_rare_title_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclass(frozen=True, kw_only=True)
class PairingOptions(StrategyOptions):
    """Options of the pairs of a campaign: the shapes that are compared, and the strategy that chooses the
    pairs.

    Gold pairs and practice pairs are added to the number `pairs`.
    """

    strategy: str = knob(
        "random",
        f"Strategy that chooses the pairs: {', '.join(STRATEGIES)}, or the name of a plugin's strategy.",
        TITLE,
        metavar="NAME",
    )
    seed: int = knob(
        0,
        "Random seed of the campaign. It decides the pairs, their order, the sides of shapes, and repeats.",
        TITLE,
        low=0,
        high=MAX_SEED,
    )
    # The labels in the package use the seeds 0 to about 3999, so the default gives other shapes.
    first_seed: int = knob(
        10_000,
        "Seed of the first shape's latent. Further shapes use the seeds after it.",
        TITLE,
        low=0,
        high=MAX_SEED,
    )
    psi: float = _rare_title_knob(
        1.0,
        "Truncation psi of the latents. With 1, latents are not truncated.",
        metavar="0..2",
        low=0,
        high=2,
        flags=("--trunc",),
    )
    level: float | None = _rare_title_knob(
        None, "Raw density sigma_raw at the surface of a shape.", shown="stored in the generator"
    )
    resolution: int = _rare_title_knob(
        128,
        "Number of grid points per axis at which the density is sampled.",
        metavar="POINTS",
        low=16,
        high=512,
    )
    triangles: int = _rare_title_knob(
        30_000, "Approximate number of triangles per shape.", low=100, high=10**6
    )
    gold: int | None = _rare_title_knob(
        None,
        "Number of gold pairs, which check the attention of annotators because their correct answer is"
        " known.",
        low=0,
        high=10**5,
        shown="one per 25 pairs, at least 4",
    )
    training: int = _rare_title_knob(
        3, "Number of practice pairs at the start, whose correct answer is explained.", low=0, high=100
    )
    # Reward files of the ensemble. If there are none: --strategy=active learns from the answers, and close
    # uses the bundled reward.
    rewards: tuple[str, ...] = ()
    single: str | None = knob(
        None,
        "Show one shape at a time instead of pairs, and ask for a rating: thumbs (up or down) or scores (0 to"
        " 5).",
        TITLE,
        choices=("thumbs", "scores"),
        shown="pairs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        STRATEGIES[self.strategy]  # this access raises an error for an unknown name
        # A strategy chooses pairs, and a campaign of single shapes has no pairs.
        if self.single and self.strategy != "random":
            raise ValueError(
                f"--single cannot be combined with --strategy={self.strategy}, which chooses pairs. Remove"
                " one of the two flags, or use --strategy=random."
            )
        if self.level is not None and not np.isfinite(self.level):
            raise ValueError(
                f"--level={self.level} is not a finite number. Pass a finite number, or remove --level to"
                " use the value that is stored in the generator."
            )
        if self.first_seed + self.seed_count > MAX_SEED:
            raise ValueError(
                f"--first-seed={self.first_seed}: the campaign needs {self.seed_count} seeds from this one"
                f" on, but the largest seed is {MAX_SEED}. Use a smaller --first-seed."
            )
        # Seeds that are reserved for evaluation must not train a reward.
        reject_held_out_seeds(
            range(self.first_seed, self.first_seed + self.seed_count),
            f"--first-seed={self.first_seed}, {self.seed_count} seeds",
        )

    @property
    def gold_pair_count(self) -> int:
        """Return the number of gold pairs."""
        if self.gold is not None:
            return self.gold
        # -(-a // b) is a / b, rounded up
        return max(_MIN_GOLD_PAIRS, -(-self.pairs // _GOLD_EVERY))

    @property
    def compared_shape_count(self) -> int:
        """Return the number of different shapes that the pairs compare."""
        return self.pairs if self.single else STRATEGIES[self.strategy].items_for(self)

    @property
    def learns(self) -> bool:
        """Return True if a reward that is fitted to the answers chooses pairs of a generator's samples."""
        return not self.single and not self.rewards and STRATEGIES[self.strategy].learns

    def check_learning(self) -> None:
        """Check the options of a campaign that learns from its answers.

        Raises:
            ValueError: there are too few pairs, or an option has no effect in such a campaign.
        """
        first_count = FIRST_LABELS + LEARNT_BATCH
        if self.pairs <= first_count:
            raise ValueError(
                f"--pairs={self.pairs}: without --reward, --strategy={self.strategy} plans the first"
                f" {first_count} pairs at random. Plan more pairs, or use --strategy=random."
            )
        for name in ("doubtful", "diversity"):
            if getattr(self, name) != PairingOptions.__dataclass_fields__[name].default:
                raise ValueError(
                    f"--set {name}={getattr(self, name)} has no effect, because --strategy={self.strategy}"
                    f" without --reward learns from the answers: every {RANDOM_EVERY}th pair is random, and"
                    " the pairs of a batch do not repeat each other. Remove it, or pass rewards with"
                    " --reward=FILE."
                )

    @property
    def seed_count(self) -> int:
        """Return the number of seeds that the campaign uses, including those of gold and practice pairs."""
        return self.compared_shape_count + self.gold_pair_count + self.training


@dataclass(frozen=True)
class Plan:
    """Pairs of a campaign, and a report of their choice."""

    # in the order of their preparation, which is roughly the order in which they are shown
    pairs: list[PlannedPair]
    report: dict  # options, and facts that the strategy reports, in JSON types


def plan(
    pairing: PairingOptions,
    generator: "LoadedGenerator",
    earlier_preferences: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
) -> Plan:
    """Plan the pairs of a campaign.

    Args:
        pairing: options of the pairs.
        generator: generator whose shapes are compared.
        earlier_preferences: preferences of an earlier campaign, for strategies that use answers. Other
            strategies ignore them.
        ensemble: rewards, for strategies that use scores.

    Raises:
        ValueError: the generator does not accept a seed, or the earlier preferences belong to another
            generator.
    """
    from eg3d_rlhf.generators import check_seeds

    # The level of the generator is inserted, so that the stored plan contains the number.
    pairing = pairing if pairing.level is not None else replace(pairing, level=generator.generator.level)
    earlier_preferences = earlier_preferences if STRATEGIES[pairing.strategy].reads_answers else ()
    # With earlier preferences, the strategy chooses among the seeds of the earlier campaign, which were
    # checked when that campaign was planned.
    if not earlier_preferences:
        last_seed = pairing.first_seed + pairing.seed_count - 1
        check_seeds(
            generator.generator,
            last_seed,
            f"--first-seed={pairing.first_seed}, {pairing.seed_count} seeds with gold and practice pairs",
        )
    rng = np.random.default_rng(pairing.seed)
    make_shape = shape_factory(pairing, generator)
    plan_report = {**asdict(pairing), "rewards": list(pairing.rewards)}
    seed_pairs: Sequence[Sequence[int]]
    if pairing.single:
        # Version 0.1 drew a permutation for pairs first. It is drawn and ignored, so that the next random
        # numbers are the same.
        rng.permutation(2 * pairing.pairs)
        seed_pairs = [(seed, seed) for seed in (rng.permutation(pairing.pairs) + pairing.first_seed).tolist()]
    else:
        seed_pairs, strategy_report = _chosen(pairing, generator, earlier_preferences, ensemble, rng)
        plan_report |= strategy_report
    pairs = [
        PlannedPair(first=make_shape(first_seed), second=make_shape(second_seed))
        for first_seed, second_seed in seed_pairs
    ]
    used_seeds = set().union(*seed_pairs)
    # Gold and practice pairs use the next seeds that no pair uses, so that their undamaged shapes occur
    # nowhere else.
    unused_seeds = (
        seed
        for seed in range(pairing.first_seed + pairing.compared_shape_count, MAX_SEED)
        if seed not in used_seeds
    )
    known_count = pairing.gold_pair_count + pairing.training
    known_shapes = [make_shape(seed) for seed in itertools.islice(unused_seeds, known_count)]
    make_known_pairs = damaged_singles if pairing.single else known_answers
    gold_pairs = make_known_pairs(known_shapes[: pairing.gold_pair_count], Kind.GOLD, rng)
    practice_pairs = make_known_pairs(known_shapes[pairing.gold_pair_count :], Kind.TRAINING, rng)
    # Practice pairs come first, because annotators learn the task from them.
    return Plan(practice_pairs + interleave(pairs, gold_pairs), plan_report)


def _chosen(
    pairing: PairingOptions,
    generator: "LoadedGenerator",
    earlier_preferences: Sequence[Preference],
    ensemble: Ensemble | None,
    rng: np.random.Generator,
) -> tuple[list[list[int]], dict]:
    """Choose pairs of seeds with the strategy `pairing.strategy`.

    Returns:
        Pairs of seeds, and the report of the strategy in JSON types.

    Raises:
        ValueError: the earlier preferences belong to another generator, or the ensemble has too few rewards.
    """
    for earlier_preference in earlier_preferences:
        if earlier_preference.generator not in (None, generator.hash) or earlier_preference.psi not in (
            None,
            pairing.psi,
        ):
            raise ValueError(
                "plan: the preferences of the earlier campaign belong to generator"
                f" {str(earlier_preference.generator)[:12]} and psi {earlier_preference.psi}, but this"
                f" campaign uses generator {generator.hash[:12]} and psi {pairing.psi}. Use the same"
                " --network and --trunc as for the earlier campaign."
            )
    # A later round of a tournament compares the seeds of the earlier rounds. A strategy does not use seeds,
    # but their positions in this list.
    seeds: Sequence[int] = sorted(
        {
            seed
            for earlier_preference in earlier_preferences
            for seed in (earlier_preference.winner, earlier_preference.loser)
        }
    )
    seeds = seeds or range(pairing.first_seed, pairing.first_seed + pairing.compared_shape_count)
    position_by_seed = {seed: index for index, seed in enumerate(seeds)} if earlier_preferences else {}
    seed_ensemble = None
    if ensemble is not None:
        score_seeds = ensemble.score
        seed_ensemble = replace(
            ensemble, score=lambda indices: score_seeds([seeds[index] for index in indices])
        )
    if pairing.learns and ensemble is None:
        return learning_start(pairing, generator), {"learns": True}
    check_rewards(pairing.strategy, 0 if ensemble is None else ensemble.size)
    strategy_plan = STRATEGIES[pairing.strategy].plan(
        # Any two seeds may form a pair: there is one generator, and no prompt.
        Items(members=[Item()] * len(seeds), unlimited=True, ensemble=seed_ensemble),
        [
            replace(
                earlier_preference,
                winner=position_by_seed[earlier_preference.winner],
                loser=position_by_seed[earlier_preference.loser],
            )
            for earlier_preference in earlier_preferences
        ],
        rng,
        pairing,
    )
    seed_pairs = [
        [seeds[first_index], seeds[second_index]] for first_index, second_index in strategy_plan.pairs
    ]
    return seed_pairs, report_with_names(strategy_plan.report, lambda a, b: {"seeds": [seeds[a], seeds[b]]})


def learning_start(pairing: PairingOptions, generator: "LoadedGenerator") -> list[list[int]]:
    """Return the first pairs of a campaign that learns from its answers, which are random.

    They contain one batch more than the labels that the reward needs, so that annotators have pairs while
    the first batch is chosen.

    Raises:
        ValueError: the generator has no latents.
    """
    from eg3d_rlhf.generators import shape_count

    if shape_count(generator.generator) is not None:
        raise ValueError(
            f"--network: {generator.path.name} has a finite number of shapes and no latents, from which"
            f" --strategy={pairing.strategy} could learn. Pass rewards with --reward=FILE, or use"
            " --strategy=random."
        )
    return random_seed_pairs(pairing)[: FIRST_LABELS + LEARNT_BATCH]


def random_seed_pairs(pairing: PairingOptions) -> list[list[int]]:
    """Return random pairs of seeds, in the order in which a campaign that learns from its answers uses them.

    Their seeds are reserved. The seeds that a reward has left over would not be a random sample, so they
    could not measure the accuracy.
    """
    rng = np.random.default_rng([pairing.seed, 5])
    seeds = rng.permutation(2 * pairing.pairs) + pairing.first_seed
    seed_pairs: list[list[int]] = seeds.reshape(-1, 2).tolist()
    return seed_pairs


def report_with_names(strategy_report: Mapping, names_of: Callable[[int, int], Mapping]) -> dict:
    """Return the report of a strategy, with names of the items in place of their numbers.

    Only the list "why" of the report, which explains the choice of each pair, contains numbers of items.

    Args:
        strategy_report: report of the strategy.
        names_of: function (number, number) -> names of the two items, as JSON values.
    """
    named_report = dict(strategy_report)
    if "why" in strategy_report:
        named_report["why"] = [
            {
                **names_of(*pair_report["pair"]),
                **{key: value for key, value in pair_report.items() if key != "pair"},
            }
            for pair_report in strategy_report["why"]
        ]
    return named_report


def check_surfaces(
    generator: "Generator", first_seed: int, psi: float, level: float | None, remedy: str
) -> str | None:
    """Look at the density of eight samples before a campaign or a study on a generator is planned.

    Args:
        generator: generator whose shapes are shown.
        first_seed: seed of the first sample.
        psi: truncation of the samples.
        level: raw density at the surface; None: the level of the generator.
        remedy: start of the remedy, see `DensityCheck.problem`.

    Returns: a warning if some samples have no surface, else None.

    Raises: ValueError if no sample has a surface, so that no shape could be shown.
    """
    from eg3d_rlhf.generators.density_samples import check_density, default_seeds, require_surface

    return require_surface(check_density(generator, level, default_seeds(generator, first_seed), psi), remedy)


def shape_factory(pairing: PairingOptions, generator: "LoadedGenerator") -> Callable[[int], Shape]:
    """Return a function (seed) -> `Shape` of the generator with these options."""
    # An empty source means the bundled generator, whose path differs from installation to installation.
    source_path = "" if generator.path == bundled.GENERATOR else str(generator.path.resolve())
    surface_level = generator.generator.level if pairing.level is None else pairing.level
    return lambda seed: Shape(
        generator=generator.hash,
        source=source_path,
        seed=int(seed),
        psi=float(pairing.psi),
        level=float(surface_level),
        resolution=pairing.resolution,
        triangles=pairing.triangles,
    )


def known_answers(
    shapes: Sequence[Shape], pair_kind: Kind, rng: np.random.Generator, damages: Mapping[str, str] = DAMAGES
) -> list[PlannedPair]:
    """Make pairs whose correct answer is known: each shape, and a copy of it that is damaged deliberately.

    The kinds of damage follow one after another, and the order of the two shapes is random.

    Args:
        shapes: undamaged shapes.
        pair_kind: kind of the pairs, GOLD or TRAINING.
        rng: random number generator, from which one number per pair is drawn.
        damages: kind of damage -> its description for annotators.
    """
    pairs = []
    for pair_number, shape in enumerate(shapes):
        damage_kind, description = list(damages.items())[pair_number % len(damages)]
        # The shapes are equal except for the damage, so the damage alone decides which shape is better.
        two_shapes = [shape, replace(shape, degradation=damage_kind)]
        is_damaged_first = bool(rng.integers(2))
        pairs.append(
            PlannedPair(
                first=two_shapes[is_damaged_first],  # False and True are the indices 0 and 1
                second=two_shapes[not is_damaged_first],
                kind=pair_kind,
                expected="second" if is_damaged_first else "first",
                explanation=EXPLANATION.format(description) if pair_kind is Kind.TRAINING else "",
            )
        )
    return pairs


def damaged_singles(
    shapes: Sequence[Shape], pair_kind: Kind, rng: np.random.Generator, damages: Mapping[str, str] = DAMAGES
) -> list[PlannedPair]:
    """Make pairs for a campaign of single shapes: each contains a deliberately damaged shape twice.

    The correct answer is thumbs down. See `known_answers` for the arguments.
    """
    single_pairs = []
    # known_answers also draws the order of the two shapes, so the random numbers are the same as for pairs.
    for pair in known_answers(shapes, pair_kind, rng, damages):
        damaged_shape = pair.first if pair.first.degradation else pair.second
        explanation = (
            SINGLE_EXPLANATION.format(damages[damaged_shape.degradation])
            if pair_kind is Kind.TRAINING
            else ""
        )
        single_pairs.append(
            replace(
                pair, first=damaged_shape, second=damaged_shape, expected="second", explanation=explanation
            )
        )
    return single_pairs


def interleave(pairs: Sequence[PlannedPair], gold_pairs: Sequence[PlannedPair]) -> list[PlannedPair]:
    """Insert gold pairs at even distances between other pairs. The first pair is not a gold pair."""
    all_pairs = []
    for pair_number, pair in enumerate(pairs, 1):
        all_pairs.append(pair)
        # After the first `number` of N pairs, number * G // N of the G gold pairs have been inserted. Integer
        # division has no rounding errors, so every gold pair is inserted once.
        start_index = (pair_number - 1) * len(gold_pairs) // len(pairs)
        stop_index = pair_number * len(gold_pairs) // len(pairs)
        all_pairs += gold_pairs[start_index:stop_index]
    return all_pairs


def reward_ensemble(pairing: PairingOptions, generator: "LoadedGenerator") -> Ensemble:
    """Load an ensemble of rewards that scores the seeds of a generator.

    Args:
        pairing: options; `rewards` names the files, each of which contains one or several rewards. Without
            files, the ensemble consists of the two bundled rewards.
        generator: generator whose shapes are scored.

    Raises:
        ValueError: the strategy needs more rewards, or a reward does not fit the generator.
    """
    import torch

    from eg3d_rlhf.rewards.cache import observe_seeds
    from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
    from eg3d_rlhf.rewards.stated_accuracy import announce_reward

    members: list[Reward] = []
    file_descriptions = []
    # The two bundled rewards were trained independently on the same labels. A pair on which they disagree is
    # informative for a strategy.
    for reward_path in map(Path, pairing.rewards or (bundled.REWARD, bundled.HELDOUT_REWARD)):
        reward = load_reward(reward_path)
        check_reward(reward, generator.generator, f"--strategy={pairing.strategy}: {reward_path.name}")
        announce_reward(reward, f"--strategy={pairing.strategy}: {reward_path.name}")
        # A file of an ensemble contains several members.
        file_members = reward.members()
        members += file_members
        file_descriptions.append(
            {"file": reward_path.name, "sha256": file_hash(reward_path), "members": len(file_members)}
        )
    # An observation that several members use is computed only once.
    observe_functions = {
        member.observation: observe_seeds(generator.generator, member.observation, psi=pairing.psi)
        for member in members
    }

    check_rewards(pairing.strategy, len(members))

    @torch.no_grad()
    def score(seeds: Sequence[int]) -> Scored:
        """Return the scores [M, N] of N seeds by M members, in logits, and embeddings [N, sum of widths]."""
        observed = {observation: observe(seeds) for observation, observe in observe_functions.items()}
        embeddings = [member.network.embed(observed[member.observation]) for member in members]
        # Division by the temperature of a member turns its score into a calibrated logit.
        scores = [
            member.network.score_embedding(embedding) / member.temperature
            for member, embedding in zip(members, embeddings, strict=True)
        ]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(embeddings, dim=1).double().numpy())

    return Ensemble(score, len(members), file_descriptions)
