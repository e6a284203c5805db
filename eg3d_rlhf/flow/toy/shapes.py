"""The shapes and colours as they should be, and the conditions that name them: "red ball"."""

import functools
from collections.abc import Callable, Sequence

import torch

R = 8  # grid points per axis
COLOURS = {
    "red": (0.85, 0.15, 0.15), "orange": (0.95, 0.55, 0.10), "yellow": (0.95, 0.90, 0.20), "green": (0.20, 0.70, 0.20),
    "cyan": (0.15, 0.75, 0.80), "blue": (0.15, 0.25, 0.85), "purple": (0.60, 0.20, 0.75), "grey": (0.55, 0.55, 0.55),
}  # fmt: skip
DARKEST = 0.65  # brightness at the bottom, as a share of that at the top
LIFTS = (0, 1)  # heights at which a shape may stand
SIZES = (0, 1)  # small and large

Grid = torch.Tensor
_Inside = Callable[[Grid, Grid, Grid, int], Grid]  # (x to either side, y, z, size) -> which voxels belong to the shape


def _ball(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    return x**2 + y**2 + (z - 2.5) ** 2 <= (5.3, 7.3)[size]


def _box(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    return (x < (2, 3)[size]) & (y.abs() < 2) & (z < 4)


def _pyramid(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    return torch.maximum(x, y.abs()) < (3, 4)[size] - z


def _pillar(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    return (x**2 + y**2 < (2.6, 4.6)[size]) & (z < (5, 6)[size])


def _table(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    half, height = (3, 4)[size], (3, 4)[size]
    side = torch.maximum(x, y.abs())
    leg = torch.minimum(x, y.abs()) > half - 1
    return (side < half) & ((z == height) | (leg & (z < height)))


def _chair(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    half, seat = (2, 3)[size], (2, 3)[size]
    inside, leg = torch.maximum(x, y.abs()) < half, torch.minimum(x, y.abs()) > half - 1
    return inside & ((z == seat) | (leg & (z < seat)) | ((y < 1 - half) & (z > seat) & (z <= 2 * seat)))


def _arch(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    half = (3, 4)[size]
    return (x < half) & (y.abs() < 2) & ((z == 4) | ((z < 4) & (x > 2)))


def _cross(x: Grid, y: Grid, z: Grid, size: int) -> Grid:
    arm = (x < (3, 4)[size]) & (z >= 3) & (z <= 4)
    return (y.abs() < (1, 2)[size]) & (z < 7) & ((x < 1) | arm)


SHAPES: dict[str, _Inside] = {
    "ball": _ball, "box": _box, "pyramid": _pyramid, "pillar": _pillar, "table": _table, "chair": _chair, "arch": _arch, "cross": _cross,
}  # fmt: skip
VARIANTS = tuple((size, lift) for size in SIZES for lift in LIFTS)
CONDITIONS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
HELD_OUT = tuple(  # three colours of every shape, three shapes of every colour
    f"{colour} {shape}" for i, shape in enumerate(SHAPES) for j, colour in enumerate(COLOURS) if (i + 3 * j) % 8 < 3
)
TRAINED = tuple(name for name in CONDITIONS if name not in HELD_OUT)


@functools.cache
def canonical_shapes() -> torch.Tensor:
    """Every shape without defects, [shapes, K, R, R, R] bool; K = 4: both sizes at both heights."""
    i, j, k = torch.meshgrid(*[torch.arange(R, dtype=torch.float32)] * 3, indexing="ij")
    x, y = (i - (R - 1) / 2).abs(), j - (R - 1) / 2
    variants = [[inside(x, y, k - lift, size) & (k >= lift) for size, lift in VARIANTS] for inside in SHAPES.values()]
    return torch.stack([torch.stack(of_one) for of_one in variants])


@functools.cache
def canonical_colours() -> torch.Tensor:
    """Every colour without defects, [colours, R, 3] by height: brighter towards the top."""
    brightness = torch.linspace(DARKEST, 1, R)
    return torch.tensor(list(COLOURS.values()))[:, None] * brightness[None, :, None]


def classes(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of shape and colour of every condition, two of [N] int64.

    Raises: ValueError for a condition that the toy does not know.
    """
    shapes, colours = list(SHAPES), list(COLOURS)
    pairs = []
    for name in conditions:
        colour, _, shape = name.partition(" ")
        if shape not in SHAPES or colour not in COLOURS:
            known = f"one of {', '.join(COLOURS)} and one of {', '.join(SHAPES)}"
            raise ValueError(f"condition: expected {known}, as in 'red ball', got {name!r}. Name one of these.")
        pairs.append((shapes.index(shape), colours.index(colour)))
    found = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return found[:, 0], found[:, 1]


def targets(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a condition asks for: shapes [N, K, R, R, R] bool, any of which will do, and colours [N, R, R, R, 3] of all places."""
    shapes, colours = classes(conditions)
    return canonical_shapes()[shapes], canonical_colours()[colours][:, None, None].expand(-1, R, R, -1, -1)
