"""Opens the scene of a run: prior, renderer, starting assets, rewards and evaluator.

`Scene.distillation` combines the scene with an arm to a `Distillation`, which is the optimisation of a batch
of assets.
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
from eg3d_rlhf.generators.assets.views import CameraRanges, PerspectiveViews, Renderer
from eg3d_rlhf.rewards.images.analytic import Inverted, Random
from eg3d_rlhf.rewards.images.from_files import load_reward, reward_costs
from eg3d_rlhf.tuning.distill.compare import FinalEvaluator
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, SceneConfig
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
from eg3d_rlhf.tuning.distill.served_judge import served_judge
from training.config import settings_from_values
from training.phases import derive_seed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Prior, renderer, rewards and evaluator that all arms of a run share, on one device."""

    prior: DiffusionPrior  # frozen diffusion model
    renderer: Renderer  # samples cameras and renders assets
    views: int  # number of views of each asset in a step
    # Function that makes starting assets. Its arguments are a list of prompts and a list of random
    # generators, one of each for every asset.
    start: Callable[[Sequence[str], Sequence[torch.Generator]], Asset]
    reward: RewardModel | None  # reward of images, or None
    # Function that measures finished assets. Its arguments are the assets and their prompts. It returns a
    # dictionary: name of a measure -> one value for each asset, which is NaN if the measure does not apply.
    measures: Callable[[Asset, Sequence[str]], dict[str, torch.Tensor]]
    evaluator: FinalEvaluator | None = None  # held-out evaluator that compares arms, or None
    evaluator_description: str = ""  # description of the evaluator for reports, which begins with "it"
    judge: PairwiseJudge | None = None  # judge that ranks pairs of images in place of the reward, or None
    # Function that makes a geometry reward, or None. Each run needs a new one, because some have a state.
    geometry: Callable[[], GeometryReward] | None = None
    background: torch.Tensor | None = None  # [3] in 0..1; None: a random colour for each asset and step
    # Function from latents [B, C, H, W] and B prompts to their exact log density [B]; None if the prior has
    # none.
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    device: torch.device = torch.device("cpu")  # device of assets and prior
    inputs: Mapping[str, Path] = field(default_factory=dict)  # role -> file on whose contents the run depends

    def distillation(self, settings: DistillSettings, arm: Arm, batch_index: int) -> Distillation:
        """Make the optimisation of one batch of assets under one arm.

        All arms have the same starting assets, views, times and noises. If an arm has several starts of each
        asset, its first start is the starting asset of the other arms.

        Args:
            settings: settings of the run.
            arm: arm, with its method and controls.
            batch_index: index of the batch in `DistillSettings.batches`.
        Raises: ValueError if the arm needs a reward that the scene does not have.
        """
        method_settings, start_count, _ = arm_settings(settings, arm.name)
        prompts = []
        generators = []
        # All assets of start 0, then all of start 1, ...: `BestOfN.best` expects this order.
        for start_index in range(start_count):
            for prompt, seed in settings.batches()[batch_index]:
                # Start 0 is not part of the name of the random stream, so that it has the same random numbers
                # as in arms with a single start.
                stream_key = (prompt, seed, start_index) if start_index else (prompt, seed)
                prompts.append(prompt)
                generators.append(
                    torch.Generator().manual_seed(derive_seed(settings.seed, "start", *stream_key))
                )
        # The streams depend on the batch, and not on the process or the order in which batches are computed.
        streams = Streams(seed=derive_seed(settings.seed, "batch", batch_index) % 2**62)
        starting_assets = self.start(prompts, generators).to(self.device)
        # A control changes the reward, so its arm must not use the judge in place of the reward.
        judge = None if arm.twist else self.judge
        return Distillation(
            asset=starting_assets,
            prompts=prompts,
            prior=self.prior,
            renderer=self.renderer,
            config=settings.loop,
            streams=streams,
            guidance=make_guidance(
                arm.method, method_settings, self.prior, self._reward(arm), judge, self.views, streams
            ),
            background=self.background,
            geometry=self._geometry(settings, arm) if arm.geometry else None,
            log_prob=self.log_prob,
        )

    def _geometry(self, settings: DistillSettings, arm: Arm) -> ProgressiveGeometry:
        """Make an arm's geometry reward, which is changed in a control arm.

        Raises: ValueError if the scene has none.
        """
        if self.geometry is None:
            raise ValueError(
                "--geometry-reward=none: arms with +geometry need a geometry reward. Name one, e.g."
                " --geometry-reward=solid, or remove these arms from --compare."
            )
        reward = self.geometry()  # a new object for each arm, because some rewards have a state
        sign = -1 if arm.geometry_twist == "inverted" else 1
        if arm.geometry_twist == "random":
            reward = shuffle_weights(reward, settings.seed)
        # `guidance` contains the settings of the geometry reward, too; `settings_from_values` ignores all
        # others.
        geometry_settings = settings_from_values(GeometrySettings, settings.guidance)
        return ProgressiveGeometry(reward, geometry_settings, settings.loop.steps, sign)

    def _reward(self, arm: Arm) -> RewardModel | None:
        """Return the reward of images of an arm, or None. In a control arm, this reward is changed."""
        if self.reward is None or arm.twist is None:
            return self.reward
        control_reward = Inverted(self.reward) if arm.twist == "inverted" else Random(views=self.reward.views)
        return cast(RewardModel, control_reward)


