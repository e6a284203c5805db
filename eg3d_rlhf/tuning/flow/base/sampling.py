"""Sampling of finished assets from prompts and seeds, through all stages, and win rates of two generators.

Each stage is sampled by Euler's method, from noise at t = 1 to data at t = 0, with guidance on an interval of
times:

    x <- x - (t - t') v,   v = (1 + w) v_cond - w v_null where lo <= t <= hi, v_cond elsewhere

Times are 1 ... 0 in equal steps, mapped by t -> r t / (1 + (r - 1) t). Guidance enlarges the standard
deviation of x_0; `cfg_rescale` reduces it again.
Sources: TRELLIS (Xiang et al. 2024) for the interval and the mapping; Kynkaanniemi et al. 2024 for guidance
on an interval; Esser et al. 2024, equation 23, for the mapping; Lin et al. 2024, section 3.4, for the
rescaling of guided samples.

Shape letters as in sparse.py and stage.py; N assets.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean

import numpy as np
import torch

from eg3d_rlhf.models.sparse import Batch, count, feats_of, mean_per_sample, spread, with_feats
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, expanded, rows, tensor_of, to_device
from eg3d_rlhf.tuning.flow.base.stage import (
    Asset,
    AssetReward,
    FlowPath,
    FlowStage,
    Pipeline,
    Sampling,
    Voxels,
    stage_of,
)
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm


def times(sampling: Sampling) -> list[float]:
    """Compute the steps + 1 times of the Euler sampler, from exactly 1 down to exactly 0.

    >>> times(Sampling(steps=2, rescale_t=3.0))
    [1.0, 0.75, 0.0]
    """
    r = sampling.rescale_t
    if sampling.single:  # some original programs compute 1 - t, from noise at 0 to data at 1, in float32
        s = torch.linspace(0, 1, sampling.steps + 1)
        _, *inner, _ = (1 - (s / (1 + (r - 1) * (1 - s))).double()).tolist()
    else:
        _, *inner, _ = [r * t / (1 + (r - 1) * t) for t in np.linspace(1, 0, sampling.steps + 1).tolist()]
    # the ends are set: r / (1 + (r - 1)) is 1 + 2^-52 for some r, which lies outside an interval up to 1
    return [1.0, *inner, 0.0]


def guides(sampling: Sampling, t: float) -> bool:
    """Return whether guidance acts at time t. The interval includes both ends, at the sampling's precision.

    >>> sampling = Sampling(steps=5, rescale_t=1.0, cfg_interval=(1 - 0.6, 1.0))
    >>> fourth = times(sampling)[3]  # 0.4, but for the last bit
    >>> guides(sampling, fourth), guides(replace(sampling, time_scale=1000.0), fourth)
    (False, True)
    """
    # both ends belong to the interval
    low, high = sampling.cfg_interval
    scale = sampling.time_scale
    if scale is None:
        return low <= t <= high
    # the original compares float32 numbers of scale * (1 - t), which run from 0 (noise) to scale (data)
    end, at, start = (np.float32(scale * (1 - time)) for time in (low, t, high))
    return bool(start <= at <= end)


def sample(
    stage: FlowStage,
    noise: Batch,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling | None = None,
) -> Batch:
    """Sample latents x_0 from noise, without gradient. The model runs in eval mode; its modes are restored.

    Args:
        noise: N samples, moved to the device of `cond`; cond: N rows; no_cond: N rows or 1, or None where
            guidance is off.
        sampling: None takes the stage's own.
    Raises: ValueError for latents that are not finite.
    """
    x = noise
    for x, _ in trajectory(stage, noise, cond, no_cond, sampling):  # noqa: B007 (the last one is the result)
        pass
    if not torch.isfinite(feats_of(x)).all():
        raise ValueError(
            f"sample: expected finite latents of stage {stage.name!r}, got NaN or infinite numbers. Check the"
            " stage's weights and the conditioning."
        )
    return x


def trajectory(
    stage: FlowStage,
    noise: Batch,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling | None = None,
) -> Iterator[tuple[Batch, Batch]]:
    """Yield, after each step of `sample`, x at the end of the step and the x_0 that its velocity predicts."""
    sampling = sampling or stage.sampling
    n = rows(cond)
    device = tensor_of(cond).device
    assert n == count(noise)
    # a family may have no empty conditioning
    if sampling.cfg_strength and (no_cond is None or rows(no_cond) not in (1, n)):
        got = "None" if no_cond is None else rows(no_cond)
        raise ValueError(
            f"sample(no_cond): expected the empty conditioning, 1 or {n} rows, got {got}. Pass it, or set"
            " cfg_strength to 0."
        )
    x = noise.to(device)
    points = times(sampling)
    # one row for each sample, so that the network gets batches of equal length for both inputs
    no_cond = expanded(no_cond, cond) if no_cond is not None else None
    for t, until in zip(points[:-1], points[1:], strict=True):
        # entered anew at each step: a generator that held them would change the caller's modes between steps
        with torch.no_grad(), evaluating(stage.model):
            at = torch.full([count(x)], t, device=device)
            v = guided(stage.path, stage.velocity, x, t, cond, no_cond, sampling)
            # the x_0 of this step's velocity, before x moves on to the next time
            estimate = stage.path.data(x, at, v)
            # Euler step; times fall, so t - until is the positive length of the step
            x = with_feats(x, feats_of(x) - (t - until) * feats_of(v))
        yield x, estimate


def guided(
    path: FlowPath,
    velocity: Callable[..., Batch],
    x: Batch,
    t: float,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling,
) -> Batch:
    """Evaluate `velocity(x, times, cond, step=length)` at time t, with classifier-free guidance.

    Args: no_cond: N rows of empty conditioning, or None for no guidance.
    """
    at = torch.full([count(x)], t, device=feats_of(x).device)
    # a shortcut network reads the length of the step as another input
    step = 1 / sampling.steps if sampling.shortcut else None
    v = velocity(x, at, cond, step=step)
    w = sampling.cfg_strength
    # without guidance the null pass is saved, which is half of the cost of a guided step
    if not w or no_cond is None or not guides(sampling, t):
        return v
    # TRELLIS's form of guidance: w = 0 is no guidance, w = 1 doubles the difference to the null velocity
    wide = with_feats(v, (1 + w) * feats_of(v) - w * feats_of(velocity(x, at, no_cond, step=step)))
    return narrowed(path, x, at, wide, v, sampling.cfg_rescale) if sampling.cfg_rescale else wide


def narrowed(path: FlowPath, x: Batch, t: torch.Tensor, v: Batch, unguided: Batch, share: float) -> Batch:
    """Rescale the x_0 of a guided velocity v towards the standard deviation of the unguided x_0, per sample.

    Source: Lin et al. 2024, section 3.4.
    Args: t: [N] above 0; share: 0 keeps the guided standard deviation, 1 takes the unguided one.
    """
    x_0_guided = path.data(x, t, v)
    x_0_unguided = path.data(x, t, unguided)
    # [N]; share * (x_0 rescaled) + (1 - share) * x_0, which is one factor on x_0
    factor = share * (std_per_sample(x_0_unguided) / std_per_sample(x_0_guided)) + 1 - share
    return path.velocity_to(x, t, with_feats(x_0_guided, spread(factor, x_0_guided) * feats_of(x_0_guided)))


def std_per_sample(batch: Batch) -> torch.Tensor:
    """Compute the standard deviation over all numbers of each sample, [N].

    Of several tensors by name, the variances are averaged.
    """
    values = feats_of(batch)
    centred = values - spread(mean_per_sample(values, batch), batch)
    return mean_per_sample(centred.square(), batch).sqrt()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Set eval mode within the context, and restore the mode of every module afterwards."""
    # module by module: frozen parts may be in eval mode inside a network in training mode
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# networks by the name of a stage; a stage that is not named keeps its own network
Models = Mapping[str, torch.nn.Module]


