"""The shapes and colours as they should be, the conditions that name them ("red ball"), and drafts of them with defects.

The toy's generator was trained on drafts, each sample with its own strength of every defect. A draft is what an asset is made from: a
structure, and per voxel colour and size d. A voxel with d < 0 is carved away when the asset is made; one with d > 1 grows into an empty
place beside it, if another one grows there too. So d can repair what is wrong with a structure: drafts do so for some of their floaters
and holes.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from eg3d_rlhf.flow.sparse import Batch, SparseBatch

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


CARVED, KEPT, GROWING = -0.5, 0.5, 1.5  # the sizes d of drafts
CHANNELS = 4  # r, g, b, d
SIZE_JITTER = 0.08  # deviation of d around these


@dataclass(frozen=True, kw_only=True)
class Defects:
    """The most of each defect; a sample's own strength is uniform between none and this."""

    floaters: float = 0.03  # share of the empty places that are filled
    holes: float = 0.15  # share of the shape's voxels that are missing
    unrepaired: float = 1.0  # share of these that d leaves as they are
    wrong: float = 0.08  # share of the shape's voxels that d carves or grows for nothing
    tint: float = 0.15  # deviation of the whole asset's colour, in units of 0..1
    noise: float = 0.25  # deviation of every voxel's colour around that

    def __post_init__(self):
        for item in fields(self):
            if not 0 <= getattr(self, item.name) <= 1:
                raise ValueError(f"Defects.{item.name}: expected 0 to 1, got {getattr(self, item.name)}. Set it.")


@dataclass(frozen=True)
class Drafts:
    """Assets before they are made."""

    structure: torch.Tensor  # [N, R, R, R] bool
    features: torch.Tensor  # [N, R, R, R, 4]: r, g, b in 0..1 before clipping, and d; read at the structure's voxels

    def latents(self, stage: str) -> Batch:
        """The x_0 of a stage: "structure" [N, 1, R, R, R] of -1 and 1; "voxels" all features, scaled from 0..1 to -1..1."""
        if stage == "structure":
            return self.structure[:, None].float() * 2 - 1
        return SparseBatch(self.structure.nonzero().int().contiguous(), self.features[self.structure] * 2 - 1, len(self.structure))


def draw_drafts(conditions: Sequence[str], generator: torch.Generator, defects: Defects | None = None) -> Drafts:
    """One draft per condition, of a random variant of its shape."""
    defects = defects or Defects()
    shapes, colours = targets(conditions)
    n = len(shapes)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    def strength(most: float) -> torch.Tensor:
        return most * uniform(n, 1, 1, 1)

    shape = shapes[torch.arange(n), torch.randint(shapes.shape[1], (n,), generator=generator)]
    floaters = ~shape & (uniform(*shape.shape) < strength(defects.floaters))
    holes = shape & (uniform(*shape.shape) < strength(defects.holes))
    structure = (shape & ~holes) | floaters
    repaired = uniform(*shape.shape) >= strength(defects.unrepaired)
    wrong = shape & (uniform(*shape.shape) < strength(defects.wrong))
    grows_wrongly = uniform(*shape.shape) < 0.5
    growing = (neighbours(holes & repaired) > 0) | (wrong & grows_wrongly)
    carved = (floaters & repaired) | (wrong & ~grows_wrongly)
    d = torch.full(shape.shape, KEPT).masked_fill(growing & shape, GROWING).masked_fill(carved, CARVED)
    d = d + SIZE_JITTER * torch.randn(shape.shape, generator=generator)
    tint = strength(defects.tint)[..., None] * torch.randn(n, 1, 1, 1, 3, generator=generator)
    noise = strength(defects.noise)[..., None] * torch.randn(n, R, R, R, 3, generator=generator)
    return Drafts(structure, torch.cat([colours + tint + noise, d[..., None]], dim=-1))


def neighbours(grid: torch.Tensor) -> torch.Tensor:
    """Sum over the six face neighbours of every place of [N, R, R, R, ...]; nothing lies outside the grid."""
    values = grid.float()
    total = torch.zeros_like(values)
    for axis in (1, 2, 3):
        for step in (-1, 1):
            start = max(step, 0)
            total.narrow(axis, 1 - start, R - 1).add_(values.narrow(axis, start, R - 1))
    return total
