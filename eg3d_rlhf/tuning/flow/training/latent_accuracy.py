"""Compare a reward of latents with a reward of finished assets that was trained on the same people's pairs.

Two quantities of each reward are measured: how often it orders pairs correctly whose prompts were used
neither to train nor to choose it (with several training seeds), and how many samples per second it scores
while a stage is tuned.

Shapes: P pairs, S training seeds.
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
from eg3d_rlhf.tuning.flow.training.accuracy import check_enough, score_order
from eg3d_rlhf.tuning.flow.training.latent_reward import (
    BATCH,
    LatentReward,
    LatentTraining,
    from_problem,
    in_order,
    scores_of_assets,
)
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Task

LATENT = "latent"  # name of the reward that reads latents
DECODED = "decoded"  # name of the reward that reads finished assets
TIMED = 5  # number of timed batches of each reward; the median counts


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Accuracy and speed of a reward of latents, or of a reward of finished assets."""

    accuracy: MeanInterval  # mean over training seeds; interval over the pairs, clustered by prompt
    by_seed: tuple[float, ...]  # [S], accuracy of each training seed
    samples_per_second: float  # measured on this machine

    def shown(self) -> dict:
        """Return accuracy and speed as JSON."""
        return {
            "accuracy": list(self.accuracy),
            "by_seed": list(self.by_seed),
            "samples_per_second": self.samples_per_second,
        }


@dataclass(frozen=True, kw_only=True)
class RewardComparison:
    """Comparison of a reward of latents with a reward of finished assets, on the same held-out pairs."""

    pairs: int  # number of pairs
    prompts: int  # number of prompts; its JSON key is "conditions"
    kinds: Mapping[str, Kind]  # results by LATENT, and by DECODED if the problem can fit such a reward
    difference: MeanInterval | None  # latent's accuracy minus decoded's, pair by pair

    def shown(self) -> dict:
        """Return the comparison as JSON."""
        return {
            "pairs": self.pairs,
            "conditions": self.prompts,
            **{name: kind.shown() for name, kind in self.kinds.items()},
            # the key is absent if there is only one reward
            **({} if self.difference is None else {"difference": list(self.difference)}),
        }


def compare_rewards(
    problem: Problem, stage: str, seeds: Sequence[int], say: Callable[[str], None] = lambda text: None
) -> tuple[LatentReward, RewardComparison]:
    """Train rewards of latents and rewards of finished assets, and compare both kinds on held-out pairs.

    Both kinds are trained on the pairs of the training prompts. Rewards of finished assets are left out if
    the problem cannot fit them.

    Returns: the latent reward of the first training seed, and the comparison over all training seeds.

    Args:
        problem: problem with people's pairs.
        stage: name of the stage whose latents the reward reads.
        seeds: training seeds, S.
        say: function that prints a line of progress; the default prints nothing.

    Raises: ValueError for too few labels, or too few prompts with held-out pairs.
    """
    last_stage = problem.pipeline.stages[-1].name
    held_out_pairs = {name: problem.held_out_pairs(name) for name in (stage, last_stage)}
    pair_prompts = [pair.condition for pair in held_out_pairs[stage]]
    prompts = check_enough(pair_prompts)
    latent_rewards = list[LatentReward]()
    decoded_rewards = list[AssetReward]()
    for seed in seeds:
        say(f"training seed {seed}")
        if problem.fit_reward is not None:
            decoded_rewards.append(problem.fit_reward(problem.train_pairs[last_stage], seed))
        # the latent reward is distilled from the decoded one, which is therefore trained first
        latent_rewards.append(
            from_problem(
                problem, stage, LatentTraining(seed=seed), decoded_rewards[-1] if decoded_rewards else None
            )
        )
    # 1, 0 or one half for each seed and pair, [S, P]
    outcomes_by_kind = {
        LATENT: np.stack([of_latents(reward, held_out_pairs[stage]) for reward in latent_rewards])
    }
    if decoded_rewards:
        say("decoding the held-out pairs")
        # pairs of the last stage hold the same assets; the order must be that of the stage's own pairs
        outcomes_by_kind[DECODED] = of_assets(
            problem, decoded_rewards, in_order(held_out_pairs[last_stage], held_out_pairs[stage])
        )
    timed_rewards: dict[str, AssetReward] = {LATENT: latent_rewards[0]}
    if decoded_rewards:
        timed_rewards[DECODED] = decoded_rewards[0]
    speed_by_kind = speeds(problem, stage, timed_rewards, held_out_pairs[stage])
    result_by_kind = {
        reward_kind: Kind(
            # averaged over seeds first, since the interval is over the pairs, clustered by prompt
            accuracy=clustered_rate(kind_outcomes.mean(0), pair_prompts),
            by_seed=tuple(kind_outcomes.mean(1).tolist()),
            samples_per_second=speed_by_kind[reward_kind],
        )
        for reward_kind, kind_outcomes in outcomes_by_kind.items()
    }
    difference = None
    if DECODED in result_by_kind:
        pair_differences = outcomes_by_kind[LATENT].mean(0) - outcomes_by_kind[DECODED].mean(0)  # [P]
        difference = clustered_mean(pair_differences, pair_prompts)
    return latent_rewards[0], RewardComparison(
        pairs=len(pair_prompts), prompts=len(prompts), kinds=result_by_kind, difference=difference
    )


