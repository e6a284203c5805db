"""What an optimisation runs on: prior, views, starts, rewards, judge; opened from the settings, joined with
an arm to a `Distillation`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, PairwiseJudge, RewardModel, check_views
from eg3d_rlhf.core.memory import Costs
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.grids import TriPlanes
from eg3d_rlhf.generators.assets.views import CameraDraws, PerspectiveViews, Renderer
from eg3d_rlhf.rewards.images.analytic import Inverted, Random
from eg3d_rlhf.rewards.images.from_files import load_reward, reward_costs
from eg3d_rlhf.tuning.distill.compare import FinalJudge
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.distill_loop import Distillation
from eg3d_rlhf.tuning.distill.guidance.geometry import (
    GeometryReward,
    ProgressiveGeometry,
    dealt_anew,
    load_geometry,
)
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from eg3d_rlhf.tuning.distill.methods import guidance_of, of_arm
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import PriorOptions, load_prior, prior_costs
from eg3d_rlhf.tuning.distill.scene_kinds import SCENES
from eg3d_rlhf.tuning.distill.schedule import Streams
from training.config import built
from training.phases import derive_seed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One problem, on one device."""

    prior: DiffusionPrior
    renderer: Renderer
    views: int  # of each asset
    # assets to begin with, a generator each
    start: Callable[[Sequence[str], Sequence[torch.Generator]], Asset]
    reward: RewardModel | None
    # of finished assets, by name [A]; NaN where one does not apply
    measures: Callable[[Asset, Sequence[str]], dict[str, torch.Tensor]]
    final: FinalJudge | None = None  # of comparisons
    evaluator: str = ""  # the same in words
    pair_judge: PairwiseJudge | None = None  # ranks noises in the reward's place
    geometry: Callable[[], GeometryReward] | None = None  # a fresh one, since some have a state
    background: torch.Tensor | None = None
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    device: torch.device = torch.device("cpu")
    inputs: Mapping[str, Path] = field(default_factory=dict)  # files whose bytes a run depends on

    def distillation(self, settings: DistillSettings, arm: Arm, batch: int) -> Distillation:
        """A batch of assets under one arm. Starts, views, times and noises are the same for all arms; of
        several starts the first is.
        """
        method, starts, _ = of_arm(settings, arm.name)
        begun = [
            (prompt, seed, start) for start in range(starts) for prompt, seed in settings.batches()[batch]
        ]
        prompts = [prompt for prompt, _, _ in begun]
        names = [(prompt, seed, *((start,) if start else ())) for prompt, seed, start in begun]
        draws = [torch.Generator().manual_seed(derive_seed(settings.seed, "start", *name)) for name in names]
        streams = Streams(seed=derive_seed(settings.seed, "batch", batch) % 2**62)
        asset = self.start(prompts, draws).to(self.device)
        judge = None if arm.twist else self.pair_judge  # the controls have their own reward alone
        return Distillation(
            asset=asset,
            prompts=prompts,
            prior=self.prior,
            renderer=self.renderer,
            config=settings.loop,
            streams=streams,
            guidance=guidance_of(
                arm.method, method, self.prior, self._reward(arm), judge, self.views, streams
            ),
            background=self.background,
            geometry=self._geometry(settings, arm) if arm.geometry else None,
            log_prob=self.log_prob,
        )

    def _geometry(self, settings: DistillSettings, arm: Arm) -> ProgressiveGeometry:
        if self.geometry is None:
            raise ValueError(
                "--geometry-reward: expected a reward for the arms with +geometry, got none. Name one, or"
                " leave them out."
            )
        reward = self.geometry()
        sign = -1 if arm.geometry_twist == "inverted" else 1
        if arm.geometry_twist == "random":
            reward = dealt_anew(reward, settings.seed)
        return ProgressiveGeometry(
            reward, built(GeometrySettings, settings.guidance), settings.loop.steps, sign
        )

    def _reward(self, arm: Arm) -> RewardModel | None:
        if self.reward is None or arm.twist is None:
            return self.reward
        made = Inverted(self.reward) if arm.twist == "inverted" else Random(views=self.reward.views)
        return cast(RewardModel, made)


def open_scene(settings: DistillSettings, device: torch.device) -> Scene:
    prior = settings.scene.prior
    return SCENES[prior].open(settings, device) if prior in SCENES else scene_of_files(settings, device)


# Priors from files: Stable Diffusion or MVDream, tri-planes seen in perspective, rewards from local files.


def scene_of_files(settings: DistillSettings, device: torch.device) -> Scene:
    """The scene of a prior from local files; says first what it will take of memory.

    Raises: ValueError, OSError.
    """
    scene = settings.scene
    if scene.judge is not None:
        raise ValueError(
            f"--judge: expected none with --prior={scene.prior}, got {scene.judge}. Name a --reward."
        )
    options = PriorOptions(device=device, half={"off": False, "half": True}.get(scene.amp))
    print(memory(settings, options), flush=True)
    prior = load_prior(scene.prior, options)
    check_views(scene.views, prior.views)
    reward = None if scene.reward is None else load_reward(scene.reward, device)
    files = {
        name: Path(path)
        for name, path in (("prior", scene.prior), ("reward", scene.reward))
        if path is not None
    }
    return Scene(
        prior=prior,
        renderer=PerspectiveViews(scene.resolution, CameraDraws(views=scene.views)),
        views=scene.views,
        start=_start(scene.planes),
        reward=reward,
        geometry=load_geometry(scene.geometry_reward, scene.prior, device),
        measures=lambda asset, prompts: {},
        device=device,
        inputs={name: path for name, path in files.items() if path.is_file()},
    )


def memory(settings: DistillSettings, options: PriorOptions) -> Costs:
    scene = settings.scene
    tables = []
    views = scene.views * min(settings.loop.batch, len(settings.pairs()))
    for starts, noises in {of_arm(settings, arm)[1:] for arm in settings.arms}:
        costs = prior_costs(scene.prior, starts * views, options, noises)
        tables.append(
            costs if scene.reward is None else costs + reward_costs(scene.reward, starts * views, noises)
        )
    return max(tables, key=lambda costs: costs.total)


def _start(resolution: int):
    def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> TriPlanes:
        seed = derive_seed(*(torch.randint(2**31, (1,), generator=rng).item() for rng in draws)) % 2**31
        del prompts
        return TriPlanes(len(draws), resolution, channels=16, hidden=32, seed=seed)

    return start
