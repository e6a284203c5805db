"""What is to be inverted: an image of the user's with its camera and mask, or a sample of the generator itself, with the truth.

Letters: R pixels per edge, L layers of ws, W w_dim.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eg3d_rlhf.core.field import Rendering, RenderOptions, render_each
from eg3d_rlhf.evaluation.inversion.projector import Target
from eg3d_rlhf.generators import Generator, device_of, ws_of_seeds
from eg3d_rlhf.generators import camera as camera_of
from training.dataset import label_array
from training.rendering.cameras import LABEL_NUMBERS, pack_label, unpack_label

SMOOTH = RenderOptions(sample_mult=4)  # four times the samples: what is measured is the shape and not the sampler
SMOOTH_SEED = 1  # of its rays
SIDES = (0.4, -0.4)  # yaw of the views that the inversion does not see, radians from the target's camera


class Truth(NamedTuple):
    """A target's own latent, and what is seen of it."""

    ws: Tensor  # [1, L, W]
    views: list[Rendering]  # from the target's camera, and from SIDES


class Case(NamedTuple):
    """A target by name."""

    name: str
    target: Target
    truth: Truth | None = None


def of_file(generator: Generator, image: Path, mask: Path | None, camera: Tensor) -> Case:
    """The case of an image file. Raises: ValueError, OSError naming the flag."""
    device = device_of(generator)
    pixels = torch.from_numpy(_read("--image", image, "RGB", generator.img_resolution)).to(device)  # [R, R, 3]
    weights = None
    if mask is not None:
        weights = torch.from_numpy(_read("--mask", mask, "L", generator.img_resolution)).to(device)[None, None] / 255
        if float(weights.max()) == 0:
            raise ValueError(f"--mask: expected some white in {mask}, got black alone. White is what counts.")
    return Case(image.stem, Target(pixels.permute(2, 0, 1)[None] / 127.5 - 1, camera, weights))


def _read(flag: str, path: Path, mode: str, resolution: int) -> np.ndarray:
    """float32 pixels in 0..255 of an image file with the generator's size."""
    try:
        with Image.open(path) as file:
            size, pixels = file.size, np.array(file.convert(mode), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{flag}: expected an image file, got {path} ({error}). Name another.") from error
    if size != (resolution, resolution):
        raise ValueError(
            f"{flag}: expected {resolution} x {resolution} pixels, the generator's, got {size[0]} x {size[1]} in {path}. Crop the head as "
            "the generator's own images show it, and resize it."
        )
    return pixels


@torch.no_grad()
def of_seed(generator: Generator, seed: int, camera: Tensor, psi: float = 1.0) -> Case:
    """The case of a seed's sample. The target is rendered smoothly, with rays that the inversion does not use."""
    ws = ws_of_seeds(generator, [seed], psi)
    views = render_each(generator.field(ws), cameras_about(generator, camera), SMOOTH, SMOOTH_SEED)
    return Case(f"seed{seed}", Target(views[0].image, camera), Truth(ws, views))


def cameras_about(generator: Generator, camera: Tensor) -> list[Tensor]:
    """A camera [1, 25], and the same turned by each of SIDES."""
    return [camera, *(turned(camera, yaw, generator.cameras.pivot) for yaw in SIDES)]


def turned(camera: Tensor, yaw: float, pivot: Sequence[float]) -> Tensor:
    """A camera [1, 25] carried by `yaw` radians about the vertical through the pivot."""
    pose, intrinsics = unpack_label(camera.double())
    centre, (c, s) = pose.new_tensor(pivot), (math.cos(yaw), math.sin(yaw))
    about = pose.new_tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    pose = pose.clone()
    pose[0, :3, 3] = about @ (pose[0, :3, 3] - centre) + centre
    pose[0, :3, :3] = about @ pose[0, :3, :3]
    return pack_label(pose, intrinsics).to(camera)


def parse_camera(generator: Generator, text: str | None) -> Tensor:
    """A camera [1, 25] from 'YAW,PITCH' in radians from frontal, from 25 numbers, or from a JSON file with such a list; None is frontal.

    Raises: ValueError.
    """
    if text is None:
        return camera_of(generator)
    path = Path(text)
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else [float(part) for part in text.split(",")]
    except (OSError, ValueError) as error:
        raise ValueError(f"expected YAW,PITCH, 25 numbers or a .json file with them, got {text!r} ({error}). Correct it.") from error
    if isinstance(values, list) and len(values) == 2:
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"expected a finite YAW,PITCH in radians, got {text!r}. Correct it.")
        return camera_of(generator, *values)
    if not isinstance(values, list):
        raise ValueError(f"expected a list of 25 numbers in {text}, got {type(values).__name__}. Write pose (16) and intrinsics (9).")
    found = label_array([values], ["camera"], "camera", LABEL_NUMBERS)
    return torch.from_numpy(found).to(device_of(generator))
