"""Text to 3D on the procedural heads: a prompt names one, the prior is a mixture of its pictures in closed form, what is optimised are
latents of the bundled generator, and what is finished is held against the true head.

The cameras stand close together in front, so pictures leave much of the shape open. Assets are latents because a learned reward is
exploited where every texel is free: its score rises without bound and the shape gets worse.
Letters: A assets, V views of each, B = A V, K cameras, H heads, M components, R pixels.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import DISTILLED
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.latents import Latents
from eg3d_rlhf.generators.assets.views import PerspectiveViews, Views, views_at
from eg3d_rlhf.measures.true_heads import distance_to_heads, true_pictures, true_shapes
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.rewards.pictures.judges import verdict
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill.compare import SHAPE_JUDGES
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.guidance.geometry import load_geometry
from eg3d_rlhf.tuning.distill.methods import METHODS
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.scene import SCENES, Scene, SceneKind
from eg3d_rlhf.tuning.gan.watch import annotator_calibration
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS

HEADS, SEEDS = 8, 2  # of the default comparison
AZIMUTHS = (-12.0, 0.0, 12.0)  # degrees, of the K cameras: so few that pictures leave much of the shape open
VIEWS, PIXELS, SAMPLES = 1, 32, 48
JUDGED = 64  # grid points per edge of the cubes that are judged
_FIRST = 20_000  # the true head that "head 0" names: none of those from here on taught anything
_WIDTH = 0.1  # deviation about a picture, in latents of -1..1
_NEVER = -1e6  # logit of a component that a condition does not have: likelihoods differ by thousands of nats
_SAME = 1e-3  # distance of two cam2world matrices that are one camera


def check(prompts: tuple[str, ...], assets: int | None, comparison: bool) -> tuple[tuple[str, ...], int]:
    """Prompts and assets of each: 'head 0' and following where none are given. Raises: ValueError for another prompt."""
    head_numbers(prompts)
    return prompts or tuple(f"head {i}" for i in range(HEADS)), assets or (SEEDS if comparison and not prompts else 1)


def head_numbers(prompts: Sequence[str]) -> list[int]:
    matches = [re.fullmatch(r"head (\d{1,4})", prompt) for prompt in prompts]
    for prompt, match in zip(prompts, matches, strict=True):
        if match is None:
            raise ValueError(f"--prompt: expected 'head N' with a number up to 9999 and --prior=heads, got {prompt!r}. Name one.")
    return [int(match[1]) for match in matches if match is not None]


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


@functools.cache
def modes(numbers: tuple[int, ...]) -> torch.Tensor:
    """Pictures [H, K, 3, R, R] in 0..1 of heads from all cameras, on white."""
    return torch.stack([true_pictures(_FIRST + number, all_cameras().cameras, PIXELS) for number in numbers])


class ViewMixture(GmmPrior):
    """A mixture whose components belong to a camera each: a picture's camera leaves those of its own. Without cameras all remain."""

    def __init__(self, means: torch.Tensor, stds: torch.Tensor, prompts: dict[str, torch.Tensor], cameras: torch.Tensor):
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
    """The K pictures of a prompt's head as narrow components in equal parts; the null has those of all prompts."""
    means = modes(tuple(head_numbers(prompts))).flatten(0, 1) * 2 - 1
    each, embeddings = len(AZIMUTHS), {"": torch.zeros(len(means))}
    for i, prompt in enumerate(prompts):
        embeddings[prompt] = torch.full((len(means),), _NEVER)
        embeddings[prompt][each * i : each * (i + 1)] = 0
    return ViewMixture(means, torch.full((len(means),), _WIDTH), embeddings, all_cameras().cameras[:, :16].repeat(len(prompts), 1))


def start(prompts: Sequence[str], draws: Sequence[torch.Generator]) -> Latents:
    """Assets to begin with, of held-out latents that follow from the draws alone; the prompts say nothing of them."""
    del prompts
    return Latents.of_seeds([DISTILLED.all[int(torch.randint(DISTILLED.count, (1,), generator=rng))] for rng in draws])


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str], judges: Mapping[str, Callable[[Asset], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Figures [A] of finished assets: both bundled rewards, the judges that were handed in, the annotator's utility without noise, the
    distance to the surface of the head that the prompt names, and the RMS difference of all K pictures to its own.
    """
    numbers, spec, calibration = head_numbers(prompts), SlabSpec.of(asset.bounds, JUDGED), annotator_calibration()
    sigma = asset.density_grid(spec)  # [A, D, H, W]
    shape = torch.cat([true_shapes(1, _FIRST + number) for number in numbers])
    seen = PerspectiveViews(PIXELS, samples=SAMPLES).render(asset, all_cameras(len(asset)), torch.ones(3)).images
    wanted = modes(tuple(numbers)).flatten(0, 1)
    return {
        "reward": load_reward(bundled.REWARD).score(asset).double(),
        "watching reward": load_reward(bundled.WATCH).score(asset).double(),
        **{name: judge(asset) for name, judge in judges.items()},
        "utility": torch.tensor([utility(cube, calibration=calibration, box_warp=spec.box_warp).total for cube in sigma.numpy()]),
        "distance": torch.from_numpy(distance_to_heads(sigma, spec, shape, asset.level)),
        "rms": (seen - wanted).square().unflatten(0, (len(asset), -1)).flatten(1).mean(dim=1).sqrt().double(),
    }


@dataclass(frozen=True)
class ShapeJudge:
    """The higher score wins; equal ones tie."""

    score: Callable[[Asset], torch.Tensor]

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        del prompts
        return [verdict(a, b) for a, b in zip(self.score(first).tolist(), self.score(second).tolist(), strict=True)]


def heads_scene(settings: DistillSettings, device: torch.device) -> Scene:
    if device.type != "cpu":
        raise ValueError(f"--device: expected cpu with --prior=heads, got {device}. Its prior is too small for a GPU.")
    rewarded = [arm.method for arm in map(Arm.parse, settings.arms) if METHODS[arm.method].rewarded]
    if rewarded:
        raise ValueError(f"--method={rewarded[0]}: expected sds with --prior=heads, which has no reward of pictures. Use sds+geometry.")
    prior = mixture(settings.prompts)
    judges = {name: functools.cache(judge) for name, judge in SHAPE_JUDGES.items()}
    critic = judges.get("critic")
    return Scene(
        prior=prior, renderer=PerspectiveViews(PIXELS, FrontCameras(), SAMPLES), views=VIEWS, start=start, reward=None,
        geometry=load_geometry(settings.scene.geometry_reward, settings.scene.prior, device),
        measures=functools.partial(measures, judges=judges),
        final=None if critic is None else ShapeJudge(critic),
        judge="the shape critic, which reads normal maps and learned from neither reward nor annotator",
        background=torch.ones(3), log_prob=lambda x, prompts: prior.log_prob(x, prior.embed(prompts)),
        inputs={"generator": bundled.GENERATOR},
    )  # fmt: skip


SCENES.add("heads", SceneKind(open=heads_scene, check=check))
