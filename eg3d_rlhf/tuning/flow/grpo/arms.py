"""The arms of a comparison: GRPO, its controls, and DPO on as many samples.

    grpo       as the settings say
    dpo        DPO on pairs of as many samples of the untuned network, ordered by the same reward
    shuffled   GRPO with the rewards of every group shuffled: must do nothing
    inverted   GRPO with every reward turned over: must do harm
    people     DPO on the people's pairs, for what they are worth beside a reward

Each is trained from the same network and ends in a folder of weights. Where a problem has a chooser, arms keep the network of their best
win rate on the conditions to choose on, which are not the table's; the controls keep their last one, as it is what they are there to show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import separate, to_cpu
from eg3d_rlhf.tuning.flow.generate import stage_latents
from eg3d_rlhf.tuning.flow.grpo.groups import Explorer, GrpoConfig, Task, train_online
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.problem import Choosing, Problem
from eg3d_rlhf.tuning.flow.reference import FrozenModel
from eg3d_rlhf.tuning.flow.stage import AssetReward
from eg3d_rlhf.tuning.flow.train import StageResult
from eg3d_rlhf.tuning.flow.train_pairs import Order, TrainConfig, train_stage
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

ARMS = {
    "grpo": "GRPO",
    "dpo": "DPO on as many samples, ordered by the reward",
    "shuffled": "GRPO, rewards shuffled within groups",
    "inverted": "GRPO, rewards inverted",
    "people": "DPO on people's pairs",
}
CONTROLS = ("shuffled", "inverted")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every arm of one training seed shares."""

    problem: Problem
    task: Task
    grpo: GrpoConfig
    dpo: TrainConfig
    choosing: Choosing | None  # None: the last network is kept
    known: Mapping  # JSON that names the problem and the reward

    def train(self, arm: str, out: Path, ranks: Ranks = SINGLE, say: Callable[[str], None] = print) -> StageResult:
        """Train an arm in a folder, or go on with it there."""
        task, chooser = self.task, None
        if self.choosing is not None and arm not in CONTROLS:
            chooser = self.choosing.held_out(self.problem, task.stage.name, task.others, task.others)
        if arm in ("dpo", "people"):
            pairs = self.problem.human_pairs(task.stage.name) if arm == "people" else ranked_pairs(task, self.grpo, self.dpo.seed)
            return train_stage(task.pipeline, task.stage.name, pairs, self.dpo, out, held_out=chooser, ranks=ranks, resume=True, say=say)
        config = self.grpo if arm == "grpo" else replace(self.grpo, use=arm)
        return train_online(task, config, out, {"problem": dict(self.known)}, held_out=chooser, ranks=ranks, resume=True, say=say)


def ranked_pairs(task: Task, config: GrpoConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """As many samples as GRPO draws, in groups of the same sizes, from the untuned network by its own sampler; in each group the best is
    paired with the worst, the second with the last but one, and so on. Pairs of equal rewards are left out.

    Args: batch: samples at once.
    """
    order, K = Order(task.conditions, config.batch, seed), config.group
    groups = [(condition, derive_seed("pairs", seed, step, number) % 2**31)
              for step in range(config.steps) for number, (_, condition) in enumerate(order.items(step))]
    several, pairs = max(1, batch // K), []
    for i in tqdm(range(0, len(groups), several), desc="samples for pairs", unit="batch", leave=False, disable=None):
        names, seeds = map(list, zip(*groups[i : i + several], strict=True))
        given = [places for places in task.given(names, seeds, batch) for _ in range(K)]
        wide = ([name for name in names for _ in range(K)], [seed for seed in seeds for _ in range(K)])
        draws = [derive_seed("sample", seed, k) for seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, wide[0], draws, given)
        rewards, kept = task.rewards(latents, *wide).view(-1, K), [to_cpu(one) for one in separate(latents)]
        for number, (name, own) in enumerate(zip(names, rewards, strict=True)):
            best = own.argsort(descending=True, stable=True).tolist()
            for k in range(K // 2):
                high, low = best[k], best[-1 - k]
                if own[high] > own[low]:
                    pairs.append(PreferencePair(
                        id=f"{i + number}-{k}", condition=name, stage=task.stage.name, preferred=kept[number * K + high],
                        rejected=kept[number * K + low], source="loop", reward_preferred=float(own[high]), reward_rejected=float(own[low]),
                    ))  # fmt: skip
    return pairs


def drift(task: Task, model: torch.nn.Module, config: GrpoConfig, conditions: Sequence[str], seed: int) -> float:
    """Divergence of a tuned network's steps from the untuned one's, as `kl` in training, on two new samples of every condition."""
    explorer = Explorer(task=task, config=replace(config, group=2), policy=model, reference=FrozenModel(shared_copy(task.stage.model)))
    seeds = [derive_seed("drift", seed, condition) % 2**31 for condition in conditions]
    drawn, _ = explorer.draw(conditions, seeds, range(len(explorer.steps) - 1))
    return float(torch.cat([move.far for one in drawn for move in one.moves]).mean())


# Rewards by name: what a stage can be tuned for. A plugin (docs/extending.md) adds its own to `REWARDS`.

OWN = "own"
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {}  # by name: makes it for a problem, once in every process


def reward_of(name: str, problem: Problem) -> AssetReward:
    """The reward of that name for a problem; "own" is the problem's. Raises: ValueError naming those there are, or where it has none."""
    if name == OWN:
        if problem.reward is None:
            raise ValueError("--reward: expected the name of one, got none, and this generator brings none. Name the plugin's.")
        return problem.reward
    if name not in REWARDS:
        known = ", ".join((OWN, *REWARDS))
        raise ValueError(f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that brings it.")
    return REWARDS[name](problem)
