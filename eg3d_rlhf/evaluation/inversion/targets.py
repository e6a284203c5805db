"""What is to be inverted, an image of the user's or a sample of the generator itself with the truth; and how
good an inversion of it is.

Letters: R pixels per edge, L layers of ws, W w_dim, D, H, W grid points.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eg3d_rlhf.core.field import Field, Rendering, RenderOptions, render_each
from eg3d_rlhf.evaluation.inversion.projector import Objective, Target, cube_of, moved
from eg3d_rlhf.generators import Generator, device_of, latents, ws_of_seeds
from eg3d_rlhf.generators import camera as camera_of
from eg3d_rlhf.measures.image_similarity import psnr
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.preferences.settings import RESOLUTION
from eg3d_rlhf.preferences.synthetic import shape_values
from eg3d_rlhf.rewards.reward import Reward
from training.dataset import label_array
from training.heads import people_mesh
from training.rendering.cameras import LABEL_NUMBERS, pack_label, unpack_label

# four times the samples: what is measured is the shape and not the sampler
SMOOTH = RenderOptions(sample_mult=4)
SMOOTH_SEED = 1  # of its rays
SIDES = (0.4, -0.4)  # yaw of the views that the inversion does not see, radians from the target's camera


class Truth(NamedTuple):
    """A target's own latent, and what is seen of it."""

    ws: Tensor  # [1, L, W]
    views: list[Rendering]  # from the target's camera, and from SIDES


class Case(NamedTuple):
    name: str
    target: Target
    truth: Truth | None = None
    z: Tensor | None = None  # [1, Z], of the target's own latent


def of_file(generator: Generator, image: Path, mask: Path | None, camera: Tensor) -> Case:
    """The case of an image file. Raises: ValueError, OSError naming the flag."""
    device = device_of(generator)
    # [R, R, 3]
    pixels = torch.from_numpy(_read("--image", image, "RGB", generator.img_resolution)).to(device)
    weights = None
    if mask is not None:
        weights = (
            torch.from_numpy(_read("--mask", mask, "L", generator.img_resolution)).to(device)[None, None]
            / 255
        )
        if float(weights.max()) == 0:
            raise ValueError(f"--mask: expected some white in {mask}, got black alone. White is what counts.")
    return Case(image.stem, Target(pixels.permute(2, 0, 1)[None] / 127.5 - 1, camera, weights))


def _read(flag: str, path: Path, mode: str, resolution: int) -> np.ndarray:
    """float32 pixels in 0..255 of an image file with the generator's size."""
    try:
        with Image.open(path) as file:
            size = file.size
            pixels = np.array(file.convert(mode), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{flag}: expected an image file, got {path} ({error}). Name another.") from error
    if size != (resolution, resolution):
        raise ValueError(
            f"{flag}: expected {resolution} x {resolution} pixels, the generator's, got {size[0]} x {size[1]}"
            f" in {path}. Crop the head as the generator's own images show it, and resize it."
        )
    return pixels


@torch.no_grad()
def of_seed(generator: Generator, seed: int, camera: Tensor, psi: float = 1.0) -> Case:
    """The case of a seed's sample. The target is rendered smoothly, with rays that the inversion does not
    use.
    """
    ws = ws_of_seeds(generator, [seed], psi)
    views = render_each(generator.field(ws), cameras_about(generator, camera), SMOOTH, SMOOTH_SEED)
    return Case(
        f"seed{seed}", Target(views[0].image, camera), Truth(ws, views), latents([seed], generator.z_dim)
    )


def cameras_about(generator: Generator, camera: Tensor) -> list[Tensor]:
    """A camera [1, 25], and the same turned by each of SIDES."""
    return [camera, *(turned(camera, yaw, generator.cameras.pivot) for yaw in SIDES)]


def turned(camera: Tensor, yaw: float, pivot: Sequence[float]) -> Tensor:
    """A camera [1, 25] carried by `yaw` radians about the vertical through the pivot."""
    pose, intrinsics = unpack_label(camera.double())
    centre = pose.new_tensor(pivot)
    c = math.cos(yaw)
    s = math.sin(yaw)
    about = pose.new_tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    pose = pose.clone()
    pose[0, :3, 3] = about @ (pose[0, :3, 3] - centre) + centre
    pose[0, :3, :3] = about @ pose[0, :3, :3]
    return pack_label(pose, intrinsics).to(camera)


def parse_camera(generator: Generator, text: str | None) -> Tensor:
    """A camera [1, 25] from 'YAW,PITCH' in radians from frontal, from 25 numbers, or from a JSON file with
    such a list; None is frontal.

    Raises: ValueError.
    """
    if text is None:
        return camera_of(generator)
    path = Path(text)
    try:
        values = (
            json.loads(path.read_text())
            if path.suffix == ".json"
            else [float(part) for part in text.split(",")]
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected YAW,PITCH, 25 numbers or a .json file with them, got {text!r} ({error}). Correct it."
        ) from error
    if isinstance(values, list) and len(values) == 2:
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"expected a finite YAW,PITCH in radians, got {text!r}. Correct it.")
        return camera_of(generator, *values)
    if not isinstance(values, list):
        raise ValueError(
            f"expected a list of 25 numbers in {text}, got {type(values).__name__}. Write pose (16) and"
            " intrinsics (9)."
        )
    found = label_array([values], ["camera"], "camera", LABEL_NUMBERS)
    return torch.from_numpy(found).to(device_of(generator))