def open_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of the prior that --prior names.

    Args:
        settings: settings of the run.
        device: device of the prior and of the assets.
    Raises: ValueError if the settings do not fit the prior; OSError if a file cannot be read.
    """
    prior = settings.scene.prior
    # A value of --prior that is not the name of a scene is a path.
    return SCENES[prior].open(settings, device) if prior in SCENES else scene_from_files(settings, device)


# Priors from files are Stable Diffusion or MVDream. Their assets are tri-planes in perspective views, and
# their rewards are read from local files.


def scene_from_files(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of a prior from local files.

    The memory that a step needs is printed before any weights are loaded.

    Args:
        settings: settings of the run.
        device: device of the prior and of the assets.
    Raises: ValueError if the settings do not fit the prior; OSError if a file cannot be read.
    """
    scene = settings.scene
    check_served_judge(scene)
    # The value "auto" becomes None, which is half precision on a GPU only.
    prior_options = PriorOptions(device=device, half={"off": False, "half": True}.get(scene.amp))
    print(estimate_memory(settings, prior_options), flush=True)
    prior = load_prior(scene.prior, prior_options)
    # Checked before the reward is loaded, which can take minutes.
    check_views(scene.views, prior.views)
    reward = None if scene.reward is None else load_reward(scene.reward, device)
    # A run records the hashes of these files. A folder has no hash; its path is among the settings.
    file_by_role = {
        file_role: Path(path)
        for file_role, path in (("prior", scene.prior), ("reward", scene.reward))
        if path is not None
    }
    return Scene(
        prior=prior,
        renderer=PerspectiveViews(scene.resolution, CameraRanges(views=scene.views)),
        views=scene.views,
        start=_start_factory(scene.planes),
        reward=reward,
        judge=served_judge(scene),
        geometry=load_geometry(scene.geometry_reward, scene.prior, device),
        measures=lambda asset, prompts: {},
        device=device,
        inputs={file_role: path for file_role, path in file_by_role.items() if path.is_file()},
    )


def check_served_judge(scene: SceneConfig) -> None:
    """Raise ValueError for a --judge that is no address, with a prior that has no questions of its own."""
    if scene.judge is not None and not scene.has_served_judge:
        raise ValueError(
            f"--judge={scene.judge} cannot be combined with --prior={scene.prior}. Pass the address of a"
            " server, such as http://127.0.0.1:8000/v1, or name a reward with --reward."
        )


def estimate_memory(settings: DistillSettings, prior_options: PriorOptions) -> Costs:
    """Estimate the memory of a step for the arm whose step needs the most memory.

    Args:
        settings: settings of the run.
        prior_options: device and precision of the prior.
    """
    scene = settings.scene
    arm_costs = []
    # Number of images in a step with one start of each asset.
    image_count = scene.views * min(settings.loop.batch, len(settings.pairs()))
    # [1:] are the numbers of starts and noises. They determine the memory, so each pair is estimated once.
    for start_count, noise_count in {arm_settings(settings, arm)[1:] for arm in settings.arms}:
        step_costs = prior_costs(scene.prior, start_count * image_count, prior_options, noise_count)
        if scene.reward is not None:
            step_costs = step_costs + reward_costs(scene.reward, start_count * image_count, noise_count)
        arm_costs.append(step_costs)
    return max(arm_costs, key=lambda step_costs: step_costs.total)


def _start_factory(resolution: int):
    """Return a function that makes starting assets: tri-planes with `resolution` texels per edge."""

    def start(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> TriPlanes:
        """Make one random tri-plane for each generator. The prompts are not used."""
        # `TriPlanes` has one seed for all assets, which is derived from the generators of all of them.
        seed = derive_seed(*(torch.randint(2**31, (1,), generator=rng).item() for rng in generators)) % 2**31
        del prompts
        return TriPlanes(len(generators), resolution, channels=16, hidden=32, seed=seed)

    return start
