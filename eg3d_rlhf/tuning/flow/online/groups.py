"""One update of GRPO: groups of samples from the policy as it is, their rewards, and steps of the optimiser on them.

Everything that is drawn derives from (seed, update, group, member, step of the sampler) alone: neither passes nor ranks change it.

Shape letters as in sparse.py; G groups, K samples of a group, n samples of a pass.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.sparse import Batch, feats_of, with_feats
from eg3d_rlhf.tuning.flow.conditions import Condition, to_device
from eg3d_rlhf.tuning.flow.generate import Models, evaluating, generate, guided, stage_noise, voxels_for
from eg3d_rlhf.tuning.flow.online.advantages import advantages, as_used
from eg3d_rlhf.tuning.flow.online.losses.clip import clipped_loss, outside
from eg3d_rlhf.tuning.flow.online.steps import Step, divergence, log_density, steps_of
from eg3d_rlhf.tuning.flow.reference import FrozenModel
from eg3d_rlhf.tuning.flow.stage import AssetReward, FlowStage, Pipeline, Sampling, Voxels
from eg3d_rlhf.tuning.flow.train import Descent, Judge, StageResult, StageTraining, train, train_knob, trained, win_rate_signs, win_rates
from eg3d_rlhf.tuning.flow.train_pairs import Order
from training.config import knob
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed, sum_over_ranks
from training.storage import checksum

_grpo = functools.partial(knob, group="GRPO")
ALIKE = 0.9  # share of groups without any spread that is said
CALM = "Raise --kl, lower --lr, or train fewer updates."


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(StageTraining):
    """Everything that decides a training besides its networks, conditions and reward; the defaults suit large generators."""

    steps: int = train_knob(300, "Length of a stage's training.", metavar="UPDATES", low=1)
    lr: float = train_knob(3e-4, "AdamW's learning rate.", above=0)
    warmup: int = train_knob(10, "Over which the learning rate rises from 0.", metavar="UPDATES", low=0, rare=True)
    group: int = _grpo(8, "Samples of one condition, compared with each other.", low=2)
    batch: int = _grpo(8, "Conditions per update, over all processes.", metavar="GROUPS", low=1)
    batch_gpu: int | None = _grpo(None, "Per pass: decides memory, not the result.", metavar="SAMPLES", low=1, shown="all of a process",
                                  rare=True)
    passes: int = _grpo(2, "Steps of the optimiser on the samples of an update.", low=1, rare=True)
    clip_range: float = _grpo(1e-3, "Of ratios of densities (of their mean over a sample's numbers), about 1.", above=0, rare=True)
    kl: float = _grpo(0.04, "Weight of the divergence from the untuned network, mean over numbers and steps.", low=0)
    sampler_steps: int | None = _grpo(None, "Of the sampler in training.", low=2, shown="the stage's own", rare=True)
    trained_steps: int | None = _grpo(None, "Of these, drawn anew for every update; none: all but the last, which draws nothing.", low=1,
                                      rare=True)
    noise: float = _grpo(0.7, "Level of the sampler's noise, a.", name="sde_noise", above=0, rare=True)
    use: str = "reward"  # or a control's: see advantages.USES

    def __post_init__(self):
        super().__post_init__()
        if self.lora is not None and self.lora.dropout:
            got = f"got {self.lora.dropout}"
            raise ValueError(f"GrpoConfig.lora: expected adapters without dropout, {got}: densities would be those of another network.")

    def sampling(self, stage: FlowStage) -> Sampling:
        """Of the sampler in training: the stage's own guidance and spacing of times."""
        sampling = replace(stage.sampling, steps=self.sampler_steps or stage.sampling.steps)
        most = sampling.steps - 1
        if most < 1 or self.trained_steps is not None and self.trained_steps > most:
            got = f"{self.trained_steps or 1} of {sampling.steps}"
            raise ValueError(f"--trained-steps: expected at most all steps of the sampler but the last, got {got}. Change one.")
        return sampling


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage is tuned for: its samples become assets, which a reward scores."""

    pipeline: Pipeline
    stage: FlowStage
    reward: AssetReward
    conditions: Sequence[str]  # to train on
    others: Models = field(default_factory=dict)  # networks of the other stages; those that are not named are the pipeline's own

    def given(self, conditions: Sequence[str], seeds: Sequence[int], batch: int) -> list[Voxels]:
        """What the stages before leave to this one, [N]."""
        return voxels_for(self.pipeline, self.stage.name, conditions, seeds, self.others, batch)

    def rewards(self, x_0: Batch, conditions: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """[N] float32 on the CPU, of the assets that the stages behind make of latents with these seeds.

        Raises: ValueError for a reward that is not finite.
        """
        names = [stage.name for stage in self.pipeline.stages]
        behind = names[names.index(self.stage.name) + 1 :]
        if behind:
            places = self.pipeline.advance(self.stage.name, x_0)
            assets = generate(self.pipeline, conditions, seeds, self.others, len(seeds), {behind[0]: places})
        else:
            assets = self.pipeline.decode(x_0)
        rewards = self.reward(assets, conditions).detach().float().cpu()
        if not bool(rewards.isfinite().all()):
            raise ValueError(f"{type(self.reward).__name__}: expected finite rewards, got {rewards.tolist()}. Correct the reward.")
        return rewards


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step of the sampler as it was drawn."""

    step: Step
    x: Batch  # n samples
    to: Batch
    log_p: torch.Tensor  # [n], of the policy that drew it
    reference: Batch  # mean of the reference's step
    far: torch.Tensor  # [n], divergence from it


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one pass."""

    cond: Condition
    no_cond: Condition | None
    moves: Sequence[Move]  # that are trained on
    x_0: Batch


@dataclass(kw_only=True)
class Explorer:
    """Draws groups of samples from a policy, and compares its steps with those of a frozen network."""

    task: Task
    config: GrpoConfig
    policy: torch.nn.Module
    reference: FrozenModel

    def __post_init__(self):
        stage = self.task.stage
        self.device = next(stage.model.parameters()).device
        self.sampling = self.config.sampling(stage)
        self.steps = steps_of(stage.path, self.sampling, self.config.noise)

    def draw(self, conditions: Sequence[str], seeds: Sequence[int], kept: Sequence[int]) -> tuple[list[Drawn], torch.Tensor]:
        """Samples of groups, by pass, and their rewards [G, K].

        All of a group have what the stages before made of its seed, and the stages behind have the noise of its seed: rewards differ by
        this stage's noise alone.
        """
        K, stage, pipeline = self.config.group, self.task.stage, self.task.pipeline
        size = self.config.batch_gpu or len(conditions) * K
        given = self.task.given(conditions, seeds, size)
        members = [(condition, seed, k, places) for condition, seed, places in zip(conditions, seeds, given, strict=True) for k in range(K)]
        drawn, rewards = [], []
        for i in range(0, len(members), size):
            names, group_seeds, number, places = map(list, zip(*members[i : i + size], strict=True))
            cond, no_cond = to_device(pipeline.conditions(names, stage.name), self.device), None
            if self.sampling.cfg_strength:
                no_cond = to_device(pipeline.no_condition(len(names), stage.name), self.device)

            def noise(move: int, group_seeds=group_seeds, number=number, places=places) -> Batch:
                draws = [derive_seed("move", seed, k, move) for seed, k in zip(group_seeds, number, strict=True)]
                return stage_noise(stage, draws, places).to(self.device)

            drawn.append(self._drawn(noise, kept, cond, no_cond))
            rewards.append(self.task.rewards(drawn[-1].x_0, names, group_seeds))
        return drawn, torch.cat(rewards).view(-1, K)

    @torch.no_grad()
    def _drawn(self, noise: Callable[[int], Batch], kept: Sequence[int], cond: Condition, no_cond: Condition | None) -> Drawn:
        """Samples, step by step. Args: noise: standard normal numbers, of 0 the start and of i + 1 the noise of step i."""
        x, moves = noise(0), list[Move]()
        for i, step in enumerate(self.steps[:-1]):
            mean = step.mean(x, self.velocity(x, step.t, cond, no_cond))
            to = with_feats(mean, feats_of(mean) + step.std * feats_of(noise(i + 1)))
            if i in kept:
                other = step.mean(x, self._reference(x, step.t, cond, no_cond))
                log_p, far = log_density(to, mean, step.std), divergence(mean, other, step.std)
                moves.append(Move(step=step, x=x, to=to, log_p=log_p, reference=other, far=far))
            x = to
        last = self.steps[-1]
        return Drawn(cond=cond, no_cond=no_cond, moves=moves, x_0=last.mean(x, self.velocity(x, last.t, cond, no_cond)))

    def velocity(self, x: Batch, t: float, cond: Condition, no_cond: Condition | None) -> Batch:
        """The policy's, with guidance, in float32. Differentiable in: the policy's parameters."""
        with evaluating(self.policy):
            return self._guided(functools.partial(self.task.stage.velocity, model=self.policy), x, t, cond, no_cond)

    def _reference(self, x: Batch, t: float, cond: Condition, no_cond: Condition | None) -> Batch:
        return self._guided(functools.partial(self.reference.velocity, self.task.stage), x, t, cond, no_cond)

    def _guided(self, velocity: Callable[..., Batch], x: Batch, t: float, cond: Condition, no_cond: Condition | None) -> Batch:
        v = guided(self.task.stage.path, velocity, x, t, cond, no_cond, self.sampling)
        return with_feats(v, feats_of(v).float())


class GroupUpdates(Descent):
    """What a stage's parameters go through on groups of their own samples.

    Args: as Descent; reference: the frozen network.
    Raises: ValueError where groups cannot be divided over ranks.
    """

    columns = (("reward", "reward", "<+8.4f"), ("spread", "spread", "<7.4f"), ("kl", "kl", "<8.2e"), ("clipped", "clipped", "<5.3f"))

    def __init__(
        self, task: Task, config: GrpoConfig, policy: torch.nn.Module, parameters: Iterable[torch.nn.Parameter], reference: FrozenModel,
        ranks: Ranks,
    ):
        super().__init__(task.stage, config, policy, parameters, ranks)
        if config.batch % ranks.world:
            raise ValueError(f"--batch: expected a multiple of {ranks.world} processes, got {config.batch} groups. Change one.")
        self.config, self.order = config, Order(task.conditions, config.batch, config.seed)
        self.explorer = Explorer(task=task, config=config, policy=policy, reference=reference)

    def run(self, step: int) -> dict:
        """See Descent: samples, their reward and its spread within groups, kl of the policy that drew them, and the share of densities
        that were clipped."""
        config, K = self.config, self.config.group
        numbered = list(enumerate(self.order.items(step)))[self.ranks.rank :: self.ranks.world]
        conditions = [condition for _, (_, condition) in numbered]
        seeds = [derive_seed("group", config.seed, step, number) % 2**31 for number, _ in numbered]
        drawn, rewards = self.explorer.draw(conditions, seeds, self._kept(step))
        figures = {"samples": config.batch * K, **self._told(drawn, rewards), "loss": 0.0, "grad_norm": 0.0, "clipped": 0.0}
        advantage = advantages(as_used(rewards, config.use, seeds)).flatten().to(self.device)
        for _ in range(config.passes):
            self.optimizer.zero_grad(set_to_none=True)
            totals = torch.zeros(3, device=self.device)
            for samples, of_samples in zip(drawn, advantage.split(config.batch_gpu or len(advantage)), strict=True):
                totals += self._pass(samples, of_samples)
            sum_over_ranks(self.ranks, self.parameters, [totals])
            mass, loss, norm, cut = self.descend(step, totals, "conditions " + ", ".join(conditions[:3]))
            for name, value in {"loss": loss, "grad_norm": norm, "clipped": cut / mass}.items():
                figures[name] += value / config.passes
        return figures

    def _told(self, drawn: Sequence[Drawn], rewards: torch.Tensor) -> dict[str, float]:
        """Means over the samples of all ranks; alike: the share of groups whose rewards are all one."""
        alike = (rewards == rewards[:, :1]).all(1).float()
        far = torch.cat([move.far for samples in drawn for move in samples.moves]).mean().cpu()
        told = torch.stack([rewards.mean(), rewards.std(1, correction=0).mean(), alike.mean(), far]).to(self.device)
        sum_over_ranks(self.ranks, [], [told])
        return dict(zip(("reward", "spread", "alike", "kl"), (told / self.ranks.world).tolist(), strict=True))

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        signs = win_rate_signs(win_rates(lines), CALM)
        last = [line for line in lines if "alike" in line][-3:]
        if len(last) == 3 and min(line["alike"] for line in last) > ALIKE:
            signs["alike"] = (
                f"step {last[-1]['step']}: within {last[-1]['alike']:.0%} of the groups all rewards are alike, and teach nothing. Raise "
                "--group or --sde-noise, or take a finer reward."
            )
        return signs

    def _kept(self, step: int) -> list[int]:
        """Numbers of the sampler's steps that the update trains on."""
        several, most = self.config.trained_steps, len(self.explorer.steps) - 1
        if several is None:
            return list(range(most))
        generator = torch.Generator().manual_seed(derive_seed("trained steps", self.config.seed, step))
        return sorted(torch.randperm(most, generator=generator)[:several].tolist())

    def _pass(self, drawn: Drawn, advantage: torch.Tensor) -> torch.Tensor:
        """Add the gradients of some samples; returns sums over them and their moves [3]: how many, loss, clipped."""
        totals = torch.zeros(3, device=self.device)
        for move in drawn.moves:
            mean = move.step.mean(move.x, self.explorer.velocity(move.x, move.step.t, drawn.cond, drawn.no_cond))
            log_p, far = log_density(move.to, mean, move.step.std), divergence(mean, move.reference, move.step.std)
            loss = (clipped_loss(log_p, move.log_p, advantage, self.config.clip_range) + self.config.kl * far).sum()
            loss.backward()
            cut = outside(torch.exp(log_p - move.log_p), advantage, self.config.clip_range).stopped.sum()
            totals += torch.stack([totals.new_tensor(len(advantage)), loss.detach(), cut])
        return totals


def train_online(
    task: Task, config: GrpoConfig, out: Path, known: Mapping, *, held_out: Judge | None = None, ranks: Ranks = SINGLE,
    resume: bool = False, say: Callable[[str], None] = print,
) -> StageResult:
    """Train a copy of a stage's network by GRPO, as train_pairs.py trains on pairs: the same folder, lines, states and resume.

    Args: known: JSON that names the reward and the networks of the other stages; others: see train_stage.
    Raises: ValueError for no conditions, or settings that do not fit; further as train_stage.
    """
    config.sampling(task.stage)  # validates
    base = checksum(task.stage.model.state_dict(), type(task.stage.model).__name__)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> GroupUpdates:
        assert reference is not None
        return GroupUpdates(task, config, policy, trained(policy).values(), reference, run.ranks)

    options = {"base": base, "conditions": list(task.conditions), **known}
    return train(task.stage, config, options, start, Path(out), held_out=held_out, ranks=ranks, resume=resume, say=say)
