"""A short loop on the test problem, for tests of what is optimised: the mode's own loop adds files, resume
and reports.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.boxes import noses
from eg3d_rlhf.rewards.images.pairwise_evaluators import plausibility
from eg3d_rlhf.tuning.distill.gradients import target_loss
from eg3d_rlhf.tuning.distill.guidance.geometry import GeometryReward, ProgressiveGeometry
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, GeometrySettings, SdsSettings
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.schedule import Streams, draw_times
from eg3d_rlhf.tuning.distill.schedules_by_step import TimeWindow

BLACK = torch.zeros(3)


class End(NamedTuple):
    """Outcome of the assets."""

    asset: Voxels
    before: torch.Tensor  # [A] noses at the start
    after: torch.Tensor  # [A]
    rms: torch.Tensor  # [A] of images in 0..1, to the nearest modes


class Shares(NamedTuple):
    """Shares of assets by their number of noses."""

    none: float
    exactly_one: float
    two_or_more: float  # the Janus ratio


def shares(counts: torch.Tensor) -> Shares:
    """Return the outcome of counts [A]."""
    return Shares(*(float(hit.double().mean()) for hit in (counts == 0, counts == 1, counts >= 2)))


def exact_prior(std: float = 0.3) -> GmmPrior:
    """Each prompt an even mixture of its two modes, of standard deviation `std` in latents of -1..1;
    the null prompt a mixture of all.

    It is exact, so guide by 1: larger scales push away from what all prompts share, and so from plain sides.
    """
    means = problem.modes()
    embeddings = {"": torch.zeros(len(means))}
    for i, prompt in enumerate(box_prompts.PROMPTS):
        embeddings[prompt.text] = torch.full((len(means),), -30.0)
        embeddings[prompt.text][2 * i : 2 * i + 2] = 0
    return GmmPrior(means, torch.full((len(means),), std), embeddings)


def heads(count: int) -> list[str]:
    """Prompts of mini-Janus, in turn."""
    texts = [prompt.text for prompt in box_prompts.PROMPTS if prompt.kind == "janus"]
    return [texts[i % len(texts)] for i in range(count)]


def sds(prior: DiffusionPrior, seed: int, scale: float = 1.0) -> Sds:
    settings = SdsSettings(prior=DenoiserSettings(guidance_scale=scale))
    return Sds(prior, settings, views=problem.SIDES, streams=Streams(seed=seed))


def optimise(
    prompts: Sequence[str],
    seed: int,
    guidance: Callable[[DiffusionPrior, int], Guidance] = sds,
    steps: int = 240,
    rate: float = 0.05,
    geometry: GeometryReward | None = None,
    weight: float = 0.3,
    every: int = 5,
    p: float = problem.FACE_PROBABILITY,
) -> End:
    """Adam on voxels, one time per asset; all draws from the seed."""
    prior = exact_prior()
    streams = Streams(seed=seed)
    renderer = FourViews()
    asset = problem.start(prompts, [streams.generator(f"start/{i}", 0) for i in range(len(prompts))], p)
    before = noses(asset)
    views = renderer.draw(len(asset), torch.Generator())
    method = guidance(prior, seed)
    pull = GeometrySettings(geometry_weight=weight, geometry_every=every)
    shape = None if geometry is None else ProgressiveGeometry(geometry, pull, steps)
    texts = [text for text in prompts for _ in range(problem.SIDES)]
    parameters = list(asset.parameters())
    optimiser = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), eps=1e-15)
    for step in range(steps):
        x = prior.encode(renderer.render(asset, views, BLACK).images)
        t = draw_times(TimeWindow(), step, len(asset), problem.SIDES, streams.generator("time", step))
        output = method(x.detach(), t, texts, views.cameras[:, :16], step)
        optimiser.zero_grad()
        target_loss(x, output.grad).backward()
        if shape is not None:
            shape.add(asset, parameters, prompts, step)
        optimiser.step()
    return End(asset, before, noses(asset), -plausibility(asset)(prompts))
