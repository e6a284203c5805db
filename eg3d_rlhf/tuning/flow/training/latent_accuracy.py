"""A reward of latents beside one of finished assets from the same people's pairs: how often each orders pairs
of conditions that neither trained nor chose it, with several training seeds, and how many samples a second
each scores while a stage is tuned by it.

Letters: P pairs, S training seeds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from eg3d_rlhf.core.statistics import MeanInterval, clustered_mean, clustered_rate
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, stage_of
from eg3d_rlhf.tuning.flow.training.accuracy import check_enough, ordered
from eg3d_rlhf.tuning.flow.training.latent_reward import (
    BATCH,
    LatentReward,
    LatentTraining,
    in_order,
    scores_of_assets,
    taught_by,
)
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Task

LATENT = "latent"
DECODED = "decoded"
TIMED = 5  # batches of each, in turn; the median counts


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Of one of the two rewards."""

    accuracy: MeanInterval  # mean over training seeds; the interval is of the pairs, clustered by condition
    by_seed: tuple[float, ...]  # [S]
    samples_per_second: float

    def shown(self) -> dict:
        """JSON."""
        return {
            "accuracy": list(self.accuracy),
            "by_seed": list(self.by_seed),
            "samples_per_second": self.samples_per_second,
        }


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Both, on the same pairs."""

    pairs: int
    conditions: int
    kinds: Mapping[str, Kind]  # LATENT, and DECODED where this problem's pairs teach such a reward
    difference: MeanInterval | None  # latent's accuracy less decoded's, pair by pair

    def shown(self) -> dict:
        """JSON."""
        return {
            "pairs": self.pairs,
            "conditions": self.conditions,
            **{name: kind.shown() for name, kind in self.kinds.items()},
            **({} if self.difference is None else {"difference": list(self.difference)}),
        }


def compared(
    problem: Problem, stage: str, seeds: Sequence[int], say: Callable[[str], None] = lambda text: None
) -> tuple[LatentReward, Beside]:
    """The reward of the first training seed, and figures of all. Both kinds learn from the pairs of the
    trained conditions.

    Raises: ValueError for labels, or conditions with held-out pairs, that are too few.
    """
    last = problem.pipeline.stages[-1].name
    held = {name: problem.held_out_pairs(name) for name in (stage, last)}
    names = [pair.condition for pair in held[stage]]
    conditions = check_enough(names)
    read = list[LatentReward]()
    decoded = list[AssetReward]()
    for seed in seeds:
        say(f"training seed {seed}")
        if problem.fit_reward is not None:
            decoded.append(problem.fit_reward(problem.train_pairs[last], seed))
        read.append(taught_by(problem, stage, LatentTraining(seed=seed), decoded[-1] if decoded else None))
    outcomes = {LATENT: np.stack([of_latents(reward, held[stage]) for reward in read])}  # [S, P]
    if decoded:
        say("decoding the held-out pairs")
        outcomes[DECODED] = of_assets(problem, decoded, in_order(held[last], held[stage]))
    timed: dict[str, AssetReward] = {LATENT: read[0], **({DECODED: decoded[0]} if decoded else {})}
    speed = speeds(problem, stage, timed, held[stage])
    kinds = {
        kind: Kind(
            accuracy=clustered_rate(found.mean(0), names),
            by_seed=tuple(found.mean(1).tolist()),
            samples_per_second=speed[kind],
        )
        for kind, found in outcomes.items()
    }
    apart = (
        None
        if DECODED not in kinds
        else clustered_mean(outcomes[LATENT].mean(0) - outcomes[DECODED].mean(0), names)
    )
    return read[0], Beside(pairs=len(names), conditions=len(conditions), kinds=kinds, difference=apart)


def of_latents(reward: LatentReward, pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Outcomes [P]: 1 where the preferred one has the higher score, one half where both are alike."""
    parts = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    margins = [
        reward.of_latents(*_batch(part, "preferred")) - reward.of_latents(*_batch(part, "rejected"))
        for part in parts
    ]
    return ordered(torch.cat(margins).double().numpy())


def of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> np.ndarray:
    """Outcomes [S, P] of rewards of finished assets on pairs of the last stage, each asset decoded once."""
    better, worse = scores_of_assets(problem, rewards, pairs).unbind(2)
    return ordered((better - worse).T.numpy())


def _batch(pairs: Sequence[PreferencePair], side: str):
    return collate([getattr(pair, side) for pair in pairs]), [pair.condition for pair in pairs]


def speeds(
    problem: Problem, stage: str, rewards: dict[str, AssetReward], pairs: Sequence[PreferencePair]
) -> dict[str, float]:
    """Samples a second of the call that tuning makes: from latents of the stage on its device to scores,
    decoded where a reward asks.
    """
    latents, names = _batch(pairs[:BATCH], "preferred")
    tuned = stage_of(problem.pipeline, stage)
    seconds = {kind: list[float]() for kind in rewards}
    latents = latents.to(next(tuned.model.parameters()).device)
    for _ in range(1 + TIMED):  # the first is not counted
        for kind, reward in rewards.items():
            task = Task(pipeline=problem.pipeline, stage=tuned, rewards={kind: reward}, conditions=names)
            started = time.perf_counter()
            task.scores(latents, names, range(len(names)))  # ends on the CPU
            seconds[kind].append(time.perf_counter() - started)
    return {kind: len(names) / median(taken[1:]) for kind, taken in seconds.items()}
