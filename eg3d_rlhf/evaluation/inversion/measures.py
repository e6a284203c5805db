"""How good an inversion is: against its image, against the truth where that is known, and by rewards and judges.

Letters: D, H, W grid points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eg3d_rlhf.core.field import Field, Rendering, render_each
from eg3d_rlhf.evaluation.inversion.guidance import cube_of, moved
from eg3d_rlhf.evaluation.inversion.projector import Objective
from eg3d_rlhf.evaluation.inversion.targets import SMOOTH, SMOOTH_SEED, Case, cameras_about
from eg3d_rlhf.generators import Generator
from eg3d_rlhf.measures.image_similarity import psnr
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.watch import annotator_calibration

MEASURES = {  # name -> unit, whether higher is better
    "psnr": ("dB at the target's camera", True), "psnr_side": ("dB, mean of the held-out views", True),
    "perceptual": ("feature distance at the target's camera", False), "perceptual_side": ("feature distance, held-out views", False),
    "depth": ("mean depth error at the target's camera, world units", False), "depth_side": ("mean depth error, held-out views", False),
    "reward": ("score", True), "judge": ("judge's value", True), "moved": ("mean |change of density| from the pivot", False),
    "mse": ("final mean squared error as optimised", False),
}


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges shapes besides the reward that guides."""

    reward: Reward | None = None  # the one that guides, raw
    judge: Callable[[Field, Tensor], float] | None = None  # of a field and its density cube [1, D, H, W]
    name: str = "none"


def annotator_judge() -> Callable[[Field, Tensor], float]:
    """The annotator's utility without noise, of synthetic heads."""
    calibration = annotator_calibration()

    def judge(field: Field, density: Tensor) -> float:
        return utility(density[0].cpu().numpy(), calibration=calibration, box_warp=field.bounds.side).total

    return judge


def reward_judge(reward: Reward) -> Callable[[Field, Tensor], float]:
    """Another reward's score."""
    return lambda field, _density: float(reward.score(field)[0])


@torch.no_grad()
def measure(generator: Generator, case: Case, ws: Tensor, pivot: Tensor, objective: Objective, judges: Judges) -> dict[str, float]:
    """The measures of ws [1, L, W] under a generator; those that nobody can know here are left out.

    Args: pivot: density cube [1, D, H, W] of the second stage's start. Renderings take four times the samples, and other rays than the
        optimisation did; 'mse' alone is the optimised one.
    """
    field, cube = generator.field(ws), cube_of(generator)
    views = render_each(field, cameras_about(generator, case.target.camera), SMOOTH, SMOOTH_SEED + 1)
    density = field.density_grid(cube)
    image = objective.seen(views[0].image)
    found = {
        "mse": objective.image_loss(objective.render(field, 0))[1]["mse"], "psnr": psnr(image, case.target.image)[0],
        "perceptual": objective.perceptual(image, case.target.image)[0], "moved": moved(field, cube, pivot)[0],
    }
    if case.truth is not None:
        pairs = list(zip(views, case.truth.views, strict=True))
        found["depth"] = depth_error(*pairs[0])
        for name, values in {
            "psnr_side": [psnr(a.image, b.image)[0] for a, b in pairs[1:]],
            "perceptual_side": [objective.perceptual(a.image, b.image)[0] for a, b in pairs[1:]],
            "depth_side": [depth_error(a, b) for a, b in pairs[1:]],
        }.items():
            found[name] = torch.stack(values).mean()
    if judges.reward is not None:
        found["reward"] = judges.reward.score(field)[0]
    return {**{name: float(value) for name, value in found.items()}, **judged(field, density, judges)}


def judged(field: Field, density: Tensor, judges: Judges) -> dict[str, float]:
    """The judge's value, where there is one."""
    return {} if judges.judge is None else {"judge": float(judges.judge(field, density))}


@torch.no_grad()
def measure_truth(generator: Generator, case: Case, judges: Judges) -> dict[str, float]:
    """Reward and judge of the target's own shape; {} where it is not known."""
    if case.truth is None:
        return {}
    field = generator.field(case.truth.ws)
    reward = {} if judges.reward is None else {"reward": float(judges.reward.score(field)[0])}
    return {**reward, **judged(field, field.density_grid(cube_of(generator)), judges)}


def depth_error(found: Rendering, truth: Rendering) -> Tensor:
    """Mean absolute difference of depth [] where the truth's rays meet something (opacity at least one half); world units."""
    seen = truth.opacity >= 0.5
    return (found.depth - truth.depth).abs()[seen].mean() if seen.any() else truth.depth.new_zeros(())
