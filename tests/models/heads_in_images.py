"""Images of synthetic heads with known cameras, alone and in scenes, for tests of the networks of faces."""

import functools
import math

import numpy as np
import PIL.Image
import torch

from training.heads.people import heads_from_latents, load_basis, render_head
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, look_at

HEADS = 6
RESOLUTION = 256
VIEWS = (  # yaw and pitch in degrees, 0 for a frontal camera
    *((yaw, 0) for yaw in (-60, -45, -30, -15, 0, 15, 30, 45, 60)),
    *((0, -20), (0, 20), (30, 20), (-30, -20)),
)


def pose(yaw: float, pitch: float = 0.0) -> np.ndarray:
    """Return cam2world [4, 4] of a camera that looks at the origin; angles in degrees from frontal."""
    angles = (
        torch.tensor([[math.pi / 2 + math.radians(angle)]], dtype=torch.float64) for angle in (yaw, pitch)
    )
    return look_at(camera_position(*angles, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64))[0].numpy()


@functools.cache
def heads() -> list:
    return heads_from_latents(np.random.default_rng(5).standard_normal((HEADS, 64)))


@functools.cache
def render(head: int, yaw: float, pitch: float = 0.0, resolution: int = RESOLUTION) -> np.ndarray:
    """Return the image of a head on white, uint8 [resolution, resolution, 3]."""
    image, _ = render_head(heads()[head], pose(yaw, pitch), FFHQ_FOCAL, resolution)
    return np.round(255 * image).astype(np.uint8)


def eyes_in_image(head: int, yaw: float, pitch: float = 0.0) -> np.ndarray:
    """Return the centres of both eyes in pixels of `render`, [2, 2], the one on the left first.

    They are the means of the eyeballs' vertices, so the visible front of an eye lies nearer to the camera.
    """
    basis = load_basis()
    vertices = heads()[head].vertices
    is_eye = basis.masks["eyes"] > 0.5
    near_front = vertices[:, 2] > np.median(vertices[is_eye, 2])
    sides = [is_eye & near_front & (np.sign(basis.mean[:, 0]) == sign) for sign in (-1, 1)]
    points = np.stack([vertices[side].mean(axis=0) for side in sides])
    cam2world = pose(yaw, pitch)
    camera_points = (points - cam2world[:3, 3]) @ cam2world[:3, :3]
    return (camera_points[:, :2] / camera_points[:, 2:] * FFHQ_FOCAL + 0.5) * RESOLUTION


def background(kind: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an image without a face, uint8 [height, width, 3]: noise, blobs, a gradient, or one colour."""
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "blobs":
        small = PIL.Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        return np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC))
    if kind == "gradient":
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        return np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()
    return np.full((height, width, 3), 200, np.uint8)


def paste(
    scene: np.ndarray, head_image: np.ndarray, centre: tuple[float, float], edge: int, degrees: float = 0.0
) -> np.ndarray:
    """Return a scene with the image of a head in it.

    Args:
        scene: uint8 [H, W, 3].
        head_image: image of a head on white. What is nearly white becomes transparent.
        centre: where the middle of the image comes to lie, x and y in pixels of the scene.
        edge: edge of the pasted image in pixels of the scene.
        degrees: rotation of the pasted image, counter-clockwise.
    """
    opacity = np.where(head_image.min(axis=2) < 250, 255, 0).astype(np.uint8)
    layer = PIL.Image.fromarray(np.dstack([head_image, opacity])).resize(
        (edge, edge), PIL.Image.Resampling.LANCZOS
    )
    layer = layer.rotate(degrees, PIL.Image.Resampling.BICUBIC, expand=True)
    canvas = PIL.Image.fromarray(scene)
    canvas.paste(layer, (round(centre[0] - layer.width / 2), round(centre[1] - layer.height / 2)), layer)
    return np.asarray(canvas)
