"""Text to 3D on heads of people: a prompt names one, the prior is a mixture of its pictures in closed form,
what is optimised are latents of the bundled generator, and what is finished is held against the whole head.

The cameras stand close together in front, so pictures leave the back open. Assets are latents because a
learned reward is exploited where every texel is free: its score rises without bound and the shape gets worse.
Letters: A assets, V views of each, B = A V, K cameras, H heads, M components, R pixels, n grid points along
an edge of the cube.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import DISTILLED
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.latents import Latents
from eg3d_rlhf.generators.assets.views import PerspectiveViews, Views, views_at
from eg3d_rlhf.measures.people import BASE, shape_grids, surface_points, volume_error
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.rewards.images.pairwise_evaluators import verdict
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.guidance.geometry import load_geometry
from eg3d_rlhf.tuning.distill.methods import METHODS
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.scene import Scene
from eg3d_rlhf.tuning.distill.scene_kinds import head_numbers
from training.heads.people import Head, named_people, picture
from training.heads.people_mesh import head_grid
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS
from training.synthetic_heads import head_parameters, parse_name

AZIMUTHS = (-12.0, 0.0, 12.0)  # degrees, of the K cameras: so few that pictures leave much of the shape open
VIEWS = 1
PIXELS = 32
SAMPLES = 48
JUDGED = 64  # grid points per edge of the cubes that are judged
# whose heads are named: neither a generator nor the image features learn from these
_DATA = "synthetic:people64@seed=81"
_WIDTH = 0.1  # deviation about a picture, in latents of -1..1
_NEVER = -1e6  # logit of a component that a condition does not have: likelihoods differ by thousands of nats
_SAME = 1e-3  # distance of two cam2world matrices that are one camera


@dataclass(frozen=True)
class FrontCameras:
    """Some of K fixed cameras in front of the head, where the generator's stand."""

    views: int = VIEWS

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        chosen = torch.rand(assets, len(AZIMUTHS), generator=rng).argsort(dim=1)[:, : self.views]
        return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64)[chosen].flatten())


def cameras_at(azimuth: torch.Tensor) -> Views:
    fov = math.degrees(2 * math.atan(0.5 / FFHQ_FOCAL))
    return views_at(azimuth, *(torch.full_like(azimuth, value) for value in (0.0, FFHQ_RADIUS, fov)))


def all_cameras(assets: int = 1) -> Views:
    return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64).repeat(assets))


def named(number: int) -> Head:
    """The whole head that 'head NUMBER' names."""
    shape, appearance, _ = head_parameters(parse_name(_DATA), range(number, number + 1))
    return named_people(np.concatenate([shape, appearance], axis=1))[0]


@functools.cache
def whole(number: int) -> np.ndarray:
    """Its signed distances [n, n, n]."""
    return head_grid(named(number), JUDGED)


@functools.cache
def modes(numbers: tuple[int, ...]) -> torch.Tensor:
    """Pictures [H, K, 3, R, R] in 0..1 of heads from all cameras, on white."""
    poses = all_cameras().cameras[:, :16].unflatten(1, (4, 4)).double().numpy()
    pictures = [[picture(named(number), pose, FFHQ_FOCAL, PIXELS)[0] for pose in poses] for number in numbers]
    return torch.from_numpy(np.array(pictures, np.float32)).movedim(-1, 2)


class ViewMixture(GmmPrior):
    """A mixture whose components belong to a camera each: a picture's camera leaves those of its own. Without
    cameras all remain.
    """

    def __init__(
        self, means: torch.Tensor, stds: torch.Tensor, prompts: dict[str, torch.Tensor], cameras: torch.Tensor
    ):
        super().__init__(means, stds, prompts)
        self.cameras = cameras

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        if cameras is not None:
            other = torch.cdist(cameras.double(), self.cameras.double()) > _SAME  # [B, M]
            cond = cond + _NEVER * other[:, None]
        return super().predict_noise(x_t, t, cond)