def of_latents(reward: LatentReward, pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Score the order that a latent reward gives each pair, [P]: 1 if correct, 0 if wrong, 0.5 for a tie.

    The order is correct if the preferred sample has the higher score.
    """
    margins = []
    # in batches, which bound the memory
    for i in range(0, len(pairs), BATCH):
        batch_pairs = pairs[i : i + BATCH]
        preferred_scores = reward.score_latents(*_batch(batch_pairs, "preferred"))
        rejected_scores = reward.score_latents(*_batch(batch_pairs, "rejected"))
        margins.append(preferred_scores - rejected_scores)
    return score_order(torch.cat(margins).double().numpy())


def of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> np.ndarray:
    """Score the order that each reward of finished assets gives each pair, [S, P].

    The order counts 1 if the preferred asset has the higher score, 0 if it has the lower score, and one half
    if both scores are equal. Each asset is decoded once for all rewards.

    Args:
        problem: problem with the pipeline.
        rewards: rewards of finished assets, S.
        pairs: pairs of the last stage, P.
    """
    # [P, S] each
    preferred_scores, rejected_scores = scores_of_assets(problem, rewards, pairs).unbind(2)
    return score_order((preferred_scores - rejected_scores).T.numpy())


def _batch(pairs: Sequence[PreferencePair], role: str):
    """Collect the preferred or the rejected latents of pairs, and the prompts of the pairs.

    Args: pairs: the pairs; role: "preferred" or "rejected".
    Returns: the latents as a batch; and the prompts of the pairs.
    """
    return collate([getattr(pair, role) for pair in pairs]), [pair.condition for pair in pairs]


def speeds(
    problem: Problem, stage: str, rewards: dict[str, AssetReward], pairs: Sequence[PreferencePair]
) -> dict[str, float]:
    """Measure how many samples per second each reward scores while a stage is tuned.

    The measured call goes from latents on the stage's device to scores. It includes decoding if the reward
    needs finished assets.

    Args:
        problem: problem with the pipeline.
        stage: name of the tuned stage.
        rewards: rewards by their kind, LATENT or DECODED.
        pairs: pairs of the stage, of which the first BATCH are scored.
    """
    latents, prompts = _batch(pairs[:BATCH], "preferred")
    tuned_stage = stage_of(problem.pipeline, stage)
    seconds_by_kind = {reward_kind: list[float]() for reward_kind in rewards}
    # moved before the measurement, since tuning has its latents on the device already
    latents = latents.to(next(tuned_stage.model.parameters()).device)
    # the first round is not counted: it includes compilation and allocation
    for _ in range(1 + TIMED):
        # alternately, so that a slow moment of the machine affects both kinds of rewards
        for reward_kind, reward in rewards.items():
            task = Task(
                pipeline=problem.pipeline, stage=tuned_stage, rewards={reward_kind: reward}, prompts=prompts
            )
            start_time = time.perf_counter()
            # the scores are on the CPU, so the call waits for the device
            task.scores(latents, prompts, range(len(prompts)))
            seconds_by_kind[reward_kind].append(time.perf_counter() - start_time)
    return {
        reward_kind: len(prompts) / median(durations[1:])
        for reward_kind, durations in seconds_by_kind.items()
    }
