"""The pictures of assets for docs/images, called by page_pictures.py: made-up planets as textured meshes and as Gaussians."""

import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from eg3d_rlhf.people.label.assets.model import Picture, glb_parts, scene_of, triangles
from eg3d_rlhf.people.label.assets.ply import Splats, splat_parts
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress
from tests.people.label.browser import Page, plan, serving_page

TEXT = "A small green planet with snow on its mountains and a deep blue sea"
SIZE = (512, 1024)  # pixels of a map


def relief(seed: int, roughness: float) -> np.ndarray:
    """Heights [H, W] in -1..1 of a made-up planet, seamless around."""
    v, u = np.meshgrid(np.linspace(0, np.pi, SIZE[0]), np.linspace(0, 2 * np.pi, SIZE[1]), indexing="ij")
    point = np.stack([np.sin(v) * np.sin(u), np.cos(v), np.sin(v) * np.cos(u)], -1)
    rng, height = np.random.default_rng(seed), np.zeros(SIZE)
    for octave in range(1, 7):
        for _ in range(8):
            wave = rng.normal(size=3) * 1.7**octave
            height += roughness**octave * np.sin(point @ wave + rng.uniform(0, 6))
    return height / np.abs(height).max()


def colours(height: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: sea, shore, grass, rock and snow."""
    levels = [-1, -0.05, 0.02, 0.3, 0.55, 1]
    tints = [(12, 40, 110), (40, 120, 180), (205, 190, 130), (70, 130, 60), (120, 110, 95), (250, 250, 250)]
    return np.stack([np.interp(height, levels, [tint[c] for tint in tints]) for c in range(3)], -1).astype(np.uint8)


def surface(height: np.ndarray, rows: int = 180) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [N, 3], faces [F, 3] and map coordinates [N, 2]."""
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, 2 * rows), indexing="ij")
    raised = height[(v * (SIZE[0] - 1)).astype(int), (u * (SIZE[1] - 1)).astype(int)]
    radius = 1 + 0.12 * raised.clip(0)
    ring, turn = np.sin(np.pi * v), 2 * np.pi * u
    positions = radius[..., None] * np.stack([ring * np.sin(turn), np.cos(np.pi * v), ring * np.cos(turn)], -1)
    at = np.arange(rows * 2 * rows).reshape(rows, 2 * rows)
    a, b, c, d = at[:-1, :-1].ravel(), at[1:, :-1].ravel(), at[:-1, 1:].ravel(), at[1:, 1:].ravel()
    return positions.reshape(-1, 3), np.concatenate([np.stack([a, b, c], 1), np.stack([c, b, d], 1)]), np.stack([u, v], -1).reshape(-1, 2)


def glb(seed: int) -> bytes:
    """A planet as a textured mesh; every other one's map is coarse."""
    height = relief(3, 0.62 if seed % 2 else 0.5)
    positions, faces, uv = surface(height)
    normals = np.zeros_like(positions)
    sides = np.cross(positions[faces[:, 1]] - positions[faces[:, 0]], positions[faces[:, 2]] - positions[faces[:, 0]])
    for corner in range(3):
        np.add.at(normals, faces[:, corner], sides)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)
    out, image = io.BytesIO(), Image.fromarray(colours(height))
    (image if seed % 2 else image.resize((96, 48))).save(out, "PNG")
    material = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0, "roughnessFactor": 0.75}}
    made = triangles(positions, faces, uv=uv, normals=normals, material=0)
    return compress(b"".join(bytes(p) for p in glb_parts(scene_of([made], [material], [Picture(out.getvalue(), "image/png")]))))


def gaussians(seed: int) -> bytes:
    """A planet as Gaussians; every other one's are fewer and larger."""
    height, count, rng = relief(3, 0.6), 60_000 if seed % 2 else 4000, np.random.default_rng(seed)
    away = rng.normal(size=(count, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    row = (np.arccos(away[:, 1]) / np.pi * (SIZE[0] - 1)).astype(int)
    column = (np.arctan2(away[:, 0], away[:, 2]) % (2 * np.pi) / (2 * np.pi) * (SIZE[1] - 1)).astype(int)
    tints = colours(height)[row, column] / 255 * (0.75 + 0.25 * (away @ [0.4, 0.8, 0.45])[:, None])
    turns = np.stack([1 + away[:, 2], -away[:, 1], away[:, 0], np.zeros(count)], 1)  # the z axis to the surface's normal
    turns /= np.linalg.norm(turns, axis=1, keepdims=True).clip(1e-6)
    wide = math.log(3 / math.sqrt(count))
    made = Splats(
        ((1 + 0.12 * height[row, column].clip(0))[:, None] * away).astype("<f4"),
        np.tile([wide, wide, wide - 2.5], (count, 1)).astype("<f2"),
        np.rint(turns * 32767).astype("<i2"), np.full(count, 245, "u1"), ((tints - 0.5) * math.sqrt(4 * math.pi)).astype("<f2"),
        np.zeros((count, 0), "<f2"), 0,
    )  # fmt: skip
    return compress(b"".join(bytes(part) for part in splat_parts(made)))


def asset_pictures(browser, folder: Path, keep: Callable[[Page, Path], None]) -> None:
    """Both."""
    key, drawing = "a" * 64, io.BytesIO()
    Image.fromarray(colours(relief(3, 0.62))).resize((480, 240)).save(drawing, "WEBP")
    conditions = {"text": {"text": TEXT}, "both": {"text": TEXT, "image": "planet.png", "hash": key}}
    for name, made, condition in (("label-assets", glb, "both"), ("label-gaussians", gaussians, "text")):
        pairs = plan(2)
        planned = [replace(p, **{side: replace(getattr(p, side), condition=condition) for side in ("first", "second")}) for p in pairs]
        with tempfile.TemporaryDirectory() as place:
            ShapeCache(Path(place) / "cache").put_prompt(key, drawing.getvalue())
            campaign = {"extra": {"conditions": conditions}}
            with serving_page(Path(place), planned, lambda one, made=made: made(one.seed), campaign=campaign) as served:
                one = Page(browser, served.url, viewport={"width": 1280, "height": 780}, device_scale_factor=2).open()
                for press in ["Shift+ArrowRight"] * 3 + ["Shift+ArrowUp"]:
                    one.page.keyboard.press(press)
                one.page.wait_for_function("() => window.labelState.settled", timeout=60_000)
                one.page.wait_for_timeout(1500)
                keep(one, folder / f"{name}.png")
                one.context.close()
