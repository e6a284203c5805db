"""Small asset files for tests of the judge: coloured balls with bumps, whose quality is known."""

from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.model import glb_parts, model_from_primitives, triangle_primitive
from eg3d_rlhf.people.judge.rig import Rig

SMALL = Rig(resolution=24, field_resolution=16)  # renders in a few milliseconds


def ball(bumps: float = 0.0, seed: int = 0, rows: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [V, 3] and outward triangles [F, 3] of an ellipsoid with random bumps, y up."""
    polar = np.linspace(0, np.pi, rows)
    azimuth = np.linspace(0, 2 * np.pi, 2 * rows, endpoint=False)
    theta, phi = (values.ravel() for values in np.meshgrid(polar, azimuth, indexing="ij"))
    points = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], axis=1)
    points *= 1 + bumps * np.random.default_rng(seed).normal(size=(len(points), 1))
    count = len(azimuth)
    faces = []
    for row in range(rows - 1):
        for column in range(count):
            a = row * count + column
            b = row * count + (column + 1) % count
            faces += [(a, a + count, b), (b, a + count, b + count)]
    return points * np.array([0.5, 0.7, 0.4]), np.array(faces)


def write_ball(path: Path, bumps: float = 0.0, seed: int = 0) -> Path:
    """Write a ball with colours at its vertices as GLB."""
    points, faces = ball(bumps, seed)
    colours = np.rint(255 * (0.5 + points / 2).clip(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model_from_primitives([triangle_primitive(points, faces, colours=colours)])
    path.write_bytes(b"".join(bytes(part) for part in glb_parts(model)))
    return path
