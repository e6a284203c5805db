"""Defines the scene of synthetic heads.

A prompt 'head N' names a synthetic head. The prior is a mixture of Gaussians about renders of that head, in
closed form. Latents of the bundled generator are optimised, and the finished assets are compared with the
ground-truth head, which is the head that the prompt names.

All cameras are close together in front of the head, so the images do not determine the back of the head.
Assets are latents of a generator and not free planes. With free planes, optimisation exploits a learned
reward: the score rises without bound while the shape becomes worse.

Shapes: A = number of assets; V views of an asset in a step; B = A V images; K fixed cameras; H heads; M
components of the mixture; R pixels per edge; n grid points per edge of the cube.
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
from eg3d_rlhf.rewards.images.pairwise_evaluators import winner
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.guidance.geometry import load_geometry
from eg3d_rlhf.tuning.distill.methods import METHODS
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.scene import Scene
from eg3d_rlhf.tuning.distill.scene_kinds import head_numbers
from training.heads.people import Head, heads_from_latents, render_head
from training.heads.people_mesh import head_grid
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS
from training.synthetic_heads import head_parameters, parse_name

AZIMUTHS = (-12.0, 0.0, 12.0)  # azimuths of the K cameras in degrees; 0 is the front
VIEWS = 1  # number of views of each asset in a step
PIXELS = 32  # edge of the rendered views in pixels
SAMPLES = 48  # number of samples per ray
GRID = 64  # grid points per edge of the cube on which shapes are compared
# Data set of the heads that prompts name. No generator and no image features were trained on it.
_DATA = "synthetic:people64@seed=81"
_WIDTH = 0.1  # standard deviation of a component about its render, in latents of -1..1
# Logit of a component that a prompt does not contain. It has to be lower than any difference of log
# likelihoods, which are thousands of nats.
_NEVER = -1e6
_SAME = 1e-3  # two cameras are regarded as equal if their cam2world matrices differ by less than this


@dataclass(frozen=True)
class FrontCameras:
    """Random choice among the K fixed cameras in front of the head.

    Their distance from the head is that of the generator's cameras.
    """

    views: int = VIEWS  # number of cameras for each asset in a step

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Choose `views` different cameras for each of `assets` assets."""
        # argsort of random numbers [A, K] is a random permutation of the cameras for each asset.
        camera_indices = torch.rand(assets, len(AZIMUTHS), generator=rng).argsort(dim=1)[:, : self.views]
        return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64)[camera_indices].flatten())


def cameras_at(azimuth: torch.Tensor) -> Views:
    """Make cameras at azimuths [B] in degrees, with the focal length and the distance of FFHQ's cameras."""
    # FFHQ_FOCAL is in units of the image's edge, so half of the edge is 0.5.
    fov = math.degrees(2 * math.atan(0.5 / FFHQ_FOCAL))
    elevation = torch.full_like(azimuth, 0.0)
    distance_to_origin = torch.full_like(azimuth, FFHQ_RADIUS)
    return views_at(azimuth, elevation, distance_to_origin, torch.full_like(azimuth, fov))


def all_cameras(asset_count: int = 1) -> Views:
    """Make all K cameras for each of `asset_count` assets."""
    return cameras_at(torch.tensor(AZIMUTHS, dtype=torch.float64).repeat(asset_count))


def target_head(head_number: int) -> Head:
    """Return the ground-truth head of the prompt 'head NUMBER'."""
    # The third result is the cameras of the data set. They are not used, since this scene has its own
    # cameras.
    shape, appearance, _ = head_parameters(parse_name(_DATA), range(head_number, head_number + 1))
    return heads_from_latents(np.concatenate([shape, appearance], axis=1))[0]


@functools.cache
def target_grid(head_number: int) -> np.ndarray:
    """Return the signed distances [n, n, n], at the points of GRID, of a prompt's ground-truth head."""
    return head_grid(target_head(head_number), GRID)


