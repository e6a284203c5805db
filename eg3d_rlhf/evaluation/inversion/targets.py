"""Targets of an inversion, and the measures of its quality.

A target is a user's image, or a sample of the generator itself, whose shape is then the ground truth.
Shapes: R pixels per edge, L layers of ws, W w_dim, Z z_dim, [1, D, H, W] density grids.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.core.field import Field, Rendering, RenderOptions, render_each
from eg3d_rlhf.evaluation.inversion.projector import Objective, Target, cube_grid, density_change
from eg3d_rlhf.experiments.image_set_warnings import scene_of
from eg3d_rlhf.generators import Generator, device_of, latents, ws_of_seeds
from eg3d_rlhf.generators import camera as camera_of
from eg3d_rlhf.measures.image_similarity import psnr
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.photographs.crops import cut_crop
from eg3d_rlhf.photographs.face_geometry import CropFrame
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.preferences.settings import RESOLUTION
from eg3d_rlhf.preferences.synthetic import shape_values
from eg3d_rlhf.rewards.reward import Reward
from training.camera_labels import camera_warning, label_array
from training.heads import people_mesh
from training.image_reading import read_image, upright_size
from training.rendering.cameras import LABEL_NUMBERS, pack_label, unpack_label
from training.text_files import read_text

# Renders for measures use four times as many samples per ray, since the measures should not depend on the
# random samples.
SMOOTH = RenderOptions(sample_mult=4)
SMOOTH_SEED = 1  # seed of the ray samples of these renders
SIDES = (0.4, -0.4)  # yaws of the held-out views, radians from the target's camera


class Truth(NamedTuple):
    """Ground truth of a target that is a sample of the generator: its latent and its renders."""

    ws: Tensor  # [1, L, W]
    views: list[Rendering]  # from the target's camera, and from SIDES


class Case(NamedTuple):
    """Target of one inversion with its name, and its ground truth if there is one."""

    name: str
    target: Target
    truth: Truth | None = None
    z: Tensor | None = None  # [1, Z], the ground-truth latent


def case_from_file(
    generator: Generator,
    image_path: Path,
    mask_path: Path | None,
    camera: Tensor,
    frame: CropFrame | None = None,
) -> Case:
    """Read a target from an image file.

    Args:
        image_path: image file, without a frame of the generator's size. A transparent image is composited on
            white.
        mask_path: image file whose brightness is the weight of each pixel; transparent pixels have the weight
            0. If it is None, all pixels have the weight 1.
        camera: camera of the image, [1, 25].
        frame: square of the image that is the target, and of a mask of the same size; None: all of it.

    Raises: ValueError or OSError, with the name of the flag.
    """
    device = device_of(generator)
    resolution = generator.img_resolution
    # [R, R, 3]
    target_pixels = torch.from_numpy(_read("--image", image_path, "RGB", resolution, frame)).to(device)
    pixel_weights = None
    if mask_path is not None:
        if frame is not None and upright_size(mask_path) != upright_size(image_path):
            raise ValueError(
                f"--mask: {mask_path} must have the size of the photograph {image_path}, because both are"
                " cropped in the same way. Paint it on the photograph, or crop both, and add --camera."
            )
        # [1, 1, R, R] in 0..1
        pixel_weights = (
            torch.from_numpy(_read("--mask", mask_path, "L", resolution, frame)).to(device)[None, None] / 255
        )
        # With a black mask, the loss would be divided by zero.
        if float(pixel_weights.max()) == 0:
            raise ValueError(
                f"--mask: {mask_path} is completely black, so that no pixel has a weight. Paint the pixels"
                " that must be reproduced in white."
            )
    # [R, R, 3] in 0..255 -> [1, 3, R, R] in [-1, 1]
    return Case(
        image_path.stem, Target(target_pixels.permute(2, 0, 1)[None] / 127.5 - 1, camera, pixel_weights)
    )


def _read(
    flag: str, image_path: Path, pil_mode: str, resolution: int, frame: CropFrame | None = None
) -> np.ndarray:
    """Read an image file, as float32 pixels in 0..255.

    Args:
        flag: flag that names the file, for messages.
        pil_mode: PIL's mode, "RGB" or "L".
        resolution: pixels per edge that the image must have.
        frame: square of the image that is cut out; the image may then have any size.

    Raises: ValueError if the file cannot be read as an image, or has another size.
    """
    # Transparent pixels of a mask have no weight, so they must become black.
    image = read_image(
        image_path, f"{flag}: {image_path}", background="white" if pil_mode == "RGB" else "black"
    )
    if frame is not None:
        return cut_crop(image.convert(pil_mode), frame, resolution).astype(np.float32)
    if image.size != (resolution, resolution):
        # A very large photograph has been reduced, so its own size is shown.
        image_size = upright_size(image_path)
        raise ValueError(
            f"{flag}: {image_path} has {image_size[0]} x {image_size[1]} pixels, but the generator's images"
            f" have {resolution} x {resolution}. Crop the head as in the generator's images, and save it in"
            " this size."
        )
    return np.array(image.convert(pil_mode), dtype=np.float32)  # [R, R, 3] or [R, R]


@torch.no_grad()
def case_from_seed(generator: Generator, seed: int, camera: Tensor, psi: float = 1.0) -> Case:
    """Make a target from a sample of the generator.

    The target is rendered with more samples per ray than the inversion uses, and at other random positions,
    so that the inversion cannot fit the noise of the sampling.

    Args:
        seed: seed of the sample.
        camera: camera of the target, [1, 25].
        psi: truncation.
    """
    ws = ws_of_seeds(generator, [seed], psi)  # [1, L, W]
    view_renderings = render_each(generator.field(ws), cameras_about(generator, camera), SMOOTH, SMOOTH_SEED)
    return Case(
        f"seed{seed}",
        Target(view_renderings[0].image, camera),
        Truth(ws, view_renderings),
        latents([seed], generator.z_dim),
    )


def cameras_about(generator: Generator, camera: Tensor) -> list[Tensor]:
    """Return a camera [1, 25], followed by the same camera rotated by each yaw of SIDES."""
    return [camera, *(rotated_camera(camera, yaw, generator.cameras.pivot) for yaw in SIDES)]


def rotated_camera(camera: Tensor, yaw: float, pivot: Sequence[float]) -> Tensor:
    """Rotate a camera [1, 25] by `yaw` radians about the vertical axis through the pivot."""
    # The rotation is computed in float64, so that it adds no rounding to the pose.
    pose, intrinsics = unpack_label(camera.double())
    centre = pose.new_tensor(pivot)
    cosine = math.cos(yaw)
    sine = math.sin(yaw)
    rotation = pose.new_tensor([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
    # unpack_label returns a view of the label, which must not be changed.
    pose = pose.clone()
    # The position is rotated about the pivot, the orientation about the vertical axis.
    pose[0, :3, 3] = rotation @ (pose[0, :3, 3] - centre) + centre
    pose[0, :3, :3] = rotation @ pose[0, :3, :3]
    return pack_label(pose, intrinsics).to(camera)


def parse_camera(generator: Generator, camera_text: str | None) -> Tensor:
    """Parse a camera, and return its label [1, 25].

    Args: camera_text: camera in one of three forms: 'YAW,PITCH' in radians from frontal; 25 numbers separated
        by commas (16 of the pose, 9 of the intrinsics); or the path of a JSON file with a list of 2 or 25
        such numbers. If it is None, the frontal camera is returned.
    Raises: ValueError if the text has another form.
    """
    if camera_text is None:
        return camera_of(generator)
    json_path = Path(camera_text)
    try:
        camera_numbers = (
            json.loads(read_text(json_path))
            if json_path.suffix == ".json"
            else [float(number_text) for number_text in camera_text.split(",")]
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{camera_text!r} is not a camera ({error}). Write YAW,PITCH in radians, 25 numbers, or the path"
            " of a .json file with a list of them."
        ) from error
    # Two numbers are angles. 25 numbers are a camera label, which `label_array` checks below.
    if isinstance(camera_numbers, list) and len(camera_numbers) == 2:
        # A JSON file can contain other types and NaN.
        if not all(isinstance(angle, int | float) and math.isfinite(angle) for angle in camera_numbers):
            raise ValueError(
                f"{camera_text!r} does not hold two finite numbers. Write YAW,PITCH in radians, for example"
                " 0.3,-0.1."
            )
        return camera_of(generator, *camera_numbers)
    if not isinstance(camera_numbers, list):
        raise ValueError(
            f"{camera_text} holds a {type(camera_numbers).__name__}, but a list of 2 or 25 numbers is needed."
            " Write yaw and pitch, or the pose (16 numbers) and the intrinsics (9 numbers), as a list."
        )
    labels = label_array([camera_numbers], ["camera"], "camera", LABEL_NUMBERS)  # [1, 25]
    warning = camera_warning(labels, ["camera"], "--camera", scene_of(generator, "--network"), fixing="")
    if warning is not None:
        print(f"Warning: {warning}", file=sys.stderr, flush=True)
    return torch.from_numpy(labels).to(device_of(generator))


# Measures of an inversion: comparison with its image, comparison with the ground truth if there is one, and
# scores by rewards and evaluators.


MEASURES = (  # name, better direction and unit of each value that `measure` returns
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
    """Reward that guides the inversion, and held-out evaluator of shapes."""

    reward: Reward | None = None  # the guiding reward, not standardised
    # function of a target and a shape; it returns None if the evaluator does not apply to the target
    evaluator: Callable[[Case, Field], float | None] | None = None
    name: str = "none"  # name of the evaluator


def annotator_evaluator(case: Case, field: Field) -> float | None:
    """Compute the utility that the simulated annotator without noise assigns to a shape.

    Return None for a target that is an image, since it has no ground-truth head.
    """
    if case.z is None:
        return None
    # [n, n, n] values of the inverted shape and of the ground-truth head
    return utility(
        shape_values(field, RESOLUTION)[0], people_mesh.ground_truth_grids(case.z, RESOLUTION)[0]
    ).total


def reward_evaluator(reward: Reward) -> Callable[[Case, Field], float]:
    """Return an evaluator that scores shapes by a reward."""
    return lambda _case, field: float(reward.score(field)[0])


@torch.no_grad()
def measure(
    generator: Generator,
    case: Case,
    ws: Tensor,
    pivot_density: Tensor,
    objective: Objective,
    evaluators: Evaluators,
) -> dict[str, float]:
    """Measure the quality of an inversion. Measures that do not apply to the target are left out.

    Renders use four times as many samples per ray as usual, and other ray samples than the optimisation. Only
    'mse' is measured with the renders of the optimisation.

    Args:
        generator: generator, which may be tuned.
        case: target.
        ws: latent of the inversion, [1, L, W].
        pivot_density: density at the start of the second stage, [1, D, H, W].
        objective: loss of the target.
        evaluators: reward and evaluator.

    Returns: values by the names of MEASURES.
    """
    field = generator.field(ws)
    cube_spec = cube_grid(generator)
    # The seed differs from that of the target, since equal ray samples would make the errors too small.
    rendered_views = render_each(field, cameras_about(generator, case.target.camera), SMOOTH, SMOOTH_SEED + 1)
    # All batches hold a single shape, hence the index [0] below.
    image = objective.blend_outside_mask(rendered_views[0].image)
    tensor_by_measure = {
        "mse": objective.image_loss(objective.render(field, 0))[1]["mse"],
        "psnr": psnr(image, case.target.image)[0],
        "perceptual": objective.perceptual(image, case.target.image)[0],
        "moved": density_change(field, cube_spec, pivot_density)[0],
    }
    if case.truth is not None:
        view_pairs = list(zip(rendered_views, case.truth.views, strict=True))  # (rendered, true) views
        tensor_by_measure["depth"] = depth_error(*view_pairs[0])
        # Held-out views measure whether the shape is right, not only the image. [0]: the target's view
        for measure_name, view_values in {
            "psnr_side": [
                psnr(rendered_view.image, true_view.image)[0] for rendered_view, true_view in view_pairs[1:]
            ],
            "perceptual_side": [
                objective.perceptual(rendered_view.image, true_view.image)[0]
                for rendered_view, true_view in view_pairs[1:]
            ],
            "depth_side": [
                depth_error(rendered_view, true_view) for rendered_view, true_view in view_pairs[1:]
            ],
        }.items():
            tensor_by_measure[measure_name] = torch.stack(view_values).mean()
    if evaluators.reward is not None:
        tensor_by_measure["reward"] = evaluators.reward.score(field)[0]
    return {
        **{measure_name: float(measure_tensor) for measure_name, measure_tensor in tensor_by_measure.items()},
        **evaluator_value(case, field, evaluators),
    }


def evaluator_value(case: Case, field: Field, evaluators: Evaluators) -> dict[str, float]:
    """Return {"evaluator": value} for a shape, or {} if there is no evaluator or it does not apply."""
    shape_value = None if evaluators.evaluator is None else evaluators.evaluator(case, field)
    return {} if shape_value is None else {"evaluator": float(shape_value)}


@torch.no_grad()
def measure_truth(generator: Generator, case: Case, evaluators: Evaluators) -> dict[str, float]:
    """Compute the reward and the evaluator's value of the target's ground-truth shape.

    Return {} if the target has no ground truth.
    """
    if case.truth is None:
        return {}
    field = generator.field(case.truth.ws)
    reward_entry = {} if evaluators.reward is None else {"reward": float(evaluators.reward.score(field)[0])}
    return {**reward_entry, **evaluator_value(case, field, evaluators)}


def depth_error(rendering: Rendering, true_rendering: Rendering) -> Tensor:
    """Compute the mean absolute error of depth, in world units, as a tensor of shape [].

    The mean is over rays whose opacity in the ground truth is at least one half; without such rays it is 0.
    """
    # Rays that hit no surface have no meaningful depth.
    is_opaque = true_rendering.opacity >= 0.5
    return (
        (rendering.depth - true_rendering.depth).abs()[is_opaque].mean()
        if is_opaque.any()
        else true_rendering.depth.new_zeros(())
    )
