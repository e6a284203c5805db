"""Rendered heads with known cameras, and photographs that show them elsewhere, larger and turned."""

import math

import numpy as np
import PIL.Image
import torch

from training.heads import people
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, look_at

# 13 views of a head, (yaw, pitch) in degrees; a positive pitch is a camera below the head.
VIEWS = [(yaw, 0) for yaw in (-60, -40, -20, 0, 20, 40, 60)] + [
    (yaw, pitch) for yaw in (-20, 0, 20) for pitch in (-20, 20)
]


def pose_at(yaw: float, pitch: float) -> np.ndarray:
    """Return cam2world [4, 4] of a camera that looks at the origin from angles in degrees."""
    # camera_position: the height is linear in the pitch parameter, (pi / 2) (1 + sin pitch).
    horizontal = math.pi / 2 + math.radians(yaw)
    vertical = math.pi / 2 * (1 + math.sin(math.radians(pitch)))
    angles = torch.tensor([[horizontal], [vertical]], dtype=torch.float64)
    position = camera_position(angles[:1], angles[1:], FFHQ_RADIUS)
    return look_at(position, torch.zeros(3, dtype=torch.float64))[0].numpy()


def render(head: people.Head, yaw: float, pitch: float = 0, size: int = 256) -> PIL.Image.Image:
    """Render a head on white, size x size pixels."""
    image, _ = people.render_head(head, pose_at(yaw, pitch), FFHQ_FOCAL, size)
    return PIL.Image.fromarray((image * 255).round().astype(np.uint8))


def heads(count: int, seed: int = 0) -> list[people.Head]:
    """Return heads of random latents."""
    z = np.random.default_rng(seed).standard_normal((count, people.LATENT))
    return people.heads_from_latents(people.normalise_latents(z))


def pasted(
    photograph: PIL.Image.Image,
    scale: float,
    degrees: float,
    canvas_size: tuple[int, int],
    centre: tuple[float, float],
    seed: int = 0,
) -> tuple[PIL.Image.Image, np.ndarray]:
    """Paste a photograph on a smooth background of random colours.

    Args:
        photograph: photograph to paste, on white.
        scale: factor of its size.
        degrees: turn, clockwise.
        canvas_size: (width, height) of the result in pixels.
        centre: position of the middle of the photograph in the result, in pixels.
        seed: seed of the background.
    Returns: the result, and the affine map [2, 3] from points of the photograph to points of the result.
    """
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    background = PIL.Image.fromarray(blocks).resize(canvas_size, PIL.Image.Resampling.BICUBIC)
    angle = math.radians(degrees)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = np.array(centre) - turn @ (np.array(photograph.size) / 2)
    forward = np.concatenate([turn, shift[:, None]], axis=1)
    inverse = np.linalg.inv(turn)
    coefficients = np.concatenate([inverse, (-inverse @ shift)[:, None]], axis=1).ravel()
    layers = [
        layer.transform(
            canvas_size, PIL.Image.Transform.AFFINE, tuple(coefficients), PIL.Image.Resampling.BICUBIC
        )
        for layer in (photograph, PIL.Image.new("L", photograph.size, 255))
    ]
    background.paste(layers[0], mask=layers[1])
    return background, forward
