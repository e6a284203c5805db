"""Camera labels of whole sets: good ones, and what the usual mistakes make of them."""

import math
from collections.abc import Callable

import numpy as np
import torch

from training.rendering.cameras import camera_position, intrinsics_matrix, look_at, pack_label

GOOD = ("ffhq", "ffhq-near-pivot", "afhq", "nearly-frontal", "sphere", "hemisphere", "cars")


def good_labels(kind: str, n: int = 50, seed: int = 0) -> np.ndarray:
    """Return labels [n, 25] float64 that resemble those of EG3D's published sets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind in ("sphere", "hemisphere", "cars"):
        directions = torch.nn.functional.normalize(normal(n, 3), dim=1)
        if kind == "hemisphere":
            directions[:, 1] = directions[:, 1].abs()
        radii = 1.3 + 0.4 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
        poses = look_at(directions * radii, torch.zeros(3, dtype=torch.float64))
        focal = 1.0254 if kind == "cars" else 1.7074
    else:
        spread = 0.1 if kind == "nearly-frontal" else 1
        yaws = math.pi / 2 + 0.35 * spread * normal(n, 1)
        pitches = math.pi / 2 + 0.2 * spread * normal(n, 1)
        pivot = {"ffhq-near-pivot": 0.05, "afhq": -0.06}.get(kind, 0.2)
        poses = look_at(camera_position(yaws, pitches, 2.7), torch.tensor([0, 0, pivot], dtype=torch.float64))
        focal = 4.2647
    return pack_label(poses, intrinsics_matrix(focal).double()).numpy()


def change_poses(labels: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    poses = change(labels[:, :16].reshape(-1, 4, 4).copy())
    return np.concatenate([poses.reshape(-1, 16), labels[:, 16:]], axis=1)


def change_intrinsics(labels: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    intrinsics = change(labels[:, 16:].reshape(-1, 3, 3).copy())
    return np.concatenate([labels[:, :16], intrinsics.reshape(-1, 9)], axis=1)


def with_block(poses: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Replace the upper left 3 x 3 blocks."""
    poses[:, :3, :3] = block
    return poses


def moved(poses: np.ndarray, factor: float) -> np.ndarray:
    poses[:, :3, 3] *= factor
    return poses


OPENGL = np.diag([1.0, -1, -1, 1])
# Blender's world: what is y here is z there, and what is z here is -y there.
Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
# name -> (what makes the mistake, the cures of it, the factor on the positions)
CURABLE: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...], float]] = {
    "pixels": (
        lambda c: change_intrinsics(c, lambda K: K * [[512.0], [512.0], [1.0]]),
        ("pixels",),
        1,
    ),
    "pixels 16:9": (
        lambda c: change_intrinsics(c, lambda K: K * [[1920.0], [1080.0], [1.0]]),
        ("pixels",),
        1,
    ),
    "half size": (lambda c: change_intrinsics(c, lambda K: K * [[0.5], [0.5], [1.0]]), ("pixels",), 1),
    "inverse": (lambda c: change_poses(c, np.linalg.inv), ("world2cam",), 1),
    "opengl": (lambda c: change_poses(c, lambda P: P @ OPENGL), ("opengl",), 1),
    "inverse opengl": (
        lambda c: change_poses(c, lambda P: OPENGL @ np.linalg.inv(P)),
        ("world2cam", "opengl"),
        1,
    ),
    "column-major": (lambda c: change_poses(c, lambda P: P.transpose(0, 2, 1)), ("transpose",), 1),
    "column-major inverse": (
        lambda c: change_poses(c, lambda P: np.linalg.inv(P).transpose(0, 2, 1)),
        ("transpose", "world2cam"),
        1,
    ),
    "column-major K": (
        lambda c: change_intrinsics(c, lambda K: K.transpose(0, 2, 1)),
        ("transpose",),
        1,
    ),
    "z up": (lambda c: change_poses(c, lambda P: Z_UP @ P), ("zup",), 1),
    "blender": (lambda c: change_poses(c, lambda P: Z_UP @ P @ OPENGL), ("opengl", "zup"), 1),
    "millimetres": (lambda c: change_poses(c, lambda P: moved(P, 1000)), (), 0.001),
    "centimetres": (lambda c: change_poses(c, lambda P: moved(P, 100)), (), 0.01),
    "all at once": (
        lambda c: change_intrinsics(
            change_poses(c, lambda P: moved(P @ OPENGL, 1000)), lambda K: K * [[512.0], [512.0], [1.0]]
        ),
        ("pixels", "opengl"),
        0.001,
    ),
}
# A rotation that is transposed while the position is right; it needs poses that are not nearly frontal.
TRANSPOSED_ROTATION = (
    lambda c: change_poses(c, lambda P: with_block(P, P[:, :3, :3].transpose(0, 2, 1))),
    ("transpose",),
    1,
)
# name -> mistakes that no cure corrects
INCURABLE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "backward": lambda c: change_poses(c, lambda P: P @ np.diag([-1.0, 1, -1, 1])),
    "upside down": lambda c: change_poses(c, lambda P: P @ np.diag([-1.0, -1, 1, 1])),
    "beside the scene": lambda c: change_poses(
        c, lambda P: P + np.array([0, 0, 0, [0, 3.0, 0, 0]][3])[:, None] * [0, 0, 0, 1.0]
    ),
    "one pose": lambda c: np.tile(c[:1], (len(c), 1)),
    "mixed opengl": lambda c: np.concatenate([c[::2], change_poses(c[1::2], lambda P: P @ OPENGL)]),
    "mixed inverse": lambda c: np.concatenate([c[::2], change_poses(c[1::2], np.linalg.inv)]),
    "stretched": lambda c: change_intrinsics(
        c, lambda K: K * [[1.0], [0.4], [1.0]] + [[0, 0, 0], [0, 0, 0.3], [0, 0, 0]]
    ),
}
# name -> (numbers that cannot be right, texts that the message has to name)
IMPOSSIBLE: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]] = {
    "no intrinsics": (lambda c: change_intrinsics(c, lambda K: 0 * K), ("fx",)),
    "negative focal": (
        lambda c: change_intrinsics(c, lambda K: K * [[-1.0, 1, 1], [1, -1, 1], [1, 1, 1]]),
        ("fx",),
    ),
    "field of view": (
        lambda c: change_intrinsics(c, lambda K: K * [[9.0, 1, 1], [1, 9, 1], [1, 1, 1]]),
        ("20",),
    ),
    "principal point": (
        lambda c: change_intrinsics(c, lambda K: K + [[0, 0, 1.2], [0, 0, 0], [0, 0, 0]]),
        ("1.7",),
    ),
    "last row of K": (lambda c: change_intrinsics(c, lambda K: K * [[1.0], [1.0], [0.0]]), ("0 0 1",)),
    "lower left of K": (
        lambda c: change_intrinsics(c, lambda K: K + [[0, 0, 0], [0.1, 0, 0], [0, 0, 0]]),
        ("0.1",),
    ),
    "scaled rotation": (
        lambda c: change_poses(c, lambda P: with_block(P, 2 * P[:, :3, :3])),
        ("rotation", "2"),
    ),
    "reflection": (lambda c: change_poses(c, lambda P: P @ np.diag([-1.0, 1, 1, 1])), ("rotation",)),
    "last row": (
        lambda c: change_poses(c, lambda P: P + np.array([[0.0] * 4] * 3 + [[0, 0, 1.0, 0]])),
        ("0 0 0 1",),
    ),
}
