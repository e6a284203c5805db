"""Sampling of finished assets from prompts and seeds, through all stages, and win rates of two generators.

Each stage is sampled by Euler's method, from noise at t = 1 to data at t = 0. A step from the time t to the
time t' is

    x <- x - (t - t') v,   v = (1 + w) v_cond - w v_null if lo <= t <= hi, else v_cond

where v_cond and v_null are the velocities with the conditioning and with the empty conditioning, w is the
strength of classifier-free guidance, and lo..hi is the interval of times with guidance.

The times are equally spaced from 1 to 0, and then mapped by t -> r t / (1 + (r - 1) t). Guidance enlarges the
standard deviation of x_0, and the setting `cfg_rescale` reduces it again.

Sources: TRELLIS (Xiang et al. 2024) for the interval and the mapping; Kynkaanniemi et al. 2024 for guidance
on an interval; Esser et al. 2024, equation 23, for the mapping; Lin et al. 2024, section 3.4, for the
rescaling.

Shapes: N samples or assets; other letters as in stage.py.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from training import rehearsal
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm


def times(sampling: Sampling) -> list[float]:
    """Return the steps + 1 times of the Euler sampler, decreasing from exactly 1 to exactly 0.

    >>> times(Sampling(steps=2, rescale_t=3.0))
    [1.0, 0.75, 0.0]
    """
    r = sampling.rescale_t
    if sampling.single:
        # The original program has the times s = 1 - t, from noise at 0 to data at 1, and computes them in
        # float32.
        s = torch.linspace(0, 1, sampling.steps + 1)
        _, *inner_times, _ = (1 - (s / (1 + (r - 1) * (1 - s))).double()).tolist()
    else:
        uniform_times = np.linspace(1, 0, sampling.steps + 1).tolist()
        _, *inner_times, _ = [r * t / (1 + (r - 1) * t) for t in uniform_times]
    # The first time is set to 1, because r / (1 + (r - 1)) is 1 + 2^-52 for some r, which would be outside an
    # interval that ends at 1.
    return [1.0, *inner_times, 0.0]


def guides(sampling: Sampling, t: float) -> bool:
    """Return True if guidance is used at the time t, that is, if t is in the interval `cfg_interval`.

    The interval includes its two ends. With the setting `time_scale` the comparison has the precision of
    float32.

    >>> sampling = Sampling(steps=5, rescale_t=1.0, cfg_interval=(1 - 0.6, 1.0))
    >>> fourth_time = times(sampling)[3]  # 0.4 except for the last bit
    >>> guides(sampling, fourth_time), guides(replace(sampling, time_scale=1000.0), fourth_time)
    (False, True)
    """
    low, high = sampling.cfg_interval
    scale = sampling.time_scale
    if scale is None:
        return low <= t <= high
    # Original programs compare float32 numbers scale (1 - t), which increase from 0 (noise) to scale (data).
    scaled_low, scaled_t, scaled_high = (np.float32(scale * (1 - time)) for time in (low, t, high))
    return bool(scaled_high <= scaled_t <= scaled_low)


def sample(
    stage: FlowStage,
    noise: Batch,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling | None = None,
) -> Batch:
    """Sample the latents x_0 of a stage from noise, without gradient.

    The network runs in eval mode; afterwards the modes of its modules are restored.

    Args:
        stage: stage whose latents are sampled.
        noise: N samples of noise, which are moved to the device of `cond`.
        cond: conditioning of N samples.
        no_cond: empty conditioning of N samples or of one sample; None if guidance is off.
        sampling: settings of the sampler; None to use the settings of the stage.
    Returns: N latents.
    Raises: ValueError if the latents contain NaN or infinity, or if guidance needs `no_cond`.
    """
    x = noise
    for x, _ in trajectory(stage, noise, cond, no_cond, sampling):  # noqa: B007 (the last x is returned)
        pass
    if not torch.isfinite(feats_of(x)).all():
        raise ValueError(
            f"sample: the latents of stage {stage.name!r} contain NaN or infinity. Use --set"
            " precision=float32, or copy the stage's weights and the conditioning again if they are damaged."
        )
    return x


def trajectory(
    stage: FlowStage,
    noise: Batch,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling | None = None,
) -> Iterator[tuple[Batch, Batch]]:
    """Sample the latents of a stage step by step. The arguments are those of `sample`.

    Yields: for each step, N latents at the end of the step, and the N latents x_0 that its velocity predicts.
    """
    sampling = sampling or stage.sampling
    sample_count = rows(cond)
    device = tensor_of(cond).device
    assert sample_count == count(noise)
    if sampling.cfg_strength and (no_cond is None or rows(no_cond) not in (1, sample_count)):
        given_rows_text = "None" if no_cond is None else f"{rows(no_cond)} rows"
        raise ValueError(
            f"sample(no_cond): guidance needs the empty conditioning with 1 or {sample_count} rows, got"
            f" {given_rows_text}. Pass it, or set cfg_strength=0."
        )
    x = noise.to(device)
    all_times = times(sampling)
    # One row for each sample, because the network gets `cond` and `no_cond` with the same batch x.
    no_cond = expanded(no_cond, cond) if no_cond is not None else None
    for t, next_t in zip(all_times[:-1], all_times[1:], strict=True):
        # Both contexts end before the yield, so that they do not affect the caller between two steps.
        with torch.no_grad(), evaluating(stage.model):
            batch_t = torch.full([count(x)], t, device=device)
            v = guided(stage.path, stage.velocity, x, t, cond, no_cond, sampling)
            x_0_estimate = stage.path.data(x, batch_t, v)
            # Euler step. Times decrease, so t - next_t is positive.
            x = with_feats(x, feats_of(x) - (t - next_t) * feats_of(v))
        yield x, x_0_estimate


def guided(
    path: FlowPath,
    velocity: Callable[..., Batch],
    x: Batch,
    t: float,
    cond: Condition,
    no_cond: Condition | None,
    sampling: Sampling,
) -> Batch:
    """Return the velocity of a sampling step, with classifier-free guidance if it is used at the time t.

    Args:
        path: path of the flow.
        velocity: function that predicts the velocity, called as velocity(x, times, cond, step=length).
        x: N noised latents.
        t: time in 0..1.
        cond: conditioning of N samples.
        no_cond: empty conditioning of N samples, or None for no guidance.
        sampling: settings of the sampler.
    """
    batch_t = torch.full([count(x)], t, device=feats_of(x).device)
    # A shortcut network gets the length of the step as an additional input.
    step_length = 1 / sampling.steps if sampling.shortcut else None
    v = velocity(x, batch_t, cond, step=step_length)
    w = sampling.cfg_strength
    # Without guidance, the velocity of the empty conditioning is not computed.
    if not w or no_cond is None or not guides(sampling, t):
        return v
    # Guidance in TRELLIS's form, in which w = 0 is no guidance.
    v_null = velocity(x, batch_t, no_cond, step=step_length)
    v_guided = with_feats(v, (1 + w) * feats_of(v) - w * feats_of(v_null))
    return (
        rescaled_velocity(path, x, batch_t, v_guided, v, sampling.cfg_rescale)
        if sampling.cfg_rescale
        else v_guided
    )


def rescaled_velocity(
    path: FlowPath, x: Batch, t: torch.Tensor, v: Batch, unguided_v: Batch, strength: float
) -> Batch:
    """Return a guided velocity whose x_0 is rescaled towards the standard deviation of the unguided x_0.

    Each sample is rescaled on its own (Lin et al. 2024, section 3.4).

    Args:
        path: path of the flow.
        x: N noised latents.
        t: [N], times above 0.
        v: N velocities with guidance.
        unguided_v: N velocities without guidance.
        strength: strength of the rescaling, 0 to 1. With 0, the standard deviation with guidance is kept.
            With 1, it is replaced by the standard deviation without guidance.
    """
    x_0_guided = path.data(x, t, v)
    x_0_unguided = path.data(x, t, unguided_v)
    # [N]. strength * (rescaled x_0) + (1 - strength) * x_0 is x_0 times this factor.
    rescale_factor = strength * (std_per_sample(x_0_unguided) / std_per_sample(x_0_guided)) + 1 - strength
    return path.velocity_to(
        x, t, with_feats(x_0_guided, spread(rescale_factor, x_0_guided) * feats_of(x_0_guided))
    )


def std_per_sample(batch: Batch) -> torch.Tensor:
    """Compute the standard deviation over all numbers of each sample, [N].

    For latents of several tensors, the variances of the tensors are averaged before the square root.
    """
    features = feats_of(batch)
    centred_features = features - spread(mean_per_sample(features, batch), batch)
    return mean_per_sample(centred_features.square(), batch).sqrt()


@contextlib.contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Set a network to eval mode within the context, and restore the mode of every module afterwards."""
    # Each module has its own mode: frozen parts may be in eval mode inside a network in training mode.
    training_modules = [module for module in network.modules() if module.training]
    for module in training_modules:
        module.training = False
    try:
        yield
    finally:
        for module in training_modules:
            module.training = True


