"""Generate groups of samples from a network, and score the assets that they are decoded to.

A group is several samples of one prompt. A move is one step of the sampler with noise, as it was sampled.

All random numbers depend on (seed, update, group, member, step of the sampler) alone, so the number of passes
and ranks does not change them.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; R rewards, G groups, K samples of a group,
n samples of a pass.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from eg3d_rlhf.models.sparse import Batch, feats_of, single, with_feats
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, to_device
from eg3d_rlhf.tuning.flow.base.sampling import (
    Models,
    evaluating,
    generate,
    guided,
    sample,
    stage_noise,
    voxels_for,
)
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, FlowStage, Pipeline, Voxels
from eg3d_rlhf.tuning.flow.training.latent_reward import LatentReward
from eg3d_rlhf.tuning.flow.training.online.settings import OnlineConfig
from eg3d_rlhf.tuning.flow.training.online.snapshot import Snapshot
from eg3d_rlhf.tuning.flow.training.online.steps import Step, divergence, log_density, steps_of, without_noise
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from training.phases import derive_seed

# function from N assets and their prompts to scores [N] by name of the reward
HeldOutScores = Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]]
Frozen = FrozenModel | Snapshot


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task of online tuning: the stage to tune, the prompts, and the rewards of its samples."""

    pipeline: Pipeline
    stage: FlowStage
    rewards: Mapping[str, AssetReward]  # rewards that are trained on
    prompts: Sequence[str]  # prompts to train on
    weights: Sequence[float] = (1.0,)  # weight of each reward, in the order of `rewards`
    heldout: HeldOutScores | None = None  # rewards that are not trained on; None: there are none
    # names of held-out rewards: the distance is penalised where they rank a sample below the trained reward
    gate: Sequence[str] = ()
    # networks of the other stages, by stage; a stage that is missing has the pipeline's own network
    others: Models = field(default_factory=dict)

    def input_voxels(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> list[Voxels]:
        """Generate the voxels that the earlier stages hand to this stage, one entry for each of N samples.

        Args: prompts: prompts of the samples, [N]; seeds: seeds of the samples, [N]; batch: samples at once.
        """
        return voxels_for(self.pipeline, self.stage.name, prompts, seeds, self.others, batch)

    def assets(self, x_0: Batch, prompts: Sequence[str], seeds: Sequence[int]) -> Sequence:
        """Complete N latents of the stage to N assets by the later stages and the decoder.

        Args:
            x_0: N latents of the stage.
            prompts: prompts of the samples, [N].
            seeds: seeds of the noises of the later stages, [N].
        """
        stage_names = [stage.name for stage in self.pipeline.stages]
        later_stages = stage_names[stage_names.index(self.stage.name) + 1 :]
        # the last stage's latents are decoded directly
        if not later_stages:
            return self.pipeline.decode(x_0)
        voxels = self.pipeline.advance(self.stage.name, x_0)
        return generate(self.pipeline, prompts, seeds, self.others, len(seeds), {later_stages[0]: voxels})

    def scores(
        self, x_0: Batch, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score N latents of the stage by all rewards; assets are decoded only if a reward needs them.

        Args:
            x_0: N latents of the stage.
            prompts: prompts of the samples, [N].
            seeds: seeds of the noises of the later stages, [N].
        Returns: the trained rewards [R, N]; and the held-out rewards by name, [N] each. All are float32 on
            the CPU.

        Raises: ValueError for a reward that is not finite.
        """
        # latent rewards read x_0 itself, so nothing is decoded if there is no other reward
        needs_assets = self.heldout is not None or not all(
            isinstance(reward, LatentReward) for reward in self.rewards.values()
        )
        assets = self.assets(x_0, prompts, seeds) if needs_assets else []
        trained_scores = {}
        for name, reward in self.rewards.items():
            if isinstance(reward, LatentReward):
                trained_scores[name] = reward.score_latents(x_0, prompts)
            else:
                trained_scores[name] = reward(assets, prompts)
        heldout_scores = {} if self.heldout is None else dict(self.heldout(assets, prompts))
        # a single NaN would make the advantages of its whole group NaN
        for name, reward_scores in (trained_scores | heldout_scores).items():
            if not bool(reward_scores.isfinite().all()):
                invalid_count = int((~reward_scores.isfinite()).sum())
                raise ValueError(
                    f"reward {name}: {invalid_count} of {len(reward_scores)} scores are NaN or infinite."
                    " Correct the reward, so that all its scores are finite."
                )
        return _cpu(torch.stack(list(trained_scores.values()))), {
            name: _cpu(reward_scores) for name, reward_scores in heldout_scores.items()
        }


def _cpu(values: torch.Tensor) -> torch.Tensor:
    """Detach values and move them to the CPU as float32."""
    return values.detach().float().cpu()


@dataclass(frozen=True, kw_only=True)
class Move:
    """Record of one sampled step of the sampler, for n samples, without gradient."""

    step: Step
    x: Batch  # n samples before the step
    next_x: Batch  # the samples after the step
    mean: Batch  # mean of the sampling policy's step
    reference: Batch  # mean of the reference's step
    log_p: torch.Tensor  # [n], log density of `next_x` under the sampling policy
    ref_divergence: torch.Tensor  # [n], divergence of the sampling policy's step from the reference's
    v: Batch  # velocities of the sampling policy
    v_ref: Batch  # velocities of the reference


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The n samples that are generated in one pass, with their inputs."""

    prompts: Sequence[str]  # [n], prompts
    seeds: Sequence[int]  # [n], seed of each sample's group
    members: Sequence[int]  # [n], index of each sample in its group
    voxels: Sequence[Voxels]  # [n], voxels from the earlier stages
    cond: Condition  # n rows
    no_cond: Condition | None  # n rows; None without guidance
    x_0: Batch  # the finished samples
    moves: Sequence[Move] = ()  # steps that are trained on


@dataclass(kw_only=True)
class Explorer:
    """Sampler of groups from a policy, which compares the policy's steps with those of a frozen network."""

    task: Task
    config: OnlineConfig
    policy: torch.nn.Module
    reference: Frozen

    def __post_init__(self):
        stage = self.task.stage
        self.device = next(stage.model.parameters()).device
        self.sampling = self.config.sampling(stage)
        self.steps = steps_of(stage.path, self.sampling, self.config.noise, self.config.sde_step)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        noisy_steps: Collection[int] | None = None,
        trained_steps: Collection[int] = (),
    ) -> list[Drawn]:
        """Generate the samples of groups, in passes.

        All samples of a group have the same input from the earlier stages, and the same noise in the later
        stages, both from the group's seed. So the rewards of a group differ by the noise of this stage alone.

        Args:
            prompts: prompt of each group, [G].
            seeds: seed of each group, [G].
            noisy_steps: indices of the sampler's steps that add noise; None: the stage's own sampler, without
                a record of its steps.
            trained_steps: indices of the steps that are trained on, and so recorded.
        """
        K = self.config.group
        stage = self.task.stage
        pipeline = self.task.pipeline
        # by default all samples are generated in one pass
        pass_size = self.config.batch_gpu or len(prompts) * K
        group_voxels = self.task.input_voxels(prompts, seeds, pass_size)
        # one entry for each of the G * K samples; the samples of a group follow each other
        sample_inputs = [
            (prompt, seed, k, voxels)
            for prompt, seed, voxels in zip(prompts, seeds, group_voxels, strict=True)
            for k in range(K)
        ]
        sampled_passes = []
        for i in range(0, len(sample_inputs), pass_size):
            # one pass: a slice that may begin and end inside a group
            pass_prompts, group_seeds, member_indices, voxels = map(
                list, zip(*sample_inputs[i : i + pass_size], strict=True)
            )
            cond = to_device(pipeline.conditioning(pass_prompts, stage.name), self.device)
            no_cond = None
            # without guidance the empty conditioning is not needed
            if self.sampling.cfg_strength:
                no_cond = to_device(pipeline.null_conditioning(len(pass_prompts), stage.name), self.device)

            # the defaults bind the lists of this pass; a closure would read those of the last pass
            def noise(
                noise_number: int, group_seeds=group_seeds, member_indices=member_indices, voxels=voxels
            ) -> Batch:
                """Return the noise of each of n samples: number 0 is the start, i + 1 belongs to step i."""
                noise_seeds = [
                    derive_seed("move", seed, k, noise_number)
                    for seed, k in zip(group_seeds, member_indices, strict=True)
                ]
                return stage_noise(stage, noise_seeds, voxels).to(self.device)

            # losses on finished samples need no record of the steps
            if noisy_steps is None:
                x_0 = sample(replace(stage, model=self.policy), noise(0), cond, no_cond, self.sampling)
                moves = list[Move]()
            else:
                x_0, moves = self._chain(noise, noisy_steps, trained_steps, cond, no_cond)
            sampled_passes.append(
                Drawn(
                    prompts=pass_prompts,
                    seeds=group_seeds,
                    members=member_indices,
                    voxels=voxels,
                    cond=cond,
                    no_cond=no_cond,
                    x_0=x_0,
                    moves=moves,
                )
            )
        return sampled_passes

    @torch.no_grad()
    def _chain(
        self,
        noise: Callable[[int], Batch],
        noisy_steps: Collection[int],
        trained_steps: Collection[int],
        cond: Condition,
        no_cond: Condition | None,
    ) -> tuple[Batch, list[Move]]:
        """Generate samples step by step, and record the steps that are trained on.

        Args:
            noise: function from a number to standard normal noise of n samples. The number 0 gives the noise
                that sampling starts from, and i + 1 the noise of step i.
            noisy_steps: indices of the steps that add noise.
            trained_steps: indices of the steps that are recorded.
            cond: conditioning, n rows.
            no_cond: empty conditioning, n rows; None without guidance.
        Returns: the finished samples; and the recorded steps.
        """
        x = noise(0)
        moves = list[Move]()
        for i, step in enumerate(self.steps):
            v = self.velocity(x, step.t, cond, no_cond)
            # the last step adds no noise, see steps_of
            if i not in noisy_steps or i == len(self.steps) - 1:
                x = without_noise(step).mean(x, v)
                continue
            mean = step.mean(x, v)
            next_x = with_feats(mean, feats_of(mean) + step.std * feats_of(noise(i + 1)))
            if i in trained_steps:
                # the reference is evaluated at the policy's x, so that both steps start from the same point
                v_ref = self._guided(
                    functools.partial(self.reference.velocity, self.task.stage), x, step.t, cond, no_cond
                )
                reference_mean = step.mean(x, v_ref)
                log_p = log_density(next_x, mean, step.std)
                ref_divergence = divergence(mean, reference_mean, step.std)
                moves.append(
                    Move(
                        step=step,
                        x=x,
                        next_x=next_x,
                        mean=mean,
                        reference=reference_mean,
                        log_p=log_p,
                        ref_divergence=ref_divergence,
                        v=v,
                        v_ref=v_ref,
                    )
                )
            x = next_x
        return x, moves

    def velocity(self, x: Batch, t: float, cond: Condition, no_cond: Condition | None) -> Batch:
        """Compute the policy's velocity at x and time t, with the sampler's guidance, in float32.

        Differentiable in: the policy's parameters.
        """
        with evaluating(self.policy):
            return self._guided(
                functools.partial(self.task.stage.velocity, model=self.policy), x, t, cond, no_cond
            )

    def _guided(
        self, velocity: Callable[..., Batch], x: Batch, t: float, cond: Condition, no_cond: Condition | None
    ) -> Batch:
        """Compute a velocity with classifier-free guidance (Ho and Salimans 2022), in float32.

        Args:
            velocity: function of the velocity of a network, such as FrozenModel.velocity.
            x: n samples at time t.
            t: time in 0..1, the same for all samples.
            cond: conditioning, n rows.
            no_cond: empty conditioning, n rows; None without guidance.
        """
        return single(guided(self.task.stage.path, velocity, x, t, cond, no_cond, self.sampling))
