"""Groups of samples from a network, and what rewards say of the assets that they become.

Everything that is drawn derives from (seed, update, group, member, step of the sampler) alone: neither passes
nor ranks change it.

Shape letters as in sparse.py; R rewards, G groups, K samples of a group, n samples of a pass.
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

# of (assets, conditions), scores [N] by name
HeldOutScores = Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]]
Frozen = FrozenModel | Snapshot


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage is tuned for: its samples become assets, which rewards score."""

    pipeline: Pipeline
    stage: FlowStage
    rewards: Mapping[str, AssetReward]  # that are trained on
    conditions: Sequence[str]  # to train on
    weights: Sequence[float] = (1.0,)  # of the rewards
    heldout: HeldOutScores | None = None  # rewards that are not trained on
    # of the held-out ones: the distance is paid where they do not confirm what is trained on
    gate: Sequence[str] = ()
    # networks of the other stages; those that are not named are the pipeline's own
    others: Models = field(default_factory=dict)

    def given(self, conditions: Sequence[str], seeds: Sequence[int], batch: int) -> list[Voxels]:
        """What the stages before leave to this one, [N]."""
        return voxels_for(self.pipeline, self.stage.name, conditions, seeds, self.others, batch)

    def assets(self, x_0: Batch, conditions: Sequence[str], seeds: Sequence[int]) -> Sequence:
        """[N], that the stages behind make of latents with these seeds."""
        names = [stage.name for stage in self.pipeline.stages]
        behind = names[names.index(self.stage.name) + 1 :]
        if not behind:
            return self.pipeline.decode(x_0)
        places = self.pipeline.advance(self.stage.name, x_0)
        return generate(self.pipeline, conditions, seeds, self.others, len(seeds), {behind[0]: places})

    def scores(
        self, x_0: Batch, conditions: Sequence[str], seeds: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rewards [R, N] float32 on the CPU, and held-out rewards, [N] each.

        Raises: ValueError for a reward that is not finite.
        """
        read = {name: reward for name, reward in self.rewards.items() if isinstance(reward, LatentReward)}
        decoded = len(read) < len(self.rewards) or self.heldout is not None
        assets = self.assets(x_0, conditions, seeds) if decoded else []
        trained = {
            name: read[name].of_latents(x_0, conditions) if name in read else reward(assets, conditions)
            for name, reward in self.rewards.items()
        }
        heldout = {} if self.heldout is None else dict(self.heldout(assets, conditions))
        for name, values in (trained | heldout).items():
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"reward {name}: expected finite rewards, got {values.tolist()}. Correct the reward."
                )
        return _cpu(torch.stack(list(trained.values()))), {
            name: _cpu(values) for name, values in heldout.items()
        }


def _cpu(values: torch.Tensor) -> torch.Tensor:
    return values.detach().float().cpu()


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step of the sampler as it was drawn."""

    step: Step
    x: Batch  # n samples
    to: Batch
    mean: Batch  # of the policy that drew it
    reference: Batch  # of the reference's step
    log_p: torch.Tensor  # [n], of the policy that drew it
    far: torch.Tensor  # [n], divergence from the reference
    v: Batch  # velocities, of the policy that drew and
    v_ref: Batch  # of the reference


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one pass."""

    conditions: Sequence[str]  # [n]
    seeds: Sequence[int]  # [n], of their groups
    members: Sequence[int]  # [n], numbers in their groups
    given: Sequence[Voxels]
    cond: Condition
    no_cond: Condition | None
    x_0: Batch
    moves: Sequence[Move] = ()  # that are trained on


@dataclass(kw_only=True)
class Explorer:
    """Draws groups of samples from a policy, and compares its steps with those of a frozen network."""

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
        conditions: Sequence[str],
        seeds: Sequence[int],
        noisy: Collection[int] | None = None,
        kept: Collection[int] = (),
    ) -> list[Drawn]:
        """Samples of groups, by pass.

        All of a group have what the stages before made of its seed, and the stages behind have the noise of
        its seed: rewards differ by this stage's noise alone.
        Args: noisy: steps of the sampler that draw noise, None for the stage's own sampler; kept: those that
            are trained on.
        """
        K = self.config.group
        stage = self.task.stage
        pipeline = self.task.pipeline
        size = self.config.batch_gpu or len(conditions) * K
        given = self.task.given(conditions, seeds, size)
        members = [
            (condition, seed, k, places)
            for condition, seed, places in zip(conditions, seeds, given, strict=True)
            for k in range(K)
        ]
        drawn = []
        for i in range(0, len(members), size):
            names, group_seeds, numbers, places = map(list, zip(*members[i : i + size], strict=True))
            cond = to_device(pipeline.conditions(names, stage.name), self.device)
            no_cond = None
            if self.sampling.cfg_strength:
                no_cond = to_device(pipeline.no_condition(len(names), stage.name), self.device)

            def noise(move: int, group_seeds=group_seeds, numbers=numbers, places=places) -> Batch:
                draws = [
                    derive_seed("move", seed, k, move) for seed, k in zip(group_seeds, numbers, strict=True)
                ]
                return stage_noise(stage, draws, places).to(self.device)

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
        """Samples, step by step.

        Args: noise: standard normal numbers, of 0 the start and of i + 1 the noise of step i.
        """
        x = noise(0)
        moves = list[Move]()
        for i, step in enumerate(self.steps):
            v = self.velocity(x, step.t, cond, no_cond)
            if i not in noisy or i == len(self.steps) - 1:
                x = without_noise(step).mean(x, v)
                continue
            mean = step.mean(x, v)
            to = with_feats(mean, feats_of(mean) + step.std * feats_of(noise(i + 1)))
            if i in kept:
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
        """The policy's, with guidance, in float32. Differentiable in: the policy's parameters."""
        with evaluating(self.policy):
            return self._guided(
                functools.partial(self.task.stage.velocity, model=self.policy), x, t, cond, no_cond
            )

    def _guided(
        self, velocity: Callable[..., Batch], x: Batch, t: float, cond: Condition, no_cond: Condition | None
    ) -> Batch:
        return single(guided(self.task.stage.path, velocity, x, t, cond, no_cond, self.sampling))
