"""Define the arms of a run of online tuning, and the rewards that a stage can be tuned for.

    nft, grpo, grpo-guard, dppo, dgpo      the loss of that name, with the run's settings
    grpo-plain      GRPO with noise at every step of the sampler, and the standard deviation of each group
    dpo             DPO on pairs of the same number of samples of the untuned network, ordered by the same
                    reward
    <arm>-randomised  with the rewards of every group shuffled: must have no effect
    <arm>-inverted    with every reward negated: must do harm

Each arm is trained from the same network, and evaluated on the same noises of held-out prompts. arm_runs.py
describes what a run writes, and which network each arm keeps.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import separate, to_cpu
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import generate, stage_latents
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, FlowStage
from eg3d_rlhf.tuning.flow.training.arm_runs import Bench, Opened
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.latent_reward import LatentReward, from_problem, load
from eg3d_rlhf.tuning.flow.training.online.advantages import as_used
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Explorer, Task
from eg3d_rlhf.tuning.flow.training.online.settings import (
    DPO,
    OWN,
    Losses,
    OnlineConfig,
    OnlineRun,
    divided,
    weighed,
)
from eg3d_rlhf.tuning.flow.training.online.solid import solid_reward
from eg3d_rlhf.tuning.flow.training.online.updates import train_online
from eg3d_rlhf.tuning.flow.training.pair_training import Order, train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.trainer import StageResult
from training.distributed import Ranks
from training.phases import derive_seed
from training.progress import tqdm


@dataclass(frozen=True)
class OnlineBench(Bench):
    """Rewards and settings of the arms of an online run, for one training seed."""

    task: Task
    losses: Losses
    known: Mapping  # JSON that identifies the problem and the rewards

    def config(self, arm: str) -> OnlineConfig:
        """Return the settings of an arm; those of DPO decide the number of its samples."""
        kind, use = divided(arm)
        return replace(self.losses.grpo_plain if kind == DPO else self.losses.of(kind), use=use)

    def check_gate(self) -> None:
        """Raise ValueError if --gate names a reward that is not held out."""
        known = self.heldout()
        for name in self.task.gate:
            if name not in known:
                raise ValueError(
                    f"--gate: expected held-out rewards ({', '.join(known) or 'there are none'}), got"
                    f" {name!r}. Name rewards that are not trained on."
                )

    def heldout(self) -> list[str]:
        """Return the names of the held-out rewards."""
        # they are known only from scores, so one asset of the untuned network is generated and scored
        if self.task.heldout is None or not self.task.gate:
            return []
        prompt = self.task.conditions[0]
        assets = generate(self.problem.pipeline, [prompt], [0], self.task.others)
        return list(self.task.heldout(assets, [prompt]))

    def inputs(self) -> dict:
        return {"problem": self.known, "losses": asdict(self.losses), "gate": list(self.task.gate)}

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        task = self.task
        config = self.config(arm)
        # the DPO arms are trained offline, on pairs that are generated once
        if divided(arm)[0] == DPO:
            return train_stage(
                ConditionedStage(task.stage, task.pipeline),
                ranked_pairs(task, config, self.dpo.seed),
                self.dpo,
                out,
                **options,
            )
        return train_online(task, config, out, {"problem": dict(self.known)}, **options)

    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        config = self.config(arm)
        # DPO generates its samples at once; the other arms may stop early, so their lines are counted
        held = list(self.problem.held_out_conditions)
        planned = config.steps * config.batch * config.group
        return {
            "samples": (
                planned if divided(arm)[0] == DPO else sum(line.get("samples", 0) for line in done.stats)
            ),
            "kl": drift(self.task, model, config, held, seed) if held and ranks.main else None,
        }


def ranked_pairs(task: Task, config: OnlineConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """Generate as many samples as an online arm does, and pair them by reward.

    The samples come from the untuned network by its own sampler, in groups of the same sizes. In each group
    the best sample is paired with the worst, the second with the last but one, and so on. Pairs of equal
    rewards are left out.

    Args: batch: samples at once.
    """
    # the same schedule of prompts as in online tuning
    order = Order(task.conditions, config.batch, seed)
    K = config.group  # samples of a group
    groups = [
        (condition, derive_seed("pairs", seed, step, number) % 2**31)
        for step in range(config.steps)
        for number, (_, condition) in enumerate(order.items(step))
    ]
    several = max(1, batch // K)  # groups at once
    pairs = []
    weights = torch.tensor(task.weights)[:, None]  # [R, 1]
    for i in tqdm(
        range(0, len(groups), several), desc="samples for pairs", unit="batch", leave=False, disable=None
    ):
        names, seeds = map(list, zip(*groups[i : i + several], strict=True))
        # the voxels of a group are the same for its K samples, as in online tuning
        given = [places for places in task.given(names, seeds, batch) for _ in range(K)]
        # prompt and seed of each of the n = G K samples
        wide = ([name for name in names for _ in range(K)], [seed for seed in seeds for _ in range(K)])
        draws = [derive_seed("sample", seed, k) for seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, wide[0], draws, given)
        # [R, n] -> [G, K]
        total = (weights * task.scores(latents, *wide)[0]).sum(0).view(-1, K)
        # controls shuffle or negate the rewards before samples are ordered
        rewards = as_used(total, config.use, seeds)
        # pairs of all batches stay in memory, so not on the device
        kept = [to_cpu(latent) for latent in separate(latents)]
        for number, (name, scores) in enumerate(zip(names, rewards, strict=True)):
            # stable, so that equal rewards give the same pairs on every machine
            best = scores.argsort(descending=True, stable=True).tolist()
            # for an odd K the middle sample has no partner
            for k in range(K // 2):
                high = best[k]
                low = best[-1 - k]
                if scores[high] > scores[low]:
                    pairs.append(
                        PreferencePair(
                            id=f"{i + number}-{k}",
                            condition=name,
                            stage=task.stage.name,
                            preferred=kept[number * K + high],
                            rejected=kept[number * K + low],
                            source="loop",
                            reward_preferred=float(scores[high]),
                            reward_rejected=float(scores[low]),
                        )
                    )
    return pairs


def drift(
    task: Task, model: torch.nn.Module, config: OnlineConfig, prompts: Sequence[str], seed: int
) -> float:
    """Measure the divergence of a tuned network's steps from the untuned network's.

    It is the mean over two new samples of every third prompt. The sampler is the same for all losses: all of
    its steps add noise, by the process in closed form.
    """
    # these settings make the figures of different arms comparable
    same = replace(config, loss="grpo", group=2, window=None, trained_steps=None, sde_step="exact", noise=0.7)
    explorer = Explorer(
        task=task, config=same, policy=model, reference=FrozenModel(shared_copy(task.stage.model))
    )
    prompts = prompts[::3]
    seeds = [derive_seed("drift", seed, prompt) % 2**31 for prompt in prompts]
    every = range(len(explorer.steps) - 1)  # the last step has no density
    return float(
        torch.cat(
            [move.far for samples in explorer.draw(prompts, seeds, every, every) for move in samples.moves]
        ).mean()
    )


# Rewards by name, for which a stage can be tuned. A plugin (docs/extending.md) adds its own to `REWARDS`.

CHOOSER = "chooser"
# name -> function that creates the reward, called once in a process
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {"solid": solid_reward}


# name of a reward that reads the stage's latents, and is trained on the problem's pairs of the stage
LATENT = "latent"


def reward_of(name: str, problem: Problem, stage: FlowStage | None = None) -> AssetReward:
    """Return the reward of a name for a problem.

    "own" is the problem's reward; "latent" trains a reward of the stage's latents; a .safetensors file holds
    such a reward.

    Raises: ValueError with the known names for an unknown one, and for "own" if the problem has no reward.
    """
    if name == OWN:
        if problem.reward is None:
            raise ValueError(
                "--reward: expected the name of a reward, got none, and this generator has no reward of its"
                " own. Give a name, such as that of a plugin's reward."
            )
        return problem.reward
    if stage is not None and name == LATENT:
        return from_problem(problem, stage.name)
    # any prompt serves to find the size of the conditioning
    if stage is not None and name.endswith(".safetensors"):
        return load(Path(name), problem.pipeline, stage, problem.train_conditions[0])
    if name not in REWARDS:
        known = ", ".join((OWN, LATENT, *REWARDS))
        raise ValueError(
            f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that has it."
        )
    return REWARDS[name](problem)


def heldout_scores(
    problem: Problem, trained: Collection[str], assets: Sequence, prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Score assets by the rewards that are not trained on, by name."""
    # without the final evaluator, which must stay unused until the table
    scores: dict[str, torch.Tensor] = {}
    if problem.reward is not None and OWN not in trained:
        scores[OWN] = problem.reward(assets, prompts)
    if problem.chooser is not None:
        scores[CHOOSER] = problem.chooser(assets, prompts)
    measures = problem.measures or problem.parts
    return scores | dict(measures(assets, prompts) if measures is not None else {})


