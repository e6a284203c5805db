"""Compare a reward of latents with a reward of finished assets that was trained on the same people's pairs.

For each it is measured how often it orders pairs correctly whose prompts were used neither to train nor to
choose it (with several training seeds), and how many samples per second it scores while a stage is tuned.

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
    from_problem,
    in_order,
    scores_of_assets,
)
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Task

LATENT = "latent"
DECODED = "decoded"
TIMED = 5  # timed batches of each reward, in turn; the median counts


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Figures of one of the two rewards."""

    accuracy: MeanInterval  # mean over training seeds; the interval is of the pairs, clustered by condition
    by_seed: tuple[float, ...]  # [S], accuracy of each training seed
    samples_per_second: float  # as measured on this machine

    def shown(self) -> dict:
        """Return the figures as JSON."""
        return {
            "accuracy": list(self.accuracy),
            "by_seed": list(self.by_seed),
            "samples_per_second": self.samples_per_second,
        }


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Comparison of both rewards on the same pairs."""

    pairs: int  # number of pairs
    conditions: int  # number of prompts; the name is a JSON key
    kinds: Mapping[str, Kind]  # LATENT, and DECODED if the problem can fit such a reward
    difference: MeanInterval | None  # latent's accuracy minus decoded's, pair by pair

    def shown(self) -> dict:
        """Return the comparison as JSON."""
        return {
            "pairs": self.pairs,
            "conditions": self.conditions,
            **{name: kind.shown() for name, kind in self.kinds.items()},
            **({} if self.difference is None else {"difference": list(self.difference)}),
        }


def compared(
    problem: Problem, stage: str, seeds: Sequence[int], say: Callable[[str], None] = lambda text: None
) -> tuple[LatentReward, Beside]:
    """Train rewards of both kinds, and compare them on held-out pairs.

    Returns the latent reward of the first training seed, and the figures of all seeds. Both kinds are trained
    on the pairs of the training prompts.

    Raises: ValueError for too few labels, or too few prompts with held-out pairs.
    """
    last = problem.pipeline.stages[-1].name
    held = {name: problem.held_out_pairs(name) for name in (stage, last)}
    names = [pair.condition for pair in held[stage]]
    prompts = check_enough(names)
    latent_rewards = list[LatentReward]()
    decoded = list[AssetReward]()
    for seed in seeds:
        say(f"training seed {seed}")
        if problem.fit_reward is not None:
            decoded.append(problem.fit_reward(problem.train_pairs[last], seed))
        # the latent reward is distilled from the decoded one, which is therefore trained first
        latent_rewards.append(
            from_problem(problem, stage, LatentTraining(seed=seed), decoded[-1] if decoded else None)
        )
    outcomes = {LATENT: np.stack([of_latents(reward, held[stage]) for reward in latent_rewards])}  # [S, P]
    if decoded:
        say("decoding the held-out pairs")
        # pairs of the last stage hold the same assets; the order must be that of the stage's own pairs
        outcomes[DECODED] = of_assets(problem, decoded, in_order(held[last], held[stage]))
    timed: dict[str, AssetReward] = {LATENT: latent_rewards[0], **({DECODED: decoded[0]} if decoded else {})}
    speed = speeds(problem, stage, timed, held[stage])
    kinds = {
        kind: Kind(
            # averaged over seeds first: the interval is of the pairs, clustered by prompt
            accuracy=clustered_rate(of_kind.mean(0), names),
            by_seed=tuple(of_kind.mean(1).tolist()),
            samples_per_second=speed[kind],
        )
        for kind, of_kind in outcomes.items()
    }
    apart = (
        None
        if DECODED not in kinds
        else clustered_mean(outcomes[LATENT].mean(0) - outcomes[DECODED].mean(0), names)
    )
    return latent_rewards[0], Beside(pairs=len(names), conditions=len(prompts), kinds=kinds, difference=apart)


def of_latents(reward: LatentReward, pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Score the order of pairs by a latent reward, [P].

    A pair counts 1 if the preferred sample has the higher score, and one half if both are equal.
    """
    # in batches, which bound the memory
    parts = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    margins = [
        reward.of_latents(*_batch(part, "preferred")) - reward.of_latents(*_batch(part, "rejected"))
        for part in parts
    ]
    return ordered(torch.cat(margins).double().numpy())


def of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> np.ndarray:
    """Score the order of pairs of the last stage by S rewards of finished assets, [S, P].

    Each asset is decoded once for all rewards.
    """
    preferred, rejected = scores_of_assets(problem, rewards, pairs).unbind(2)  # [P, S] each
    return ordered((preferred - rejected).T.numpy())


def _batch(pairs: Sequence[PreferencePair], side: str):
    """Return the latents of one side of pairs as a batch, and their prompts."""
    return collate([getattr(pair, side) for pair in pairs]), [pair.condition for pair in pairs]


def speeds(
    problem: Problem, stage: str, rewards: dict[str, AssetReward], pairs: Sequence[PreferencePair]
) -> dict[str, float]:
    """Measure the samples per second of the call that tuning makes, for each reward.

    The call leads from latents of the stage on its device to scores, and decodes if the reward needs assets.
    """
    latents, names = _batch(pairs[:BATCH], "preferred")
    tuned = stage_of(problem.pipeline, stage)
    seconds = {kind: list[float]() for kind in rewards}
    latents = latents.to(next(tuned.model.parameters()).device)
    # the first round is not counted: it includes compilation and allocation
    for _ in range(1 + TIMED):
        # in turn, so that a slow moment of the machine meets both kinds
        for kind, reward in rewards.items():
            task = Task(pipeline=problem.pipeline, stage=tuned, rewards={kind: reward}, conditions=names)
            started = time.perf_counter()
            task.scores(latents, names, range(len(names)))  # ends on the CPU
            seconds[kind].append(time.perf_counter() - started)
    return {kind: len(names) / median(taken[1:]) for kind, taken in seconds.items()}