@functools.cache
def modes(prompt_numbers: tuple[int, ...]) -> torch.Tensor:
    """Render the heads of H prompts 'head NUMBER' from all K cameras on white, [H, K, 3, R, R] in 0..1."""
    cam2world = all_cameras().cameras[:, :16].unflatten(1, (4, 4)).double().numpy()  # [K, 4, 4]
    images = []
    for head_number in prompt_numbers:
        head = target_head(head_number)
        # [0] is the image; the second result, the depth map, is not used.
        images.append([render_head(head, pose, FFHQ_FOCAL, PIXELS)[0] for pose in cam2world])
    # [H, K, R, R, 3] to [H, K, 3, R, R]
    return torch.from_numpy(np.array(images, np.float32)).movedim(-1, 2)


class ViewMixture(GmmPrior):
    """Mixture of Gaussians in which every component belongs to a camera.

    An image with a camera has only the components of that camera. An image without a camera has all
    components.

    Args:
        means: [M, C, H, W], means of the components.
        stds: [M], standard deviations of the components.
        prompts: text -> embedding [M], the logits of the components.
        cameras: [M, 16], cam2world matrix of the camera of each component.
    """

    def __init__(
        self, means: torch.Tensor, stds: torch.Tensor, prompts: dict[str, torch.Tensor], cameras: torch.Tensor
    ):
        super().__init__(means, stds, prompts)
        self.cameras = cameras

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise as `GmmPrior` does, with the components of the images' cameras only.

        Args:
            x_t: [B, C, H, W], noised latents.
            t: [B], times.
            cond: [B, 1, M], embeddings of the prompts, which are logits of the components.
            cameras: [B, 16], cam2world matrices, or None for all components.
        """
        if cameras is not None:
            # [B, M], True for components of other cameras than that of the image.
            has_other_camera = torch.cdist(cameras.double(), self.cameras.double()) > _SAME
            cond = cond + _NEVER * has_other_camera[:, None]
        return super().predict_noise(x_t, t, cond)


def mixture(prompts: Sequence[str]) -> ViewMixture:
    """Make the prior, a mixture of Gaussians in closed form.

    Each of the K renders of a head is the mean of a narrow component. The distribution of a prompt consists
    of the components of its head, with equal weights. The distribution of the null prompt consists of the
    components of all prompts.
    """
    # Latents are 2 images - 1. `modes` gets a tuple, because its cache needs a hashable argument.
    means = modes(tuple(head_numbers(prompts))).flatten(0, 1) * 2 - 1
    components_per_head = len(AZIMUTHS)
    # "" is the null prompt. Equal logits give all components the same weight.
    embeddings = {"": torch.zeros(len(means))}
    for i, prompt in enumerate(prompts):
        embeddings[prompt] = torch.full((len(means),), _NEVER)
        embeddings[prompt][components_per_head * i : components_per_head * (i + 1)] = 0
    return ViewMixture(
        means,
        torch.full((len(means),), _WIDTH),
        embeddings,
        all_cameras().cameras[:, :16].repeat(len(prompts), 1),
    )


def start(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Latents:
    """Make starting assets: a random latent of a set of held-out latents for each of the generators.

    The prompts are not used.
    """
    del prompts
    seeds = [DISTILLED.seeds[int(torch.randint(DISTILLED.count, (1,), generator=rng))] for rng in generators]
    return Latents.from_seeds(seeds)


def distance(shape_volume: np.ndarray, head_volume: np.ndarray) -> float:
    """Compute the symmetric mean distance between the surfaces of a shape and of the ground-truth head.

    It is the mean of the distances from points of one surface to the nearest point of the other surface,
    averaged over both directions, so that missing and additional parts both count. Only the surface above the
    shoulders is used, because all heads are cut off below in the same way.

    Args:
        shape_volume: [n, n, n], density or signed distance of the shape.
        head_volume: [n, n, n], signed distance of the head.
    Returns: distance in world units; 0.5, half the edge of the cube, if one of the two has no surface.
    """
    shape_points, head_points = (
        cloud[cloud[:, 1] > BASE] for cloud in (surface_points(shape_volume), surface_points(head_volume))
    )
    if not len(shape_points) or not len(head_points):
        return 0.5
    distance_to_head = cKDTree(head_points).query(shape_points)[0].mean()
    distance_from_head = cKDTree(shape_points).query(head_points)[0].mean()
    return float(np.mean([distance_to_head, distance_from_head]))


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Measure finished assets by the bundled rewards, and by comparison with their ground-truth heads.

    The ground-truth head of an asset is the head that its prompt names. The measures are:

    - "reward" and "held-out reward": scores of the two bundled rewards.
    - "utility": noise-free utility of the simulated annotator.
    - "distance": mean distance between the surfaces of asset and ground-truth head, in world units.
    - "back-of-head error": volume error at the back of the head.
    - "rms": root mean square difference between renders of asset and ground-truth head, from all K cameras.

    Args:
        asset: the assets, [A].
        prompts: one prompt 'head N' for each asset.
    Returns: dictionary from the name of a measure to a tensor with one value for each asset, [A].
    """
    prompt_numbers = head_numbers(prompts)
    shape_volumes = shape_grids(asset, GRID)
    # (shape, ground-truth head) of each asset, both [n, n, n].
    volume_pairs = [
        (shape_volume, target_grid(head_number))
        for shape_volume, head_number in zip(shape_volumes, prompt_numbers, strict=True)
    ]
    images = (
        PerspectiveViews(PIXELS, samples=SAMPLES).render(asset, all_cameras(len(asset)), torch.ones(3)).images
    )
    target_images = modes(tuple(prompt_numbers)).flatten(0, 1)
    return {
        "reward": load_reward(bundled.REWARD).score(asset).double(),
        "held-out reward": load_reward(bundled.HELDOUT_REWARD).score(asset).double(),
        "utility": torch.tensor([utility(*pair).total for pair in volume_pairs]),
        "distance": torch.tensor([distance(*pair) for pair in volume_pairs]),
        "back-of-head error": torch.tensor([volume_error(*pair).total for pair in volume_pairs]),
        "rms": (images - target_images)
        .square()
        .unflatten(0, (len(asset), -1))
        .flatten(1)
        .mean(dim=1)
        .sqrt()
        .double(),
    }


