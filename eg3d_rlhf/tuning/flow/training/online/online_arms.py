"""Define the arms of a run of online tuning, and the rewards that a stage can be tuned for. The arms are:

    nft, grpo, grpo-guard, dppo, dgpo      the loss of that name, with the run's settings
    grpo-plain        GRPO with noise at every step of the sampler, and with advantages that are divided by
                      the standard deviation of each group
    dpo               DPO on pairs that are made from as many samples of the untuned network, ordered by
                      the same reward
    <arm>-randomised  control with the rewards of every group shuffled, which should have no effect
    <arm>-inverted    control with every reward negated, which should make the assets worse

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
from eg3d_rlhf.tuning.flow.training.online.advantages import apply_control
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Explorer, Task
from eg3d_rlhf.tuning.flow.training.online.settings import (
    DPO,
    PROBLEM_REWARD,
    Losses,
    OnlineConfig,
    OnlineRun,
    is_served,
    parse_weights,
    split_arm,
)
from eg3d_rlhf.tuning.flow.training.online.solid import solid_reward
from eg3d_rlhf.tuning.flow.training.online.updates import train_online
from eg3d_rlhf.tuning.flow.training.pair_training import Order, train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.trainer import StageResult
from training import rehearsal
from training.distributed import Ranks
from training.phases import derive_seed
from training.progress import tqdm


@dataclass(frozen=True)
class OnlineBench(Bench):
    """Rewards and settings of the arms of an online run, for one training seed."""

    task: Task
    losses: Losses
    identity: Mapping  # JSON that identifies the problem and the rewards

    def config(self, arm: str) -> OnlineConfig:
        """Return the online settings of an arm. For a DPO arm, only their number of samples matters."""
        kind, use = split_arm(arm)
        return replace(self.losses.grpo_plain if kind == DPO else self.losses.for_arm(kind), use=use)

    def check_gate(self) -> None:
        """Raise ValueError if --gate names a reward that is not held out."""
        heldout_names = self.heldout()
        for name in self.task.gate:
            if name not in heldout_names:
                raise ValueError(
                    f"--gate: {name!r} is not a held-out reward. The held-out rewards of this run are:"
                    f" {', '.join(heldout_names) or '(none)'}. Name one of them, or remove --gate."
                )

    def heldout(self) -> list[str]:
        """Return the names of the held-out rewards.

        The list is empty if there is no gate, since the names are then not needed.
        """
        # only scores show the names, so one asset of the untuned network is generated and scored
        if self.task.heldout is None or not self.task.gate:
            return []
        prompt = self.task.prompts[0]
        assets = generate(self.problem.pipeline, [prompt], [0], self.task.others)
        return list(self.task.heldout(assets, [prompt]))

    def inputs(self) -> dict:
        return {"problem": self.identity, "losses": asdict(self.losses), "gate": list(self.task.gate)}

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        task = self.task
        config = self.config(arm)
        # the DPO arms are trained offline, on pairs that are generated once
        if split_arm(arm)[0] == DPO:
            return train_stage(
                ConditionedStage(task.stage, task.pipeline),
                ranked_pairs(task, config, self.dpo.seed),
                self.dpo,
                out,
                **options,
            )
        return train_online(task, config, out, {"problem": dict(self.identity)}, **options)

    def measure(
        self, arm: str, stage_result: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks
    ) -> dict:
        config = self.config(arm)
        held_out_prompts = list(self.problem.held_out_prompts)
        if split_arm(arm)[0] == DPO:
            # all samples are generated before the training
            sample_count = config.steps * config.batch * config.group
        else:
            # a training may stop early, so the samples in its lines are counted
            sample_count = sum(line.get("samples", 0) for line in stage_result.stats)
        return {
            "samples": sample_count,
            "kl": drift(self.task, model, config, held_out_prompts, seed)
            if held_out_prompts and ranks.is_main
            else None,
        }


def ranked_pairs(task: Task, config: OnlineConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """Generate as many samples as an online arm does, and make preference pairs of them by reward.

    The samples come from the untuned network by its own sampler, in groups of the same sizes. In each group
    the best sample is paired with the worst, the second with the last but one, and so on. Pairs of equal
    rewards are left out.

    Args:
        task: stage, prompts and rewards.
        config: settings of the online arm.
        seed: seed of the order of the prompts and of the noises.
        batch: number of samples that are generated at once.
    """
    # the same schedule of prompts as in online tuning
    prompt_order = Order(task.prompts, config.batch, seed)
    K = config.group  # samples of a group
    groups: list[tuple[str, int]] = []  # prompt and seed of each group
    for step in range(config.steps):
        for group_number, (_, prompt) in enumerate(prompt_order.items(step)):
            groups.append((prompt, derive_seed("pairs", seed, step, group_number) % 2**31))
    groups_per_batch = max(1, batch // K)  # number of groups that are generated at once
    pairs = []
    weights = torch.tensor(task.weights)[:, None]  # [R, 1]
    for i in tqdm(
        rehearsal.first(range(0, len(groups), groups_per_batch)),
        desc="samples for pairs",
        unit="batch",
        leave=False,
    ):
        prompts, seeds = map(list, zip(*groups[i : i + groups_per_batch], strict=True))
        # the voxels of a group are the same for its K samples, as in online tuning
        sample_voxels = [voxels for voxels in task.input_voxels(prompts, seeds, batch) for _ in range(K)]
        # prompt and seed of each of the n = G K samples
        sample_prompts = [prompt for prompt in prompts for _ in range(K)]
        sample_seeds = [group_seed for group_seed in seeds for _ in range(K)]
        noise_seeds = [derive_seed("sample", group_seed, k) for group_seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, sample_prompts, noise_seeds, sample_voxels)
        trained_scores, _ = task.scores(latents, sample_prompts, sample_seeds)  # [R, n]
        # [R, n] -> [G, K]
        weighted_rewards = (weights * trained_scores).sum(0).view(-1, K)
        # controls shuffle or negate the rewards before samples are ordered
        rewards = apply_control(weighted_rewards, config.use, seeds)
        # the pairs of all batches stay in memory until the training, so they are moved off the device
        cpu_latents = [to_cpu(latent) for latent in separate(latents)]
        for group_number, (prompt, group_rewards) in enumerate(zip(prompts, rewards, strict=True)):
            # indices of the samples from best to worst; stable, so that equal rewards give the same pairs
            # everywhere
            ranking = group_rewards.argsort(descending=True, stable=True).tolist()
            # for an odd K the middle sample has no partner
            for k in range(K // 2):
                high_index = ranking[k]
                low_index = ranking[-1 - k]  # k-th from the end
                if group_rewards[high_index] > group_rewards[low_index]:
                    pairs.append(
                        PreferencePair(
                            id=f"{i + group_number}-{k}",
                            condition=prompt,
                            stage=task.stage.name,
                            preferred=cpu_latents[group_number * K + high_index],
                            rejected=cpu_latents[group_number * K + low_index],
                            source="loop",
                            reward_preferred=float(group_rewards[high_index]),
                            reward_rejected=float(group_rewards[low_index]),
                        )
                    )
    return pairs


def drift(
    task: Task, model: torch.nn.Module, config: OnlineConfig, prompts: Sequence[str], seed: int
) -> float:
    """Measure the mean KL divergence of a tuned network's sampler steps from those of the untuned network.

    The mean is over all steps of two new samples of every third prompt. The sampler is the same for all
    losses: every step except the last adds noise, by the process in closed form (steps.ExactStep).

    Args:
        task: stage, with the untuned network.
        model: tuned network of the stage.
        config: settings of the training, from which the number of sampler steps is taken.
        prompts: prompts of the samples.
        seed: seed of the noises.
    """
    # with these settings the results of different arms can be compared
    common_config = replace(
        config, loss="grpo", group=2, window=None, trained_steps=None, sde_step="exact", noise=0.7
    )
    explorer = Explorer(
        task=task, config=common_config, policy=model, reference=FrozenModel(shared_copy(task.stage.model))
    )
    prompts = prompts[::3]  # every third prompt, to save time
    seeds = [derive_seed("drift", seed, prompt) % 2**31 for prompt in prompts]
    noisy_steps = range(len(explorer.steps) - 1)  # the last step has no density
    divergences = []  # [n] each, for every pass and step
    for samples in explorer.draw(prompts, seeds, noisy_steps, noisy_steps):
        divergences += [move.ref_divergence for move in samples.moves]
    return float(torch.cat(divergences).mean())


# Rewards by name, for which a stage can be tuned. A plugin (docs/extending.md) adds its own to `REWARDS`.

CHOOSER = "chooser"  # name of the held-out reward that is the problem's evaluator for early stopping
# name -> function that creates the reward, called once in a process
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {"solid": solid_reward}


# name of a reward that reads the stage's latents, and is trained on the problem's pairs of the stage
LATENT = "latent"


def reward_of(
    name: str,
    problem: Problem,
    stage: FlowStage | None = None,
    served: Callable[[str], AssetReward] | None = None,
) -> AssetReward:
    """Return the reward `name` for a problem.

    The name "own" gives the reward of the problem itself. The name "latent" trains a reward of the stage's
    latents, and the path of a .safetensors file reads such a reward. An address names a reward from another
    process. Other names are keys of REWARDS.

    Args:
        name: name of the reward, or path of a file.
        problem: problem with the generator and its pairs.
        stage: stage whose latents are scored; None: rewards of latents are not available.
        served: function that makes the reward of an address; None: such rewards are not available.

    Raises: ValueError if there is no reward of this name, and for "own" if the problem has no reward.
    """
    if name == PROBLEM_REWARD:
        if problem.reward is None:
            raise ValueError(
                f"--reward: {PROBLEM_REWARD!r}, which is the default, names the reward of the generator, but"
                " this generator has none. Pass the name of another reward, for example of a plugin."
            )
        return problem.reward
    if stage is not None and name == LATENT:
        return from_problem(problem, stage.name)
    # the size of the conditioning is the same for all prompts, so the first one is enough
    if stage is not None and name.endswith(".safetensors"):
        return load(Path(name), problem.pipeline, stage, problem.train_prompts[0])
    if served is not None and is_served(name):
        return served(name)
    if name not in REWARDS:
        reward_names_text = ", ".join((PROBLEM_REWARD, LATENT, "http://HOST/score", "judge:URL", *REWARDS))
        raise ValueError(
            f"--reward: there is no reward {name!r}. Choose one of {reward_names_text}, or load the plugin"
            " that registers it."
        )
    return REWARDS[name](problem)


def heldout_scores(
    problem: Problem, trained_names: Collection[str], assets: Sequence, prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Score N assets by the held-out rewards: name of a reward that is not trained on -> scores [N].

    Args:
        problem: problem with the rewards and evaluators.
        trained_names: names of the trained rewards.
        assets: finished assets, [N].
        prompts: prompts of the assets, [N].
    """
    # the final evaluator is not among them, since it must stay unused until the table
    scores: dict[str, torch.Tensor] = {}
    if problem.reward is not None and PROBLEM_REWARD not in trained_names:
        scores[PROBLEM_REWARD] = problem.reward(assets, prompts)
    if problem.chooser is not None:
        scores[CHOOSER] = problem.chooser(assets, prompts)
    measures = problem.measures or problem.parts
    return scores | dict(measures(assets, prompts) if measures is not None else {})


