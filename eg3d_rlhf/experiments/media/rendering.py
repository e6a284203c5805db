"""Rendering of a latent from any camera as uint8 images, which do not depend on images rendered before.

Shapes: N latents, L layers of ws, W width of ws, H rows of an image, B columns of an image.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.field import DEFAULT_OPTIONS, CameraFamily, Rendering, RenderOptions, render_each
from eg3d_rlhf.core.seeds import MAX_SEEDS as MAX_SEEDS
from eg3d_rlhf.core.seeds import parse_seeds as parse_seeds
from eg3d_rlhf.experiments.media.settings import FFHQ_FOV
from eg3d_rlhf.generators import Generator, check_seeds, device_of, latents
from training.progress import tqdm

_SCALED = 10_000  # smallest total that a progress bar shows with the suffixes k and M


def cameras_of(generator: Generator, fov: float = FFHQ_FOV, **camera_fields: Any) -> CameraFamily:
    """Return the camera family of a generator with another field of view.

    Args:
        generator: generator whose cameras are changed.
        fov: field of view over the diagonal of the image, in degrees, 0 < fov < 180.
        camera_fields: fields of CameraFamily that are replaced as well: radius, pivot.

    Raises:
        ValueError: `fov` is out of range.
    """
    if not 0 < fov < 180:
        raise ValueError(
            f"the field of view is {fov:g} degrees, but must be above 0 and below 180. Pass another value"
            " with --fov-deg."
        )
    # This is FOV_to_intrinsics of EG3D (camera_utils.py), with its rounded pi and square root of 2.
    focal_length = 1 / (math.tan(fov * 3.14159 / 360) * 1.414)
    return dataclasses.replace(generator.cameras, focal=focal_length, **camera_fields)


def camera(
    cameras: CameraFamily,
    yaw: float = 0.0,
    pitch: float = 0.0,
    n: int = 1,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Make `n` equal camera labels [n, 25]: 16 numbers of cam2world, then 9 of the intrinsics.

    The random state of torch is the same before and after the call.

    Args:
        cameras: family of cameras, which has the distance, the pivot and the focal length.
        yaw: horizontal angle from the frontal view, in radians.
        pitch: vertical angle from the frontal view, in radians. As in EG3D's tools, a camera with a negative
            pitch looks from above.
        n: number of labels.
        device: device of the labels.
    """
    # `label` may draw random numbers. The random state of the CPU is always restored afterwards, but for
    # CUDA only if the device is named.
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        return cameras.label(yaw, pitch, n, device)


@torch.no_grad()
def conditioned_ws(
    generator: Generator,
    seeds: Sequence[int],
    cameras: CameraFamily,
    psi: float = 1.0,
    cutoff: int | None = 14,
) -> torch.Tensor:
    """Map seeds to ws [N, L, W], conditioned on the frontal camera of a family, as EG3D's tools do.

    Args:
        generator: generator whose mapping network is used.
        seeds: seeds of the latents z, [N].
        cameras: family of cameras whose frontal view is the conditioning input of the mapping network.
        psi: truncation psi; 1: no truncation.
        cutoff: number of layers of ws that are truncated; None: all layers.

    Raises:
        ValueError: the generator does not accept a seed.
    """
    check_seeds(generator, max(seeds, default=0), "--seeds")
    device = device_of(generator)
    camera_label = camera(cameras, n=len(seeds), device=device)
    return generator.mapping(
        latents(seeds, generator.z_dim).to(device), camera_label, truncation_psi=psi, truncation_cutoff=cutoff
    )


