"""Generate groups of samples from a network, and score the assets that they are decoded to.

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

# (assets, prompts) -> scores [N] by name
HeldOutScores = Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]]
Frozen = FrozenModel | Snapshot


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task of online tuning: a stage, whose samples are completed to assets, and rewards that score them."""

    pipeline: Pipeline
    stage: FlowStage
    rewards: Mapping[str, AssetReward]  # rewards that are trained on
    conditions: Sequence[str]  # prompts to train on
    weights: Sequence[float] = (1.0,)  # one of each reward
    heldout: HeldOutScores | None = None  # rewards that are not trained on
    # names of held-out rewards: the distance is penalised where they rank a sample below the trained reward
    gate: Sequence[str] = ()
    # networks of the other stages; those that are not named are the pipeline's own
    others: Models = field(default_factory=dict)

    def given(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> list[Voxels]:
        """Generate the voxels that the earlier stages hand to this one, [N]."""
        return voxels_for(self.pipeline, self.stage.name, prompts, seeds, self.others, batch)

    def assets(self, x_0: Batch, prompts: Sequence[str], seeds: Sequence[int]) -> Sequence:
        """Complete latents of the stage to assets [N], by the later stages with these seeds."""
        names = [stage.name for stage in self.pipeline.stages]
        later = names[names.index(self.stage.name) + 1 :]
        # the last stage's latents are decoded directly
        if not later:
            return self.pipeline.decode(x_0)
        places = self.pipeline.advance(self.stage.name, x_0)
        return generate(self.pipeline, prompts, seeds, self.others, len(seeds), {later[0]: places})

    def scores(
        self, x_0: Batch, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score latents: rewards [R, N] float32 on the CPU, and held-out rewards by name, [N] each.

        Raises: ValueError for a reward that is not finite.
        """
        # latent rewards read x_0 itself; decoding is skipped if no other reward is asked for
        read = {name: reward for name, reward in self.rewards.items() if isinstance(reward, LatentReward)}
        decoded = len(read) < len(self.rewards) or self.heldout is not None
        assets = self.assets(x_0, prompts, seeds) if decoded else []
        trained = {
            name: read[name].of_latents(x_0, prompts) if name in read else reward(assets, prompts)
            for name, reward in self.rewards.items()
        }
        heldout = {} if self.heldout is None else dict(self.heldout(assets, prompts))
        # a single NaN would make the advantages of its whole group NaN
        for name, values in (trained | heldout).items():
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"reward {name}: expected finite scores, got {values.tolist()}. Correct the reward."
                )
        return _cpu(torch.stack(list(trained.values()))), {
            name: _cpu(values) for name, values in heldout.items()
        }


def _cpu(values: torch.Tensor) -> torch.Tensor:
    """Detach values and move them to the CPU as float32."""
    return values.detach().float().cpu()


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step of the sampler as it was sampled, without gradient."""

    step: Step
    x: Batch  # n samples before the step
    to: Batch  # the samples after it
    mean: Batch  # mean of the sampling policy's step
    reference: Batch  # mean of the reference's step
    log_p: torch.Tensor  # [n], log density of `to` under the sampling policy
    far: torch.Tensor  # [n], divergence of the sampling policy's step from the reference's
    v: Batch  # velocities of the sampling policy
    v_ref: Batch  # velocities of the reference


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one pass."""

    conditions: Sequence[str]  # [n], prompts
    seeds: Sequence[int]  # [n], seed of each sample's group
    members: Sequence[int]  # [n], index of each sample in its group
    given: Sequence[Voxels]  # [n], from the earlier stages
    cond: Condition  # n rows
    no_cond: Condition | None  # n rows; None without guidance
    x_0: Batch  # finished samples
    moves: Sequence[Move] = ()  # the steps that are trained on


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
        noisy: Collection[int] | None = None,
        kept: Collection[int] = (),
    ) -> list[Drawn]:
        """Generate the samples of groups, in passes.

        All samples of a group have the same input from the earlier stages, and the same noise in the later
        ones, both from the group's seed. So rewards of a group differ by this stage's noise alone.
        Args: noisy: steps of the sampler that add noise, None for the stage's own sampler; kept: those that
            are trained on.
        """
        K = self.config.group
        stage = self.task.stage
        pipeline = self.task.pipeline
        size = self.config.batch_gpu or len(prompts) * K
        given = self.task.given(prompts, seeds, size)
        # [G * K], the members of a group side by side
        members = [
            (prompt, seed, k, places)
            for prompt, seed, places in zip(prompts, seeds, given, strict=True)
            for k in range(K)
        ]
        drawn = []
        for i in range(0, len(members), size):
            # one pass: a slice that may begin and end inside a group
            names, group_seeds, numbers, places = map(list, zip(*members[i : i + size], strict=True))
            cond = to_device(pipeline.conditions(names, stage.name), self.device)
            no_cond = None
            # without guidance the empty conditioning is not needed
            if self.sampling.cfg_strength:
                no_cond = to_device(pipeline.no_condition(len(names), stage.name), self.device)

            # the defaults bind this pass's lists: a closure would see those of the last pass
            def noise(move: int, group_seeds=group_seeds, numbers=numbers, places=places) -> Batch:
                """Return the noise of step `move`, [n]; 0 is the start."""
                draws = [
                    derive_seed("move", seed, k, move) for seed, k in zip(group_seeds, numbers, strict=True)
                ]
                return stage_noise(stage, draws, places).to(self.device)

            # losses on finished samples need no record of the steps
            if noisy is None:
                x_0 = sample(replace(stage, model=self.policy), noise(0), cond, no_cond, self.sampling)
                moves = list[Move]()
            else:
                x_0, moves = self._chain(noise, noisy, kept, cond, no_cond)
            drawn.append(
                Drawn(
                    conditions=names,
                    seeds=group_seeds,
                    members=numbers,
                    given=places,
                    cond=cond,
                    no_cond=no_cond,
                    x_0=x_0,
                    moves=moves,
                )
            )
        return drawn

    @torch.no_grad()
    def _chain(
        self,
        noise: Callable[[int], Batch],
        noisy: Collection[int],
        kept: Collection[int],
        cond: Condition,
        no_cond: Condition | None,
    ) -> tuple[Batch, list[Move]]:
        """Generate samples step by step, and record the steps in `kept`.

        Args: noise: returns standard normal noise, for 0 the start and for i + 1 that of step i.
        """
        x = noise(0)
        moves = list[Move]()
        for i, step in enumerate(self.steps):
            v = self.velocity(x, step.t, cond, no_cond)
            # the last step adds no noise, see steps_of
            if i not in noisy or i == len(self.steps) - 1:
                x = without_noise(step).mean(x, v)
                continue
            mean = step.mean(x, v)
            to = with_feats(mean, feats_of(mean) + step.std * feats_of(noise(i + 1)))
            if i in kept:
                # the reference is evaluated at the policy's x, so that both steps start from the same point
                v_ref = self._guided(
                    functools.partial(self.reference.velocity, self.task.stage), x, step.t, cond, no_cond
                )
                other = step.mean(x, v_ref)
                log_p = log_density(to, mean, step.std)
                far = divergence(mean, other, step.std)
                moves.append(
                    Move(
                        step=step,
                        x=x,
                        to=to,
                        mean=mean,
                        reference=other,
                        log_p=log_p,
                        far=far,
                        v=v,
                        v_ref=v_ref,
                    )
                )
            x = to
        return x, moves

    def velocity(self, x: Batch, t: float, cond: Condition, no_cond: Condition | None) -> Batch:
        """Compute the policy's velocity with guidance, in float32.

        Differentiable in: the policy's parameters.
        """
        with evaluating(self.policy):
            return self._guided(
                functools.partial(self.task.stage.velocity, model=self.policy), x, t, cond, no_cond
            )

    def _guided(
        self, velocity: Callable[..., Batch], x: Batch, t: float, cond: Condition, no_cond: Condition | None
    ) -> Batch:
        """Apply classifier-free guidance to a velocity function, in float32."""
        return single(guided(self.task.stage.path, velocity, x, t, cond, no_cond, self.sampling))
