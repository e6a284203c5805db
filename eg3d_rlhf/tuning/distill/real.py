"""Scenes of real priors: Stable Diffusion or MVDream from local files, tri-planes seen in perspective, rewards from local files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from eg3d_rlhf.core.memory import Costs
from eg3d_rlhf.core.ranges import check_views
from eg3d_rlhf.generators.assets.planes import TriPlanes
from eg3d_rlhf.generators.assets.render import PerspectiveViews
from eg3d_rlhf.generators.assets.views import CameraDraws
from eg3d_rlhf.rewards.pictures.local import load_reward, reward_costs
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.geometry_rewards import load_geometry
from eg3d_rlhf.tuning.distill.methods import of_arm
from eg3d_rlhf.tuning.distill.priors.local import load_prior, prior_costs
from eg3d_rlhf.tuning.distill.priors.stable_diffusion import PriorOptions
from eg3d_rlhf.tuning.distill.scene import Scene
from training.phases import derive_seed


def real_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """The scene of a prior from local files; says first what it will take of memory. Raises: ValueError, OSError."""
    scene = settings.scene
    if scene.judge is not None:
        raise ValueError(f"--judge: expected none with --prior={scene.prior}, got {scene.judge}. Name a --reward.")
    options = PriorOptions(device=device, half={"off": False, "half": True}.get(scene.amp))
    print(memory(settings, options), flush=True)
    prior = load_prior(scene.prior, options)
    check_views(scene.views, prior.views)
    reward = None if scene.reward is None else load_reward(scene.reward, device)
    files = {name: Path(path) for name, path in (("prior", scene.prior), ("reward", scene.reward)) if path is not None}
    return Scene(
        prior=prior, renderer=PerspectiveViews(scene.resolution, CameraDraws(views=scene.views)), views=scene.views,
        start=_start(scene.planes), reward=reward,
        geometry=load_geometry(scene.geometry_reward, device), measures=lambda asset, prompts: {}, device=device,
        inputs={name: path for name, path in files.items() if path.is_file()},
    )  # fmt: skip


def memory(settings: DistillSettings, options: PriorOptions) -> Costs:
    """What a step holds under the arm that needs most, from shapes alone. Raises: ValueError, OSError."""
    scene, tables = settings.scene, []
    views = scene.views * min(settings.loop.batch, len(settings.pairs()))
    for starts, noises in {of_arm(settings, arm)[1:] for arm in settings.arms}:
        costs = prior_costs(scene.prior, starts * views, options, noises)
        tables.append(costs if scene.reward is None else costs + reward_costs(scene.reward, starts * views, noises))
    return max(tables, key=lambda costs: costs.total)


def _start(resolution: int):
    def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> TriPlanes:
        seed = derive_seed(*(torch.randint(2**31, (1,), generator=rng).item() for rng in draws)) % 2**31
        del prompts
        return TriPlanes(len(draws), resolution, channels=16, hidden=32, seed=seed)

    return start
