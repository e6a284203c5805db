"""Which pairs of shapes a campaign shows: drawn at random, chosen by an ensemble's doubts, or the rounds of a tournament.

Everything is decided by the options and the generator; equal ones give equal plans. The pairs whose answer is known lie between the others:
the training round first, a gold pair after every so many.

Letters: P pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from eg3d_rlhf import bundled
from eg3d_rlhf.field import LEVEL
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.label import active, tournament
from eg3d_rlhf.label.damage import DAMAGES
from eg3d_rlhf.label.entities import Kind, PlannedPair, Shape
from eg3d_rlhf.preferences.annotator import disjoint_pairs
from eg3d_rlhf.preferences.labels import MAX_SEED, Preference
from eg3d_rlhf.seeds import refuse_held_out

STRATEGIES = ("random", "active", "tournament")
_GOLD_EVERY, _LEAST_GOLD = 25, 4  # one gold pair for so many others, and at least so many
EXPLANATION = "One of the two was broken on purpose: {}. The other one is better."


@dataclass(frozen=True, kw_only=True)
class PairingOptions:
    """What is compared, and how the pairs are found."""

    pairs: int = 1000  # P, gold and training aside; at most so many in a later round of a tournament
    strategy: str = "random"  # 'random', 'active' or 'tournament'
    seed: int = 0  # decides every draw
    first_seed: int = 10_000  # shapes are seeds from here on; the bundled labels are about 0..3999
    psi: float = 1.0  # truncation
    level: float = LEVEL  # raw density of the surface
    resolution: int = 128  # grid points per axis, 16..512
    triangles: int = 30_000  # per shape, about
    gold: int | None = None  # pairs with a known answer among the others; None: one for 25, at least 4
    training: int = 3  # explained examples at the start
    rewards: tuple[str, ...] = ()  # active: reward files of the ensemble; none: the bundled two
    pool: float = 2.0  # active: seeds looked at for each one used, 2..100
    diversity: float = 0.5  # active: 0 (doubt alone) .. 1 (spread alone)
    rounds: int = 4  # tournament: pairs that each shape is in; the last round is cut where the number of pairs asks for it

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"PairingOptions: expected a strategy of {', '.join(STRATEGIES)}, got {self.strategy!r}. Choose one of them.")
        ranges = {
            "pairs": (1, 10**6), "seed": (0, MAX_SEED), "first_seed": (0, MAX_SEED), "psi": (0, 2), "resolution": (16, 512),
            "triangles": (100, 10**6), "training": (0, 100), "pool": (2, 100), "diversity": (0, 1), "rounds": (1, 1000),
        }
        if self.gold is not None:
            ranges["gold"] = (0, 10**5)
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"PairingOptions: expected {name} from {low} to {high}, got {getattr(self, name)}. Correct it.")
        if not np.isfinite(self.level):
            raise ValueError(f"PairingOptions: expected a finite level, got {self.level}. Use {LEVEL:g}.")
        if self.first_seed + self.seeds > MAX_SEED:
            raise ValueError(f"PairingOptions: expected seeds up to {MAX_SEED}, got first_seed={self.first_seed}. Use a smaller one.")
        refuse_held_out(range(self.first_seed, self.first_seed + self.seeds), f"--first-seed={self.first_seed}, {self.seeds} seeds")

    @property
    def gold_pairs(self) -> int:
        """How many gold pairs there are."""
        return max(_LEAST_GOLD, -(-self.pairs // _GOLD_EVERY)) if self.gold is None else self.gold

    @property
    def compared(self) -> int:
        """Seeds that are compared or, by the active strategy, looked at."""
        if self.strategy == "active":
            return round(2 * self.pairs * self.pool)
        return 2 * (-(-self.pairs // self.rounds)) if self.strategy == "tournament" else 2 * self.pairs

    @property
    def seeds(self) -> int:
        """Seeds in all; the last ones are those of gold and training pairs."""
        return self.compared + self.gold_pairs + self.training


@dataclass(frozen=True)
class Plan:
    """The pairs of a campaign in order, and how they came about (JSON values)."""

    pairs: list[PlannedPair]
    report: dict


def plan(
    options: PairingOptions, generator: LoadedGenerator, results: Sequence[Preference] = (), ensemble: active.Ensemble | None = None,
    tell: active.Tell | None = None,
) -> Plan:
    """The pairs of a campaign.

    Args: results: of a tournament's earlier rounds, for the next one; ensemble: the rewards of the active strategy; tell: hears how many
        seeds they have judged.
    Raises: ValueError, FileNotFoundError.
    """
    if results and options.strategy != "tournament":
        raise ValueError(f"plan: expected earlier results for a tournament only, got strategy {options.strategy!r}. Use 'tournament'.")
    report = {**asdict(options), "rewards": list(options.rewards)}
    rng = np.random.default_rng(options.seed)
    draw = shape_of(options, generator)
    if options.strategy == "active":
        if ensemble is None:
            raise ValueError("plan: expected an ensemble of rewards for the active strategy, got none. Hand one in.")
        seeds, more = _active(options, ensemble, rng, tell)
        report |= more
    elif results:
        _check_origin(results, generator, options)
        seeds = tournament.swiss_round(results, options.pairs, rng)
    else:
        table = _first_rounds(options, rng) if options.strategy == "tournament" else disjoint_pairs(options.pairs, rng)
        seeds = (table + options.first_seed).tolist()
    pairs = [PlannedPair(first=draw(a), second=draw(b)) for a, b in seeds]
    taken = {seed for pair in seeds for seed in pair}
    unused = (seed for seed in range(options.first_seed + options.compared, MAX_SEED) if seed not in taken)
    known = [draw(seed) for seed, _ in zip(unused, range(options.gold_pairs + options.training), strict=False)]
    gold = known_answers(known[: options.gold_pairs], Kind.GOLD, rng)
    training = known_answers(known[options.gold_pairs :], Kind.TRAINING, rng)
    return Plan(training + spread(pairs, gold), report)


def shape_of(options: PairingOptions, generator: LoadedGenerator) -> Callable[[int], Shape]:
    """The shape of a seed, as the options draw it; the bundled generator is known by its place, wherever that is."""
    source = "" if generator.path == bundled.GENERATOR else str(generator.path.resolve())
    return lambda seed: Shape(
        generator=generator.hash, source=source, seed=int(seed), psi=float(options.psi), level=float(options.level),
        resolution=options.resolution, triangles=options.triangles,
    )  # fmt: skip


def known_answers(shapes: Sequence[Shape], kind: Kind, rng: np.random.Generator) -> list[PlannedPair]:
    """Each shape against itself damaged on purpose; the kinds of damage take turns. Which of the two comes first is drawn.

    Args: kind: GOLD, or TRAINING, whose pairs are explained.
    """
    pairs = []
    for number, shape in enumerate(shapes):
        name, (_, seen) = list(DAMAGES.items())[number % len(DAMAGES)]
        sides = [shape, replace(shape, degradation=name)]
        swapped = bool(rng.integers(2))
        pairs.append(PlannedPair(
            first=sides[swapped], second=sides[not swapped], kind=kind, expected="second" if swapped else "first",
            explanation=EXPLANATION.format(seen) if kind is Kind.TRAINING else "",
        ))  # fmt: skip
    return pairs


def spread(pairs: Sequence[PlannedPair], gold: Sequence[PlannedPair]) -> list[PlannedPair]:
    """Gold pairs at even distances between the others, none before the first."""
    out = []
    for number, pair in enumerate(pairs, 1):
        out.append(pair)
        out += gold[(number - 1) * len(gold) // len(pairs) : number * len(gold) // len(pairs)]
    return out


def _first_rounds(options: PairingOptions, rng: np.random.Generator) -> np.ndarray:
    """The first P pairs [P, 2] of a round robin, round by round."""
    if options.compared <= options.rounds:
        least = options.rounds * (options.rounds // 2) + 1
        raise ValueError(f"plan: expected at least {least} pairs for {options.rounds} rounds, got {options.pairs}. Plan fewer rounds.")
    return tournament.round_robin(options.compared, options.rounds, rng).reshape(-1, 2)[: options.pairs]


def _active(
    options: PairingOptions, ensemble: active.Ensemble, rng: np.random.Generator, tell: active.Tell | None
) -> tuple[list[list[int]], dict]:
    """Pairs of seeds chosen by an ensemble, and for the report who chose, among what, and what sets the chosen pairs apart."""
    seeds = range(options.first_seed, options.first_seed + options.compared)
    judged = active.judge(ensemble, seeds, tell)
    table = active.candidates(len(seeds), rng)
    chosen = active.select(judged, table, options.pairs, options.diversity)
    doubt = active.disagreement(judged.scores, table)
    pairs = (chosen.pairs + options.first_seed).tolist()
    return pairs, {
        "rewards": ensemble.described, "candidates": len(table), "disagreement_candidates": float(doubt.mean()),
        "disagreement_chosen": float(chosen.disagreement.mean()), "why": [
            {"seeds": pair, "disagreement": round(float(d), 5), "distance": round(float(r), 5) if np.isfinite(r) else None}
            for pair, d, r in zip(pairs, chosen.disagreement, chosen.distance, strict=True)
        ],
    }  # fmt: skip


def _check_origin(results: Sequence[Preference], generator: LoadedGenerator, options: PairingOptions) -> None:
    for result in results:
        if result.generator not in (None, generator.hash) or result.psi not in (None, options.psi):
            raise ValueError(
                f"plan: expected results for generator {generator.hash[:12]} at psi {options.psi:g}, got {str(result.generator)[:12]} "
                f"at psi {result.psi}. Plan the next round with the network and psi of the one before."
            )
