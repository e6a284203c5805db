"""Which pairs of shapes a campaign shows: drawn at random, chosen by an ensemble's doubts, or the rounds of a
tournament.

Equal options and generators give equal plans. A tournament's first rounds are drawn without knowing anything;
later ones are Swiss, where shapes of about equal standing meet, nobody twice. With fewer pairs than shapes,
the upper part of the table goes on, as in a knockout.

An ensemble's disagreement over a pair is the standard deviation, over the members, of the probability that
the first shape is better (Christiano et al. 2017, arXiv 1706.03741, 2.2.4), P = sigmoid((r_a - r_b) / T), T
the member's temperature. By itself that picks the same doubt over and over, so pairs are chosen one by one,
by disagreement and by their distance to the nearest pair already chosen in the space of the rewards'
embeddings (greedy max-min).

Letters: P pairs, S shapes or seeds, R rounds, K members, M entries of all embeddings, C candidate pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.people.label.entities import DAMAGES, Kind, PlannedPair, Shape
from eg3d_rlhf.preferences.labels import MAX_SEED, Preference
from training.config import check_knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator

STRATEGIES = ("random", "active", "tournament")
_TITLE = "Pairs"  # of the flags
_BATCH = 16  # seeds judged at once
_MATCHINGS = 4  # random pairings of all seeds that candidates come from
# one gold pair for so many others, and at least so many
_GOLD_EVERY = 25
_LEAST_GOLD = 4
BROKEN = "This one was broken on purpose: {}. It is not a good shape."
EXPLANATION = "One of the two was broken on purpose: {}. The other one is better."


@dataclass(frozen=True, kw_only=True)
class PairingOptions:
    """What is compared, and how the pairs are found."""

    # P, gold and training aside; at most so many in a later round
    pairs: int = knob(1000, "Pairs to label; with --single, shapes.", _TITLE, low=1, high=10**6)
    strategy: str = knob("random", "How pairs are found.", _TITLE, choices=STRATEGIES)
    seed: int = knob(0, "Decides pairs, order, sides, repeats.", _TITLE, low=0, high=MAX_SEED)
    # the bundled labels are about 0..3999
    first_seed: int = knob(10_000, "Shapes are seeds from here on.", _TITLE, low=0, high=MAX_SEED)
    psi: float = knob(
        1.0, "Truncation.", _TITLE, metavar="0..2", low=0, high=2, flags=("--trunc",), rare=True
    )
    level: float | None = knob(
        None, "Raw density of the surface.", _TITLE, shown="the generator's own", rare=True
    )
    resolution: int = knob(
        128, "Grid points per axis.", _TITLE, metavar="POINTS", low=16, high=512, rare=True
    )
    triangles: int = knob(30_000, "Per shape, about.", _TITLE, low=100, high=10**6, rare=True)
    gold: int | None = knob(
        None,
        "Pairs with a known answer.",
        _TITLE,
        low=0,
        high=10**5,
        shown="one for 25, at least 4",
        rare=True,
    )
    training: int = knob(3, "Explained examples at the start.", _TITLE, low=0, high=100, rare=True)
    rewards: tuple[str, ...] = ()  # active: reward files of the ensemble; none: the bundled two
    pool: float = knob(2.0, "Active: seeds looked at for each one used.", _TITLE, low=2, high=100, rare=True)
    doubtful: float = knob(
        1.0,
        "Active: share chosen by doubt; the others are random.",
        _TITLE,
        metavar="0..1",
        above=0,
        high=1,
        rare=True,
    )
    diversity: float = knob(
        0.5, "Active: 0 is doubt alone, 1 spread alone.", _TITLE, metavar="0..1", low=0, high=1, rare=True
    )
    single: str | None = knob(
        None,
        "Show one shape at a time, judged by thumbs, or by scores from 0 to 5.",
        _TITLE,
        choices=("thumbs", "scores"),
        shown="pairs",
    )
    # the last is cut
    rounds: int = knob(4, "Tournament: pairs that each shape is in.", _TITLE, low=1, high=1000, rare=True)

    def __post_init__(self) -> None:
        check_knobs(self)
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
        if self.single:
            return self.pairs
        if self.strategy == "active":
            return round(2 * self.pairs * self.pool)
        return 2 * (-(-self.pairs // self.rounds)) if self.strategy == "tournament" else 2 * self.pairs

    @property
    def seeds(self) -> int:
        return self.compared + self.gold_pairs + self.training


@dataclass(frozen=True)
class Judged:
    """What an ensemble makes of seeds."""

    scores: np.ndarray  # [K, S], in units of each member's temperature
    embeddings: np.ndarray  # [S, M]


@dataclass(frozen=True)
class Selection:
    """Pairs in the order in which they were chosen, and why."""

    pairs: np.ndarray  # [P, 2], indices of seeds
    disagreement: np.ndarray  # [P]
    distance: np.ndarray  # [P] to the nearest pair chosen before; infinite for the first


@dataclass(frozen=True)
class Ensemble:
    """Rewards on the shapes of one generator, by what they say alone; see `reward_ensemble`."""

    judge: Callable[[Sequence[int]], Judged]  # of a few seeds at a time
    size: int  # K
    described: list[dict]  # of every file of rewards, for the campaign's record

    def __post_init__(self):
        if self.size < 2:
            raise ValueError(
                f"active selection: expected at least 2 rewards, got {self.size}. Name another file as well."
            )


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
    """The pairs of a campaign."""
    from eg3d_rlhf.generators import check_seeds
    from eg3d_rlhf.preferences.annotator import blocks_of_pairs

    options = options if options.level is not None else replace(options, level=generator.generator.level)
    if not results:
        last = options.first_seed + options.seeds - 1
        check_seeds(
            generator.generator,
            last,
            f"--first-seed={options.first_seed}, {options.seeds} seeds with gold and training",
        )
    report = {**asdict(options), "rewards": list(options.rewards)}
    rng = np.random.default_rng(options.seed)
    draw = shape_of(options, generator)
    seeds: Sequence[Sequence[int]]
    if options.strategy == "active":
        assert ensemble is not None, "of the active strategy"
        seeds, more = _active(options, ensemble, rng)
        report |= more
    elif results:
        for result in results:
            if result.generator not in (None, generator.hash) or result.psi not in (None, options.psi):
                got = f"{str(result.generator)[:12]} and psi {result.psi}"
                raise ValueError(
                    f"plan: expected results of this generator and psi, got {got}. Plan the next round with"
                    " them."
                )
        seeds = swiss_round(results, options.pairs, rng)
    else:
        if options.strategy != "tournament":
            table = blocks_of_pairs(options.pairs, 2, rng)
        elif options.compared > options.rounds:  # the first pairs of a round robin, round by round
            table = round_robin(options.compared, options.rounds, rng).reshape(-1, 2)[: options.pairs]
        else:
            least = options.rounds * (options.rounds // 2) + 1
            raise ValueError(
                f"plan: expected at least {least} pairs for {options.rounds} rounds, got {options.pairs}."
                " Plan fewer rounds."
            )
        seeds = (table + options.first_seed).tolist()
    if options.single:
        seeds = [(int(seed), int(seed)) for seed in rng.permutation(options.pairs) + options.first_seed]
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


def _active(
    options: PairingOptions, ensemble: Ensemble, rng: np.random.Generator
) -> tuple[list[list[int]], dict]:
    """Pairs of seeds chosen by an ensemble, and for the report who chose, among what, and what sets the
    chosen pairs apart.
    """
    seeds = range(options.first_seed, options.first_seed + options.compared)
    judged = judge(ensemble, seeds)
    table = candidates(len(seeds), rng)
    count = max(1, round(options.pairs * options.doubtful))
    chosen = select(judged, table, count, options.diversity)
    doubt = disagreement(judged.scores, table)
    pairs = (chosen.pairs + options.first_seed).tolist()
    free = (
        rng.permutation(np.setdiff1d(np.arange(len(seeds)), chosen.pairs))
        if count < options.pairs
        else np.empty(0, dtype=np.int64)
    )
    others = (free[: 2 * (options.pairs - count)] + options.first_seed).reshape(-1, 2).tolist()
    mixed = [(pairs + others)[i] for i in rng.permutation(options.pairs)] if others else pairs
    return mixed, {
        "rewards": ensemble.described,
        "candidates": len(table),
        "disagreement_candidates": float(doubt.mean()),
        "disagreement_chosen": float(chosen.disagreement.mean()),
        "why": [
            {
                "seeds": pair,
                "disagreement": round(float(d), 5),
                "distance": round(float(r), 5) if np.isfinite(r) else None,
            }
            for pair, d, r in zip(pairs, chosen.disagreement, chosen.distance, strict=True)
        ],
    }


def round_robin(shapes: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """The first rounds of a tournament in which everyone meets everyone (the circle method), over shapes in
    random order.

    One shape stays, the others move on by one place each round: no pair occurs twice, and any two rounds in a
    row connect all shapes.
    Returns: [R, S/2, 2], each round holding 0..S-1 once.
    """
    order = rng.permutation(shapes)
    moving = np.arange(1, shapes)
    table = []
    for _ in range(rounds):
        circle = np.concatenate([[0], moving])
        table.append(np.stack([circle[: shapes // 2], circle[::-1][: shapes // 2]], axis=1))
        moving = np.roll(moving, 1)
    return order[np.stack(table)]


def standings(results: Iterable[Preference], rng: np.random.Generator) -> list[int]:
    """Seeds from first to last: by points (a win 1, a tie 1/2), then by the points of those they met, then by
    lot.
    """
    points: dict[int, float] = defaultdict(float)
    opponents: dict[int, list[int]] = defaultdict(list)
    for result in results:
        points[result.winner] += 0.5 if result.tie else 1.0
        points[result.loser] += 0.5 if result.tie else 0.0
        opponents[result.winner].append(result.loser)
        opponents[result.loser].append(result.winner)
    seeds = sorted(points)
    lot = dict(zip(seeds, rng.permutation(len(seeds)).tolist(), strict=True))
    return sorted(
        seeds, key=lambda seed: (-points[seed], -sum(points[other] for other in opponents[seed]), lot[seed])
    )


def swiss_round(results: Sequence[Preference], pairs: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The next round: the first 2 * `pairs` of the standings, each with the nearest one that it has not met.

    Where that cannot be had for the last ones, two pairs swap partners; shapes meet again only where no swap
    helps.
    Returns: disjoint pairs of seeds, at most `pairs`, the upper end of the table first.
    """
    table = standings(results, rng)
    if len(table) < 2:
        raise ValueError(
            "swiss_round: expected the results of an earlier round, got none. Label the first round before."
        )
    met = {frozenset((result.winner, result.loser)) for result in results}
    waiting = table[: 2 * min(pairs, len(table) // 2)]
    pairs_made: list[tuple[int, int]] = []
    while waiting:
        first = waiting.pop(0)
        fresh = next((i for i, other in enumerate(waiting) if frozenset((first, other)) not in met), None)
        second = waiting.pop(0 if fresh is None else fresh)
        pairs_made += [(first, second)] if fresh is not None else _swapped(first, second, pairs_made, met)
    return pairs_made


def _swapped(
    first: int, second: int, pairs_made: list[tuple[int, int]], met: set[frozenset[int]]
) -> list[tuple[int, int]]:
    """Two that have met, with the partners of the nearest pair that has two others for them; that pair is
    taken out of `found`.
    """
    for i in range(len(pairs_made) - 1, -1, -1):
        a, b = pairs_made[i]
        for swap in ([(a, first), (b, second)], [(a, second), (b, first)]):
            if not any(frozenset(pair) in met for pair in swap):
                del pairs_made[i]
                return swap
    return [(first, second)]


def judge(ensemble: Ensemble, seeds: Sequence[int]) -> Judged:
    """Scores and embeddings of seeds, in batches."""
    parts = [ensemble.judge(seeds[start : start + _BATCH]) for start in range(0, len(seeds), _BATCH)]
    return Judged(
        np.concatenate([part.scores for part in parts], axis=1),
        np.concatenate([part.embeddings for part in parts]),
    )


def disagreement(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Standard deviation [C] over the members of P(first better) for pairs [C, 2], from scores [K, S].
    Swapping a pair changes nothing.
    """
    return expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).std(axis=0)


def pair_features(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Where pairs [C, 2] lie, whichever shape comes first: middle and distance of the standardised
    embeddings, [C, 2 M].
    """
    spread = embeddings.std(axis=0)
    standard = np.divide(
        embeddings - embeddings.mean(axis=0), spread, out=np.zeros_like(embeddings), where=spread > 0
    )
    a = standard[pairs[:, 0]]
    b = standard[pairs[:, 1]]
    return np.concatenate([(a + b) / 2, np.abs(a - b) / 2], axis=1) / np.sqrt(2 * embeddings.shape[1])


def candidates(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Candidate pairs [C, 2] of 0..S-1, ordered within the pair: several random pairings of all seeds,
    without repeats.
    """
    rows = [rng.permutation(seeds)[: seeds - seeds % 2].reshape(-1, 2) for _ in range(_MATCHINGS)]
    return np.unique(np.sort(np.concatenate(rows), axis=1), axis=0)


def select(judged: Judged, pairs: np.ndarray, count: int, diversity: float) -> Selection:
    """`count` of the candidate pairs [C, 2], no seed in two of them.

    Each step takes the pair with the greatest (1 - diversity) * disagreement + diversity * distance, both in
    shares of the greatest among the candidates left; distance is that to the nearest pair chosen so far, and
    counts from the second step on.
    Args: diversity 0 (disagreement alone) .. 1 (after the first pair, distance alone).
    """
    doubt = disagreement(judged.scores, pairs)
    features = pair_features(judged.embeddings, pairs)
    nearest = np.full(len(pairs), np.inf)
    free = np.ones(len(pairs), dtype=bool)
    chosen: list[int] = []
    distances: list[float] = []
    for _ in range(count):
        worth = (1 - diversity) * _share(doubt, free)
        if chosen:
            worth += diversity * _share(nearest, free)
        best = int(np.where(free, worth, -np.inf).argmax())
        chosen.append(best)
        distances.append(nearest[best])
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
        free &= ~np.isin(pairs, pairs[best]).any(axis=1)
    return Selection(pairs[chosen], doubt[chosen], np.array(distances))


def _share(values: np.ndarray, free: np.ndarray) -> np.ndarray:
    greatest = values[free].max()
    return values / greatest if greatest > 0 else np.zeros_like(values)


def reward_ensemble(pairing: PairingOptions, generator: "LoadedGenerator") -> Ensemble:
    """The ensemble of the reward files that are named, each holding one reward or several; none named: the
    bundled two.
    """
    import torch

    from eg3d_rlhf.rewards.cache import observe_seeds
    from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward

    members: list[Reward] = []
    described = []
    # those two were trained apart on the same labels
    for path in map(Path, pairing.rewards or (bundled.REWARD, bundled.WATCH)):
        reward = load_reward(path)
        check_reward(reward, generator.generator, f"active selection: {path.name}")
        parts = reward.members()
        members += parts
        described.append({"file": path.name, "sha256": file_hash(path), "members": len(parts)})
    sources = {
        m.observation: observe_seeds(generator.generator, m.observation, psi=pairing.psi) for m in members
    }

    @torch.no_grad()
    def judge(seeds: Sequence[int]) -> Judged:
        observed = {observation: draw(seeds) for observation, draw in sources.items()}
        seen = [m.network.embed(observed[m.observation]) for m in members]
        scores = [m.network.score_embedding(e) / m.temperature for m, e in zip(members, seen, strict=True)]
        return Judged(torch.stack(scores).double().numpy(), torch.cat(seen, dim=1).double().numpy())

    return Ensemble(judge, len(members), described)