# Name of a stage -> network to use in place of the stage's own network. Stages that are not named use their
# own.
Models = Mapping[str, torch.nn.Module]


def stage_noise(stage: FlowStage, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
    """Make the noise of a stage from the seeds of N assets, on the CPU.

    Args:
        stage: stage. Its name is part of the seed of the noise, so that the stages of an asset have different
            noise.
        seeds: N seeds.
        given: N outputs of the previous stage; for the first stage, a list of N times None.
    """
    return stage.noise([derive_seed("noise", stage.name, seed) for seed in seeds], given)


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch_size: int = 16,
    stages_given: Mapping[str, Sequence[Voxels]] | None = None,
) -> list[Asset]:
    """Generate N assets, one for each prompt and seed, through all stages.

    A seed determines the noise of every stage, so two generators with the same seeds start from the same
    noise.

    Args:
        pipeline: generator.
        prompts: N prompts.
        seeds: N seeds of the noise.
        models: networks to use in place of those of the stages; None to use the stages' own networks.
        batch_size: number of assets that are generated together, which bounds the memory.
        stages_given: name of one stage -> its N inputs, as `voxels_for` returns them. The stages before it
            are then not sampled. None: all stages are sampled.
    Raises: ValueError for the name of a stage that the pipeline does not have, or for a structure without
    voxels.
    """
    stage_names = [stage.name for stage in pipeline.stages]
    stages_given = stages_given or {}
    assert len(prompts) == len(seeds) and len(stages_given) <= 1
    for stage_name in (*(models or {}), *stages_given):
        stage_of(pipeline, stage_name)  # raises an error for a stage that the pipeline does not have
    first_stage, stage_inputs = next(iter(stages_given.items()), (stage_names[0], [None] * len(seeds)))
    assert len(stage_inputs) == len(seeds)
    # The last stage is separate, because its latents are decoded.
    sampled_names = stage_names[stage_names.index(first_stage) :]
    *inner_stages, last_stage = stages_with(pipeline, models, sampled_names)
    assets: list[Asset] = []
    for first_index in range(0, len(seeds), batch_size):
        batch_slice = slice(first_index, first_index + batch_size)
        last_input = _sample_stages(
            pipeline, inner_stages, prompts[batch_slice], seeds[batch_slice], stage_inputs[batch_slice]
        )
        latents = stage_latents(pipeline, last_stage, prompts[batch_slice], seeds[batch_slice], last_input)
        assets += pipeline.decode(latents)
    return assets