def mixture(prompts: Sequence[str]) -> ViewMixture:
    """The K pictures of a prompt's head as narrow components in equal parts; the null has those of all
    prompts.
    """
    means = modes(tuple(head_numbers(prompts))).flatten(0, 1) * 2 - 1
    each = len(AZIMUTHS)
    embeddings = {"": torch.zeros(len(means))}
    for i, prompt in enumerate(prompts):
        embeddings[prompt] = torch.full((len(means),), _NEVER)
        embeddings[prompt][each * i : each * (i + 1)] = 0
    return ViewMixture(
        means,
        torch.full((len(means),), _WIDTH),
        embeddings,
        all_cameras().cameras[:, :16].repeat(len(prompts), 1),
    )


def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> Latents:
    """Assets to begin with, of held-out latents that follow from the draws alone; the prompts say nothing of
    them.
    """
    del prompts
    return Latents.of_seeds(
        [DISTILLED.all[int(torch.randint(DISTILLED.count, (1,), generator=rng))] for rng in draws]
    )


def distance(values: np.ndarray, head: np.ndarray) -> float:
    """Mean distance of either surface of [n, n, n] to the other one above the shoulders, world units; half
    the cube's side where a shape has none.
    """
    clouds = [points[points[:, 1] > BASE] for points in map(surface_points, (values, head))]
    if not all(map(len, clouds)):
        return 0.5
    trees = [cKDTree(points) for points in clouds]
    return float(np.mean([trees[1 - i].query(points)[0].mean() for i, points in enumerate(clouds)]))


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Figures [A] of finished assets: both bundled rewards, and against the head that the prompt names the
    annotator's utility without noise, the distance of the surfaces, the back-of-head volume error, and the
    RMS difference of all K pictures to its own.
    """
    numbers = head_numbers(prompts)
    values = shape_grids(asset, JUDGED)
    pairs = [(cube, whole(number)) for cube, number in zip(values, numbers, strict=True)]
    seen = (
        PerspectiveViews(PIXELS, samples=SAMPLES).render(asset, all_cameras(len(asset)), torch.ones(3)).images
    )
    wanted = modes(tuple(numbers)).flatten(0, 1)
    return {
        "reward": load_reward(bundled.REWARD).score(asset).double(),
        "held-out reward": load_reward(bundled.WATCH).score(asset).double(),
        "utility": torch.tensor([utility(*pair).total for pair in pairs]),
        "distance": torch.tensor([distance(*pair) for pair in pairs]),
        "back-of-head error": torch.tensor([volume_error(*pair).total for pair in pairs]),
        "rms": (seen - wanted).square().unflatten(0, (len(asset), -1)).flatten(1).mean(dim=1).sqrt().double(),
    }


@dataclass(frozen=True)
class ShapeJudge:
    """Which shape is nearer to the head that its prompt names."""

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        heads = [whole(number) for number in head_numbers(prompts)]
        scores = [
            [-distance(cube, head) for cube, head in zip(shape_grids(a, JUDGED), heads, strict=True)]
            for a in (first, second)
        ]
        return [verdict(a, b) for a, b in zip(*scores, strict=True)]


def heads_scene(settings: DistillSettings, device: torch.device) -> Scene:
    if device.type != "cpu":
        raise ValueError(
            f"--device: expected cpu with --prior=heads, got {device}. Its prior is too small for a GPU."
        )
    rewarded = [arm.method for arm in map(Arm.parse, settings.arms) if METHODS[arm.method].rewarded]
    if rewarded:
        raise ValueError(
            f"--method={rewarded[0]}: expected sds with --prior=heads, which has no reward of pictures. Use"
            " sds+geometry."
        )
    prior = mixture(settings.prompts)
    return Scene(
        prior=prior,
        renderer=PerspectiveViews(PIXELS, FrontCameras(), SAMPLES),
        views=VIEWS,
        start=start,
        reward=None,
        geometry=load_geometry(settings.scene.geometry_reward, settings.scene.prior, device),
        measures=measures,
        final=ShapeJudge(),
        evaluator=(
            "the distance of the surface to that of the head that the prompt names, which no part of a run"
            " reads"
        ),
        background=torch.ones(3),
        log_prob=lambda x, prompts: prior.log_prob(x, prior.embed(prompts)),
        inputs={"generator": bundled.GENERATOR},
    )
