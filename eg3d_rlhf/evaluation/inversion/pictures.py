"""What an inversion looks like: a strip of the target and of every weight, in colour and as a shape; an orbit; a mesh for every weight.

Letters: R pixels per edge, T frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eg3d_rlhf.evaluation.inversion.run import KIND, Inversions
from eg3d_rlhf.evaluation.inversion.targets import Case, turned
from eg3d_rlhf.evaluation.pictures import Side, colours
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import Row, sheet, to_uint8
from eg3d_rlhf.experiments.media.video import check_mp4, write_mp4
from eg3d_rlhf.generators import Generator, load_generator
from eg3d_rlhf.geometry.mesh_export import MeshOptions, export_mesh
from eg3d_rlhf.measures.surface_view import SUPERSAMPLE, look, paint, shrink
from training import storage

CELL, FILM = 192, 128  # pixels per edge of a cell of the strip, and of the film
RAYS, SAMPLES = 128, 40  # per edge, and per ray and pass, of coloured renderings
GRID = 128  # grid points per edge of the cube that finds surfaces
SWING, FPS = 0.9, 12  # radians to either side of the target's camera; pictures per second
STRIP, ORBIT = "strip.png", "orbit.mp4"


class Arm(NamedTuple):
    """One column: a shape under a name."""

    name: str
    generator: Generator
    side: Side


def arms_of(inversions: Inversions, case: Case) -> list[Arm]:
    """The truth where it is known, and every weight's generator, from its files."""
    own, folder, found = inversions.setup.loaded.generator, inversions.folder(case), []
    if case.truth is not None:
        found.append(Arm("truth", own, Side.of(own, case.truth.ws, GRID)))
    for weight in inversions.setup.weights:
        tuned = load_generator(folder / f"{weight:g}.safetensors", case.target.image.device).generator
        ws = storage.read_tensors(folder / f"{weight:g}-ws.safetensors", KIND)[0]["ws"].to(case.target.image)
        found.append(Arm(f"weight {weight:g}", tuned, Side.of(tuned, ws, GRID)))
    return found


def cells(arm: Arm, camera: torch.Tensor, pixels: int, factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An arm in colour and as clay, uint8 [R, R, 3]."""
    image = colours(arm.side.field, arm.generator, camera, min(RAYS, pixels), SAMPLES, pixels)
    shape = paint(look(arm.side.surface, camera, pixels * factor))
    return to_uint8(image.movedim(0, -1).cpu()), to_uint8((shrink(shape, factor) if factor > 1 else shape).cpu())


def strip(case: Case, arms: Sequence[Arm]) -> np.ndarray:
    """Target and arms side by side: colour and shape from the target's camera, and the shape turned by half the swing."""
    image = torch.nn.functional.interpolate(case.target.image.float() / 2 + 0.5, (CELL, CELL), mode="bicubic", antialias=True)[0]
    blank = np.full((CELL, CELL, 3), 255, dtype=np.uint8)
    rows: list[list[np.ndarray]] = [[to_uint8(image.movedim(0, -1).cpu())], [blank], [blank]]
    aside = turned(case.target.camera, SWING / 2, arms[0].generator.cameras.pivot)
    for arm in arms:
        seen = (*cells(arm, case.target.camera, CELL, SUPERSAMPLE), cells(arm, aside, CELL, SUPERSAMPLE)[1])
        for row, cell in zip(rows, seen, strict=True):
            row.append(cell)
    drawn = [Row(cells=row) for row in rows]
    drawn[-1] = replace(drawn[-1], captions=["target", *(arm.name for arm in arms)])
    return sheet("", drawn)


def orbit(case: Case, arms: Sequence[Arm], turns: int) -> Iterator[np.ndarray]:
    """Frames of all arms swung from side to side and back, colour above shape; uint8 [H, B, 3]."""
    swing, frames = SWING * np.sin(np.pi / 2 * np.linspace(-1, 1, turns)), []
    for yaw in tqdm(swing.tolist(), desc=f"orbit of {case.name}", unit="frame"):
        camera = turned(case.target.camera, yaw, arms[0].generator.cameras.pivot)
        seen = [cells(arm, camera, FILM) for arm in arms]
        rows = [Row(cells=[one[0] for one in seen], captions=[arm.name for arm in arms]), Row(cells=[one[1] for one in seen])]
        frames.append(sheet("", rows))
        yield frames[-1]
    yield from frames[-2:0:-1]


def draw(inversions: Inversions, case: Case, resolution: int, turns: int) -> None:
    """strip.png, orbit.mp4 and <weight>.ply of a target whose generators were kept; what cannot be drawn is said, and the rest is.

    Args: resolution: grid points per axis of the meshes; 0 for none. turns: views of the orbit from side to side; 0 for none.
    """
    folder, arms = inversions.folder(case), arms_of(inversions, case)
    storage.write_atomic(folder / STRIP, png(strip(case, arms)))
    if turns:
        write_mp4(check_mp4(folder / ORBIT), orbit(case, arms, turns), FPS, "2M")
    for arm in arms if resolution else ():
        name = arm.name.removeprefix("weight ")
        try:
            mesh, _ = export_mesh(arm.side.field, MeshOptions(resolution=resolution))
            mesh.save(folder / f"{name}.ply")
        except ValueError as error:  # a shape without a surface
            print(f"No mesh of {case.name} ({arm.name}): {error}")


def strip_of(inversions: Inversions, case: Case) -> Path:
    """Where a target's strip lies."""
    return inversions.folder(case) / STRIP