def voxels_for(
    pipeline: Pipeline,
    stage: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch_size: int = 16,
) -> list[Voxels]:
    """Sample the stages before the stage named `stage`, and return its N inputs.

    With these inputs as `stages_given` of `generate`, several networks of the stage can be compared without
    sampling the earlier stages again.

    Args:
        pipeline: generator.
        stage: name of the stage.
        prompts: N prompts.
        seeds: N seeds of the noise.
        models: networks to use in place of those of the stages; None to use the stages' own networks.
        batch_size: number of assets that are sampled together, which bounds the memory.
    """
    stage_names = [s.name for s in pipeline.stages]
    earlier_names = stage_names[: stage_names.index(stage_of(pipeline, stage).name)]
    earlier_stages = [*stages_with(pipeline, models, earlier_names)]
    stage_outputs: list[Voxels] = []
    for first_index in range(0, len(seeds), batch_size):
        batch_slice = slice(first_index, first_index + batch_size)
        first_input: list[Voxels] = [None] * len(seeds[batch_slice])
        stage_outputs += _sample_stages(
            pipeline, earlier_stages, prompts[batch_slice], seeds[batch_slice], first_input
        )
    return stage_outputs


def stages_with(
    pipeline: Pipeline, models: Models | None, names: Collection[str] | None = None
) -> Iterator[FlowStage]:
    """Yield copies of the stages of a pipeline, with the networks of `models` in place of their own.

    A stage is copied when it is needed, so a mapping may load each network at its first use. A stage whose
    network has no weights loads it then.

    Args: names: names of the stages to yield; None: all of them.
    """
    for stage in pipeline.stages:
        if names is not None and stage.name not in names:
            continue
        model = (models or {}).get(stage.name)
        if model is None:
            model = stage.model if stage.load is None else stage.load()
        yield replace(stage, model=model, load=None)