def _served_reward(run: OnlineRun, problem: Problem, name: str) -> AssetReward:
    """Make the reward of an address, see `served_rewards.served_reward`."""
    # imported here, because most runs need no renderer
    from eg3d_rlhf.tuning.flow.training.online.served_rewards import served_reward

    return served_reward(name, problem, run.served)


def bench_of(run: OnlineRun, opened: Opened, seed: int) -> OnlineBench:
    """Create the training data and settings of a run's arms, for one training seed.

    Args:
        run: settings of the run.
        opened: the problem and None, since online runs have no labels.
        seed: training seed.
    """
    problem = opened[0]
    weights = parse_weights(run.reward)  # by name of the reward
    stage = run.stage_in(problem)
    rewards = {
        name: reward_of(name, problem, stage, partial(_served_reward, run, problem)) for name in weights
    }
    # if all rewards read latents, nothing is decoded in training, and so no held-out reward can be scored
    reads_latents_only = all(isinstance(reward, LatentReward) for reward in rewards.values()) and not run.gate
    task = Task(
        pipeline=problem.pipeline,
        stage=stage,
        rewards=rewards,
        weights=tuple(weights.values()),
        prompts=problem.train_prompts,
        heldout=None if reads_latents_only else partial(heldout_scores, problem, weights),
        # comma-separated names
        gate=tuple(name.strip() for name in run.gate.split(",")) if run.gate else (),
    )

    def compute_weighted_reward(assets: Sequence, prompts: Sequence[str]) -> torch.Tensor:
        """Compute the weighted sum of the trained rewards, [N]; it is the table's evaluator "reward"."""
        scores = [weights[name] * reward(assets, prompts) for name, reward in rewards.items()]
        return torch.stack(scores).sum(0)

    losses = replace(
        run.losses,
        **{field.name: getattr(run.losses, field.name).for_stage(stage, seed) for field in fields(Losses)},
    )
    # the table evaluates the trained reward, so the weighted sum replaces the reward of the problem
    evaluated_problem = replace(
        problem, reward=compute_weighted_reward, parts=problem.measures or problem.parts
    )
    return OnlineBench(
        evaluated_problem,
        stage,
        run.dpo.for_stage(stage, seed),
        task,
        losses,
        # settings that are not defaults, so that the identity of other runs stays as it was
        {**problem.identity, "reward": run.reward, **run.served.to_values()},
    )