def stage_noise(stage: FlowStage, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
    """Make a stage's noise from the seeds of assets, on the CPU.

    The stage's name is part of the seed, so that the stages of one asset have different noise.
    """
    return stage.noise([derive_seed("noise", stage.name, seed) for seed in seeds], given)


def generate(
    pipeline: Pipeline,
    conditions: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch: int = 16,
    stages_given: Mapping[str, Sequence[Voxels]] | None = None,
) -> list[Asset]:
    """Generate one asset per prompt and seed, through all stages in turn.

    A seed fixes the noise of every stage, so that two generators with the same seeds are compared on the same
    latents.

    Args:
        conditions, seeds: [N] each: prompts, and seeds of the noise.
        models: networks in place of the stages' own; batch: assets per batch, which bounds memory.
        stages_given: by the name of one stage, the output of the stages before it, [N]. Those stages are then
            not run.
    Raises: ValueError for lengths or stage names that do not fit, or a structure without a voxel.
    """
    names = [stage.name for stage in pipeline.stages]
    stages_given = stages_given or {}
    assert len(conditions) == len(seeds) and len(stages_given) <= 1
    # raises for a network or an output of a stage that the pipeline does not have
    for name in (*(models or {}), *stages_given):
        stage_of(pipeline, name)
    first, given = next(iter(stages_given.items()), (names[0], [None] * len(seeds)))
    assert len(given) == len(seeds)
    # the stages before `first` are replaced by the given outputs; the last one is decoded
    *before, last = stages_with(pipeline, models)[names.index(first) :]
    assets: list[Asset] = []
    for i in range(0, len(seeds), batch):
        part = slice(i, i + batch)
        places = _through(pipeline, before, conditions[part], seeds[part], given[part])
        assets += pipeline.decode(stage_latents(pipeline, last, conditions[part], seeds[part], places))
    return assets


def voxels_for(
    pipeline: Pipeline,
    stage: str,
    conditions: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch: int = 16,
) -> list[Voxels]:
    """Sample the stages before a stage, and return their output, [N], for `stages_given`.

    Several networks of that stage can then be compared without running the earlier stages again.
    """
    # the earlier stages, with the networks of the caller where it passes any
    before = stages_with(pipeline, models)[
        : [s.name for s in pipeline.stages].index(stage_of(pipeline, stage).name)
    ]
    parts = [slice(i, i + batch) for i in range(0, len(seeds), batch)]
    given: list[Voxels] = [None] * len(seeds)
    return [
        left
        for part in parts
        for left in _through(pipeline, before, conditions[part], seeds[part], given[part])
    ]


def stages_with(pipeline: Pipeline, models: Models | None) -> list[FlowStage]:
    """Return copies of the stages, with the networks `models` in place of their own."""
    return [replace(stage, model=(models or {}).get(stage.name, stage.model)) for stage in pipeline.stages]


def _through(
    pipeline: Pipeline, stages: Sequence[FlowStage], conditions, seeds, given: Sequence[Voxels]
) -> Sequence[Voxels]:
    """Run these stages in turn, and return their output for the next stage, per sample."""
    for stage in stages:
        given = pipeline.advance(stage.name, stage_latents(pipeline, stage, conditions, seeds, given))
    return given


def stage_latents(pipeline: Pipeline, stage: FlowStage, conditions, seeds, given: Sequence[Voxels]) -> Batch:
    """Sample a stage's latents for prompts and seeds, on the device of its network."""
    # stages may be on different devices, so each asks its own network
    device = next(stage.model.parameters()).device
    cond = to_device(pipeline.conditions(conditions, stage.name), device)
    no_cond = to_device(pipeline.no_condition(len(seeds), stage.name), device)
    return sample(stage, stage_noise(stage, seeds, given).to(device), cond, no_cond)


def scores(
    pipeline: Pipeline,
    reward: AssetReward,
    conditions: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch: int = 16,
    stages_given: Mapping[str, Sequence[Voxels]] | None = None,
) -> torch.Tensor:
    """Generate assets, and return the reward of each: [N] float32 on the CPU.

    Assets are scored batch by batch, so that they need not fit in memory together.
    Raises: ValueError for a score that is not finite.
    """
    parts = [torch.zeros(0)]  # torch.cat rejects an empty list, which no seeds would leave
    for i in tqdm(range(0, len(seeds), batch), desc="scoring", unit="batch", leave=False, disable=None):
        part = slice(i, i + batch)
        given = {name: places[part] for name, places in (stages_given or {}).items()}
        values = (
            reward(generate(pipeline, conditions[part], seeds[part], models, batch, given), conditions[part])
            .detach()
            .float()
            .cpu()
        )
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{type(reward).__name__}: expected finite scores, got {values.tolist()}. Correct the reward."
            )
        parts.append(values)
    return torch.cat(parts)


