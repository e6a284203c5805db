"""Defines text to 3D on heads of people as a scene. A prompt names a head. The prior is a mixture of renders
of that head in closed form. Latents of the bundled generator are optimised, and finished assets are compared
with the ground-truth head.

All cameras stand close together in front of the head, so images do not determine the back. Assets are latents
and not texels, because a learned reward is exploited if every texel is free: its score increases without
bound, and the shape gets worse.

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

AZIMUTHS = (-12.0, 0.0, 12.0)  # degrees, of the K cameras; they do not show the back
VIEWS = 1  # views of each asset in a step
PIXELS = 32  # pixels per edge of the rendered views
SAMPLES = 48  # samples per ray
GRID = 64  # grid points per edge of the cubes on which shapes are compared
# Data set whose heads are named. Neither a generator nor the image features are trained on it.
_DATA = "synthetic:people64@seed=81"
_WIDTH = 0.1  # standard deviation about a render, in latents of -1..1
_NEVER = -1e6  # logit of a component that a prompt does not have; likelihoods differ by thousands of nats
_SAME = 1e-3  # largest distance of two cam2world matrices of the same camera


@dataclass(frozen=True)
class FrontCameras:
    """Random choice among K fixed cameras in front of the head, at the distance of the generator's
    cameras.
    """

    views: int = VIEWS  # cameras per asset and step

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Choose `views` different cameras for each asset."""
        # The order of random numbers [A, K] gives each asset a random permutation of the cameras.
        chosen = torch.rand(assets, len(AZIMUTHS), generator=rng).argsort(dim=1)[:, : self.views]
        return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64)[chosen].flatten())


def cameras_at(azimuth: torch.Tensor) -> Views:
    """Make cameras at azimuths [B] in degrees, with FFHQ's focal length and radius."""
    # FFHQ_FOCAL is in units of the image's edge, so half the edge is 0.5.
    fov = math.degrees(2 * math.atan(0.5 / FFHQ_FOCAL))
    return views_at(azimuth, *(torch.full_like(azimuth, value) for value in (0.0, FFHQ_RADIUS, fov)))


def all_cameras(assets: int = 1) -> Views:
    """Make all K cameras for each asset."""
    return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64).repeat(assets))


def target_head(number: int) -> Head:
    """Return the ground-truth head of the prompt 'head NUMBER'."""
    # The third result, the cameras of the data set, is not used: this scene has its own cameras.
    shape, appearance, _ = head_parameters(parse_name(_DATA), range(number, number + 1))
    return named_people(np.concatenate([shape, appearance], axis=1))[0]


@functools.cache
def target_grid(number: int) -> np.ndarray:
    """Return the signed distances [n, n, n] of a ground-truth head."""
    return head_grid(target_head(number), GRID)


@functools.cache
def modes(numbers: tuple[int, ...]) -> torch.Tensor:
    """Render heads from all cameras on white, [H, K, 3, R, R] in 0..1."""
    # [K, 4, 4] cam2world matrices
    poses = all_cameras().cameras[:, :16].unflatten(1, (4, 4)).double().numpy()
    images = [
        [picture(target_head(number), pose, FFHQ_FOCAL, PIXELS)[0] for pose in poses] for number in numbers
    ]
    # [H, K, R, R, 3] to [H, K, 3, R, R]
    return torch.from_numpy(np.array(images, np.float32)).movedim(-1, 2)


class ViewMixture(GmmPrior):
    """A mixture in which every component belongs to a camera. The camera of an image selects its components;
    without cameras, all remain.
    """

    def __init__(
        self, means: torch.Tensor, stds: torch.Tensor, prompts: dict[str, torch.Tensor], cameras: torch.Tensor
    ):
        super().__init__(means, stds, prompts)
        self.cameras = cameras

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise as `GmmPrior` does, with the components of the images' cameras only."""
        if cameras is not None:
            # [B, M] True for components of other cameras
            other = torch.cdist(cameras.double(), self.cameras.double()) > _SAME
            # cond [B, 1, M] contains the logits of the components.
            cond = cond + _NEVER * other[:, None]
        return super().predict_noise(x_t, t, cond)


