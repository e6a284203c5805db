"""Opens the problem that is optimised, with prior, views, starting assets, rewards and evaluator, and
combines it with an arm to a `Distillation`.
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
from eg3d_rlhf.tuning.distill.compare import FinalEvaluator
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.distill_loop import Distillation
from eg3d_rlhf.tuning.distill.guidance.geometry import (
    GeometryReward,
    ProgressiveGeometry,
    load_geometry,
    shuffle_weights,
)
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from eg3d_rlhf.tuning.distill.methods import arm_settings, make_guidance
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import PriorOptions, load_prior, prior_costs
from eg3d_rlhf.tuning.distill.scene_kinds import SCENES
from eg3d_rlhf.tuning.distill.schedule import Streams
from training.config import built
from training.phases import derive_seed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A problem of score distillation, on one device."""

    prior: DiffusionPrior  # frozen
    renderer: Renderer  # samples cameras and renders assets
    views: int  # number of views of each asset in a step
    # Makes assets to begin with, from their prompts and one random generator each.
    start: Callable[[Sequence[str], Sequence[torch.Generator]], Asset]
    reward: RewardModel | None  # of images; None for methods without one
    # Measures finished assets: name -> figures [A], NaN where a measure does not apply.
    measures: Callable[[Asset, Sequence[str]], dict[str, torch.Tensor]]
    evaluator: FinalEvaluator | None = None  # held-out evaluator of comparisons
    evaluator_description: str = ""  # the evaluator in words, for reports
    judge: PairwiseJudge | None = None  # ranks two noises in place of the reward
    # makes a new reward for each run, because some have a state
    geometry: Callable[[], GeometryReward] | None = None
    background: torch.Tensor | None = None  # [3] in 0..1; None: random colours
    # Exact log density of latents [B, C, H, W] under the prior, if it has one.
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    device: torch.device = torch.device("cpu")  # of assets and prior
    inputs: Mapping[str, Path] = field(default_factory=dict)  # files on whose contents a run depends

    def distillation(self, settings: DistillSettings, arm: Arm, batch: int) -> Distillation:
        """Make the optimisation of a batch of assets under one arm. Starting assets, views, times and noises
        are the same for all arms. If an arm has several starts, its first start is that of the other arms.
        """
        method, starts, _ = arm_settings(settings, arm.name)
        entries = [
            (prompt, seed, start) for start in range(starts) for prompt, seed in settings.batches()[batch]
        ]
        # Assets of start s have the indices s A to (s + 1) A - 1, as `BestOfN.best` expects.
        prompts = [prompt for prompt, _, _ in entries]
        # The first start has no number in its name, so that its random stream is that of arms with one start.
        names = [(prompt, seed, *((start,) if start else ())) for prompt, seed, start in entries]
        generators = [
            torch.Generator().manual_seed(derive_seed(settings.seed, "start", *name)) for name in names
        ]
        # Derived from the batch: runs in parallel give the same results as one after the other.
        streams = Streams(seed=derive_seed(settings.seed, "batch", batch) % 2**62)
        asset = self.start(prompts, generators).to(self.device)
        judge = None if arm.twist else self.judge  # control arms use their own reward only
        return Distillation(
            asset=asset,
            prompts=prompts,
            prior=self.prior,
            renderer=self.renderer,
            config=settings.loop,
            streams=streams,
            guidance=make_guidance(
                arm.method, method, self.prior, self._reward(arm), judge, self.views, streams
            ),
            background=self.background,
            geometry=self._geometry(settings, arm) if arm.geometry else None,
            log_prob=self.log_prob,
        )

    def _geometry(self, settings: DistillSettings, arm: Arm) -> ProgressiveGeometry:
        """Make the geometry reward of an arm. Raises: ValueError if the scene has none."""
        if self.geometry is None:
            raise ValueError(
                "--geometry-reward: arms with +geometry need a reward of the geometry, got none. Name one, or"
                " leave these arms out."
            )
        # A new reward for each run: a state must not leak from arm to arm.
        reward = self.geometry()
        sign = -1 if arm.geometry_twist == "inverted" else 1
        if arm.geometry_twist == "random":
            reward = shuffle_weights(reward, settings.seed)
        # The settings of the geometry reward are among those of the methods.
        return ProgressiveGeometry(
            reward, built(GeometrySettings, settings.guidance), settings.loop.steps, sign
        )

    def _reward(self, arm: Arm) -> RewardModel | None:
        """Return the reward of an arm: that of the scene, inverted, or random."""
        # Only control arms change the reward.
        if self.reward is None or arm.twist is None:
            return self.reward
        control = Inverted(self.reward) if arm.twist == "inverted" else Random(views=self.reward.views)
        return cast(RewardModel, control)


def open_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of the settings' prior: a registered one, or files. Raises: ValueError, OSError."""
    prior = settings.scene.prior
    # Any other value of --prior is a path.
    return SCENES[prior].open(settings, device) if prior in SCENES else scene_from_files(settings, device)


# Priors from files: Stable Diffusion or MVDream, with tri-planes in perspective views and rewards from local
# files.


def scene_from_files(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of a prior from local files. Its memory requirement is printed before weights are
    loaded.

    Raises: ValueError, OSError.
    """
    scene = settings.scene
    if scene.judge is not None:
        raise ValueError(
            f"--judge cannot be used with --prior={scene.prior}, got {scene.judge}. Name a --reward instead."
        )
    # auto is None: half precision on a GPU only.
    options = PriorOptions(device=device, half={"off": False, "half": True}.get(scene.amp))
    print(estimate_memory(settings, options), flush=True)
    prior = load_prior(scene.prior, options)
    # Before the reward is loaded, which can take as long as the prior.
    check_views(scene.views, prior.views)
    reward = None if scene.reward is None else load_reward(scene.reward, device)
    # Single files are identified by their contents; a folder only by its path, which is a setting.
    files = {
        name: Path(path)
        for name, path in (("prior", scene.prior), ("reward", scene.reward))
        if path is not None
    }
    return Scene(
        prior=prior,
        renderer=PerspectiveViews(scene.resolution, CameraDraws(views=scene.views)),
        views=scene.views,
        start=_start_factory(scene.planes),
        reward=reward,
        geometry=load_geometry(scene.geometry_reward, scene.prior, device),
        measures=lambda asset, prompts: {},
        device=device,
        inputs={name: path for name, path in files.items() if path.is_file()},
    )


def estimate_memory(settings: DistillSettings, options: PriorOptions) -> Costs:
    """Estimate the memory of a step, for the arm that needs most."""
    scene = settings.scene
    estimates = []
    # Images in a step: views of all assets of a batch.
    views = scene.views * min(settings.loop.batch, len(settings.pairs()))
    # Arms with equal numbers need the same memory, hence the set.
    for starts, noises in {arm_settings(settings, arm)[1:] for arm in settings.arms}:
        costs = prior_costs(scene.prior, starts * views, options, noises)
        estimates.append(
            costs if scene.reward is None else costs + reward_costs(scene.reward, starts * views, noises)
        )
    return max(estimates, key=lambda costs: costs.total)


def _start_factory(resolution: int):
    """Return a function that makes tri-planes with `resolution` texels per edge."""

    def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> TriPlanes:
        """Make random tri-planes, which do not depend on the prompts."""
        # One seed for the batch, which depends on the generators of all its assets.
        seed = derive_seed(*(torch.randint(2**31, (1,), generator=rng).item() for rng in draws)) % 2**31
        del prompts
        return TriPlanes(len(draws), resolution, channels=16, hidden=32, seed=seed)

    return start