def wins(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compare scores [N]: 1 where a is larger, 0 where b is larger, 0.5 at a tie.

    >>> wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    # a > b counts in both terms, a == b in the second only
    return ((a > b).float() + (a >= b).float()) / 2


def crossed(conditions: Sequence[str], per_condition: int, seed: int) -> tuple[list[str], list[int]]:
    """Repeat every prompt `per_condition` times with different noise seeds, to compare two generators on.

    Returns (prompts, seeds), with all repetitions of a prompt in a row.
    """
    names = [name for name in conditions for _ in range(per_condition)]
    # the number of the repetition, not of the asset, is hashed: a prompt's seeds depend on no other prompt
    return names, [
        derive_seed("compare", seed, name, i % per_condition) % 2**31 for i, name in enumerate(names)
    ]


@dataclass(kw_only=True)
class HeldOut:
    """Held-out win rate of a stage's network, measured while it is trained, by calling this with the network.

    The win rate is the share of assets whose reward is above that of the other generator's asset for the same
    prompt and seed. Ties count half.
    """

    pipeline: Pipeline
    stage: str  # stage that the network belongs to
    # chooses checkpoints; neither the reward that weighs pairs nor the one of the final table
    reward: AssetReward
    conditions: Sequence[str]  # prompts, [N]
    seeds: Sequence[int]  # [N]
    # networks of the other stages; those that are not named are the pipeline's own
    others: Models = field(default_factory=dict)
    # the generator to beat, in the same way; nothing named: the pipeline as it is
    against: Models = field(default_factory=dict)
    batch: int = 16
    ranks: Ranks = SINGLE  # distributed ranks, each of which scores its share; all of them must call this
    _scores: torch.Tensor | None = field(default=None, init=False, repr=False)  # of the generator to beat
    # output of the stages before this one; it stays the same during training
    _given: list[Voxels] = field(default_factory=list, init=False, repr=False)

    def __call__(self, model: torch.nn.Module) -> float:
        """Return the win rate of the network, in 0..1."""
        # each rank scores its share; the wins are joined at the end
        conditions = self.ranks.share(self.conditions)
        seeds = self.ranks.share(self.seeds)
        what = (self.pipeline, self.reward, conditions, seeds)
        # the generator to beat does not change, so it is scored at the first call alone
        if self._scores is None:
            self._scores = scores(*what, self.against, self.batch)
            # the earlier stages keep their networks while this stage is trained, so their output is kept
            self._given = voxels_for(self.pipeline, self.stage, conditions, seeds, self.others, self.batch)
        models = {**self.others, self.stage: model}
        won = wins(scores(*what, models, self.batch, {self.stage: self._given}), self._scores)
        return mean(self.ranks.joined(won.tolist()))