def _sample_stages(
    pipeline: Pipeline, stages: Sequence[FlowStage], prompts, seeds, stage_inputs: Sequence[Voxels]
) -> Sequence[Voxels]:
    """Sample consecutive stages, and return the N inputs of the stage that follows them.

    Args:
        pipeline: generator.
        stages: stages to sample, in order. If there are none, `stage_inputs` is returned.
        prompts: N prompts.
        seeds: N seeds of the noise.
        stage_inputs: N inputs of the first of these stages.
    """
    for stage in stages:
        stage_inputs = pipeline.advance(
            stage.name, stage_latents(pipeline, stage, prompts, seeds, stage_inputs)
        )
    return stage_inputs


def stage_latents(pipeline: Pipeline, stage: FlowStage, prompts, seeds, given: Sequence[Voxels]) -> Batch:
    """Sample N latents of a stage on the device of its network.

    Args:
        pipeline: generator, which has the conditioning of the prompts.
        stage: stage.
        prompts: N prompts.
        seeds: N seeds of the noise.
        given: N outputs of the previous stage; for the first stage, a list of N times None.
    """
    # The networks of the stages may be on different devices.
    device = next(stage.model.parameters()).device
    cond = to_device(pipeline.conditioning(prompts, stage.name), device)
    no_cond = to_device(pipeline.null_conditioning(len(seeds), stage.name), device)
    return sample(stage, stage_noise(stage, seeds, given).to(device), cond, no_cond)


def scores(
    pipeline: Pipeline,
    reward: AssetReward,
    prompts: Sequence[str],
    seeds: Sequence[int],
    models: Models | None = None,
    batch_size: int = 16,
    stages_given: Mapping[str, Sequence[Voxels]] | None = None,
) -> torch.Tensor:
    """Generate N assets and return their scores, [N] float32 on the CPU.

    Each batch of assets is scored before the next one is generated, so that not all assets are in memory. The
    other arguments are those of `generate`.

    Args:
        pipeline: generator.
        reward: reward that scores the assets.
    Raises: ValueError if a score is NaN or infinite.
    """
    # The networks that have to be loaded are loaded once for all batches, and dropped at the end.
    skipped_count = next(
        (i for i, stage in enumerate(pipeline.stages) if stage.name in (stages_given or {})), 0
    )
    sampled_names = [stage.name for stage in pipeline.stages[skipped_count:]]
    models = {stage.name: stage.model for stage in stages_with(pipeline, models, sampled_names)}
    all_scores = [torch.zeros(0)]  # without seeds the list would be empty, which torch.cat does not accept
    for first_index in tqdm(range(0, len(seeds), batch_size), desc="scoring", unit="batch", leave=False):
        batch_slice = slice(first_index, first_index + batch_size)
        batch_inputs = {name: outputs[batch_slice] for name, outputs in (stages_given or {}).items()}
        assets = generate(
            pipeline, prompts[batch_slice], seeds[batch_slice], models, batch_size, batch_inputs
        )
        batch_scores = reward(assets, prompts[batch_slice]).detach().float().cpu()
        if not bool(batch_scores.isfinite().all()):
            raise ValueError(
                f"{type(reward).__name__}: the reward returned NaN or infinity among the scores"
                f" {batch_scores.tolist()}. Use a reward that returns finite scores."
            )
        all_scores.append(batch_scores)
    return torch.cat(all_scores)


