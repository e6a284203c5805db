"""A run of online tuning: arms trained with one seed or several, and evaluated on the same noises of held-out
conditions.

    nft, grpo, grpo-guard, dppo, dgpo      by that loss, as the run's settings have it
    grpo-plain      GRPO with noise at every step of the sampler, and deviations of groups
    dpo             DPO on pairs of as many samples of the untuned network, ordered by the same reward
    <arm>-randomised  with the rewards of every group shuffled: must have no effect
    <arm>-inverted    with every reward negated: must do harm

Each is trained from the same network and ends in a folder of weights. What a run writes, and which networks
arms keep: see flow/arms.py.
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
    """Rewards, and settings of the losses."""

    task: Task
    losses: Losses
    known: Mapping  # JSON that names the problem and the rewards

    def config(self, arm: str) -> OnlineConfig:
        """Of an arm; of DPO those that say how many samples it may have."""
        kind, use = divided(arm)
        return replace(self.losses.grpo_plain if kind == DPO else self.losses.of(kind), use=use)

    def check_gate(self) -> None:
        """Raises: ValueError for a name of --gate that is no held-out reward."""
        known = self.heldout()
        for name in self.task.gate:
            if name not in known:
                raise ValueError(
                    f"--gate: expected some of {', '.join(known) or 'none here'}, got {name!r}. Name what is"
                    " not trained on."
                )

    def heldout(self) -> list[str]:
        """Return the names of the held-out rewards, of one asset of the untuned network."""
        if self.task.heldout is None or not self.task.gate:
            return []
        condition = self.task.conditions[0]
        assets = generate(self.problem.pipeline, [condition], [0], self.task.others)
        return list(self.task.heldout(assets, [condition]))

    def inputs(self) -> dict:
        return {"problem": self.known, "losses": asdict(self.losses), "gate": list(self.task.gate)}

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        task = self.task
        config = self.config(arm)
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
        held = list(self.problem.held_out_conditions)
        planned = config.steps * config.batch * config.group
        return {
            "samples": (
                planned if divided(arm)[0] == DPO else sum(line.get("samples", 0) for line in done.stats)
            ),
            "kl": drift(self.task, model, config, held, seed) if held and ranks.main else None,
        }


def ranked_pairs(task: Task, config: OnlineConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """As many samples as an online arm draws, in groups of the same sizes, from the untuned network by its
    own sampler; in each group the best is paired with the worst, the second with the last but one, and so on.
    Pairs of equal rewards are left out.

    Args: batch: samples at once.
    """
    order = Order(task.conditions, config.batch, seed)
    K = config.group
    groups = [
        (condition, derive_seed("pairs", seed, step, number) % 2**31)
        for step in range(config.steps)
        for number, (_, condition) in enumerate(order.items(step))
    ]
    several = max(1, batch // K)
    pairs = []
    weights = torch.tensor(task.weights)[:, None]
    for i in tqdm(
        range(0, len(groups), several), desc="samples for pairs", unit="batch", leave=False, disable=None
    ):
        names, seeds = map(list, zip(*groups[i : i + several], strict=True))
        given = [places for places in task.given(names, seeds, batch) for _ in range(K)]
        wide = ([name for name in names for _ in range(K)], [seed for seed in seeds for _ in range(K)])
        draws = [derive_seed("sample", seed, k) for seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, wide[0], draws, given)
        total = (weights * task.scores(latents, *wide)[0]).sum(0).view(-1, K)
        rewards = as_used(total, config.use, seeds)
        kept = [to_cpu(latent) for latent in separate(latents)]
        for number, (name, scores) in enumerate(zip(names, rewards, strict=True)):
            best = scores.argsort(descending=True, stable=True).tolist()
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
    task: Task, model: torch.nn.Module, config: OnlineConfig, conditions: Sequence[str], seed: int
) -> float:
    """Divergence of a tuned network's steps from the untuned one's on two new samples of every third
    condition: of one sampler for all losses, whose steps all draw noise in closed form.
    """
    same = replace(config, loss="grpo", group=2, window=None, trained_steps=None, sde_step="exact", noise=0.7)
    explorer = Explorer(
        task=task, config=same, policy=model, reference=FrozenModel(shared_copy(task.stage.model))
    )
    conditions = conditions[::3]
    seeds = [derive_seed("drift", seed, condition) % 2**31 for condition in conditions]
    every = range(len(explorer.steps) - 1)
    return float(
        torch.cat(
            [move.far for samples in explorer.draw(conditions, seeds, every, every) for move in samples.moves]
        ).mean()
    )


# Rewards by name: what a stage can be tuned for. A plugin (docs/extending.md) adds its own to `REWARDS`.

CHOOSER = "chooser"
# by name: makes it, once in a process
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {"solid": solid_reward}


# reads the stage's latents, and is taught by the problem's pairs of it; or the file of such a one
LATENT = "latent"


def reward_of(name: str, problem: Problem, stage: FlowStage | None = None) -> AssetReward:
    """The reward of that name for a problem; "own" is the problem's, "latent" that of a stage.

    Raises: ValueError naming those there are, or where it has none.
    """
    if name == OWN:
        if problem.reward is None:
            raise ValueError(
                "--reward: expected the name of one, got none, and this generator brings none. Name the"
                " plugin's."
            )
        return problem.reward
    if stage is not None and name == LATENT:
        return from_problem(problem, stage.name)
    if stage is not None and name.endswith(".safetensors"):
        return load(Path(name), problem.pipeline, stage, problem.train_conditions[0])
    if name not in REWARDS:
        known = ", ".join((OWN, LATENT, *REWARDS))
        raise ValueError(
            f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that brings it."
        )
    return REWARDS[name](problem)


def heldout_scores(
    problem: Problem, trained: Collection[str], assets: Sequence, conditions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Score assets by the rewards that nothing is trained on, by name; the final evaluator is kept for the
    table.
    """
    found: dict[str, torch.Tensor] = {}
    if problem.reward is not None and OWN not in trained:
        found[OWN] = problem.reward(assets, conditions)
    if problem.chooser is not None:
        found[CHOOSER] = problem.chooser(assets, conditions)
    measures = problem.measures or problem.parts
    return found | dict(measures(assets, conditions) if measures is not None else {})


def bench_of(run: OnlineRun, opened: Opened, seed: int) -> OnlineBench:
    """Make what the arms of a run are trained on, by one training seed."""
    problem = opened[0]
    weights = weighed(run.reward)
    stage = run.stage_in(problem)
    rewards = {name: reward_of(name, problem, stage) for name in weights}
    # nothing is decoded
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
        scores = [weights[name] * reward(assets, conditions) for name, reward in rewards.items()]
        return torch.stack(scores).sum(0)

    losses = replace(
        run.losses,
        **{field.name: getattr(run.losses, field.name).at(stage, seed) for field in fields(Losses)},
    )
    of_total = replace(problem, reward=total, parts=problem.measures or problem.parts)
    return OnlineBench(
        of_total,
        stage,
        run.dpo.at(stage, seed),
        task,
        losses,
        {**problem.identity, "reward": run.reward},
    )