def mixture(prompts: Sequence[str]) -> ViewMixture:
    """Make the mixture: a prompt consists of the K renders of its head as narrow components with equal
    weights, the null prompt of those of all prompts.
    """
    # Latents are 2 images - 1.
    # A tuple, because the cache needs a hashable argument.
    means = modes(tuple(head_numbers(prompts))).flatten(0, 1) * 2 - 1
    per_prompt = len(AZIMUTHS)
    # Equal logits: the null prompt gives all components the same weight.
    embeddings = {"": torch.zeros(len(means))}
    for i, prompt in enumerate(prompts):
        embeddings[prompt] = torch.full((len(means),), _NEVER)
        embeddings[prompt][per_prompt * i : per_prompt * (i + 1)] = 0
    return ViewMixture(
        means,
        torch.full((len(means),), _WIDTH),
        embeddings,
        all_cameras().cameras[:, :16].repeat(len(prompts), 1),
    )


def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> Latents:
    """Make the assets to begin with: random held-out latents, which do not depend on the prompts."""
    del prompts
    return Latents.of_seeds(
        [DISTILLED.all[int(torch.randint(DISTILLED.count, (1,), generator=rng))] for rng in draws]
    )


def distance(values: np.ndarray, head: np.ndarray) -> float:
    """Compute the mean distance of each surface of [n, n, n] to the other one above the shoulders, in world
    units; half the edge of the cube if a shape has no surface.
    """
    # Below the shoulders all heads are cut off in the same way.
    clouds = [points[points[:, 1] > BASE] for points in map(surface_points, (values, head))]
    if not all(map(len, clouds)):
        return 0.5
    # Both directions are averaged: a missing part and an additional part both count.
    trees = [cKDTree(points) for points in clouds]
    return float(np.mean([trees[1 - i].query(points)[0].mean() for i, points in enumerate(clouds)]))


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Measure finished assets: both bundled rewards, and, compared with the ground-truth head, the simulated
    annotator's utility without noise, the distance of the surfaces, the volume error at the back of the head,
    and the RMS difference of all K images. Returns: name -> [A].
    """
    numbers = head_numbers(prompts)
    values = shape_grids(asset, GRID)
    pairs = [(cube, target_grid(number)) for cube, number in zip(values, numbers, strict=True)]
    # All K cameras, not only those of the last step.
    images = (
        PerspectiveViews(PIXELS, samples=SAMPLES).render(asset, all_cameras(len(asset)), torch.ones(3)).images
    )
    targets = modes(tuple(numbers)).flatten(0, 1)
    return {
        "reward": load_reward(bundled.REWARD).score(asset).double(),
        "held-out reward": load_reward(bundled.WATCH).score(asset).double(),
        "utility": torch.tensor([utility(*pair).total for pair in pairs]),
        "distance": torch.tensor([distance(*pair) for pair in pairs]),
        "back-of-head error": torch.tensor([volume_error(*pair).total for pair in pairs]),
        "rms": (images - targets)
        .square()
        .unflatten(0, (len(asset), -1))
        .flatten(1)
        .mean(dim=1)
        .sqrt()
        .double(),
    }


@dataclass(frozen=True)
class ShapeEvaluator:
    """Held-out evaluator: the shape that is closer to the ground-truth head of its prompt is better."""

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Return 0 or 1 for the better one of each pair, and -1 for a tie."""
        heads = [target_grid(number) for number in head_numbers(prompts)]
        scores = [
            [-distance(cube, head) for cube, head in zip(shape_grids(a, GRID), heads, strict=True)]
            for a in (first, second)
        ]
        # Scores are negative distances: larger is better.
        return [verdict(a, b) for a, b in zip(*scores, strict=True)]


def heads_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the problem on heads. Raises: ValueError for another device, and for methods with a reward
    of images.
    """
    if device.type != "cpu":
        raise ValueError(
            f"--device: --prior=heads runs on cpu only, got {device}. Its prior is too small for a GPU. Use"
            " --device=cpu."
        )
    image_methods = [arm.method for arm in map(Arm.parse, settings.arms) if METHODS[arm.method].rewarded]
    if image_methods:
        raise ValueError(
            f"--method={image_methods[0]}: --prior=heads has no reward of images. Use --method=sds+geometry,"
            " whose reward uses the shape."
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
        evaluator=ShapeEvaluator(),
        evaluator_description=(
            "it compares the distance of the surface to that of the prompt's ground-truth head, which is"
            " not used during a run"
        ),
        background=torch.ones(3),
        log_prob=lambda x, prompts: prior.log_prob(x, prior.embed(prompts)),
        inputs={"generator": bundled.GENERATOR},
    )