def wins(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compare scores a [N] with scores b [N].

    Returns: [N], 1 where a is larger, 0 where b is larger, and 0.5 where they are equal.

    >>> wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    # If a > b, both terms are 1; if a == b, only the second term is.
    return ((a > b).float() + (a >= b).float()) / 2


def crossed(prompts: Sequence[str], per_condition: int, seed: int) -> tuple[list[str], list[int]]:
    """Return the prompts and the noise seeds on which two generators are compared.

    Args:
        prompts: prompts.
        per_condition: number of assets of each prompt, which have different noise seeds.
        seed: seed from which the noise seeds are derived.
    Returns: prompts and noise seeds of all assets; the assets of a prompt are adjacent.
    """
    asset_prompts = [prompt for prompt in prompts for _ in range(per_condition)]
    # asset_index % per_condition is the number of the asset within its prompt. With this number, and not with
    # asset_index, the noise seeds of a prompt do not depend on the other prompts.
    return asset_prompts, [
        derive_seed("compare", seed, prompt, asset_index % per_condition) % 2**31
        for asset_index, prompt in enumerate(asset_prompts)
    ]


@dataclass(kw_only=True)
class HeldOut:
    """Callable object that measures the held-out win rate of a stage's network while the network is trained.

    The win rate is the share of N assets whose score is above that of the baseline generator's asset for the
    same prompt and seed. Equal scores count as half a win.
    """

    pipeline: Pipeline  # generator
    stage: str  # name of the stage whose network is trained
    # Reward by which checkpoints are chosen. It is neither the reward that weights pairs nor the final
    # evaluator.
    reward: AssetReward
    prompts: Sequence[str]  # N prompts
    seeds: Sequence[int]  # N seeds of the noise
    # Networks of the other stages. Stages that are not named use the pipeline's networks.
    other_models: Models = field(default_factory=dict)
    # Networks of the baseline generator. Stages that are not named use the pipeline's networks.
    baseline_models: Models = field(default_factory=dict)
    batch: int = 16  # number of assets that are generated together
    # Distributed ranks. Each scores its share of the assets, so all of them must call the object.
    ranks: Ranks = SINGLE
    # Scores of the baseline generator.
    _scores: torch.Tensor | None = field(default=None, init=False, repr=False)
    # Outputs of the stages before `stage`, which do not change during training.
    _given: list[Voxels] = field(default_factory=list, init=False, repr=False)

    def __call__(self, model: torch.nn.Module) -> float:
        """Return the win rate of the network `model`, in 0..1."""
        # Each rank scores its share of the assets.
        all_prompts = self.ranks.share(self.prompts)
        # a rehearsal scores one batch
        prompts = rehearsal.first(all_prompts, self.batch)
        seeds = rehearsal.first(self.ranks.share(self.seeds), self.batch)
        # The baseline and the outputs of the earlier stages do not change, so they are computed in the first
        # call.
        if self._scores is None:
            with rehearsal.timed(rehearsal.TRAINING, "baseline"):
                rehearsal.first(all_prompts, self.batch)  # the share of the prompts in this block
                self._scores = scores(
                    self.pipeline, self.reward, prompts, seeds, self.baseline_models, self.batch
                )
                self._given = voxels_for(
                    self.pipeline, self.stage, prompts, seeds, self.other_models, self.batch
                )
        models = {**self.other_models, self.stage: model}
        model_scores = scores(
            self.pipeline,
            self.reward,
            prompts,
            seeds,
            models,
            self.batch,
            {self.stage: self._given},
        )
        win_scores = wins(model_scores, self._scores)
        return mean(self.ranks.gather_in_order(win_scores.tolist()))  # over the assets of all ranks