# How good an inversion is: against its image, against the truth where that is known, and by rewards and
# evaluators.


MEASURES = (  # of `measure`
    Measure("psnr", None, "higher", "dB at the target's camera"),
    Measure("psnr_side", None, "higher", "dB, mean of the held-out views"),
    Measure("perceptual", None, "lower", "feature distance at the target's camera"),
    Measure("perceptual_side", None, "lower", "feature distance, held-out views"),
    Measure("depth", None, "lower", "mean depth error at the target's camera, world units"),
    Measure("depth_side", None, "lower", "mean depth error, held-out views"),
    Measure("reward", None, "higher", "score"),
    Measure("evaluator", None, "higher", "evaluator's value"),
    Measure("moved", None, "lower", "mean |change of density| from the pivot"),
    Measure("mse", None, "lower", "final mean squared error as optimised"),
)


@dataclass(frozen=True, kw_only=True)
class Evaluators:
    """The guiding reward, and the held-out evaluator of shapes."""

    reward: Reward | None = None  # the one that guides, raw
    # of a case's shape; None where it cannot know
    evaluator: Callable[[Case, Field], float | None] | None = None
    name: str = "none"


def annotator_evaluator(case: Case, field: Field) -> float | None:
    """The annotator's utility without noise: it knows the whole head of a seed's target, and nothing of an
    image's.
    """
    if case.z is None:
        return None
    return utility(shape_values(field, RESOLUTION)[0], people_mesh.whole_grids(case.z, RESOLUTION)[0]).total


def reward_evaluator(reward: Reward) -> Callable[[Case, Field], float]:
    """Another reward's score."""
    return lambda _case, field: float(reward.score(field)[0])


@torch.no_grad()
def measure(
    generator: Generator, case: Case, ws: Tensor, pivot: Tensor, objective: Objective, evaluators: Evaluators
) -> dict[str, float]:
    """The measures of ws [1, L, W] under a generator; those that nobody can know here are left out.

    Args: pivot: density cube [1, D, H, W] of the second stage's start. Renderings take four times the
        samples, and other rays than the optimisation did; 'mse' alone is the optimised one.
    """
    field = generator.field(ws)
    cube = cube_of(generator)
    views = render_each(field, cameras_about(generator, case.target.camera), SMOOTH, SMOOTH_SEED + 1)
    image = objective.seen(views[0].image)
    found = {
        "mse": objective.image_loss(objective.render(field, 0))[1]["mse"],
        "psnr": psnr(image, case.target.image)[0],
        "perceptual": objective.perceptual(image, case.target.image)[0],
        "moved": moved(field, cube, pivot)[0],
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
    if evaluators.reward is not None:
        found["reward"] = evaluators.reward.score(field)[0]
    return {**{name: float(value) for name, value in found.items()}, **evaluated(case, field, evaluators)}


def evaluated(case: Case, field: Field, evaluators: Evaluators) -> dict[str, float]:
    """Return the evaluator's value, where there is one."""
    value = None if evaluators.evaluator is None else evaluators.evaluator(case, field)
    return {} if value is None else {"evaluator": float(value)}


@torch.no_grad()
def measure_truth(generator: Generator, case: Case, evaluators: Evaluators) -> dict[str, float]:
    """Return the reward and the evaluator's value of the target's own shape; {} where it is not known."""
    if case.truth is None:
        return {}
    field = generator.field(case.truth.ws)
    reward = {} if evaluators.reward is None else {"reward": float(evaluators.reward.score(field)[0])}
    return {**reward, **evaluated(case, field, evaluators)}


def depth_error(found: Rendering, truth: Rendering) -> Tensor:
    """Mean absolute difference of depth [] where the truth's rays meet something (opacity at least one half);
    world units.
    """
    seen = truth.opacity >= 0.5
    return (found.depth - truth.depth).abs()[seen].mean() if seen.any() else truth.depth.new_zeros(())
