"""Targets of an inversion (a user's image, or a sample of the generator itself with its ground truth), and
the measures of an inversion's quality.

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

# Four times the samples: the measures should depend on the shape, not on the sampler.
SMOOTH = RenderOptions(sample_mult=4)
SMOOTH_SEED = 1  # of the rays of these renders
SIDES = (0.4, -0.4)  # yaw of the held-out views, radians from the target's camera


class Truth(NamedTuple):
    """Ground truth of a target: its latent and its renders."""

    ws: Tensor  # [1, L, W]
    views: list[Rendering]  # from the target's camera, and from SIDES


class Case(NamedTuple):
    """Target of one inversion with its name."""

    name: str
    target: Target
    truth: Truth | None = None
    z: Tensor | None = None  # [1, Z], the ground-truth latent


def of_file(generator: Generator, image: Path, mask: Path | None, camera: Tensor) -> Case:
    """Build the case of an image file. Raises: ValueError, OSError naming the flag."""
    device = device_of(generator)
    # [R, R, 3]
    pixels = torch.from_numpy(_read("--image", image, "RGB", generator.img_resolution)).to(device)
    weights = None
    if mask is not None:
        # [1, 1, R, R] in 0..1
        weights = (
            torch.from_numpy(_read("--mask", mask, "L", generator.img_resolution)).to(device)[None, None]
            / 255
        )
        # An all-black mask would divide the loss by zero.
        if float(weights.max()) == 0:
            raise ValueError(
                f"--mask: expected some white in {mask}, got only black. Paint the pixels that count in"
                " white."
            )
    # [R, R, 3] in 0..255 -> [1, 3, R, R] in [-1, 1]
    return Case(image.stem, Target(pixels.permute(2, 0, 1)[None] / 127.5 - 1, camera, weights))


def _read(flag: str, path: Path, mode: str, resolution: int) -> np.ndarray:
    """Read an image file of the generator's size: float32 pixels in 0..255."""
    try:
        with Image.open(path) as file:
            size = file.size
            pixels = np.array(file.convert(mode), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        # PIL raises DecompressionBombError for images with too many pixels.
        raise ValueError(f"{flag}: expected an image file, got {path} ({error}). Name another.") from error
    if size != (resolution, resolution):
        raise ValueError(
            f"{flag}: expected {resolution} x {resolution} pixels, the generator's, got {size[0]} x {size[1]}"
            f" in {path}. Crop the head as the generator's own images show it, and resize it."
        )
    return pixels


@torch.no_grad()
def of_seed(generator: Generator, seed: int, camera: Tensor, psi: float = 1.0) -> Case:
    """Build the case of a seed's sample.

    The target is rendered smoothly, with rays that the inversion does not use.
    """
    ws = ws_of_seeds(generator, [seed], psi)
    views = render_each(generator.field(ws), cameras_about(generator, camera), SMOOTH, SMOOTH_SEED)
    return Case(
        f"seed{seed}", Target(views[0].image, camera), Truth(ws, views), latents([seed], generator.z_dim)
    )


def cameras_about(generator: Generator, camera: Tensor) -> list[Tensor]:
    """Return a camera [1, 25], and the same camera rotated by each of SIDES."""
    return [camera, *(rotated_camera(camera, yaw, generator.cameras.pivot) for yaw in SIDES)]


def rotated_camera(camera: Tensor, yaw: float, pivot: Sequence[float]) -> Tensor:
    """Rotate a camera [1, 25] by `yaw` radians about the vertical axis through the pivot."""
    # In float64: the rotation should not add rounding to the pose.
    pose, intrinsics = unpack_label(camera.double())
    centre = pose.new_tensor(pivot)
    c = math.cos(yaw)
    s = math.sin(yaw)
    about = pose.new_tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    # unpack_label returns a view of the label.
    pose = pose.clone()
    # The position turns about the pivot, the orientation turns alike.
    pose[0, :3, 3] = about @ (pose[0, :3, 3] - centre) + centre
    pose[0, :3, :3] = about @ pose[0, :3, :3]
    return pack_label(pose, intrinsics).to(camera)


def parse_camera(generator: Generator, text: str | None) -> Tensor:
    """Parse a camera [1, 25] from 'YAW,PITCH' in radians from frontal, from 25 numbers, or from a JSON file
    with such a list; None is the frontal camera.

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
    # Two numbers are angles; 25 numbers are a label, and are checked as one below.
    if isinstance(values, list) and len(values) == 2:
        # JSON can hold other types and NaN.
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"expected a finite YAW,PITCH in radians, got {text!r}. Correct it.")
        return camera_of(generator, *values)
    if not isinstance(values, list):
        raise ValueError(
            f"expected a list of 25 numbers in {text}, got {type(values).__name__}. Write the pose (16"
            " numbers) and the intrinsics (9)."
        )
    labels = label_array([values], ["camera"], "camera", LABEL_NUMBERS)
    return torch.from_numpy(labels).to(device_of(generator))


# Measures of an inversion: against its image, against the ground truth if it is known, and by rewards and
# evaluators.


MEASURES = (  # names, better direction and unit of the values of `measure`
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
    """Guiding reward, and held-out evaluator of shapes."""

    reward: Reward | None = None  # the guiding reward, not standardised
    # value of a case's shape; None if the evaluator does not apply to the case
    evaluator: Callable[[Case, Field], float | None] | None = None
    name: str = "none"


def annotator_evaluator(case: Case, field: Field) -> float | None:
    """Compute the simulated annotator's noise-free utility.

    It needs the ground-truth head of a seed's target, so it is None for an image.
    """
    if case.z is None:
        return None
    # [n, n, n] values of the inverted shape and of the ground-truth head
    return utility(shape_values(field, RESOLUTION)[0], people_mesh.whole_grids(case.z, RESOLUTION)[0]).total


def reward_evaluator(reward: Reward) -> Callable[[Case, Field], float]:
    """Return an evaluator that is another reward's score."""
    return lambda _case, field: float(reward.score(field)[0])


@torch.no_grad()
def measure(
    generator: Generator, case: Case, ws: Tensor, pivot: Tensor, objective: Objective, evaluators: Evaluators
) -> dict[str, float]:
    """Measure ws [1, L, W] under a generator; measures that do not apply to the case are left out.

    Args: pivot: density cube [1, D, H, W] of the second stage's start.

    Renders use four times the samples, and other rays than the optimisation. Only 'mse' is measured as
    optimised.
    """
    field = generator.field(ws)
    cube = cube_of(generator)
    # Another seed than the target's: equal rays would make the errors too small.
    views = render_each(field, cameras_about(generator, case.target.camera), SMOOTH, SMOOTH_SEED + 1)
    image = objective.seen(views[0].image)
    results = {
        "mse": objective.image_loss(objective.render(field, 0))[1]["mse"],
        "psnr": psnr(image, case.target.image)[0],
        "perceptual": objective.perceptual(image, case.target.image)[0],
        "moved": moved(field, cube, pivot)[0],
    }
    if case.truth is not None:
        pairs = list(zip(views, case.truth.views, strict=True))
        results["depth"] = depth_error(*pairs[0])
        # Held-out views show whether the shape is right, not only the image.
        for name, values in {
            "psnr_side": [psnr(a.image, b.image)[0] for a, b in pairs[1:]],
            "perceptual_side": [objective.perceptual(a.image, b.image)[0] for a, b in pairs[1:]],
            "depth_side": [depth_error(a, b) for a, b in pairs[1:]],
        }.items():
            results[name] = torch.stack(values).mean()
    if evaluators.reward is not None:
        results["reward"] = evaluators.reward.score(field)[0]
    return {**{name: float(value) for name, value in results.items()}, **evaluated(case, field, evaluators)}


def evaluated(case: Case, field: Field, evaluators: Evaluators) -> dict[str, float]:
    """Compute the evaluator's value; {} if there is no evaluator or it does not apply."""
    value = None if evaluators.evaluator is None else evaluators.evaluator(case, field)
    return {} if value is None else {"evaluator": float(value)}


@torch.no_grad()
def measure_truth(generator: Generator, case: Case, evaluators: Evaluators) -> dict[str, float]:
    """Compute the reward and the evaluator's value of the target's ground-truth shape; {} if it is
    unknown.
    """
    if case.truth is None:
        return {}
    field = generator.field(case.truth.ws)
    reward = {} if evaluators.reward is None else {"reward": float(evaluators.reward.score(field)[0])}
    return {**reward, **evaluated(case, field, evaluators)}


def depth_error(rendering: Rendering, truth: Rendering) -> Tensor:
    """Compute the mean absolute depth error [] in world units, over rays whose true opacity is at least one
    half.
    """
    # Depth is undefined for rays that hit nothing.
    seen = truth.opacity >= 0.5
    return (rendering.depth - truth.depth).abs()[seen].mean() if seen.any() else truth.depth.new_zeros(())