def bench_of(run: OnlineRun, opened: Opened, seed: int) -> OnlineBench:
    """Create the training data and settings of a run's arms, for one training seed."""
    problem = opened[0]
    weights = weighed(run.reward)  # by name of the reward
    stage = run.stage_in(problem)
    rewards = {name: reward_of(name, problem, stage) for name in weights}
    # without rewards of assets nothing is decoded in training, and so nothing held out is scored either
    latent = all(isinstance(reward, LatentReward) for reward in rewards.values()) and not run.gate
    task = Task(
        pipeline=problem.pipeline,
        stage=stage,
        rewards=rewards,
        weights=tuple(weights.values()),
        conditions=problem.train_conditions,
        heldout=None if latent else partial(heldout_scores, problem, weights),
        gate=tuple(name.strip() for name in run.gate.split(",")) if run.gate else (),
    )

    def total(assets: Sequence, conditions: Sequence[str]) -> torch.Tensor:
        """Compute the weighted sum of the trained rewards, which the table shows as the reward."""
        scores = [weights[name] * reward(assets, conditions) for name, reward in rewards.items()]
        return torch.stack(scores).sum(0)

    losses = replace(
        run.losses,
        **{field.name: getattr(run.losses, field.name).at(stage, seed) for field in fields(Losses)},
    )
    # the table evaluates what was trained: the weighted sum takes the place of the problem's reward
    of_total = replace(problem, reward=total, parts=problem.measures or problem.parts)
    return OnlineBench(
        of_total,
        stage,
        run.dpo.at(stage, seed),
        task,
        losses,
        {**problem.identity, "reward": run.reward},
    )