@dataclass(frozen=True)
class ShapeEvaluator:
    """Held-out evaluator that prefers the shape with the smaller distance from the ground-truth head."""

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Compare each asset of `first` with that of `second`; see `FinalEvaluator`."""
        head_volumes = [target_grid(head_number) for head_number in head_numbers(prompts)]
        scores = []  # minus the distances, so that larger is better
        for asset in (first, second):
            volume_pairs = zip(shape_grids(asset, GRID), head_volumes, strict=True)
            scores.append(
                [-distance(shape_volume, head_volume) for shape_volume, head_volume in volume_pairs]
            )
        return [winner(first_score, second_score) for first_score, second_score in zip(*scores, strict=True)]


def heads_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of synthetic heads.

    Args:
        settings: settings of the run.
        device: device of the run, which has to be the CPU.
    Raises: ValueError for another device, and for methods that need a reward of images.
    """
    if device.type != "cpu":
        raise ValueError(
            f"--device={device} cannot be used with --prior=heads, which is too small for a GPU. Use"
            " --device=cpu."
        )
    image_methods = [
        arm.method for arm in map(Arm.parse, settings.arms) if METHODS[arm.method].accepts_reward
    ]
    if image_methods:
        raise ValueError(
            f"--method={image_methods[0]} needs a reward of images, which --prior=heads does not have. Use"
            " --method=sds with --geometry-reward=sigma, which scores the shape."
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
            "it compares the distances of the surfaces to the surface of the prompt's ground-truth head, and"
            " is not used in training"
        ),
        background=torch.ones(3),
        log_prob=lambda x, prompts: prior.log_prob(x, prior.embed(prompts)),
        inputs={"generator": bundled.GENERATOR},
    )