@torch.no_grad()
def render(
    generator: Generator,
    ws: torch.Tensor,
    labels: Sequence[torch.Tensor],
    seed: int = 0,
    noise_mode: str = "const",
    mode: str = "image",
    options: RenderOptions = DEFAULT_OPTIONS,
) -> list[np.ndarray]:
    """Render one latent from several cameras, with one synthesis pass for all of them.

    The jitter of the rays and the noise of the layers come from torch's global random state. It is set from
    `seed` before the synthesis and before every image except the first, which directly follows the synthesis
    as in EG3D. An image therefore does not depend on earlier images. The random state is restored at the end.

    Args:
        generator: generator that synthesises the scene.
        ws: latent, [1, L, W].
        labels: camera labels, each [1, 25].
        seed: seed of the random numbers.
        noise_mode: noise of the synthesis layers: "const", "random" or "none".
        mode: "image", "image_raw" (image before super-resolution) or "image_depth".
        options: options of the volume rendering.

    Returns:
        One array per camera: uint8 [H, B, 3], or for "image_depth" the distances, see `distances`.
    """
    with torch.random.fork_rng(devices=[ws.device] if ws.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # the synthesis, which all images share
        radiance_field = generator.field(ws, noise_mode)
        # a list of one rendering, or an empty list if there are no cameras
        first_renderings = [radiance_field.render(label.to(ws.device), options) for label in labels[:1]]
    later_labels = (label.to(ws.device) for label in labels[1:])
    renderings = first_renderings + render_each(radiance_field, later_labels, options, seed)
    if mode == "image_depth":
        return [distances(rendering) for rendering in renderings]
    field_names = {"image": "image", "image_raw": "raw"}  # mode -> field of Rendering, [1, 3, H, B]
    return [to_uint8(getattr(rendering, field_names[mode])[0].float().cpu()) for rendering in renderings]


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Convert an image [3, H, B] in -1..1 to uint8 [H, B, 3].

    The values x become x * 127.5 + 128, clamped to 0..255 and truncated, as in EG3D's tools.
    """
    return (image.permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()


def png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 [H, B, 3], as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def distances(rendering: Rendering) -> np.ndarray:
    """Return the distances of a surface from the camera along the rays, float32 [H, B], in world units.

    The distance is infinite where the opacity of the ray is below one half.

    Args:
        rendering: rendering of one image.

    Deviates: EG3D shows the mean distance of such rays as well, although they hit hardly any density.
    """
    # index 0, 0: the only image of the batch, and the only channel
    depth = rendering.depth[0, 0].float()
    opacity = rendering.opacity[0, 0]
    return torch.where(opacity >= 0.5, depth, torch.full_like(depth, torch.inf)).cpu().numpy()


def shade_depth(depth: np.ndarray) -> np.ndarray:
    """Convert distances [H, B] to grey values, uint8 [H, B, 3].

    The largest distance of the image becomes dark grey (32), and the smallest becomes white (255). Infinite
    distances are black. If all distances are infinite, the image is black.
    """
    is_hit = np.isfinite(depth)
    min_distance, max_distance = (
        (float(depth[is_hit].min()), float(depth[is_hit].max())) if is_hit.any() else (0.0, 0.0)
    )
    # infinite distances are replaced before the arithmetic; 1e-12 avoids 0 / 0 if all distances are equal
    # 0 far, 1 near
    nearness = (max_distance - np.where(is_hit, depth, max_distance)) / max(
        max_distance - min_distance, 1e-12
    )
    grey_values = np.where(is_hit, np.rint(32 + 223 * nearness), 0).astype(np.uint8)
    return np.repeat(grey_values[..., None], 3, axis=2)  # [H, B] -> [H, B, 3]


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images as a grid, row by row.

    Args:
        images: images [H, B, 3] of one size. Their number must be a multiple of `columns`.
        columns: number of images side by side.

    Returns:
        One image, [rows * H, columns * B, 3].
    """
    image_stack = np.stack(images)
    height, width = image_stack.shape[1:3]
    image_grid = image_stack.reshape(-1, columns, height, width, 3)  # [rows, columns, H, B, 3]
    # [rows, columns, H, B, 3] -> [rows, H, columns, B, 3]
    return np.ascontiguousarray(image_grid.transpose(0, 2, 1, 3, 4)).reshape(-1, columns * width, 3)


class StageBar(contextlib.AbstractContextManager["StageBar", None]):
    """Progress bars for the stages of a computation, one after another.

    The object is passed as a callback, which the computation calls with (stage, units that are done, units in
    total).

    Args:
        prefix: text before the name of the stage.
    """

    def __init__(self, prefix: str = ""):
        self._prefix = prefix
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done_count: int, total_count: int) -> None:
        """Move the bar of a stage to `done_count` of `total_count` units. Its first call starts the bar.

        Args:
            stage: name of the stage.
            done_count: number of units that are done.
            total_count: number of all units of the stage.
        """
        # the total of a tqdm bar is fixed, so the bar of the previous stage is closed
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                total=total_count, desc=f"{self._prefix}{stage}", unit_scale=total_count >= _SCALED
            )
        self._bar.update(done_count - self._bar.n)  # `update` takes the difference to the present position

    def close(self) -> None:
        """Close the current bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *exc: object) -> None:
        self.close()
